//! Crafted layers: every corner of the format, one small image each.
//!
//! Each case says who judges it. Where tools disagree, what a kernel's overlay shows is right,
//! since that is what Docker, containerd and podman users see; umoci judges where GNU tar cannot
//! unpack a layer by itself (a hard link to a lower layer).

use anyhow::{Context as _, Result, bail};

use super::Verdict;
use super::lab::{Lab, root_needed};
use crate::compare::reference;
use crate::images::generated::tar_bytes;
use crate::images::layout::{LayerTar, LayoutWriter};
use crate::images::tar::{Node, What};

/// The exit code for an image that is at fault.
const EXIT_IMAGE: i32 = 3;

/// Who says what is right.
#[derive(Clone, Copy)]
enum Judge {
    Overlay,
    Podman,
    /// The system calls of Docker and containerd, where podman makes others.
    Docker,
    /// umoci, but for the times of these directories, which it sets to the time of day.
    Umoci(&'static [&'static str]),
    /// The build must fail and name this.
    Refused(&'static str),
}

pub(super) struct Case {
    sentence: &'static str,
    judge: Judge,
    fill: fn(&mut LayoutWriter) -> Result<()>,
}

impl Case {
    pub(super) fn sentence(&self) -> &'static str {
        self.sentence
    }

    pub(super) fn run(&self, lab: &Lab) -> Result<Verdict> {
        let corner = lab.corner()?;
        let layout = corner.path("layout");
        let mut writer = LayoutWriter::create(&layout)?;
        (self.fill)(&mut writer)?;
        writer.finish(&serde_json::json!({}))?;
        let source = format!("oci:{}", layout.display());
        if let Judge::Refused(words) = self.judge {
            corner.refuse(&source, &[], EXIT_IMAGE, words)?;
            return Ok(Verdict::Passed);
        }
        let output = corner.output("rootfs.ext4");
        corner.build(&source, &output, &[])?;
        if let Some(reason) = root_needed() {
            return Ok(Verdict::Skipped(reason));
        }
        let scratch = corner.path("tmp");
        let expected = match self.judge {
            Judge::Umoci(times_unknown) => {
                reference::umoci(&layout, &scratch).map(|mut expected| {
                    let unknown = times_unknown.iter().map(|path| path.as_bytes().to_vec());
                    expected.mtime_unknown.extend(unknown);
                    expected
                })
            }
            Judge::Podman => reference::podman(&layout, &scratch),
            Judge::Docker if !crate::process::found("python3") => {
                return Ok(Verdict::Skipped("python3 is not installed".to_owned()));
            }
            Judge::Docker => reference::replayed(&layout, &scratch),
            Judge::Overlay | Judge::Refused(_) => reference::overlay(&layout, &scratch),
        };
        corner.judge(&output, expected.context("the reference tool failed")?)?;
        for path in [ESCAPE, "/etc/builderd-escape"] {
            if std::path::Path::new(path).exists() {
                bail!("{path} was created on the host");
            }
        }
        Ok(Verdict::Passed)
    }
}

/// Where hostile layers try to write.
const ESCAPE: &str = "/tmp/builderd-escape";

/// A layer with a directory `d` of two files, the ground for most cases.
fn ground(writer: &mut LayoutWriter) -> Result<()> {
    writer.layer(|tar| {
        tar.add("d", &Node::directory().mode(0o751).owner(3, 4).mtime(1_000_000_000, 5))?;
        tar.add("d/one", &Node::file("1"))?;
        tar.add("d/two", &Node::file("2"))?;
        tar.add("f", &Node::file("file").mode(0o4711))
    })
}

