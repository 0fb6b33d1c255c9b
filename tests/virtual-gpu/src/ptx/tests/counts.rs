//! What launches are counted to do: kernels whose counts are known by hand.

use super::*;
use crate::ptx::count::{Accesses, Class, Counts, Requests};

/// Runs a body with `blocks` blocks and counts it. x has 4,096 words, the output as many.
fn counts_of(body: &str, blocks: u32, threads: u32, options: Options) -> Counts {
    let module = Module::parse(&kernel(body)).unwrap_or_else(|e| panic!("{e}"));
    let kernel = module.kernel("test").unwrap();
    let mut memory = HostMemory::new();
    let input = memory.alloc("x", &[1u32; 4096]);
    let out = memory.alloc("out", &[0u32; 4096]);
    let mut launch = launch(
        kernel,
        threads,
        &[
            Argument::Pointer(out),
            Argument::Pointer(input),
            Argument::U32(threads),
        ],
    );
    launch.grid = [blocks, 1, 1];
    let ran = run(kernel, &launch, &memory.regions(), &options);
    ran.unwrap_or_else(|e| panic!("{e}")).counts.unwrap()
}

/// Counts one warp. It may read shared memory that nobody wrote.
fn counts(body: &str) -> Counts {
    let options = Options {
        check_initialised: false,
        check_races: false,
        count: true,
        ..Options::default()
    };
    counts_of(body, 1, 32, options)
}

fn requests(requests: u64, bytes: u64, sectors: u64) -> Requests {
    Requests {
        requests,
        bytes,
        sectors,
    }
}

fn accesses(requests: u64, wavefronts: u64, least: u64) -> Accesses {
    Accesses {
        requests,
        wavefronts,
        least,
    }
}

/// Instructions of a class.
fn of(counts: &Counts, class: Class) -> u64 {
    counts.classes[class as usize]
}

/// Sets `%rd0` to the address of the lane's element of x, and `%r0` to that in shared memory,
/// for elements that are `stride` bytes apart.
fn at(stride: u32) -> String {
    format!(
        "mul.wide.u32 %rd0, %lane, {stride}; add.s64 %rd0, %rd0, %x; \
         mov.u32 %r0, dynamic; mad.lo.u32 %r0, %lane, {stride}, %r0; "
    )
}

#[test]
fn nothing_is_counted_unless_asked_for() {
    let module = Module::parse(&kernel("")).unwrap();
    let kernel = module.kernel("test").unwrap();
    let mut memory = HostMemory::new();
    let out = memory.alloc("out", &[0u32]);
    let arguments = [
        Argument::Pointer(out),
        Argument::Pointer(out),
        Argument::U32(1),
    ];
    let launch = launch(kernel, 32, &arguments);
    let ran = run(kernel, &launch, &memory.regions(), &Options::default());
    assert_eq!(ran.unwrap().counts, None);
}

#[test]
fn a_coalesced_load_takes_four_sectors_and_a_strided_one_32() {
    for (stride, sectors) in [(4, 4), (8, 8), (32, 32), (128, 32), (0, 1)] {
        let counts = counts(&format!("{} ld.global.u32 %r1, [%rd0];", at(stride)));
        assert_eq!(counts.global.load, requests(1, 128, sectors), "{stride}");
        assert_eq!((counts.read, counts.written), (32 * sectors, 0), "{stride}");
        assert_eq!(of(&counts, Class::Global), 1);
    }
}

#[test]
fn vectors_and_narrow_types_are_counted_by_their_bytes() {
    let load = |stride, load: &str| counts(&format!("{} {load}", at(stride))).global.load;
    let wide = load(16, "ld.global.v4.u32 {%r1,%r2,%r3,%r4}, [%rd0];");
    assert_eq!(wide, requests(1, 512, 16));
    let pair = load(8, "ld.global.v2.f32 {%f1,%f2}, [%rd0];");
    assert_eq!(pair, requests(1, 256, 8));
    assert_eq!(load(8, "ld.global.u64 %rd1, [%rd0];"), requests(1, 256, 8));
    assert_eq!(load(2, "ld.global.u16 %rs1, [%rd0];"), requests(1, 64, 2));
    assert_eq!(load(1, "ld.global.u8 %rs1, [%rd0];"), requests(1, 32, 1));
}

#[test]
fn lanes_that_a_guard_switches_off_access_nothing() {
    let half = "setp.lt.u32 %p0, %lane, 16; ";
    let counted = counts(&format!("{} {half} @%p0 ld.global.u32 %r1, [%rd0];", at(4)));
    assert_eq!(counted.global.load, requests(1, 64, 2));
    let counted = counts(&format!(
        "{} {half} @%p0 ld.shared.u32 %r1, [%r0];",
        at(128)
    ));
    assert_eq!(counted.shared.load, accesses(1, 16, 1));
    // An instruction is issued even for no lane, but requests nothing.
    let none = "setp.gt.u32 %p0, %lane, 99; ";
    let counted = counts(&format!("{} {none} @%p0 ld.global.u32 %r1, [%rd0];", at(4)));
    assert_eq!(counted.global.load, Requests::default());
    assert_eq!(of(&counted, Class::Global), 1);
}

