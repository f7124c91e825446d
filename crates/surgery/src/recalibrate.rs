//! `recalibrate`: routers that make the best of the experts that pruning left. The original model runs a layer at a time
//! over texts; what each of its blocks gives a token is what the pruned block's router is fitted to (`router_fit.rs`). All
//! other tensors are moved, not decoded.

use crate::inventory::{Inventory, Module, Place};
use crate::observe::{Observer, RoutedRows, Watch};
use crate::product::{Begun, Product};
use crate::progress::{Meter, Progress};
use crate::quantize::Source;
use crate::report::{self, Receipt};
use crate::router_fit::{Fit, Rule, Samples, candidates, fit, logits};
use crate::stream::{BackendFactory, Sequences, Stream};
use crate::{Error, Result};
use moellon_checkpoint::{Matrix, Projection, TensorSpec};
use moellon_ops::{Backend, ElementType, Experts, ExpertsSource, MoeDown, MoeGateUp};
use moellon_tensor::{MatrixView, OwnedMatrix, ScaleDtype, WeightFormat};
use rayon::prelude::*;
use serde_json::{Value, json};
use std::path::Path;

/// Experts a token may come to use: this many more than twice what it uses.
const MORE_CANDIDATES: usize = 8;
/// Rows that go through the experts at a time.
const ROWS: usize = 512;

/// What to fit with.
#[derive(Debug, Clone)]
pub struct RecalibrateOptions {
    /// Names and SHA-256 of the texts, for the record.
    pub texts: Vec<[String; 2]>,
    /// A shard is closed before it would exceed this.
    pub max_shard_bytes: usize,
}

/// A block that has fewer experts than it had.
struct Pruned {
    block: String,
    /// Its layer; MTP layers are numbered after the trunk's.
    layer: usize,
    /// The module of its router.
    router: Module,
    router_dtype: ScaleDtype,
    num_experts: usize,
}

/// Writes `model`, whose blocks lost experts that `reference` has, with fitted routers into the new directory
/// `destination`, or goes on where a killed run with the same options was.
///
/// # Errors
/// Models that do not belong together, no block with fewer experts, a quantized router, a destination that exists, or a
/// failing back end or file system.
pub fn recalibrate(
    model: Source<'_>,
    reference: Source<'_>,
    sequences: &Sequences,
    options: &RecalibrateOptions,
    destination: &Path,
    backends: &mut BackendFactory<'_>,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<()> {
    let blocks = pruned_blocks(model, reference)?;
    let job = json!({
        "command": "recalibrate",
        "version": env!("CARGO_PKG_VERSION"),
        "source": model.checkpoint.identity(),
        "reference": reference.checkpoint.identity(),
        "texts": options.texts,
        "tokens": sequences.num_tokens(),
        "max_shard_bytes": options.max_shard_bytes,
    });
    let spec = |name: &str, dtype, shape: &[usize]| TensorSpec { name: name.to_owned(), dtype, shape: shape.to_vec() };
    let specs = model.checkpoint.tensors().map(|tensor| spec(tensor.name, tensor.dtype, tensor.shape)).collect();
    let mut product = match Product::begin(destination, &job, specs, options.max_shard_bytes)? {
        Begun::Open(product) => product,
        Begun::Complete => return Ok(()),
    };
    let is_router = |name: &str| blocks.iter().any(|pruned| name == weight_name(pruned));
    for tensor in model.checkpoint.tensors() {
        if !is_router(tensor.name) && !product.is_done(tensor.name) {
            product.write(tensor.name, tensor.bytes)?;
            model.checkpoint.release(tensor.bytes);
        }
    }
    fit_all(model, reference, sequences, &blocks, &mut product, backends, progress)?;
    let mut receipt = Receipt::new("recalibrate", model);
    let mut routers = Vec::new();
    for pruned in &blocks {
        let entry = product.entry(&pruned.router.name).clone();
        if !product.is_done(&weight_name(pruned)) {
            let bytes = entry["router"].as_str().and_then(from_hex);
            product.write(&weight_name(pruned), &bytes.expect("the journal's own entries are hexadecimal"))?;
        }
        routers.push(json!({
            "block": pruned.block,
            "experts": pruned.num_experts,
            "relative_error_before": entry["before"],
            "relative_error": entry["after"],
        }));
    }
    receipt.details.extend([
        ("reference".to_owned(), json!({ "name": reference.name, "identity": reference.checkpoint.identity() })),
        ("routers".to_owned(), json!(routers)),
        ("texts".to_owned(), json!(options.texts)),
        ("tokens".to_owned(), json!(sequences.num_tokens())),
    ]);
    for module in &Inventory::take(model.config, model.checkpoint)?.modules {
        let bytes = module.count as u64 * module.source_format.matrix_bytes(module.rows, module.cols);
        receipt.add_module(module, module.source_format, &json!({ "bytes": bytes, "lossless": true }));
    }
    product.finish(&model.checkpoint.config, &report::files(model, &receipt))
}

