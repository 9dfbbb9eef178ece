//! Tars of other programs, in all their formats, against the files they were made from.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use ext4::{Kind, Tree};
use proptest::prelude::*;
use rootfs::{FileTree, Pack, TreeLimits};

use crate::support::{Image, pack};

fn image_of(blob: &[u8]) -> Image {
    let bytes = pack(blob).unwrap().1;
    let opened = Pack::open(&bytes, bytes.len() as u64).unwrap();
    let tree = FileTree::flatten([opened], &TreeLimits::default()).unwrap();
    Image { tree, packs: vec![bytes] }
}

/// A directory with what tars are about. Long names only where the format has them.
fn make_files(root: &Path, long: bool) {
    fs::create_dir_all(root.join("dir/sub")).unwrap();
    fs::write(root.join("dir/plain"), b"some content\n").unwrap();
    fs::write(root.join("dir/empty"), b"").unwrap();
    fs::write(root.join("dir/blocks"), vec![b'x'; 8192]).unwrap();
    fs::hard_link(root.join("dir/plain"), root.join("dir/sub/linked")).unwrap();
    symlink("../dir/plain", root.join("dir/sub/symlink")).unwrap();
    let mut sparse = File::create(root.join("sparse")).unwrap();
    for at in [100_000_u64, 300_000, 5_000_000] {
        sparse.seek(SeekFrom::Start(at)).unwrap();
        sparse.write_all(b"data in a hole").unwrap();
    }
    sparse.set_len(6_000_001).unwrap();
    if long {
        let name = "n".repeat(200);
        fs::create_dir_all(root.join(&name)).unwrap();
        fs::write(root.join(&name).join("f".repeat(180)), b"long").unwrap();
        symlink(format!("/{}", "target/".repeat(30)), root.join("longlink")).unwrap();
    }
    let mut mode = 0o7000;
    for name in ["dir/plain", "dir/blocks", "dir/sub"] {
        fs::set_permissions(root.join(name), fs::Permissions::from_mode(0o751 | mode)).unwrap();
        mode >>= 1;
        mode &= 0o7000;
    }
}

/// Path, kind, mode, owner, seconds, size or target, number of names.
type Row = (char, u32, u32, u32, i64, u32, Vec<u8>);

fn rows_on_disk(root: &Path, at: &Path, rows: &mut BTreeMap<String, Row>) {
    for entry in fs::read_dir(root.join(at)).unwrap() {
        let path = at.join(entry.unwrap().file_name());
        let full = root.join(&path);
        let stat = full.symlink_metadata().unwrap();
        let kind = stat.file_type();
        let (letter, content) = if kind.is_dir() {
            rows_on_disk(root, &path, rows);
            ('d', Vec::new())
        } else if kind.is_symlink() {
            ('l', fs::read_link(&full).unwrap().into_os_string().into_encoded_bytes())
        } else if kind.is_fifo() {
            ('p', Vec::new())
        } else {
            ('f', fs::read(&full).unwrap())
        };
        let links = if letter == 'd' { 0 } else { u32::try_from(stat.nlink()).unwrap() };
        let row =
            (letter, stat.mode() & 0o7777, stat.uid(), stat.gid(), stat.mtime(), links, content);
        rows.insert(path.to_str().unwrap().to_owned(), row);
    }
}

fn rows_in(image: &Image) -> BTreeMap<String, Row> {
    let mut rows = BTreeMap::new();
    for (path, id) in image.paths() {
        let inode = image.tree.inode(id);
        let (letter, content) = match inode.kind {
            Kind::Directory => ('d', Vec::new()),
            Kind::File { .. } => ('f', image.content(id)),
            Kind::Symlink { target } => ('l', target.to_vec()),
            Kind::Fifo => ('p', Vec::new()),
            Kind::CharDevice { .. } | Kind::BlockDevice { .. } | Kind::Socket => ('?', Vec::new()),
        };
        let links = if letter == 'd' { 0 } else { inode.links };
        let mode = u32::from(inode.permissions);
        let row = (letter, mode, inode.uid, inode.gid, inode.mtime.secs, links, content);
        rows.insert(String::from_utf8(path).unwrap(), row);
    }
    rows
}

fn check(root: &Path, blob: &[u8], what: &str) {
    let mut expected = BTreeMap::new();
    rows_on_disk(root, Path::new(""), &mut expected);
    let found = rows_in(&image_of(blob));
    let names = |rows: &BTreeMap<String, Row>| rows.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&found), names(&expected), "{what}");
    for (path, row) in &expected {
        assert!(found[path] == *row, "{what}: {path}: {:?}", (&found[path].1, &row.1));
    }
}

fn output_of(program: &str, arguments: &[&str]) -> Option<Vec<u8>> {
    match Command::new(program).args(arguments).output() {
        Err(error) => {
            eprintln!("SKIPPED: {program}: {error}");
            None
        }
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{program} {arguments:?}: {text}");
            Some(output.stdout)
        }
    }
}

