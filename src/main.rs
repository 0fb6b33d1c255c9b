//! The `quell` program.

#![deny(missing_docs)]

mod cli;

/// glibc's allocator keeps what a burst of large requests has taken; this one gives it back
/// to the system within a second.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    cli::main()
}
