//! A process and its files as the kernel shows them: proc(5). Knows no build.

use std::collections::HashMap;
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use rustix::fs::OFlags;

/// What a process takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ProcessUsage {
    /// CPU time of all its threads, in milliseconds; the kernel counts in hundredths of a second.
    pub(super) cpu_ms: u64,
    /// Resident memory.
    pub(super) memory_bytes: u64,
    /// The most of it so far.
    pub(super) memory_peak_bytes: u64,
}

impl ProcessUsage {
    /// Of a process and all it has started. None when there is no such process. One that has ended
    /// and waits for its parent has no memory.
    pub(super) fn of(pid: u32) -> Option<Self> {
        let mut sum = Self::of_one(pid)?;
        for usage in family(pid).into_iter().skip(1).filter_map(Self::of_one) {
            sum.cpu_ms += usage.cpu_ms;
            sum.memory_bytes += usage.memory_bytes;
            sum.memory_peak_bytes += usage.memory_peak_bytes;
        }
        Some(sum)
    }

    fn of_one(pid: u32) -> Option<Self> {
        let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
        let status = fs::read(format!("/proc/{pid}/status")).ok()?;
        let status = String::from_utf8_lossy(&status);
        let ticks = cpu_ticks(&String::from_utf8_lossy(&stat))?;
        Some(Self {
            cpu_ms: ticks.saturating_mul(1000) / rustix::param::clock_ticks_per_second().max(1),
            memory_bytes: status_bytes(&status, "VmRSS:"),
            memory_peak_bytes: status_bytes(&status, "VmHWM:"),
        })
    }
}

/// Processes looked at, at most, to sum up what one and its children take.
const FAMILY_MAX: usize = 1024;

/// A process and all it has started, itself first.
fn family(pid: u32) -> Vec<u32> {
    let mut all = vec![pid];
    let mut next = 0;
    // Who starts processes for ever must not keep the one that counts them.
    while let Some(&parent) = all.get(next).filter(|_| next <= FAMILY_MAX) {
        all.extend(children(parent));
        next += 1;
    }
    all.truncate(1 + FAMILY_MAX);
    all
}

/// The children that the threads of a process have started: proc(5), "/proc/pid/task/tid/children".
fn children(pid: u32) -> Vec<u32> {
    let mut found = Vec::new();
    for task in entries(Path::new(&format!("/proc/{pid}/task"))) {
        let listed = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        found.extend(listed.split_ascii_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
    }
    found
}

/// `utime`, `stime`, `cutime` and `cstime`, the fields 14 to 17 of /proc/PID/stat: its own time and
/// that of children it has waited for. The second field is a name that may hold anything, in
/// parentheses.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let fields = rest.split_ascii_whitespace().skip(14 - 3).take(4);
    let ticks: Vec<u64> = fields.map(|field| field.parse().ok()).collect::<Option<_>>()?;
    (ticks.len() == 4).then(|| ticks.iter().sum())
}

