//! Images grow, and a kernel writes into them, without damage.

#![expect(clippy::disallowed_methods, reason = "the judges are programs")]

use std::process::Command;

use ext4::{InodeId, Size};

use crate::support::{Content, ImageFile, MemoryTree, has, options, skip};
use crate::writer::a_bit_of_everything;

const ROOT: InodeId = InodeId::ROOT;

#[test]
fn resize2fs_grows_an_image_sixteen_times_offline() {
    for bytes in [0, 100 << 20, 600 << 20] {
        let mut options = options();
        options.size = Size::FreeSpace { bytes };
        let tree = a_bit_of_everything();
        let image = ImageFile::build(&tree, &options);
        if !has("resize2fs") {
            return;
        }
        let target = image.summary.image_bytes * 16;
        assert!(image.summary.growth_bytes_max >= target);
        let file = std::fs::File::options().write(true).open(&image.path).unwrap();
        file.set_len(target).unwrap();
        let output = Command::new("resize2fs").arg(&image.path).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        image.assert_clean();
        assert_verifies(&image);
        let grown = ext4::Image::open(std::fs::File::open(&image.path).unwrap()).unwrap();
        assert!(grown.superblock().blocks_count * 4096 > target / 10 * 9);
        crate::kernel::assert_mounts_as(&image, &tree);
    }
}

/// The reader must accept what a kernel or resize2fs left, too.
fn assert_verifies(image: &ImageFile) {
    let read = ext4::Image::open(std::fs::File::open(&image.path).unwrap()).unwrap();
    read.verify().unwrap_or_else(|e| panic!("{e}"));
}

/// The kernel asks for `CAP_SYS_RESOURCE`, which root in a container may lack.
fn may_resize() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("CapEff:")).unwrap();
    let may = u64::from_str_radix(line.trim(), 16).unwrap() >> 24 & 1 == 1;
    if !may {
        skip("growing a mounted file system needs CAP_SYS_RESOURCE");
    }
    may
}

#[test]
fn the_kernel_grows_a_mounted_image_sixteen_times() {
    if !may_resize() {
        return;
    }
    let tree = a_bit_of_everything();
    let mut options = options();
    options.size = Size::FreeSpace { bytes: 150 << 20 };
    let image = ImageFile::build(&tree, &options);
    let target = image.summary.image_bytes * 16;
    let file = std::fs::File::options().write(true).open(&image.path).unwrap();
    file.set_len(target).unwrap();
    {
        let Some(mount) = image.mount("rw") else { return };
        let output = Command::new("resize2fs").arg(mount.device()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let found = rustix::fs::statvfs(mount.path()).unwrap();
        assert!(found.f_blocks * found.f_frsize > target / 10 * 9);
        let bytes = vec![7; 1 << 20];
        for n in 0..300 {
            std::fs::write(mount.path().join(format!("new-{n}")), &bytes).unwrap();
        }
    }
    image.assert_clean();
    assert_verifies(&image);
}

#[test]
fn a_kernel_adds_renames_and_deletes_in_a_full_index() {
    for journal in [true, false] {
        let mut tree = MemoryTree::new();
        let big = tree.directory(ROOT, "big");
        for n in 0..30_000 {
            tree.add(big, format!("a-file-of-the-image-{n}"), Content::Fifo);
        }
        let mut options = options();
        options.journal = journal;
        options.size = Size::FreeSpace { bytes: 64 << 20 };
        options.bytes_per_inode = 2048;
        let image = ImageFile::build(&tree, &options);
        {
            let Some(mount) = image.mount("rw") else { return };
            let big = mount.path().join("big");
            for n in 0..10_000 {
                std::fs::write(big.join(format!("a-new-file-{n}")), b"new").unwrap();
            }
            for n in (0..30_000).step_by(3) {
                std::fs::remove_file(big.join(format!("a-file-of-the-image-{n}"))).unwrap();
            }
            for n in (1..30_000).step_by(3) {
                let name = format!("a-file-of-the-image-{n}");
                std::fs::rename(big.join(&name), big.join(format!("renamed-{n}"))).unwrap();
            }
            assert_eq!(std::fs::read_dir(&big).unwrap().count(), 30_000);
        }
        image.assert_clean();
        assert_verifies(&image);
        let read = ext4::Image::open(std::fs::File::open(&image.path).unwrap()).unwrap();
        let names = read.entries(&read.lookup(b"/big").unwrap()).unwrap();
        assert_eq!(names.len(), 30_000);
    }
}

#[test]
fn a_kernel_fills_every_free_block_and_inode() {
    let tree = a_bit_of_everything();
    let mut options = options();
    options.size = Size::FreeSpace { bytes: 20 << 20 };
    let image = ImageFile::build(&tree, &options);
    {
        let Some(mount) = image.mount("rw") else { return };
        let mut made = 0;
        while std::fs::write(mount.path().join(format!("f{made}")), b"").is_ok() {
            made += 1;
        }
        let spare = image.summary.inodes - image.summary.inodes_used;
        assert_eq!(made, spare);
        std::fs::remove_file(mount.path().join("f0")).unwrap();
        let big = std::fs::File::create(mount.path().join("filler")).unwrap();
        let chunk = vec![1; 1 << 16];
        let mut bytes = 0;
        while std::io::Write::write_all(&mut &big, &chunk).is_ok() {
            bytes += chunk.len();
        }
        assert!(bytes > 18 << 20, "only {bytes} bytes could be written");
    }
    image.assert_clean();
    assert_verifies(&image);
}

#[test]
fn the_reader_accepts_what_mke2fs_makes() {
    if !has("mke2fs") {
        return;
    }
    let directory = tempfile::TempDir::new().unwrap();
    let (source, image) = (directory.path().join("source"), directory.path().join("image"));
    std::fs::create_dir_all(source.join("inner")).unwrap();
    for n in 0..1000 {
        std::fs::write(source.join(format!("inner/a-longer-name-{n}")), format!("{n}")).unwrap();
    }
    std::os::unix::fs::symlink("inner", source.join("link")).unwrap();
    for options in [&["-b", "4096"][..], &["-b", "1024"], &["-b", "2048", "-O", "^64bit"]] {
        let mut command = Command::new("mke2fs");
        command.args(["-q", "-F", "-t", "ext4", "-O", "metadata_csum"]).args(options);
        let output = command.arg("-d").arg(&source).arg(&image).arg("300M").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let read = ext4::Image::open(std::fs::File::open(&image).unwrap()).unwrap();
        let verified = read.verify().unwrap_or_else(|e| panic!("{options:?}: {e}"));
        assert_eq!(verified.names, 1000 + 3);
        let node = read.lookup(b"/inner/a-longer-name-999").unwrap();
        let mut text = String::new();
        std::io::Read::read_to_string(&mut read.content(&node).unwrap(), &mut text).unwrap();
        assert_eq!(text, "999");
        std::fs::remove_file(&image).unwrap();
    }
}
