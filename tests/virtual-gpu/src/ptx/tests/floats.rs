//! Each form of the floating-point opcodes, with operands and the expected result.

use super::opcodes::check;

const ONE: u64 = 0x3f80_0000;
const TWO: u64 = 0x4000_0000;
const THREE: u64 = 0x4040_0000;
const HALF: u64 = 0x3f00_0000;
const MINUS: u64 = 0xbf80_0000;
const INFINITY: u64 = 0x7f80_0000;
/// The canonical NaN, which PTX operations produce.
const NAN: u64 = 0x7fff_ffff;
const TINY: u64 = 1;
const ZERO: u64 = 0;
const MINUS_ZERO: u64 = 0x8000_0000;
const OTHER_NAN: u64 = 0x7fc0_0001;

/// The same as doubles.
const D1: u64 = 0x3ff0_0000_0000_0000;
const D2: u64 = 0x4000_0000_0000_0000;
const D3: u64 = 0x4008_0000_0000_0000;
const DNAN: u64 = 0x7ff8_0000_0000_0000;

#[test]
fn single_precision_arithmetic() {
    check(&[
        ("add.f32", "rrr", &[ONE, TWO], THREE),
        ("add.rn.f32", "rrr", &[ONE, 0x3380_0000], ONE), // 1 + 2^-24: ties round to even
        (
            "add.rn.f32",
            "rrr",
            &[0x3f80_0001, 0x3380_0000],
            0x3f80_0002,
        ),
        ("add.rm.f32", "rrr", &[ONE, 0x3380_0000], ONE),
        ("add.rp.f32", "rrr", &[ONE, 0x3380_0000], 0x3f80_0001),
        ("add.rz.f32", "rrr", &[MINUS, 0xb380_0000], MINUS),
        ("add.f32", "rrr", &[TINY, TINY], 2),
        ("add.ftz.f32", "rrr", &[TINY, TINY], ZERO),
        ("add.sat.f32", "rrr", &[ONE, TWO], ONE),
        ("add.sat.f32", "rrr", &[OTHER_NAN, TWO], ZERO),
        ("add.ftz.sat.f32", "rrr", &[TINY, HALF], HALF),
        ("add.f32", "rrr", &[OTHER_NAN, TWO], NAN),
        ("sub.f32", "rrr", &[THREE, TWO], ONE),
        ("sub.f32", "rrr", &[INFINITY, INFINITY], NAN),
        ("sub.rp.f32", "rrr", &[ONE, 0xb380_0000], 0x3f80_0001),
        ("mul.f32", "rrr", &[HALF, TWO], ONE),
        (
            "mul.rn.f32",
            "rrr",
            &[0x3f80_0001, 0x3f80_0001],
            0x3f80_0002,
        ),
        (
            "mul.rp.f32",
            "rrr",
            &[0x3f80_0001, 0x3f80_0001],
            0x3f80_0003,
        ),
        ("mul.ftz.f32", "rrr", &[0x0080_0000, HALF], ZERO),
        (
            "fma.rn.f32",
            "rrrr",
            &[0x3f80_0001, 0x3f80_0001, 0xbf80_0002],
            0x2880_0000,
        ), // exactly 2^-46
        ("fma.rm.f32", "rrrr", &[ONE, ONE, 0x3380_0000], ONE),
        ("fma.rp.f32", "rrrr", &[ONE, ONE, 0x3380_0000], 0x3f80_0001),
        ("fma.rz.f32", "rrrr", &[MINUS, ONE, 0xb380_0000], MINUS),
        ("fma.rn.ftz.f32", "rrrr", &[ONE, TINY, ZERO], ZERO),
        ("fma.rn.sat.f32", "rrrr", &[TWO, TWO, MINUS], ONE),
        ("mad.rn.f32", "rrrr", &[TWO, TWO, MINUS], THREE),
        ("div.rn.f32", "rrr", &[ONE, THREE], 0x3eaa_aaab),
        ("div.full.f32", "rrr", &[ONE, TWO], HALF),
        ("div.approx.f32", "rrr", &[ONE, TWO], HALF),
        ("div.approx.ftz.f32", "rrr", &[TINY, ONE], ZERO),
        ("div.rn.f32", "rrr", &[ONE, ZERO], INFINITY),
        ("rcp.rn.f32", "rr", &[TWO], HALF),
        ("rcp.approx.f32", "rr", &[MINUS_ZERO], 0xff80_0000),
        ("rcp.approx.ftz.f32", "rr", &[TWO], HALF),
        ("sqrt.rn.f32", "rr", &[TWO], 0x3fb5_04f3),
        ("sqrt.approx.f32", "rr", &[0x4080_0000], TWO),
        ("sqrt.approx.ftz.f32", "rr", &[TINY], ZERO),
        ("sqrt.rn.f32", "rr", &[MINUS], NAN),
        ("rsqrt.approx.f32", "rr", &[0x4080_0000], HALF),
        ("rsqrt.approx.ftz.f32", "rr", &[TINY], INFINITY),
        ("ex2.approx.f32", "rr", &[ONE], TWO),
        ("ex2.approx.ftz.f32", "rr", &[0xc302_0000], ZERO), // 2^-130
        ("ex2.approx.f32", "rr", &[0xc302_0000], 1 << 19),
        ("ex2.approx.f32", "rr", &[0xff80_0000], ZERO),
        ("lg2.approx.f32", "rr", &[TWO], ONE),
        ("lg2.approx.ftz.f32", "rr", &[ZERO], 0xff80_0000),
        ("sin.approx.f32", "rr", &[ZERO], ZERO),
        ("cos.approx.f32", "rr", &[ZERO], ONE),
        ("sin.approx.ftz.f32", "rr", &[ONE], 0x3f57_6aa4),
        ("tanh.approx.f32", "rr", &[ONE], 0x3f42_f7d6),
        ("neg.f32", "rr", &[ONE], MINUS),
        ("neg.ftz.f32", "rr", &[TINY], MINUS_ZERO),
        ("abs.f32", "rr", &[MINUS], ONE),
        ("abs.ftz.f32", "rr", &[0x8000_0001], ZERO),
        ("min.f32", "rrr", &[ONE, OTHER_NAN], ONE),
        ("max.f32", "rrr", &[OTHER_NAN, ONE], ONE),
        ("max.f32", "rrr", &[OTHER_NAN, OTHER_NAN], NAN),
        ("min.f32", "rrr", &[ZERO, MINUS_ZERO], MINUS_ZERO),
        ("max.f32", "rrr", &[MINUS_ZERO, ZERO], ZERO),
        ("min.NaN.f32", "rrr", &[ONE, OTHER_NAN], NAN),
        ("max.NaN.f32", "rrr", &[ONE, TWO], TWO),
        ("min.ftz.f32", "rrr", &[ONE, TINY], ZERO),
        ("copysign.f32", "rrr", &[MINUS, TWO], 0xc000_0000),
        ("testp.notanumber.f32", "pr", &[OTHER_NAN], 1),
        ("testp.infinite.f32", "pr", &[INFINITY], 1),
        ("testp.finite.f32", "pr", &[INFINITY], 0),
        ("testp.subnormal.f32", "pr", &[TINY], 1),
        ("testp.normal.f32", "pr", &[TINY], 0),
        ("testp.number.f32", "pr", &[INFINITY], 1),
    ]);
}

