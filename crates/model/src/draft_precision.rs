//! Cheaper weights for what only drafts. A draft is checked by the model itself, so the MTP layer may be stored more coarsely
//! than the checkpoint has it: plain floats become 8-bit codes, and drafts get a head of their own, with 4 bits and, where the
//! vocabulary is large, with the rows of the frequent tokens alone. That makes drafting a fraction of what it costs with the
//! stored weights, and no output depends on it.

use crate::config::ModelConfig;
use crate::provider::WeightProvider;
use crate::{Error, Result};
use moellon_checkpoint::{Matrix, Projection};
use moellon_tensor::encode::{EncodeOptions, GlobalScale, encode_matrix};
use moellon_tensor::{MatrixView, OwnedMatrix, ScaleDtype, WeightFormat};
use rayon::prelude::*;

/// Module name of the drafts' own head.
pub(crate) const DRAFT_HEAD: &str = "draft_head";

const LAYER: WeightFormat = WeightFormat::Affine { bits: 8, group: 64, scale: ScaleDtype::Bf16 };
const HEAD: WeightFormat = WeightFormat::Affine { bits: 4, group: 64, scale: ScaleDtype::Bf16 };

/// Tokens of a drafting head, where a model has more than twice as many.
pub const DRAFT_TOKENS: usize = 32_768;

/// Of them the last ones of the vocabulary: what a chat template and tools need.
const LAST_TOKENS: usize = 1024;

/// Which tokens a model's drafts are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DraftVocabulary {
    /// All, or [`DRAFT_TOKENS`] of a vocabulary more than twice as large.
    #[default]
    Auto,
    /// All of them.
    All,
    /// So many.
    Tokens(usize),
}

impl DraftVocabulary {
    /// The tokens by ascending number; `None` for all. Byte-pair encodings number their tokens in the order in which they
    /// were merged, the frequent ones first, and special tokens last.
    pub fn tokens(self, vocab_size: usize) -> Option<Vec<u32>> {
        let count = match self {
            DraftVocabulary::All => vocab_size,
            DraftVocabulary::Auto if vocab_size > 2 * DRAFT_TOKENS => DRAFT_TOKENS,
            DraftVocabulary::Auto => vocab_size,
            DraftVocabulary::Tokens(count) => count,
        };
        if count >= vocab_size {
            return None;
        }
        let last = LAST_TOKENS.min(count / 4);
        let ids = |range: std::ops::Range<usize>| range.map(|id| id as u32);
        Some(ids(0..count - last).chain(ids(vocab_size - last..vocab_size)).collect())
    }
}

/// A provider whose MTP layers are stored more coarsely, with a head for drafts.
pub struct DraftPrecision<'a> {
    inner: &'a dyn WeightProvider,
    /// Prefixes of the MTP layers' modules.
    prefixes: Vec<String>,
    /// Module of the head that drafts share with the model.
    head: &'static str,
    vocab_size: usize,
    /// Tokens of the drafts' head; `None` for all.
    tokens: Option<Vec<u32>>,
}

impl<'a> DraftPrecision<'a> {
    /// Over the weights of a model with this config.
    pub fn new(config: &ModelConfig, vocabulary: DraftVocabulary, inner: &'a dyn WeightProvider) -> Self {
        let layers = config.layers.len()..config.layers.len() + config.num_mtp_layers;
        let tied = config.tie_word_embeddings && !inner.has("lm_head.weight");
        DraftPrecision {
            inner,
            prefixes: layers.map(|layer| format!("model.layers.{layer}.")).collect(),
            head: if tied { "model.embed_tokens" } else { "lm_head" },
            vocab_size: config.vocab_size,
            tokens: vocabulary.tokens(config.vocab_size),
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

/// Some rows of a matrix, in its own format; as plain floats where rows share scales.
fn rows_of(view: &MatrixView<'_>, rows: &[u32]) -> Result<OwnedMatrix> {
    let shares_scales = matches!(view.format, WeightFormat::Fp8Block { .. });
    let format = if shares_scales { WeightFormat::F32 } else { view.format };
    let mut picked = OwnedMatrix::zeroed(format, [rows.len(), view.cols]).map_err(moellon_ops::Error::from)?;
    picked.global_scale = if shares_scales { 1.0 } else { view.global_scale };
    if shares_scales {
        for (row, out) in rows.iter().zip(picked.codes.chunks_exact_mut(4 * view.cols)) {
            let values = view.row_range(*row as usize..*row as usize + 1).decode_all();
            out.chunks_exact_mut(4).zip(values).for_each(|(out, value)| out.copy_from_slice(&value.to_le_bytes()));
        }
        return Ok(picked);
    }
    for (part, out) in
        [(view.codes, &mut picked.codes), (view.scales, &mut picked.scales), (view.offsets, &mut picked.offsets)]
    {
        let row_bytes = part.row_bytes();
        for (row, out) in rows.iter().zip(out.chunks_exact_mut(row_bytes.max(1))) {
            out.copy_from_slice(part.row(*row as usize));
        }
    }
    Ok(picked)
}

impl WeightProvider for DraftPrecision<'_> {
    crate::forward_weights!(inner: vector num_experts expert_biases mla_kv_b fused_kv_b_format release);

    fn linear(&self, path: &str, shape: [usize; 2]) -> Result<Matrix<'_>> {
        if path == DRAFT_HEAD {
            let whole = self.inner.linear(self.head, [self.vocab_size, shape[1]])?;
            return match &self.tokens {
                Some(tokens) => coarser(Matrix::Owned(rows_of(&whole.view(), tokens)?), HEAD),
                None => coarser(whole, HEAD),
            };
        }
        let matrix = self.inner.linear(path, shape)?;
        // A router is small, and its choices are worth their bits.
        let is_router = path.ends_with(".gate") || path.ends_with(".router");
        if self.is_mtp(path) && !is_router { coarser(matrix, LAYER) } else { Ok(matrix) }
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

    fn has(&self, name: &str) -> bool {
        match name.strip_suffix(".weight") {
            Some(DRAFT_HEAD) => self.prefixes.iter().any(|prefix| self.inner.has(&format!("{prefix}eh_proj.weight"))),
            _ => self.inner.has(name),
        }
    }

    fn draft_tokens(&self) -> Option<&[u32]> {
        self.tokens.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_vocabularies_are_cut_to_their_frequent_and_special_tokens() {
        assert_eq!(DraftVocabulary::Auto.tokens(4096), None);
        assert_eq!(DraftVocabulary::All.tokens(154_880), None);
        let tokens = DraftVocabulary::Auto.tokens(154_880).expect("it is large");
        assert_eq!(tokens.len(), DRAFT_TOKENS);
        assert!(tokens.windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!((tokens[0], tokens[31_743], tokens[31_744], tokens[32_767]), (0, 31_743, 153_856, 154_879));
        assert_eq!(DraftVocabulary::Tokens(8).tokens(10), Some(vec![0, 1, 2, 3, 4, 5, 8, 9]));
    }

    #[test]
    fn rows_are_picked_as_they_are() {
        let blocks = WeightFormat::Fp8Block { block_rows: 2, block_cols: 4 };
        for format in [WeightFormat::Bf16, LAYER, HEAD, WeightFormat::Nvfp4, blocks] {
            let matrix = OwnedMatrix::random(format, [6, 64], 0.1, 3).expect("the shape is legal");
            let picked = rows_of(&matrix.view(), &[1, 5]).expect("there is memory");
            let (all, found) = (matrix.view().decode_all(), picked.view().decode_all());
            assert_eq!(found, [&all[64..128], &all[320..384]].concat(), "{format}");
        }
    }
}
