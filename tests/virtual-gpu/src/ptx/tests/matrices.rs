//! Tests `mma` and `ldmatrix` against the formulas of the PTX manual, element by element.

use super::*;

/// Converts a small integer to bf16.
fn brain(value: i32) -> u16 {
    ((value as f32).to_bits() >> 16) as u16
}

/// Returns an element of an asymmetric pattern that bf16 and f16 represent exactly.
fn element(row: usize, column: usize, salt: usize) -> i32 {
    ((row * 7 + column * 13 + salt * 5 + row * column) % 19) as i32 - 9
}

fn half(value: i32) -> u16 {
    // Integers below 2048 are exact, so normalising suffices.
    if value == 0 {
        return 0;
    }
    let (sign, magnitude) = (if value < 0 { 0x8000 } else { 0 }, value.unsigned_abs());
    let exponent = 31 - magnitude.leading_zeros();
    let mantissa = (magnitude << (10 - exponent)) & 0x3ff;
    sign | ((exponent + 15) << 10 | mantissa) as u16
}

/// Runs one `mma` with fragments built from the manual's formulas for each element `i` of a
/// lane's fragment, and checks every element of the result.
fn check_product(depth: usize, types: &str, encode: fn(i32) -> u16) {
    let a_words = depth / 4;
    let b_words = depth / 8;
    let mut x = vec![0u32; 32 * 12];
    for lane in 0..32 {
        let (group, thread) = (lane >> 2, lane % 4);
        let mut a = [0u16; 8];
        for (i, value) in a.iter_mut().enumerate().take(a_words * 2) {
            let (row, column) = if depth == 16 {
                // a_i: row = groupID for 0 <= i < 2 || 4 <= i < 6, else groupID + 8;
                //      col = threadID * 2 + (i & 1) for i < 4, else that + 8.
                let row = if i < 2 || (4..6).contains(&i) {
                    group
                } else {
                    group + 8
                };
                (
                    row,
                    if i < 4 {
                        thread * 2 + (i & 1)
                    } else {
                        thread * 2 + (i & 1) + 8
                    },
                )
            } else {
                // a_i: row = groupID for i < 2, else groupID + 8; col = threadID * 2 + (i & 1).
                (if i < 2 { group } else { group + 8 }, thread * 2 + (i & 1))
            };
            *value = encode(element(row, column, 1));
        }
        let mut b = [0u16; 4];
        for (i, value) in b.iter_mut().enumerate().take(b_words * 2) {
            // b_i: row = threadID * 2 + (i & 1) for i < 2, else that + 8; col = groupID.
            let row = if i < 2 {
                thread * 2 + (i & 1)
            } else {
                thread * 2 + (i & 1) + 8
            };
            *value = encode(element(row, group, 2));
        }
        for word in 0..a_words {
            x[lane * 12 + word] = u32::from(a[word * 2]) | u32::from(a[word * 2 + 1]) << 16;
        }
        for word in 0..b_words {
            x[lane * 12 + 4 + word] = u32::from(b[word * 2]) | u32::from(b[word * 2 + 1]) << 16;
        }
        for i in 0..4 {
            // c_i: row = groupID for i < 2, else groupID + 8; col = threadID * 2 + (i & 1).
            let row = if i < 2 { group } else { group + 8 };
            x[lane * 12 + 8 + i] = (element(row, thread * 2 + (i & 1), 3) as f32).to_bits();
        }
    }
    let (a, b) = if depth == 16 {
        ("%r0,%r1,%r2,%r3", "%r4,%r5")
    } else {
        ("%r0,%r1", "%r4")
    };
    let out = run_words(
        &format!(
            "mul.wide.u32 %rd0, %lane, 48; add.s64 %rd0, %rd0, %x;
             ld.global.v4.u32 {{%r0,%r1,%r2,%r3}}, [%rd0]; ld.global.v4.u32 {{%r4,%r5,%r6,%r7}}, [%rd0+16];
             ld.global.v4.f32 {{%f0,%f1,%f2,%f3}}, [%rd0+32];
             mma.sync.aligned.m16n8k{depth}.row.col.f32.{types}.{types}.f32 {{%f4,%f5,%f6,%f7}}, {{{a}}}, {{{b}}}, {{%f0,%f1,%f2,%f3}};
             mul.wide.u32 %rd1, %lane, 16; add.s64 %rd1, %rd1, %out;
             st.global.v4.f32 [%rd1], {{%f4,%f5,%f6,%f7}};"
        ),
        32,
        &x,
        128,
    )
    .unwrap_or_else(|e| panic!("{e}"));
    for lane in 0..32 {
        for i in 0..4 {
            let row = if i < 2 { lane >> 2 } else { (lane >> 2) + 8 };
            let column = (lane % 4) * 2 + (i & 1);
            let products = (0..depth).map(|k| element(row, k, 1) * element(k, column, 2));
            let expected = products.sum::<i32>() + element(row, column, 3);
            assert_eq!(
                f32::from_bits(out[lane * 4 + i]),
                expected as f32,
                "row {row}, column {column}"
            );
        }
    }
}

