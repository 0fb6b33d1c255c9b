//! Parses arbitrary answers with each parser of tool calls, reasoning and Harmony, whole and in
//! pieces.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quell::internals::text::fuzz::check_answer;

fuzz_target!(|bytes: &[u8]| check_answer(bytes));
