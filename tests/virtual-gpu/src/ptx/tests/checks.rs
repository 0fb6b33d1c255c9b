//! Every kind of fault: a kernel that causes it and, where possible, a similar kernel that is
//! correct.

use super::*;

/// Returns the fault of a body that runs with `threads` threads and 256 words of input and
/// output.
fn fault_of(body: &str, threads: u32) -> Fault {
    match run_words(body, threads, &[7; 256], 256) {
        Err(fault) => fault,
        Ok(_) => panic!("no fault in\n{body}"),
    }
}

fn passes(body: &str, threads: u32) {
    let x = vec![7; 256];
    let module = Module::parse(&kernel(body)).unwrap_or_else(|e| panic!("{e}"));
    let kernel = module.kernel("test").unwrap();
    let mut memory = HostMemory::new();
    let (x, out) = (
        memory.alloc("x", &x),
        memory.alloc_uninitialised("out", 1024),
    );
    let launch = launch(
        kernel,
        threads,
        &[
            Argument::Pointer(out),
            Argument::Pointer(x),
            Argument::U32(threads),
        ],
    );
    for seed in [None, Some(1), Some(2)] {
        let options = Options {
            shuffle_seed: seed,
            ..Options::default()
        };
        run(kernel, &launch, &memory.regions(), &options).unwrap_or_else(|e| panic!("{e}"));
    }
}

/// Computes each thread's address in shared memory in %r1 (4 bytes per thread), and the next
/// thread's in %r2.
const PLACES: &str = "mov.u32 %r0, dynamic; mad.lo.u32 %r1, %lane, 4, %r0; add.u32 %r2, %r1, 4;";

#[test]
fn global_accesses_out_of_bounds() {
    for (body, size) in [
        ("ld.global.u8 %r1, [%x+1024];", "1 bytes"),
        ("ld.global.v4.u32 {%r1,%r2,%r3,%r4}, [%x+-16];", "16 bytes"),
        ("st.global.u64 [%out+1024], %rd1;", "8 bytes"),
        ("ld.u32 %r1, [%x+2048];", "4 bytes"),
        ("red.global.add.u32 [%out+1024], 1;", "4 bytes"),
        (
            "mov.u32 %r0, dynamic; cp.async.cg.shared.global [%r0], [%x+1024], 16;",
            "16 bytes",
        ),
        (
            "mov.u64 %rd1, 0; ld.global.u32 %r1, [%rd1];",
            "null pointer",
        ),
    ] {
        let fault = fault_of(body, 1);
        assert_eq!(fault.kind, FaultKind::OutOfBounds, "{fault}");
        assert!(fault.to_string().contains(size), "{fault}");
    }
}

#[test]
fn an_access_across_the_end_is_out_of_bounds_and_one_up_to_it_is_not() {
    passes("ld.global.v4.u32 {%r1,%r2,%r3,%r4}, [%x+1008];", 1);
    let body =
        "mul.wide.u32 %rd1, %lane, 4; add.s64 %rd1, %rd1, %x; ld.global.u32 %r1, [%rd1+900];";
    let fault = fault_of(body, 32);
    assert_eq!(fault.thread, Some([31, 0, 0]), "{fault}");
    assert!(
        fault
            .location
            .clone()
            .unwrap_or_default()
            .contains("past the end of `x`"),
        "{fault}"
    );
}

#[test]
fn shared_local_and_parameter_accesses_out_of_bounds() {
    for body in [
        "mov.u32 %r0, dynamic; st.shared.u32 [%r0+4096], 1;",
        "mov.u32 %r0, 0; st.shared.u32 [%r0+-4], 1;",
        "mov.u64 %rd0, dynamic; cvta.shared.u64 %rd0, %rd0; st.u32 [%rd0+4096], 1;",
        ".local .b8 stack[16]; mov.u64 %rd0, stack; st.local.u32 [%rd0+16], 1;",
        "mov.u32 %r0, dynamic; cp.async.cg.shared.global [%r0+4096], [%x], 16;",
        "mov.u32 %r0, dynamic; atom.shared.add.u32 %r1, [%r0+4096], 1;",
    ] {
        let fault = fault_of(body, 1);
        assert_eq!(fault.kind, FaultKind::OutOfBounds, "{fault}");
    }
}