#[test]
fn mma_m16n8k16_of_bf16_multiplies() {
    check_product(16, "bf16", brain);
}

#[test]
fn mma_m16n8k16_of_f16_multiplies() {
    check_product(16, "f16", half);
}

#[test]
fn mma_m16n8k8_of_bf16_multiplies() {
    check_product(8, "bf16", brain);
}

#[test]
fn mma_m16n8k8_of_f16_multiplies() {
    check_product(8, "f16", half);
}

/// The fragments of tf32 hold one element per register. The lower 13 bits of a factor change
/// nothing.
#[test]
fn mma_m16n8k8_of_tf32_multiplies() {
    let factor = |value: i32| (value as f32).to_bits() | 0x1fff;
    let mut x = vec![0u32; 32 * 12];
    for (lane, x) in x.chunks_mut(12).enumerate() {
        let (group, thread) = (lane >> 2, lane % 4);
        for i in 0..4 {
            // a_i: row = groupID for i = 0 and 2, else groupID + 8; col = threadID for i < 2, else
            //      that + 4.
            let row = group + i % 2 * 8;
            x[i] = factor(element(row, thread + i / 2 * 4, 1));
            // c_i: as for other types.
            let row = group + i / 2 * 8;
            x[8 + i] = (element(row, thread * 2 + i % 2, 3) as f32).to_bits();
        }
        for i in 0..2 {
            // b_i: row = threadID for i = 0, else that + 4; col = groupID.
            x[4 + i] = factor(element(thread + i * 4, group, 2));
        }
    }
    let out = run_words(
        "mul.wide.u32 %rd0, %lane, 48; add.s64 %rd0, %rd0, %x;
         ld.global.v4.u32 {%r0,%r1,%r2,%r3}, [%rd0]; ld.global.v2.u32 {%r4,%r5}, [%rd0+16];
         ld.global.v4.f32 {%f0,%f1,%f2,%f3}, [%rd0+32];
         mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f4,%f5,%f6,%f7}, {%r0,%r1,%r2,%r3}, {%r4,%r5}, {%f0,%f1,%f2,%f3};
         mul.wide.u32 %rd1, %lane, 16; add.s64 %rd1, %rd1, %out;
         st.global.v4.f32 [%rd1], {%f4,%f5,%f6,%f7};",
        32,
        &x,
        128,
    )
    .unwrap_or_else(|e| panic!("{e}"));
    for (at, found) in out.iter().enumerate() {
        let (lane, i) = (at / 4, at % 4);
        let (row, column) = ((lane >> 2) + i / 2 * 8, lane % 4 * 2 + i % 2);
        let products = (0..8).map(|k| element(row, k, 1) * element(k, column, 2));
        let expected = products.sum::<i32>() + element(row, column, 3);
        assert_eq!(
            f32::from_bits(*found),
            expected as f32,
            "row {row}, column {column}"
        );
    }
}

/// Stores element (row, column) of matrix m as 1000 m + 10 row + column, loads it with
/// `ldmatrix`, and checks the result.
fn check_load(count: usize, transposed: bool) {
    let halves: Vec<u16> = (0..count * 64)
        .map(|e| (1000 * (e / 64) + 10 * (e / 8 % 8) + e % 8) as u16)
        .collect();
    let x: Vec<u32> = halves
        .chunks(2)
        .map(|p| u32::from(p[0]) | u32::from(p[1]) << 16)
        .collect();
    let registers = ["%r0", "%r1", "%r2", "%r3"][..count].join(",");
    let trans = if transposed { ".trans" } else { "" };
    let stores: String = (0..count)
        .map(|r| format!("st.global.u32 [%rd2+{}], %r{r};\n", r * 128))
        .collect();
    let out = run_words(
        &format!(
            "mov.u32 %r10, dynamic; mul.wide.u32 %rd0, %lane, 16; add.s64 %rd1, %x, %rd0;
             mad.lo.u32 %r11, %lane, 16, %r10;
             setp.ge.u32 %p0, %lane, {rows};
             @%p0 bra $after;
             ld.global.v4.u32 {{%r0,%r1,%r2,%r3}}, [%rd1]; st.shared.v4.u32 [%r11], {{%r0,%r1,%r2,%r3}};
             $after: bar.sync 0;
             ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r11];
             mul.wide.u32 %rd2, %lane, 4; add.s64 %rd2, %rd2, %out;
             {stores}",
            rows = count * 8
        ),
        32,
        &x,
        count * 32,
    )
    .unwrap_or_else(|e| panic!("{e}"));
    for matrix in 0..count {
        for lane in 0..32 {
            for i in 0..2 {
                let (row, column) = (lane / 4, lane % 4 * 2 + i);
                let (row, column) = if transposed {
                    (column, row)
                } else {
                    (row, column)
                };
                let found = out[matrix * 32 + lane] >> (16 * i) & 0xffff;
                assert_eq!(
                    found as usize,
                    1000 * matrix + 10 * row + column,
                    "matrix {matrix}, lane {lane}"
                );
            }
        }
    }
}

#[test]
fn ldmatrix_loads_one_two_and_four() {
    for count in [1, 2, 4] {
        check_load(count, false);
        check_load(count, true);
    }
}
