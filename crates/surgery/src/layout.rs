//! How a product's tensors lie: MLX's layout, which mlx-lm loads and this project reads. Experts and heads are stacked
//! along a leading dimension; codes are `u32` words.

use crate::formats;
use crate::inventory::{Inventory, Module, Place};
use moellon_checkpoint::TensorSpec;
use moellon_model::config::Architecture;
use moellon_tensor::encode::NVFP4_RANGE;
use moellon_tensor::{Dtype, OwnedMatrix, WeightFormat};
use serde_json::{Map, Value, json};
use std::collections::HashMap;

/// A part of a module that is one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Codes,
    Scales,
    Offsets,
    GlobalScale,
}

/// The module path under which mlx-lm looks for a weight.
pub(crate) fn path(module: &Module, architecture: Architecture) -> String {
    match &module.place {
        Place::Linear | Place::Heads { .. } => module.name.clone(),
        Place::Experts { block, projection } => {
            format!("{block}.{}.{}", experts_module(architecture), projection.name())
        }
    }
}

/// The module below a MoE block that holds its stacked experts.
pub(crate) fn experts_module(architecture: Architecture) -> &'static str {
    if architecture == Architecture::GptOss { "experts" } else { "switch_mlp" }
}

/// The tensors of a module in `format`.
pub(crate) fn tensors(
    module: &Module,
    format: WeightFormat,
    architecture: Architecture,
    global_scale: bool,
) -> Vec<(Part, TensorSpec)> {
    let path = path(module, architecture);
    let stacked = |dims: [usize; 2]| -> Vec<usize> {
        let leading = if module.place == Place::Linear { None } else { Some(module.count) };
        leading.into_iter().chain(dims).collect()
    };
    let spec = |suffix: &str, dtype, shape: Vec<usize>| TensorSpec { name: format!("{path}.{suffix}"), dtype, shape };
    let (rows, cols) = (module.rows, module.cols);
    let groups = format.scales_per_row(cols);
    let words = stacked([rows, format.code_row_bytes(cols) / 4]);
    let scales = |suffix: &str, dtype| spec(suffix, dtype, stacked([format.scale_rows(rows), groups]));
    match format {
        WeightFormat::F32 => vec![(Part::Codes, spec("weight", Dtype::F32, stacked([rows, cols])))],
        WeightFormat::F16 => vec![(Part::Codes, spec("weight", Dtype::F16, stacked([rows, cols])))],
        WeightFormat::Bf16 => vec![(Part::Codes, spec("weight", Dtype::Bf16, stacked([rows, cols])))],
        WeightFormat::Fp8Block { .. } => vec![
            (Part::Codes, spec("weight", Dtype::F8E4m3, stacked([rows, cols]))),
            (Part::Scales, scales("weight_scale_inv", Dtype::F32)),
        ],
        WeightFormat::Affine { scale, .. } => vec![
            (Part::Codes, spec("weight", Dtype::U32, words)),
            (Part::Scales, scales("scales", scale.dtype())),
            (Part::Offsets, scales("biases", scale.dtype())),
        ],
        WeightFormat::Mxfp4 | WeightFormat::Mxfp8 | WeightFormat::Nvfp4 => {
            let mut parts =
                vec![(Part::Codes, spec("weight", Dtype::U32, words)), (Part::Scales, scales("scales", Dtype::U8))];
            if format == WeightFormat::Nvfp4 && global_scale {
                parts.push((Part::GlobalScale, spec("global_scale", Dtype::F32, vec![module.count])));
            }
            parts
        }
    }
}

/// Appends one matrix's share of a part of a module.
pub(crate) fn append(part: Part, matrix: &OwnedMatrix, data: &mut Vec<u8>) {
    match part {
        Part::Codes => data.extend_from_slice(&matrix.codes),
        Part::Scales => data.extend_from_slice(&matrix.scales),
        Part::Offsets => data.extend_from_slice(&matrix.offsets),
        Part::GlobalScale => data.extend_from_slice(&mlx_global_scale(matrix.global_scale).to_le_bytes()),
    }
}

/// MLX's `global_scale` (the largest magnitude that it stands for) that reads back as `factor`. One exists for every factor
/// that came from a magnitude; for others the nearest, which is at most one unit in the last place off.
pub(crate) fn mlx_global_scale(factor: f32) -> f32 {
    let product = factor * NVFP4_RANGE;
    [product, product.next_up(), product.next_down()]
        .into_iter()
        .find(|candidate| candidate / NVFP4_RANGE == factor)
        .unwrap_or(product)
}

/// Writes the `quantization` entries of a config: the commonest format by weights as the default, the other modules by
/// path. mlx-lm reads `quantization`, transformers-style loaders `quantization_config`; mlx-lm writes both, so do we.
pub(crate) fn write_config(
    config: &mut Map<String, Value>,
    inventory: &Inventory,
    formats: &[WeightFormat],
    architecture: Architecture,
    global_scale: bool,
) {
    config.remove("quantization");
    config.remove("quantization_config");
    let mut weights: HashMap<WeightFormat, u64> = HashMap::new();
    for (module, &format) in inventory.modules.iter().zip(formats) {
        if formats::mlx_mode(format).is_some() {
            *weights.entry(format).or_default() += module.num_weights();
        }
    }
    let Some((&default, _)) = weights.iter().max_by_key(|(format, weights)| (**weights, formats::name(**format)))
    else {
        if formats.iter().any(|format| matches!(format, WeightFormat::Fp8Block { .. })) {
            let block = json!({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]});
            config.insert("quantization_config".to_owned(), block);
        }
        return;
    };
    let entry = |format: WeightFormat| {
        let mut entry = Map::new();
        entry.insert("group_size".to_owned(), json!(format.group()));
        entry.insert("bits".to_owned(), json!(format.code_bits()));
        entry.insert("mode".to_owned(), json!(formats::mlx_mode(format).unwrap_or("fp8 blocks")));
        if format == WeightFormat::Nvfp4 && global_scale {
            entry.insert("global_scale".to_owned(), json!(true));
        }
        entry
    };
    let mut dictionary = entry(default);
    for (module, &format) in inventory.modules.iter().zip(formats) {
        let path = path(module, architecture);
        if !format.is_quantized() {
            dictionary.insert(path, json!(false));
        } else if format != default {
            dictionary.insert(path, Value::Object(entry(format)));
        }
    }
    config.insert("quantization".to_owned(), Value::Object(dictionary.clone()));
    config.insert("quantization_config".to_owned(), Value::Object(dictionary));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn global_scales_of_magnitudes_come_back() {
        let mut rng = moellon_tensor::rng::SplitMix64::new(3);
        for _ in 0..2000 {
            let amax = rng.next_normal().abs().max(1e-6);
            let factor = amax / NVFP4_RANGE;
            assert_eq!(mlx_global_scale(factor) / NVFP4_RANGE, factor, "{amax}");
            // Powers of two, as the cast from MXFP4 has them.
            let power = (rng.below(60) as f32 - 40.0).exp2();
            assert_eq!(mlx_global_scale(power) / NVFP4_RANGE, power);
        }
    }
}
