//! Whole programs: loops, divergence, calls, copies.

use super::*;

#[test]
fn lanes_with_other_trip_counts_come_together_again() {
    // Lane i adds 0 + 1 + … + i, then all add up over the warp.
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
fn asynchronous_copies_arrive_with_the_wait() {
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
fn an_access_past_an_allocation_is_named() {
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
