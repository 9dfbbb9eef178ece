//! What images and registries try: bombs, paths that lead out, and answers that lead to places
//! which only the operator may reach.

use std::io::Write as _;

use anyhow::{Result, bail};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};

use super::Table;
use super::ground::{ESCAPE, Ended, Ground};
use super::names::TURNING;
use super::rogue::Answer;
use crate::images::generated::tar_bytes;
use crate::images::layout::LayoutWriter;
use crate::images::tar::Node;

type Fill = fn(&mut LayoutWriter) -> Result<()>;

const TREE: &str = "paths end at the root";
const EGRESS: &str = "egress guard";
/// What the guard says of addresses.
const LOOPBACK: &str = "it is a loopback address";
const LINK_LOCAL: &str = "it is a link-local address";
const PRIVATE: &str = "it is a private address";
const LEADS_TO_LOOPBACK: &str = "its name leads to a loopback address";

pub(super) fn images(ground: &Ground, table: &mut Table) -> Result<()> {
    for (number, (what, wall, words, fill)) in hostile().into_iter().enumerate() {
        let image = ground.image(&format!("hostile-{number}"), &json!({}), fill)?;
        let result = refused(&ground.build(&image, &[])?, words);
        table.add(what, wall, result);
    }
    table.healthy(ground);
    let result = harmless(ground);
    table.add("names with .., absolute names, links as parents", TREE, result);
    Ok(())
}

fn refused(ended: &Ended, words: &str) -> Result<String> {
    ended.failed("INVALID_SOURCE", words)
}

/// What is refused, by what, and with which words.
fn hostile() -> Vec<(&'static str, &'static str, &'static str, Fill)> {
    const BOUNDS: &str = "bounded inflating";
    vec![
        ("gzip bomb, 3 GB", BOUNDS, "looks like a decompression bomb", |w| {
            let mut plain = tar_bytes(|t| t.add("f", &Node::file(vec![0; 1 << 20])))?;
            plain.truncate(512 + (1 << 20));
            // Each member of the gzip stream is the same entry once more.
            w.raw_layer(&gzip(&plain)?.repeat(3000), &plain)
        }),
        ("zstd bomb, 3 GB", BOUNDS, "looks like a decompression bomb", |w| {
            let mut plain = tar_bytes(|t| t.add("f", &Node::file(vec![0; 1 << 20])))?;
            plain.truncate(512 + (1 << 20));
            w.raw_layer_as("+zstd", &zstd_of_zeros(&plain[..512]).repeat(3000), &plain)
        }),
        ("zstd window of 2 GiB", BOUNDS, "rame requires too much memory", |w| {
            // RFC 8878, 3.1.1: magic number, a descriptor of nothing, window 2^31, one empty block.
            let frame = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 21 << 3, 0x01, 0x00, 0x00];
            w.raw_layer_as("+zstd", &frame, b"")
        }),
        ("a path of 4 KiB", "limits of a path", "path is longer", |w| {
            w.layer(|t| t.add("p/".repeat(2100) + "x", &Node::file("x")))
        }),
        ("hard link to the host's file", TREE, "a hard link to", |w| {
            w.layer(|t| t.add("passwd", &Node::link("../../../../../../etc/passwd")))
        }),
        ("ring of links as a parent", "limits of a tree", "symbolic links", |w| {
            w.layer(|t| {
                t.add("a", &Node::symlink("b"))?;
                t.add("b", &Node::symlink("a"))?;
                t.add("a/f", &Node::file("x"))
            })
        }),
        ("whiteout of ..", "whiteouts name a sibling", ".wh.", |w| {
            w.layer(|t| t.add("d/.wh...", &Node::file("")))
        }),
        ("whiteout of nothing", "whiteouts name a sibling", ".wh.", |w| {
            w.layer(|t| t.add("d/.wh.", &Node::file("")))
        }),
        ("an entry below a whiteout", "whiteouts name a sibling", "below a whiteout", |w| {
            w.layer(|t| t.add("d/.wh.x/passwd", &Node::file("x")))
        }),
        ("a layer that is not what the config says", "diff_id", "claims", |w| {
            let plain = tar_bytes(|t| t.add("f", &Node::file("true")))?;
            let other = tar_bytes(|t| t.add("f", &Node::file("false")))?;
            w.raw_layer(&gzip(&plain)?, &other)
        }),
    ]
}

