//! The commands' network: a loopback device, and the door if there is one.

use crate::support::{Run, can_run};

/// What a command says that asks for its answer through the door, at the address in a variable.
pub(crate) const KNOCK: &str =
    "address=${http_proxy#http://}; nc -w 5 ${address%:*} ${address#*:} < /dev/null";

#[test]
fn commands_reach_the_door_and_nothing_beside_it() {
    if !can_run() {
        return;
    }
    let beside = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = beside.local_addr().unwrap().port();
    let scripts = [
        KNOCK.to_owned(),
        format!("{KNOCK}; echo again"),
        format!("nc -w 2 127.0.0.1 {port} 2>&1 < /dev/null || echo refused"),
        "nc -w 2 192.0.2.1 80 2>&1 < /dev/null || echo no way".to_owned(),
        "grep -c . /proc/net/dev; cat /proc/net/route /proc/net/ipv6_route | grep -c -v lo$"
            .to_owned(),
    ];
    let scripts: Vec<&str> = scripts.iter().map(String::as_str).collect();
    let run = Run::busybox(&scripts);
    std::fs::write(run.directory.path().join("door"), "come in\n").unwrap();
    let ended = run.end().well();
    let output = ended.output();
    assert_eq!(&output[..3], ["come in", "come in", "again"]);
    assert!(output.contains(&"refused"), "the host's loopback is another one: {output:?}");
    assert!(output.contains(&"no way"), "{output:?}");
    assert_eq!(output[output.len() - 2..], ["3", "1"], "loopback alone, no route: {output:?}");
    beside.set_nonblocking(true).unwrap();
    assert!(beside.accept().is_err(), "nobody came");
}

#[test]
fn the_door_is_told_in_the_variables_of_proxies_whatever_the_image_says() {
    if !can_run() {
        return;
    }
    let script = "env | grep -i proxy | sort | sed s/:[0-9]*$/:PORT/";
    let with = |has_door: bool| {
        let mut run = Run::busybox(&[&script.replace(" | sed s/:[0-9]*$/:PORT/", "")]);
        run.base.environment.push("HTTP_PROXY=http://10.0.0.1:3128".into());
        if has_door {
            std::fs::write(run.directory.path().join("door"), "").unwrap();
        }
        let ended = run.end().well();
        ended.output().into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(with(false), ["HTTP_PROXY=http://10.0.0.1:3128"]);
    let told = with(true);
    let names: Vec<&str> = told.iter().filter_map(|line| line.split('=').next()).collect();
    let all = ["HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"];
    assert_eq!(names, all);
    let addresses = told.iter().filter(|line| !line.to_lowercase().starts_with("no_"));
    assert!(addresses.into_iter().all(|line| line.contains("=http://127.0.0.1:")), "{told:?}");
}

#[test]
fn commands_have_no_power_over_the_network_they_share() {
    if !can_run() {
        return;
    }
    let scripts = [
        "echo 1 2>/dev/null > /proc/sys/net/ipv4/ip_forward || echo read-only",
        "nc -l -p 81 2>&1 < /dev/null | grep -c -i -e denied -e permitted",
    ];
    let run = Run::busybox(&scripts);
    std::fs::write(run.directory.path().join("door"), "").unwrap();
    assert_eq!(run.end().well().output(), ["read-only", "1"]);
}
