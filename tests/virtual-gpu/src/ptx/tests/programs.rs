//! Whole programs: loops, divergence, calls, copies.

use super::*;

#[test]
fn lanes_with_different_trip_counts_reconverge() {
    // Lane i computes 0 + 1 + … + i, then the warp adds up all results.
    let out = run_words(
        "mov.u32 %r0, 0; mov.u32 %r1, 0;
         $loop: add.u32 %r1, %r1, %r0; add.u32 %r0, %r0, 1; setp.le.u32 %p0, %r0, %lane; @%p0 bra $loop;
         mov.u32 %r2, %r1;
         shfl.sync.bfly.b32 %r3, %r2, 16, 31, -1; add.u32 %r2, %r2, %r3;
         shfl.sync.bfly.b32 %r3, %r2, 8, 31, -1; add.u32 %r2, %r2, %r3;
         shfl.sync.bfly.b32 %r3|%p1, %r2, 4, 31, -1; add.u32 %r2, %r2, %r3;
         shfl.sync.bfly.b32 %r3, %r2, 2, 31, -1; add.u32 %r2, %r2, %r3;
         shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1; add.u32 %r2, %r2, %r3;
         mul.wide.u32 %rd0, %lane, 4; add.s64 %rd0, %rd0, %out; st.global.u32 [%rd0], %r2;",
        32,
        &[0],
        32,
    );
    let sum = (0..32u32).map(|i| i * (i + 1) / 2).sum::<u32>();
    assert_eq!(out.unwrap(), vec![sum; 32]);
}

#[test]
fn asynchronous_copies_are_complete_after_the_wait() {
    let x: Vec<u32> = (0..256).collect();
    let out = run_words(
        "mov.u32 %r0, dynamic; mad.lo.u32 %r1, %lane, 16, %r0; mul.wide.u32 %rd0, %lane, 16; add.s64 %rd1, %rd0, %x;
         cp.async.cg.shared.global [%r1], [%rd1], 16; cp.async.commit_group;
         cp.async.ca.shared.global.L2::128B [%r1+1024], [%rd1], 16, 4; cp.async.commit_group;
         cp.async.wait_group 1; bar.sync 0;
         xor.b32 %r2, %lane, 63; mad.lo.u32 %r2, %r2, 16, %r0;
         ld.shared.v4.u32 {%r4,%r5,%r6,%r7}, [%r2]; add.s64 %rd2, %rd0, %out; st.global.v4.u32 [%rd2], {%r4,%r5,%r6,%r7};
         cp.async.wait_all; bar.sync 0;
         ld.shared.v4.u32 {%r4,%r5,%r6,%r7}, [%r2+1024]; st.global.v4.u32 [%rd2+1024], {%r4,%r5,%r6,%r7};",
        64,
        &x,
        512,
    )
    .unwrap_or_else(|e| panic!("{e}"));
    for thread in 0..64usize {
        for i in 0..4 {
            assert_eq!(out[thread * 4 + i], ((thread ^ 63) * 4 + i) as u32);
            assert_eq!(
                out[256 + thread * 4 + i],
                if i == 0 {
                    ((thread ^ 63) * 4) as u32
                } else {
                    0
                }
            );
        }
    }
}

