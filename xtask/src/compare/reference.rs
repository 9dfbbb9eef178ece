//! Independent unpackers: what an image's tree ought to be, told by tools that are not ours.
//!
//! * `umoci unpack`, as root: one directory, layers applied in turn.
//! * `podman` (containers/storage): layers unpacked by Docker's own rules, merged by the kernel.
//! * `replayed`: the system calls that Docker and containerd make for each entry of a layer, in their
//!   order, where podman differs from both.
//! * `overlay`: GNU tar per layer, whiteouts turned into the kernel's own, and the kernel's
//!   overlay on top, which is what Docker, containerd and podman users see.
//!
//! Knows nothing of builderd.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use rustix::fs::{AtFlags, FileType, Mode, Timestamps, XattrFlags};

use super::walk::{self, Tree};
use crate::mount::Mount;
use crate::process::Program;

/// A tree as an independent tool sees it, and what that tool cannot know.
pub(crate) struct Reference {
    pub(crate) tree: Tree,
    pub(crate) mtime_unknown: Vec<Vec<u8>>,
    /// Whether it says anything of the root directory itself.
    pub(crate) root_known: bool,
}

/// Unpacks with umoci into a temporary directory below `scratch`.
pub(crate) fn umoci(layout: &Path, scratch: &Path) -> Result<Reference> {
    let dir = tempfile::tempdir_in(scratch)?;
    let bundle = dir.path().join("bundle");
    Program::new("umoci")
        .args(["unpack", "--image"])
        .arg(format!("{}:latest", layout.display()))
        .arg(&bundle)
        .run()?;
    // Where no layer names the root, umoci gives it a time of its own.
    let tree = walk::walk(&bundle.join("rootfs"))?;
    Ok(Reference { tree, mtime_unknown: vec![Vec::new()], root_known: true })
}

/// Pulls into a private podman storage and mounts the image there.
pub(crate) fn podman(layout: &Path, scratch: &Path) -> Result<Reference> {
    let storage = PodmanStorage::new(scratch)?;
    let place = format!(
        "containers-storage:[overlay@{}+{}]localhost/image:latest",
        storage.root().display(),
        storage.run.path().display()
    );
    Program::new("skopeo")
        .args(["--insecure-policy", "copy", "--quiet"])
        .arg(format!("oci:{}:latest", layout.display()))
        .arg(place)
        .run()?;
    let point = storage.podman(&["image", "mount", "localhost/image"]).text()?;
    let tree = walk::walk(Path::new(&point));
    storage.podman(&["image", "unmount", "--force", "localhost/image"]).run()?;
    let mut tree = tree?;
    count_links(&mut tree);
    // Where no layer names the root, podman makes one of its own taste.
    Ok(Reference { tree, mtime_unknown: Vec::new(), root_known: false })
}

/// A podman storage of our own, gone when dropped.
struct PodmanStorage {
    dir: tempfile::TempDir,
    /// Where podman refuses a path longer than these of `/tmp`.
    run: tempfile::TempDir,
}

impl PodmanStorage {
    fn new(scratch: &Path) -> Result<Self> {
        Ok(Self { dir: tempfile::tempdir_in(scratch)?, run: tempfile::tempdir()? })
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("storage")
    }

    fn podman(&self, words: &[&str]) -> Program {
        Program::new("podman")
            .arg("--root")
            .arg(self.root())
            .arg("--runroot")
            .arg(self.run.path())
            .args(["--storage-driver", "overlay", "--cgroup-manager", "cgroupfs"])
            .args(words)
    }
}

impl Drop for PodmanStorage {
    fn drop(&mut self) {
        // The storage keeps a bind mount of itself; there is none when nothing was pulled.
        let _ = Program::new("umount").arg(self.root().join("overlay")).outcome();
    }
}

/// `createTarFile` of Docker (moby/go-archive) and of containerd (`pkg/archive`): what is there is
/// linked or made, then gets its owner, be it another or not, each attribute, its mode and its time.
/// podman sets no owner that is there already, and so keeps what a `chown` takes away.
const REPLAY: &str = r#"
import os, sys, tarfile
blob, root = sys.argv[1:]
directories = []
with tarfile.open(blob) as tar:
    for entry in tar:
        path = os.path.join(root, entry.name)
        if entry.isdir():
            directories.append((path, entry.mtime))
            if not os.path.isdir(path):
                os.mkdir(path)
        elif entry.islnk():
            os.link(os.path.join(root, entry.linkname), path)
        elif entry.isreg():
            with open(path, "xb") as file:
                file.write(tar.extractfile(entry).read())
        else:
            sys.exit("no rule for " + entry.name)
        os.chown(path, entry.uid, entry.gid, follow_symlinks=False)
        for key, value in entry.pax_headers.items():
            if key.startswith("SCHILY.xattr."):
                value = value.encode("utf-8", "surrogateescape")
                os.setxattr(path, key.removeprefix("SCHILY.xattr."), value, follow_symlinks=False)
        os.chmod(path, entry.mode)
        os.utime(path, (entry.mtime, entry.mtime))
