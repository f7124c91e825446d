//! Products against f64 sums over decoded rows, and against themselves: in any batch, at any level, the same bits.

use super::*;
use crate::activations::round_part_to_int8;
use crate::pack::PackedMatrices;
use crate::pack::tests::{shapes, test_pool};
use crate::simd::CpuLevel;
use moellon_ops::conformance::{all_formats, random_matrices};
use moellon_tensor::rng::SplitMix64;
use moellon_tensor::{MatrixView, OwnedMatrix, WeightFormat};
use proptest::prelude::*;

const EPSILON: f64 = f32::EPSILON as f64;

/// Rows of activations in the form a kernel wants.
struct Prepared {
    form: RowForm,
    int8: Option<Int8Layout>,
    bytes: Vec<u8>,
    stride_bytes: usize,
}

impl Prepared {
    fn new(form: RowForm, x: &[Vec<f32>]) -> Self {
        let cols = x[0].len();
        let (int8, stride_bytes) = match form {
            RowForm::F32 => (None, cols.next_multiple_of(32) * 4),
            RowForm::Int8 { scale_blocks } => {
                let layout = Int8Layout::new(cols, scale_blocks);
                (Some(layout), layout.row_bytes)
            }
        };
        let mut bytes = vec![0u8; x.len() * stride_bytes];
        for (x, row) in x.iter().zip(bytes.chunks_exact_mut(stride_bytes)) {
            match int8 {
                None => {
                    for (to, from) in row.chunks_exact_mut(4).zip(x) {
                        to.copy_from_slice(&from.to_le_bytes());
                    }
                }
                Some(int8) => {
                    let level = Level::new(CpuLevel::detect()).unwrap();
                    // SAFETY: whole rows.
                    unsafe { round_part_to_int8(level, x.as_ptr(), row.as_mut_ptr(), int8, [0, int8.blocks]) };
                }
            }
        }
        Prepared { form, int8, bytes, stride_bytes }
    }

    /// What the kernel sees of row `row`, in f64.
    fn seen(&self, row: usize, cols: usize) -> Vec<f64> {
        let bytes = &self.bytes[row * self.stride_bytes..][..self.stride_bytes];
        let float = |at: usize| f64::from(f32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()));
        (0..cols)
            .map(|col| match self.int8 {
                None => float(4 * col),
                Some(int8) => f64::from(bytes[col] as i8) * float(int8.scales + col / (32 * int8.scale_blocks) * 4),
            })
            .collect()
    }

    fn rows<'a>(&'a self, ids: &'a [u32]) -> Rows<'a> {
        // SAFETY: the bytes are borrowed as long as the rows.
        unsafe {
            Rows::new(self.form, self.int8.as_ref(), self.bytes.as_ptr(), self.bytes.len(), self.stride_bytes, ids)
        }
    }
}

/// `[ids.len()][rows]` products with matrix 0.
fn products(
    level: CpuLevel,
    mode: ActivationMode,
    packed: &PackedMatrices,
    prepared: &Prepared,
    ids: &[u32],
) -> Vec<Vec<f32>> {
    let mut out = vec![vec![f32::NAN; packed.map.tiles * TILE_ROWS]; ids.len()];
    let level = Level::new(level).unwrap();
    multiply(
        level,
        mode,
        (&packed.bytes, &packed.map),
        0,
        0..packed.map.tiles,
        &prepared.rows(ids),
        |tile, first, rows| {
            for (out, values) in out[first..].iter_mut().zip(rows) {
                out[tile * TILE_ROWS..][..TILE_ROWS].copy_from_slice(values);
            }
        },
    );
    out.iter_mut().for_each(|row| row.truncate(packed.map.rows));
    out
}

/// The exact product of row `row` and a bound on the rounding errors of any order of summation: the number of roundings
/// that a term passes, times the size of the terms. Codes and offsets are multiplied apart, so both sizes count.
fn exact_product(matrix: &MatrixView<'_>, row: usize, x: &[f64]) -> (f64, f64) {
    let mut weights = vec![0.0; matrix.cols];
    matrix.decode_row(row, &mut weights);
    let (mut sum, mut size) = (0.0, 0.0);
    for (col, (w, x)) in weights.iter().zip(x).enumerate() {
        let offset = match matrix.format {
            WeightFormat::Affine { group, scale, .. } => scale.read(matrix.offsets.row(row), col / group as usize),
            _ => 0.0,
        };
        sum += f64::from(*w) * x;
        size += (f64::from(w.abs()) + 2.0 * f64::from(offset.abs())) * x.abs();
    }
    // One rounding a column at most, and a few for the weight, its scales and the end.
    (sum, (matrix.cols as f64 + 12.0) * EPSILON / 2.0 * size + f64::from(f32::MIN_POSITIVE))
}

fn fp8_with_odd_blocks() -> WeightFormat {
    WeightFormat::Fp8Block { block_rows: 24, block_cols: 40 }
}

fn formats() -> Vec<WeightFormat> {
    let mut formats = all_formats();
    formats.push(fp8_with_odd_blocks());
    // Two scales of activations a group, and codes of a whole byte with one.
    let scale = moellon_tensor::ScaleDtype::Bf16;
    formats.push(WeightFormat::Affine { bits: 4, group: 128, scale });
    formats.push(WeightFormat::Affine { bits: 8, group: 64, scale });
    formats
}