fn weight_name(pruned: &Pruned) -> String {
    format!("{}.weight", pruned.router.name)
}

/// The blocks of `model` with fewer experts than in `reference`.
fn pruned_blocks(model: Source<'_>, reference: Source<'_>) -> Result<Vec<Pruned>> {
    let dimensions = |source: Source<'_>| {
        let (config, moe) = (source.config, source.config.moe);
        format!(
            "vocabulary {}, {} layers, hidden size {}, {} experts a token",
            config.vocab_size,
            config.layers.len(),
            config.hidden_size,
            moe.num_experts_per_tok
        )
    };
    if dimensions(model) != dimensions(reference) {
        return Err(Error::mismatch("the pruned model", dimensions(model), dimensions(reference)));
    }
    let [own, whole] = [model, reference].map(|source| Inventory::take(source.config, source.checkpoint));
    let (own, whole) = (own?, whole?);
    let mut blocks = Vec::new();
    for module in &own.modules {
        let (Place::Experts { block, projection: Projection::Gate }, Some(layer)) = (&module.place, module.layer)
        else {
            continue;
        };
        let missing = || Error::mismatch(format!("{} of the reference", module.name), "missing", "the block's experts");
        let before = whole.module(&module.name).ok_or_else(missing)?;
        if before.count <= module.count {
            continue;
        }
        let name = format!("{block}.{}", model.config.moe.router_name);
        let router = own.module(&name).ok_or_else(|| Error::mismatch(&name, "missing", "the block's router"))?;
        let router_dtype = match router.source_format {
            WeightFormat::Bf16 => ScaleDtype::Bf16,
            WeightFormat::F16 => ScaleDtype::F16,
            WeightFormat::F32 => ScaleDtype::F32,
            found => {
                let expected = "bf16, f16 or f32: recalibrate before routers are quantized";
                return Err(Error::mismatch(format!("{name}: format"), found, expected));
            }
        };
        let (block, router, num_experts) = (block.clone(), router.clone(), module.count);
        blocks.push(Pruned { block, layer, router, router_dtype, num_experts });
    }
    if blocks.is_empty() {
        let expected = "at least 1 (the model is the pruned one, --ref the one before pruning)";
        return Err(Error::mismatch("blocks with fewer experts than in the reference", 0, expected));
    }
    Ok(blocks)
}

