//! A file as a block device: loop(4).

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::SandboxError;

const CONTROL: &str = "/dev/loop-control";
/// linux/loop.h.
const LOOP_CONFIGURE: libc::c_ulong = 0x4C0A;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;
/// Others look for a free device at the same time.
const TRIES: u32 = 64;
/// Written to a device and not yet on the disk, at the most: by default the kernel waits for a tenth
/// of all memory before it begins, and whoever needs the disk then waits for all of that.
const DIRTY_BYTES_MAX: u64 = 64 << 20;
/// Every block device, and below each what the kernel knows of it: kernel documentation
/// "ABI/stable/sysfs-block" and "ABI/testing/sysfs-class-bdi".
const DEVICES: &str = "/sys/block";
/// As the kernel has a device at first: files of it, and what is in them. The last of them is what the
/// device may keep for itself of all that waits for disks, in millionths.
const FREE: [(&str, &str); 3] =
    [("bdi/strict_limit", "0"), ("bdi/max_ratio_fine", "1000000"), ("bdi/min_ratio_fine", "0")];
/// Says that the bound of a device is from here: next to nothing, and a number that nobody else writes.
const MARK: (&str, &str) = ("bdi/min_ratio_fine", "7");
/// On their way to the disk at once, at the most: so many requests of so many KiB. The least that the
/// kernel allows, and 1 MiB with it: it keeps a disk of 1 GB/s at work, and whoever writes beside it
/// waits for that much and not for a hundred times more.
const QUEUE: [(&str, &str); 2] = [("queue/nr_requests", "4"), (REQUEST_KIB, "256")];
/// As the kernel has it at first.
const FREE_QUEUE: (&str, &str) = ("queue/nr_requests", "128");
const REQUEST_KIB: &str = "queue/max_sectors_kb";
/// What brings back the kernel's own choice: from Linux 6.4 on the first, before it what that was.
const FREE_REQUEST_KIB: [&str; 2] = ["0", "1280"];
/// How often, and how long after one another, a device is looked at that somebody is just setting.
const TURNS_MAX: u32 = 1000;
const TURN_POLL: Duration = Duration::from_millis(1);

/// `struct loop_info64`.
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// A block device over a file. It is taken apart by the kernel once neither this value nor a mount
/// holds it, so nothing is left of it however its users end.
#[derive(Debug)]
pub struct LoopDevice {
    _device: File,
    path: PathBuf,
}

impl LoopDevice {
    /// Makes `file` a block device. Needs root.
    ///
    /// Where the file's own file system can, the device writes past the page cache: what is written
    /// to it waits in one cache and not in two. And on Linux 6.2 or later 64 MiB wait there at the
    /// most, and 1 MiB is on its way to the disk when somebody else needs it. The kernel keeps these
    /// bounds for whoever has the device next: [`LoopDevice::unbound_free`] takes them away.
    ///
    /// # Errors
    /// [`SandboxError`] when the host has no loop devices, or none is free.
    pub fn attach(file: &File) -> Result<Self, SandboxError> {
        attach(file).map_err(|source| SandboxError::new("use a loop device", source))
    }

    /// Gives back what [`LoopDevice::attach`] told the kernel of devices that nobody has any more,
    /// here or in a process that was killed. What others have told it stays.
    pub fn unbound_free() {
        let devices = fs::read_dir(DEVICES).into_iter().flatten().flatten();
        let is_loop = |name: &str| name.strip_prefix("loop").is_some_and(is_number);
        devices
            .filter(|device| device.file_name().to_str().is_some_and(is_loop))
            .for_each(|device| unbound(&device.path()));
    }

