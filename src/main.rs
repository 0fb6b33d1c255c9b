//! The `quell` program. Everything but its allocator is in the library's `cli`.

#![deny(missing_docs)]

/// The program's allocator. glibc's allocator keeps most of the memory that a burst of large
/// requests used; mimalloc returns it to the system within seconds.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    quell::cli::main()
}
