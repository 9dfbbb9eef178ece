//! The system calls of a worker that has its files open already: an allow-list.
//!
//! What is not on the list fails with `EPERM`; that is enough, since a call that fails does
//! nothing, and it leaves a worker the chance to say what went wrong. clone3(2) fails with
//! `ENOSYS`, so that the C library starts its threads with clone(2), whose flags a filter can see.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use crate::confine::Access;

/// Read and write open files, but not arrange their blocks; memory; threads; time; the end.
const ALLOWED: &[libc::c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_clone3,
    libc::SYS_close,
    libc::SYS_copy_file_range,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fdatasync,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_getrusage,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_ppoll,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_statx,
    libc::SYS_sync_file_range,
    libc::SYS_write,
    libc::SYS_writev,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    libc::SYS_newfstatat,
];

/// A thread as C libraries start one: it shares all it has with the others of its process. musl adds
/// a flag that means nothing any more, `CLONE_DETACHED`.
const THREAD: libc::c_int = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID;

/// What fcntl(2) may do: copy a descriptor and look at its flags. Not ask for signals to whom it
/// likes, nor change the flags of open files, which who handed them over has too, nor take leases
/// and locks.
const FCNTL: [libc::c_int; 5] =
    [libc::F_DUPFD, libc::F_DUPFD_CLOEXEC, libc::F_GETFD, libc::F_SETFD, libc::F_GETFL];

/// Looks at what lies in a directory that was handed over.
const LOOKING: &[libc::c_long] = &[
    libc::SYS_fchdir,
    libc::SYS_fgetxattr,
    libc::SYS_flistxattr,
    libc::SYS_getdents64,
    libc::SYS_lgetxattr,
    libc::SYS_llistxattr,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_readlinkat,
];

/// Fills a directory that was handed over.
const FILLING: &[libc::c_long] = &[
    libc::SYS_fchmod,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_fsetxattr,
    libc::SYS_linkat,
    libc::SYS_lsetxattr,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_symlinkat,
    libc::SYS_utimensat,
];

/// Sets the filters for this thread and those it starts.
pub(crate) fn apply(access: Option<Access>) -> io::Result<()> {
    let more: &[&[libc::c_long]] = match access {
        None => &[],
        Some(Access::Look) => &[LOOKING],
        Some(Access::Fill) => &[LOOKING, FILLING],
    };
    // In this order: the list does not let another filter be set. Of two words the stricter counts.
    for filter in [no_clone3()?, allow_list(more)?] {
        seccompiler::apply_filter(&filter).map_err(io::Error::other)?;
    }
    Ok(())
}

/// Refuses these calls to this thread and those it starts, the limits of other processes, sockets that
/// are none of the internet, and mounts of what is not mounted yet.
pub(crate) fn refuse(calls: &[libc::c_long]) -> io::Result<()> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        calls.iter().map(|&call| (call, Vec::new())).collect();
    // A limit that is set to nothing is a signal, too.
    rules.insert(libc::SYS_prlimit64, vec![rule([other_than(0, 0)?])?]);
    rules.insert(libc::SYS_socket, foreign_sockets()?);
    rules.insert(libc::SYS_socketpair, loose_pairs()?);
    rules.insert(libc::SYS_mount, new_mounts()?);
    let refused = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    for filter in [compiled(rules, SeccompAction::Allow, refused)?, no_second_numbers()] {
        seccompiler::apply_filter(&filter).map_err(io::Error::other)?;
    }
    Ok(())
}

/// Sockets of other families than the internet's, but for the one that the C library asks for
/// addresses before it resolves a name; and of protocols that a kernel module would be loaded for.
fn foreign_sockets() -> io::Result<Vec<SeccompRule>> {
    let netlink = libc::AF_NETLINK;
    Ok(vec![
        rule([
            other_than(0, libc::AF_INET)?,
            other_than(0, libc::AF_INET6)?,
            other_than(0, netlink)?,
        ])?,
        rule([
            other_than(2, 0)?,
            other_than(2, libc::IPPROTO_TCP)?,
            other_than(2, libc::IPPROTO_UDP)?,
        ])?,
        rule([equal(0, u64::from(netlink.unsigned_abs()))?, other_than(2, libc::NETLINK_ROUTE)?])?,
    ])
}

/// Pairs of sockets whose ends can be connected to somebody else: those that are no streams. A raw
/// one of unix(7) is a datagram's.
fn loose_pairs() -> io::Result<Vec<SeccompRule>> {
    /// `SOCK_TYPE_MASK`, linux/net.h: beside the type stand flags.
    const TYPE: u64 = 0xf;
    let of = |kind: libc::c_int| rule([masked(1, TYPE, u64::from(kind.unsigned_abs()))?]);
    Ok(vec![rule([other_than(0, libc::AF_UNIX)?])?, of(libc::SOCK_DGRAM)?, of(libc::SOCK_RAW)?])
}

