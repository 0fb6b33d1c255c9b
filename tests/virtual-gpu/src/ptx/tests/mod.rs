//! Tests of the parser and the interpreter.

mod accesses;
mod checks;
mod counts;
mod floats;
mod matrices;
mod opcodes;
mod programs;
mod warps;

use super::*;

/// Wraps statements in a kernel `test` with the parameters `out` and `x` (pointers, in `%out`
/// and `%x`) and `n` (in `%n`). It declares registers `%r %rs %rd %f %fd %p`, and `%lane`
/// contains the thread's index.
fn kernel(body: &str) -> String {
    format!(
        ".version 8.4\n.target sm_80\n.address_size 64\n.extern .shared .align 16 .b8 dynamic[];\n\
         .visible .entry test(.param .u64 out, .param .u64 x, .param .u32 n)\n{{\n\
         .reg .pred %p<20>; .reg .b16 %rs<40>; .reg .b32 %r<60>; .reg .f32 %f<40>; .reg .b64 %rd<40>; .reg .f64 %fd<20>;\n\
         .reg .b64 %out, %x; .reg .b32 %n, %lane;\n\
         ld.param.u64 %out, [out]; ld.param.u64 %x, [x]; ld.param.u32 %n, [n]; mov.u32 %lane, %tid.x;\n\
         {body}\nret;\n}}\n"
    )
}

/// Line number of the first line of the body in the text of [`kernel`].
const FIRST_LINE: u32 = 10;

/// Returns a launch of one block.
fn launch(kernel: &Kernel, threads: u32, arguments_: &[Argument]) -> Launch {
    Launch {
        grid: [1; 3],
        block: [threads, 1, 1],
        dynamic_shared: 4096,
        parameters: arguments(kernel, arguments_),
    }
}

/// Runs a body with one block of `threads` threads and the input x. Returns `words` words of
/// output.
fn run_words(body: &str, threads: u32, x: &[u32], words: usize) -> Result<Vec<u32>, Fault> {
    let module = Module::parse(&kernel(body)).unwrap_or_else(|e| panic!("{e}"));
    let kernel = module.kernel("test").unwrap();
    let mut memory = HostMemory::new();
    let input = memory.alloc("x", x);
    let out = memory.alloc_uninitialised("out", words * 4);
    let launch = launch(
        kernel,
        threads,
        &[
            Argument::Pointer(out),
            Argument::Pointer(input),
            Argument::U32(threads),
        ],
    );
    run(kernel, &launch, &memory.regions(), &Options::default())?;
    Ok(memory.read(out, words))
}
