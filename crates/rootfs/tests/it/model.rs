//! Random layers against a naive model: nested maps, one per layer, merged by recursion. And
//! the same layers against the kernel's own overlay mount, where that can be had.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::process::Command;

use ext4::{InodeId, Kind, Tree};
use proptest::prelude::*;

use crate::support::{Image, Layer, header, try_flatten};

#[derive(Clone, Debug)]
enum Op {
    File(String, u32),
    Dir(String),
    Symlink(String, String),
    Link(String, String),
    Whiteout(String),
    Opaque(String),
}

/// Something that is no directory: what it shows, and its time.
#[derive(Clone, Debug)]
struct Leaf {
    text: String,
    time: u64,
}

#[derive(Clone, Debug)]
enum Node {
    Dir(Dir),
    Leaf(usize),
    /// A hard link that waits for its target.
    Pending(usize),
}

#[derive(Clone, Debug, Default)]
struct Slot {
    whiteout: bool,
    node: Option<Node>,
}

#[derive(Clone, Debug, Default)]
struct Dir {
    /// `None` when only implied.
    time: Option<u64>,
    opaque: bool,
    slots: BTreeMap<String, Slot>,
}

#[derive(Debug)]
struct Refused;

#[derive(Clone, Debug, Default)]
struct Model {
    leaves: Vec<Leaf>,
    /// Target and time of each pending link of the layer.
    links: Vec<(String, u64)>,
    merged: Dir,
}

fn comps(path: &str) -> Vec<String> {
    path.split('/').filter(|it| !it.is_empty() && *it != ".").map(str::to_owned).collect()
}

fn get<'a>(root: &'a Dir, path: &[String]) -> Option<&'a Node> {
    let (last, parents) = path.split_last()?;
    let mut dir = root;
    for name in parents {
        let Some(Node::Dir(next)) = &dir.slots.get(name)?.node else { return None };
        dir = next;
    }
    dir.slots.get(last)?.node.as_ref()
}

fn dir_at<'a>(root: &'a mut Dir, path: &[String]) -> &'a mut Dir {
    let mut dir = root;
    for name in path {
        let node = &mut dir.slots.entry(name.clone()).or_default().node;
        if !matches!(node, Some(Node::Dir(_))) {
            *node = Some(Node::Dir(Dir::default()));
        }
        let Some(Node::Dir(next)) = node else { unreachable!() };
        dir = next;
    }
    dir
}

impl Model {
    /// Where a directory path leads, links followed within the root.
    fn resolve(&self, root: &Dir, path: &[String]) -> Result<Vec<String>, Refused> {
        let mut at: Vec<String> = Vec::new();
        let mut todo: Vec<String> = path.iter().rev().cloned().collect();
        let mut links = 0;
        while let Some(name) = todo.pop() {
            if name == ".." {
                at.pop();
                continue;
            }
            at.push(name);
            match get(root, &at) {
                None | Some(Node::Dir(_)) => {}
                Some(Node::Pending(_)) => return Err(Refused),
                Some(Node::Leaf(leaf)) => {
                    let Some(target) = self.leaves[*leaf].text.strip_prefix("-> ") else {
                        return Err(Refused);
                    };
                    links += 1;
                    if links > 40 {
                        return Err(Refused);
                    }
                    at.pop();
                    if target.starts_with('/') {
                        at.clear();
                    }
                    todo.extend(comps(target).into_iter().rev());
                }
            }
        }
        Ok(at)
    }

    /// What is at a path whose directories may be links; a file on the way means nothing is.
    fn find(&self, root: &Dir, path: &str) -> Result<Option<Node>, Refused> {
        let path = comps(path);
        let (last, parents) = path.split_last().ok_or(Refused)?;
        // A ring of links refuses, a file on the way does not; told apart by the limit.
        let mut at = match self.resolve(root, parents) {
            Ok(at) => at,
            Err(Refused) if self.is_ring(root, parents) => return Err(Refused),
            Err(Refused) => return Ok(None),
        };
        at.push(last.clone());
        Ok(get(root, &at).cloned())
    }

    fn is_ring(&self, root: &Dir, path: &[String]) -> bool {
        // With every file taken away, only a ring can still refuse.
        let mut bare = root.clone();
        self.strip(&mut bare);
        self.resolve(&bare, path).is_err() && {
            let prefix = (0..path.len()).find(|n| self.resolve(root, &path[..=*n]).is_err());
            prefix.is_some_and(|n| self.resolve(&bare, &path[..=n]).is_err())
        }
    }