    /// Whether this host has loop devices that this process may use.
    #[must_use]
    pub fn is_there() -> bool {
        OpenOptions::new().read(true).write(true).open(CONTROL).is_ok()
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn attach(file: &File) -> io::Result<LoopDevice> {
    let control = OpenOptions::new().read(true).write(true).open(CONTROL)?;
    let mut last = io::Error::from(io::ErrorKind::ResourceBusy);
    for _ in 0..TRIES {
        // SAFETY: this request takes no argument.
        let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let device = OpenOptions::new().read(true).write(true).open(&path)?;
        // SAFETY: all zeroes is a valid configuration: no offset, no limit, no encryption.
        let mut config: LoopConfig = unsafe { std::mem::zeroed() };
        config.fd = file.as_raw_fd().unsigned_abs();
        // The kernel leaves the second out where it cannot be had.
        config.info.flags = LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO;
        // SAFETY: the kernel reads a `struct loop_config`, which lives across the call.
        let done = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
        if done == 0 {
            bound(&Path::new(DEVICES).join(format!("loop{number}")));
            return Ok(LoopDevice { _device: device, path });
        }
        last = io::Error::last_os_error();
        if last.raw_os_error() != Some(libc::EBUSY) {
            break;
        }
    }
    Err(last)
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Where the kernel is too old, or its settings cannot be written, it does as with any other device;
/// and where somebody else has set it already, as he wants it.
fn bound(device: &Path) {
    let Ok(turn) = turn(device) else { return };
    for _ in 0..TURNS_MAX {
        // Who takes away the bound of its last user must be done, or would take away this one.
        if turn.try_lock().is_ok() {
            break;
        }
        std::thread::sleep(TURN_POLL);
    }
    if !has(device, MARK) && !FREE.into_iter().all(|setting| has(device, setting)) {
        return;
    }
    let most = DIRTY_BYTES_MAX.to_string();
    // Without the last the one before counts only once all memory is full of what is to be written.
    set(device, &[MARK, ("bdi/max_bytes", &most), ("bdi/strict_limit", "1")]);
    if has(device, FREE_QUEUE) {
        set(device, &QUEUE);
    }
}

/// Gives back the bounds of a device that nobody has.
fn unbound(device: &Path) {
    let Ok(turn) = turn(device) else { return };
    // Whoever sets it just now has it.
    let is_free = turn.try_lock().is_ok() && !device.join("loop/backing_file").exists();
    if !is_free || !has(device, MARK) {
        return;
    }
    if has(device, QUEUE[0]) {
        let _ = FREE_REQUEST_KIB.iter().find(|size| set(device, &[(REQUEST_KIB, size)]));
        set(device, &[FREE_QUEUE]);
    }
    set(device, &FREE);
}

/// What is locked while a device is set: it is held as long as this is.
fn turn(device: &Path) -> io::Result<File> {
    File::open(device.join(MARK.0))
}

fn has(device: &Path, (file, value): (&str, &str)) -> bool {
    fs::read_to_string(device.join(file)).is_ok_and(|text| text.trim() == value)
}

/// As far as it goes: what is left half set has the mark still, or has it already. Whether all went.
fn set(device: &Path, settings: &[(&str, &str)]) -> bool {
    settings.iter().try_for_each(|(file, value)| fs::write(device.join(file), value)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device as the kernel shows it, with these settings.
    fn device(settings: &[(&str, &str)]) -> tempfile::TempDir {
        let device = tempfile::tempdir().unwrap();
        for part in ["bdi", "loop", "queue"] {
            fs::create_dir_all(device.path().join(part)).unwrap();
        }
        set(device.path(), settings);
        device
    }

    fn settings(device: &Path) -> [String; 3] {
        FREE.map(|(file, _)| fs::read_to_string(device.join(file)).unwrap())
    }

    fn queue(device: &Path) -> [String; 2] {
        QUEUE.map(|(file, _)| fs::read_to_string(device.join(file)).unwrap())
    }

    #[test]
    fn a_bound_is_set_and_taken_away_when_nobody_has_the_device() {
        let device = device(&FREE);
        let device = device.path();
        set(device, &[FREE_QUEUE, (REQUEST_KIB, "4096")]);
        bound(device);
        assert_eq!(settings(device), ["1", "1000000", "7"]);
        assert_eq!(queue(device), ["4", "256"]);
        assert_eq!(fs::read_to_string(device.join("bdi/max_bytes")).unwrap(), "67108864");
        fs::write(device.join("loop/backing_file"), "").unwrap();
        unbound(device);
        assert_eq!(settings(device), ["1", "1000000", "7"], "somebody has it");
        assert_eq!(queue(device), ["4", "256"], "somebody has it");
        fs::remove_file(device.join("loop/backing_file")).unwrap();
        // The kernel tells by this how much it is.
        fs::write(device.join("bdi/max_ratio_fine"), "14880").unwrap();
        unbound(device);
        assert_eq!(settings(device), FREE.map(|(_, value)| value));
        assert_eq!(queue(device), ["128", "0"]);
        // One who was killed between two settings has left some.
        fs::write(device.join(MARK.0), MARK.1).unwrap();
        unbound(device);
        assert_eq!(settings(device), FREE.map(|(_, value)| value));
    }

    #[test]
    fn what_somebody_else_has_set_stays_as_it_is() {
        for theirs in [["1", "1000000", "0"], ["0", "20000", "0"], ["0", "1000000", "5"]] {
            let names = FREE.map(|(file, _)| file);
            let pairs: Vec<_> = names.into_iter().zip(theirs).collect();
            let device = device(&pairs);
            unbound(device.path());
            assert_eq!(settings(device.path()), theirs);
            bound(device.path());
            assert_eq!(settings(device.path()), theirs);
            assert!(!device.path().join("bdi/max_bytes").exists());
            assert!(!device.path().join(QUEUE[0].0).exists());
        }
        // Nor is there anything to be set on an older kernel.
        let old = device(&FREE[..1]);
        bound(old.path());
        unbound(old.path());
        assert_eq!(fs::read_dir(old.path().join("bdi")).unwrap().count(), 1);
        // A queue of another depth is theirs, whoever bounds the rest.
        let device = device(&FREE);
        let theirs = [(QUEUE[0].0, "64"), (REQUEST_KIB, "4096")];
        set(device.path(), &theirs);
        for turn in [bound, unbound] {
            turn(device.path());
            assert_eq!(queue(device.path()), ["64", "4096"]);
        }
    }

    #[test]
    fn who_sets_a_device_and_who_gives_it_back_wait_for_each_other() {
        let device = device(&FREE);
        bound(device.path());
        let other = turn(device.path()).unwrap();
        other.lock().unwrap();
        unbound(device.path());
        assert_eq!(settings(device.path()), ["1", "1000000", "7"], "at the next look");
        std::thread::scope(|scope| {
            let binds = scope.spawn(|| bound(device.path()));
            std::thread::sleep(TURN_POLL * 10);
            set(device.path(), &FREE);
            other.unlock().unwrap();
            binds.join().unwrap();
        });
        assert_eq!(settings(device.path()), ["1", "1000000", "7"]);
    }
}
