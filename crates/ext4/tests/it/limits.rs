//! What does not fit, or makes no sense, is an error that says what to do.

use ext4::{InodeId, LayoutError, Options, Run, Size, Timestamp, XattrError, path_of};

use crate::support::{Content, ImageFile, MemoryTree, options};
use crate::writer::{a_bit_of_everything, judge};

const ROOT: InodeId = InodeId::ROOT;

fn plan(tree: &MemoryTree) -> LayoutError {
    tree.plan(&options()).err().unwrap()
}

#[test]
fn an_exact_size_is_kept_and_one_block_less_says_what_is_needed() {
    for journal in [true, false] {
        let tree = a_bit_of_everything();
        let mut options = options();
        options.journal = journal;
        options.size = Size::FreeSpace { bytes: 0 };
        let least = tree.plan(&options).unwrap().size_bytes();
        options.size = Size::Exact { bytes: least };
        assert_eq!(judge(&tree, &options).summary.image_bytes, least);
        options.size = Size::Exact { bytes: least - 4096 };
        let error = tree.plan(&options).err().unwrap();
        assert!(
            matches!(error, LayoutError::TooSmall { needed_bytes, .. } if needed_bytes == least),
            "{error}"
        );
    }
}

#[test]
fn any_exact_size_around_the_end_of_a_group_is_an_image() {
    let tree = MemoryTree::new();
    for group in [1_u64, 2, 3] {
        for blocks in [-1_i64, 0, 1, 63, 64, 65, 128, 192, 300] {
            let bytes = (group * 32768).checked_add_signed(blocks).unwrap() * 4096;
            let mut options = options();
            options.size = Size::Exact { bytes };
            let image = ImageFile::build(&tree, &options);
            assert_eq!(std::fs::metadata(&image.path).unwrap().len(), bytes);
            image.assert_clean();
            crate::reread::assert_reads_as(&image, &tree);
            crate::kernel::assert_mounts_as(&image, &tree);
        }
    }
}