/// Mounts that show a file system which is not shown yet, mount(2). Root of a user namespace may have a
/// `/proc` and groups of its own: the settings of the host are among those files, and they are open to
/// whoever is root outside, without a capability.
fn new_mounts() -> io::Result<Vec<SeccompRule>> {
    // With one of these only what is mounted already is changed, moved or shown once more.
    let of_old = libc::MS_REMOUNT | libc::MS_BIND | libc::MS_MOVE;
    let of_ways = libc::MS_SHARED | libc::MS_PRIVATE | libc::MS_SLAVE | libc::MS_UNBINDABLE;
    // The kernel takes this away before it looks at the flags, some of which it looks like.
    let (mask, magic) = (libc::MS_MGC_MSK, libc::MS_MGC_VAL);
    Ok(vec![rule([masked(3, of_old | of_ways, 0)?])?, rule([masked(3, mask, magic)?])?])
}

/// Refuses the numbers by which x86-64 has every call a second time, for programs of 32 bits with
/// its registers ("x32", asm/unistd.h): a list of what is refused does not have those. On other
/// machines no call has such a number.
fn no_second_numbers() -> BpfProgram {
    /// `__X32_SYSCALL_BIT`.
    const SECOND: u32 = 0x4000_0000;
    // The number of the call is the first field of `struct seccomp_data`: seccomp(2).
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let compare = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
    let answer = libc::BPF_RET | libc::BPF_K;
    let refused = libc::SECCOMP_RET_ERRNO | libc::EPERM.unsigned_abs();
    let lines = [
        (load, 0, 0, 0),
        (compare, 0, 1, SECOND),
        (answer, 0, 0, refused),
        (answer, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    // The codes of the instructions have 16 bits.
    let code = |code: u32| u16::try_from(code).unwrap_or_default();
    lines.map(|(of, jt, jf, k)| seccompiler::sock_filter { code: code(of), jt, jf, k }).into()
}

fn allow_list(more: &[&[libc::c_long]]) -> io::Result<BpfProgram> {
    let calls = ALLOWED.iter().chain(more.iter().copied().flatten());
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        calls.map(|&call| (call, Vec::new())).collect();
    // Threads of this process, and nothing else.
    let detached = libc::CLONE_DETACHED.unsigned_abs();
    let thread = masked(0, u64::from(!detached), u64::from(THREAD.unsigned_abs()))?;
    rules.insert(libc::SYS_clone, vec![rule([thread])?]);
    // No memory that is made executable, and none that `RLIMIT_DATA` does not count: what is shared,
    // and what grows like a stack.
    let exec = u64::from(libc::PROT_EXEC.unsigned_abs());
    let kind = u64::from((libc::MAP_TYPE | libc::MAP_GROWSDOWN).unsigned_abs());
    let private = masked(3, kind, u64::from(libc::MAP_PRIVATE.unsigned_abs()))?;
    rules.insert(libc::SYS_mmap, vec![rule([masked(2, exec, 0)?, private])?]);
    rules.insert(libc::SYS_mprotect, vec![rule([masked(2, exec, 0)?])?]);
    rules.insert(libc::SYS_fcntl, one_of(1, &FCNTL)?);
    // A thread's name, and names of mappings.
    rules.insert(libc::SYS_prctl, one_of(0, &[libc::PR_SET_NAME, libc::PR_SET_VMA])?);
    // Its own limits may be read, not set: the new one is a null pointer.
    let reading = SeccompCondition::new(2, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)
        .map_err(io::Error::other)?;
    rules.insert(libc::SYS_prlimit64, vec![rule([equal(0, 0)?, reading])?]);
    // Who aborts signals himself. Without a PID namespace others could be named.
    let itself = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, vec![rule([equal(0, itself)?])?]);
    let refused = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    compiled(rules, refused, SeccompAction::Allow)
}

fn no_clone3() -> io::Result<BpfProgram> {
    let rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    compiled(rules, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS.unsigned_abs()))
}

fn compiled(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    mismatch: SeccompAction,
    matched: SeccompAction,
) -> io::Result<BpfProgram> {
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(io::Error::other)?;
    let filter = SeccompFilter::new(rules, mismatch, matched, arch).map_err(io::Error::other)?;
    BpfProgram::try_from(filter).map_err(io::Error::other)
}

fn masked(argument: u8, mask: u64, value: u64) -> io::Result<SeccompCondition> {
    let operator = SeccompCmpOp::MaskedEq(mask);
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)
        .map_err(io::Error::other)
}

fn other_than(argument: u8, value: libc::c_int) -> io::Result<SeccompCondition> {
    let value = u64::from(value.unsigned_abs());
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, value)
        .map_err(io::Error::other)
}

fn equal(argument: u8, value: u64) -> io::Result<SeccompCondition> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
        .map_err(io::Error::other)
}

/// A rule for each of the values that an argument may have.
fn one_of(argument: u8, values: &[libc::c_int]) -> io::Result<Vec<SeccompRule>> {
    values.iter().map(|value| rule([equal(argument, u64::from(value.unsigned_abs()))?])).collect()
}

/// All of the conditions together.
fn rule<const N: usize>(conditions: [SeccompCondition; N]) -> io::Result<SeccompRule> {
    SeccompRule::new(conditions.into()).map_err(io::Error::other)
}