#[test]
fn misaligned_accesses() {
    for body in [
        "ld.global.u32 %r1, [%x+2];",
        "ld.global.v4.u32 {%r1,%r2,%r3,%r4}, [%x+8];",
        "ld.global.v2.u16 {%rs1,%rs2}, [%x+2];",
        "st.global.u16 [%out+1], %rs1;",
        "mov.u32 %r0, dynamic; st.shared.v2.u32 [%r0+4], {%r1,%r2};",
        "mov.u32 %r0, dynamic; cp.async.cg.shared.global [%r0+8], [%x], 16;",
        "mov.u32 %r0, dynamic; cp.async.cg.shared.global [%r0], [%x+8], 16;",
        "mov.u32 %r0, dynamic; cp.async.ca.shared.global [%r0], [%x+2], 4;",
        "red.global.add.u64 [%out+4], 1;",
    ] {
        let fault = fault_of(body, 1);
        assert_eq!(fault.kind, FaultKind::Misaligned, "{body}: {fault}");
    }
    let fault = fault_of(
        "mov.u32 %r0, dynamic; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r0+8];",
        32,
    );
    assert_eq!(fault.kind, FaultKind::Misaligned, "{fault}");
}

#[test]
fn reads_of_memory_that_was_never_written() {
    for body in [
        "ld.global.u32 %r1, [%out];",
        "st.global.u16 [%out], 1; ld.global.u32 %r1, [%out];",
        "red.global.add.u32 [%out], 1;",
        "mov.u32 %r0, dynamic; ld.shared.u32 %r1, [%r0];",
        "mov.u32 %r0, dynamic; st.shared.u32 [%r0], 1; ld.shared.v2.u32 {%r1,%r2}, [%r0];",
        "mov.u32 %r0, dynamic; atom.shared.add.u32 %r1, [%r0], 1;",
        "mov.u32 %r0, dynamic; cp.async.cg.shared.global [%r0], [%out], 16;",
    ] {
        let fault = fault_of(body, 1);
        assert_eq!(fault.kind, FaultKind::UninitialisedRead, "{body}: {fault}");
    }
    passes(
        "st.global.u32 [%out], 1; ld.global.u32 %r1, [%out]; red.global.add.u32 [%out], 1;",
        1,
    );
    let unread = "mov.u32 %r0, dynamic; cp.async.cg.shared.global [%r0], [%out], 16, 0; cp.async.wait_all; ld.shared.u32 %r1, [%r0];";
    passes(unread, 1);
}

#[test]
fn shared_memory_is_new_for_each_block() {
    let body = "mov.u32 %r0, dynamic; mov.u32 %r1, %ctaid.x; setp.ne.u32 %p0, %r1, 0; @!%p0 st.shared.u32 [%r0], 1; ld.shared.u32 %r2, [%r0];";
    let module = Module::parse(&kernel(body)).unwrap();
    let kernel = module.kernel("test").unwrap();
    let parameters = vec![0; kernel.parameter_bytes()];
    let launch = Launch {
        grid: [2, 1, 1],
        block: [1; 3],
        dynamic_shared: 4,
        parameters,
    };
    let fault = run(kernel, &launch, &Regions(&[]), &Options::default()).unwrap_err();
    assert_eq!(
        (fault.kind, fault.block),
        (FaultKind::UninitialisedRead, [1, 0, 0])
    );
    let unchecked = Options {
        check_initialised: false,
        ..Options::default()
    };
    assert!(run(kernel, &launch, &Regions(&[]), &unchecked).is_ok());
}

#[test]
fn a_missing_barrier_between_warps_is_a_race() {
    let exchange = |barrier: &str| {
        format!(
            "{PLACES} st.shared.u32 [%r1], %lane; {barrier} xor.b32 %r3, %lane, 32; mad.lo.u32 %r3, %r3, 4, %r0; ld.shared.u32 %r4, [%r3];"
        )
    };
    passes(&exchange("bar.sync 0;"), 64);
    passes(&exchange("barrier.sync 0;"), 64);
    let written = format!(
        "{PLACES} st.shared.u32 [%r1], 0; bar.sync 0; {}",
        exchange("bar.warp.sync -1;")
    );
    let fault = fault_of(&written, 64);
    assert_eq!(fault.kind, FaultKind::SharedRace);
    assert!(fault.detail.contains("issued at PTX line"), "{fault}");
    // The first warp to arrive reads what has not been written yet.
    assert_eq!(
        fault_of(&exchange("bar.warp.sync -1;"), 64).kind,
        FaultKind::UninitialisedRead
    );
}