#[test]
fn every_size_of_a_small_image_either_fits_or_says_what_fits() {
    let tree = MemoryTree::new();
    let mut fitting = 0;
    for blocks in (0..4000).step_by(37) {
        let mut options = options();
        options.size = Size::Exact { bytes: blocks * 4096 };
        match tree.plan(&options) {
            Ok(_) => {
                fitting += 1;
                let image = ImageFile::build(&tree, &options);
                image.assert_clean();
            }
            Err(LayoutError::TooSmall { needed_bytes, .. }) => {
                options.size = Size::Exact { bytes: needed_bytes };
                assert!(tree.plan(&options).is_ok(), "{needed_bytes} do not suffice");
                assert_eq!(fitting, 0, "a greater size does not fit where a smaller did");
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert!(fitting > 0);
}

#[test]
fn options_that_make_no_sense_are_refused() {
    let wrong: [fn(&mut Options); 6] = [
        |o| o.boot_area = vec![0; 1025],
        |o| o.size = Size::Exact { bytes: 4097 },
        |o| o.growth_factor = 0,
        |o| o.growth_factor = 1025,
        |o| o.bytes_per_inode = 0,
        |o| o.created = Timestamp { secs: 0, nanos: 1_000_000_000 },
    ];
    for change in wrong {
        let mut options = options();
        change(&mut options);
        let error = MemoryTree::new().plan(&options).err().unwrap();
        assert!(matches!(error, LayoutError::Option { .. }), "{error}");
    }
    let mut options = options();
    options.size = Size::FreeSpace { bytes: u64::MAX };
    let error = MemoryTree::new().plan(&options).err().unwrap();
    assert!(matches!(error, LayoutError::TooLarge { .. }), "{error}");
}

#[test]
fn a_lost_found_that_is_no_directory_is_refused() {
    let mut tree = MemoryTree::new();
    tree.add(ROOT, "lost+found", Content::Symlink(b"elsewhere".to_vec()));
    assert!(matches!(plan(&tree), LayoutError::LostFoundNotDirectory { .. }));
}

#[test]
fn more_names_than_ext4_counts_are_refused_with_the_inode() {
    let mut tree = MemoryTree::new();
    let file = tree.add(ROOT, "first", Content::Fifo);
    for n in 0..64_999 {
        tree.link(ROOT, format!("{n}"), file);
    }
    assert!(tree.plan(&options()).is_ok());
    tree.link(ROOT, "one more", file);
    let error = plan(&tree);
    assert!(matches!(error, LayoutError::TooManyLinks { inode, .. } if inode == file), "{error}");
    assert_eq!(path_of(&tree, file).unwrap(), b"/0");
}

#[test]
fn a_tree_that_contradicts_itself_is_refused() {
    let mut tree = MemoryTree::new();
    let file = tree.add(ROOT, "file", Content::Fifo);
    tree.node(file).links = 2;
    assert!(matches!(plan(&tree), LayoutError::LinkCount { claimed: 2, found: 1, .. }));

    let mut tree = MemoryTree::new();
    let inner = tree.directory(ROOT, "directory");
    tree.link(inner, "itself", inner);
    assert!(matches!(plan(&tree), LayoutError::DirectoryLinkedTwice { .. }));

    let mut tree = MemoryTree::new();
    let inner = tree.directory(ROOT, "directory");
    tree.link(inner, "root", ROOT);
    assert!(matches!(plan(&tree), LayoutError::DirectoryLinkedTwice { .. }));

    for name in [&b""[..], b".", b"..", b"a/b", b"a\0b", &[b'x'; 256]] {
        let mut tree = MemoryTree::new();
        tree.add(ROOT, name, Content::Fifo);
        assert!(matches!(plan(&tree), LayoutError::Name { .. }), "{}", name.escape_ascii());
    }
    for target in [vec![], vec![b'x'; 4096], b"a\0b".to_vec()] {
        let mut tree = MemoryTree::new();
        tree.add(ROOT, "link", Content::Symlink(target));
        assert!(matches!(plan(&tree), LayoutError::SymlinkTarget { .. }));
    }
    for (major, minor) in [(4096, 0), (0, 1 << 20)] {
        let mut tree = MemoryTree::new();
        tree.add(ROOT, "device", Content::Char(major, minor));
        assert!(matches!(plan(&tree), LayoutError::Device { .. }));
    }
    let mut tree = MemoryTree::new();
    tree.add(ROOT, "file", Content::File { size_bytes: 1 << 44, runs: vec![] });
    assert!(matches!(plan(&tree), LayoutError::FileTooLarge { .. }));
}

#[test]
fn runs_that_leave_their_file_or_region_or_share_blocks_are_refused() {
    let run =
        |file_block, region, region_block, blocks| Run { file_block, region, region_block, blocks };
    for runs in [
        vec![run(0, 0, 0, 0)],
        vec![run(0, 0, 0, 5)],
        vec![run(4, 0, 0, 1)],
        vec![run(0, 0, 98, 3)],
        vec![run(0, 0, u64::MAX, 1)],
        vec![run(u64::MAX, 0, 0, 1)],
        vec![run(0, 9, 0, 1)],
        vec![run(1, 0, 0, 1), run(0, 0, 1, 1)],
        vec![run(0, 0, 0, 2), run(1, 0, 5, 1)],
        vec![run(0, 0, 0, 2), run(2, 0, 1, 1)],
    ] {
        let mut tree = MemoryTree::new();
        tree.allocate(0, 100);
        tree.add(ROOT, "file", Content::File { size_bytes: 4 * 4096, runs: runs.clone() });
        assert!(matches!(plan(&tree), LayoutError::Run { .. }), "{runs:?}");
    }
}

#[test]
fn attributes_that_do_not_fit_name_the_inode() {
    let mut tree = MemoryTree::new();
    let inner = tree.directory(ROOT, "a");
    let file = tree.add(inner, "b", Content::File { size_bytes: 0, runs: vec![] });
    let fits = tree.set(&[(b"user.x", &[1; 4096 - 32 - 4 - 20])]);
    tree.node(file).xattrs = Some(fits);
    judge(&tree, &options());
    let set = tree.set(&[(b"user.x", &[1; 4096 - 32 - 4 - 19])]);
    tree.node(file).xattrs = Some(set);
    let error = plan(&tree);
    let LayoutError::Xattr { inode, source: XattrError::TooLarge { .. }, .. } = error else {
        panic!("{error}")
    };
    assert_eq!(path_of(&tree, inode).unwrap(), b"/a/b");
    let acl = tree.set(&[(b"system.posix_acl_access", b"nonsense")]);
    tree.node(file).xattrs = Some(acl);
    let error = plan(&tree);
    assert!(matches!(error, LayoutError::Xattr { source: XattrError::Acl { .. }, .. }), "{error}");
}
