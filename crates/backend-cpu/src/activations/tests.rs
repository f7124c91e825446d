use super::*;
use crate::simd::CpuLevel;
use moellon_tensor::rng::SplitMix64;

fn round(level: CpuLevel, x: &[f32]) -> (Int8Layout, Vec<u8>) {
    let layout = Int8Layout::new(x.len());
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
        let (layout, row) = round(CpuLevel::detect(), &x);
        let codes = |range: std::ops::Range<usize>| -> i32 { row[range].iter().map(|c| i32::from(*c as i8)).sum() };
        for block in 0..layout.blocks {
            let scale = f32_at(&row, layout.scales + 4 * block);
            for (i, x) in x[block * 32..].iter().enumerate().take(32) {
                let code = f32::from(row[block * 32 + i] as i8);
                assert!((code * scale - x).abs() <= scale * 0.500_01, "{x} became {code} * {scale}");
            }
            let low = codes(block * 32..block * 32 + 16);
            let high = codes(block * 32 + 16..block * 32 + 32);
            assert_eq!(i32_at(&row, layout.e2m1_starts_16 + 8 * block), -12 * low);
            assert_eq!(i32_at(&row, layout.e2m1_starts_16 + 8 * block + 4), -12 * high);
            assert_eq!(i32_at(&row, layout.e2m1_starts_32 + 4 * block), -12 * (low + high));
        }
        for (i, group) in [32, 64, 128].into_iter().enumerate() {
            assert_eq!(layout.sums_of_group(group), layout.sums[i]);
            for g in 0..cols.div_ceil(group) {
                let exact: f64 = (g * group / 32..((g + 1) * group / 32).min(layout.blocks))
                    .map(|b| f64::from(f32_at(&row, layout.scales + 4 * b)) * f64::from(codes(b * 32..b * 32 + 32)))
                    .sum();
                let sum = f64::from(f32_at(&row, layout.sums[i] + 4 * g));
                // Up to four products and three additions, each half a unit in the last place of at most this size.
                let size: f64 = x[g * group..((g + 1) * group).min(cols)].iter().map(|x| f64::from(x.abs())).sum();
                assert!(
                    (sum - exact).abs() <= 4.0 * f64::from(f32::EPSILON) * size,
                    "group {g} of {group}: {sum}, {exact}"
                );
            }
        }
    }
}

#[test]
fn all_levels_round_alike() {
    let mut rng = SplitMix64::new(2);
    for cols in [7, 100, 1024] {
        let x = rng.normals(cols, 3.0);
        let (_, expected) = round(CpuLevel::Portable, &x);
        for level in CpuLevel::available() {
            assert!(round(level, &x).1 == expected, "{level}, {cols} columns");
        }
    }
}

#[test]
fn zeros_stay_zero_and_what_is_not_finite_is_not_hidden() {
    for value in [0.0f32, 1e-38, -1e-36] {
        let (layout, row) = round(CpuLevel::detect(), &[value; 40]);
        assert_eq!(f32_at(&row, layout.scales), 0.0);
        assert!(row[..64].iter().all(|c| *c == 0));
    }
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = vec![1.0; 64];
        x[37] = value;
        for level in CpuLevel::available() {
            let (layout, row) = round(level, &x);
            assert!(!f32_at(&row, layout.scales).is_nan());
            assert!(f32_at(&row, layout.scales + 4).is_nan(), "{value} at {level}");
        }
    }
}