#[test]
fn a_missing_barrier_at_the_end_of_a_loop_is_a_race() {
    let body = |barrier: &str| {
        format!(
            "{PLACES} mov.u32 %r5, 0;
             $loop: st.shared.u32 [%r1], %r5; bar.sync 0; xor.b32 %r3, %lane, 32; mad.lo.u32 %r3, %r3, 4, %r0; ld.shared.u32 %r4, [%r3];
             {barrier} add.u32 %r5, %r5, 1; setp.lt.u32 %p0, %r5, 3; @%p0 bra $loop;"
        )
    };
    passes(&body("bar.sync 0;"), 64);
    assert_eq!(fault_of(&body(""), 64).kind, FaultKind::SharedRace);
}

#[test]
fn lanes_of_one_warp_can_race() {
    let exchange = |order: &str| {
        format!(
            "{PLACES} st.shared.u32 [%r1], %lane; {order} xor.b32 %r3, %lane, 1; mad.lo.u32 %r3, %r3, 4, %r0; ld.shared.u32 %r4, [%r3];"
        )
    };
    passes(&exchange("bar.warp.sync -1;"), 32);
    passes(&exchange("shfl.sync.bfly.b32 %r9, %r1, 1, 31, -1;"), 32);
    passes(&exchange("bar.sync 0;"), 32);
    assert_eq!(fault_of(&exchange(""), 32).kind, FaultKind::SharedRace);
    // A lane may read what it wrote itself.
    passes(
        &format!("{PLACES} st.shared.u32 [%r1], %lane; ld.shared.u32 %r4, [%r1];"),
        64,
    );
}

#[test]
fn lanes_that_store_different_values_to_one_address_race() {
    assert_eq!(
        fault_of("mov.u32 %r0, dynamic; st.shared.u32 [%r0], %lane;", 32).kind,
        FaultKind::SharedRace
    );
    passes("mov.u32 %r0, dynamic; st.shared.u32 [%r0], %n;", 64);
}

#[test]
fn atomics_race_with_plain_accesses_only() {
    let body = |order: &str| {
        format!(
            "mov.u32 %r0, dynamic; setp.eq.u32 %p0, %lane, 0; @%p0 st.shared.u32 [%r0], 0; {order} atom.shared.add.u32 %r1, [%r0], 1;
             red.shared.add.u32 [%r0], 1; bar.sync 0; ld.shared.u32 %r2, [%r0];
             mul.wide.u32 %rd0, %lane, 4; add.s64 %rd0, %rd0, %out; st.global.u32 [%rd0], %r2;"
        )
    };
    assert_eq!(
        run_words(&body("bar.sync 0;"), 64, &[0], 64).unwrap(),
        vec![128; 64]
    );
    assert_eq!(fault_of(&body(""), 64).kind, FaultKind::SharedRace);
}

#[test]
fn the_target_of_an_asynchronous_copy_is_unusable_until_the_wait() {
    let body = |wait: &str| {
        format!(
            "mov.u32 %r0, dynamic; mad.lo.u32 %r1, %lane, 16, %r0; mul.wide.u32 %rd0, %lane, 16; add.s64 %rd0, %rd0, %x;
             cp.async.cg.shared.global [%r1], [%rd0], 16; cp.async.commit_group;
             cp.async.cg.shared.global [%r1+1024], [%rd0], 16; cp.async.commit_group;
             {wait} xor.b32 %r2, %lane, 63; mad.lo.u32 %r2, %r2, 16, %r0; ld.shared.u32 %r3, [%r2];"
        )
    };
    passes(&body("cp.async.wait_group 1; bar.sync 0;"), 64);
    passes(&body("cp.async.wait_all; bar.sync 0;"), 64);
    for wrong in [
        "cp.async.wait_group 2; bar.sync 0;",
        "bar.sync 0;",
        "cp.async.wait_group 1;",
        "bar.sync 0; cp.async.wait_group 0;",
    ] {
        let kind = fault_of(&body(wrong), 64).kind;
        assert!(
            matches!(kind, FaultKind::SharedRace | FaultKind::UninitialisedRead),
            "{wrong}: {kind:?}"
        );
    }
    // A group that is not committed is not waited for.
    let open = "mov.u32 %r0, dynamic; cp.async.cg.shared.global [%r0], [%x], 16; cp.async.wait_group 0; ld.shared.u32 %r3, [%r0];";
    let fault = fault_of(open, 1);
    assert_eq!(fault.kind, FaultKind::SharedRace);
    assert!(fault.detail.contains("asynchronous copy"), "{fault}");
    // A copy that overwrites what others may still read.
    let reuse = |barrier: &str| {
        format!(
            "mov.u32 %r0, dynamic; mad.lo.u32 %r1, %lane, 16, %r0; cp.async.cg.shared.global [%r1], [%x], 16; cp.async.wait_all; bar.sync 0;
             xor.b32 %r2, %lane, 32; mad.lo.u32 %r2, %r2, 16, %r0; ld.shared.u32 %r3, [%r2]; {barrier}
             cp.async.cg.shared.global [%r1], [%x], 16; cp.async.wait_all;"
        )
    };
    passes(&reuse("bar.sync 0;"), 64);
    assert_eq!(fault_of(&reuse(""), 64).kind, FaultKind::SharedRace);
}

