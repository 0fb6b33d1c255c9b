//! The command line of a bench.

/// Returns whether the program was given this flag.
pub fn has(flag: &str) -> bool {
    std::env::args().any(|argument| argument == flag)
}

/// Returns the argument after this flag.
pub fn after(flag: &str) -> Option<String> {
    let mut arguments = std::env::args().skip_while(|argument| argument != flag);
    arguments.nth(1)
}