#[test]
fn tars_of_gnu_tar_are_read_in_all_its_formats() {
    let formats = [
        (&["--format=v7"][..], false),
        (&["--format=ustar"], false),
        (&["--format=oldgnu"], true),
        (&["--format=gnu"], true),
        (&["--format=gnu", "--sparse"], true),
        (&["--format=posix"], true),
        (&["--format=posix", "--sparse", "--sparse-version=0.0"], true),
        (&["--format=posix", "--sparse", "--sparse-version=0.1"], true),
        (&["--format=posix", "--sparse", "--sparse-version=1.0"], true),
    ];
    for (options, long) in formats {
        let temp = tempfile::tempdir().unwrap();
        make_files(temp.path(), long);
        let root = temp.path().to_str().unwrap();
        let arguments = [options, &["-C", root, "-cf", "-", "."]].concat();
        let Some(blob) = output_of("tar", &arguments) else { return };
        check(temp.path(), &blob, &format!("{options:?}"));
    }
}

#[test]
fn tars_of_python_are_read_in_all_its_formats() {
    for (format, long) in [("USTAR", false), ("GNU", true), ("PAX", true)] {
        let temp = tempfile::tempdir().unwrap();
        make_files(temp.path(), long);
        let program = format!(
            "import sys, tarfile\n\
             with tarfile.open(fileobj=sys.stdout.buffer, mode='w|', format=tarfile.{format}_FORMAT) as t:\n\
             \x20   t.add(sys.argv[1], '.')\n"
        );
        let root = temp.path().to_str().unwrap();
        let Some(blob) = output_of("python3", &["-c", &program, root]) else { return };
        check(temp.path(), &blob, format);
    }
}

#[derive(Clone, Debug)]
struct Made {
    path: String,
    content: Vec<u8>,
    mode: u32,
    owner: (u64, u64),
    time: u64,
}

fn made() -> impl Strategy<Value = Made> {
    let path = prop::collection::vec("[a-z\u{e4}]{1,60}", 1..6).prop_map(|names| names.join("/"));
    let content = prop::collection::vec(any::<u8>(), 0..3000);
    // The last number is nobody's.
    let owner = (0_u64..u64::from(u32::MAX), 0_u64..u64::from(u32::MAX));
    (path, content, 0_u32..0o10000, owner, 0_u64..1 << 40)
        .prop_map(|(path, content, mode, owner, time)| Made { path, content, mode, owner, time })
}

/// A tar of the `tar` crate. With `pax`, numbers and paths are PAX records, and the header's
/// own are wrong.
fn build(files: &[Made], pax: bool) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for file in files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(file.mode);
        header.set_size(file.content.len() as u64);
        header.set_entry_type(tar::EntryType::Regular);
        if pax {
            let records = [
                ("uid", file.owner.0.to_string()),
                ("gid", file.owner.1.to_string()),
                ("mtime", format!("{}.000000001", file.time)),
                ("path", file.path.clone()),
            ];
            let records = records.iter().map(|(key, value)| (*key, value.as_bytes()));
            builder.append_pax_extensions(records).unwrap();
            header.set_path("wrong").unwrap();
            header.set_cksum();
            builder.append(&header, &file.content[..]).unwrap();
        } else {
            header.set_uid(file.owner.0);
            header.set_gid(file.owner.1);
            header.set_mtime(file.time);
            builder.append_data(&mut header, &file.path, &file.content[..]).unwrap();
        }
    }
    builder.into_inner().unwrap()
}

proptest! {
    #[test]
    fn tars_of_the_tar_crate_are_read(files in prop::collection::vec(made(), 0..8), pax: bool) {
        // A file cannot be the directory of another one.
        let mut kept: Vec<Made> = Vec::new();
        for file in files {
            let clash = |a: &str, b: &str| a == b || a.starts_with(&format!("{b}/"));
            if !kept.iter().any(|it| clash(&it.path, &file.path) || clash(&file.path, &it.path)) {
                kept.push(file);
            }
        }
        let image = image_of(&build(&kept, pax));
        for file in &kept {
            let inode = image.inode(&file.path);
            prop_assert_eq!(u32::from(inode.permissions), file.mode);
            prop_assert_eq!((u64::from(inode.uid), u64::from(inode.gid)), file.owner);
            prop_assert_eq!(inode.mtime.secs, i64::try_from(file.time).unwrap());
            prop_assert_eq!(inode.mtime.nanos, u32::from(pax));
            prop_assert!(image.content(image.id(&file.path)) == file.content);
        }
        let files = image.paths().values().filter(|id| {
            matches!(image.tree.inode(**id).kind, Kind::File { .. })
        }).count();
        prop_assert_eq!(files, kept.len());
    }
}
