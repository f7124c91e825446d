//! Weights as this back end holds them.

use crate::layout::TILE_ROWS;
use crate::pack::{PackedMatrices, PackedPairs};
use moellon_ops::{Error, Experts, ExpertsSource, Result, Weight, WeightSource};
use moellon_tensor::arena::free_memory_bytes;
use moellon_tensor::pool::Pool;
use moellon_tensor::{MatrixView, WeightFormat};

/// A linear layer, or one matrix a head.
pub(crate) struct LoadedWeight {
    pub(crate) packed: PackedMatrices,
    /// `[count][tiles * 16]`, padded with zeros.
    pub(crate) bias: Option<Bias>,
}

/// The experts of one layer.
pub(crate) struct LoadedExperts {
    /// `[num_experts]` pairs of `[intermediate_size, hidden_size]`.
    pub(crate) gate_up: PackedPairs,
    /// `[num_experts]` matrices `[hidden_size, intermediate_size]`.
    pub(crate) down: PackedMatrices,
    /// Of gate, up and down.
    pub(crate) biases: Option<[Bias; 3]>,
}

/// Biases padded to whole tiles.
pub(crate) struct Bias {
    values: Vec<f32>,
    per_matrix: usize,
}

impl Bias {
    fn new(values: &[f32], rows: usize) -> Self {
        let per_matrix = rows.next_multiple_of(TILE_ROWS);
        let mut padded = vec![0.0; values.len() / rows * per_matrix];
        for (to, from) in padded.chunks_exact_mut(per_matrix).zip(values.chunks_exact(rows)) {
            to[..rows].copy_from_slice(from);
        }
        Bias { values: padded, per_matrix }
    }

    /// The 16 biases of a tile.
    pub(crate) fn tile(&self, matrix: usize, tile: usize) -> &[f32; TILE_ROWS] {
        let start = matrix * self.per_matrix + tile * TILE_ROWS;
        self.values[start..].first_chunk().expect("biases are padded to whole tiles")
    }

    /// Adds the biases of a tile to its outputs.
    pub(crate) fn add_to(&self, matrix: usize, tile: usize, values: &mut [f32; TILE_ROWS]) {
        for (value, bias) in values.iter_mut().zip(self.tile(matrix, tile)) {
            *value += bias;
        }
    }
}

/// Refuses what kernels cannot read, before any of it is packed.
fn check(name: &str, matrices: &[MatrixView<'_>]) -> Result<()> {
    for (index, matrix) in matrices.iter().enumerate() {
        matrix.format.validate(matrix.cols)?;
        if let WeightFormat::Fp8Block { block_cols, .. } = matrix.format
            && !block_cols.is_multiple_of(4)
            && (block_cols as usize) < matrix.cols
        {
            return Err(Error::Contract {
                op: "load",
                what: format!("columns of an FP8 block of {name}"),
                found: block_cols.to_string(),
                expected: "a multiple of 4".to_owned(),
            });
        }
        // Kernels read scales of NaN as numbers, so they must not come this far.
        matrix.check_finite().map_err(|error| match index {
            _ if matrices.len() == 1 => Error::Tensor(error),
            _ => Error::Contract {
                op: "load",
                what: format!("{name}, matrix {index}"),
                found: error.to_string(),
                expected: "finite weights".to_owned(),
            },
        })?;
    }
    Ok(())
}

/// Refuses what does not fit, before pages are touched: a system that overcommits would kill the process instead.
fn check_memory(name: &str, needed_bytes: u64) -> Result<()> {
    match free_memory_bytes() {
        Some(free_bytes) if needed_bytes > free_bytes => Err(out_of_memory(name, needed_bytes)),
        Some(_) | None => Ok(()),
    }
}

/// The error of memory that ran out.
pub(crate) fn out_of_memory(what: &str, needed_bytes: u64) -> Error {
    Error::OutOfMemory {
        backend: "cpu",
        what: what.to_owned(),
        needed_bytes,
        free_bytes: free_memory_bytes().unwrap_or(0),
    }
}

impl LoadedWeight {
    pub(crate) fn load(pool: &Pool, source: &WeightSource<'_>, weight: &Weight) -> Result<Self> {
        check(source.name, source.matrices)?;
        check_memory(source.name, weight.size_bytes())?;
        let packed =
            PackedMatrices::pack(pool, source.matrices).map_err(|_| out_of_memory(source.name, weight.size_bytes()))?;
        Ok(LoadedWeight { packed, bias: source.bias.map(|bias| Bias::new(bias, weight.rows)) })
    }
}

impl LoadedExperts {
    pub(crate) fn load(pool: &Pool, source: &ExpertsSource<'_>, experts: &Experts) -> Result<Self> {
        for (part, matrices) in [("gate", source.gate), ("up", source.up), ("down", source.down)] {
            check(&format!("{} {part}", source.name), matrices)?;
        }
        let bytes = experts.num_experts as u64 * (experts.gate_up_bytes() + experts.down_bytes());
        check_memory(source.name, bytes)?;
        let no_memory = |_| out_of_memory(source.name, bytes);
        let rows = [experts.intermediate_size, experts.intermediate_size, experts.hidden_size];
        Ok(LoadedExperts {
            gate_up: PackedPairs::pack(pool, source.gate, source.up).map_err(no_memory)?,
            down: PackedMatrices::pack(pool, source.down).map_err(no_memory)?,
            biases: source
                .biases
                .map(|b| [Bias::new(b[0], rows[0]), Bias::new(b[1], rows[1]), Bias::new(b[2], rows[2])]),
        })
    }
}
