//! Third-party client programs, and the scripts that drive them.

use std::path::PathBuf;
use std::process::Command;

/// Path of a file in `tests/clients`.
pub fn script(name: &str) -> PathBuf {
    crate::root().join("tests/clients").join(name)
}

/// A command for a program that `scripts/setup-clients` has installed.
pub fn installed(name: &str) -> Command {
    let path = crate::root().join("target/clients/bin").join(name);
    assert!(
        path.exists(),
        "{} is missing: run scripts/setup-clients",
        path.display()
    );
    Command::new(path)
}

/// Runs a command to its end and prints its output.
///
/// # Panics
/// If the command fails.
pub fn succeeds(command: &mut Command) {
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    println!("{text}{errors}");
    assert!(
        output.status.success(),
        "{command:?} ends with {}",
        output.status
    );
}