#[test]
fn sectors_of_a_launch_are_counted_once_however_often_they_are_accessed() {
    let options = Options {
        count: true,
        ..Options::default()
    };
    // Two blocks of two warps; each warp stores the same 128 bytes, and adds to one word.
    let body = "and.b32 %r0, %lane, 31; mul.wide.u32 %rd0, %r0, 4; add.s64 %rd0, %rd0, %out;
                st.global.u32 [%rd0], %r0; red.global.add.u32 [%x], 1;";
    let counts = counts_of(body, 2, 64, options);
    assert_eq!(counts.global.store, requests(4, 512, 16));
    assert_eq!(counts.global.atomic, requests(4, 512, 4));
    assert_eq!((counts.read, counts.written), (32, 128 + 32));
}

#[test]
fn counts_do_not_depend_on_the_number_of_host_threads() {
    let body = "mov.u32 %r1, %ctaid.x; mad.lo.u32 %r1, %r1, 64, %lane; mul.wide.u32 %rd0, %r1, 4;
                add.s64 %rd1, %rd0, %x; add.s64 %rd2, %rd0, %out; mov.u32 %r4, 0;
                $loop: ld.global.u32 %r2, [%rd1]; add.u32 %r4, %r4, 1; setp.lt.u32 %p0, %r4, 400; @%p0 bra $loop;
                st.global.u32 [%rd2], %r2;";
    let with = |threads| {
        let options = Options {
            threads,
            count: true,
            ..Options::default()
        };
        counts_of(body, 64, 64, options)
    };
    let counts = with(1);
    assert_eq!(counts.global.load.requests, 64 * 2 * 400);
    assert_eq!((counts.read, counts.written), (16384, 16384));
    assert_eq!(with(4), counts);
}

#[test]
fn shared_accesses_take_as_many_wavefronts_as_their_banks_conflict() {
    let load = |stride, load: &str| counts(&format!("{} {load}", at(stride))).shared.load;
    for (stride, ways) in [
        (4, 1),
        (8, 2),
        (16, 4),
        (32, 8),
        (128, 32),
        (132, 1),
        (0, 1),
    ] {
        let taken = load(stride, "ld.shared.u32 %r1, [%r0];");
        assert_eq!(taken, accesses(1, ways, 1), "stride {stride}");
    }
    assert_eq!(load(8, "ld.shared.u64 %rd1, [%r0];"), accesses(1, 2, 2));
    let quad = "ld.shared.v4.u32 {%r1,%r2,%r3,%r4}, [%r0];";
    assert_eq!(load(16, quad), accesses(1, 4, 4));
    assert_eq!(load(32, quad), accesses(1, 8, 4));
    assert_eq!(load(2, "ld.shared.u16 %rs1, [%r0];"), accesses(1, 1, 1));
    let stored = counts(&format!("{} st.shared.v2.f32 [%r0], {{%f1,%f2}};", at(16)));
    assert_eq!(stored.shared.store, accesses(1, 4, 2));
    assert_eq!(stored.wavefronts(), 4);
}

#[test]
fn generic_addresses_count_where_they_point_to() {
    let body = "setp.lt.u32 %p0, %lane, 8; cvt.u64.u32 %rd1, %r0; cvta.shared.u64 %rd1, %rd1;
                selp.b64 %rd2, %rd0, %rd1, %p0; ld.u32 %r1, [%rd2];";
    let counts = counts(&format!("{} {body}", at(4)));
    assert_eq!(counts.global.load, requests(1, 32, 1));
    assert_eq!(counts.shared.load, accesses(1, 1, 1));
}

#[test]
fn ldmatrix_takes_one_wavefront_per_matrix_without_conflicts() {
    let load = |stride, count: &str, registers: &str| {
        let load = format!("ldmatrix.sync.aligned.m8n8.{count}.shared.b16 {{{registers}}}, [%r0];");
        counts(&format!("{} {load}", at(stride))).shared.matrix
    };
    assert_eq!(load(16, "x4", "%r1,%r2,%r3,%r4"), accesses(1, 4, 4));
    assert_eq!(load(16, "x1", "%r1"), accesses(1, 1, 1));
    // All eight rows of a matrix are in the same banks.
    assert_eq!(load(128, "x4", "%r1,%r2,%r3,%r4"), accesses(1, 32, 4));
    assert_eq!(load(128, "x2", "%r1,%r2"), accesses(1, 16, 2));
}

