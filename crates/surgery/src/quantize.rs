//! `quantize`: a checkpoint in other formats, module by module, resumable.

use crate::encoder::{Encoded, EncoderOptions, ErrorSum, Method, encode};
use crate::importance::ImportanceReader;
use crate::inventory::{Inventory, Module};
use crate::layout::{self, Part};
use crate::plan::Plan;
use crate::product::{Begun, Product};
use crate::progress::{Meter, Progress};
use crate::report::{self, Receipt};
use crate::stats::Stats;
use crate::{Error, Result};
use moellon_checkpoint::{Checkpoint, Matrix, TensorSpec};
use moellon_model::ModelConfig;
use moellon_tensor::{Dtype, OwnedMatrix, ScaleDtype, WeightFormat};
use rayon::prelude::*;
use serde_json::{Map, Value, json};
use std::path::Path;

/// The model that is operated on. It is only read.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    /// Name for receipts and cards.
    pub name: &'a str,
    /// Its tensors.
    pub checkpoint: &'a Checkpoint,
    /// Its numbers.
    pub config: &'a ModelConfig,
    /// Files that go with the product as they are: tokenizer, chat template, generation config, an earlier receipt.
    pub files: &'a [(String, Vec<u8>)],
}

/// What to quantize to, and how.
#[derive(Clone, Copy)]
pub struct QuantizeOptions<'a> {
    /// Which module gets which format.
    pub plan: &'a Plan,
    /// Importances; without them all inputs count alike.
    pub stats: Option<&'a Stats>,
    /// How codes are chosen.
    pub encoder: EncoderOptions,
    /// A shard is closed before it would exceed this. A killed run loses the shards that were open.
    pub max_shard_bytes: usize,
}

