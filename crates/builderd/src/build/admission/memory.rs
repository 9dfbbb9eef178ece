//! How much memory there is for this process and its builds: what the machine has, or less where
//! a cgroup that they are in allows less (cgroups(7), version 1, version 2 and both at once). Of
//! the group and all above it the smallest limit counts. It sets no limits.

use std::fs;
use std::path::{Component, Path, PathBuf};

/// Bytes that builds and this process may have together, the smallest limit of all.
pub(super) fn bytes() -> u64 {
    let machine = rustix::system::sysinfo();
    let all = u64::from(machine.mem_unit).saturating_mul(machine.totalram);
    allowed(Path::new("/")).map_or(all, |allowed| allowed.min(all))
}

/// What the cgroups of this process allow; none where none has a limit. `root` is where the host's
/// files are.
fn allowed(root: &Path) -> Option<u64> {
    let read = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
    let (groups, mounts) = (read("proc/self/cgroup"), read("proc/self/mountinfo"));
    let limits = groups.lines().filter_map(|line| {
        // proc(5): "hierarchy-ID:controller-list:cgroup-path".
        let (_, rest) = line.split_once(':')?;
        match rest.split_once(':')? {
            ("", path) => smallest(root, &mounts, "cgroup2", path, "memory.max"),
            (names, path) if names.split(',').any(|name| name == "memory") => {
                smallest(root, &mounts, "cgroup", path, "memory.limit_in_bytes")
            }
            _ => None,
        }
    });
    limits.min()
}

/// The smallest limit of the group `path` and of those above it, as far as they can be seen.
fn smallest(root: &Path, mounts: &str, kind: &str, path: &str, file: &str) -> Option<u64> {
    let (top, group) = place(mounts, kind, path)?;
    let (top, group) = (below(root, &top), below(root, &group));
    let seen = group.ancestors().take_while(|directory| directory.starts_with(&top));
    let own = seen.filter_map(|directory| {
        // "max" is no number.
        fs::read_to_string(directory.join(file)).ok()?.trim().parse().ok()
    });
    // On version 1 the kernel tells of those that are mounted nowhere here, too.
    let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let above = stat.lines().find_map(|line| line.strip_prefix("hierarchical_memory_limit "));
    own.chain(above.and_then(|bytes| bytes.parse().ok())).min()
}

/// Where the hierarchy is mounted, and the group's directory: proc(5), "/proc/pid/mountinfo".
fn place(mounts: &str, kind: &str, path: &str) -> Option<(PathBuf, PathBuf)> {
    let mut found = mounts.lines().filter_map(|line| {
        let (front, back) = line.split_once(" - ")?;
        let mut back = back.split(' ');
        let options = (back.next()? == kind).then(|| back.nth(1))??;
        let is_it = kind == "cgroup2" || options.split(',').any(|option| option == "memory");
        let mut front = front.split(' ').skip(3);
        let (base, point) = (front.next()?, Path::new(front.next()?));
        is_it.then(|| match Path::new(path).strip_prefix(base) {
            Ok(rest) if rest.components().all(|part| matches!(part, Component::Normal(_))) => {
                (true, point, point.join(rest))
            }
            // A group outside of what is mounted: its top is above this process in any case.
            _ => (false, point, point.to_owned()),
        })
    });
    let first = found.next()?;
    let best = if first.0 { first } else { found.find(|place| place.0).unwrap_or(first) };
    Some((best.1.to_owned(), best.2))
}

/// An absolute path of the host, where its files are.
fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1_NONE: &str = "9223372036854771712";

    /// What is allowed on a host with these files.
    fn on(groups: &str, mounts: &[&str], files: &[(&str, &str)]) -> Option<u64> {
        let root = tempfile::tempdir().unwrap();
        let mounts = mounts.join("\n");
        let proc = [("proc/self/cgroup", groups), ("proc/self/mountinfo", &mounts)];
        for (path, text) in proc.iter().chain(files) {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{text}\n")).unwrap();
        }
        allowed(root.path())
    }

    const V2: &str = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw";
    const V1: &str = "31 23 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory";

    #[test]
    fn the_smallest_limit_of_all_groups_above_counts() {
        let top = "sys/fs/cgroup/";
        let v2 = |a: &str, b: &str, c: &str| {
            let path = |below: &str| format!("{top}{below}/memory.max");
            let paths = [path("a"), path("a/b"), path("a/b/c"), path("a/b/c/below")];
            let limits = [a, b, c, "1"];
            let files: Vec<(&str, &str)> = paths.iter().map(String::as_str).zip(limits).collect();
            on("0::/a/b/c", &[V2], &files)
        };
        assert_eq!(v2("3000", "1000", "2000"), Some(1000));
        assert_eq!(v2("500", "max", "max"), Some(500));
        assert_eq!(v2("max", "max", "700"), Some(700));
        assert_eq!(v2("max", "max", "max"), None);
        let v1 = |a: &str, b: &str| {
            let path = |below: &str| format!("{top}memory/{below}memory.limit_in_bytes");
            let (top, a_path, b_path) = (path(""), path("a/"), path("a/b/"));
            let files = [(top.as_str(), V1_NONE), (&a_path, a), (&b_path, b)];
            on("11:cpu:/x\n10:memory:/a/b\n0::/x", &[V2, V1], &files)
        };
        assert_eq!(v1("3000", "1000"), Some(1000));
        assert_eq!(v1("900", V1_NONE), Some(900));
    }

    #[test]
    fn limits_are_found_wherever_a_container_sees_its_group() {
        let limit = [("sys/fs/cgroup/memory.max", "800")];
        assert_eq!(on("0::/", &[V2], &limit), Some(800), "in a cgroup namespace");
        assert_eq!(on("0::/../other", &[V2], &limit), Some(800), "outside of its namespace");
        let bound = "31 23 0:27 /docker/x /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory";
        let files = [
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", V1_NONE),
            ("sys/fs/cgroup/memory/memory.stat", "cache 1\nhierarchical_memory_limit 600"),
            ("memory.limit_in_bytes", "1"),
        ];
        let groups = "10:cpuset,memory:/docker/x";
        assert_eq!(on(groups, &[bound], &files), Some(600), "one above it is mounted nowhere");
        let elsewhere = bound.replace("/docker/x", "/docker/y").replace("cgroup/memory", "y");
        assert_eq!(on(groups, &[&elsewhere, bound], &files), Some(600), "its own mount is taken");
    }

    #[test]
    fn a_host_without_limits_has_none() {
        assert_eq!(on("", &[], &[]), None);
        assert_eq!(on("0::/a", &[V2], &[]), None);
        assert_eq!(on("0::/a", &[], &[("sys/fs/cgroup/a/memory.max", "1")]), None, "not mounted");
        assert_eq!(on("4:cpu:/a", &[V2, V1], &[]), None);
        assert!(bytes() > 0);
    }
}
