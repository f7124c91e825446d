//! The up-projections of multi-head latent attention, per head and ready for the absorbed form.

use crate::{Checkpoint, Error, Matrix, Result};
use moellon_tensor::{MatrixView, OwnedMatrix, ScaleDtype, WeightFormat};

/// `kv_b_proj`, split by head.
#[derive(Debug, Clone)]
pub struct MlaKvB<'a> {
    /// One `[kv_lora_rank, qk_nope_head_dim]` a head: takes a query's nope part into latent space.
    pub embed_q: Vec<Matrix<'a>>,
    /// One `[v_head_dim, kv_lora_rank]` a head: takes attended latents to values.
    pub unembed_out: Vec<Matrix<'a>>,
}

/// Sizes of one layer's MLA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MlaShape {
    /// `num_attention_heads`.
    pub num_heads: usize,
    /// `qk_nope_head_dim`.
    pub qk_nope_head_dim: usize,
    /// `v_head_dim`.
    pub v_head_dim: usize,
    /// `kv_lora_rank`.
    pub kv_lora_rank: usize,
}

impl Checkpoint {
    /// Reads `<path>.kv_b_proj` (Hugging Face: `[heads * (nope + v), rank]`, per head the nope rows first) or
    /// `<path>.embed_q` and `<path>.unembed_out` (MLX: `[heads, rank, nope]` and `[heads, v, rank]`).
    ///
    /// From `kv_b_proj` the matrices of `unembed_out` are row views; those of `embed_q` are transposed copies: bf16 or
    /// f16 where the source is, f32 otherwise (quantized sources: a transposed group cannot be kept, and rounding the
    /// decoded values again would change them).
    ///
    /// # Errors
    /// As [`Checkpoint::linear`]; also if both conventions are there.
    pub fn mla_kv_b(&self, path: &str, shape: MlaShape) -> Result<MlaKvB<'_>> {
        let MlaShape { num_heads, qk_nope_head_dim: nope, v_head_dim: v, kv_lora_rank: rank } = shape;
        if [num_heads, nope, v, rank].contains(&0) {
            return Err(Error::module(
                path,
                "MLA sizes that the config asks for",
                format!("{shape:?}"),
                "positive sizes",
            ));
        }
        let (fused_path, embed_path) = (format!("{path}.kv_b_proj"), format!("{path}.embed_q"));
        if !self.has_weight(&embed_path) {
            let rows = nope
                .checked_add(v)
                .and_then(|rows| rows.checked_mul(num_heads))
                .ok_or_else(|| Error::module(&fused_path, "heads", num_heads, "a size that fits memory"))?;
            let matrix = self.linear(&fused_path, [rows, rank])?;
            let fused = matrix.view();
            let head = |head: usize| head * (nope + v);
            return Ok(MlaKvB {
                embed_q: (0..num_heads)
                    .map(|h| Matrix::Owned(transposed(&fused.row_range(head(h)..head(h) + nope))))
                    .collect(),
                unembed_out: (0..num_heads).map(|h| matrix.row_range(head(h) + nope..head(h + 1))).collect(),
            });
        }
        if self.has_weight(&fused_path) {
            return Err(Error::module(&fused_path, "conventions", "kv_b_proj and embed_q", "one of them"));
        }
        let stacked = |name: &str, shape| {
            let path = format!("{path}.{name}");
            let views = self.stacked_opt(&path, num_heads, shape)?;
            let views = views.ok_or_else(|| {
                crate::checkpoint::missing(self.dir(), &format!("{path}.weight"), "it beside embed_q")
            })?;
            Ok(views.into_iter().map(Matrix::Borrowed).collect())
        };
        Ok(MlaKvB { embed_q: stacked("embed_q", [rank, nope])?, unembed_out: stacked("unembed_out", [v, rank])? })
    }
}

/// The transpose of a matrix, in the narrowest plain type that holds it exactly.
pub(crate) fn transposed(matrix: &MatrixView<'_>) -> OwnedMatrix {
    let dtype = match matrix.format {
        WeightFormat::Bf16 => ScaleDtype::Bf16,
        WeightFormat::F16 => ScaleDtype::F16,
        WeightFormat::F32
        | WeightFormat::Fp8Block { .. }
        | WeightFormat::Affine { .. }
        | WeightFormat::Mxfp4
        | WeightFormat::Mxfp8
        | WeightFormat::Nvfp4 => ScaleDtype::F32,
    };
    let (rows, cols) = (matrix.rows, matrix.cols);
    let decoded = matrix.decode_all();
    let values: Vec<f32> = (0..cols)
        .flat_map(|col| (0..rows).map(move |row| (row, col)))
        .map(|(row, col)| decoded[row * cols + col])
        .collect();
    OwnedMatrix::plain(dtype, [cols, rows], &values)
}
