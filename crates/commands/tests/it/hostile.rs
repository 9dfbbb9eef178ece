//! Commands and images that mean harm.

use crate::support::{Layer, Run, can_run};

#[test]
fn commands_are_root_of_nothing_but_their_tree() {
    if !can_run() {
        return;
    }
    let script = "id -u; hostname; grep -c . /proc/net/dev; \
                  mount -t tmpfs x /tmp 2>&1 | grep -c -i -e permi -e denied; \
                  unshare -U true 2>&1 | grep -c -i permi; \
                  mknod /dev/disk b 7 0 2>&1 | grep -c -i permi; \
                  echo 1 2>&1 > /proc/sys/kernel/panic || echo read-only; \
                  grep -e CapEff -e NoNewPrivs -e Seccomp: /proc/self/status | tr '\\t' ' '; \
                  ls /proc | grep -c '^[0-9]*$'";
    let ended = Run::busybox(&[script]).end().well();
    let output = ended.output();
    let at = |place: usize| *output.get(place).unwrap_or(&"");
    assert_eq!(at(0), "0");
    assert_eq!(at(1), "build");
    assert_eq!(at(2), "3", "two lines of headings, and loopback: {output:?}");
    assert_eq!(&output[3..6], ["1", "1", "1"], "mount, unshare, mknod: {output:?}");
    assert!(output.contains(&"read-only"), "{output:?}");
    // Nine, in its own user namespace.
    assert!(output.contains(&"CapEff: 00000000800400fb"), "{output:?}");
    assert!(output.contains(&"NoNewPrivs: 1"), "{output:?}");
    assert!(output.contains(&"Seccomp: 2"), "{output:?}");
}

#[test]
fn there_is_no_network() {
    if !can_run() {
        return;
    }
    let script = "nc -w 2 192.0.2.1 80 2>&1; true";
    let ended = Run::busybox(&[script]).end().well();
    assert!(ended.output().iter().any(|line| line.contains("unreachable")), "{:?}", ended.output());
}

#[test]
fn links_of_an_image_do_not_lead_the_unpacker_out() {
    if !can_run() {
        return;
    }
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().to_str().unwrap();
    let lower = Layer::busybox()
        .entry("out", tar::EntryType::Symlink, 0o777, (0, 0), b"", target)
        .file("out/pwned", 0o644, b"x")
        .entry("proc", tar::EntryType::Symlink, 0o777, (0, 0), b"", "/etc");
    let ended = Run::on(vec![lower.bytes()], &["true"]).end();
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
    // A link where the runtime mounts /proc: it may refuse that, and may not follow it outside.
    let error = ended.error.unwrap_or_default();
    assert!(error.is_empty() || error.contains("proc"), "{error}");
}

#[test]
fn a_command_cannot_forge_marks_of_a_layer() {
    if !can_run() {
        return;
    }
    let error = Run::busybox(&["echo > /etc/.wh.passwd"]).end().error.unwrap();
    assert!(error.starts_with("theirs: a command made /etc/.wh.passwd"), "{error}");
    let error = Run::busybox(&["mkdir /etc/x && echo > /etc/x/.wh..wh..opq"]).end().error.unwrap();
    assert!(error.contains(".wh..wh..opq"), "{error}");
}

#[test]
fn a_long_output_does_not_hold_up_or_fill_the_log() {
    if !can_run() {
        return;
    }
    let script = "head -c 30000000 /dev/zero | tr '\\0' 'x' | dd bs=1000 cbs=1000 conv=unblock \
                  2>/dev/null || while :; do echo yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy; done \
                  | head -n 100000";
    let ended =
        Run::busybox(&[script, "printf '\\033[31mred\\033[0m\\n' 2>/dev/null"]).end().well();
    let bytes: usize = ended.output().iter().map(|line| line.len()).sum();
    assert!((1 << 19..2 << 20).contains(&bytes), "{bytes}");
    assert!(ended.output().iter().any(|line| line.contains("not kept")));
}