/// `ground` with one more layer.
fn on_ground(
    writer: &mut LayoutWriter,
    fill: impl FnOnce(&mut LayerTar<'_>) -> std::io::Result<()>,
) -> Result<()> {
    ground(writer)?;
    writer.layer(fill)
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = whiteouts();
    cases.extend(shapes());
    cases.extend(links());
    cases.extend(metadata());
    cases.extend(hostile());
    cases
}

#[expect(clippy::too_many_lines, reason = "a table, not a procedure")]
fn whiteouts() -> Vec<Case> {
    vec![
        Case {
            sentence: "a whiteout after its siblings deletes the lower file alone",
            judge: Judge::Overlay,
            fill: |w| {
                on_ground(w, |t| {
                    t.add("d/three", &Node::file("3"))?;
                    t.whiteout("d/one")
                })
            },
        },
        Case {
            sentence: "a whiteout never hits an entry of its own layer",
            judge: Judge::Overlay,
            fill: |w| {
                on_ground(w, |t| {
                    t.add("d/one", &Node::file("new"))?;
                    t.whiteout("d/one")?;
                    t.whiteout("d/two")?;
                    t.add("d/two", &Node::file("newer"))
                })
            },
        },
        Case {
            sentence: "an opaque marker hides the lower names wherever it stands in the layer",
            judge: Judge::Overlay,
            fill: |w| {
                on_ground(w, |t| {
                    t.add("d", &Node::directory())?;
                    t.add("d/before", &Node::file("b"))?;
                    t.opaque("d")?;
                    t.add("d/after", &Node::file("a"))
                })
            },
        },
        Case {
            sentence: "an opaque marker at the root hides all (a kernel's overlay cannot say that)",
            judge: Judge::Umoci(&[]),
            fill: |w| {
                on_ground(w, |t| {
                    t.add("only", &Node::file("o"))?;
                    t.opaque("")
                })
            },
        },
        Case {
            sentence: "a whiteout of a directory beside a new directory of that name replaces it",
            judge: Judge::Overlay,
            fill: |w| {
                on_ground(w, |t| {
                    t.whiteout("d")?;
                    t.add("d", &Node::directory().mode(0o700))?;
                    t.add("d/fresh", &Node::file("f"))
                })
            },
        },
        Case {
            sentence: "whiteouts of what is not there and of whole trees are both fine",
            judge: Judge::Overlay,
            fill: |w| {
                on_ground(w, |t| {
                    t.whiteout("d")?;
                    t.whiteout("never")?;
                    t.add("e", &Node::directory())?;
                    t.whiteout("e/never")
                })
            },
        },
        Case {
            sentence: "a name deleted in one layer can come back in the next",
            judge: Judge::Overlay,
            fill: |w| {
                on_ground(w, |t| t.whiteout("d"))?;
                w.layer(|t| t.add("d/one", &Node::file("again")))
            },
        },
        Case {
            sentence: "opaque and whiteout in one layer are as good as opaque (an overlay lists the whiteout)",
            judge: Judge::Umoci(&[]),
            fill: |w| {
                on_ground(w, |t| {
                    t.add("d", &Node::directory())?;
                    t.whiteout("d/one")?;
                    t.opaque("d")?;
                    t.add("d/two", &Node::file("new"))
                })
            },
        },
        Case {
            sentence: "a whiteout of a name of 255 bytes deletes it (no file system holds the marker)",
            judge: Judge::Umoci(&["d"]),
            fill: |w| {
                let name = format!("d/{}", "n".repeat(255));
                w.layer(|t| {
                    t.add("d", &Node::directory())?;
                    t.add(&name, &Node::file("n"))
                })?;
                w.layer(|t| t.whiteout(&name))
            },
        },
        Case {
            sentence: "a whiteout of dot dot is refused",
            judge: Judge::Refused(".wh."),
            fill: |w| on_ground(w, |t| t.add("d/.wh...", &Node::file(""))),
        },
        Case {
            sentence: "a whiteout without a name is refused",
            judge: Judge::Refused(".wh."),
            fill: |w| on_ground(w, |t| t.add("d/.wh.", &Node::file(""))),
        },
    ]
}

#[expect(clippy::too_many_lines, reason = "a table, not a procedure")]
fn shapes() -> Vec<Case> {
    vec![
        Case {
            sentence: "a file becomes a directory and a directory becomes a file",
            judge: Judge::Overlay,
            fill: |w| {
                on_ground(w, |t| {
                    t.add("f", &Node::directory())?;
                    t.add("f/inner", &Node::file("i"))?;
                    t.add("d", &Node::file("was a directory"))
                })
            },
        },
        Case {
            sentence: "a directory becomes a symlink and a symlink becomes a directory",
            judge: Judge::Overlay,
            fill: |w| {
                w.layer(|t| {
                    t.add("real", &Node::directory())?;
                    t.add("real/x", &Node::file("x"))?;
                    t.add("link", &Node::symlink("real"))?;
                    t.add("dir", &Node::directory())
                })?;
                w.layer(|t| {
                    t.add("link", &Node::directory())?;
                    t.add("link/y", &Node::file("y"))?;
                    t.add("dir", &Node::symlink("real"))
                })
            },
        },
        Case {
            sentence: "a lower symlink used as a parent is replaced by a directory (umoci follows it)",
            judge: Judge::Overlay,
            fill: |w| {
                w.layer(|t| {
                    t.add("real", &Node::directory())?;
                    t.add("link", &Node::symlink("real"))
                })?;
                w.layer(|t| t.add("link/child", &Node::file("c")))
            },
        },
        Case {
            sentence: "a directory named again has the new metadata and its old children",
            judge: Judge::Overlay,
            fill: |w| {
                on_ground(w, |t| {
                    let again = Node::directory().mode(0o1770).owner(9, 8).mtime(7, 6);
                    t.add("d", &again.xattr("user.again", "yes"))
                })
            },
        },
        Case {
            sentence: "directories that no layer names exist, and keep what they have below",
            judge: Judge::Overlay,
            fill: |w| {
                on_ground(w, |t| {
                    t.add("d/one", &Node::file("1b"))?;
                    t.add("missing/parents/of/this", &Node::file("t"))
                })
            },
        },
        Case {
            sentence: "of two entries of one name the last one wins",
            judge: Judge::Overlay,
            fill: |w| {
                on_ground(w, |t| {
                    t.add("twice", &Node::file("first").mode(0o600))?;
                    t.add("other", &Node::file("o"))?;
                    t.add("twice", &Node::file("second, longer").mode(0o640))?;
                    t.add("./f", &Node::file("dot slash"))?;
                    t.add("d//two", &Node::file("two slashes"))
                })
            },
        },
        Case {
            sentence: "the entry of the root itself sets its mode, owner and time",
            judge: Judge::Overlay,
            fill: |w| {
                w.layer(|t| {
                    t.add(
                        "./",
                        &Node::directory().mode(0o711).owner(5, 6).mtime(1_234_567_890, 0),
                    )?;
                    t.add("./x", &Node::file("x"))
                })
            },
        },
        Case {
            sentence: "a directory that became a symlink and a directory again is empty",
            judge: Judge::Overlay,
            fill: |w| {
                on_ground(w, |t| t.add("d", &Node::symlink("f")))?;
                w.layer(|t| t.add("d", &Node::directory().mode(0o700)))
            },
        },
        Case {
            sentence: "layers with nothing in them add nothing",
            judge: Judge::Overlay,
            fill: |w| {
                ground(w)?;
                let docker = vec![0; 1024];
                for plain in [&b""[..], &docker[..]] {
                    w.raw_layer(&gzip(plain)?, plain)?;
                }
                Ok(())
            },
        },
        Case {
            sentence: "a gzip layer of several members is read to its end",
            judge: Judge::Overlay,
            fill: |w| {
                let plain = tar_bytes(|t| {
                    t.add("big", &Node::file(b"0123456789".repeat(9999)))?;
                    t.add("last", &Node::file("end"))
                })?;
                let (left, right) = plain.split_at(plain.len() / 3);
                w.raw_layer(&[gzip(left)?, gzip(right)?].concat(), &plain)
            },
        },
    ]
}

#[expect(clippy::too_many_lines, reason = "a table, not a procedure")]
fn links() -> Vec<Case> {
    vec![
        Case {
            sentence: "hard links within a layer are one file, also to symlinks and to links",
            judge: Judge::Overlay,
            fill: |w| {
                w.layer(|t| {
                    t.add("a", &Node::file("shared"))?;
                    t.add("dir/b", &Node::link("a"))?;
                    t.add("c", &Node::link("dir/b"))?;
                    t.add("s", &Node::symlink("a"))?;
                    t.add("s2", &Node::link("s"))
                })
            },
        },
        Case {
            sentence: "a link's own metadata is applied to its file (umoci leaves that alone)",
            judge: Judge::Podman,
            fill: |w| {
                w.layer(|t| {
                    t.add("a", &Node::file("shared").mode(0o640).owner(1, 2))?;
                    t.add("b", &Node::link("a").mode(0o751).owner(3, 4).mtime(5, 0))
                })
            },
        },
        Case {
            sentence: "a link's attributes join its file's, and its chown takes capabilities (podman's does not; umoci and tar leave both alone)",
            judge: Judge::Docker,
            fill: |w| {
                w.layer(|t| {
                    let file = |name: &'static str| {
                        let node = Node::file(name).mode(0o755).xattr("user.a", "1");
                        (name, node.xattr("user.b", "2").xattr("security.capability", CAPABILITY))
                    };
                    for (name, node) in [file("bare"), file("joined"), file("capable")] {
                        t.add(name, &node)?;
                    }
                    t.add("bare-too", &Node::link("bare").mode(0o755))?;
                    let link = Node::link("joined").mode(0o755).xattr("user.b", "3");
                    t.add("joined-too", &link.xattr("user.c", "4"))?;
                    let link = Node::link("capable").mode(0o755);
                    t.add("capable-too", &link.xattr("security.capability", CAPABILITY))
                })
            },
        },
        Case {
            sentence: "a directory that its layer names twice has the attributes of both entries (umoci those of the last, podman refuses)",
            judge: Judge::Docker,
            fill: |w| {
                w.layer(|t| {
                    let first = Node::directory().xattr("user.a", "1");
                    t.add("d", &first.xattr("user.b", "2"))?;
                    t.add("d/x", &Node::file("x"))?;
                    t.add("d", &Node::directory().mode(0o700).xattr("user.b", "3"))
                })
            },
        },
        Case {
            sentence: "a hard link to a lower layer shares the file",
            judge: Judge::Umoci(&[]),
            fill: |w| on_ground(w, |t| t.add("linked", &Node::link("d/one"))),
        },
        Case {
            sentence: "a replaced name leaves the other names of its file alone",
            judge: Judge::Overlay,
            fill: |w| {
                w.layer(|t| {
                    t.add("a", &Node::file("old"))?;
                    t.add("b", &Node::link("a"))?;
                    t.add("c", &Node::link("a"))
                })?;
                w.layer(|t| {
                    t.add("a", &Node::file("new"))?;
                    t.whiteout("c")
                })
            },
        },
        Case {
            sentence: "symlinks of 59, 60 and 4095 bytes keep their targets",
            judge: Judge::Overlay,
            fill: |w| {
                w.layer(|t| {
                    for length in [1_usize, 59, 60, 61, 1024, 4095] {
                        let target = "/abcdefgh".repeat(500);
                        t.add(format!("l{length}"), &Node::symlink(&target.as_bytes()[..length]))?;
                    }
                    Ok(())
                })
            },
        },
        Case {
            sentence: "a symlink of the same layer used as a parent is followed within the root",
            judge: Judge::Umoci(&["tmp", "tmp/builderd-escape"]),
            fill: |w| {
                w.layer(|t| {
                    t.add("tmp", &Node::directory())?;
                    t.add("out", &Node::symlink("../../../tmp/builderd-escape"))?;
                    t.add("out/pwn", &Node::file("p"))
                })
            },
        },
        Case {
            sentence: "a hard link to a directory is refused",
            judge: Judge::Refused("link"),
            fill: |w| on_ground(w, |t| t.add("x", &Node::link("d"))),
        },
        Case {
            sentence: "a hard link to nothing is refused",
            judge: Judge::Refused("link"),
            fill: |w| on_ground(w, |t| t.add("x", &Node::link("nowhere/at/all"))),
        },
        Case {
            sentence: "more than 65000 names of one file are refused",
            judge: Judge::Refused("65000"),
            fill: |w| {
                w.layer(|t| {
                    t.add("a", &Node::file("a"))?;
                    (0..65_000).try_for_each(|n| t.add(format!("l/{n}"), &Node::link("a")))
                })
            },
        },
    ]
}

