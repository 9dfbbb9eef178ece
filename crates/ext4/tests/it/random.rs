//! Random trees: whatever is valid becomes an image that all judges accept.

use ext4::{InodeId, Run, Size, Timestamp};
use proptest::prelude::*;
use proptest::strategy::ValueTree;

use crate::support::{Content, ImageFile, MemoryTree, options};

#[derive(Clone, Debug)]
enum Step {
    Directory,
    File { bytes: u64 },
    Holey { runs: Vec<(u64, u64)> },
    Symlink { length: usize },
    Device { major: u32, minor: u32 },
    Fifo,
    HardLink,
}

#[derive(Clone, Debug)]
struct Made {
    step: Step,
    parent: usize,
    region: u32,
    name: Vec<u8>,
    permissions: u16,
    owner: (u32, u32),
    time: (i64, u32),
    attribute_bytes: Option<usize>,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => Just(Step::Directory),
        4 => (0_u64..200_000).prop_map(|bytes| Step::File { bytes }),
        1 => prop::collection::vec((0_u64..5, 1_u64..200), 0..30)
            .prop_map(|runs| Step::Holey { runs }),
        2 => (1_usize..4096).prop_map(|length| Step::Symlink { length }),
        1 => (0_u32..4096, 0_u32..1 << 20)
            .prop_map(|(major, minor)| Step::Device { major, minor }),
        1 => Just(Step::Fifo),
        1 => Just(Step::HardLink),
    ]
}

fn made() -> impl Strategy<Value = Made> {
    let name = prop::collection::vec((1_u8..=255).prop_filter("/", |&b| b != b'/'), 1..=255)
        .prop_filter("dots", |n| n != b"." && n != b"..");
    let time = (-(1_i64 << 31) + 1..(3 << 32) - (1 << 31) - 1, 0_u32..1_000_000_000);
    let attribute_bytes = prop::option::weighted(0.3, 0_usize..3500);
    let owner = (any::<u32>(), any::<u32>());
    (step(), any::<usize>(), 0_u32..3, name, 0_u16..0o10000, owner, time, attribute_bytes).prop_map(
        |(step, parent, region, name, permissions, owner, time, attribute_bytes)| Made {
            step,
            parent,
            region,
            name,
            permissions,
            owner,
            time,
            attribute_bytes,
        },
    )
}

fn build(steps: &[Made]) -> MemoryTree {
    let mut tree = MemoryTree::new();
    tree.region(2);
    tree.region(3);
    let mut directories = vec![InodeId::ROOT];
    let mut others: Vec<InodeId> = Vec::new();
    for made in steps {
        let parent = directories[made.parent % directories.len()];
        let Content::Directory(entries) = &tree.nodes[parent.0 as usize].content else {
            unreachable!()
        };
        if entries.contains_key(&made.name) || made.name == b"lost+found" {
            continue;
        }
        let region = made.region;
        let id = match &made.step {
            Step::Directory => tree.directory(parent, &made.name),
            Step::File { bytes } => tree.file(parent, &made.name, region, *bytes),
            Step::Holey { runs } => {
                let (mut at, mut all) = (0, Vec::new());
                for &(hole, blocks) in runs {
                    let run = tree.allocate(region, blocks).unwrap();
                    all.push(Run { file_block: at + hole, ..run });
                    at += hole + blocks;
                    tree.allocate(region, hole * 40); // blocks nobody uses
                }
                tree.add(parent, &made.name, Content::File { size_bytes: at * 4096, runs: all })
            }
            Step::Symlink { length } => {
                tree.add(parent, &made.name, Content::Symlink(vec![b'/'; *length]))
            }
            Step::Device { major, minor } => {
                tree.add(parent, &made.name, Content::Block(*major, *minor))
            }
            Step::Fifo => tree.add(parent, &made.name, Content::Fifo),
            Step::HardLink => {
                let Some(&id) = others.get(made.parent % others.len().max(1)) else { continue };
                tree.link(parent, &made.name, id);
                continue;
            }
        };
        if matches!(made.step, Step::Directory) {
            directories.push(id);
        } else {
            others.push(id);
        }
        let set = made.attribute_bytes.map(|n| {
            let value = vec![n as u8; n];
            tree.set(&[(b"security.a", &value[..n / 50]), (b"trusted.b", &value)])
        });
        let node = tree.node(id);
        node.permissions = made.permissions;
        (node.uid, node.gid) = made.owner;
        node.mtime = Timestamp { secs: made.time.0, nanos: made.time.1 };
        node.xattrs = set;
    }
    tree
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn a_random_tree_is_clean_and_reads_back(
        steps in prop::collection::vec(made(), 0..120),
        journal in any::<bool>(),
        seed in any::<[u8; 16]>(),
        free in 0_u64..300 << 20,
    ) {
        let tree = build(&steps);
        let mut options = options();
        options.journal = journal;
        options.hash_seed = seed;
        options.uuid = seed;
        options.size = Size::FreeSpace { bytes: free };
        let image = ImageFile::build(&tree, &options);
        image.assert_clean();
        crate::reread::assert_reads_as(&image, &tree);
    }
}

#[test]
fn random_trees_mount_as_they_were_given() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    for _ in 0..8 {
        let strategy = prop::collection::vec(made(), 150);
        let steps = strategy.new_tree(&mut runner).unwrap().current();
        crate::writer::judge(&build(&steps), &options());
    }
}
