//! The examples run with the demo model and do what they promise.

use crate::model;
use std::process::Command;

/// Runs an example and returns what it prints. A plain `cargo test` builds the examples next to
/// this test; `--test examples` alone does not build them.
fn run(example: &str) -> String {
    let test = std::env::current_exe().unwrap();
    let built = test.parent().and_then(|deps| deps.parent()).unwrap();
    let program = built.join("examples").join(example);
    let output = Command::new(&program).arg(model::smollm2()).output();
    let output = output.unwrap_or_else(|error| panic!("{}: {error}", program.display()));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{example}: {said}");
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
