//! How much every module's error costs, measured: one module at a time is made coarse, and the divergence of the model's
//! predictions over some tokens is what its relative error costs. All versions of the model ride through one pass of the
//! layers side by side, so that a model larger than memory can be measured too.

use crate::allocate::{Budget, Choice, allocate, limit, unit_share};
use crate::encoder::{EncoderOptions, ErrorSum, Importance, Method, encode};
use crate::importance::ImportanceReader;
use crate::inventory::{Inventory, Module, Place, Side};
use crate::plan::{Plan, stays};
use crate::progress::{Meter, Progress};
use crate::quantize::Source;
use crate::stats::Stats;
use crate::stream::{BackendFactory, Chunk, Sequences, Stream, head_chunk};
use crate::{Error, Result, compare, formats};
use moellon_checkpoint::{Checkpoint, Matrix, MlaShape, Projection};
use moellon_model::provider::{KvB, WeightProvider};
use moellon_tensor::{MatrixView, OwnedMatrix, ScaleDtype, WeightFormat};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// What was measured of one module.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sensitivity {
    /// Name of the module.
    pub module: String,
    /// KL divergence in nats when this module alone is coarse.
    pub probe_kl: f64,
    /// Relative squared error of its outputs then.
    pub probe_error: f64,
    /// Relative squared error in every format that was asked about.
    pub errors: Vec<(String, f64)>,
}

impl Sensitivity {
    /// Expected divergence in nats at a relative error: the divergence of a small perturbation is quadratic in it.
    fn loss(&self, error: f64) -> f64 {
        self.probe_kl / self.probe_error.max(1e-30) * error
    }
}

/// Matrices of a module that errors are measured on.
const SAMPLED_MATRICES: usize = 8;
/// Rows of each.
const SAMPLED_ROWS: usize = 64;
/// The format of the probe: coarse enough to be seen through the noise of few tokens, fine enough to be a perturbation.
const PROBE: &str = "affine-3-g64";

/// The checkpoint with one module replaced.
struct Patched<'a> {
    checkpoint: &'a Checkpoint,
    module: &'a Module,
    matrices: &'a [OwnedMatrix],
}

impl Patched<'_> {
    fn replaced(&self) -> Vec<Matrix<'_>> {
        self.matrices.iter().cloned().map(Matrix::Owned).collect()
    }
}

impl WeightProvider for Patched<'_> {
    moellon_model::forward_weights!(checkpoint: vector num_experts expert_biases fused_kv_b_format has release);

    fn linear(&self, path: &str, shape: [usize; 2]) -> moellon_model::Result<Matrix<'_>> {
        if self.module.place == Place::Linear && self.module.name == path {
            return Ok(Matrix::Owned(self.matrices[0].clone()));
        }
        WeightProvider::linear(self.checkpoint, path, shape)
    }

    fn experts(
        &self,
        path: &str,
        projection: Projection,
        num_experts: usize,
        shape: [usize; 2],
    ) -> moellon_model::Result<Vec<Matrix<'_>>> {
        match &self.module.place {
            Place::Experts { block, projection: own } if block == path && *own == projection => Ok(self.replaced()),
            _ => WeightProvider::experts(self.checkpoint, path, projection, num_experts, shape),
        }
    }

    fn mla_kv_b(&self, path: &str, shape: MlaShape) -> moellon_model::Result<KvB<'_>> {
        let mut kv_b = WeightProvider::mla_kv_b(self.checkpoint, path, shape)?;
        match &self.module.place {
            Place::Heads { attention, side: Side::Queries, .. } if attention == path => kv_b.embed_q = self.replaced(),
            Place::Heads { attention, side: Side::Values, .. } if attention == path => {
                kv_b.unembed_out = self.replaced();
            }
            _ => {}
        }
        Ok(kv_b)
    }
}