#[test]
fn double_precision_arithmetic() {
    check(&[
        ("add.f64", "ddd", &[D1, D2], D3),
        ("add.rn.f64", "ddd", &[D1, DNAN | 5], DNAN),
        ("sub.f64", "ddd", &[D3, D2], D1),
        ("mul.f64", "ddd", &[D1, D2], D2),
        (
            "mul.rn.f64",
            "ddd",
            &[0x3ff0_0000_0000_0001; 2],
            0x3ff0_0000_0000_0002,
        ),
        (
            "fma.rn.f64",
            "dddd",
            &[
                0x3ff0_0000_0000_0001,
                0x3ff0_0000_0000_0001,
                0xbff0_0000_0000_0002,
            ],
            0x3970_0000_0000_0000,
        ),
        ("div.rn.f64", "ddd", &[D1, D3], 0x3fd5_5555_5555_5555),
        ("rcp.rn.f64", "dd", &[D2], 0x3fe0_0000_0000_0000),
        ("rcp.approx.ftz.f64", "dd", &[D2 | 7], 0x3fe0_0000_0000_0000),
        ("sqrt.rn.f64", "dd", &[D2], 0x3ff6_a09e_667f_3bcd),
        (
            "rsqrt.approx.f64",
            "dd",
            &[0x4010_0000_0000_0000],
            0x3fe0_0000_0000_0000,
        ),
        ("neg.f64", "dd", &[D1], D1 | 1 << 63),
        ("abs.f64", "dd", &[D1 | 1 << 63], D1),
        ("min.f64", "ddd", &[D1, DNAN], D1),
        ("max.f64", "ddd", &[D1, D2], D2),
        ("copysign.f64", "ddd", &[1 << 63, D2], D2 | 1 << 63),
        ("setp.lt.f64", "pdd", &[D1, D2], 1),
        ("setp.geu.f64", "pdd", &[D1, DNAN], 1),
    ]);
}

