//! Operations among the lanes of a warp and the threads of a block.

use super::*;

/// Runs a body that leaves its result in %r9. Returns the result of each thread.
fn results(body: &str, threads: u32) -> Vec<u32> {
    let body = format!(
        "{body}\nmul.wide.u32 %rd0, %lane, 4; add.s64 %rd0, %rd0, %out; st.global.u32 [%rd0], %r9;"
    );
    run_words(&body, threads, &[0], threads as usize).unwrap_or_else(|e| panic!("{e}"))
}

/// Runs `shfl` on the value 100 + lane. The result is 1000 larger if the predicate is set.
fn shuffled(instruction: &str) -> Vec<u32> {
    results(
        &format!(
            "add.u32 %r1, %lane, 100; {instruction} selp.u32 %r2, 1000, 0, %p1; add.u32 %r9, %r9, %r2;"
        ),
        32,
    )
}

#[test]
fn shuffles_exchange_values() {
    let expected = |f: &dyn Fn(u32) -> (u32, bool)| -> Vec<u32> {
        (0..32)
            .map(f)
            .map(|(lane, inside)| 100 + lane + if inside { 1000 } else { 0 })
            .collect()
    };
    assert_eq!(
        shuffled("shfl.sync.up.b32 %r9|%p1, %r1, 3, 0, -1;"),
        expected(&|l| if l >= 3 { (l - 3, true) } else { (l, false) })
    );
    assert_eq!(
        shuffled("shfl.sync.down.b32 %r9|%p1, %r1, 3, 31, -1;"),
        expected(&|l| if l + 3 < 32 {
            (l + 3, true)
        } else {
            (l, false)
        })
    );
    assert_eq!(
        shuffled("shfl.sync.bfly.b32 %r9|%p1, %r1, 5, 31, -1;"),
        expected(&|l| (l ^ 5, true))
    );
    assert_eq!(
        shuffled("shfl.sync.idx.b32 %r9|%p1, %r1, 7, 31, -1;"),
        expected(&|_| (7, true))
    );
    // Segments of eight lanes: c = (32 - 8) << 8 | 31, or without the 31 for up.
    assert_eq!(
        shuffled("shfl.sync.down.b32 %r9|%p1, %r1, 2, 0x181f, -1;"),
        expected(&|l| if l % 8 + 2 < 8 {
            (l + 2, true)
        } else {
            (l, false)
        })
    );
    assert_eq!(
        shuffled("shfl.sync.up.b32 %r9|%p1, %r1, 2, 0x1800, -1;"),
        expected(&|l| if l % 8 >= 2 {
            (l - 2, true)
        } else {
            (l, false)
        })
    );
    assert_eq!(
        shuffled("shfl.sync.idx.b32 %r9|%p1, %r1, 3, 0x181f, -1;"),
        expected(&|l| (l / 8 * 8 + 3, true))
    );
    assert_eq!(
        shuffled("shfl.sync.bfly.b32 %r9|%p1, %r1, 8, 0x181f, -1;"),
        expected(&|l| if l ^ 8 < l | 7 {
            (l ^ 8, true)
        } else {
            (l, false)
        })
    );
}

#[test]
fn halves_of_a_warp_shuffle_independently() {
    let out = results(
        "setp.lt.u32 %p0, %lane, 16; selp.b32 %r1, 0xffff, 0xffff0000, %p0;
         @%p0 bra $low; shfl.sync.idx.b32 %r9, %lane, 20, 31, 0xffff0000; bra $end;
         $low: shfl.sync.idx.b32 %r9, %lane, 4, 31, 0xffff; $end:",
        32,
    );
    assert_eq!(out, [[4; 16], [20; 16]].concat());
    let out = results(
        "setp.lt.u32 %p0, %lane, 16; selp.b32 %r1, 0xffff, 0xffff0000, %p0; selp.b32 %r2, 4, 20, %p0; shfl.sync.idx.b32 %r9, %lane, %r2, 31, %r1;",
        32,
    );
    assert_eq!(out, [[4; 16], [20; 16]].concat());
}