/// A frame of 512 bytes and a mebibyte of zeros (RFC 8878, 3.1.1): magic number, a descriptor of
/// nothing, window 2^17, a raw block, and eight that repeat a byte 2^17 times; the last one says so.
fn zstd_of_zeros(head: &[u8]) -> Vec<u8> {
    let raw = [&[0x28, 0xb5, 0x2f, 0xfd, 0x00, 7 << 3, 0x00, 0x10, 0x00][..], head].concat();
    let repeated = [0x02, 0x00, 0x10, 0x00].repeat(7);
    [&raw[..], &repeated, &[0x03, 0x00, 0x10, 0x00]].concat()
}

fn gzip(plain: &[u8]) -> Result<Vec<u8>> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(plain)?;
    Ok(encoder.finish()?)
}

/// What is an image like any other, as long as nothing of it lands outside: built, and unpacked
/// for a command.
fn harmless(ground: &Ground) -> Result<String> {
    let up = "../../../../../../..";
    let image = ground.image("harmless", &Ground::tools_config(), |writer| {
        ground.tools(writer)?;
        writer.layer(|tar| {
            tar.add(format!("{up}{ESCAPE}"), &Node::file("dot dot"))?;
            tar.add(ESCAPE, &Node::file("absolute"))?;
            tar.add("srv/link", &Node::symlink(format!("{up}/tmp")))?;
            tar.add("srv/exact", &Node::symlink(format!("{up}{ESCAPE}")))?;
            tar.add("srv/device", &Node::symlink("/dev/sda"))
        })?;
        writer.layer(|tar| {
            tar.add("srv/link/builderd-escape", &Node::file("through a link"))?;
            tar.add("srv/exact", &Node::file("over a link"))?;
            tar.add("srv/device/x", &Node::file("below a link"))
        })
    })?;
    let script = "echo through >> /srv/link/builderd-escape; echo over >> /srv/exact";
    ground.build(&image, &[script])?.completed()?;
    ground.build(&image, &[])?.completed()?;
    ground.nothing_escaped()?;
    ground.is_healthy()?;
    Ok("built, nothing outside".into())
}

pub(super) fn registries(ground: &Ground, table: &mut Table) -> Result<()> {
    let before = ground.neighbour.connections();
    let result = spellings(ground);
    table.add("registry at a private address, in all spellings", EGRESS, result);
    for name in ["inside", "metadata", "both"] {
        let host = format!("{name}.attacker.example:{}", ground.neighbour.port());
        let result = named(ground, &host);
        let what = match name {
            "both" => "name of a public and a loopback address".to_owned(),
            _ => format!("name that leads to {name}"),
        };
        table.add(&what, EGRESS, result);
    }
    table.add(
        "name that leads elsewhere when asked again (DNS rebinding)",
        EGRESS,
        turning(ground),
    );
    for (number, (url, rule)) in places(ground).iter().enumerate() {
        let shown = url.replace(ground.neighbour.port(), "PORT");
        let result = redirected(ground, &format!("redirect-{number}"), (url, rule), true);
        table.add(&format!("layer redirected to {shown}"), EGRESS, result);
        let result = redirected(ground, &format!("moved-{number}"), (url, rule), false);
        table.add(&format!("manifest redirected to {shown}"), EGRESS, result);
        let result = realm(ground, &format!("realm-{number}"), (url, rule));
        table.add(&format!("token realm {shown}"), EGRESS, result);
    }
    table.add("any of them at the neighbour", EGRESS, untouched(ground, before));
    table.healthy(ground);
    Ok(())
}

/// Nobody has come to the neighbour since, be it without a word.
fn untouched(ground: &Ground, before: usize) -> Result<String> {
    match ground.neighbour.connections() - before {
        0 => Ok("no connection".to_owned()),
        more => bail!("{more} connections; it was asked {:?}", ground.neighbour.asked()),
    }
}

/// The name's first address is allowed and its second one is not: who looks it up once to judge
/// it, and once more to connect, comes to the neighbour.
fn turning(ground: &Ground) -> Result<String> {
    let (before, seen_before) = (ground.neighbour.connections(), ground.names.seen());
    let image = format!("{TURNING}:{}/x:latest", ground.neighbour.port());
    let told = ground.build(&image, &[])?.failed("NETWORK_DENIED", LEADS_TO_LOOPBACK)?;
    untouched(ground, before)?;
    let seen = ground.names.seen();
    match (seen.0 - seen_before.0, seen.1 - seen_before.1) {
        (lookups @ 2.., 1..) => Ok(format!("{told}; looked up {lookups} times")),
        (lookups, lured) => bail!(
            "{told}; but it was looked up {lookups} times and the allowed place was asked {lured} \
             times, which proves nothing"
        ),
    }
}