#[test]
fn comparisons_with_nan() {
    check(&[
        ("setp.eq.f32", "prr", &[ZERO, MINUS_ZERO], 1),
        ("setp.eq.f32", "prr", &[NAN, NAN], 0),
        ("setp.ne.f32", "prr", &[NAN, ONE], 0),
        ("setp.ne.f32", "prr", &[TWO, ONE], 1),
        ("setp.lt.f32", "prr", &[MINUS, ONE], 1),
        ("setp.le.f32", "prr", &[ONE, ONE], 1),
        ("setp.gt.f32", "prr", &[ONE, NAN], 0),
        ("setp.ge.f32", "prr", &[ONE, MINUS], 1),
        ("setp.equ.f32", "prr", &[ONE, NAN], 1),
        ("setp.neu.f32", "prr", &[ONE, NAN], 1),
        ("setp.neu.f32", "prr", &[ONE, ONE], 0),
        ("setp.ltu.f32", "prr", &[ONE, NAN], 1),
        ("setp.ltu.f32", "prr", &[ONE, ONE], 0),
        ("setp.leu.f32", "prr", &[TWO, ONE], 0),
        ("setp.gtu.f32", "prr", &[TWO, ONE], 1),
        ("setp.geu.f32", "prr", &[ONE, TWO], 0),
        ("setp.num.f32", "prr", &[ONE, NAN], 0),
        ("setp.nan.f32", "prr", &[ONE, NAN], 1),
        ("setp.eq.ftz.f32", "prr", &[TINY, ZERO], 1),
        ("setp.lt.f16", "pss", &[0xbc00, 0x3c00], 1),
        ("setp.gtu.bf16", "pss", &[0x3f80, 0x7fc0], 1),
        (
            "set.lt.f16x2.f16x2",
            "rrr",
            &[0x3c00_4000, 0x4000_3c00],
            0x3c00_0000,
        ),
        (
            "set.ge.u32.bf16x2",
            "rrr",
            &[0x3f80_4000, 0x4000_3f80],
            0x0000_ffff,
        ),
        (
            "set.eq.bf16x2.bf16x2",
            "rrr",
            &[0x3f80_4000, 0x3f80_3f80],
            0x3f80_0000,
        ),
        (
            "set.neu.u32.f16x2",
            "rrr",
            &[0x7e00_3c00, 0x7e00_3c00],
            0xffff_0000,
        ),
    ]);
}

