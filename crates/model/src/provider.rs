//! Where weights come from: a checkpoint, or nowhere (random weights of the exact shapes, for benchmarks).

use crate::Result;
use moellon_checkpoint::{Checkpoint, Matrix, MlaShape, Projection};
use moellon_tensor::{MatrixView, WeightFormat};

/// MLA's `kv_b_proj` as one matrix a head.
pub struct KvB<'a> {
    /// `[num_heads]` matrices `[kv_lora_rank, qk_nope_head_dim]`.
    pub embed_q: Vec<Matrix<'a>>,
    /// `[num_heads]` matrices `[v_head_dim, kv_lora_rank]`.
    pub unembed_out: Vec<Matrix<'a>>,
}

/// Weights by module name, in the names of Hugging Face checkpoints.
pub trait WeightProvider {
    /// The weight `[rows, cols]` of a linear layer.
    ///
    /// # Errors
    /// If it is missing or does not fit.
    fn linear(&self, path: &str, shape: [usize; 2]) -> Result<Matrix<'_>>;

    /// A vector of `len` floats.
    ///
    /// # Errors
    /// If it is missing or does not fit.
    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>>;

    /// Experts of the block `path`.
    ///
    /// # Errors
    /// If they cannot be counted.
    fn num_experts(&self, path: &str) -> Result<usize>;

    /// One projection of all experts of the block `path`.
    ///
    /// # Errors
    /// If one is missing or does not fit.
    fn experts(
        &self,
        path: &str,
        projection: Projection,
        num_experts: usize,
        shape: [usize; 2],
    ) -> Result<Vec<Matrix<'_>>>;

    /// Biases `[num_experts * rows]` of one projection; `None` where experts have none.
    ///
    /// # Errors
    /// If they do not fit.
    fn expert_biases(&self, path: &str, projection: Projection, rows: usize) -> Result<Option<Vec<f32>>>;

    /// MLA's `kv_b_proj`.
    ///
    /// # Errors
    /// If it is missing or does not fit.
    fn mla_kv_b(&self, path: &str, shape: MlaShape) -> Result<KvB<'_>>;

    /// Format of a fused `kv_b_proj`, `None` where the two sides are stored apart. Lets a description skip the transposition
    /// that [`WeightProvider::mla_kv_b`] makes.
    ///
    /// # Errors
    /// If it does not fit.
    fn fused_kv_b_format(&self, path: &str, shape: MlaShape) -> Result<Option<WeightFormat>>;

    /// Whether a tensor exists.
    fn has(&self, name: &str) -> bool;

    /// Tokens whose rows the drafts' own head has, ascending; `None` for all.
    fn draft_tokens(&self) -> Option<&[u32]> {
        None
    }

    /// Says that matrices were repacked and their bytes are not needed any more.
    fn release(&self, matrices: &[MatrixView<'_>]);
}

impl WeightProvider for Checkpoint {
    fn linear(&self, path: &str, shape: [usize; 2]) -> Result<Matrix<'_>> {
        Ok(Checkpoint::linear(self, path, shape)?)
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        Ok(Checkpoint::vector(self, name, len)?)
    }

    fn num_experts(&self, path: &str) -> Result<usize> {
        Ok(Checkpoint::num_experts(self, path)?)
    }

    fn experts(
        &self,
        path: &str,
        projection: Projection,
        num_experts: usize,
        shape: [usize; 2],
    ) -> Result<Vec<Matrix<'_>>> {
        Ok(Checkpoint::experts(self, path, projection, Some(num_experts), shape)?)
    }

    fn expert_biases(&self, path: &str, projection: Projection, rows: usize) -> Result<Option<Vec<f32>>> {
        Ok(Checkpoint::expert_biases(self, path, projection, rows)?)
    }

    fn mla_kv_b(&self, path: &str, shape: MlaShape) -> Result<KvB<'_>> {
        let moellon_checkpoint::MlaKvB { embed_q, unembed_out } = Checkpoint::mla_kv_b(self, path, shape)?;
        Ok(KvB { embed_q, unembed_out })
    }

    fn fused_kv_b_format(&self, path: &str, shape: MlaShape) -> Result<Option<WeightFormat>> {
        let rows = shape.num_heads * (shape.qk_nope_head_dim + shape.v_head_dim);
        Ok(self.linear_opt(&format!("{path}.kv_b_proj"), [rows, shape.kv_lora_rank])?.map(|fused| fused.view().format))
    }

    fn has(&self, name: &str) -> bool {
        self.tensor(name).is_some()
    }

    fn release(&self, matrices: &[MatrixView<'_>]) {
        self.release_matrices(matrices);
    }
}
