//! Each form of the opcodes that compute each lane separately, with operands and the expected
//! result.

use super::*;

/// Opcode; kinds of the destination and the sources (`r` 32 bits, `s` 16 bits, `d` 64 bits, `p`
/// predicate); sources; result.
pub type Row<'a> = (&'a str, &'a str, &'a [u64], u64);

/// Runs all rows in one kernel with one thread, and compares the results.
pub fn check(rows: &[Row]) {
    let mut body = String::new();
    let mut inputs = Vec::new();
    let register = |kind: char, number: usize| match kind {
        'r' => format!("%r{number}"),
        's' => format!("%rs{number}"),
        'd' => format!("%rd{number}"),
        _ => format!("%p{number}"),
    };
    for (row, (opcode, kinds, sources, _)) in rows.iter().enumerate() {
        let kinds: Vec<char> = kinds.chars().collect();
        assert_eq!(kinds.len(), sources.len() + 1, "{opcode}");
        let mut operands = vec![register(kinds[0], 0)];
        for (at, (&kind, &source)) in kinds[1..].iter().zip(sources.iter()).enumerate() {
            let number = at + 1;
            body += &format!("ld.global.u64 %rd9, [%x+{}];\n", inputs.len() * 8);
            inputs.push(source);
            body += &match kind {
                'r' => format!("cvt.u32.u64 %r{number}, %rd9;\n"),
                's' => format!("cvt.u16.u64 %rs{number}, %rd9;\n"),
                'd' => format!("mov.u64 %rd{number}, %rd9;\n"),
                _ => format!("setp.ne.u64 %p{number}, %rd9, 0;\n"),
            };
            operands.push(register(kind, number));
        }
        body += &format!("{opcode} {};\n", operands.join(", "));
        body += &match kinds[0] {
            'r' => "cvt.u64.u32 %rd0, %r0;\n".to_string(),
            's' => "cvt.u64.u16 %rd0, %rs0;\n".to_string(),
            'd' => String::new(),
            _ => "selp.u64 %rd0, 1, 0, %p0;\n".to_string(),
        };
        body += &format!("st.global.u64 [%out+{}], %rd0;\n", row * 8);
    }
    let module = Module::parse(&kernel(&body)).unwrap_or_else(|e| panic!("{e}"));
    let kernel = module.kernel("test").unwrap();
    let mut memory = HostMemory::new();
    let (x, out) = (
        memory.alloc("x", &inputs),
        memory.alloc_uninitialised("out", rows.len() * 8),
    );
    let launch = launch(
        kernel,
        1,
        &[
            Argument::Pointer(out),
            Argument::Pointer(x),
            Argument::U32(1),
        ],
    );
    run(kernel, &launch, &memory.regions(), &Options::default()).unwrap_or_else(|e| panic!("{e}"));
    let found = memory.read::<u64>(out, rows.len());
    for ((opcode, _, sources, expected), found) in rows.iter().zip(found) {
        assert_eq!(
            found, *expected,
            "{opcode} of {sources:x?}: {found:#x} instead of {expected:#x}"
        );
    }
}

const fn u(value: i64) -> u64 {
    (value as u32) as u64
}

const fn h(value: i64) -> u64 {
    (value as u16) as u64
}

const fn l(value: i64) -> u64 {
    value as u64
}