/// Quantizes `source` into the new directory `destination`, or goes on where a killed run with the same options was.
///
/// # Errors
/// A plan or calibration that does not fit the model, values that are not finite, a destination that exists, or a failing
/// file system.
pub fn quantize(
    source: Source<'_>,
    options: QuantizeOptions<'_>,
    destination: &Path,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<()> {
    let inventory = Inventory::take(source.config, source.checkpoint)?;
    let formats = options.plan.formats(&inventory)?;
    if let Some(stats) = options.stats {
        stats.check_model(source.checkpoint)?;
    }
    let architecture = source.config.architecture;
    let global_scale = options.encoder.nvfp4_global_scale;
    let tensors: Vec<Vec<(Part, TensorSpec)>> = inventory
        .modules
        .iter()
        .zip(&formats)
        .map(|(module, &format)| layout::tensors(module, format, architecture, global_scale))
        .collect();
    let kept = kept_tensors(source, &inventory)?;
    let job = json!({
        "command": "quantize",
        "version": env!("CARGO_PKG_VERSION"),
        "source": source.checkpoint.identity(),
        "plan": options.plan,
        "method": options.encoder.method.name(),
        "nvfp4_global_scale": global_scale,
        "calibration": options.stats.map(Stats::identity),
        "max_shard_bytes": options.max_shard_bytes,
    });
    let specs = kept.iter().map(|(spec, _)| spec.clone()).chain(tensors.iter().flatten().map(|(_, spec)| spec.clone()));
    let mut product = match Product::begin(destination, &job, specs.collect(), options.max_shard_bytes)? {
        Begun::Open(product) => product,
        Begun::Complete => return Ok(()),
    };
    for (spec, bytes) in &kept {
        if !product.is_done(&spec.name) {
            product.write(&spec.name, bytes)?;
        }
    }
    let total = inventory.modules.iter().map(Module::num_weights).sum();
    let mut meter = Meter::new(total, progress);
    let mut sum = ErrorSum::default();
    let mut reader = ImportanceReader::new(options.stats, options.encoder.method == Method::Gptq);
    for ((module, &format), tensors) in inventory.modules.iter().zip(&formats).zip(&tensors) {
        let specs: Vec<TensorSpec> = tensors.iter().map(|(_, spec)| spec.clone()).collect();
        if let Some(entry) = product.finished(&module.name, &specs) {
            sum.add(module_error(entry));
            meter.skip(&module.name, module.num_weights(), Some(sum.snr_db()));
            continue;
        }
        let entry =
            encode_module(source.checkpoint, module, format, tensors, options.encoder, &mut reader, &mut product)?;
        sum.add(module_error(&entry));
        meter.add(&module.name, module.num_weights(), Some(sum.snr_db()));
    }
    let mut config = source.checkpoint.config.as_object().cloned().unwrap_or_default();
    layout::write_config(&mut config, &inventory, &formats, architecture, global_scale);
    let receipt = receipt(source, &inventory, &formats, options, &product);
    let files = report::files(source, &receipt);
    product.finish(&Value::Object(config), &files)
}

/// The share of the whole that a module's error is: relative, so that modules of different scales can be added up.
fn module_error(entry: &Value) -> ErrorSum {
    let weights = entry["weights"].as_u64().unwrap_or(0) as f64;
    ErrorSum { error: report::relative_error(entry) * weights, signal: weights }
}

/// Weights of a matrix from which on it is encoded alone: many row tasks for every core.
const LARGE: usize = 1 << 20;

/// Encodes one module, notes its error and writes its tensors.
fn encode_module(
    checkpoint: &Checkpoint,
    module: &Module,
    format: WeightFormat,
    tensors: &[(Part, TensorSpec)],
    options: EncoderOptions,
    reader: &mut ImportanceReader<'_>,
    product: &mut Product,
) -> Result<Value> {
    let importance = reader.read(module)?;
    let matrices = module.matrices(checkpoint)?;
    let encode_one = |(index, matrix): (usize, &Matrix<'_>)| {
        let importance = importance.of(index);
        let encoded = encode(&matrix.view(), format, importance.view(), options).map_err(Error::weight(&module.name));
        checkpoint.release_matrices(&[matrix.view()]);
        encoded
    };
    // A large matrix is work for all cores, and its inputs' moments may be larger than it: one after the other.
    let at_once = if module.rows * module.cols >= LARGE { 1 } else { matrices.len() };
    let mut sum = ErrorSum::default();
    let mut lossless = true;
    let mut data: Vec<Vec<u8>> =
        tensors.iter().map(|(_, spec)| Vec::with_capacity(spec.size_bytes().unwrap_or(0))).collect();
    for (part, matrices) in matrices.chunks(at_once).enumerate() {
        let numbered = matrices.par_iter().enumerate().map(|(at, matrix)| (part * at_once + at, matrix));
        for encoded in numbered.map(encode_one).collect::<Result<Vec<Encoded>>>()? {
            sum.add(encoded.error);
            lossless &= encoded.lossless;
            for ((part, _), data) in tensors.iter().zip(&mut data) {
                layout::append(*part, &encoded.matrix, data);
            }
        }
    }
    let relative_error = if sum.signal > 0.0 { sum.error / sum.signal } else { 0.0 };
    // As text: a float that went through the journal's JSON may come back one unit in the last place off.
    let relative_error = format!("{relative_error:.6e}");
    let entry = json!({
        "weights": module.num_weights(),
        "bytes": tensors.iter().filter_map(|(_, spec)| spec.size_bytes()).sum::<usize>(),
        "relative_error": relative_error,
        "lossless": lossless,
    });
    product.note(&module.name, entry.clone())?;
    for ((_, spec), data) in tensors.iter().zip(&data) {
        product.write(&spec.name, data)?;
    }
    Ok(entry)
}

/// Tensors that go over as they are, and expert biases under their stacked names.
pub(crate) fn kept_tensors(source: Source<'_>, inventory: &Inventory) -> Result<Vec<(TensorSpec, Vec<u8>)>> {
    let checkpoint = source.checkpoint;
    let mut kept = Vec::new();
    for name in &inventory.kept {
        let tensor = checkpoint.require(name)?;
        let spec = TensorSpec { name: name.clone(), dtype: tensor.dtype, shape: tensor.shape.to_vec() };
        kept.push((spec, tensor.bytes.to_vec()));
    }
    for bias in &inventory.expert_biases {
        if let Some(values) = checkpoint.expert_biases(&bias.block, bias.projection, bias.rows)? {
            let below = layout::experts_module(source.config.architecture);
            let name = format!("{}.{below}.{}.bias", bias.block, bias.projection.name());
            kept.push(floats(name, vec![bias.count, bias.rows], &values));
        }
    }
    Ok(kept)
}

/// A float tensor in the narrowest of bf16 and f32 that holds its values exactly.
pub(crate) fn floats(name: String, shape: Vec<usize>, values: &[f32]) -> (TensorSpec, Vec<u8>) {
    let exact = values.iter().all(|&value| ScaleDtype::Bf16.round(value) == value);
    let dtype = if exact { ScaleDtype::Bf16 } else { ScaleDtype::F32 };
    let bytes = OwnedMatrix::plain(dtype, [1, values.len()], values).codes;
    let dtype = if exact { Dtype::Bf16 } else { Dtype::F32 };
    (TensorSpec { name, dtype, shape }, bytes)
}

fn receipt(
    source: Source<'_>,
    inventory: &Inventory,
    formats: &[WeightFormat],
    options: QuantizeOptions<'_>,
    product: &Product,
) -> Receipt {
    let mut receipt = Receipt::new("quantize", source);
    let requantized: Vec<&str> = inventory
        .modules
        .iter()
        .filter(|module| module.source_format.is_quantized() && product.entry(&module.name)["lossless"] == false)
        .map(|module| module.name.as_str())
        .collect();
    let mut details = Map::new();
    details.insert("plan".to_owned(), json!(options.plan));
    details.insert("method".to_owned(), json!(options.encoder.method.name()));
    details.insert("nvfp4_global_scale".to_owned(), json!(options.encoder.nvfp4_global_scale));
    details.insert("calibration".to_owned(), json!(options.stats.map(|stats| &stats.info)));
    // Quantizing twice adds up errors: the product should say so.
    details.insert("requantized_modules".to_owned(), json!(requantized));
    receipt.details = details;
    for (module, &format) in inventory.modules.iter().zip(formats) {
        receipt.add_module(module, format, product.entry(&module.name));
    }
    receipt
}

/// Names of modules that would be quantized a second time under `plan`, for warnings.
///
/// # Errors
/// If the plan does not fit the model.
pub fn requantized(source: Source<'_>, plan: &Plan) -> Result<Vec<String>> {
    let inventory = Inventory::take(source.config, source.checkpoint)?;
    let formats = plan.formats(&inventory)?;
    let twice = |module: &Module, format: WeightFormat| {
        module.source_format.is_quantized() && format.is_quantized() && module.source_format != format
    };
    let modules = inventory.modules.iter().zip(formats);
    Ok(modules.filter(|(module, format)| twice(module, *format)).map(|(module, _)| module.name.clone()).collect())
}
