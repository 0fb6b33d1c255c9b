//! Scale-out: two replicas of the real server behind vllm-router, a third-party program. The
//! checks are in `tests/clients/router.py`.

#![cfg(unix)]

use crate::clients::{installed, script, succeeds};
use crate::model;
use std::path::Path;
use std::process::Command;

#[test]
fn replicas_share_the_load_and_a_crash_loses_only_its_own_requests() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    // Does nothing if the clients are installed.
    succeeds(&mut Command::new(root.join("scripts/setup-clients")));
    let mut check = installed("python");
    check
        .arg(script("router.py"))
        .env("QUELL", env!("CARGO_BIN_EXE_quell"))
        .env("MODEL", model::smollm2());
    succeeds(&mut check);
}