#[test]
fn integer_sums() {
    check(&[
        ("add.u32", "rrr", &[0xffff_ffff, 2], 1),
        ("add.s32", "rrr", &[u(-5), 3], u(-2)),
        ("add.u16", "sss", &[0xffff, 2], 1),
        ("add.s16", "sss", &[h(-5), 3], h(-2)),
        ("add.u64", "ddd", &[u64::MAX, 3], 2),
        ("add.s64", "ddd", &[l(-5), 3], l(-2)),
        ("add.sat.s32", "rrr", &[0x7fff_ffff, 1], 0x7fff_ffff),
        ("sub.u32", "rrr", &[1, 2], 0xffff_ffff),
        ("sub.s64", "ddd", &[1, 2], l(-1)),
        ("sub.s16", "sss", &[1, 2], 0xffff),
        ("sub.sat.s32", "rrr", &[0x8000_0000, 1], 0x8000_0000),
        ("neg.s32", "rr", &[5], u(-5)),
        ("neg.s64", "dd", &[5], l(-5)),
        ("neg.s16", "ss", &[5], h(-5)),
        ("abs.s32", "rr", &[u(-5)], 5),
        ("abs.s32", "rr", &[0x8000_0000], 0x8000_0000),
        ("abs.s64", "dd", &[l(-5)], 5),
        ("min.u32", "rrr", &[u(-1), 1], 1),
        ("min.s32", "rrr", &[u(-1), 1], u(-1)),
        ("max.u32", "rrr", &[u(-1), 1], u(-1)),
        ("max.s32", "rrr", &[u(-1), 1], 1),
        ("min.s16", "sss", &[h(-1), 1], h(-1)),
        ("max.u16", "sss", &[h(-1), 1], h(-1)),
        ("min.s64", "ddd", &[l(-1), 1], l(-1)),
        ("max.u64", "ddd", &[l(-1), 1], l(-1)),
        ("sad.u32", "rrrr", &[3, 10, 100], 107),
        ("sad.s32", "rrrr", &[u(-3), 10, 100], 113),
    ]);
}

#[test]
fn carries_propagate_to_the_next_word() {
    check(&[
        ("add.cc.u32", "rrr", &[0xffff_ffff, 1], 0),
        ("addc.cc.u32", "rrr", &[0xffff_ffff, 0], 0),
        ("addc.u32", "rrr", &[5, 6], 12),
        ("sub.cc.u32", "rrr", &[0, 1], 0xffff_ffff),
        ("subc.cc.u32", "rrr", &[0, 0], 0xffff_ffff),
        ("subc.u32", "rrr", &[9, 3], 5),
        ("add.cc.u64", "ddd", &[u64::MAX, 1], 0),
        ("addc.u64", "ddd", &[1, 1], 3),
        ("mad.lo.cc.u32", "rrrr", &[0x10000, 0xffff, 0x10000], 0),
        ("madc.hi.u32", "rrrr", &[0x10000, 0x20000, 7], 10),
        ("mad.hi.cc.u32", "rrrr", &[0x10000, 0x20000, 0xffff_ffff], 1),
        ("madc.lo.u32", "rrrr", &[3, 4, 5], 18),
    ]);
}