/// Runs the reference and fits the routers that no earlier run fitted.
fn fit_all(
    model: Source<'_>,
    reference: Source<'_>,
    sequences: &Sequences,
    blocks: &[Pruned],
    product: &mut Product,
    backends: &mut BackendFactory<'_>,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<()> {
    let pending = |product: &Product| -> Vec<usize> {
        (0..blocks.len()).filter(|&at| product.noted(&blocks[at].router.name).is_none()).collect()
    };
    let Some(last) = pending(product).last().map(|&at| blocks[at].layer) else { return Ok(()) };
    let num_layers = reference.config.layers.len();
    let tokens = sequences.num_tokens() as u64;
    let mut meter = Meter::new(tokens * (last + 1) as u64, progress);
    let mut stream = Stream::new(reference.config, reference.checkpoint, sequences);
    stream.embed(backends()?.as_mut())?;
    for layer in 0..=last {
        let wanted = pending(product).into_iter().find(|&at| blocks[at].layer == layer);
        let mut observer = Observer::new(backends()?, Watch::Routing);
        if layer < num_layers {
            stream.layer(layer, &mut observer)?;
        } else {
            if layer == num_layers {
                stream.head(backends()?.as_mut(), &mut |_, _| Ok(()))?;
            }
            stream.mtp(layer - num_layers, &mut observer, &mut |_, _| Ok(()))?;
        }
        let mut seen = observer.into_seen();
        if let Some(at) = wanted {
            let block = &blocks[at].block;
            let none = || Error::mismatch(format!("tokens that went through {block}"), 0, "at least 1");
            let rows = seen.routed.remove(block).ok_or_else(none)?;
            let entry = fit_block(model, &blocks[at], rows, backends)?;
            product.note(&blocks[at].router.name, entry)?;
        }
        meter.add(&format!("layer {layer}"), tokens, None);
    }
    Ok(())
}

/// Fits one router; what the journal keeps of it.
fn fit_block(model: Source<'_>, pruned: &Pruned, rows: RoutedRows, backends: &mut BackendFactory<'_>) -> Result<Value> {
    let (moe, router, num_experts) = (&model.config.moe, &pruned.router, pruned.num_experts);
    let vector = |wanted: bool, part: &str| -> Result<Option<Vec<f32>>> {
        let name = format!("{}.{part}", router.name);
        Ok(if wanted { Some(model.checkpoint.vector(&name, num_experts)?) } else { None })
    };
    let rule = Rule::new(
        moe,
        num_experts,
        vector(moe.router_bias, "bias")?,
        vector(moe.correction_bias, "e_score_correction_bias")?,
    );
    let values = router.matrices(model.checkpoint)?[0].view().decode_all();
    let begin = transposed(&values, num_experts);
    let samples = sample(model, pruned, rows, &begin, &rule, backends)?;
    let Fit { weights, before, after } = fit(&samples, begin, &rule);
    let values = transposed(&weights, router.cols);
    let matrix = OwnedMatrix::plain(pruned.router_dtype, [router.rows, router.cols], &values);
    Ok(json!({
        "router": to_hex(&matrix.codes),
        "before": format!("{before:.6e}"),
        "after": format!("{after:.6e}"),
    }))
}

/// `[rows, cols]` as `[cols, rows]`.
fn transposed(values: &[f32], rows: usize) -> Vec<f32> {
    let cols = values.len() / rows;
    (0..values.len()).map(|at| values[at % rows * cols + at / rows]).collect()
}

/// Runs every token through its candidates and keeps the products of what they give.
fn sample(
    model: Source<'_>,
    pruned: &Pruned,
    RoutedRows { x, y }: RoutedRows,
    router: &[f32],
    rule: &Rule,
    backends: &mut BackendFactory<'_>,
) -> Result<Samples> {
    let hidden_size = model.config.hidden_size;
    let wanted = 2 * model.config.moe.num_experts_per_tok + MORE_CANDIDATES;
    let all = logits(&x, router, hidden_size, rule);
    let ids = candidates(&all, pruned.num_experts, wanted, rule);
    let count = ids.len() / (x.len() / hidden_size);
    let mut backend = backends()?;
    let experts = load_experts(model, pruned, backend.as_mut())?;
    let mut samples = Samples { hidden_size, candidates: count, ..Samples::default() };
    for ((x, y), ids) in x.chunks(ROWS * hidden_size).zip(y.chunks(ROWS * hidden_size)).zip(ids.chunks(ROWS * count)) {
        let outputs = expert_outputs(model, experts, x, ids, backend.as_mut())?;
        let tokens: Vec<[Vec<f32>; 2]> = y
            .par_chunks_exact(hidden_size)
            .enumerate()
            .map(|(t, y)| {
                let rows: Vec<&[f32]> = outputs.iter().map(|slot| &slot[t * hidden_size..][..hidden_size]).collect();
                let gram = rows.iter().flat_map(|a| rows.iter().map(|b| dot(a, b))).collect();
                [gram, rows.iter().map(|f| dot(f, y)).collect()]
            })
            .collect();
        for [gram, cross] in tokens {
            samples.gram.extend(gram);
            samples.cross.extend(cross);
        }
        samples.energy.extend(y.chunks_exact(hidden_size).map(|y| dot(y, y)));
    }
    (samples.x, samples.ids) = (x, ids);
    Ok(samples)
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() as f32
}