#[expect(clippy::too_many_lines, reason = "a table, not a procedure")]
fn metadata() -> Vec<Case> {
    vec![
        Case {
            sentence: "nanoseconds, times before 1970 and after 2038 are kept",
            judge: Judge::Overlay,
            fill: |w| {
                w.layer(|t| {
                    let times = [
                        (0, 0),
                        (1, 999_999_999),
                        (-1, 1),
                        (-2_000_000_000, 0),
                        (2_147_483_647, 7),
                        (2_147_483_648, 0),
                        (4_294_967_296, 500),
                        (9_000_000_000, 123_456_789),
                    ];
                    times.iter().enumerate().try_for_each(|(index, (secs, nanos))| {
                        t.add(format!("t{index}"), &Node::file("t").mtime(*secs, *nanos))
                    })
                })
            },
        },
        Case {
            sentence: "all twelve mode bits and owners of 32 bits are kept",
            judge: Judge::Overlay,
            fill: |w| {
                w.layer(|t| {
                    for mode in [0, 0o1000, 0o2755, 0o4755, 0o6711, 0o7777] {
                        t.add(format!("m{mode:o}"), &Node::file("m").mode(mode))?;
                    }
                    t.add("far", &Node::file("o").owner(3_000_000_000, 4_000_000_000))?;
                    t.add("near", &Node::directory().owner(65_535, 65_536).mode(0o3777))
                })
            },
        },
        Case {
            sentence: "capabilities, ACLs and other extended attributes are kept",
            judge: Judge::Overlay,
            fill: extended_attributes,
        },
        Case {
            sentence: "attributes that Linux sets on no such file are left out",
            judge: Judge::Overlay,
            fill: |w| {
                w.layer(|t| {
                    let with = |node: Node| node.xattr("user.u", "1").xattr("trusted.t", "2");
                    t.add("./", &with(Node::directory()))?;
                    t.add("link", &with(Node::symlink("f")))?;
                    t.add("pipe", &with(Node::new(What::Fifo)))?;
                    t.add("null", &with(Node::new(What::CharDevice(1, 3))))?;
                    t.add("f", &with(Node::file("f")))
                })
            },
        },
        Case {
            sentence: "an ACL that names nobody is a mode and no attribute",
            judge: Judge::Podman,
            fill: |w| {
                w.layer(|t| {
                    let short = acl(&[(1, 6, 0), (4, 4, 0), (32, 0, 0)]);
                    t.add("mode", &Node::file("m").mode(0o640).xattr(ACL, short))?;
                    let named = acl(&[(1, 6, 0), (2, 4, 1000), (4, 4, 0), (16, 4, 0), (32, 0, 0)]);
                    t.add("named", &Node::file("n").mode(0o640).xattr(ACL, named))
                })
            },
        },
        Case {
            sentence: "the owner that nobody can be is root",
            judge: Judge::Umoci(&[]),
            fill: |w| w.layer(|t| t.add("f", &Node::file("f").owner(u32::MAX, u32::MAX))),
        },
        Case {
            sentence: "devices with large numbers and fifos are kept",
            judge: Judge::Overlay,
            fill: |w| {
                w.layer(|t| {
                    t.add("null", &Node::new(What::CharDevice(1, 3)).mode(0o666))?;
                    t.add("wide", &Node::new(What::CharDevice(300, 70_000)))?;
                    t.add("disk", &Node::new(What::BlockDevice(259, 1_000_000)).mode(0o600))?;
                    t.add("pipe", &Node::new(What::Fifo).owner(1, 1))
                })
            },
        },
        Case {
            sentence: "names that are not UTF-8, of 255 bytes and at great depth are kept",
            judge: Judge::Overlay,
            fill: |w| {
                w.layer(|t| {
                    t.add(b"latin-\xe9\xff", &Node::file("l"))?;
                    t.add("n".repeat(255), &Node::file("n"))?;
                    t.add(" sp ace\t'\"\\$", &Node::file("s"))?;
                    t.add("deep/".repeat(180) + "end", &Node::file("d"))
                })
            },
        },
        Case {
            sentence: "files at the edges of a block and with holes keep their bytes",
            judge: Judge::Overlay,
            fill: |w| {
                w.layer(|t| {
                    for length in [0, 1, 511, 512, 513, 4095, 4096, 4097, 65_536, 300_001] {
                        let content: Vec<u8> =
                            (0..length).map(|n: u32| (n % 251).to_le_bytes()[0] | 1).collect();
                        t.add(format!("f{length}"), &Node::file(content))?;
                    }
                    let mut holes = vec![0; 5 << 20];
                    for at in [0, 1 << 20, (3 << 20) + 4095] {
                        holes[at] = 1;
                    }
                    t.add("holes", &Node::file(holes))?;
                    t.add("zeros", &Node::file(vec![0; 1 << 20]))
                })
            },
        },
        Case {
            sentence: "twenty thousand names in one directory are all found",
            judge: Judge::Overlay,
            fill: |w| {
                w.layer(|t| {
                    (0..20_000).try_for_each(|n| t.add(format!("many/{n:x}"), &Node::file("")))?;
                    (0..300).try_for_each(|n| t.add(format!("dirs/{n}"), &Node::directory()))
                })
            },
        },
    ]
}