#[test]
fn integer_products() {
    check(&[
        ("mul.lo.u32", "rrr", &[0x1_0001, 0x1_0001], 0x2_0001),
        ("mul.lo.s32", "rrr", &[u(-3), 5], u(-15)),
        ("mul.lo.u16", "sss", &[300, 300], (300 * 300) & 0xffff),
        ("mul.lo.s64", "ddd", &[l(-3), 5], l(-15)),
        ("mul.hi.u32", "rrr", &[0x8000_0000, 6], 3),
        ("mul.hi.s32", "rrr", &[u(-1), 6], u(-1)),
        ("mul.hi.u64", "ddd", &[1 << 63, 6], 3),
        ("mul.hi.s64", "ddd", &[l(-1), 6], l(-1)),
        ("mul.hi.u16", "sss", &[0x8000, 6], 3),
        ("mul.hi.s16", "sss", &[h(-1), 6], h(-1)),
        ("mul.wide.u32", "drr", &[u(-1), 2], 0x1_ffff_fffe),
        ("mul.wide.s32", "drr", &[u(-1), 2], l(-2)),
        ("mul.wide.u16", "rss", &[h(-1), 2], 0x1_fffe),
        ("mul.wide.s16", "rss", &[h(-1), 2], u(-2)),
        ("mad.lo.u32", "rrrr", &[3, 4, 5], 17),
        ("mad.lo.s32", "rrrr", &[u(-3), 4, 5], u(-7)),
        ("mad.lo.u16", "ssss", &[3, 4, 5], 17),
        ("mad.lo.s64", "dddd", &[l(-3), 4, 5], l(-7)),
        ("mad.hi.u32", "rrrr", &[0x8000_0000, 6, 1], 4),
        ("mad.hi.s32", "rrrr", &[u(-1), 6, 1], 0),
        ("mad.wide.u32", "drrd", &[u(-1), 2, 2], 0x2_0000_0000),
        ("mad.wide.s32", "drrd", &[u(-1), 2, 2], 0),
        ("mad.wide.u16", "rssr", &[h(-1), 2, 2], 0x2_0000),
        ("mad.wide.s16", "rssr", &[h(-1), 2, 3], 1),
        ("mul24.lo.u32", "rrr", &[0xff00_0003, 5], 15),
        ("mul24.lo.s32", "rrr", &[0x00ff_ffff, 5], u(-5)),
        ("mul24.hi.u32", "rrr", &[0x80_0000, 0x80_0000], 0x4000_0000),
        ("mad24.lo.u32", "rrrr", &[0xff00_0003, 5, 1], 16),
        ("dp4a.s32.s32", "rrrr", &[0xff02_0304, 0x0101_0101, 10], 18),
        ("dp4a.u32.u32", "rrrr", &[0xff02_0304, 0x0101_0101, 10], 274),
        ("dp4a.u32.s32", "rrrr", &[0x0000_0002, 0x0000_00ff, 10], 8),
        ("div.u32", "rrr", &[u(-7), 2], 0x7fff_fffc),
        ("div.s32", "rrr", &[u(-7), 2], u(-3)),
        ("div.s64", "ddd", &[l(-7), 2], l(-3)),
        ("div.u64", "ddd", &[7, 2], 3),
        ("div.u16", "sss", &[7, 2], 3),
        ("rem.u32", "rrr", &[7, 4], 3),
        ("rem.s32", "rrr", &[u(-7), 4], u(-3)),
        ("rem.s64", "ddd", &[l(-7), 4], l(-3)),
        ("rem.u64", "ddd", &[7, 4], 3),
        ("div.u32", "rrr", &[7, 0], u(-1)),
        ("rem.u32", "rrr", &[7, 0], 7),
    ]);
}

