//! The examples run with the demo model and do what they promise.

use common::http::{Connection, exchange, get, post};
use common::model;
use common::program::example;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

/// Runs an example and returns what it prints.
fn run(name: &str) -> String {
    let program = example(name);
    let output = Command::new(&program).arg(model::smollm2()).output();
    let output = output.unwrap_or_else(|error| panic!("{}: {error}", program.display()));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{name}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn quickstart_answers_and_cancels() {
    let printed = run("quickstart");
    assert!(printed.contains("The sky"), "{printed}");
    assert!(printed.contains("blocks are free again)"), "{printed}");
}

#[test]
fn batch_completes_every_prompt() {
    let printed = run("batch");
    for animal in ["cat", "dog", "owl", "fox", "bear", "whale", "ant", "horse"] {
        assert!(printed.contains(&format!("{animal}:")), "{printed}");
    }
    assert!(printed.contains(" tokens in "), "{printed}");
}

#[test]
fn disconnect_frees_every_block() {
    let printed = run("disconnect");
    assert!(
        printed.contains("100 of 100 requests cancelled"),
        "{printed}"
    );
    let after = printed
        .lines()
        .find(|line| line.trim_start().starts_with("after:"));
    let after = after.unwrap_or_else(|| panic!("{printed}"));
    assert!(
        after.contains("  0 requests open, blocks:    0 in use"),
        "{printed}"
    );
}

#[test]
fn session_computes_only_what_is_new_in_each_turn() {
    let printed = run("session");
    let cached: Vec<usize> = printed
        .lines()
        .filter_map(|line| line.rsplit_once(" ("))
        .filter_map(|(_, counts)| counts.split(' ').next()?.parse().ok())
        .collect();
    assert!(
        matches!(cached[..], [0, second, third] if 0 < second && second < third),
        "{printed}"
    );
    assert!(printed.contains("freed: "), "{printed}");
}

#[test]
fn structured_prints_an_object_of_the_schema() {
    let printed = run("structured");
    let answer: serde_json::Value = serde_json::from_str(&printed).unwrap();
    let keys: Vec<_> = answer.as_object().unwrap().keys().collect();
    assert_eq!(keys.len(), 3, "{printed}");
    assert!(answer["city"].is_string() && answer["is_capital"].is_boolean());
    assert!(answer["population"].is_u64(), "{printed}");
}

#[test]
fn axum_server_streams_and_cancels_when_its_client_disconnects() {
    let mut server = Command::new(example("axum_server"))
        .arg(model::smollm2())
        .arg("127.0.0.1:0")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut stdout = BufReader::new(server.stdout.take().unwrap());
    stdout.read_line(&mut line).unwrap();
    let address = line.trim().rsplit('/').next().unwrap().parse().unwrap();

    let mut client = Connection::open(address);
    client.send(&post("/answer", "Once upon a time")).unwrap();
    assert_eq!(client.head().unwrap().status, 200);
    let event = String::from_utf8(client.chunk().unwrap()).unwrap();
    assert!(event.starts_with("data: "), "{event}");
    drop(client);
    // The request ends after at most 2,000 tokens, but then it is not cancelled.
    let ended = loop {
        let status = exchange(address, &get("/status")).unwrap().text();
        if status.starts_with("0 open") {
            break status;
        }
    };
    assert_eq!(ended, "0 open, 1 cancelled\n");
    server.kill().unwrap();
    server.wait().unwrap();
}