const ACL: &str = "system.posix_acl_access";

/// Version 2 of a POSIX ACL: tag, rights and, where the tag wants one, an id.
fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    const NAMED: [u16; 2] = [2, 8];
    let mut value = vec![2, 0, 0, 0];
    for (tag, rights, id) in entries {
        let id = if NAMED.contains(tag) { *id } else { u32::MAX };
        value.extend_from_slice(&tag.to_le_bytes());
        value.extend_from_slice(&rights.to_le_bytes());
        value.extend_from_slice(&id.to_le_bytes());
    }
    value
}

/// Version 2 of a file's capabilities: raw sockets.
const CAPABILITY: &[u8] = &[1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn extended_attributes(writer: &mut LayoutWriter) -> Result<()> {
    // Version 3 carries the user namespace's root: here 100000.
    let capability_v3 = [&[1, 0, 0, 3], &CAPABILITY[4..], &100_000_u32.to_le_bytes()].concat();
    // Owner rwx, user 1000 r-x, group r-x, mask r-x, other r--.
    let acl = acl(&[(1, 7, 0), (2, 5, 1000), (4, 5, 0), (16, 5, 0), (32, 4, 0)]);
    writer.layer(|t| {
        t.add("ping", &Node::file("p").mode(0o755).xattr("security.capability", CAPABILITY))?;
        t.add("pong", &Node::file("p").mode(0o755).xattr("security.capability", capability_v3))?;
        let listed = Node::file("a").mode(0o754).xattr(ACL, acl.clone());
        t.add("acl", &listed)?;
        let default = Node::directory().xattr("system.posix_acl_default", acl.clone());
        t.add("dir", &default.xattr("user.dir", "x"))?;
        t.add("small", &Node::file("s").xattr("user.empty", "").xattr("user.a", "1"))?;
        t.add("large", &Node::file("l").xattr("user.large", vec![7; 3000]))?;
        for index in 0..1100 {
            let shared = Node::file("s").xattr("user.shared", vec![9; 400]);
            t.add(format!("shared/{index}"), &shared)?;
        }
        t.add("trusted", &Node::file("t").xattr("trusted.thing", "root's own"))
    })
}

#[expect(clippy::too_many_lines, reason = "a table, not a procedure")]
fn hostile() -> Vec<Case> {
    vec![
        Case {
            sentence: "dot dot never leaves the root",
            judge: Judge::Umoci(&[]),
            fill: |w| {
                w.layer(|t| {
                    t.add("etc", &Node::directory())?;
                    t.add("tmp", &Node::directory())?;
                    t.add("../../../etc/builderd-escape", &Node::file("e"))?;
                    t.add("/tmp/builderd-escape", &Node::file("absolute"))?;
                    t.add("a", &Node::directory())?;
                    t.add("a/../b", &Node::file("b"))
                })
            },
        },
        Case {
            sentence: "a layer cut short is refused",
            judge: Judge::Refused("layer"),
            fill: |w| {
                let plain = tar_bytes(|t| t.add("f", &Node::file(vec![1; 90_000])))?;
                let blob = gzip(&plain)?;
                w.raw_layer(&blob[..blob.len() / 2], &plain)
            },
        },
        Case {
            sentence: "a layer whose uncompressed bytes are not the promised ones is refused",
            judge: Judge::Refused("claims"),
            fill: |w| {
                let plain = tar_bytes(|t| t.add("f", &Node::file("true")))?;
                let other = tar_bytes(|t| t.add("f", &Node::file("false")))?;
                w.raw_layer(&gzip(&plain)?, &other)
            },
        },
        Case {
            sentence: "a header with a wrong checksum is refused",
            judge: Judge::Refused("checksum"),
            fill: |w| {
                let mut plain = tar_bytes(|t| t.add("f", &Node::file("f")))?;
                plain[0] ^= 1;
                w.raw_layer(&gzip(&plain)?, &plain)
            },
        },
        Case {
            sentence: "a file that ends before its size is refused",
            judge: Judge::Refused("layer"),
            fill: |w| {
                let mut plain = tar_bytes(|t| t.add("f", &Node::file(vec![1; 5000])))?;
                plain.truncate(2048);
                w.raw_layer(&gzip(&plain)?, &plain)
            },
        },
        Case {
            sentence: "a small blob that inflates beyond all measure is refused",
            judge: Judge::Refused("layer"),
            fill: |w| {
                let mut plain = tar_bytes(|t| t.add("f", &Node::file(vec![0; 1 << 20])))?;
                plain.truncate(512 + (1 << 20));
                // Each member of the gzip stream is the same entry once more.
                w.raw_layer(&gzip(&plain)?.repeat(3000), &plain)
            },
        },
        Case {
            sentence: "a path longer than 4096 bytes is refused",
            judge: Judge::Refused("path"),
            fill: |w| w.layer(|t| t.add("p/".repeat(2100) + "x", &Node::file("x"))),
        },
        Case {
            sentence: "a name longer than 255 bytes is refused",
            judge: Judge::Refused("255"),
            fill: |w| w.layer(|t| t.add("n".repeat(256), &Node::file("x"))),
        },
        Case {
            sentence: "an unknown kind of entry is refused or skipped as Docker does",
            judge: Judge::Refused("type"),
            fill: |w| {
                w.layer(|t| {
                    let mut bytes = tar_bytes(|t| t.add("f", &Node::file("")))?;
                    bytes.truncate(512);
                    bytes[156] = b'Z';
                    let sum: u32 =
                        bytes[..148].iter().chain(&bytes[156..]).map(|b| u32::from(*b)).sum();
                    bytes[148..156].copy_from_slice(format!("{:06o}\0 ", sum + 256).as_bytes());
                    t.raw(&bytes)
                })
            },
        },
    ]
}

fn gzip(plain: &[u8]) -> Result<Vec<u8>> {
    use std::io::Write as _;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(plain)?;
    Ok(encoder.finish()?)
}
