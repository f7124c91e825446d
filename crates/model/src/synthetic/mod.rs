//! Models of exact shapes with random weights, for measuring speed where no checkpoint is at hand.
//!
//! Weights are uniform over the codes of their format and symmetric around zero with a standard deviation of about
//! `1 / sqrt(cols)` ([`OwnedMatrix::random`]): one-sided codes would give all rows a common bias, routing would collapse
//! and batches would look free. Matrices are made when they are asked for and dropped once a back end has packed them.

mod presets;

pub use presets::{preset, preset_names};

use crate::Result;
use crate::config::ModelConfig;
use crate::provider::{KvB, WeightProvider};
use moellon_checkpoint::{Matrix, MlaShape, Projection};
use moellon_tensor::encode::{EncodeOptions, GlobalScale, encode_matrix};
use moellon_tensor::rng::SplitMix64;
use moellon_tensor::{MatrixView, OwnedMatrix, ScaleDtype, WeightFormat};
use rayon::prelude::*;
use std::cell::Cell;

/// Which format each part of a synthetic model has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FormatPlan {
    /// Routed experts.
    pub experts: WeightFormat,
    /// Attention, indexer, dense and shared feed-forwards, embedding.
    pub dense: WeightFormat,
    /// Head.
    pub head: WeightFormat,
}

/// MLX affine with group 64 and bf16 scales.
const fn affine(bits: u8) -> WeightFormat {
    WeightFormat::Affine { bits, group: 64, scale: ScaleDtype::Bf16 }
}

impl FormatPlan {
    /// Names that [`FormatPlan::parse`] takes.
    pub const NAMES: &'static str =
        "affine-2, affine-3, affine-4, affine-5, affine-6, affine-8, nvfp4, mxfp4, mxfp8, fp8, bf16 or q3a4";

    /// A plan by name: one format for everything, with the head in affine-6 for the low-bit ones; or `q3a4`: experts in
    /// affine-3, the rest in affine-4, head in affine-6.
    pub fn parse(name: &str) -> Option<Self> {
        let all = |format| FormatPlan { experts: format, dense: format, head: format };
        let low = |format| FormatPlan { head: affine(6), ..all(format) };
        Some(match name {
            "affine-2" => low(affine(2)),
            "affine-3" => low(affine(3)),
            "affine-4" => low(affine(4)),
            "affine-5" => low(affine(5)),
            "affine-6" => all(affine(6)),
            "affine-8" => all(affine(8)),
            "nvfp4" => low(WeightFormat::Nvfp4),
            "mxfp4" => low(WeightFormat::Mxfp4),
            "mxfp8" => all(WeightFormat::Mxfp8),
            "fp8" => all(WeightFormat::Fp8Block { block_rows: 128, block_cols: 128 }),
            "bf16" => all(WeightFormat::Bf16),
            "q3a4" => FormatPlan { experts: affine(3), ..low(affine(4)) },
            _ => return None,
        })
    }
}

/// Elements that are drawn and encoded for an embedding with related tokens; taller ones repeat these rows.
const DRAWN_ELEMENTS: usize = 1 << 21;

/// Random weights for a config.
pub struct Synthetic {
    plan: FormatPlan,
    num_experts: usize,
    related_tokens: bool,
    /// Seed of the next matrix.
    seed: Cell<u64>,
}

/// Correlations of neighbouring rows in the bands of an embedding with related tokens.
const RELATIONS: [f32; 16] = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.96, 0.98];

/// The tokens of each band of an embedding with related tokens: neighbours in a band have correlated embeddings, those of
/// the first band none, those of the last the most. Text whose tokens follow each other in a band routes to experts that
/// neighbouring tokens share, as real text does.
pub fn related_bands(config: &ModelConfig) -> Vec<std::ops::Range<u32>> {
    let rows = drawn_rows([config.vocab_size, config.hidden_size]) / RELATIONS.len();
    (0..RELATIONS.len()).map(|band| (band * rows) as u32..((band + 1) * rows) as u32).collect()
}

impl Synthetic {
    /// Random weights with `plan`'s formats.
    pub fn new(config: &ModelConfig, plan: FormatPlan, seed: u64) -> Self {
        Synthetic { plan, num_experts: config.moe.num_experts, related_tokens: false, seed: Cell::new(seed) }
    }

    /// The same with an embedding whose neighbouring tokens are related, by [`related_bands`].
    #[must_use]
    pub fn with_related_tokens(self) -> Self {
        Synthetic { related_tokens: true, ..self }
    }

    fn format(&self, path: &str, cols: usize) -> WeightFormat {
        let wanted = match path.rsplit('.').next().unwrap_or(path) {
            // Routers stay bf16 in every published checkpoint.
            "gate" | "router" => WeightFormat::Bf16,
            "experts" => self.plan.experts,
            "lm_head" => self.plan.head,
            _ => self.plan.dense,
        };
        // A row that is no whole number of groups stays bf16, as quantizers leave it.
        if wanted.validate(cols).is_ok() { wanted } else { WeightFormat::Bf16 }
    }