#[test]
fn sixteen_bit_arithmetic() {
    check(&[
        // f16: 1 is 3c00, 2 is 4000, 3 is 4200; bf16: 1 is 3f80, 2 is 4000, 3 is 4040.
        ("add.f16", "sss", &[0x3c00, 0x4000], 0x4200),
        ("add.rn.f16", "sss", &[0x7bff, 0x7bff], 0x7c00),
        ("add.sat.f16", "sss", &[0x3c00, 0x4000], 0x3c00),
        ("sub.f16", "sss", &[0x4200, 0x4000], 0x3c00),
        ("mul.f16", "sss", &[0x3c01, 0x3c01], 0x3c02),
        ("fma.rn.f16", "ssss", &[0x3c01, 0x3c01, 0xbc02], 0x0010), // exactly 2^-20
        ("fma.rn.sat.f16", "ssss", &[0x4000, 0x4000, 0xbc00], 0x3c00),
        ("fma.rn.relu.f16", "ssss", &[0x4000, 0xc000, 0x3c00], 0),
        ("neg.f16", "ss", &[0x3c00], 0xbc00),
        ("abs.f16", "ss", &[0xbc00], 0x3c00),
        ("min.f16", "sss", &[0x3c00, 0x7e00], 0x3c00),
        ("max.f16", "sss", &[0x3c00, 0x4000], 0x4000),
        ("min.NaN.f16", "sss", &[0x3c00, 0x7e00], 0x7fff),
        ("ex2.approx.f16", "ss", &[0x3c00], 0x4000),
        ("tanh.approx.f16", "ss", &[0], 0),
        ("add.bf16", "sss", &[0x3f80, 0x4000], 0x4040),
        ("sub.bf16", "sss", &[0x4040, 0x4000], 0x3f80),
        ("mul.bf16", "sss", &[0x3f81, 0x3f81], 0x3f82),
        ("fma.rn.bf16", "ssss", &[0x3f81, 0x3f81, 0xbf82], 0x3880), // exactly 2^-14
        ("neg.bf16", "ss", &[0x3f80], 0xbf80),
        ("abs.bf16", "ss", &[0xbf80], 0x3f80),
        ("max.bf16", "sss", &[0x7fc0, 0x3f80], 0x3f80),
        ("add.f16x2", "rrr", &[0x3c00_4000, 0x4000_4000], 0x4200_4400),
        ("sub.f16x2", "rrr", &[0x4200_4400, 0x4000_4000], 0x3c00_4000),
        ("sub.f16x2", "rrr", &[0x6407_6403, 0x6400_6400], 0x4700_4200), // 1024 + n, as used for unpacking codes
        ("mul.f16x2", "rrr", &[0x3c00_4000, 0x4000_4000], 0x4000_4400),
        (
            "fma.rn.f16x2",
            "rrrr",
            &[0x3c00_4000, 0x4000_4000, 0xbc00_3c00],
            0x3c00_4500,
        ),
        (
            "fma.rn.relu.f16x2",
            "rrrr",
            &[0x3c00_4000, 0xc000_4000, 0x3c00_3c00],
            0x0000_4500,
        ),
        ("neg.f16x2", "rr", &[0x3c00_bc00], 0xbc00_3c00),
        ("abs.f16x2", "rr", &[0x3c00_bc00], 0x3c00_3c00),
        ("min.f16x2", "rrr", &[0x3c00_4000, 0x4000_3c00], 0x3c00_3c00),
        ("max.f16x2", "rrr", &[0x3c00_4000, 0x4000_3c00], 0x4000_4000),
        ("ex2.approx.f16x2", "rr", &[0x3c00_0000], 0x4000_3c00),
        ("tanh.approx.f16x2", "rr", &[0], 0),
        (
            "fma.rn.bf16x2",
            "rrrr",
            &[0x3f80_4000, 0x4000_4000, 0xbf80_3f80],
            0x3f80_40a0,
        ),
        (
            "add.bf16x2",
            "rrr",
            &[0x3f80_4000, 0x4000_4000],
            0x4040_4080,
        ),
        (
            "mul.bf16x2",
            "rrr",
            &[0x3f80_4000, 0x4000_4000],
            0x4000_4080,
        ),
        (
            "min.bf16x2",
            "rrr",
            &[0x3f80_4000, 0x4000_3f80],
            0x3f80_3f80,
        ),
        (
            "max.bf16x2",
            "rrr",
            &[0x3f80_4000, 0x4000_3f80],
            0x4000_4000,
        ),
        ("neg.bf16x2", "rr", &[0x3f80_bf80], 0xbf80_3f80),
        ("abs.bf16x2", "rr", &[0x3f80_bf80], 0x3f80_3f80),
        ("ex2.approx.ftz.bf16x2", "rr", &[0x3f80_0000], 0x4000_3f80),
        ("tanh.approx.bf16", "ss", &[0], 0),
    ]);
}

