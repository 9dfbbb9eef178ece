//! The configuration of a command's container (OCI runtime specification, "Configuration").

use std::io;
use std::net::SocketAddr;
use std::path::Path;

use rustix::process::{Resource, Rlimit};
use sandbox::Users;
use serde_json::{Value, json};

use crate::order::{Base, Joins, Order, Scratch};
use crate::syscalls::{ALLOWED, CLONE_NEW, PERSONALITIES, RLIMIT_CORE, SOCKETS};

const DONE: u32 = 0;
const EPERM: u32 = 1;
const ENOSYS: u32 = 38;
const ENOTTY: u32 = 25;
const EOPNOTSUPP: u32 = 95;
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
const MASKED: [&str; 13] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/cmdline",
    "/proc/diskstats",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/modules",
    "/proc/partitions",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
];
const READ_ONLY: [&str; 5] =
    ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];
const OPEN_FILES: u64 = 65_536;
/// At once. All containers of a host together have 3072 by default, and one would take them all:
/// kernel documentation, "The Devpts Filesystem".
const TERMINALS: &str = "max=64";
/// What is smaller than a page is no core; and 1 alone keeps the kernel from starting the host's
/// program for cores, as root and outside, where core_pattern names one (kernel: fs/coredump.c).
const CORE_BYTES: u64 = 1;
/// The keeper, as its PID namespace and all below it see it.
const KEEPERS_NETWORK: &str = "/proc/1/ns/net";
/// Programs look for the one or the other.
const PROXY_VARIABLES: [&str; 4] = ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"];
const NO_PROXY_VARIABLES: [&str; 2] = ["no_proxy", "NO_PROXY"];
const NO_PROXY: &str = "localhost,127.0.0.1,::1";
/// `SOCK_TYPE_MASK`, linux/net.h: beside the type stand flags.
const SOCK_TYPE_MASK: u64 = 0xf;
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What is around a command.
pub(crate) struct Surroundings<'a> {
    /// The tree.
    pub(crate) root: &'a Path,
    pub(crate) group: &'a str,
    pub(crate) users: Users,
    /// Their namespace, where the runtime does not make one.
    pub(crate) namespace: Option<&'a Path>,
    /// The only way out of the network.
    pub(crate) door: Option<SocketAddr>,
}

/// The configuration of the container that runs `command`.
pub(crate) fn config(
    order: &Order,
    base: &Base,
    command: &str,
    around: &Surroundings<'_>,
) -> Value {
    let Surroundings { root, group, users, namespace, door } = *around;
    let mut namespaces: Vec<Value> =
        ["pid", "ipc", "uts", "mount", "cgroup"].map(|kind| json!({ "type": kind })).into();
    namespaces.push(match namespace {
        None => json!({ "type": "user" }),
        Some(path) => json!({ "type": "user", "path": path }),
    });
    namespaces.push(match door {
        None => json!({ "type": "network" }),
        Some(_) => json!({ "type": "network", "path": KEEPERS_NETWORK }),
    });
    let mut config = json!({
        "ociVersion": "1.0.2",
        "process": process(order, base, command, around),
        "root": { "path": root, "readonly": false },
        "hostname": "build",
        "mounts": mounts(),
        "linux": {
            "namespaces": namespaces,
            "cgroupsPath": group,
            "resources": resources(order),
            "seccomp": seccomp(order.scratch),
            "maskedPaths": MASKED,
            "readonlyPaths": READ_ONLY,
            "rootfsPropagation": "private",
        },
    });
    if namespace.is_none() || order.joins != Joins::Last {
        let map = json!([{ "containerID": 0, "hostID": users.first, "size": users.count }]);
        config["linux"]["uidMappings"] = map.clone();
        config["linux"]["gidMappings"] = map;
    }
    config
}

fn process(order: &Order, base: &Base, command: &str, around: &Surroundings<'_>) -> Value {
    let directory = match base.working_directory.as_str() {
        absolute if absolute.starts_with('/') => absolute.to_owned(),
        relative => format!("/{relative}"),
    };
    let sets: serde_json::Map<String, Value> = ["bounding", "effective", "permitted"]
        .map(|set| (set.to_owned(), json!(CAPABILITIES)))
        .into_iter()
        .collect();
    let limits: Vec<Value> = match around.namespace {
        None => limits(order).iter().map(shown).collect(),
        // Those of the keeper: over processes in a namespace that is not root's the runtime has no power
        // where root is without CAP_SYS_RESOURCE.
        Some(_) => Vec::new(),
    };
    json!({
        "terminal": false,
        "user": { "uid": 0, "gid": 0 },
        "args": ["/bin/sh", "-c", command],
        "env": environment(base, around.door),
        "cwd": directory,
        "capabilities": sets,
        "noNewPrivileges": true,
        "oomScoreAdj": 500,
        "rlimits": limits,
    })
}

