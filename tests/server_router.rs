//! Scale-out: two replicas of the real server behind vllm-router, which others have
//! written. `tests/clients/router.py` is the test; what it checks stands there.

#![cfg(all(unix, feature = "cli", feature = "server"))]

#[path = "common/model.rs"]
mod model;

use std::path::Path;
use std::process::Command;

fn succeeds(command: &mut Command) {
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

#[test]
fn replicas_behind_a_router_share_the_load_and_lose_only_their_own_requests() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    // Does nothing where the clients are installed.
    succeeds(&mut Command::new(root.join("scripts/setup-clients")));
    let mut check = Command::new(root.join("target/clients/bin/python"));
    check
        .arg(root.join("tests/clients/router.py"))
        .env("QUELL", env!("CARGO_BIN_EXE_quell"))
        .env("MODEL", model::smollm2());
    succeeds(&mut check);
}
