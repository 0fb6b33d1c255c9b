//! Loads, stores and atomic operations in all state spaces and widths.

use super::*;

/// Runs a body with one thread. x contains the bytes 0x80, 0x81, …. Returns the output words.
fn words(body: &str, count: usize) -> Vec<u32> {
    let bytes: Vec<u8> = (0x80..=0xff).collect();
    let x: Vec<u32> = bytes
        .chunks(4)
        .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect();
    run_words(body, 1, &x, count).unwrap_or_else(|e| panic!("{e}\n{body}"))
}

#[test]
fn loads_extend_to_the_register() {
    for (load, expected) in [
        ("ld.global.u8 %r1, [%x];", 0x80),
        ("ld.global.s8 %r1, [%x];", 0xffff_ff80),
        ("ld.global.b8 %r1, [%x+1];", 0x81),
        ("ld.global.u16 %r1, [%x];", 0x8180),
        ("ld.global.s16 %r1, [%x+2];", 0xffff_8382),
        ("ld.global.nc.u32 %r1, [%x];", 0x8382_8180),
        ("ld.global.b32 %r1, [%x+4];", 0x8786_8584),
        ("ld.global.f32 %f1, [%x]; mov.b32 %r1, %f1;", 0x8382_8180),
        ("ld.global.u8 %rs1, [%x]; cvt.u32.u16 %r1, %rs1;", 0x80),
        (
            "ld.global.s8 %rs1, [%x]; cvt.s32.s16 %r1, %rs1;",
            0xffff_ff80,
        ),
        (
            "ld.global.s32 %rd1, [%x]; shr.u64 %rd1, %rd1, 32; cvt.u32.u64 %r1, %rd1;",
            0xffff_ffff,
        ),
        (
            "ld.global.u32 %rd1, [%x]; shr.u64 %rd1, %rd1, 32; cvt.u32.u64 %r1, %rd1;",
            0,
        ),
        (
            "ld.global.u64 %rd1, [%x]; shr.u64 %rd1, %rd1, 32; cvt.u32.u64 %r1, %rd1;",
            0x8786_8584,
        ),
        (
            "ld.global.f64 %fd1, [%x]; mov.b64 {%r2, %r1}, %fd1;",
            0x8786_8584,
        ),
        (
            "ld.global.v2.u16 {%rs1, %rs2}, [%x]; mov.b32 %r1, {%rs2, %rs1};",
            0x8180_8382,
        ),
        (
            "ld.global.v2.u8 {%rs1, %rs2}, [%x]; mov.b32 %r1, {%rs1, %rs2};",
            0x0081_0080,
        ),
        (
            "ld.global.v4.u8 {%rs1, %rs2, %rs3, %rs4}, [%x]; mov.b32 %r1, {%rs1, %rs4};",
            0x0083_0080,
        ),
        (
            "ld.global.v2.u64 {%rd1, %rd2}, [%x]; cvt.u32.u64 %r1, %rd2;",
            0x8b8a_8988,
        ),
        (
            "ld.global.L1::no_allocate.L2::128B.v4.f32 {%f1, %f2, %f3, %f4}, [%x]; mov.b32 %r1, %f4;",
            0x8f8e_8d8c,
        ),
        ("ld.volatile.global.u32 %r1, [%x];", 0x8382_8180),
        ("ld.relaxed.gpu.global.u32 %r1, [%x];", 0x8382_8180),
        ("ld.acquire.sys.global.u32 %r1, [%x];", 0x8382_8180),
        ("ld.global.cg.u32 %r1, [%x];", 0x8382_8180),
        ("ld.u32 %r1, [%x];", 0x8382_8180),
        ("ld.param.u16 %rs1, [n+0]; cvt.u32.u16 %r1, %rs1;", 1),
        ("mov.b64 %rd3, n; ld.param.u32 %r1, [%rd3];", 1),
    ] {
        assert_eq!(
            words(&format!("{load} st.global.u32 [%out], %r1;"), 1),
            [expected],
            "{load}"
        );
    }
}

#[test]
fn stores_write_their_width_only() {
    let clear = "st.global.u64 [%out], 0;";
    let values = "mov.u32 %r1, 0x44332211; mov.u64 %rd1, 0x8877665544332211; mov.u16 %rs1, 0x2211; mov.f32 %f1, 0f3F800000;";
    for (store, expected) in [
        ("st.global.u8 [%out+1], %r1;", [0x1100, 0]),
        ("st.global.b8 [%out+1], %rs1;", [0x1100, 0]),
        ("st.global.u16 [%out+2], %rs1;", [0x2211_0000, 0]),
        ("st.global.wt.u32 [%out+4], %r1;", [0, 0x4433_2211]),
        ("st.global.cs.u64 [%out], %rd1;", [0x4433_2211, 0x8877_6655]),
        ("st.global.u32 [%out], %rd1;", [0x4433_2211, 0]),
        ("st.global.v2.u32 [%out], {%r1, 7};", [0x4433_2211, 7]),
        (
            "st.global.v4.u16 [%out], {%rs1, 1, 2, %rs1};",
            [0x0001_2211, 0x2211_0002],
        ),
        (
            "st.global.v2.f32 [%out], {%f1, 0f40000000};",
            [0x3f80_0000, 0x4000_0000],
        ),
        ("st.volatile.global.u32 [%out], %r1;", [0x4433_2211, 0]),
        ("st.release.gpu.global.u32 [%out], %r1;", [0x4433_2211, 0]),
        ("st.u32 [%out], %r1;", [0x4433_2211, 0]),
    ] {
        assert_eq!(
            words(&format!("{clear} {values} {store}"), 2),
            expected,
            "{store}"
        );
    }
}