#[test]
fn votes() {
    let odd = "and.b32 %r1, %lane, 1; setp.eq.u32 %p1, %r1, 1;";
    assert_eq!(
        results(&format!("{odd} vote.sync.ballot.b32 %r9, %p1, -1;"), 32),
        [0xaaaa_aaaa; 32]
    );
    assert_eq!(
        results(&format!("{odd} vote.sync.ballot.b32 %r9, !%p1, -1;"), 32),
        [0x5555_5555; 32]
    );
    let voted = |mode: &str, predicate: &str| {
        results(
            &format!("{predicate} vote.sync.{mode}.pred %p2, %p1, -1; selp.u32 %r9, 1, 0, %p2;"),
            32,
        )[0]
    };
    let (never, always) = ("setp.ne.u32 %p1, %n, %n;", "setp.eq.u32 %p1, %n, %n;");
    assert_eq!(
        [voted("all", odd), voted("any", odd), voted("uni", odd)],
        [0, 1, 0]
    );
    assert_eq!(
        [
            voted("all", never),
            voted("any", never),
            voted("uni", never)
        ],
        [0, 0, 1]
    );
    assert_eq!(
        [
            voted("all", always),
            voted("any", always),
            voted("uni", always)
        ],
        [1, 1, 1]
    );
}

#[test]
fn masks_of_lanes() {
    let out = results(
        "setp.gt.u32 %p1, %lane, 4; @%p1 bra $high; activemask.b32 %r9; bra $end; $high: activemask.b32 %r9; $end:",
        32,
    );
    assert_eq!((out[0], out[31]), (0x1f, !0x1f));
    for (name, expected) in [
        ("eq", 1 << 5),
        ("lt", 0x1f),
        ("le", 0x3f),
        ("gt", !0x3fu32),
        ("ge", !0x1fu32),
    ] {
        assert_eq!(
            results(&format!("mov.u32 %r9, %lanemask_{name};"), 32)[5],
            expected,
            "{name}"
        );
    }
}

#[test]
fn matches_and_reductions() {
    let out = results(
        "and.b32 %r1, %lane, 3; match.any.sync.b32 %r9, %r1, -1;",
        32,
    );
    assert_eq!((out[0], out[7]), (0x1111_1111, 0x8888_8888));
    let wide = results(
        "and.b32 %r1, %lane, 1; cvt.u64.u32 %rd1, %r1; shl.b64 %rd1, %rd1, 40; match.any.sync.b64 %r9, %rd1, -1;",
        32,
    );
    assert_eq!(wide[1], 0xaaaa_aaaa);
    let all =
        "match.all.sync.b32 %r9|%p1, %r1, -1; selp.u32 %r2, 1, 0, %p1; add.u32 %r9, %r9, %r2;";
    assert_eq!(results(&format!("mov.u32 %r1, 5; {all}"), 32), [0; 32]); // all bits set, plus 1
    assert_eq!(results(&format!("mov.u32 %r1, %lane; {all}"), 32), [0; 32]);
    for (operation, expected) in [
        ("add.u32", 496),
        ("min.u32", 0),
        ("max.u32", 31),
        ("and.b32", 0),
        ("or.b32", 31),
        ("xor.b32", 0),
        ("add.s32", 496),
    ] {
        assert_eq!(
            results(&format!("redux.sync.{operation} %r9, %lane, -1;"), 32),
            [expected; 32],
            "{operation}"
        );
    }
    assert_eq!(
        results(
            "sub.u32 %r1, %lane, 16; redux.sync.min.s32 %r9, %r1, -1;",
            32
        ),
        [(-16i32) as u32; 32]
    );
    assert_eq!(
        results(
            "sub.u32 %r1, %lane, 16; redux.sync.max.s32 %r9, %r1, -1;",
            32
        ),
        [15; 32]
    );
}

