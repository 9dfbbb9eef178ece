//! A file as a block device: loop(4).

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

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
    /// most. So little is on its way to the disk when somebody else needs it. The kernel keeps that
    /// bound for whoever has the device next: [`LoopDevice::unbound_free`] takes it away.
    ///
    /// # Errors
    /// [`SandboxError`] when the host has no loop devices, or none is free.
    pub fn attach(file: &File) -> Result<Self, SandboxError> {
        attach(file).map_err(|source| SandboxError::new("use a loop device", source))
    }

    /// Gives back what [`LoopDevice::attach`] told the kernel of devices that nobody has any more,
    /// here or in a process that was killed.
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

/// Where the kernel is too old, or its settings cannot be written, it does as with any other device.
fn bound(device: &Path) {
    let bdi = device.join("bdi");
    // Without the second the first counts only once all memory is full of what is to be written.
    let _ = fs::write(bdi.join("max_bytes"), DIRTY_BYTES_MAX.to_string())
        .and_then(|()| fs::write(bdi.join("strict_limit"), "1"));
}

/// Gives back the bound of a device that nobody has.
fn unbound(device: &Path) {
    let bdi = device.join("bdi");
    let is_bound = fs::read_to_string(bdi.join("strict_limit")).is_ok_and(|is| is.trim() == "1");
    if is_bound && !device.join("loop/backing_file").exists() {
        let _ = fs::write(bdi.join("strict_limit"), "0")
            .and_then(|()| fs::write(bdi.join("max_ratio"), "100"));
    }
}