    fn strip(&self, dir: &mut Dir) {
        for slot in dir.slots.values_mut() {
            match &mut slot.node {
                Some(Node::Dir(below)) => self.strip(below),
                Some(Node::Leaf(leaf)) if self.leaves[*leaf].text.starts_with("-> ") => {}
                node => *node = None,
            }
        }
    }

    fn leaf(&mut self, text: String, time: u64) -> Node {
        self.leaves.push(Leaf { text, time });
        Node::Leaf(self.leaves.len() - 1)
    }

    fn apply(&mut self, upper: &mut Dir, op: &Op, time: u64) -> Result<(), Refused> {
        let (Op::File(path, _)
        | Op::Dir(path)
        | Op::Symlink(path, _)
        | Op::Link(path, _)
        | Op::Whiteout(path)
        | Op::Opaque(path)) = op;
        let path = comps(path);
        if let Op::Opaque(_) = op {
            let at = self.resolve(upper, &path)?;
            dir_at(upper, &at).opaque = true;
            return Ok(());
        }
        let (name, parents) = path.split_last().ok_or(Refused)?;
        let at = self.resolve(upper, parents)?;
        dir_at(upper, &at);
        let node = match op {
            Op::Whiteout(_) => {
                dir_at(upper, &at).slots.entry(name.clone()).or_default().whiteout = true;
                return Ok(());
            }
            Op::Opaque(_) => return Ok(()),
            Op::Dir(_) => {
                let slot = dir_at(upper, &at).slots.entry(name.clone()).or_default();
                if let Some(Node::Dir(dir)) = &mut slot.node {
                    dir.time = Some(time);
                    return Ok(());
                }
                Node::Dir(Dir { time: Some(time), ..Dir::default() })
            }
            Op::File(_, content) => self.leaf(format!("file {content}"), time),
            Op::Symlink(_, target) => self.leaf(format!("-> {target}"), time),
            Op::Link(_, target) => match self.find(upper, target)? {
                Some(Node::Dir(_)) => return Err(Refused),
                Some(Node::Leaf(leaf)) => {
                    self.leaves[leaf].time = time;
                    Node::Leaf(leaf)
                }
                Some(Node::Pending(link)) => {
                    self.links[link].1 = time;
                    Node::Pending(link)
                }
                None => {
                    self.links.push((target.clone(), time));
                    Node::Pending(self.links.len() - 1)
                }
            },
        };
        dir_at(upper, &at).slots.entry(name.clone()).or_default().node = Some(node);
        Ok(())
    }

    /// Links whose target came later in the layer.
    fn settle(&mut self, upper: &mut Dir) -> Result<(), Refused> {
        let mut finals = HashMap::new();
        for link in 0..self.links.len() {
            let mut seen = HashSet::new();
            let mut at = link;
            let end = loop {
                if !seen.insert(at) {
                    break Node::Pending(at);
                }
                match self.find(upper, &self.links[at].0.clone())? {
                    None => break Node::Pending(at),
                    Some(Node::Dir(_)) => return Err(Refused),
                    Some(Node::Leaf(leaf)) => break Node::Leaf(leaf),
                    Some(Node::Pending(next)) => at = next,
                }
            };
            finals.insert(link, end);
        }
        // In a ring any member stands for all: the first one found.
        for link in 0..self.links.len() {
            if let Node::Leaf(leaf) = finals[&link] {
                self.leaves[leaf].time = self.links[link].1;
            }
        }
        replace(upper, &finals);
        Ok(())
    }

    fn merge(
        &self,
        lower: &Dir,
        upper: &Dir,
        waiting: &mut Vec<(Vec<String>, usize)>,
        at: &[String],
    ) -> Dir {
        let mut out = Dir { time: upper.time.or(lower.time), ..Dir::default() };
        if !upper.opaque {
            out.slots.clone_from(&lower.slots);
        }
        for (name, slot) in &upper.slots {
            if slot.whiteout {
                out.slots.remove(name);
            }
            let path = [at, std::slice::from_ref(name)].concat();
            match &slot.node {
                None => {}
                Some(Node::Pending(link)) => waiting.push((path, *link)),
                Some(Node::Dir(dir)) if slot.whiteout && !is_real(dir) => {}
                Some(Node::Dir(dir)) => {
                    let below = match out.slots.get(name).and_then(|slot| slot.node.as_ref()) {
                        Some(Node::Dir(below)) => below.clone(),
                        _ => Dir::default(),
                    };
                    let merged = Node::Dir(self.merge(&below, dir, waiting, &path));
                    out.slots.insert(name.clone(), Slot { whiteout: false, node: Some(merged) });
                }
                Some(Node::Leaf(leaf)) => {
                    let node = Some(Node::Leaf(*leaf));
                    out.slots.insert(name.clone(), Slot { whiteout: false, node });
                }
            }
        }
        out
    }

