//! The configuration of a command's container (OCI runtime specification, "Configuration").

use std::path::Path;

use rustix::process::Resource;
use sandbox::Users;
use serde_json::{Value, json};

use crate::order::Order;
use crate::syscalls::{AF_ALG, AF_VSOCK, ALLOWED, CLONE_NEW, PERSONALITIES};

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;
/// capabilities(7), in the container's own user namespace: what a package manager needs.
const CAPABILITIES: [&str; 9] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];
/// What tells of the host, or steers it.
const MASKED: [&str; 9] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
];
const READ_ONLY: [&str; 5] =
    ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];
const OPEN_FILES: u64 = 65_536;
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The configuration of the container that runs `command` on the tree at `root`, in the cgroup
/// `group`.
pub(crate) fn config(
    order: &Order,
    command: &str,
    root: &Path,
    users: Users,
    group: &str,
) -> Value {
    let map = json!([{ "containerID": 0, "hostID": users.first, "size": users.count }]);
    let namespaces: Vec<Value> = ["user", "pid", "network", "ipc", "uts", "mount", "cgroup"]
        .map(|kind| json!({ "type": kind }))
        .into();
    json!({
        "ociVersion": "1.0.2",
        "process": process(order, command),
        "root": { "path": root, "readonly": false },
        "hostname": "build",
        "mounts": mounts(),
        "linux": {
            "namespaces": namespaces,
            "uidMappings": map,
            "gidMappings": map,
            "cgroupsPath": group,
            "resources": resources(order),
            "seccomp": seccomp(),
            "maskedPaths": MASKED,
            "readonlyPaths": READ_ONLY,
            "rootfsPropagation": "private",
        },
    })
}

fn process(order: &Order, command: &str) -> Value {
    // What is no variable in an image's config is nobody's.
    let is_variable = |entry: &&String| {
        !entry.contains('\0') && entry.split_once('=').is_some_and(|(name, _)| !name.is_empty())
    };
    let mut environment: Vec<String> =
        order.environment.iter().filter(is_variable).cloned().collect();
    let has =
        |name: &str| order.environment.iter().any(|entry| entry.split('=').next() == Some(name));
    if !has("PATH") {
        environment.push(PATH.to_owned());
    }
    if !has("HOME") {
        environment.push("HOME=/root".to_owned());
    }
    let directory = match order.working_directory.as_str() {
        absolute if absolute.starts_with('/') => absolute.to_owned(),
        relative => format!("/{relative}"),
    };
    let sets: serde_json::Map<String, Value> = ["bounding", "effective", "permitted"]
        .map(|set| (set.to_owned(), json!(CAPABILITIES)))
        .into_iter()
        .collect();
    json!({
        "terminal": false,
        "user": { "uid": 0, "gid": 0 },
        "args": ["/bin/sh", "-c", command],
        "env": environment,
        "cwd": directory,
        "capabilities": sets,
        "noNewPrivileges": true,
        "oomScoreAdj": 500,
        "rlimits": [
            limit("RLIMIT_CORE", Resource::Core, 0),
            limit("RLIMIT_MEMLOCK", Resource::Memlock, 64 << 10),
            limit("RLIMIT_NOFILE", Resource::Nofile, OPEN_FILES),
        ],
    })
}

/// Never above the present hard limit, which not every service may raise.
fn limit(name: &str, resource: Resource, wanted: u64) -> Value {
    let most = rustix::process::getrlimit(resource).maximum;
    let value = most.map_or(wanted, |most| most.min(wanted));
    json!({ "type": name, "hard": value, "soft": value })
}

fn mounts() -> Value {
    let tmpfs = |destination: &str, size: &str, mode: &str, more: &[&str]| {
        let mut options = vec!["nosuid".to_owned(), mode.to_owned(), size.to_owned()];
        options.extend(more.iter().map(|&option| option.to_owned()));
        json!({
            "destination": destination, "type": "tmpfs", "source": "tmpfs", "options": options,
        })
    };
    json!([
        { "destination": "/proc", "type": "proc", "source": "proc",
          "options": ["nosuid", "noexec", "nodev"] },
        tmpfs("/dev", "size=64k", "mode=755", &["strictatime"]),
        tmpfs("/dev/shm", "size=64m", "mode=1777", &["nodev", "noexec"]),
        { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
          "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"] },
        { "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
          "options": ["nosuid", "noexec", "nodev"] },
    ])
}

fn resources(order: &Order) -> Value {
    const PERIOD: u64 = 100_000;
    let limits = &order.limits;
    let memory = i64::try_from(limits.memory_bytes).unwrap_or(i64::MAX);
    json!({
        "devices": [{ "allow": false, "access": "rwm" }],
        // The second counts memory and swap together.
        "memory": { "limit": memory, "swap": memory },
        "pids": { "limit": limits.pids_max },
        "cpu": { "period": PERIOD, "quota": (PERIOD * limits.cpu_millis / 1000).max(1000) },
    })
}

fn seccomp() -> Value {
    let architectures: &[&str] = match std::env::consts::ARCH {
        "x86_64" => &["SCMP_ARCH_X86_64"],
        "aarch64" => &["SCMP_ARCH_AARCH64"],
        _ => &[],
    };
    let allow = "SCMP_ACT_ALLOW";
    let equal = |value: u64| json!([{ "index": 0, "value": value, "op": "SCMP_CMP_EQ" }]);
    let mut rules = vec![
        json!({ "names": ALLOWED, "action": allow }),
        json!({ "names": ["clone"], "action": allow, "args": [
            { "index": 0, "value": CLONE_NEW, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ" },
        ] }),
        // The C library falls back to clone, whose flags a filter can see.
        json!({ "names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS }),
    ];
    // Of several numbers between two that are refused, each is a range of its own.
    for args in [
        json!([{ "index": 0, "value": AF_ALG, "op": "SCMP_CMP_LT" }]),
        json!([{ "index": 0, "value": AF_ALG + 1, "op": "SCMP_CMP_EQ" }]),
        json!([{ "index": 0, "value": AF_VSOCK, "op": "SCMP_CMP_GT" }]),
    ] {
        rules.push(json!({ "names": ["socket"], "action": allow, "args": args }));
    }
    for value in PERSONALITIES {
        rules.push(json!({ "names": ["personality"], "action": allow, "args": equal(value) }));
    }
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": EPERM,
        "architectures": architectures,
        "syscalls": rules,
    })
}
