//! What the process says that fetches is judged before anything is done for it: a registry may
//! have taken it over. It can order no path and no right of the host, only files that it has open.

use std::os::fd::{AsFd as _, OwnedFd};

use rustix::fs::{FileType, OFlags};

use crate::CommandsError;
use crate::order::{Base, Order, PackPart};

/// The longest that the environment of an image and its list of layers can be: as JSON, twice a
/// config of the largest size.
pub(crate) const BASE_BYTES_MAX: u32 = 16 << 20;

/// How many files are needed for the layers of an image.
///
/// # Errors
/// When it has more layers than an image may, or names files that they would not need.
pub(crate) fn files(order: &Order, base: &Base) -> Result<usize, CommandsError> {
    let most = usize::try_from(order.tree_limits.layers_max).unwrap_or(usize::MAX);
    let files =
        base.packs.iter().map(|pack| pack.file).max().map_or(0, |last| last.saturating_add(1));
    match base.packs.len() <= most && files <= base.packs.len() {
        true => Ok(files),
        false => Err(refused("more layers than an image may have")),
    }
}

/// Whether what was handed over can hold the layers.
///
/// # Errors
/// When one is no file that is there to be read, or ends before its layer does.
pub(crate) fn packs(base: &Base, files: &[OwnedFd]) -> Result<(), CommandsError> {
    let sizes = files.iter().map(size).collect::<Result<Vec<u64>, _>>()?;
    match lie_within(base, &sizes) {
        true => Ok(()),
        false => Err(refused("a layer that is not in its file")),
    }
}

/// Whether each layer lies in one of the files of these sizes.
pub(crate) fn lie_within(base: &Base, sizes: &[u64]) -> bool {
    let lies_in = |part: &PackPart| {
        let end = part.base.checked_add(part.length);
        sizes.get(part.file).is_some_and(|size| end.is_some_and(|end| end <= *size))
    };
    base.packs.iter().all(lies_in)
}

/// How large a file is that is one, and open to be read alone.
fn size(file: &OwnedFd) -> Result<u64, CommandsError> {
    let failed = |_| refused("what cannot be looked at");
    let flags = rustix::fs::fcntl_getfl(file.as_fd()).map_err(failed)?;
    let stat = rustix::fs::fstat(file).map_err(failed)?;
    let is_read = flags & OFlags::RWMODE == OFlags::RDONLY && !flags.contains(OFlags::PATH);
    match is_read && FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
        true => Ok(u64::try_from(stat.st_size).unwrap_or(0)),
        false => Err(refused("what is no file that is open to be read alone")),
    }
}

/// No image and no tenant brings this about.
fn refused(what: &str) -> CommandsError {
    CommandsError::Broken(format!("the process that fetches handed over {what}"))
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};

    use super::*;

    fn base(parts: &[(usize, u64, u64)]) -> Base {
        let part = |&(file, base, length): &(usize, u64, u64)| PackPart { file, base, length };
        Base { packs: parts.iter().map(part).collect(), ..Base::default() }
    }

    fn order() -> Order {
        let text = r#"{"scratch_directory":"/nowhere","disk_bytes":0,"runtime":"/nowhere",
            "commands":[],"limits":{"memory_bytes":0,"pids_max":0,"secs_max":null},
            "layer_bytes_max":0,"has_door":false,"tree_limits":null}"#;
        let mut value: serde_json::Value = serde_json::from_str(text).unwrap();
        value["tree_limits"] = serde_json::to_value(rootfs::TreeLimits::default()).unwrap();
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn files_are_those_of_layers_and_no_more_than_an_image_has() {
        let files = |parts: &[_]| files(&order(), &base(parts)).ok();
        assert_eq!(files(&[]), Some(0));
        assert_eq!(files(&[(0, 0, 1), (1, 0, 1), (0, 1, 1)]), Some(2));
        assert_eq!(files(&[(1, 0, 1)]), None);
        assert_eq!(files(&[(usize::MAX, 0, 1)]), None);
        assert_eq!(files(&vec![(0, 0, 1); 1024]), Some(1));
        assert_eq!(files(&vec![(0, 0, 1); 1025]), None);
    }

    #[test]
    fn a_layer_lies_in_a_file_that_is_open_to_be_read_alone() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(100).unwrap();
        let open = |options: &mut OpenOptions| OwnedFd::from(options.open(file.path()).unwrap());
        let good = || open(OpenOptions::new().read(true));
        let is_good = |file: OwnedFd, base_bytes, length| {
            packs(&base(&[(0, base_bytes, length)]), &[file]).is_ok()
        };
        assert!(is_good(good(), 0, 100) && is_good(good(), 40, 60));
        assert!(!is_good(good(), 41, 60) && !is_good(good(), u64::MAX, 2));
        assert!(packs(&base(&[(1, 0, 0)]), &[good()]).is_err(), "one that is not there");
        assert!(!is_good(open(OpenOptions::new().read(true).write(true)), 0, 1));
        assert!(!is_good(open(OpenOptions::new().write(true)), 0, 1));
        for path in ["/", "/dev/zero"] {
            assert!(!is_good(File::open(path).unwrap().into(), 0, 0), "{path}");
        }
        let name = rustix::fs::open(file.path(), OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
        assert!(!is_good(name, 0, 0), "a place alone");
        assert!(!is_good(std::io::pipe().unwrap().0.into(), 0, 0));
    }
}
