//! `quell chat`, in a terminal and with piped input.

#![cfg(unix)]

use common::model;
use rexpect::process::WaitStatus;
use rexpect::session::{PtySession, spawn_command};
use std::io::Write;
use std::process::{Command, Output, Stdio};

/// How long the terminal may take to show the expected text, in milliseconds.
const PATIENCE: u64 = 120_000;

fn chat(arguments: &[&str]) -> Command {
    let mut command = Command::new(common::program::path());
    command
        .args(["chat", "--temperature", "0", "--model"])
        .arg(model::smollm2())
        .args(arguments);
    command
        .env("NO_COLOR", "1")
        .env("TERM", "xterm")
        .env_remove("QUELL_LOG");
    command
}

fn terminal(arguments: &[&str]) -> PtySession {
    let mut session = spawn_command(chat(arguments), Some(PATIENCE)).unwrap();
    // Skip the progress bar of the loading, which contains a '>' too.
    session.exp_string("Ctrl-D leaves.").unwrap();
    session.exp_string("> ").unwrap();
    session
}

/// Runs a chat whose input lines come through a pipe.
fn script(arguments: &[&str], lines: &str) -> Output {
    let mut command = chat(arguments);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(lines.as_bytes())
        .unwrap();
    child.wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Waits for the process and returns its exit code.
fn exit_code(session: PtySession) -> i32 {
    match session.process().wait().unwrap() {
        WaitStatus::Exited(_, code) => code,
        other => panic!("the program did not exit: {other:?}"),
    }
}

#[test]
fn ctrl_c_stops_an_answer_and_frees_all_its_blocks() {
    // Ban the tokens that end an answer, so that no answer ends by itself.
    let endless = ["--logit-bias", "0=-1000", "--logit-bias", "2=-1000"];
    let mut session = terminal(&[&["--max-tokens", "8000"], &endless[..]].concat());
    session.send_line("Tell me a story!").unwrap();
    // Wait for the echo of the line, and then for a part of the answer.
    session.exp_string("a story!").unwrap();
    session.exp_regex("[A-Za-z]{3}").unwrap();
    session.send_control('c').unwrap();
    let (_, stopped) = session
        .exp_regex(r"\(stopped; [0-9]+ blocks? freed\)")
        .unwrap();
    assert!(!stopped.contains("; 0 "), "{stopped}");
    session.exp_string("> ").unwrap();

    session.send_line("/stats").unwrap();
    let (_, blocks) = session
        .exp_regex(r"0 used, [0-9]+ kept for reuse, [0-9]+ free of [0-9]+")
        .unwrap();
    let numbers = blocks.split(' ').filter_map(|word| word.parse().ok());
    let numbers: Vec<usize> = numbers.collect();
    let [used, kept, free, total] = numbers[..] else {
        panic!("{blocks}");
    };
    assert_eq!((used, kept + free), (0, total), "{blocks}");
    session
        .exp_string("1 accepted: 0 stopped, 0 cut at a limit, 1 cancelled, 0 failed")
        .unwrap();
    session.exp_regex(r"last answer +[0-9]+ tokens").unwrap();
    session.exp_string("> ").unwrap();

    session.send_line("/reset").unwrap();
    session.exp_string("conversation reset").unwrap();
    session.exp_string("> ").unwrap();
    session.send_line("And now a poem!").unwrap();
    session.exp_string("a poem!").unwrap();
    session.exp_regex("[A-Za-z]{3}").unwrap();
    session.send_control('c').unwrap();
    session.exp_string("(stopped; ").unwrap();
    session.exp_string("> ").unwrap();
    session.send_control('d').unwrap();
    assert_eq!(exit_code(session), 0);
}

#[test]
fn ctrl_c_at_the_prompt_exits() {
    let mut session = terminal(&[]);
    session.send_control('c').unwrap();
    assert_eq!(exit_code(session), 0);
}

#[test]
fn piped_input_is_answered_line_by_line_without_a_prompt() {
    let output = script(&["--max-tokens", "40"], "What is a whale?\n\n/stats\n");
    assert!(output.status.success(), "{}", text(&output.stderr));
    let shown = text(&output.stdout);
    let (answer, stats) = shown.split_once("blocks  ").unwrap();
    assert!(answer.trim().len() > 10, "{shown}");
    assert!(stats.contains("1 accepted"), "{shown}");
    assert!(!shown.contains("> ") && !shown.contains('\x1b'), "{shown}");
}

#[test]
fn the_conversation_is_remembered_until_reset() {
    // After `/reset`, the same question costs as many prompt tokens as the first time.
    let prompt_tokens = |lines: &str| -> u64 {
        let shown = text(&script(&["--max-tokens", "4"], lines).stdout);
        let line = shown
            .lines()
            .find(|line| line.starts_with("tokens "))
            .unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    let once = prompt_tokens("Hello!\n/stats\n");
    assert_eq!(prompt_tokens("Hello!\n/reset\nHello!\n/stats\n"), 2 * once);
    assert!(prompt_tokens("Hello!\nHello!\n/stats\n") > 2 * once);
}

#[test]
fn the_system_message_is_part_of_the_prompt() {
    let output = script(
        &["--max-tokens", "4", "--system", "Speak like a pirate."],
        "/system\n/system You are brief.\nHello!\n",
    );
    assert!(output.status.success());
    let notes = text(&output.stderr);
    assert!(notes.contains("(system message removed)"), "{notes}");
    assert!(notes.contains("(system message set)"), "{notes}");
    assert!(notes.contains("(cut at 4 tokens)"), "{notes}");
}

#[test]
fn a_too_long_conversation_is_reported_and_the_chat_continues() {
    let long = "word ".repeat(300);
    let lines = format!("{long}\n/reset\nHello!\n/stats\n");
    let output = script(&["--context", "128", "--max-tokens", "4"], &lines);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let notes = text(&output.stderr);
    assert!(notes.contains("must have fewer than 128"), "{notes}");
    assert!(notes.contains("/reset forgets the conversation"), "{notes}");
    assert!(
        text(&output.stdout).contains("1 accepted: 0 stopped, 1 cut"),
        "{notes}"
    );
}

#[test]
fn unknown_commands_are_reported() {
    let output = script(&[], "/nonsense\n/help\n");
    assert!(output.status.success());
    let notes = text(&output.stderr);
    assert!(
        notes.contains("unknown command '/nonsense'; see /help"),
        "{notes}"
    );
    assert!(text(&output.stdout).contains("/system TEXT"));
}

#[test]
fn a_model_without_a_template_is_refused_at_startup() {
    let tiny = common::root().join("tests/fixtures/golden/tiny/llama");
    let mut command = Command::new(common::program::path());
    let output = command
        .arg("chat")
        .arg("--model")
        .arg(tiny)
        .args(["--device", "cpu"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let error = text(&output.stderr);
    assert!(error.contains("no chat template"), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
}