#[test]
fn matrices_are_read_after_a_barrier_of_the_warp() {
    let body = |order: &str| {
        format!(
            "mov.u32 %r0, dynamic; mad.lo.u32 %r1, %lane, 16, %r0; mov.u32 %r2, 1;
             st.shared.v4.u32 [%r1], {{%r2,%r2,%r2,%r2}}; {order} ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r3,%r4,%r5,%r6}}, [%r1];"
        )
    };
    passes(&body("bar.warp.sync -1;"), 32);
    assert_eq!(fault_of(&body(""), 32).kind, FaultKind::SharedRace);
}

#[test]
fn races_are_detected_only_if_enabled() {
    let body = format!("{PLACES} st.shared.u32 [%r1], %lane; ld.shared.u32 %r4, [%r0];");
    let module = Module::parse(&kernel(&body)).unwrap();
    let kernel = module.kernel("test").unwrap();
    let launch = launch(
        kernel,
        64,
        &[Argument::Pointer(0), Argument::Pointer(0), Argument::U32(0)],
    );
    assert!(run(kernel, &launch, &Regions(&[]), &Options::default()).is_err());
    let options = Options {
        check_races: false,
        ..Options::default()
    };
    assert!(run(kernel, &launch, &Regions(&[]), &options).is_ok());
}

#[test]
fn barriers_that_not_all_threads_reach() {
    let divergent = [
        // Half of a warp, one of two warps, lanes that have exited, warps that have exited, two
        // barriers.
        "setp.lt.u32 %p0, %lane, 16; @%p0 bar.sync 0;",
        "setp.lt.u32 %p0, %lane, 32; @!%p0 bra $end; bar.sync 0; $end:",
        "setp.lt.u32 %p0, %lane, 5; @%p0 ret; bar.sync 0;",
        "setp.lt.u32 %p0, %lane, 32; @%p0 ret; bar.sync 0;",
        "setp.lt.u32 %p0, %lane, 32; @%p0 bra $a; bar.sync 0; bra $end; $a: bar.sync 0; $end:",
        "setp.lt.u32 %p0, %lane, 7; @%p0 bra $a; bar.sync 0; bra $end; $a: bar.sync 0; $end:",
        "setp.lt.u32 %p0, %lane, 32; @%p0 bra $a; bar.sync 0; bra $end; $a: bar.sync 1; $end:",
    ];
    for body in divergent {
        let fault = fault_of(body, 64);
        assert_eq!(fault.kind, FaultKind::DivergentBarrier, "{body}: {fault}");
        assert!(fault.line >= FIRST_LINE, "{fault}");
    }
    passes(
        "setp.lt.u32 %p0, %lane, 16; @%p0 bra $a; bra $b; $a: mov.u32 %r1, 1; $b: bar.sync 0;",
        64,
    );
    passes("bar.sync 0;", 40);
}

#[test]
fn a_barrier_can_be_for_part_of_a_block() {
    // The second warp alone meets at barrier 1. At barrier 2 both warps meet, one without
    // waiting.
    passes(
        "setp.lt.u32 %p0, %lane, 32; @%p0 bra $end; bar.sync 1, 32; $end: bar.sync 0;",
        64,
    );
    passes(
        "setp.lt.u32 %p0, %lane, 32; @%p0 bra $a; bar.sync 2, 64; bra $end; $a: bar.arrive 2, 64; $end:",
        64,
    );
    assert_eq!(
        fault_of("bar.sync 1, 96;", 64).kind,
        FaultKind::DivergentBarrier
    );
    assert_eq!(
        fault_of("bar.sync 16;", 64).kind,
        FaultKind::DivergentBarrier
    );
}

