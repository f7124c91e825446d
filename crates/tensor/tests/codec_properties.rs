//! What must hold of the codecs for any numbers: error bounds, and views that agree however they are cut.

use moellon_tensor::encode::{EncodeOptions, GlobalScale, encode_matrix};
use moellon_tensor::{MatrixView, Rows, ScaleDtype, WeightFormat};
use proptest::prelude::*;

const FORMATS: [WeightFormat; 15] = {
    const fn affine(bits: u8, group: u32) -> WeightFormat {
        WeightFormat::Affine { bits, group, scale: ScaleDtype::F32 }
    }
    [
        WeightFormat::F32,
        WeightFormat::F16,
        WeightFormat::Bf16,
        WeightFormat::Fp8Block { block_rows: 3, block_cols: 48 },
        affine(1, 32),
        affine(2, 32),
        affine(3, 64),
        affine(4, 128),
        affine(5, 64),
        affine(6, 32),
        affine(8, 64),
        WeightFormat::Affine { bits: 4, group: 64, scale: ScaleDtype::Bf16 },
        WeightFormat::Mxfp4,
        WeightFormat::Mxfp8,
        WeightFormat::Nvfp4,
    ]
};

/// Bound on the error of one value, from the group it stands in (`min`, `max`, `amax`) and the amax of the matrix.
fn error_bound(format: WeightFormat, value: f32, group: &[f32], matrix_amax: f32) -> f32 {
    let min = group.iter().copied().fold(f32::INFINITY, f32::min);
    let max = group.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let amax = min.abs().max(max.abs());
    match format {
        WeightFormat::F32 => 0.0,
        WeightFormat::F16 => value.abs() / 2048.0 + 3e-8,
        WeightFormat::Bf16 => value.abs() / 256.0,
        // Half a step of E4M3 with three mantissa bits, or half its smallest step.
        WeightFormat::Fp8Block { .. } => value.abs() / 16.0 + amax / 448.0 / 512.0,
        // One bit has a grid of two points; otherwise half a step, a step more where the edge was snapped to the grid.
        WeightFormat::Affine { bits: 1, .. } => max - min + amax * 1e-6 + 1e-7,
        WeightFormat::Affine { bits, scale, .. } => {
            let steps = ((1u32 << bits) - 1) as f32;
            let stored = if scale == ScaleDtype::F32 { 1e-6 } else { (steps + 1.0) / 256.0 / steps * 2.0 };
            1.5 * (max - min) / steps + amax * stored + 1e-7
        }
        // Half the widest step of E2M1 (2) under a scale that may be twice the ideal one.
        WeightFormat::Mxfp4 => 2.0 * amax / 6.0,
        WeightFormat::Mxfp8 => value.abs() / 16.0 + 2.0 * amax / 448.0 / 512.0,
        // A rounded scale loses up to 1/16 at the top; a subnormal one up to half its step (2^-10 of 448 * 6).
        WeightFormat::Nvfp4 => amax / 6.0 * 1.1 + amax / 16.0 + matrix_amax * 6.0 / 2688.0 / 1024.0,
    }
}

fn values() -> impl Strategy<Value = Vec<f32>> {
    prop::collection::vec(prop_oneof![4 => -1.0f32..1.0, 1 => -50.0f32..50.0, 1 => Just(0.0)], 384 * 5)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn encoding_errs_by_less_than_a_step(values in values()) {
        for format in FORMATS {
            let matrix = encode_matrix(format, [5, 384], &values, EncodeOptions::default()).unwrap();
            let decoded = matrix.view().decode_all();
            let matrix_amax = values.iter().fold(0.0f32, |a, v| a.max(v.abs()));
            let group = format.group().unwrap_or(384);
            for (at, (&value, &back)) in values.iter().zip(&decoded).enumerate() {
                let (row, first) = (at / 384, at % 384 / group * group);
                let mut block: Vec<f32> = values[row * 384 + first..][..group].to_vec();
                if let WeightFormat::Fp8Block { .. } = format {
                    block = (row / 3 * 3..(row / 3 * 3 + 3).min(5)).flat_map(|r| values[r * 384 + first..][..group].to_vec()).collect();
                }
                let bound = error_bound(format, value, &block, matrix_amax);
                prop_assert!((value - back).abs() <= bound, "{format}: {value} came back as {back}, bound {bound}");
            }
        }
    }

    #[test]
    fn views_agree_however_they_are_cut(values in values(), first in 0usize..384, len in 0usize..384) {
        let cols = first..(first + len).min(384);
        for format in FORMATS {
            let matrix = encode_matrix(format, [5, 384], &values, EncodeOptions::default()).unwrap();
            let view = matrix.view();
            let decoded = view.decode_all();
            let mut part = vec![0.0; cols.len()];
            view.decode_block(4, cols.clone(), &mut part);
            prop_assert_eq!(&part[..], &decoded[4 * 384..][cols.clone()], "{}", format);

            let last_rows = view.row_range(2..5);
            prop_assert_eq!(&last_rows.decode_all()[..], &decoded[2 * 384..], "{}", format);
            prop_assert_eq!(last_rows.check_finite(), Ok(()));
            if !matches!(format, WeightFormat::Fp8Block { .. }) {
                let odd = view.every_row(1, 2).expect("rows have their own scales");
                prop_assert_eq!(odd.rows, 2);
                let expected: Vec<f32> = [1, 3].iter().flat_map(|r| decoded[r * 384..][..384].to_vec()).collect();
                prop_assert_eq!(odd.decode_all(), expected, "{}", format);
            }
        }
    }
}

#[test]
fn an_nvfp4_global_scale_saves_small_weights() {
    let values: Vec<f32> = (0..512).map(|i| ((i * 37 % 101) as f32 - 50.0) * 6e-5).collect();
    let error = |global_scale| {
        let options = EncodeOptions { global_scale, ..EncodeOptions::default() };
        let decoded = encode_matrix(WeightFormat::Nvfp4, [2, 256], &values, options).unwrap().view().decode_all();
        values.iter().zip(&decoded).map(|(v, d)| (v - d).powi(2)).sum::<f32>()
    };
    assert!(error(GlobalScale::FromValues) < error(GlobalScale::Off) / 4.0);
}

#[test]
fn bad_input_is_named() {
    let format = WeightFormat::Affine { bits: 4, group: 64, scale: ScaleDtype::Bf16 };
    let encode = |shape, values: &[f32]| encode_matrix(format, shape, values, EncodeOptions::default());
    let mut values = vec![0.5; 256];
    assert!(encode([2, 96], &values).unwrap_err().to_string().contains("found 256, expected 2 rows of 96"));
    assert!(encode([8, 32], &values).unwrap_err().to_string().contains("found 32, expected a multiple of 64"));
    values[130] = f32::NAN;
    assert!(encode([2, 128], &values).unwrap_err().to_string().contains("NaN at row 1"));
    let seven = WeightFormat::Affine { bits: 7, group: 64, scale: ScaleDtype::F32 };
    assert!(encode_matrix(seven, [1, 64], &[0.0; 64], EncodeOptions::default()).is_err());
    assert!(
        MatrixView::new("layer 3 q_proj", format, [2, 128], &[0; 127], &[], &[])
            .unwrap_err()
            .to_string()
            .contains("layer 3 q_proj: bytes of the codes of a affine-4-g64 matrix [2, 128]")
    );
    assert!(Rows::new("w", &[0; 10], usize::MAX, 8, 8).is_err());
}