/// Measures the sensitivity of every module that a plan decides on. Modules of MTP layers, on which the model's own
/// predictions do not depend, get the figures of the same module in the last layer of the trunk.
///
/// # Errors
/// As [`crate::quantize::quantize`] and [`crate::compare::compare`].
pub fn measure(
    source: Source<'_>,
    stats: Option<&Stats>,
    sequences: &Sequences,
    candidates: &[WeightFormat],
    backends: &mut BackendFactory<'_>,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Vec<Sensitivity>> {
    let inventory = Inventory::take(source.config, source.checkpoint)?;
    if let Some(stats) = stats {
        stats.check_model(source.checkpoint)?;
    }
    let decided: Vec<&Module> = inventory.modules.iter().filter(|module| !stays(module)).collect();
    let trunk: Vec<&Module> = decided.iter().copied().filter(|module| !module.mtp).collect();
    let mut meter = Meter::new((2 * trunk.len()) as u64, progress);
    let mut reader = ImportanceReader::new(stats, false);
    let probe = formats::parse(PROBE)?;
    let mut found = Vec::new();
    for module in &decided {
        let errors = module_errors(source.checkpoint, module, candidates, &mut reader)?;
        let probe_error = module_errors(source.checkpoint, module, &[probe], &mut reader)?[0].1;
        let module_name = module.name.clone();
        found.push(Sensitivity { module: module_name, probe_kl: 0.0, probe_error, errors });
        if !module.mtp {
            meter.add(&module.name, 1, None);
        }
    }
    let divergences = probe_all(source, sequences, &trunk, probe, backends, &mut meter)?;
    for (module, kl) in trunk.iter().zip(divergences) {
        if let Some(sensitivity) = found.iter_mut().find(|s| s.module == module.name) {
            sensitivity.probe_kl = kl;
        }
    }
    // MTP layers by their likeness in the trunk.
    let part = |module: &Module| module.name.splitn(4, '.').nth(3).map(str::to_owned);
    let mean = found.iter().map(|s| s.probe_kl).sum::<f64>() / trunk.len().max(1) as f64;
    for module in decided.iter().filter(|module| module.mtp) {
        let alike = trunk.iter().rev().find(|other| other.layer.is_some() && part(other) == part(module));
        let kl = alike.and_then(|other| found.iter().find(|s| s.module == other.name)).map_or(mean, |s| s.probe_kl);
        if let Some(sensitivity) = found.iter_mut().find(|s| s.module == module.name) {
            sensitivity.probe_kl = kl;
        }
    }
    Ok(found)
}

/// Relative errors of a module in every format, on a sample of its rows.
fn module_errors(
    checkpoint: &Checkpoint,
    module: &Module,
    candidates: &[WeightFormat],
    reader: &mut ImportanceReader<'_>,
) -> Result<Vec<(String, f64)>> {
    let importance = reader.read(module)?;
    let matrices = module.matrices(checkpoint)?;
    let step = matrices.len().div_ceil(SAMPLED_MATRICES);
    let sampled: Vec<usize> = (0..matrices.len()).step_by(step).collect();
    candidates
        .iter()
        .map(|&wanted| {
            let format = formats::fit(wanted, module.cols);
            let options = EncoderOptions { method: Method::Search, nvfp4_global_scale: true };
            let sums: Vec<ErrorSum> = sampled
                .par_iter()
                .map(|&at| {
                    let rows = sample_rows(&matrices[at].view());
                    let of = importance.of(at);
                    let importance = Importance { feedback: None, ..of.view() };
                    encode(&rows.view(), format, importance, options)
                        .map(|encoded| encoded.error)
                        .map_err(Error::weight(&module.name))
                })
                .collect::<Result<_>>()?;
            let sum = sums.into_iter().fold(ErrorSum::default(), |mut all, sum| {
                all.add(sum);
                all
            });
            Ok((formats::name(wanted), if sum.signal > 0.0 { sum.error / sum.signal } else { 0.0 }))
        })
        .collect()
}

/// Evenly spaced rows of a matrix, in f32.
fn sample_rows(view: &MatrixView<'_>) -> OwnedMatrix {
    let step = view.rows.div_ceil(SAMPLED_ROWS);
    let rows: Vec<usize> = (0..view.rows).step_by(step).collect();
    let mut values = vec![0.0; rows.len() * view.cols];
    for (row, out) in rows.iter().zip(values.chunks_exact_mut(view.cols)) {
        view.decode_row(*row, out);
    }
    OwnedMatrix::plain(ScaleDtype::F32, [rows.len(), view.cols], &values)
}

/// A version of the model with one module coarse, on its way through the layers.
struct Version {
    /// Number of the module among those that are probed.
    module: usize,
    chunks: Vec<Chunk>,
}

