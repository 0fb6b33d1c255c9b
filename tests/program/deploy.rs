//! The files in `deploy/` agree with the program: its flags, its metrics and the time that a
//! drain takes.

#![cfg(unix)]

use std::collections::BTreeSet;
use std::process::Command;

fn read(path: &str) -> String {
    let path = common::root().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Returns the lines of a text, after joining each line that ends with a backslash with the
/// next one.
fn commands(text: &str) -> Vec<String> {
    let joined = text.replace("\\\n", " ");
    joined.lines().map(|line| line.trim().to_owned()).collect()
}

/// Returns the flags in those lines of a file for which `of` returns true.
fn flags(path: &str, of: impl Fn(&str) -> bool) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for line in commands(&read(path)) {
        if !of(&line) {
            continue;
        }
        for word in line.split([' ', '"', '=', ',', '[', ']', '`']) {
            if word.len() > 2 && word.starts_with("--") {
                found.insert(word.to_owned());
            }
        }
    }
    assert!(!found.is_empty(), "{path} names no flag");
    found
}

#[test]
fn every_documented_flag_of_quell_serve_exists() {
    let mut help = Command::new(common::program::path());
    let help = help.args(["serve", "--help"]).output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let known: BTreeSet<&str> = help
        .split_whitespace()
        .filter(|word| word.starts_with("--"))
        .collect();
    let starts = |beginnings: &'static [&str]| {
        move |line: &str| beginnings.iter().any(|start| line.starts_with(start))
    };
    let used = [
        flags("deploy/quell.service", starts(&["ExecStart="])),
        flags("deploy/Containerfile", starts(&["ENTRYPOINT", "CMD"])),
        flags("deploy/kubernetes.yaml", starts(&["- --"])),
        flags("deploy/README.md", starts(&["quell serve", "QUELL_ARGS="])),
    ];
    for flag in used.iter().flatten() {
        assert!(known.contains(flag.as_str()), "{flag} is not in {help}");
    }
}

/// The router's command in the README has only flags that the router's test also uses.
#[test]
fn the_router_command_in_the_readme_is_the_tested_one() {
    let test = read("tests/clients/router.py");
    for flag in flags("deploy/README.md", |line| line.starts_with("vllm-router ")) {
        assert!(test.contains(&format!("\"{flag}\"")), "{flag}");
    }
    let version = "vllm-router==";
    let pins = read("tests/clients/requirements-router.txt");
    let pin = pins.lines().find(|line| line.starts_with(version)).unwrap();
    assert!(read("deploy/README.md").contains(pin), "{pin}");
}

#[test]
fn every_documented_metric_exists() {
    let known = read("src/engine/metrics.rs") + &read("src/cli/lossy.rs");
    let mut seen = 0;
    for word in read("deploy/README.md").split(|c: char| !c.is_ascii_alphanumeric() && c != '_') {
        if !word.starts_with("quell_") {
            continue;
        }
        // A histogram is exposed under its name with these suffixes.
        let name = ["_bucket", "_count", "_sum"]
            .iter()
            .find_map(|part| word.strip_suffix(part))
            .unwrap_or(word);
        assert!(known.contains(&format!("\"{name}\"")), "{word}");
        seen += 1;
    }
    assert!(seen > 0);
}

/// Returns the first number after `name` in the text.
fn number(text: &str, name: &str) -> u32 {
    let (_, rest) = text.split_once(name).unwrap_or_else(|| panic!("no {name}"));
    let rest = rest.trim_start_matches(|c: char| !c.is_ascii_digit());
    let end = rest.find(|c: char| !c.is_ascii_digit());
    rest[..end.unwrap_or(rest.len())].parse().unwrap()
}

/// No stop timeout may expire while the program may still be draining and closing connections.
#[test]
fn stop_timeouts_are_longer_than_a_drain() {
    const CLOSING: u32 = 5;
    let unit = read("deploy/quell.service");
    let drain = number(&unit, "8000 --drain-timeout ") + CLOSING;
    assert!(number(&unit, "TimeoutStopSec=") > drain);
    let pods = read("deploy/kubernetes.yaml");
    let before = number(&pods, "preStop:\n              sleep:\n");
    let drain = before + number(&pods, "- --drain-timeout=") + CLOSING;
    assert!(number(&pods, "terminationGracePeriodSeconds: ") > drain);
    let image = read("deploy/Containerfile");
    let drain = number(&image, "\"--drain-timeout\", \"") + CLOSING;
    assert!(number(&image, "podman stop --time ") > drain);
    assert!(number(&read("deploy/README.md"), "--stop-timeout ") > drain);
}