#[test]
fn functions_are_called_with_parameters() {
    let text = "
        .version 8.4 .target sm_80 .address_size 64
        .func (.param .b32 func_retval0) twice_plus(.param .b32 a, .param .b32 b) {
            .reg .b32 %r<4>; .reg .pred %p<2>;
            ld.param.u32 %r1, [a]; ld.param.u32 %r2, [b];
            setp.lt.u32 %p1, %r1, 16; @%p1 bra $small;
            st.param.b32 [func_retval0+0], %r2; ret;
            $small: shl.b32 %r3, %r1, 1; add.u32 %r3, %r3, %r2; st.param.b32 [func_retval0+0], %r3; ret;
        }
        .visible .entry test(.param .u64 out, .param .u64 x, .param .u32 n) {
            .reg .b32 %r<8>; .reg .b64 %rd<4>;
            ld.param.u64 %rd1, [out]; mov.u32 %r1, %tid.x;
            { .reg .b32 temp_param_reg; .param .b32 param0; st.param.b32 [param0+0], %r1; .param .b32 param1; st.param.b32 [param1+0], 100;
              .param .b32 retval0; call.uni (retval0), twice_plus, (param0, param1); ld.param.b32 %r2, [retval0+0]; }
            { .param .b32 param0; st.param.b32 [param0+0], 3; .param .b32 param1; st.param.b32 [param1+0], %r2;
              .param .b32 retval0; call.uni (retval0), twice_plus, (param0, param1); ld.param.b32 %r2, [retval0+0]; }
            mul.wide.u32 %rd2, %r1, 4; add.s64 %rd2, %rd2, %rd1; st.global.u32 [%rd2], %r2; ret;
        }";
    let module = Module::parse(text).unwrap();
    let kernel = module.kernel("test").unwrap();
    let mut memory = HostMemory::new();
    let out = memory.alloc_uninitialised("out", 128);
    let launch = launch(
        kernel,
        32,
        &[
            Argument::Pointer(out),
            Argument::Pointer(0),
            Argument::U32(0),
        ],
    );
    run(kernel, &launch, &memory.regions(), &Options::default()).unwrap();
    let expected: Vec<u32> = (0..32)
        .map(|i| if i < 16 { 2 * i + 106 } else { 106 })
        .collect();
    assert_eq!(memory.read::<u32>(out, 32), expected);
}

#[test]
fn an_access_past_an_allocation_is_reported_with_its_distance() {
    let body =
        "mul.wide.u32 %rd0, %lane, 4; add.s64 %rd0, %rd0, %out;\nst.global.u32 [%rd0], %lane;";
    let fault = run_words(body, 32, &[0], 20).unwrap_err();
    assert_eq!(fault.kind, FaultKind::OutOfBounds);
    assert_eq!(
        (fault.line, fault.thread),
        (FIRST_LINE + 1, Some([20, 0, 0]))
    );
    assert!(
        fault
            .to_string()
            .contains("0 bytes past the end of `out`, which has 80"),
        "{fault}"
    );
}

#[test]
fn tables_of_branches_and_of_constants() {
    let text = "
        .version 8.4 .target sm_80, debug .address_size 64
        .file 1 \"some/kernel.cu\"
        .const .align 4 .b8 squares[12] = {0, 0, 0, 0, 1, 0, 0, 0, 4};
        .global .align 8 .u64 pointer = generic(squares);
        .global .u32 counts[3] = {10, 11};
        .visible .entry test(.param .u64 out, .param .u64 x, .param .u32 n) .minnctapersm 2 {
            .reg .b32 %r<8>; .reg .b64 %rd<8>;
            .loc 1 7 3
            mov.u32 %r1, %tid.x; ld.param.u64 %rd1, [out]; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd1, %rd1, %rd2;
            mov.u64 %rd3, squares; add.s64 %rd3, %rd3, %rd2; ld.const.u32 %r2, [%rd3];
            ld.global.u64 %rd4, [pointer]; add.s64 %rd4, %rd4, %rd2; ld.u32 %r3, [%rd4];
            mov.u64 %rd5, counts+4; ld.global.u32 %r4, [%rd5];
            $table: .branchtargets $zero, $one, $two;
            brx.idx %r1, $table;
            $one: add.u32 %r2, %r2, 100; bra.uni $two;
            $zero: add.u32 %r2, %r2, 1000;
            $two: add.u32 %r2, %r2, %r3; add.u32 %r2, %r2, %r4;
            .loc 1 9 1, function_name $info, inlined_at 1 8 2
            st.global.u32 [%rd1], %r2; ret;
        }
        .section .debug_str { $info: .b8 95,0 }";
    let module = Module::parse(text).unwrap();
    let kernel = module.kernel("test").unwrap();
    assert_eq!(module.kernels().count(), 1);
    let mut memory = HostMemory::new();
    let out = memory.alloc_uninitialised("out", 12);
    let mut launch = launch(
        kernel,
        3,
        &[
            Argument::Pointer(out),
            Argument::Pointer(0),
            Argument::U32(0),
        ],
    );
    run(kernel, &launch, &memory.regions(), &Options::default()).unwrap();
    assert_eq!(memory.read::<u32>(out, 3), [1011, 113, 19]);
    launch.block = [4, 1, 1];
    let fault = run(kernel, &launch, &memory.regions(), &Options::default()).unwrap_err();
    assert_eq!(fault.kind, FaultKind::OutOfBounds);
    assert!(
        fault.source.as_deref() == Some("some/kernel.cu:7"),
        "{fault}"
    );
}