    fn finish_layer(&mut self, mut upper: Dir) -> Result<(), Refused> {
        self.settle(&mut upper)?;
        let mut waiting = Vec::new();
        let mut merged = self.merge(&self.merged, &upper, &mut waiting, &[]);
        let mut placed = Vec::new();
        let mut times: BTreeMap<usize, usize> = BTreeMap::new();
        for (path, link) in waiting {
            match self.find(&merged, &self.links[link].0)? {
                Some(Node::Leaf(leaf)) => {
                    times.insert(link, leaf);
                    placed.push((path, leaf));
                }
                _ => return Err(Refused),
            }
        }
        for (link, leaf) in times {
            self.leaves[leaf].time = self.links[link].1;
        }
        for (path, leaf) in placed {
            let (name, parents) = path.split_last().ok_or(Refused)?;
            let slot = dir_at(&mut merged, parents).slots.entry(name.clone()).or_default();
            slot.node = Some(Node::Leaf(leaf));
        }
        self.links.clear();
        self.merged = merged;
        Ok(())
    }

    fn list(&self) -> BTreeMap<String, (String, u64, Option<usize>)> {
        let mut out = BTreeMap::new();
        self.list_below(&self.merged, "", &mut out);
        out
    }

    fn list_below(
        &self,
        dir: &Dir,
        at: &str,
        out: &mut BTreeMap<String, (String, u64, Option<usize>)>,
    ) {
        for (name, slot) in &dir.slots {
            let path = if at.is_empty() { name.clone() } else { format!("{at}/{name}") };
            match &slot.node {
                Some(Node::Dir(below)) => {
                    let row = ("dir".to_owned(), below.time.unwrap_or(0), None);
                    out.insert(path.clone(), row);
                    self.list_below(below, &path, out);
                }
                Some(Node::Leaf(leaf)) => {
                    let row =
                        (self.leaves[*leaf].text.clone(), self.leaves[*leaf].time, Some(*leaf));
                    out.insert(path, row);
                }
                Some(Node::Pending(_)) | None => {}
            }
        }
    }
}

fn replace(dir: &mut Dir, finals: &HashMap<usize, Node>) {
    for slot in dir.slots.values_mut() {
        match &mut slot.node {
            Some(Node::Dir(below)) => replace(below, finals),
            Some(node @ Node::Pending(_)) => {
                let Node::Pending(link) = *node else { unreachable!() };
                *node = finals[&link].clone();
            }
            Some(Node::Leaf(_)) | None => {}
        }
    }
}

fn is_real(dir: &Dir) -> bool {
    dir.time.is_some()
        || dir.slots.values().any(|slot| match &slot.node {
            None => false,
            Some(Node::Dir(below)) => is_real(below),
            Some(Node::Leaf(_) | Node::Pending(_)) => true,
        })
}

fn add(layer: Layer, op: &Op, time: u64) -> Layer {
    match op {
        Op::File(path, content) => {
            let content = content.to_string();
            let file = header(path, b'0').size(content.len() as u64).mtime(time);
            layer.entry(&file, content.as_bytes())
        }
        Op::Dir(path) => layer.entry(&header(path, b'5').mtime(time), &[]),
        Op::Symlink(path, target) => layer.entry(&header(path, b'2').link(target).mtime(time), &[]),
        Op::Link(path, target) => layer.entry(&header(path, b'1').link(target).mtime(time), &[]),
        Op::Whiteout(path) => layer.whiteout(path),
        Op::Opaque(path) => layer.opaque(path),
    }
}

fn path() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 1..4)
        .prop_map(|names| names.join("/"))
}