/// The divergence of the model with each module coarse in turn.
fn probe_all(
    source: Source<'_>,
    sequences: &Sequences,
    modules: &[&Module],
    probe: WeightFormat,
    backends: &mut BackendFactory<'_>,
    meter: &mut Meter<'_>,
) -> Result<Vec<f64>> {
    let coarse = |module: &Module| -> Result<Vec<OwnedMatrix>> {
        let options = EncoderOptions { method: Method::Rtn, nvfp4_global_scale: true };
        let format = formats::fit(probe, module.cols);
        let matrices = module.matrices(source.checkpoint)?;
        matrices
            .par_iter()
            .map(|matrix| {
                let encoded = encode(&matrix.view(), format, Importance::default(), options);
                encoded.map(|encoded| encoded.matrix).map_err(Error::weight(&module.name))
            })
            .collect()
    };
    let in_place = |layer: Option<usize>, name: Option<&str>| -> Vec<(usize, &Module)> {
        let numbered = modules.iter().copied().enumerate();
        numbered.filter(|(_, m)| m.layer == layer && name.is_none_or(|name| m.name == name)).collect()
    };
    let mut exact = Stream::new(source.config, source.checkpoint, sequences);
    let mut versions: Vec<Version> = Vec::new();
    exact.embed(backends()?.as_mut())?;
    for (number, module) in in_place(None, Some("model.embed_tokens")) {
        let matrices = coarse(module)?;
        let patched = Patched { checkpoint: source.checkpoint, module, matrices: &matrices };
        let mut stream = Stream::new(source.config, &patched, sequences);
        stream.embed(backends()?.as_mut())?;
        versions.push(Version { module: number, chunks: stream.chunks });
        meter.add(&module.name, 1, None);
    }
    for layer in 0..source.config.layers.len() {
        let mut fresh = Vec::new();
        for (number, module) in in_place(Some(layer), None) {
            let matrices = coarse(module)?;
            let patched = Patched { checkpoint: source.checkpoint, module, matrices: &matrices };
            let mut stream = Stream::new(source.config, &patched, sequences);
            stream.chunks.clone_from(&exact.chunks);
            stream.layer(layer, backends()?.as_mut())?;
            fresh.push(Version { module: number, chunks: stream.chunks });
            meter.add(&module.name, 1, None);
        }
        let mut on = backends()?;
        let mut pass = exact.load_layer(layer, on.as_mut())?;
        for version in &mut versions {
            Stream::run_layer(&mut pass, &mut version.chunks, on.as_mut())?;
        }
        Stream::run_layer(&mut pass, &mut exact.chunks, on.as_mut())?;
        versions.extend(fresh);
    }
    let mut divergences = vec![0.0; modules.len()];
    let vocab_size = source.config.vocab_size;
    let mut on = backends()?;
    let mut pass = exact.load_head(on.as_mut())?;
    let coarse_heads = in_place(None, Some("lm_head"));
    let head_inputs = exact.chunks.clone();
    let mut logits = Vec::new();
    let mut expected: Vec<Vec<f32>> = Vec::new();
    for chunk in &mut exact.chunks {
        head_chunk(&mut pass, chunk, &mut logits, on.as_mut())?;
        expected.push(logits.clone());
    }
    for version in &mut versions {
        let mut sum = 0.0;
        for (chunk, expected) in version.chunks.iter_mut().zip(&expected) {
            head_chunk(&mut pass, chunk, &mut logits, on.as_mut())?;
            sum += compare::total_divergence(&logits, expected, vocab_size);
        }
        divergences[version.module] = sum / sequences.num_tokens() as f64;
    }
    for (number, module) in coarse_heads {
        let matrices = coarse(module)?;
        let patched = Patched { checkpoint: source.checkpoint, module, matrices: &matrices };
        let mut stream = Stream::new(source.config, &patched, sequences);
        stream.chunks.clone_from(&head_inputs);
        let mut sum = 0.0;
        stream.head(backends()?.as_mut(), &mut |at, logits| {
            sum += compare::total_divergence(logits, &expected[at], vocab_size);
            Ok(())
        })?;
        divergences[number] = sum / sequences.num_tokens() as f64;
        meter.add(&module.name, 1, None);
    }
    Ok(divergences)
}

/// A plan that loses the least under `budget`, by measured sensitivities, and the divergence that it is expected to have.
///
/// # Errors
/// If nothing fits the budget.
pub fn plan(
    source: Source<'_>,
    sensitivities: &[Sensitivity],
    candidates: &[WeightFormat],
    budget: Budget,
) -> Result<(Plan, f64)> {
    let inventory = Inventory::take(source.config, source.checkpoint)?;
    let mut names = Vec::new();
    let mut items: Vec<Vec<Choice>> = Vec::new();
    for module in inventory.modules.iter().filter(|module| !stays(module)) {
        let measured = sensitivities.iter().find(|s| s.module == module.name);
        let measured = measured
            .ok_or_else(|| Error::mismatch(format!("sensitivity of {}", module.name), "missing", "a measured one"))?;
        let share = unit_share(budget, module.role, module.mtp, source.config, module.count);
        let choices = candidates.iter().filter_map(|&format| {
            let name = formats::name(format);
            let (_, error) = measured.errors.iter().find(|(candidate, _)| *candidate == name)?;
            let fitted = formats::fit(format, module.cols);
            let bytes = module.count as f64 * fitted.matrix_bytes(module.rows, module.cols) as f64;
            Some(Choice { format, cost: bytes * share, loss: measured.loss(*error) })
        });
        items.push(choices.collect());
        names.push(module.name.clone());
    }
    let picked = allocate(&items, limit(budget, &inventory))?;
    let chosen: Vec<Choice> = picked.iter().zip(&items).map(|(&at, choices)| choices[at]).collect();
    let expected = chosen.iter().map(|choice| choice.loss).sum();
    let modules: Vec<(String, WeightFormat)> =
        names.into_iter().zip(&chosen).map(|(name, choice)| (name, choice.format)).collect();
    let name = match budget {
        Budget::BitsPerWeight(bits) => format!("measured-{bits}-bpw"),
        Budget::Bytes(bytes) => format!("measured-{:.2}-gb", bytes / 1e9),
        Budget::BytesPerToken(bytes) => format!("measured-{:.3}-gb-per-token", bytes / 1e9),
    };
    Ok((Plan::explicit(&name, &modules), expected))
}