fn load_experts(model: Source<'_>, pruned: &Pruned, backend: &mut dyn Backend) -> Result<Experts> {
    let (checkpoint, moe, hidden) = (model.checkpoint, &model.config.moe, model.config.hidden_size);
    let inner = moe.moe_intermediate_size;
    let [gate, up, down] =
        [(Projection::Gate, [inner, hidden]), (Projection::Up, [inner, hidden]), (Projection::Down, [hidden, inner])]
            .map(|(projection, shape)| checkpoint.experts(&pruned.block, projection, Some(pruned.num_experts), shape));
    let matrices: [Vec<Matrix<'_>>; 3] = [gate?, up?, down?];
    let views: [Vec<MatrixView<'_>>; 3] = matrices.each_ref().map(|list| list.iter().map(Matrix::view).collect());
    let bias = |projection, rows| -> Result<Vec<f32>> {
        let missing = || Error::mismatch(format!("biases of {}.experts", pruned.block), "missing", "one an expert");
        checkpoint.expert_biases(&pruned.block, projection, rows)?.ok_or_else(missing)
    };
    let biases = match moe.expert_bias {
        true => Some([bias(Projection::Gate, inner)?, bias(Projection::Up, inner)?, bias(Projection::Down, hidden)?]),
        false => None,
    };
    let name = format!("{}.experts", pruned.block);
    let source = ExpertsSource {
        name: &name,
        gate: &views[0],
        up: &views[1],
        down: &views[2],
        biases: biases.as_ref().map(|b| [&b[0][..], &b[1][..], &b[2][..]]),
    };
    let experts = backend.load_experts(&source)?;
    views.iter().for_each(|views| checkpoint.release_matrices(views));
    Ok(experts)
}

/// What each candidate gives each row: `[candidates][rows, hidden_size]`.
fn expert_outputs(
    model: Source<'_>,
    experts: Experts,
    x: &[f32],
    ids: &[u32],
    backend: &mut dyn Backend,
) -> Result<Vec<Vec<f32>>> {
    let (hidden, inner) = (experts.hidden_size, experts.intermediate_size);
    let tokens = x.len() / hidden;
    let count = ids.len() / tokens;
    let mut float =
        |what, cols| -> Result<_> { Ok(backend.alloc(what, ElementType::F32, tokens * cols)?.tensor(tokens, cols)) };
    let (input, h) = (float("rows", hidden)?, float("one candidate's products", inner)?);
    let (out, ones) = (float("one candidate's outputs", hidden)?, float("unit weights", 1)?);
    let slot_ids = backend.alloc("one candidate a row", ElementType::U32, tokens)?.tensor(tokens, 1);
    backend.write_f32(input, x)?;
    backend.write_f32(ones, &vec![1.0; tokens])?;
    let mut outputs = Vec::with_capacity(count);
    for slot in 0..count {
        let chosen: Vec<u32> = ids.chunks_exact(count).map(|ids| ids[slot]).collect();
        backend.write_u32(slot_ids, &chosen)?;
        let activation = model.config.moe.activation;
        backend.moe_gate_up(&MoeGateUp { x: input, experts, ids: slot_ids, activation, out: h })?;
        backend.moe_down(&MoeDown { h, experts, ids: slot_ids, weights: ones, plus: None, out })?;
        let mut host = vec![0.0; tokens * hidden];
        backend.read_f32(out, &mut host)?;
        outputs.push(host);
    }
    for tensor in [input, h, out, ones, slot_ids] {
        backend.free(tensor.buffer);
    }
    Ok(outputs)
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes().as_chunks::<2>().0.iter();
    digits.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}