fn op() -> impl Strategy<Value = Op> {
    let target = prop_oneof![
        3 => path(),
        1 => path().prop_map(|path| format!("/{path}")),
        1 => path().prop_map(|path| format!("../{path}")),
        1 => path().prop_map(|path| format!("{path}/..")),
    ];
    prop_oneof![
        4 => (path(), 0_u32..1000).prop_map(|(path, content)| Op::File(path, content)),
        3 => path().prop_map(Op::Dir),
        2 => (path(), target).prop_map(|(path, target)| Op::Symlink(path, target)),
        2 => (path(), path()).prop_map(|(path, target)| Op::Link(path, target)),
        2 => path().prop_map(Op::Whiteout),
        1 => path().prop_map(Op::Opaque),
    ]
}

fn layers() -> impl Strategy<Value = Vec<Vec<Op>>> {
    prop::collection::vec(prop::collection::vec(op(), 0..9), 1..5)
}

fn compare(image: &Image, model: &Model) {
    let expected = model.list();
    let found = image.paths();
    let mut numbers: HashMap<usize, InodeId> = HashMap::new();
    let mut rows = BTreeMap::new();
    for (path, id) in &found {
        let path = String::from_utf8(path.clone()).unwrap();
        let time = u64::try_from(image.tree.inode(*id).mtime.secs).unwrap();
        let text = image.show(&path);
        if let Some((_, _, Some(leaf))) = expected.get(&path) {
            assert_eq!(*numbers.entry(*leaf).or_insert(*id), *id, "{path} is another file");
        }
        rows.insert(path, (text, time));
    }
    let expected: BTreeMap<_, _> =
        expected.into_iter().map(|(path, (text, time, _))| (path, (text, time))).collect();
    assert_eq!(rows, expected);
    let distinct: HashSet<_> = numbers.values().collect();
    assert_eq!(distinct.len(), numbers.len(), "two files became one");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    /// Nothing is left out: what the model refuses must be refused.
    #[test]
    fn any_layers_are_folded_or_refused_as_the_model_does(layers in layers()) {
        let mut model = Model::default();
        let mut tars = Vec::new();
        let mut refused = false;
        let mut time = 1;
        for ops in &layers {
            let mut upper = Dir::default();
            let mut tar = Layer::new();
            for op in ops {
                time += 1;
                refused = refused || model.apply(&mut upper, op, time).is_err();
                tar = add(tar, op, time);
            }
            refused = refused || model.finish_layer(upper).is_err();
            tars.push(tar);
        }
        match try_flatten(&tars) {
            Ok(image) => {
                prop_assert!(!refused, "accepted: {:?}", image.list());
                compare(&image, &model);
            }
            Err(error) => prop_assert!(refused, "{error}"),
        }
    }

    /// Entries that the model refuses are left out, so that long stories come to an end.
    #[test]
    fn layers_that_can_be_folded_become_the_tree_of_the_model(layers in layers()) {
        let mut model = Model::default();
        let mut tars = Vec::new();
        let mut time = 1;
        for ops in &layers {
            let (model_after, tar) = fold_what_fits(&model, ops, &mut time);
            model = model_after;
            tars.push(tar);
        }
        compare(&try_flatten(&tars).unwrap(), &model);
    }
}

/// A layer of those ops after which the layer can still be finished.
fn fold_what_fits(model: &Model, ops: &[Op], time: &mut u64) -> (Model, Layer) {
    let mut kept: Vec<(Op, u64)> = Vec::new();
    let finish = |kept: &[(Op, u64)]| {
        let mut model = model.clone();
        let mut upper = Dir::default();
        for (op, time) in kept {
            model.apply(&mut upper, op, *time)?;
        }
        model.finish_layer(upper).map(|()| model)
    };
    for op in ops {
        *time += 1;
        kept.push((op.clone(), *time));
        if finish(&kept).is_err() {
            kept.pop();
        }
    }
    let tar = kept.iter().fold(Layer::new(), |tar, (op, time)| add(tar, op, *time));
    (finish(&kept).unwrap(), tar)
}

/// Writes a layer as an upper directory: a device 0:0 for a whiteout, an attribute for opaque.
fn unpack(dir: &Dir, leaves: &[Leaf], at: &Path, opaque: &mut Vec<String>) {
    std::fs::create_dir_all(at).unwrap();
    for (name, slot) in &dir.slots {
        let path = at.join(name);
        match &slot.node {
            Some(Node::Dir(below)) if !slot.whiteout || is_real(below) => {
                unpack(below, leaves, &path, opaque);
                if slot.whiteout || below.opaque {
                    opaque.push(path.to_str().unwrap().to_owned());
                }
            }
            Some(Node::Leaf(leaf)) => match leaves[*leaf].text.split_once(' ').unwrap() {
                ("->", target) => symlink(target, &path).unwrap(),
                (_, content) => std::fs::write(&path, content).unwrap(),
            },
            Some(Node::Dir(_) | Node::Pending(_)) | None => {
                if slot.whiteout {
                    run(Command::new("mknod").arg(&path).args(["c", "0", "0"])).unwrap();
                }
            }
        }
    }
}