#[test]
fn lanes_missing_from_a_warp_wide_instruction() {
    let zeros = "{%f0,%f1,%f2,%f3}, {%r1,%r2,%r3,%r4}, {%r5,%r6}, {%f0,%f1,%f2,%f3}";
    let wrong = [
        "setp.lt.u32 %p0, %lane, 16; @%p0 shfl.sync.bfly.b32 %r1, %r2, 1, 31, -1;".to_string(),
        "setp.lt.u32 %p0, %lane, 16; @%p0 ret; shfl.sync.bfly.b32 %r1, %r2, 1, 31, -1;".to_string(),
        "shfl.sync.bfly.b32 %r1, %r2, 1, 31, 1;".to_string(),
        "setp.lt.u32 %p0, %lane, 3; @%p0 bra $a; bar.warp.sync -1; bra $b; $a: vote.sync.ballot.b32 %r1, %p0, -1; $b:".to_string(),
        format!("setp.lt.u32 %p0, %lane, 16; @%p0 ret; mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {zeros};"),
        "setp.lt.u32 %p0, %lane, 16; @%p0 redux.sync.add.u32 %r1, %r2, -1;".to_string(),
    ];
    for body in &wrong {
        let fault = fault_of(body, 32);
        assert_eq!(fault.kind, FaultKind::DivergentWarp, "{body}: {fault}");
    }
    let small = fault_of(
        "mov.u32 %r0, dynamic; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r0];",
        16,
    );
    assert_eq!(small.kind, FaultKind::DivergentWarp);
    passes(
        "setp.lt.u32 %p0, %lane, 16; @%p0 shfl.sync.bfly.b32 %r1, %r2, 1, 31, 0xffff;",
        32,
    );
}

#[test]
fn launches_that_do_not_fit() {
    let module = Module::parse(&kernel("").replace(")\n{", ")\n.maxntid 256, 1, 1\n{")).unwrap();
    let kernel = module.kernel("test").unwrap();
    let good = launch(
        kernel,
        256,
        &[Argument::Pointer(0), Argument::Pointer(0), Argument::U32(0)],
    );
    assert!(run(kernel, &good, &Regions(&[]), &Options::default()).is_ok());
    let bad = [
        Launch {
            parameters: vec![0; 16],
            ..good.clone()
        },
        Launch {
            parameters: vec![0; 24],
            ..good.clone()
        },
        Launch {
            block: [257, 1, 1],
            ..good.clone()
        },
        Launch {
            block: [32, 0, 1],
            ..good.clone()
        },
        Launch {
            block: [1, 1, 65],
            ..good.clone()
        },
        Launch {
            grid: [1, 65536, 1],
            ..good.clone()
        },
        Launch {
            grid: [0, 1, 1],
            ..good.clone()
        },
        Launch {
            dynamic_shared: 228 << 10,
            ..good.clone()
        },
    ];
    for launch in bad {
        let fault = run(kernel, &launch, &Regions(&[]), &Options::default()).unwrap_err();
        assert_eq!(fault.kind, FaultKind::BadParameters, "{fault}");
    }
}

#[test]
fn an_infinite_loop_and_a_trap() {
    let module = Module::parse(&kernel("$loop: bra $loop;")).unwrap();
    let kernel_ = module.kernel("test").unwrap();
    let launch = launch(
        kernel_,
        1,
        &[Argument::Pointer(0), Argument::Pointer(0), Argument::U32(0)],
    );
    let fault = run_within(kernel_, &launch, &Regions(&[]), &Options::default(), 1000).unwrap_err();
    assert_eq!((fault.kind, fault.line), (FaultKind::Timeout, FIRST_LINE));
    assert_eq!(
        fault_of("setp.eq.u32 %p0, %lane, 3; @%p0 trap;", 32).kind,
        FaultKind::Trap
    );
}

#[test]
fn unknown_syntax_is_an_error_with_its_line() {
    for (body, line) in [
        ("\nfrob.u32 %r1, %r2;", 1),
        ("add.unheard.u32 %r1, %r2, %r3;", 0),
        ("add.u32 %r1, %r2;", 0),
        ("add.u32 %rd1, %r2, %r3;", 0),
        ("add.u32 %q1, %r2, %r3;", 0),
        ("bra $nowhere;", 0),
        ("call.uni nothing, ();", 0),
        ("ld.global.v4.u64 {%rd0,%rd1,%rd2,%rd3}, [%x];", 0),
        ("st.param.u32 [n], 1;", 0),
        ("cvt.f32.f64 %f1, %fd1;", 0),
        (
            "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r0,%r1,%r2,%r3}, {%r0,%r1,%r2,%r3}, {%r0,%r1}, {%r0,%r1,%r2,%r3};",
            0,
        ),
        ("@%r1 ret;", 0),
    ] {
        let error = Module::parse(&kernel(body))
            .err()
            .unwrap_or_else(|| panic!("{body} is read"));
        assert_eq!(error.line, FIRST_LINE + line, "{body}: {error}");
    }
    assert!(Module::parse(".visible .entry x() {").is_err());
    assert!(Module::parse("int main() {}").is_err());
}