#[test]
fn bits_and_shifts() {
    check(&[
        ("and.b32", "rrr", &[0b1100, 0b1010], 0b1000),
        ("or.b32", "rrr", &[0b1100, 0b1010], 0b1110),
        ("xor.b32", "rrr", &[0b1100, 0b1010], 0b0110),
        ("not.b32", "rr", &[0xf], 0xffff_fff0),
        ("cnot.b32", "rr", &[0], 1),
        ("cnot.b32", "rr", &[9], 0),
        ("and.b16", "sss", &[0b1100, 0b1010], 0b1000),
        ("or.b16", "sss", &[0b1100, 0b1010], 0b1110),
        ("xor.b16", "sss", &[0b1100, 0b1010], 0b0110),
        ("not.b16", "ss", &[0xf], 0xfff0),
        ("and.b64", "ddd", &[0b1100, 0b1010], 0b1000),
        ("or.b64", "ddd", &[0b1100, 0b1010], 0b1110),
        ("xor.b64", "ddd", &[0b1100, 0b1010], 0b0110),
        ("not.b64", "dd", &[0xf], !0xf),
        ("and.pred", "ppp", &[1, 0], 0),
        ("or.pred", "ppp", &[1, 0], 1),
        ("xor.pred", "ppp", &[1, 1], 0),
        ("not.pred", "pp", &[1], 0),
        ("mov.pred", "pp", &[1], 1),
        ("shl.b32", "rrr", &[1, 31], 1 << 31),
        ("shl.b32", "rrr", &[1, 32], 0),
        ("shl.b16", "ssr", &[1, 15], 1 << 15),
        ("shl.b64", "ddr", &[1, 63], 1 << 63),
        ("shl.b64", "ddr", &[1, 64], 0),
        ("shr.u32", "rrr", &[1 << 31, 31], 1),
        ("shr.u32", "rrr", &[1 << 31, 32], 0),
        ("shr.s32", "rrr", &[1 << 31, 100], u(-1)),
        ("shr.b32", "rrr", &[1 << 31, 30], 2),
        ("shr.s16", "ssr", &[1 << 15, 20], h(-1)),
        ("shr.u16", "ssr", &[1 << 15, 15], 1),
        ("shr.u64", "ddr", &[1 << 63, 63], 1),
        ("shr.s64", "ddr", &[1 << 63, 64], l(-1)),
        ("shf.l.wrap.b32", "rrrr", &[0x8000_0001, 0x1, 33], 3),
        (
            "shf.l.clamp.b32",
            "rrrr",
            &[0x8000_0001, 0x1, 33],
            0x8000_0001,
        ),
        (
            "shf.r.wrap.b32",
            "rrrr",
            &[0x8000_0001, 0x1, 33],
            0xc000_0000,
        ),
        ("shf.r.clamp.b32", "rrrr", &[0x8000_0001, 0x1, 33], 1),
        ("popc.b32", "rr", &[0xf0f0], 8),
        ("popc.b64", "rd", &[u64::MAX], 64),
        ("clz.b32", "rr", &[1], 31),
        ("clz.b32", "rr", &[0], 32),
        ("clz.b64", "rd", &[1], 63),
        ("brev.b32", "rr", &[1], 1 << 31),
        ("brev.b64", "dd", &[1], 1 << 63),
        ("bfind.u32", "rr", &[0x100], 8),
        ("bfind.u32", "rr", &[0], u(-1)),
        ("bfind.s32", "rr", &[u(-2)], 0),
        ("bfind.shiftamt.u32", "rr", &[0x100], 23),
        ("bfind.u64", "rd", &[1 << 40], 40),
        ("bfe.u32", "rrrr", &[0xabcd_ef12, 8, 8], 0xef),
        ("bfe.s32", "rrrr", &[0xabcd_ef12, 8, 8], u(-0x11)),
        ("bfe.u32", "rrrr", &[0xabcd_ef12, 28, 8], 0xa),
        ("bfe.s32", "rrrr", &[0xabcd_ef12, 28, 8], u(-6)),
        ("bfe.u64", "ddrr", &[0xabcd_ef12_0000_0000, 40, 8], 0xef),
        ("bfe.s64", "ddrr", &[1 << 63, 63, 1], l(-1)),
        ("bfi.b32", "rrrrr", &[0xff, 0, 4, 4], 0xf0),
        ("bfi.b32", "rrrrr", &[0, 0xffff_ffff, 8, 16], 0xff00_00ff),
        ("bfi.b32", "rrrrr", &[5, 7, 0, 32], 5),
        ("bfi.b64", "dddrr", &[0xff, 0, 60, 4], 0xf << 60),
        ("lop3.b32", "rrrrr", &[0xf0, 0xcc, 0xaa, 0x96], 0x96),
        ("lop3.b32", "rrrrr", &[0xf0, 0xcc, 0xaa, 0xe8], 0xe8),
        (
            "prmt.b32",
            "rrrr",
            &[0x3322_1100, 0x7766_5544, 0x7130],
            0x7711_3300,
        ),
        ("prmt.b32", "rrrr", &[0x0000_0080, 0, 0x1119], 0),
        ("prmt.b32", "rrrr", &[0x0000_8000, 0, 0x0009], 0xff),
        (
            "prmt.b32.f4e",
            "rrrr",
            &[0x3322_1100, 0x7766_5544, 1],
            0x4433_2211,
        ),
        (
            "prmt.b32.b4e",
            "rrrr",
            &[0x3322_1100, 0x7766_5544, 1],
            0x6677_0011,
        ),
        ("prmt.b32.rc8", "rrrr", &[0x3322_1100, 0, 2], 0x2222_2222),
        ("prmt.b32.ecl", "rrrr", &[0x3322_1100, 0, 2], 0x3322_2222),
        ("prmt.b32.ecr", "rrrr", &[0x3322_1100, 0, 2], 0x2222_1100),
        ("prmt.b32.rc16", "rrrr", &[0x3322_1100, 0, 1], 0x3322_3322),
    ]);
}