#[test]
fn conversions_to_integers() {
    check(&[
        ("cvt.rni.s32.f32", "rr", &[0x4020_0000], 2), // 2.5
        ("cvt.rni.s32.f32", "rr", &[0x4060_0000], 4), // 3.5
        (
            "cvt.rzi.s32.f32",
            "rr",
            &[0xc020_0000],
            (-2i32) as u32 as u64,
        ),
        (
            "cvt.rmi.s32.f32",
            "rr",
            &[0xc020_0000],
            (-3i32) as u32 as u64,
        ),
        (
            "cvt.rpi.s32.f32",
            "rr",
            &[0xc020_0000],
            (-2i32) as u32 as u64,
        ),
        ("cvt.rpi.ftz.s32.f32", "rr", &[TINY], 0),
        ("cvt.rpi.s32.f32", "rr", &[TINY], 1),
        ("cvt.rzi.s32.f32", "rr", &[0x4f80_0000], 0x7fff_ffff),
        ("cvt.rzi.u32.f32", "rr", &[MINUS], 0),
        ("cvt.rzi.u32.f32", "rr", &[NAN], 0),
        ("cvt.rzi.u64.f32", "dr", &[0x5f00_0000], 1 << 63),
        ("cvt.rzi.s64.f64", "dd", &[D3 | 1 << 63], (-3i64) as u64),
        ("cvt.rzi.u8.f32", "rr", &[0x4400_0000], 255),
        (
            "cvt.rni.s8.f32",
            "rr",
            &[0xc400_0000],
            (-128i32) as u32 as u64,
        ),
        ("cvt.rni.sat.s8.f32", "rr", &[0x4400_0000], 127),
        ("cvt.rni.s32.f64", "rd", &[D3], 3),
        ("cvt.rzi.s32.f16", "rs", &[0xc100], (-2i32) as u32 as u64),
        ("cvt.rni.s16.f16", "ss", &[0x4100], 2),
        ("cvt.rzi.u32.bf16", "rs", &[0x4040], 3),
        ("cvt.rni.f32.f32", "rr", &[0x4020_0000], TWO),
        ("cvt.rzi.f32.f32", "rr", &[0xc020_0000], 0xc000_0000),
        ("cvt.rmi.f32.f32", "rr", &[0xbf00_0000], MINUS),
        ("cvt.rpi.f32.f32", "rr", &[0x3e00_0000], ONE),
        ("cvt.rmi.f64.f64", "dd", &[0x4004_0000_0000_0000], D2),
        ("cvt.rni.f16.f16", "ss", &[0x4100], 0x4000),
    ]);
}