for path, mtime in directories:
    os.utime(path, (mtime, mtime))
"#;

/// Unpacks the only layer of an image by [`REPLAY`], whose tar Python reads.
pub(crate) fn replayed(layout: &Path, scratch: &Path) -> Result<Reference> {
    let dir = tempfile::tempdir_in(scratch)?;
    let blobs = layer_blobs(layout)?;
    let [blob] = blobs.as_slice() else { bail!("{} layers are not one", blobs.len()) };
    Program::new("python3").args(["-c", REPLAY]).arg(blob).arg(dir.path()).run()?;
    let tree = walk::walk(dir.path())?;
    Ok(Reference { tree, mtime_unknown: vec![Vec::new()], root_known: false })
}

/// Unpacks each layer apart and lets the kernel's overlay merge them.
pub(crate) fn overlay(layout: &Path, scratch: &Path) -> Result<Reference> {
    let dir = tempfile::tempdir_in(scratch)?;
    let mut upper_first: Vec<PathBuf> = Vec::new();
    let mut mtime_unknown = Vec::new();
    for (index, blob) in layer_blobs(layout)?.iter().enumerate() {
        let layer = dir.path().join(index.to_string());
        std::fs::create_dir(&layer)?;
        let below = merged(&upper_first)?;
        let below = below.as_ref().map(Mount::path);
        for path in unpack_layer(blob, &layer, below)? {
            if !inherit(below, &layer, &path)? {
                mtime_unknown.push(path);
            }
        }
        upper_first.insert(0, layer);
    }
    let mount = merged(&upper_first)?.context("an image without layers needs no reference")?;
    let mut tree = walk::walk(mount.path())?;
    count_links(&mut tree);
    Ok(Reference { tree, mtime_unknown, root_known: true })
}

/// An overlay repeats a lower inode's link count, names that are hidden included: count anew.
fn count_links(tree: &mut Tree) {
    let mut names: HashMap<Vec<u8>, u64> = HashMap::new();
    for entry in tree.values().filter(|entry| !entry.twin.is_empty()) {
        *names.entry(entry.twin.clone()).or_default() += 1;
    }
    for entry in tree.values_mut() {
        if let Some(count) = names.get(&entry.twin) {
            entry.links = *count;
            if *count == 1 {
                entry.twin.clear();
            }
        }
    }
}

/// The blobs of a layout's only image, bottom first.
pub(crate) fn layer_blobs(layout: &Path) -> Result<Vec<PathBuf>> {
    let read = |path: &Path| -> Result<serde_json::Value> {
        Ok(serde_json::from_slice(&std::fs::read(path)?)?)
    };
    let blob = |digest: &serde_json::Value| -> Result<PathBuf> {
        let text = digest.as_str().context("a descriptor without a digest")?;
        Ok(layout.join("blobs").join(text.replace(':', "/")))
    };
    let index = read(&layout.join("index.json"))?;
    let manifest = read(&blob(&index["manifests"][0]["digest"])?)?;
    let layers = manifest["layers"].as_array().context("a manifest without layers")?;
    layers.iter().map(|layer| blob(&layer["digest"])).collect()
}

fn merged(upper_first: &[PathBuf]) -> Result<Option<Mount>> {
    match upper_first {
        [] => Ok(None),
        // The kernel wants at least two layers: an empty one below changes nothing.
        [only] => {
            let empty = only.with_extension("below");
            std::fs::create_dir_all(&empty)?;
            Ok(Some(Mount::overlay(&[only.clone(), empty])?))
        }
        many => Ok(Some(Mount::overlay(many)?)),
    }
}

