//! The way in for a fuzz target: what an overseer is told by the process that fetches, read and judged
//! as it is in earnest. Nothing is done with it.

use std::path::{Path, PathBuf};

use rootfs::TreeLimits;
use sandbox::Users;

use crate::bundle::{self, Surroundings};
use crate::judge::{self, BASE_BYTES_MAX};
use crate::keeper;
use crate::order::{self, Base, CommandLimits, Joins, Order, Scratch};

/// Reads what commands are said to be run on, handed over with files of these sizes.
///
/// # Panics
/// When something passes that would lead out of what was handed over, or that no runtime can read.
pub fn read_base(text: &[u8], sizes: &[u64]) {
    // As it comes: the length of anybody's choice before it.
    let _ = order::receive_most::<Base>(text, BASE_BYTES_MAX);
    let length = u32::try_from(text.len()).unwrap_or(u32::MAX).to_le_bytes();
    let Ok(base) = order::receive_most::<Base>(&[&length, text].concat()[..], BASE_BYTES_MAX)
    else {
        return;
    };
    let order = order();
    let Ok(files) = judge::files(&order, &base) else { return };
    assert!(files <= base.packs.len() && files as u64 <= u64::from(order.tree_limits.layers_max));
    assert_eq!(keeper::packs_of(&base), files, "the keeper takes as many files as were judged");
    let handed_over = &sizes[..files.min(sizes.len())];
    if judge::lie_within(&base, handed_over) {
        for part in &base.packs {
            let end = part.base.checked_add(part.length);
            assert!(end.is_some_and(|end| end <= handed_over[part.file]), "{part:?}");
        }
    }
    if judge::image(&order, &base).is_ok() {
        check_bundle(&order, &base);
    }
}

fn is_path(cwd: &str) -> bool {
    cwd.starts_with('/') && !cwd.contains('\0') && cwd.len() < 4096
}

/// The container of a command: a working directory that is one, and variables that are.
fn check_bundle(order: &Order, base: &Base) {
    let users = Users { first: 1, count: 1 };
    for door in [None, Some(([127, 0, 0, 1], 1).into())] {
        let around =
            Surroundings { root: Path::new("/root"), group: "group", users, namespace: None, door };
        let config = bundle::config(order, base, "true", &around);
        let process = &config["process"];
        assert!(process["cwd"].as_str().is_some_and(is_path));
        let environment = process["env"].as_array().into_iter().flatten();
        let mut ways = 0;
        for entry in environment.filter_map(|entry| entry.as_str()) {
            let (name, value) = entry.split_once('=').unwrap_or_default();
            assert!(!name.is_empty() && !entry.contains('\0'), "{entry:?}");
            let is_way = matches!(name, "http_proxy" | "HTTP_PROXY") && door.is_some();
            assert!(!is_way || value == "http://127.0.0.1:1", "{entry:?}");
            ways += usize::from(is_way);
        }
        assert!(door.is_none() || ways == 2);
    }
}

fn order() -> Order {
    Order {
        scratch_directory: PathBuf::new(),
        scratch: Scratch::Sized,
        disk_bytes: 0,
        runtime: PathBuf::new(),
        joins: Joins::default(),
        commands: Vec::new(),
        limits: CommandLimits { memory_bytes: 1, pids_max: 1, secs_max: None },
        tree_limits: TreeLimits::default(),
        layer_bytes_max: 0,
        has_door: false,
    }
}