#[test]
fn barriers_combine_predicates() {
    let body = |form: &str| format!("setp.lt.u32 %p1, %lane, 40; {form}");
    assert_eq!(
        results(&body("bar.red.popc.u32 %r9, 0, %p1;"), 64),
        [40; 64]
    );
    assert_eq!(
        results(&body("bar.red.popc.u32 %r9, 0, !%p1;"), 64),
        [24; 64]
    );
    assert_eq!(
        results(
            &body("bar.red.and.pred %p2, 0, %p1; selp.u32 %r9, 1, 0, %p2;"),
            64
        ),
        [0; 64]
    );
    assert_eq!(
        results(
            &body("barrier.cta.red.or.pred %p2, 0, %p1; selp.u32 %r9, 1, 0, %p2;"),
            64
        ),
        [1; 64]
    );
    assert_eq!(
        results(
            &body("barrier.sync.aligned 0; bar.cta.sync 1, 64; mov.u32 %r9, 3;"),
            64
        ),
        [3; 64]
    );
}

#[test]
fn special_registers() {
    let text = "
        .visible .entry test(.param .u64 out) {
            .reg .b32 %r<20>; .reg .b64 %rd<6>;
            mov.u32 %r1, %tid.x; mov.u32 %r2, %tid.y; mov.u32 %r3, %tid.z; mov.u32 %r4, %ntid.x; mov.u32 %r5, %ntid.y; mov.u32 %r6, %ntid.z;
            mov.u32 %r7, %ctaid.x; mov.u32 %r8, %ctaid.y; mov.u32 %r9, %ctaid.z; mov.u32 %r10, %nctaid.x; mov.u32 %r11, %nctaid.y; mov.u32 %r12, %nctaid.z;
            mov.u32 %r13, %laneid; mov.u32 %r14, %warpid; mov.u32 %r15, WARP_SZ; mov.u32 %r16, %dynamic_smem_size;
            mad.lo.u32 %r17, %r9, %r11, %r8; mad.lo.u32 %r17, %r17, %r10, %r7;
            mad.lo.u32 %r18, %r3, %r5, %r2; mad.lo.u32 %r18, %r18, %r4, %r1; mad.lo.u32 %r18, %r17, 48, %r18;
            ld.param.u64 %rd1, [out]; mul.wide.u32 %rd2, %r18, 64; add.s64 %rd1, %rd1, %rd2;
            st.global.v4.u32 [%rd1], {%r1,%r2,%r3,%r4}; st.global.v4.u32 [%rd1+16], {%r5,%r6,%r7,%r8};
            st.global.v4.u32 [%rd1+32], {%r9,%r10,%r11,%r12}; st.global.v4.u32 [%rd1+48], {%r13,%r14,%r15,%r16};
            mov.u64 %rd3, %clock64; mov.u32 %r1, %clock; ret;
        }";
    let module = Module::parse(text).unwrap();
    let kernel = module.kernel("test").unwrap();
    let mut memory = HostMemory::new();
    let out = memory.alloc_uninitialised("out", 8 * 48 * 64);
    let parameters = arguments(kernel, &[Argument::Pointer(out)]);
    let launch = Launch {
        grid: [2, 2, 2],
        block: [4, 6, 2],
        dynamic_shared: 256,
        parameters,
    };
    let options = Options {
        threads: 3,
        shuffle_seed: Some(9),
        ..Options::default()
    };
    let statistics = run(kernel, &launch, &memory.regions(), &options).unwrap();
    assert_eq!(statistics.blocks, 8);
    let found = memory.read::<u32>(out, 8 * 48 * 16);
    for (index, words) in found.chunks(16).enumerate() {
        let (block, thread) = (index as u32 / 48, index as u32 % 48);
        let expected = [
            thread % 4,
            thread / 4 % 6,
            thread / 24,
            4,
            6,
            2,
            block % 2,
            block / 2 % 2,
            block / 4,
            2,
            2,
            2,
            thread % 32,
            thread / 32,
            32,
            256,
        ];
        assert_eq!(words, expected);
    }
}