#[test]
fn conversions_to_floats() {
    check(&[
        ("cvt.rn.f32.s32", "rr", &[0xffff_ffff], MINUS),
        ("cvt.rn.f32.u32", "rr", &[0xffff_ffff], 0x4f80_0000),
        ("cvt.rz.f32.u32", "rr", &[0xffff_ffff], 0x4f7f_ffff),
        ("cvt.rn.f32.s16", "rs", &[0xffff], MINUS),
        ("cvt.rn.f32.u16", "rs", &[0xffff], 0x477f_ff00),
        ("cvt.rn.f32.u8", "rr", &[0x1ff], 0x437f_0000),
        ("cvt.rn.f32.s8", "rr", &[0xff], MINUS),
        ("cvt.rn.f32.s64", "rd", &[u64::MAX], MINUS),
        ("cvt.rn.f32.u64", "rd", &[1 << 40], 0x5380_0000),
        ("cvt.rn.f64.s32", "dr", &[3], D3),
        ("cvt.rn.f64.s64", "dd", &[3], D3),
        ("cvt.rn.f64.u64", "dd", &[2], D2),
        ("cvt.rn.f16.s32", "sr", &[2049], 0x6800),
        ("cvt.rn.f16.u16", "ss", &[65535], 0x7c00),
        ("cvt.rn.f16.s8", "ss", &[0xff], 0xbc00),
        ("cvt.rn.bf16.s32", "sr", &[257], 0x4380),
        ("cvt.f32.f16", "rs", &[0x3c00], ONE),
        ("cvt.f32.f16", "rs", &[1], 0x3380_0000),
        ("cvt.f32.bf16", "rs", &[0x4040], THREE),
        ("cvt.f64.f32", "dr", &[THREE], D3),
        ("cvt.f64.f16", "ds", &[0x4200], D3),
        ("cvt.rn.f32.f64", "rd", &[0x3ff0_0000_1000_0000], ONE), // a tie
        (
            "cvt.rn.f32.f64",
            "rd",
            &[0x3ff0_0000_1000_0001],
            0x3f80_0001,
        ),
        ("cvt.rz.f32.f64", "rd", &[0x3ff0_0000_1fff_ffff], ONE),
        ("cvt.rn.f16.f32", "sr", &[0x3f80_1000], 0x3c00), // a tie
        ("cvt.rn.f16.f32", "sr", &[0x3f80_3000], 0x3c02), // a tie
        ("cvt.rz.f16.f32", "sr", &[0x477f_ffff], 0x7bff),
        ("cvt.rn.relu.f16.f32", "sr", &[MINUS], 0),
        ("cvt.rn.sat.f16.f32", "sr", &[THREE], 0x3c00),
        ("cvt.rn.f16.f64", "sd", &[0x3ff0_0200_0000_0001], 0x3c01), // just above a tie: must round only once
        ("cvt.rn.bf16.f32", "sr", &[0x3f80_8000], 0x3f80),
        ("cvt.rn.bf16.f32", "sr", &[0x3f81_8000], 0x3f82),
        ("cvt.rn.bf16.f32", "sr", &[OTHER_NAN], 0x7fff),
        ("cvt.rz.bf16.f32", "sr", &[0x3f80_ffff], 0x3f80),
        ("cvt.rn.bf16x2.f32", "rrr", &[ONE, TWO], 0x3f80_4000),
        ("cvt.rn.relu.bf16x2.f32", "rrr", &[MINUS, TWO], 0x0000_4000),
        ("cvt.rz.bf16x2.f32", "rrr", &[0x3f80_ffff, TWO], 0x3f80_4000),
        ("cvt.rn.f16x2.f32", "rrr", &[ONE, TWO], 0x3c00_4000),
        ("cvt.rz.f16x2.f32", "rrr", &[0x477f_ffff, TWO], 0x7bff_4000),
        ("cvt.sat.f32.f32", "rr", &[THREE], ONE),
        ("cvt.ftz.f32.f32", "rr", &[TINY], ZERO),
        ("cvt.sat.f32.f16", "rs", &[0x4200], ONE),
    ]);
}