/// The variables of a command.
pub(crate) fn environment(base: &Base, door: Option<SocketAddr>) -> Vec<String> {
    // What is no variable in an image's config is nobody's.
    let is_variable = |entry: &&String| {
        !entry.contains('\0') && entry.split_once('=').is_some_and(|(name, _)| !name.is_empty())
    };
    let mut environment: Vec<String> =
        base.environment.iter().filter(is_variable).cloned().collect();
    if let Some(door) = door {
        // A proxy that the image names is not to be reached.
        let is_ours =
            |name: &str| PROXY_VARIABLES.contains(&name) || NO_PROXY_VARIABLES.contains(&name);
        environment.retain(|entry| !entry.split('=').next().is_some_and(is_ours));
        environment.extend(PROXY_VARIABLES.map(|name| format!("{name}=http://{door}")));
        environment.extend(NO_PROXY_VARIABLES.map(|name| format!("{name}={NO_PROXY}")));
    }
    let has = |name: &str| environment.iter().any(|entry| entry.split('=').next() == Some(name));
    let missing =
        [("PATH", PATH), ("HOME", "HOME=/root")].into_iter().filter(|(name, _)| !has(name));
    let missing: Vec<String> = missing.map(|(_, entry)| entry.to_owned()).collect();
    environment.extend(missing);
    environment
}

/// A limit of a command's processes, by its name in a configuration.
type Limit = (&'static str, Resource, u64);

fn limits(order: &Order) -> Vec<Limit> {
    let mut limits = vec![
        ("RLIMIT_CORE", Resource::Core, CORE_BYTES),
        ("RLIMIT_MEMLOCK", Resource::Memlock, 64 << 10),
        ("RLIMIT_NOFILE", Resource::Nofile, OPEN_FILES),
    ];
    if order.scratch == Scratch::Watched {
        limits.push(("RLIMIT_FSIZE", Resource::Fsize, order.disk_bytes));
    }
    // Never above the present hard limit, which not every service may raise.
    for (_, resource, wanted) in &mut limits {
        let most = rustix::process::getrlimit(*resource).maximum;
        *wanted = most.map_or(*wanted, |most| most.min(*wanted));
    }
    limits
}

/// Sets the limits of commands for this process and those that it starts.
pub(crate) fn set_limits(order: &Order) -> io::Result<()> {
    for (_, resource, most) in limits(order) {
        let limit = Rlimit { current: Some(most), maximum: Some(most) };
        rustix::process::setrlimit(resource, limit)?;
    }
    Ok(())
}

fn shown(&(name, _, most): &Limit) -> Value {
    json!({ "type": name, "hard": most, "soft": most })
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
          "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620",
                      TERMINALS] },
        { "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
          "options": ["nosuid", "noexec", "nodev"] },
    ])
}

fn resources(order: &Order) -> Value {
    let limits = &order.limits;
    let memory = i64::try_from(limits.memory_bytes).unwrap_or(i64::MAX);
    json!({
        "devices": [{ "allow": false, "access": "rwm" }],
        // The second counts memory and swap together.
        "memory": { "limit": memory, "swap": memory },
        "pids": { "limit": limits.pids_max },
    })
}

