use super::*;
use crate::simd::CpuLevel;
use moellon_tensor::rng::SplitMix64;

fn round(level: CpuLevel, scale_blocks: usize, x: &[f32]) -> (Int8Layout, Vec<u8>) {
    let layout = Int8Layout::new(x.len(), scale_blocks);
    let mut row = vec![0xAA; layout.row_bytes];
    let level = Level::new(level).unwrap();
    let middle = (layout.blocks / 2).next_multiple_of(4).min(layout.blocks);
    // SAFETY: whole rows.
    unsafe { round_part_to_int8(level, x.as_ptr(), row.as_mut_ptr(), layout, [0, middle]) };
    if middle < layout.blocks {
        // SAFETY: as above.
        unsafe { round_part_to_int8(level, x.as_ptr(), row.as_mut_ptr(), layout, [middle, layout.blocks]) };
    }
    (layout, row)
}

fn f32_at(row: &[u8], at: usize) -> f32 {
    f32::from_le_bytes(row[at..at + 4].try_into().unwrap())
}

fn i32_at(row: &[u8], at: usize) -> i32 {
    i32::from_le_bytes(row[at..at + 4].try_into().unwrap())
}

#[test]
fn rounding_errors_are_at_most_half_a_step_and_sums_are_sums() {
    let mut rng = SplitMix64::new(1);
    for cols in [1, 15, 16, 17, 32, 33, 64, 96, 128, 160, 500, 4096] {
        let mut x = rng.normals(cols, 1.0);
        x[cols / 2] = -40.0;
        for scale_blocks in [1, 2] {
            let (layout, row) = round(CpuLevel::detect(), scale_blocks, &x);
            let scale_cols = 32 * scale_blocks;
            let codes = |range: std::ops::Range<usize>| -> i32 { row[range].iter().map(|c| i32::from(*c as i8)).sum() };
            for (i, x) in x.iter().enumerate() {
                let scale = f32_at(&row, layout.scales + i / scale_cols * 4);
                let code = f32::from(row[i] as i8);
                assert!((code * scale - x).abs() <= scale * 0.500_01, "{x} became {code} * {scale}");
            }
            if scale_blocks == 1 {
                for block in 0..layout.blocks {
                    let (low, high) = (codes(block * 32..block * 32 + 16), codes(block * 32 + 16..block * 32 + 32));
                    assert_eq!(i32_at(&row, layout.e2m1_starts_16 + 8 * block), -12 * low);
                    assert_eq!(i32_at(&row, layout.e2m1_starts_16 + 8 * block + 4), -12 * high);
                    assert_eq!(i32_at(&row, layout.e2m1_starts_32 + 4 * block), -12 * (low + high));
                }
            }
            for group in if scale_blocks == 1 { vec![32] } else { vec![64, 128] } {
                for g in 0..cols.div_ceil(group) {
                    let end = ((g + 1) * group).min(layout.blocks * 32);
                    let exact: f64 = (g * group..end)
                        .step_by(scale_cols)
                        .map(|col| {
                            let scale = f32_at(&row, layout.scales + col / scale_cols * 4);
                            f64::from(scale) * f64::from(codes(col..(col + scale_cols).min(end)))
                        })
                        .sum();
                    let sum = f64::from(f32_at(&row, layout.sums_of_group(group) + 4 * g));
                    // Up to two products and an addition, each half a unit in the last place of at most this size.
                    let size: f64 = x[g * group..((g + 1) * group).min(cols)].iter().map(|x| f64::from(x.abs())).sum();
                    assert!(
                        (sum - exact).abs() <= 2.0 * f64::from(f32::EPSILON) * size,
                        "group {g} of {group}: {sum}, {exact}"
                    );
                }
            }
        }
    }
}

#[test]
fn all_levels_round_alike() {
    let mut rng = SplitMix64::new(2);
    for cols in [7, 100, 1024] {
        let x = rng.normals(cols, 3.0);
        for scale_blocks in [1, 2] {
            let (_, expected) = round(CpuLevel::Portable, scale_blocks, &x);
            for level in CpuLevel::available() {
                assert!(round(level, scale_blocks, &x).1 == expected, "{level}, {cols} columns");
            }
        }
    }
}

#[test]
fn zeros_stay_zero_and_what_is_not_finite_is_not_hidden() {
    for scale_blocks in [1, 2] {
        for value in [0.0f32, 1e-38, -1e-36] {
            let (layout, row) = round(CpuLevel::detect(), scale_blocks, &[value; 40]);
            assert_eq!(f32_at(&row, layout.scales), 0.0);
            assert!(row[..64].iter().all(|c| *c == 0));
        }
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let cols = 32 * scale_blocks;
            let mut x = vec![1.0; 2 * cols];
            x[cols + 5] = value;
            for level in CpuLevel::available() {
                let (layout, row) = round(level, scale_blocks, &x);
                assert!(!f32_at(&row, layout.scales).is_nan());
                assert!(f32_at(&row, layout.scales + 4).is_nan(), "{value} at {level}");
            }
        }
    }
}