/// Unpacks one layer and returns the directories that it has without naming them.
fn unpack_layer(blob: &Path, layer: &Path, below: Option<&Path>) -> Result<Vec<Vec<u8>>> {
    let tar = |mode: &str| Program::new("tar").args([mode, "--auto-compress", "--file"]).arg(blob);
    let listed = tar("--list").arg("--quoting-style=literal").checked()?;
    Program::new("tar")
        .args(["--extract", "--numeric-owner", "--preserve-permissions", "--xattrs"])
        .args(["--xattrs-include=*", "--delay-directory-restore", "--directory"])
        .arg(layer)
        .arg("--file")
        .arg(blob)
        .run()?;
    let lines = listed.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let declared: HashSet<Vec<u8>> = lines.map(clean).collect();
    let mut undeclared = Vec::new();
    let mut markers = Vec::new();
    for (path, entry) in walk::walk(layer)? {
        let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        if name.starts_with(b".wh.") {
            markers.push(path);
        } else if entry.kind == walk::Kind::Directory && !declared.contains(&path) {
            undeclared.push(path);
        }
    }
    for marker in markers {
        whiteout(layer, below, &marker)?;
    }
    Ok(undeclared)
}

/// `./usr/bin/` as `usr/bin`
fn clean(path: &[u8]) -> Vec<u8> {
    let parts: Vec<&[u8]> =
        path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".").collect();
    parts.join(&b'/')
}

/// Turns a marker file into what the kernel's overlay understands.
fn whiteout(layer: &Path, below: Option<&Path>, marker: &[u8]) -> Result<()> {
    let path = layer.join(OsStr::from_bytes(marker));
    let parent = path.parent().context("a marker without a parent")?.to_path_buf();
    let times = times_of(&parent)?;
    let name = path.file_name().unwrap_or_default().as_bytes().to_vec();
    std::fs::remove_file(&path)?;
    let opaque = |dir: &Path| {
        rustix::fs::lsetxattr(dir, "trusted.overlay.opaque", b"y", XattrFlags::empty())
    };
    if name == b".wh..wh..opq" {
        opaque(&parent)?;
    } else if !name.starts_with(b".wh..wh.") {
        let hidden = parent.join(OsStr::from_bytes(&name[".wh.".len()..]));
        // A marker hides what is below, never what its own layer brings.
        if hidden.symlink_metadata().is_ok_and(|metadata| metadata.is_dir()) {
            opaque(&hidden)?;
        } else if hidden.symlink_metadata().is_err() && exists_below(layer, below, &hidden) {
            rustix::fs::mknodat(
                rustix::fs::CWD,
                &hidden,
                FileType::CharacterDevice,
                Mode::empty(),
                0,
            )?;
        }
    }
    set_times(&parent, &times)
}

/// Where nothing is hidden, the kernel's marker would itself be seen.
fn exists_below(layer: &Path, below: Option<&Path>, hidden: &Path) -> bool {
    let (Some(root), Ok(relative)) = (below, hidden.strip_prefix(layer)) else { return false };
    root.join(relative).symlink_metadata().is_ok()
}

/// Gives an unnamed directory the metadata it has below; `false` when there is none.
fn inherit(below: Option<&Path>, layer: &Path, path: &[u8]) -> Result<bool> {
    let relative = OsStr::from_bytes(path);
    let target = if path.is_empty() { layer.to_path_buf() } else { layer.join(relative) };
    let found = below.map(|root| if path.is_empty() { root.into() } else { root.join(relative) });
    let source: Option<PathBuf> =
        found.filter(|path| path.symlink_metadata().is_ok_and(|metadata| metadata.is_dir()));
    let Some(source) = source else {
        rustix::fs::chmod(&target, Mode::from_raw_mode(0o755))?;
        return Ok(false);
    };
    let metadata = source.symlink_metadata()?;
    std::os::unix::fs::lchown(&target, Some(metadata.uid()), Some(metadata.gid()))?;
    rustix::fs::chmod(&target, Mode::from_raw_mode(metadata.mode() & 0o7777))?;
    for (name, value) in walk::xattrs(&source)? {
        rustix::fs::lsetxattr(&target, OsStr::from_bytes(&name), &value, XattrFlags::empty())?;
    }
    set_times(&target, &times_of(&source)?)?;
    Ok(true)
}

fn times_of(path: &Path) -> Result<Timestamps> {
    let metadata = path.symlink_metadata()?;
    let time = rustix::fs::Timespec { tv_sec: metadata.mtime(), tv_nsec: metadata.mtime_nsec() };
    Ok(Timestamps { last_access: time, last_modification: time })
}

fn set_times(path: &Path, times: &Timestamps) -> Result<()> {
    rustix::fs::utimensat(rustix::fs::CWD, path, times, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(())
}
