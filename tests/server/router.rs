//! Scale-out: two replicas of the real server behind vllm-router, a third-party program. The
//! checks are in `tests/clients/router.py`.

#![cfg(unix)]

use common::clients::{installed, script, succeeds};
use common::model;
use std::process::Command;

#[test]
fn replicas_share_the_load_and_a_crash_loses_only_its_own_requests() {
    let root = common::root();
    // Does nothing if the clients are installed.
    succeeds(&mut Command::new(root.join("scripts/setup-clients")));
    let mut check = installed("python");
    check
        .arg(script("router.py"))
        .env("QUELL", common::program::path())
        .env("MODEL", model::smollm2());
    succeeds(&mut check);
}