/// A line of /proc/PID/status that is a size; 0 when it is not there.
pub(super) fn status_bytes(status: &str, name: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let kib = line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// The processes that work where the one of this number may only wait for them: one that has nothing
/// open waits for those that it has started.
fn that_work(pid: u32) -> Vec<u32> {
    /// Outside of a namespace and inside of it.
    const WAITING_MAX: u32 = 2;
    let mut found = vec![pid];
    for _ in 0..WAITING_MAX {
        let below = found.into_iter().flat_map(|pid| {
            let has_files = entries(Path::new(&format!("/proc/{pid}/fd"))).next().is_some();
            if has_files { vec![pid] } else { children(pid) }
        });
        found = below.take(FAMILY_MAX).collect();
    }
    found
}

/// Bytes on disk of the files that a process, or those that work for it, have open to write,
/// nameless ones too, and of those in `directory`. A file counts once, however often it is open.
pub(super) fn disk_bytes(pid: Option<u32>, directory: &Path) -> u64 {
    /// A block of stat(2), whatever the file system's own are.
    const BLOCK_BYTES: u64 = 512;
    let mut blocks = HashMap::new();
    let mut note = |file: &Metadata| {
        if file.is_file() {
            blocks.insert((file.dev(), file.ino()), file.blocks());
        }
    };
    for pid in pid.map(that_work).unwrap_or_default() {
        for entry in entries(Path::new(&format!("/proc/{pid}/fd"))) {
            let number = entry.file_name();
            if !is_written(&format!("/proc/{pid}/fdinfo/{}", number.to_string_lossy())) {
                continue;
            }
            // Follows to the file itself, name or not; it may be closed meanwhile.
            if let Ok(file) = fs::metadata(entry.path()) {
                note(&file);
            }
        }
    }
    for entry in entries(directory) {
        if let Ok(file) = entry.metadata() {
            note(&file);
        }
    }
    blocks.values().sum::<u64>() * BLOCK_BYTES
}

fn entries(directory: &Path) -> impl Iterator<Item = fs::DirEntry> {
    fs::read_dir(directory).into_iter().flatten().filter_map(Result::ok)
}

/// Whether a descriptor is there to make a file. One past the page cache is a second way to a
/// file that is open already, also to one that is only read.
fn is_written(fdinfo: &str) -> bool {
    let text = fs::read_to_string(fdinfo).unwrap_or_default();
    let flags = text.lines().find_map(|line| line.strip_prefix("flags:"));
    let Some(flags) = flags.and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok()) else {
        return false;
    };
    let flags = OFlags::from_bits_retain(flags);
    flags.intersects(OFlags::WRONLY | OFlags::RDWR) && !flags.contains(OFlags::DIRECT)
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;
    use std::io::{BufRead as _, BufReader, Write as _};
    use std::process::{Child, Command, Stdio};

    use sandbox::Sandbox;

    use super::*;

    #[test]
    fn the_name_of_a_process_does_not_shift_its_fields() {
        let fields = "S 1 7 7 0 -1 4194560 1 2 3 4 150 25 9 9 20 0 1 0 5 6 7";
        for name in ["builderd", "a b", ") R 9 9", "(x) "] {
            assert_eq!(cpu_ticks(&format!("7 ({name}) {fields}")), Some(175 + 18), "{name:?}");
        }
        assert_eq!(cpu_ticks("7 (a) S 1"), None);
        assert_eq!(cpu_ticks(""), None);
    }

    #[test]
    fn sizes_are_in_kib_there_and_in_bytes_here() {
        let status = "VmPeak:\t  9 kB\nVmHWM:\t    2048 kB\nVmRSS:\t1 kB\n";
        assert_eq!(status_bytes(status, "VmHWM:"), 2 << 20);
        assert_eq!(status_bytes(status, "VmRSS:"), 1024);
        assert_eq!(status_bytes("Name:\tgone\n", "VmRSS:"), 0);
    }

    /// A shell that does something, says so, and then waits until it is told to end.
    #[expect(clippy::disallowed_methods, reason = "tests start programs")]
    fn shell(directory: &Path, script: &str) -> Child {
        let mut child = Command::new("sh")
            .args(["-c", &format!("{script}; echo done; read -r end")])
            .current_dir(directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "done\n");
        child
    }

    fn end(mut child: Child) {
        child.stdin.take().unwrap().write_all(b"\n").unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_process_is_measured_while_it_runs_and_not_afterwards() {
        let directory = tempfile::tempdir().unwrap();
        let script = "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done";
        let child = shell(directory.path(), script);
        let usage = ProcessUsage::of(child.id()).unwrap();
        assert!((10..60_000).contains(&usage.cpu_ms), "{usage:?}");
        assert!((100 << 10..1 << 30).contains(&usage.memory_bytes), "{usage:?}");
        assert!(usage.memory_peak_bytes >= usage.memory_bytes, "{usage:?}");
        let pid = child.id();
        end(child);
        assert_eq!(ProcessUsage::of(pid), None);
    }

    #[test]
    fn what_is_written_for_a_process_that_only_waits_counts_as_its() {
        let directory = tempfile::tempdir_in(".").unwrap();
        let place = std::path::absolute(directory.path()).unwrap();
        let works = |name: &str, bytes: u64| {
            format!(
                "cd {}; echo $$ > {name}.pid; exec 5>{name}; rm {name}; \
                 head -c {bytes} /dev/zero >&5; touch {name}.ready; exec sleep 60",
                place.display()
            )
        };
        let let_go = "exec <&- >&- 2>&-; wait";
        let script = |text: String| CString::new(text).unwrap();
        // One behind two that wait, and another one beside the second of them.
        let inside = script(format!("sh -c '{}' & {let_go}", works("inside", 3 << 20)));
        let beside = script(works("beside", 1 << 20));
        let outside = script(format!("sh -c \"$0\" & sh -c \"$1\" & {let_go}"));
        let shell = fs::File::open("/bin/sh").unwrap();
        // With no file but those that it is handed.
        let arguments = [c"sh", c"-c", &*outside, &*inside, &*beside];
        let (mut process, _pipes) = Sandbox::spawn_beside(&shell, &arguments, &[]).unwrap();
        let is_ready = |name: &&str| directory.path().join(format!("{name}.ready")).exists();
        while !["inside", "beside"].iter().all(is_ready) {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let seen = disk_bytes(Some(process.pid()), Path::new("nowhere"));
        for name in ["inside", "beside"] {
            let pid = fs::read_to_string(directory.path().join(format!("{name}.pid"))).unwrap();
            let pid = rustix::process::Pid::from_raw(pid.trim().parse().unwrap()).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        }
        process.wait().unwrap();
        assert!((4 << 20..5 << 20).contains(&seen), "{seen}");
    }

    #[test]
    fn what_a_process_writes_counts_once_and_what_it_reads_does_not() {
        let directory = tempfile::tempdir_in(".").unwrap();
        let (made, staging) = (directory.path().join("made"), directory.path().join("staging"));
        fs::create_dir_all(&made).unwrap();
        fs::create_dir_all(&staging).unwrap();
        fs::write(made.join("read"), vec![1; 8 << 20]).unwrap();
        // One without a name, one that is also in the directory, one that is only read.
        let script = "exec 5>nameless 6<read 7>../staging/named 8>>../staging/named; \
             rm nameless; head -c 3145728 /dev/zero >&5; head -c 1048576 /dev/zero >&7";
        let child = shell(&made, script);
        let seen = disk_bytes(Some(child.id()), &staging);
        // The file system's own blocks, and whoever else keeps books of a file, come on top.
        assert!((4 << 20..5 << 20).contains(&seen), "{seen}");
        let named = disk_bytes(None, &staging);
        assert!((1 << 20..2 << 20).contains(&named), "{named}");
        end(child);
        assert_eq!(disk_bytes(None, &directory.path().join("nowhere")), 0);
    }
}