    fn matrices(&self, path: &str, count: usize, shape: [usize; 2]) -> Result<Vec<Matrix<'_>>> {
        let format = self.format(path, shape[1]);
        let first = self.seed.get();
        self.seed.set(first + count as u64);
        if self.related_tokens && path == "model.embed_tokens" {
            let rng = &mut SplitMix64::new(first);
            return (0..count).map(|_| Ok(Matrix::Owned(related_matrix(rng, format, shape)?))).collect();
        }
        let std = 1.0 / (shape[1] as f32).sqrt();
        let matrices: Vec<_> = (0..count as u64)
            .into_par_iter()
            // Seeds of SplitMix64 that differ by little give unrelated sequences.
            .map(|i| OwnedMatrix::random(format, shape, std, first + i).map(Matrix::Owned))
            .collect::<moellon_tensor::Result<_>>()
            .map_err(moellon_ops::Error::from)?;
        Ok(matrices)
    }
}

/// Random floats, encoded: each row a mixture of the row before and a new one.
fn related_matrix(rng: &mut SplitMix64, format: WeightFormat, shape: [usize; 2]) -> Result<OwnedMatrix> {
    let (cols, rows) = (shape[1], drawn_rows(shape));
    // Many times what layers add, 32 with variance 1: what rows have in common of their context must not choose their experts. At the usual
    // amplitude neighbours shared 45 % of them in every band (Qwen3-30B-A3B, 4 layers, 128 positions).
    let amplitude = 32.0 * 12f32.sqrt();
    let mut values: Vec<f32> = Vec::with_capacity(rows * cols);
    let mut before = vec![0.0; cols];
    for row in 0..rows {
        let relation = RELATIONS[(row / (rows / RELATIONS.len()).max(1)).min(RELATIONS.len() - 1)];
        let new = (1.0 - relation * relation).sqrt() * amplitude;
        before.iter_mut().for_each(|value| *value = relation * *value + new * (rng.next_f32() - 0.5));
        values.extend_from_slice(&before);
    }
    repeated_matrix(format, shape, &values)
}

/// Rows that are drawn of a matrix: whole FP8 blocks, so that their scale rows repeat too.
fn drawn_rows([rows, cols]: [usize; 2]) -> usize {
    (DRAWN_ELEMENTS / cols).next_multiple_of(128).min(rows)
}

/// A matrix whose rows are `values`, over and over.
fn repeated_matrix(format: WeightFormat, [rows, cols]: [usize; 2], values: &[f32]) -> Result<OwnedMatrix> {
    let drawn_rows = values.len() / cols;
    let options = EncodeOptions { arithmetic: ScaleDtype::F32, global_scale: GlobalScale::FromValues };
    let drawn = encode_matrix(format, [drawn_rows, cols], values, options).map_err(moellon_ops::Error::from)?;
    let mut matrix = OwnedMatrix::zeroed(format, [rows, cols]).map_err(moellon_ops::Error::from)?;
    matrix.global_scale = drawn.global_scale;
    for (whole, part) in
        [(&mut matrix.codes, &drawn.codes), (&mut matrix.scales, &drawn.scales), (&mut matrix.offsets, &drawn.offsets)]
    {
        for chunk in whole.chunks_mut(part.len().max(1)) {
            chunk.copy_from_slice(&part[..chunk.len()]);
        }
    }
    Ok(matrix)
}

impl WeightProvider for Synthetic {
    fn linear(&self, path: &str, shape: [usize; 2]) -> Result<Matrix<'_>> {
        Ok(self.matrices(path, 1, shape)?.remove(0))
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        // Norms of one; biases, sinks and corrections of zero.
        let value = if name.ends_with("norm.weight") { 1.0 } else { 0.0 };
        Ok(vec![value; len])
    }

    fn num_experts(&self, _path: &str) -> Result<usize> {
        Ok(self.num_experts)
    }

    fn experts(
        &self,
        path: &str,
        _projection: Projection,
        num_experts: usize,
        shape: [usize; 2],
    ) -> Result<Vec<Matrix<'_>>> {
        self.matrices(&format!("{path}.experts"), num_experts, shape)
    }

    fn expert_biases(&self, _path: &str, _projection: Projection, rows: usize) -> Result<Option<Vec<f32>>> {
        Ok(Some(vec![0.0; self.num_experts * rows]))
    }

    fn mla_kv_b(&self, path: &str, shape: MlaShape) -> Result<KvB<'_>> {
        let heads = |rows, cols| self.matrices(path, shape.num_heads, [rows, cols]);
        Ok(KvB {
            embed_q: heads(shape.kv_lora_rank, shape.qk_nope_head_dim)?,
            unembed_out: heads(shape.v_head_dim, shape.kv_lora_rank)?,
        })
    }

    fn fused_kv_b_format(&self, _path: &str, _shape: MlaShape) -> Result<Option<WeightFormat>> {
        Ok(None)
    }

    fn has(&self, name: &str) -> bool {
        // As many MTP layers as the config asks for; an untied head is made on demand.
        name.ends_with(".eh_proj.weight")
    }

    fn release(&self, _matrices: &[MatrixView<'_>]) {}
}
