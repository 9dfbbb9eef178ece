//! An attacker that has taken over a process which speaks to the network.

use std::fs::{self, File, OpenOptions};
use std::io::Read as _;
use std::path::Path;

use rustix::mount::MountFlags;
use sandbox::Sandbox;

/// Narrows the view to a directory, then tries what should and should not work. Beside the
/// directory lies a file `secret`; the arguments are both, and the number of another process.
pub(crate) fn narrow(kept: &Path, secret: &Path, other: u32) {
    let program = File::open("/proc/self/exe").unwrap();
    let had_hosts = Path::new("/etc/hosts").exists();
    sandbox::narrow(&[kept]).unwrap();
    let sysctl = "/proc/sys/kernel/core_pattern";
    let no_path = std::ptr::null::<libc::c_char>();
    // SAFETY: system calls without memory of this process.
    let (trace, key, namespace) = unsafe {
        (
            libc::syscall(libc::SYS_ptrace, libc::PTRACE_ATTACH, other, 0, 0) == 0,
            libc::syscall(libc::SYS_keyctl, 0, -3, 1) >= 0,
            libc::syscall(libc::SYS_open_by_handle_at, -1, no_path, 0) >= 0,
        )
    };
    let inside = kept.join("made");
    let tmpfs = rustix::mount::mount("none", kept, "tmpfs", MountFlags::empty(), None);
    for (name, is_done) in [
        ("write", fs::write(&inside, b"x").is_ok()),
        ("rename", fs::rename(&inside, kept.join("renamed")).is_ok()),
        ("hosts", !had_hosts || fs::read("/etc/hosts").is_ok()),
        ("null", fs::write("/dev/null", b"x").is_ok()),
        ("socket", std::net::TcpListener::bind("127.0.0.1:0").is_ok()),
        ("secret", fs::read(secret).is_ok()),
        ("shadow", fs::read("/etc/shadow").is_ok()),
        ("root", File::create("/made").is_ok()),
        ("program", File::create("/usr/made").is_ok()),
        ("sysctl", OpenOptions::new().write(true).open(sysctl).is_ok()),
        ("mount", tmpfs.is_ok()),
        ("unmount", rustix::mount::unmount(kept, rustix::mount::UnmountFlags::DETACH).is_ok()),
        ("memory", File::open(format!("/proc/{other}/mem")).is_ok()),
        ("others", fs::read_dir(format!("/proc/{other}/root/")).is_ok()),
        ("environment", fs::read(format!("/proc/{other}/environ")).is_ok()),
        ("trace", trace),
        ("key", key),
        ("handle", namespace),
    ] {
        println!("{name} {}", if is_done { "done" } else { "refused" });
    }
    // It can still start workers that are as shut in as ever.
    let (mut worker, mut pipes) = Sandbox::spawn(&program, &[c"attacker", c"walls"], &[]).unwrap();
    drop(pipes.stdin);
    let mut said = String::new();
    pipes.stdout.read_to_string(&mut said).unwrap();
    worker.wait().unwrap();
    println!("walls {}", said.trim());
}