#[test]
fn shared_and_local_memory_by_their_names_and_by_generic_addresses() {
    let body = "
        .shared .align 8 .b8 buffer[64]; .local .align 8 .b8 stack[64];
        mov.u32 %r1, 17; mov.u32 %r2, buffer; st.shared.u32 [%r2+4], %r1; st.shared.u32 [buffer+8], 18;
        mov.u64 %rd1, buffer; cvta.shared.u64 %rd2, %rd1; ld.u32 %r3, [%rd2+4]; ld.u32 %r4, [%rd2+8];
        st.u32 [%rd2+12], 19; cvta.to.shared.u64 %rd3, %rd2; ld.shared.u32 %r5, [%rd3+12];
        mov.u64 %rd4, stack; st.local.u32 [%rd4], 20; cvta.local.u64 %rd5, %rd4; ld.u32 %r6, [%rd5];
        st.u32 [%rd5+4], 21; ld.local.u32 %r7, [stack+4];
        isspacep.shared %p1, %rd2; isspacep.local %p2, %rd5; isspacep.global %p3, %out; isspacep.shared %p4, %out;
        selp.u32 %r8, 1, 0, %p1; selp.u32 %r9, 2, 0, %p2; selp.u32 %r10, 4, 0, %p3; selp.u32 %r11, 8, 0, %p4;
        or.b32 %r8, %r8, %r9; or.b32 %r10, %r10, %r11; or.b32 %r8, %r8, %r10;
        st.global.v4.u32 [%out], {%r3, %r4, %r5, %r6}; st.global.v2.u32 [%out+16], {%r7, %r8};
        mov.u32 %r12, dynamic; st.global.u32 [%out+24], %r12;";
    assert_eq!(words(body, 7), [17, 18, 19, 20, 21, 7, 64]);
}

#[test]
fn a_warp_may_mix_spaces_in_one_generic_access() {
    let body = "
        .shared .align 4 .b8 buffer[128]; .local .align 4 .b8 stack[16];
        mov.u64 %rd1, buffer; cvta.shared.u64 %rd1, %rd1; mov.u64 %rd2, stack; cvta.local.u64 %rd2, %rd2;
        mul.wide.u32 %rd3, %lane, 4; add.s64 %rd1, %rd1, %rd3; add.s64 %rd4, %out, %rd3;
        rem.u32 %r1, %lane, 3; setp.eq.u32 %p1, %r1, 0; setp.eq.u32 %p2, %r1, 1;
        selp.b64 %rd5, %rd1, %rd4, %p1; selp.b64 %rd5, %rd2, %rd5, %p2;
        st.u32 [%rd5], %lane; ld.u32 %r2, [%rd5]; st.global.u32 [%rd4], %r2;";
    assert_eq!(
        run_words(body, 32, &[0], 32).unwrap(),
        (0..32).collect::<Vec<u32>>()
    );
}