fn run(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr)))
    }
}

/// `find` in an overlay mount of `layers`, lowest first, in a mount namespace of its own.
fn list_overlay(temp: &Path, layers: usize) -> Result<BTreeMap<String, String>, String> {
    let empty = temp.join("empty");
    std::fs::create_dir_all(&empty).unwrap();
    let mut lower: Vec<String> =
        (0..layers).rev().map(|n| temp.join(n.to_string()).to_str().unwrap().to_owned()).collect();
    // One directory alone cannot be mounted.
    lower.push(empty.to_str().unwrap().to_owned());
    let mount = temp.join("mount");
    std::fs::create_dir_all(&mount).unwrap();
    // Devices are left out: a whiteout in a directory without lower layers is still listed by
    // the kernel, though it cannot be opened.
    let script = format!(
        "mount -t overlay overlay -o lowerdir={} {mount} && cd {mount} && \
         find . -mindepth 1 -type d -printf '%P\\tdir\\n' && \
         find . -mindepth 1 -type l -printf '%P\\t-> %l\\n' && \
         find . -mindepth 1 -type f -printf '%P\\tfile ' -exec cat {{}} ';' -printf '\\n'",
        lower.join(":"),
        mount = mount.to_str().unwrap(),
    );
    let text = run(Command::new("unshare").args(["-m", "sh", "-c", &script]))?;
    let rows = text.lines().filter_map(|line| line.split_once('\t'));
    Ok(rows.map(|(path, text)| (path.to_owned(), text.to_owned())).collect())
}

#[test]
fn the_kernels_overlay_mount_shows_the_same_tree() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    let mut runner = TestRunner::deterministic();
    let mut judged = 0;
    for _ in 0..60 {
        let ops = layers().new_tree(&mut runner).unwrap().current();
        let temp = tempfile::tempdir().unwrap();
        if temp.path().metadata().unwrap().uid() != 0 {
            eprintln!("SKIPPED: an overlay mount needs root");
            return;
        }
        let mut model = Model::default();
        let mut tars = Vec::new();
        let mut opaque = Vec::new();
        for (number, ops) in ops.iter().enumerate() {
            // Links into lower layers cannot be unpacked into an upper directory alone.
            let ops: Vec<Op> =
                ops.iter().filter(|op| !matches!(op, Op::Link(..))).cloned().collect();
            let mut upper = Dir::default();
            let mut tar = Layer::new();
            for op in &ops {
                if model.clone().apply(&mut upper.clone(), op, 1).is_ok() {
                    model.apply(&mut upper, op, 1).unwrap();
                    tar = add(tar, op, 1);
                }
            }
            unpack(&upper, &model.leaves, &temp.path().join(number.to_string()), &mut opaque);
            if upper.opaque {
                opaque.push(temp.path().join(number.to_string()).to_str().unwrap().to_owned());
            }
            model.finish_layer(upper).unwrap();
            tars.push(tar);
        }
        for path in &opaque {
            let set = ["-n", "trusted.overlay.opaque", "-v", "y", path.as_str()];
            if let Err(error) = run(Command::new("setfattr").args(set)) {
                eprintln!("SKIPPED: {error}");
                return;
            }
        }
        let seen = match list_overlay(temp.path(), tars.len()) {
            Ok(seen) => seen,
            Err(error) => {
                eprintln!("SKIPPED after {judged} layers: {error}");
                return;
            }
        };
        let image = try_flatten(&tars).unwrap();
        let ours: BTreeMap<String, String> = image
            .paths()
            .keys()
            .map(|path| String::from_utf8(path.clone()).unwrap())
            .map(|path| (path.clone(), image.show(&path)))
            .collect();
        assert_eq!(ours, seen, "{ops:?}");
        assert!(matches!(image.tree.inode(InodeId::ROOT).kind, Kind::Directory));
        judged += 1;
    }
    assert_eq!(judged, 60);
}