/// Where a redirect or a token server may not lead, and the rule that says so.
fn places(ground: &Ground) -> Vec<(String, &'static str)> {
    let port = ground.neighbour.port();
    vec![
        (format!("http://{}/x", ground.neighbour.address()), LOOPBACK),
        (format!("https://2130706433:{port}/x"), LOOPBACK),
        (format!("https://[::ffff:7f00:1]:{port}/x"), LOOPBACK),
        ("http://169.254.169.254/latest/meta-data/".to_owned(), LINK_LOCAL),
        ("https://169.254.169.254/latest/meta-data/".to_owned(), LINK_LOCAL),
        ("https://10.0.0.1/x".to_owned(), PRIVATE),
        (format!("https://both.attacker.example:{port}/x"), LEADS_TO_LOOPBACK),
    ]
}

fn spellings(ground: &Ground) -> Result<String> {
    let port = ground.neighbour.port();
    let hosts = [
        "127.0.0.1",
        "127.1",
        "127.0.1",
        "2130706433",
        "0x7f000001",
        "0x7f.0.0.1",
        "0177.0.0.1",
        "017700000001",
        "localhost",
        "LOCALHOST",
        "a.localhost",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "0.0.0.0",
        "0",
        "[::]",
        "169.254.169.254",
        "0xa9fea9fe",
        "2852039166",
        "0251.0376.0251.0376",
        "[fd00:ec2::254]",
        "100.100.100.200",
        "10.0.0.1",
        "10.1",
        "172.16.0.1",
        "192.168.0.1",
        "192.168.257",
        "100.64.0.1",
        "[fd12:3456::1]",
        "[fe80::1]",
        "224.0.0.1",
        "255.255.255.255",
    ];
    // Not even names.
    let others =
        ["127.0.0.1.", "user@127.0.0.1", "127.0.0.1\\@example.com", "①②⑦.0.0.1", "127。0。0。1"];
    let denied = hosts.map(|host| (host, 403, "may not be reached from here: it"));
    let unread = others.map(|host| (host, 400, "is not"));
    for (host, status, words) in denied.into_iter().chain(unread) {
        let order = ground.order(&format!("{host}:{port}/x:latest"), &[]);
        let answer = ground.patiently(|api| api.call("CreateBuild", &order))?;
        if answer.status() != status || !answer.text().contains(words) {
            bail!("{host}: {} {}, not {status}", answer.status(), answer.text());
        }
    }
    Ok(format!("{} refused, {} no name of a registry", hosts.len(), others.len()))
}

fn named(ground: &Ground, host: &str) -> Result<String> {
    let ended = ground.build(&format!("{host}/x:latest"), &[])?;
    ended.failed("NETWORK_DENIED", "its name leads to a")
}

fn redirected(
    ground: &Ground,
    name: &str,
    (url, rule): (&str, &str),
    is_layer: bool,
) -> Result<String> {
    // A layer of its own: none that is known is asked for.
    let noise = name.to_owned();
    let fill = |writer: &mut LayoutWriter| {
        writer.layer(|tar| tar.add("noise", &Node::file(noise.into_bytes())))
    };
    let layout = ground.layout(name, &json!({}), fill)?;
    let image = ground.registry.serve(&layout, name)?;
    let path = match is_layer {
        true => ground.registry.top_layer(&layout, name)?,
        false => format!("/v2/{name}/manifests/latest"),
    };
    ground.registry.put(&path, Answer::redirect(url));
    ground.build(&image, &[])?.failed("NETWORK_DENIED", rule)
}

fn realm(ground: &Ground, name: &str, (url, rule): (&str, &str)) -> Result<String> {
    ground.registry.put(&format!("/v2/{name}/manifests/latest"), Answer::realm(url));
    let image = format!("{}/{name}:latest", ground.registry.address());
    let mut order: Value = ground.order(&image, &[]);
    order["config"]["source"]["dockerImage"]["auth"] = json!({"username": "me", "password": "pw"});
    ground.end(&ground.create(&order)?)?.failed("NETWORK_DENIED", rule)
}
