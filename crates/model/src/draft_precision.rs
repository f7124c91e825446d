//! Cheaper weights for what only drafts. A draft is checked by the model itself, so the MTP layer may be stored more coarsely
//! than the checkpoint has it: plain floats become 8-bit codes, and drafts get a head of their own with 4 bits. That
//! makes drafting a fraction of what it costs with the stored weights, and no output depends on it.

use crate::config::ModelConfig;
use crate::provider::{KvB, WeightProvider};
use crate::{Error, Result};
use moellon_checkpoint::{Matrix, MlaShape, Projection};
use moellon_tensor::encode::{EncodeOptions, GlobalScale, encode_matrix};
use moellon_tensor::{MatrixView, ScaleDtype, WeightFormat};
use rayon::prelude::*;

/// Module name of the drafts' own head.
pub(crate) const DRAFT_HEAD: &str = "draft_head";

const LAYER: WeightFormat = WeightFormat::Affine { bits: 8, group: 64, scale: ScaleDtype::Bf16 };
const HEAD: WeightFormat = WeightFormat::Affine { bits: 4, group: 64, scale: ScaleDtype::Bf16 };

/// A provider whose MTP layers are stored more coarsely, with a head for drafts.
pub struct DraftPrecision<'a> {
    inner: &'a dyn WeightProvider,
    /// Prefixes of the MTP layers' modules.
    prefixes: Vec<String>,
    /// Module of the head that drafts share with the model.
    head: &'static str,
}

impl<'a> DraftPrecision<'a> {
    /// Over the weights of a model with this config.
    pub fn new(config: &ModelConfig, inner: &'a dyn WeightProvider) -> Self {
        let layers = config.layers.len()..config.layers.len() + config.num_mtp_layers;
        let tied = config.tie_word_embeddings && !inner.has("lm_head.weight");
        DraftPrecision {
            inner,
            prefixes: layers.map(|layer| format!("model.layers.{layer}.")).collect(),
            head: if tied { "model.embed_tokens" } else { "lm_head" },
        }
    }

    fn is_mtp(&self, path: &str) -> bool {
        self.prefixes.iter().any(|prefix| path.starts_with(prefix))
    }
}

/// The matrix in `format`, if it is stored as plain floats and the format fits its rows.
fn coarser<'m>(matrix: Matrix<'m>, format: WeightFormat) -> Result<Matrix<'m>> {
    let view = matrix.view();
    if view.format.is_quantized() || format.validate(view.cols).is_err() {
        return Ok(matrix);
    }
    let options = EncodeOptions { arithmetic: ScaleDtype::F32, global_scale: GlobalScale::FromValues };
    let encoded = encode_matrix(format, [view.rows, view.cols], &view.decode_all(), options);
    Ok(Matrix::Owned(encoded.map_err(moellon_ops::Error::from).map_err(Error::from)?))
}

impl WeightProvider for DraftPrecision<'_> {
    fn linear(&self, path: &str, shape: [usize; 2]) -> Result<Matrix<'_>> {
        if path == DRAFT_HEAD {
            return coarser(self.inner.linear(self.head, shape)?, HEAD);
        }
        let matrix = self.inner.linear(path, shape)?;
        // A router is small, and its choices are worth their bits.
        let is_router = path.ends_with(".gate") || path.ends_with(".router");
        if self.is_mtp(path) && !is_router { coarser(matrix, LAYER) } else { Ok(matrix) }
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        self.inner.vector(name, len)
    }

    fn num_experts(&self, path: &str) -> Result<usize> {
        self.inner.num_experts(path)
    }

    fn experts(
        &self,
        path: &str,
        projection: Projection,
        num_experts: usize,
        shape: [usize; 2],
    ) -> Result<Vec<Matrix<'_>>> {
        let experts = self.inner.experts(path, projection, num_experts, shape)?;
        if !self.is_mtp(path) {
            return Ok(experts);
        }
        experts.into_par_iter().map(|matrix| coarser(matrix, LAYER)).collect()
    }

    fn expert_biases(&self, path: &str, projection: Projection, rows: usize) -> Result<Option<Vec<f32>>> {
        self.inner.expert_biases(path, projection, rows)
    }

    fn mla_kv_b(&self, path: &str, shape: MlaShape) -> Result<KvB<'_>> {
        self.inner.mla_kv_b(path, shape)
    }

    fn fused_kv_b_format(&self, path: &str, shape: MlaShape) -> Result<Option<WeightFormat>> {
        self.inner.fused_kv_b_format(path, shape)
    }

    fn has(&self, name: &str) -> bool {
        match name.strip_suffix(".weight") {
            Some(DRAFT_HEAD) => self.prefixes.iter().any(|prefix| self.inner.has(&format!("{prefix}eh_proj.weight"))),
            _ => self.inner.has(name),
        }
    }

    fn release(&self, matrix: &MatrixView<'_>) {
        self.inner.release(matrix);
    }
}
