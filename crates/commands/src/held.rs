//! Files that have no name any more and that processes of the commands still hold: no directory
//! leads to them, but they take disk until the last one lets go.
//!
//! What the kernel tells of the processes below a keeper is looked through: descriptors of every
//! thread (each may have its own), and what is mapped. A descriptor that is on its way through a
//! socket shows as a number alone. This side opens none of the files and knows no limits.

use std::collections::HashSet;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use sandbox::Users;

use crate::measure::STAT_BLOCK_BYTES;

/// Descriptors and mappings that are looked at for one count. More than this no build holds.
pub(crate) const HOLDS_MAX: usize = 1 << 20;
/// Where memory is that looks like files, statfs(2): tmpfs, and hugetlbfs. It counts as memory.
const MEMORY: [u64; 2] = [0x0102_1994, 0x9584_58f6];

/// What processes hold.
#[derive(Debug, Default)]
pub(crate) struct Held {
    /// Of files without a name.
    pub(crate) bytes: u64,
    pub(crate) files: u64,
    /// Descriptors that are on their way between processes.
    pub(crate) in_flight: u64,
    /// All descriptors and mappings, up to one more than [`HOLDS_MAX`].
    pub(crate) holds: usize,
    /// Device and number of those that were looked at.
    pub(crate) seen: HashSet<(u64, u64)>,
}

/// Where to look for processes, and whose files count.
#[derive(Debug)]
pub(crate) struct Holders {
    keeper: PathBuf,
    /// The namespace of the processes.
    namespace: PathBuf,
    users: Users,
}

impl Holders {
    /// Those of the PID namespace that the process `keeper` is the first of.
    ///
    /// # Errors
    /// When the host does not let it be looked at.
    pub(crate) fn below(keeper: u32, users: Users) -> io::Result<Self> {
        let keeper = PathBuf::from(format!("/proc/{keeper}"));
        let namespace = fs::read_link(keeper.join("ns/pid"))?;
        Ok(Self { keeper, namespace, users })
    }

    /// Counts what they hold now; nothing until the keeper has mounted a `/proc` of its own.
    ///
    /// # Errors
    /// When the host does not let them be looked at; processes that are gone are no error.
    pub(crate) fn count(&self) -> io::Result<Held> {
        let mut held = Held::default();
        let processes = self.keeper.join("root/proc");
        // Until then that is the host's, with all its processes: the first of them is another one,
        // and need not show itself.
        if fs::read_link(processes.join("1/ns/pid")).ok().as_ref() != Some(&self.namespace) {
            return Ok(held);
        }
        for process in directories(&processes)? {
            let number = process.file_name().unwrap_or_default().to_string_lossy();
            if number.bytes().all(|byte| byte.is_ascii_digit()) {
                self.add(&process, &mut held)?;
            }
            if held.holds > HOLDS_MAX {
                break;
            }
        }
        Ok(held)
    }

    fn add(&self, process: &Path, held: &mut Held) -> io::Result<()> {
        for thread in directories(&process.join("task"))? {
            self.add_all(&thread.join("fd"), Some(&thread.join("fdinfo")), held)?;
        }
        self.add_all(&process.join("map_files"), None, held)
    }

    /// All that the links of a directory in `/proc` lead to.
    fn add_all(&self, links: &Path, about: Option<&Path>, held: &mut Held) -> io::Result<()> {
        for link in directories(links)? {
            held.holds += 1;
            if held.holds > HOLDS_MAX {
                return Ok(());
            }
            let Some(file) = still_there(fs::metadata(&link))? else { continue };
            if file.file_type().is_socket() {
                let about = about.zip(link.file_name()).map(|(about, name)| about.join(name));
                held.in_flight += about.map_or(0, |about| in_flight(&about));
            } else if self.is_ours(&file) && held.seen.insert((file.dev(), file.ino())) {
                let system = rustix::fs::statfs(&link).map_err(io::Error::from);
                let Some(system) = still_there(system)? else { continue };
                if !MEMORY.iter().any(|kind| u64::try_from(system.f_type) == Ok(*kind)) {
                    held.bytes += file.blocks().saturating_mul(STAT_BLOCK_BYTES);
                    held.files += 1;
                }
            }
        }
        Ok(())
    }

    /// Whether it is a file without a name that belongs to the users of the commands: they cannot
    /// give one to anybody else.
    fn is_ours(&self, file: &Metadata) -> bool {
        let belongs =
            file.uid().checked_sub(self.users.first).is_some_and(|n| n < self.users.count);
        file.is_file() && file.nlink() == 0 && belongs
    }
}

