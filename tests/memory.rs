//! Measures how much memory a loaded model takes. Linux only, because the kernel records the
//! peak.
#![cfg(target_os = "linux")]

use common::model;
use common::process;
use quell::{Engine, EngineConfig, LoadOptions, Request};

const KV_CACHE: usize = 64 << 20;

// This must be the only test in this file: another one would share the process and its peak.
#[test]
fn a_loaded_model_takes_less_than_1_6_times_its_file_plus_the_cache() {
    let path = model::smollm2();
    let file = std::fs::metadata(&path).unwrap().len() as usize;
    let config = EngineConfig {
        kv_cache_bytes: Some(KV_CACHE),
        ..EngineConfig::default()
    };
    let engine = Engine::load_with(&path, config, LoadOptions::cpu()).unwrap();
    let request = Request::new("Once upon a time").greedy().max_tokens(100);
    engine
        .generate(request)
        .unwrap()
        .complete_blocking()
        .unwrap();
    // The peak resident set size.
    let peak = process::memory("VmHWM");
    assert!(peak > file, "{peak} bytes cannot hold the weights");
    let limit = file * 16 / 10 + KV_CACHE;
    assert!(peak < limit, "{peak} bytes resident, {limit} allowed");
}