#[test]
fn selections_and_comparisons_of_integers() {
    check(&[
        ("selp.b32", "rrrp", &[1, 2, 1], 1),
        ("selp.u32", "rrrp", &[1, 2, 0], 2),
        ("selp.b64", "dddp", &[1, 2, 0], 2),
        ("selp.b16", "sssp", &[1, 2, 1], 1),
        ("selp.f32", "rrrp", &[1, 2, 0], 2),
        ("selp.f64", "dddp", &[1, 2, 1], 1),
        ("slct.s32.s32", "rrrr", &[1, 2, u(-1)], 2),
        ("slct.u32.s32", "rrrr", &[1, 2, 0], 1),
        ("slct.f32.f32", "rrrr", &[1, 2, 0xbf80_0000], 2),
        ("setp.eq.s32", "prr", &[1, 1], 1),
        ("setp.ne.s32", "prr", &[1, 1], 0),
        ("setp.lt.s32", "prr", &[u(-1), 1], 1),
        ("setp.lt.u32", "prr", &[u(-1), 1], 0),
        ("setp.lo.u32", "prr", &[1, u(-1)], 1),
        ("setp.le.s32", "prr", &[1, 1], 1),
        ("setp.ls.u32", "prr", &[2, 1], 0),
        ("setp.gt.s32", "prr", &[u(-1), 1], 0),
        ("setp.hi.u32", "prr", &[u(-1), 1], 1),
        ("setp.ge.s32", "prr", &[1, 1], 1),
        ("setp.hs.u32", "prr", &[0, 1], 0),
        ("setp.lt.s16", "pss", &[h(-1), 1], 1),
        ("setp.gt.u16", "pss", &[h(-1), 1], 1),
        ("setp.lt.s64", "pdd", &[l(-1), 1], 1),
        ("setp.gt.u64", "pdd", &[l(-1), 1], 1),
        ("setp.eq.b16", "pss", &[5, 5], 1),
        ("setp.eq.b64", "pdd", &[5, 6], 0),
        ("setp.lt.and.s32", "prrp", &[1, 2, 0], 0),
        ("setp.lt.or.s32", "prrp", &[2, 1, 1], 1),
        ("setp.lt.xor.s32", "prrp", &[1, 2, 1], 0),
        ("set.lt.u32.s32", "rrr", &[u(-1), 1], u(-1)),
        ("set.gt.f32.u32", "rrr", &[u(-1), 1], 0x3f80_0000),
        ("set.eq.s32.s32", "rrr", &[2, 1], 0),
    ]);
}

#[test]
fn conversions_between_integers() {
    check(&[
        ("cvt.u32.u8", "rr", &[0x1ff], 0xff),
        ("cvt.s32.s8", "rr", &[0x1ff], u(-1)),
        ("cvt.u16.u8", "ss", &[0x1ff], 0xff),
        ("cvt.s16.s8", "ss", &[0x1ff], h(-1)),
        ("cvt.u8.u32", "rr", &[0x1ff], 0xff),
        ("cvt.s8.s32", "rr", &[0x1ff], u(-1)),
        ("cvt.u32.u16", "rs", &[0xffff], 0xffff),
        ("cvt.s32.s16", "rs", &[0xffff], u(-1)),
        ("cvt.u16.u32", "sr", &[0x12345], 0x2345),
        ("cvt.u64.u32", "dr", &[u(-1)], 0xffff_ffff),
        ("cvt.s64.s32", "dr", &[u(-1)], l(-1)),
        ("cvt.u32.u64", "rd", &[0x1_2345_6789], 0x2345_6789),
        ("cvt.s64.s16", "ds", &[h(-2)], l(-2)),
        ("cvt.u64.u16", "ds", &[h(-2)], 0xfffe),
        ("cvt.sat.u8.s32", "rr", &[u(-5)], 0),
        ("cvt.sat.u8.u32", "rr", &[300], 255),
        ("cvt.sat.s8.s32", "rr", &[300], 127),
        ("cvt.sat.s8.s32", "rr", &[u(-300)], u(-128)),
        ("cvt.sat.u32.s64", "rd", &[l(-1)], 0),
    ]);
}