fn case(format: WeightFormat, seed: u64, [rows, cols]: [usize; 2], num_rows: usize) -> (OwnedMatrix, Vec<Vec<f32>>) {
    let matrix = random_matrices(seed, format, 1, rows, cols).remove(0);
    let mut rng = SplitMix64::new(seed + 100);
    let x = (0..num_rows).map(|_| rng.normals(cols, 1.0)).collect();
    (matrix, x)
}

#[test]
fn products_are_right_in_every_format_and_mode() {
    let pool = test_pool(1);
    for format in formats() {
        for [rows, cols] in shapes(format) {
            let (matrix, x) = case(format, 11, [rows, cols], 3);
            let packed = PackedMatrices::pack(&pool, &[matrix.view()]).unwrap();
            for mode in [ActivationMode::Exact, ActivationMode::Int8] {
                let prepared = Prepared::new(mode.row_form(&packed.map.layout), &x);
                let actual = products(CpuLevel::detect(), mode, &packed, &prepared, &[0, 1, 2]);
                for (i, actual) in actual.iter().enumerate() {
                    let seen = prepared.seen(i, cols);
                    for (row, actual) in actual.iter().enumerate() {
                        let (expected, bound) = exact_product(&matrix.view(), row, &seen);
                        let error = (f64::from(*actual) - expected).abs();
                        assert!(
                            error <= bound,
                            "{format} {mode:?} [{rows}, {cols}] row {row}: {actual}, expected {expected} ± {bound:e}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn all_levels_give_the_same_bits() {
    let pool = test_pool(1);
    for format in formats() {
        for [rows, cols] in shapes(format) {
            let (matrix, x) = case(format, 12, [rows, cols], 9);
            let packed = PackedMatrices::pack(&pool, &[matrix.view()]).unwrap();
            for mode in [ActivationMode::Exact, ActivationMode::Int8] {
                let prepared = Prepared::new(mode.row_form(&packed.map.layout), &x);
                let ids: Vec<u32> = (0..9).collect();
                let expected = products(CpuLevel::Portable, mode, &packed, &prepared, &ids);
                for level in CpuLevel::available() {
                    let actual = products(level, mode, &packed, &prepared, &ids);
                    assert_eq!(actual, expected, "{format} {mode:?} [{rows}, {cols}] at {level}");
                }
            }
        }
    }
}

#[test]
fn the_largest_codes_and_activations_do_not_overflow() {
    // Every code and every activation at its limit: sums of 64 products in i32, pairs in i16 at some levels.
    let pool = test_pool(1);
    for bits in [2u8, 3, 4, 5, 6, 8] {
        let format = WeightFormat::Affine { bits, group: 128, scale: moellon_tensor::ScaleDtype::F32 };
        let codes = vec![0xFF; format.code_row_bytes(256) * 16];
        let ones: Vec<u8> = (0..32).flat_map(|_| 1.0f32.to_le_bytes()).collect();
        let zeros = vec![0; ones.len()];
        let matrix = MatrixView::new("test", format, [16, 256], &codes, &ones, &zeros).unwrap();
        let packed = PackedMatrices::pack(&pool, &[matrix]).unwrap();
        for sign in [1.0f32, -1.0] {
            let form = ActivationMode::Int8.row_form(&packed.map.layout);
            let prepared = Prepared::new(form, &[vec![sign * 127.0; 256]]);
            for level in CpuLevel::available() {
                // Alone, in tile registers that are not full, and with more than one pass of them.
                for num_rows in [1, 7, 20, 30] {
                    let out = products(level, ActivationMode::Int8, &packed, &prepared, &vec![0; num_rows]);
                    let expected = sign * 127.0 * 256.0 * ((1u32 << bits) - 1) as f32;
                    assert_eq!(out, vec![[expected; 16]; num_rows], "{bits} bits at {level}");
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn a_row_gives_the_same_bits_in_any_batch(
        format_index in 0..formats().len(),
        rows in 1usize..100,
        // Some wider than a part of an expanded tile.
        units in prop_oneof![4 => 1usize..6, 1 => 34usize..38],
        // Some more than a block of rows.
        batch in prop_oneof![4 => 1usize..22, 1 => 60usize..75],
        seed in 0u64..1000,
        mode in prop_oneof![Just(ActivationMode::Exact), Just(ActivationMode::Int8)],
    ) {
        let format = formats()[format_index];
        let cols = units * format.group().unwrap_or(13);
        let (matrix, x) = case(format, seed, [rows, cols], batch);
        let packed = PackedMatrices::pack(&test_pool(1), &[matrix.view()]).unwrap();
        let prepared = Prepared::new(mode.row_form(&packed.map.layout), &x);
        // Rows in a shuffled order, some of them twice.
        let mut rng = SplitMix64::new(seed);
        let ids: Vec<u32> = (0..batch).map(|_| rng.below(batch) as u32).collect();
        for level in CpuLevel::available() {
            let together = products(level, mode, &packed, &prepared, &ids);
            for (id, together) in ids.iter().zip(&together) {
                let alone = products(level, mode, &packed, &prepared, &[*id]);
                prop_assert_eq!(&alone[0], together, "{} row {} of {} at {}", format, id, batch, level);
            }
        }
    }
}