#[test]
fn asynchronous_copies_count_on_both_sides() {
    let end = "cp.async.commit_group; cp.async.wait_group 0;";
    let body = format!(
        "{} cp.async.cg.shared.global [%r0], [%rd0], 16; {end}",
        at(16)
    );
    let counted = counts(&body);
    assert_eq!(counted.global.copy, requests(1, 512, 16));
    assert_eq!(counted.shared.copy, accesses(1, 4, 4));
    assert_eq!((counted.read, of(&counted, Class::AsyncCopy)), (512, 3));
    // The upper half of the lanes reads nothing and writes zeros.
    let some = "setp.lt.u32 %p0, %lane, 16; selp.u32 %r1, 16, 0, %p0; ";
    let copy = "cp.async.cg.shared.global [%r0], [%rd0], 16, %r1; ";
    let counted = counts(&format!("{} {some} {copy} {end}", at(16)));
    assert_eq!(counted.global.copy, requests(1, 256, 8));
    assert_eq!(counted.shared.copy, accesses(1, 4, 4));
}

#[test]
fn products_of_matrices_are_counted_by_their_operations() {
    let counts = counts(
        "mov.u32 %r1, 0; mov.f32 %f0, 0f00000000;
         mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1,%f2,%f3,%f4}, {%r1,%r1,%r1,%r1}, {%r1,%r1}, {%f0,%f0,%f0,%f0};
         mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%f1,%f2,%f3,%f4}, {%r1,%r1}, {%r1}, {%f0,%f0,%f0,%f0};
         mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1,%f2,%f3,%f4}, {%r1,%r1,%r1,%r1}, {%r1,%r1}, {%f0,%f0,%f0,%f0};",
    );
    // Those of tf32 count twice.
    assert_eq!(counts.multiplications, 2 * 16 * 8 * (16 + 8 + 2 * 8));
    assert_eq!(of(&counts, Class::Multiply), 3);
}

#[test]
fn divergent_branches_and_their_lanes_are_counted() {
    // 8 lanes skip two of the instructions.
    let body = |limit| {
        format!(
            "setp.lt.u32 %p0, %lane, {limit}; @%p0 bra $end;
             add.u32 %r1, %r1, 1; add.u32 %r1, %r1, 1; $end: add.u32 %r1, %r1, 1;"
        )
    };
    let counted = counts(&body(8));
    assert_eq!((counted.branches, counted.divergent), (1, 1));
    assert_eq!(of(&counted, Class::Integer), 3);
    let uniform = counts(&body(0));
    assert_eq!((uniform.branches, uniform.divergent), (1, 0));
    // The branch counts the lanes that take it.
    assert_eq!(counted.lanes, uniform.lanes - 2 * 8 + 8);
    assert_eq!(counts(&body(32)).divergent, 0);
}

#[test]
fn atomic_operations_serialise_on_one_word_of_shared_memory() {
    let add = "red.shared.add.u32 [%r0], 1;";
    let options = Options {
        check_initialised: false,
        count: true,
        ..Options::default()
    };
    for (stride, wavefronts) in [(4, 1), (0, 32), (128, 32)] {
        let counts = counts_of(&format!("{} {add}", at(stride)), 1, 32, options.clone());
        assert_eq!(counts.shared.atomic, accesses(1, wavefronts, 1), "{stride}");
        assert_eq!(of(&counts, Class::Atomic), 1);
    }
}

#[test]
fn an_instruction_that_waits_for_other_lanes_is_counted_once() {
    // Half of the lanes reaches the exchange first, and waits for those that jump back to it.
    let counts = counts(
        "setp.lt.u32 %p0, %lane, 16; @%p0 bra $late;
         $exchange: shfl.sync.idx.b32 %r2, %lane, 0, 31, -1; bra $end;
         $late: add.u32 %r1, %r1, 1; bra $exchange;
         $end: bar.sync 0;",
    );
    assert_eq!(
        (of(&counts, Class::Warp), of(&counts, Class::Barrier)),
        (1, 1)
    );
    assert_eq!((counts.branches, counts.divergent), (3, 1));
}

#[test]
fn each_ptx_instruction_is_counted_once_however_many_steps_it_takes() {
    // The comparison and the unpacking each take several steps of the interpreter.
    let counted = counts("setp.lt.and.u32 %p0|%p1, %lane, 16, %p2; mov.b32 {%rs1,%rs2}, %lane;");
    assert_eq!(of(&counted, Class::Compare), 1);
    // Besides that, the wrapper reads the thread's index, three parameters, and returns.
    assert_eq!(
        (of(&counted, Class::Move), of(&counted, Class::Parameter)),
        (2, 3)
    );
    assert_eq!((counted.instructions(), counted.machine), (7, 4));
    assert_eq!(counted.lanes, 7 * 32);
}