#[test]
fn atomics_change_memory_and_give_the_old_value() {
    // Operation, old value, operands, new value.
    for (operation, old, operands, new) in [
        ("add.u32", 5u32, "7", 12u32),
        ("add.s32", 5, "-7", (-2i32) as u32),
        ("add.f32", 0x3f80_0000, "0f40000000", 0x4040_0000),
        ("min.u32", 5, "-1", 5),
        ("min.s32", 5, "-1", u32::MAX),
        ("max.u32", 5, "-1", u32::MAX),
        ("max.s32", 5, "-1", 5),
        ("and.b32", 0b1100, "10", 0b1000),
        ("or.b32", 0b1100, "10", 0b1110),
        ("xor.b32", 0b1100, "10", 0b0110),
        ("inc.u32", 5, "5", 0),
        ("inc.u32", 4, "5", 5),
        ("dec.u32", 0, "5", 5),
        ("dec.u32", 4, "5", 3),
        ("dec.u32", 9, "5", 5),
        ("exch.b32", 5, "7", 7),
        ("cas.b32", 5, "5, 7", 7),
        ("cas.b32", 5, "6, 7", 5),
    ] {
        let global = format!(
            "st.global.u32 [%out+4], {old}; atom.global.{operation} %r1, [%out+4], {operands}; st.global.u32 [%out], %r1;"
        );
        assert_eq!(words(&global, 2), [old, new], "global {operation}");
        let shared = format!(
            "mov.u32 %r0, dynamic; st.shared.u32 [%r0], {old}; atom.shared::cta.relaxed.cta.{operation} %r1, [%r0], {operands};
             ld.shared.u32 %r2, [%r0]; st.global.v2.u32 [%out], {{%r1, %r2}};"
        );
        assert_eq!(words(&shared, 2), [old, new], "shared {operation}");
        if !operation.starts_with("exch") && !operation.starts_with("cas") {
            let reduction = format!(
                "st.global.u32 [%out], {old}; red.relaxed.gpu.global.{operation} [%out], {operands};"
            );
            assert_eq!(words(&reduction, 1), [new], "red {operation}");
        }
    }
    let wide = "mov.u64 %rd1, 0x100000000; st.global.u64 [%out], 5; atom.global.add.u64 %rd2, [%out], %rd1; st.global.u64 [%out+8], %rd2;
                atom.global.max.s64 %rd3, [%out+8], -9; atom.global.cas.b64 %rd3, [%out+8], 5, 6; atom.global.exch.b64 %rd4, [%out], %rd3;";
    assert_eq!(words(wide, 4), [5, 0, 6, 0]);
    let double = "mov.f64 %fd1, 0d3FF0000000000000; st.global.f64 [%out], %fd1; atom.global.add.f64 %fd2, [%out], %fd1;";
    assert_eq!(words(double, 2), [0, 0x4000_0000]);
}

#[test]
fn atomics_of_many_blocks_add_up() {
    let body = "red.global.add.u32 [%x], 1; atom.global.add.f32 %f1, [%x+4], 0f3F800000;";
    let module = Module::parse(&kernel(body)).unwrap();
    let kernel = module.kernel("test").unwrap();
    let mut memory = HostMemory::new();
    let x = memory.alloc("x", &[0u32, 0]);
    let parameters = arguments(
        kernel,
        &[Argument::Pointer(0), Argument::Pointer(x), Argument::U32(0)],
    );
    let launch = Launch {
        grid: [50, 1, 1],
        block: [64, 1, 1],
        dynamic_shared: 0,
        parameters,
    };
    let options = Options {
        threads: 4,
        ..Options::default()
    };
    run(kernel, &launch, &memory.regions(), &options).unwrap();
    assert_eq!(memory.read::<u32>(x, 2), [3200, 3200f32.to_bits()]);
}

#[test]
fn values_are_packed_and_unpacked() {
    for (body, expected) in [
        ("mov.b64 %rd1, {1, 2}; mov.b64 {_, %r1}, %rd1;", 2),
        ("mov.b64 %rd1, {1, 2}; mov.b64 {%r1, _}, %rd1;", 1),
        (
            "mov.u16 %rs1, 0x1234; mov.b32 %r1, {%rs1, 0x5678};",
            0x5678_1234,
        ),
        (
            "mov.b32 {%rs1, %rs2}, 0x56781234; cvt.u32.u16 %r1, %rs2;",
            0x5678,
        ),
        (
            "mov.b64 %rd1, {1, 2, 3, 4}; mov.b64 {%rs1, %rs2, %rs3, %rs4}, %rd1; cvt.u32.u16 %r1, %rs3;",
            3,
        ),
        ("mov.b32 %r1, {1, 2, 3, 4};", 0x0403_0201),
        ("mov.f32 %f1, 0.5; mov.b32 %r1, %f1;", 0x3f00_0000),
        ("mov.b32 %r1, -1;", u32::MAX),
        ("mov.b32 %r1, 0b101;", 5),
        (
            "setp.lt.s32 %p1|%p2, %lane, 1; selp.u32 %r1, 3, 4, %p1; selp.u32 %r2, 10, 20, %p2; add.u32 %r1, %r1, %r2;",
            23,
        ),
        (
            "setp.lt.and.s32 %p1|%p2, %lane, 1, !%p3; selp.u32 %r1, 3, 4, %p1; selp.u32 %r2, 10, 20, %p2; add.u32 %r1, %r1, %r2;",
            23,
        ),
        (
            "mov.u32 %r1, 1; setp.eq.u32 %p1, %r1, 2; @%p1 mov.u32 %r1, 5; @!%p1 add.u32 %r1, %r1, 7;",
            8,
        ),
        (
            "{ .reg .b32 inner; mov.u32 inner, 4; { .reg .b32 inner; mov.u32 inner, 5; } mov.u32 %r1, inner; }",
            4,
        ),
    ] {
        assert_eq!(
            words(&format!("{body} st.global.u32 [%out], %r1;"), 1),
            [expected],
            "{body}"
        );
    }
}