fn seccomp(scratch: Scratch) -> Value {
    let architectures: &[&str] = match std::env::consts::ARCH {
        "x86_64" => &["SCMP_ARCH_X86_64"],
        "aarch64" => &["SCMP_ARCH_AARCH64"],
        _ => &[],
    };
    let allow = "SCMP_ACT_ALLOW";
    let equal =
        |index: u32, value: u64| json!({ "index": index, "value": value, "op": "SCMP_CMP_EQ" });
    let other =
        |index: u32, value: u64| json!({ "index": index, "value": value, "op": "SCMP_CMP_NE" });
    let mut rules = vec![
        json!({ "names": ALLOWED, "action": allow }),
        json!({ "names": ["clone"], "action": allow, "args": [
            { "index": 0, "value": CLONE_NEW, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ" },
        ] }),
        // The C library falls back to clone, whose flags a filter can see.
        json!({ "names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS }),
    ];
    rules.extend(reservation(scratch, allow));
    for (family, kind, protocol) in SOCKETS {
        let mut args = vec![equal(0, family)];
        args.extend(kind.map(|kind| {
            json!({ "index": 1, "value": SOCK_TYPE_MASK, "valueTwo": kind,
                    "op": "SCMP_CMP_MASKED_EQ" })
        }));
        args.extend(protocol.map(|protocol| equal(2, protocol)));
        rules.push(json!({ "names": ["socket"], "action": allow, "args": args }));
    }
    for value in PERSONALITIES {
        let args = [equal(0, value)];
        rules.push(json!({ "names": ["personality"], "action": allow, "args": args }));
    }
    rules.extend(core_limit(allow, &equal, &other));
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": EPERM,
        "architectures": architectures,
        "syscalls": rules,
    })
}

/// Calls that reserve disk. They take a whole one in no time, so that it can be too late when it is
/// counted; the C library writes the file instead.
fn reservation(scratch: Scratch, allow: &str) -> Vec<Value> {
    // The byte of an ioctl's number that says whose it is: `_IOC_TYPE`, linux/ioctl.h.
    const OWNER: u64 = 0xff00;
    // Those of XFS, which Linux has for all file systems: `FS_IOC_RESVSP` and others, falloc.h.
    const OF_XFS: u64 = 0x5800;
    let refuse = "SCMP_ACT_ERRNO";
    let masked = |mask: u64, value: u64| {
        let is_so = "SCMP_CMP_MASKED_EQ";
        json!([{ "index": 1, "value": mask, "valueTwo": value, "op": is_so }])
    };
    if scratch == Scratch::Sized {
        return vec![json!({ "names": ["fallocate", "ioctl"], "action": allow })];
    }
    let mut rules = vec![
        json!({ "names": ["fallocate"], "action": refuse, "errnoRet": EOPNOTSUPP }),
        json!({ "names": ["ioctl"], "action": refuse, "errnoRet": ENOTTY,
                "args": masked(OWNER, OF_XFS) }),
    ];
    // A filter has no "other than" for a part of a number: one of these bits must be another.
    let bits = (0..u64::BITS).map(|bit| 1 << bit).filter(|bit: &u64| OWNER & bit != 0);
    rules.extend(bits.map(|bit| {
        let args = masked(bit, !OF_XFS & bit);
        json!({ "names": ["ioctl"], "action": allow, "args": args })
    }));
    rules
}

/// Limits may be set but for that of cores: a program that forbids itself cores is told that it is
/// done, since none comes in any case.
fn core_limit(
    allow: &str,
    equal: &dyn Fn(u32, u64) -> Value,
    other: &dyn Fn(u32, u64) -> Value,
) -> [Value; 5] {
    let done = "SCMP_ACT_ERRNO";
    let rule = |name: &str, action: &str, args: &[Value]| match action == allow {
        true => json!({ "names": [name], "action": action, "args": args }),
        false => json!({ "names": [name], "action": action, "errnoRet": DONE, "args": args }),
    };
    [
        rule("setrlimit", allow, &[other(0, RLIMIT_CORE)]),
        rule("setrlimit", done, &[equal(0, RLIMIT_CORE)]),
        rule("prlimit64", allow, &[other(1, RLIMIT_CORE)]),
        // Without new limits it only asks.
        rule("prlimit64", allow, &[equal(1, RLIMIT_CORE), equal(2, 0)]),
        rule("prlimit64", done, &[equal(1, RLIMIT_CORE), other(2, 0)]),
    ]
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use rootfs::TreeLimits;

    use super::*;
    use crate::CommandLimits;

    #[test]
    fn users_are_told_where_the_runtime_makes_their_namespace_or_must_be_told() {
        let config_of = |joins: Joins, namespace: Option<&Path>| {
            let order = Order {
                scratch_directory: PathBuf::new(),
                scratch: Scratch::Sized,
                disk_bytes: 0,
                runtime: PathBuf::new(),
                joins,
                commands: Vec::new(),
                limits: CommandLimits { memory_bytes: 1, pids_max: 1, secs_max: None },
                tree_limits: TreeLimits::default(),
                layer_bytes_max: 0,
                has_door: false,
            };
            let users = Users { first: 7, count: 2 };
            let root = Path::new("/root");
            let around = Surroundings { root, group: "group", users, namespace, door: None };
            config(&order, &Base::default(), "true", &around)
        };
        let map = json!([{ "containerID": 0, "hostID": 7, "size": 2 }]);
        for (joins, namespace, is_told) in [
            (Joins::Never, None, true),
            (Joins::First, None, true),
            (Joins::First, Some("/mnt/users"), true),
            (Joins::Last, Some("/mnt/users"), false),
        ] {
            let config = config_of(joins, namespace.map(Path::new));
            let linux = config["linux"].as_object().unwrap();
            for name in ["uidMappings", "gidMappings"] {
                let told = linux.get(name);
                assert_eq!(told, is_told.then_some(&map), "{joins:?} {namespace:?}");
            }
            let user = |kind: &&Value| kind["type"] == "user";
            let user = linux["namespaces"].as_array().unwrap().iter().find(user).unwrap();
            assert_eq!(user.get("path").and_then(Value::as_str), namespace);
        }
    }
}
