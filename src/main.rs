//! The `quell` program.

#![deny(missing_docs)]

mod cli;

/// glibc's allocator keeps most of what a burst of large requests has taken. This one gives
/// it back to the system within seconds.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    cli::main()
}
