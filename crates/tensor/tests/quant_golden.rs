//! Every format against vectors made by the CPU back end of MLX 0.32.4: decoding and encoding bit for bit, and
//! products with stacked experts. The vectors hold ten rows of 256 per type: normal, heavy tails, all negative,
//! all positive, constant, zero, tiny, ties and large values.

use moellon_tensor::encode::{EncodeOptions, GlobalScale, NVFP4_RANGE, encode_matrix};
use moellon_tensor::{MatrixView, OwnedMatrix, ScaleDtype, WeightFormat};
use safetensors::SafeTensors;
use std::path::PathBuf;

const DTYPES: [(&str, ScaleDtype); 3] =
    [("f32", ScaleDtype::F32), ("f16", ScaleDtype::F16), ("bf16", ScaleDtype::Bf16)];

fn golden(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/quant_golden").join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The numbers of a float tensor, widened exactly.
fn floats(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let tensor = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
    let dtype = match tensor.dtype() {
        safetensors::Dtype::F32 => ScaleDtype::F32,
        safetensors::Dtype::F16 => ScaleDtype::F16,
        safetensors::Dtype::BF16 => ScaleDtype::Bf16,
        other => panic!("{name} is {other:?}"),
    };
    (0..tensor.data().len() / dtype.size_bytes()).map(|at| dtype.read(tensor.data(), at)).collect()
}

/// Bit equality, except that any NaN equals any NaN.
fn assert_same_bits(what: &str, actual: &[f32], expected: &[f32]) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    for (at, (a, e)) in actual.iter().zip(expected).enumerate() {
        assert!(a.to_bits() == e.to_bits() || (a.is_nan() && e.is_nan()), "{what}: element {at} is {a}, expected {e}");
    }
}

/// Checks one set of golden tensors, `prefix.{in,weight,scales,biases,dequant,dequant_f32,global_scale}`.
fn check(file: &SafeTensors<'_>, format: WeightFormat, dtype: ScaleDtype, input: &str, prefix: &str) {
    let data = |part: &str| file.tensor(&format!("{prefix}.{part}")).map(|t| t.data()).unwrap_or(&[]);
    let values = floats(file, input);
    let global_amax = file.tensor(&format!("{prefix}.global_scale")).ok().map(|t| ScaleDtype::F32.read(t.data(), 0));
    let shape = [values.len() / 256, 256];

    let view = MatrixView::new(prefix, format, shape, data("weight"), data("scales"), data("biases"))
        .expect("golden tensors have the documented shapes")
        .with_global_scale(global_amax.map_or(1.0, |amax| amax / NVFP4_RANGE));
    view.check_finite().expect("golden tensors are finite");
    let mut rounded = vec![0.0; values.len()];
    for (row, out) in rounded.chunks_exact_mut(256).enumerate() {
        view.decode_row_rounded(row, dtype, out);
    }
    assert_same_bits(&format!("{prefix} decode"), &rounded, &floats(file, &format!("{prefix}.dequant")));
    if file.tensor(&format!("{prefix}.dequant_f32")).is_ok() {
        let expected = floats(file, &format!("{prefix}.dequant_f32"));
        assert_same_bits(&format!("{prefix} decode in f32"), &view.decode_all(), &expected);
    }

    let global_scale = global_amax.map_or(GlobalScale::Off, GlobalScale::FromAmax);
    let encoded = encode_matrix(format, shape, &values, EncodeOptions { arithmetic: dtype, global_scale })
        .expect("golden inputs are finite");
    let OwnedMatrix { codes, scales, offsets, global_scale, .. } = &encoded;
    assert_eq!(scales, data("scales"), "{prefix}: scales");
    assert_eq!(offsets, data("biases"), "{prefix}: offsets");
    assert_eq!(codes, data("weight"), "{prefix}: codes");
    assert_eq!(*global_scale, view.global_scale);
}

#[test]
fn affine_matches_mlx_bit_for_bit() {
    let mut cases = 0;
    for bits in [1u8, 2, 3, 4, 5, 6, 8] {
        let bytes = golden(&format!("affine{bits}.safetensors"));
        let file = SafeTensors::deserialize(&bytes).expect("golden file parses");
        for (name, dtype) in DTYPES {
            for group in [32, 64, 128] {
                let format = WeightFormat::Affine { bits, group, scale: dtype };
                check(&file, format, dtype, &format!("{name}.in"), &format!("{name}.g{group}"));
                cases += 1;
            }
        }
    }
    assert_eq!(cases, 63);
}

#[test]
fn scaled_floats_match_mlx_bit_for_bit() {
    for (file_name, format) in [
        ("mxfp4", WeightFormat::Mxfp4),
        ("mxfp8", WeightFormat::Mxfp8),
        ("nvfp4", WeightFormat::Nvfp4),
        ("nvfp4_gs", WeightFormat::Nvfp4),
    ] {
        let bytes = golden(&format!("{file_name}.safetensors"));
        let file = SafeTensors::deserialize(&bytes).expect("golden file parses");
        for (name, dtype) in DTYPES {
            check(&file, format, dtype, &format!("{name}.in"), name);
        }
    }
}

#[test]
fn stacked_expert_products_match_mlx() {
    let bytes = golden("gather_qmm.safetensors");
    let file = SafeTensors::deserialize(&bytes).expect("golden file parses");
    let x = floats(&file, "x"); // [2, 256]
    let expert_ids = file.tensor("idx").expect("idx is there"); // [2, 2] u32
    let expert_ids: &[[u8; 4]] = expert_ids.data().as_chunks().0;
    const ROWS: usize = 32;
    const COLS: usize = 256;
    for (name, format) in [
        ("affine3", WeightFormat::Affine { bits: 3, group: 64, scale: ScaleDtype::F32 }),
        ("affine4", WeightFormat::Affine { bits: 4, group: 64, scale: ScaleDtype::F32 }),
        ("nvfp4", WeightFormat::Nvfp4),
        ("mxfp4", WeightFormat::Mxfp4),
    ] {
        let part = |part: &str| file.tensor(&format!("{name}.{part}")).map(|t| t.data()).unwrap_or(&[]);
        let stacked = MatrixView::new(name, format, [4 * ROWS, COLS], part("weight"), part("scales"), part("biases"))
            .expect("golden tensors have the documented shapes")
            .decode_all();
        let expected = floats(&file, &format!("{name}.y")); // [2, 2, 1, 32]
        for (pair, expert_id) in expert_ids.iter().enumerate() {
            let expert = u32::from_le_bytes(*expert_id) as usize;
            let x = &x[pair / 2 * COLS..][..COLS];
            for row in 0..ROWS {
                let weights = &stacked[(expert * ROWS + row) * COLS..][..COLS];
                let terms = || x.iter().zip(weights).map(|(&x, &w)| f64::from(x) * f64::from(w));
                let (sum, magnitude) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
                // An f32 sum of n rounded products errs by at most n units of the sum of magnitudes; affine kernels
                // round each decoded weight twice more.
                let tolerance = (COLS + 2) as f64 * f64::from(f32::EPSILON) / 2.0 * magnitude;
                let found = f64::from(expected[pair * ROWS + row]);
                assert!(
                    (found - sum).abs() <= tolerance,
                    "{name} pair {pair} row {row}: {found} vs {sum} ± {tolerance}"
                );
            }
        }
    }
}