#[test]
fn nested_divergence_and_early_exits() {
    // Each lane takes its own path through two nested loops with a break; one lane exits early.
    let body = "
        mul.wide.u32 %rd0, %lane, 4; add.s64 %rd0, %rd0, %out; st.global.u32 [%rd0], 0;
        setp.eq.u32 %p0, %lane, 13; @%p0 ret;
        mov.u32 %r1, 0; mov.u32 %r2, 0;
        $outer: mov.u32 %r3, 0;
        $inner: add.u32 %r1, %r1, 1; add.u32 %r3, %r3, 1;
        add.u32 %r4, %r2, %r3; setp.gt.u32 %p1, %r4, %lane; @%p1 bra $break;
        setp.lt.u32 %p2, %r3, 5; @%p2 bra $inner;
        $break: add.u32 %r2, %r2, 1; setp.lt.u32 %p3, %r2, 4; @%p3 bra $outer;
        activemask.b32 %r5; st.global.u32 [%rd0], %r1;";
    let out = run_words(body, 32, &[0], 32).unwrap();
    let expected = |lane: u32| {
        let (mut count, mut outer) = (0, 0);
        while outer < 4 {
            for inner in 1..=5 {
                count += 1;
                if outer + inner > lane {
                    break;
                }
            }
            outer += 1;
        }
        if lane == 13 { 0 } else { count }
    };
    assert_eq!(out, (0..32).map(expected).collect::<Vec<_>>());
}

#[test]
fn results_do_not_depend_on_threads_or_order() {
    let body = "
        mov.u32 %r0, dynamic; mad.lo.u32 %r1, %lane, 4, %r0; mov.u32 %r2, %ctaid.x; mad.lo.u32 %r3, %r2, 128, %lane;
        st.shared.u32 [%r1], %r3; bar.sync 0; xor.b32 %r4, %lane, 127; mad.lo.u32 %r4, %r4, 4, %r0; ld.shared.u32 %r5, [%r4];
        mul.wide.u32 %rd0, %r3, 4; add.s64 %rd0, %rd0, %out; st.global.u32 [%rd0], %r5;";
    let module = Module::parse(&kernel(body)).unwrap();
    let kernel = module.kernel("test").unwrap();
    let expected: Vec<u32> = (0..128 * 97).map(|i| i ^ 127).collect();
    for (threads, shuffle_seed) in [(1, None), (4, None), (1, Some(3)), (3, Some(4))] {
        let mut memory = HostMemory::new();
        let out = memory.alloc_uninitialised("out", 128 * 97 * 4);
        let parameters = arguments(
            kernel,
            &[
                Argument::Pointer(out),
                Argument::Pointer(0),
                Argument::U32(0),
            ],
        );
        let launch = Launch {
            grid: [97, 1, 1],
            block: [128, 1, 1],
            dynamic_shared: 512,
            parameters,
        };
        let options = Options {
            threads,
            shuffle_seed,
            ..Options::default()
        };
        let statistics = run(kernel, &launch, &memory.regions(), &options).unwrap();
        assert_eq!((statistics.blocks, statistics.barriers), (97, 97));
        assert_eq!(memory.read::<u32>(out, 128 * 97), expected);
    }
}