/// What is in a directory of `/proc`; nothing if its process is gone.
fn directories(path: &Path) -> io::Result<impl Iterator<Item = PathBuf>> {
    let entries = still_there(fs::read_dir(path))?;
    Ok(entries.into_iter().flatten().flatten().map(|entry| entry.path()))
}

/// None for what has gone meanwhile.
fn still_there<T>(found: io::Result<T>) -> io::Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// How many descriptors wait in a socket of the family UNIX (kernel: net/unix/af_unix.c,
/// `unix_show_fdinfo`). Other sockets, and kernels before 5.6, tell of none.
fn in_flight(about: &Path) -> u64 {
    let text = fs::read_to_string(about).unwrap_or_default();
    let count = text.lines().find_map(|line| line.strip_prefix("scm_fds:"));
    count.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read as _;
    use std::os::fd::AsFd as _;
    use std::process::Stdio;

    use super::*;

    const SIZE: u64 = 1 << 20;

    /// What the process `pid` holds of files of this process's user.
    fn held_by(pid: u32) -> Held {
        let users = Users { first: rustix::process::geteuid().as_raw(), count: 1 };
        let mut held = Held::default();
        let holders = Holders { keeper: PathBuf::new(), namespace: PathBuf::new(), users };
        holders.add(Path::new(&format!("/proc/{pid}")), &mut held).unwrap();
        held
    }

    fn nameless() -> File {
        let file = tempfile::tempfile_in(".").unwrap();
        std::os::unix::fs::FileExt::write_all_at(
            &file,
            &vec![1; usize::try_from(SIZE).unwrap()],
            0,
        )
        .unwrap();
        file
    }

    /// A process that does nothing, and holds its standard input.
    fn sleeper(program: &Path, stdin: Stdio) -> std::process::Child {
        let mut command = crate::host::command(program);
        command.args(["sh", "-c", "echo; kill -STOP $$"]).stdin(stdin).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // By then it is loaded.
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        child
    }

    const BUSYBOX: &str = "/bin/busybox";

    #[test]
    fn files_without_a_name_are_counted_once_as_long_as_they_are_held() {
        if !Path::new(BUSYBOX).is_file() {
            eprintln!("SKIPPED: no {BUSYBOX}: apt-get install busybox-static");
            return;
        }
        let file = nameless();
        let mut child = sleeper(BUSYBOX.as_ref(), file.try_clone().unwrap().into());
        let held = held_by(child.id());
        assert_eq!(held.files, 1);
        assert!((SIZE..2 * SIZE).contains(&held.bytes), "{held:?}");
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(held_by(child.id()).files, 0, "who is gone holds nothing");
        let named = tempfile::NamedTempFile::new_in(".").unwrap();
        let mut child = sleeper(BUSYBOX.as_ref(), named.reopen().unwrap().into());
        assert_eq!(held_by(child.id()).files, 0, "what has a name is counted there");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn what_is_mapped_is_held_as_well() {
        if !rustix::process::geteuid().is_root() || !Path::new(BUSYBOX).is_file() {
            eprintln!("SKIPPED: needs root and {BUSYBOX}");
            return;
        }
        let place = tempfile::tempdir_in(".").unwrap();
        let program = place.path().canonicalize().unwrap().join("busybox");
        fs::copy(BUSYBOX, &program).unwrap();
        let size = fs::metadata(&program).unwrap().len();
        let mut child = sleeper(&program, Stdio::null());
        fs::remove_file(&program).unwrap();
        let held = held_by(child.id());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(held.files == 1 && held.bytes >= size / 2, "{held:?}");
    }

    #[test]
    fn memory_is_no_disk() {
        if !Path::new(BUSYBOX).is_file() {
            eprintln!("SKIPPED: no {BUSYBOX}: apt-get install busybox-static");
            return;
        }
        let memory = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::io::write(&memory, &[1; 4096]).unwrap();
        let mut child = sleeper(BUSYBOX.as_ref(), memory.into());
        let held = held_by(child.id());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!((held.seen.len(), held.files, held.bytes), (1, 0, 0));
    }

    #[test]
    fn descriptors_on_their_way_show_as_a_number() {
        let (one, _other) = crate::handing::pair().unwrap();
        let file = nameless();
        crate::handing::hand(&one, &[file.as_fd()]).unwrap();
        drop(file);
        assert!(held_by(std::process::id()).in_flight > 0);
    }

    #[test]
    fn the_hosts_own_processes_are_not_looked_at() {
        let users = Users { first: 0, count: u32::MAX };
        let holders = Holders::below(std::process::id(), users).unwrap();
        // This process is the first of no namespace, and has the host's /proc.
        assert_eq!(holders.count().unwrap().holds, 0);
        assert!(Holders::below(u32::MAX, users).is_err());
    }
}
