//! Rotary position embedding: one table a step, then rotations in place.

use crate::Result;
use crate::buffer::Tensor;
use crate::conformance::{Case, Tolerance, floats, normal_rows, upload, upload_ids, upload_row, zeros};
use crate::error::expect;
use crate::reference::Memory;

/// Cosines and sines of a step's positions, computed once and used by every layer:
/// `table[t] = [cos(p * inverse_frequencies) * scale | sin(..) * scale]`.
#[derive(Debug, Clone, Copy)]
pub struct RopeTable {
    /// `[1, num_tokens]` u32.
    pub positions: Tensor,
    /// `[1, dim / 2]`; yarn and the like are already in them.
    pub inverse_frequencies: Tensor,
    /// Factor on cosine and sine (yarn's attention factor), 1.0 otherwise.
    pub scale: f32,
    /// `[num_tokens, dim]`.
    pub table: Tensor,
}

impl RopeTable {
    /// Checks the contract.
    ///
    /// # Errors
    /// [`crate::Error::Contract`], naming the argument.
    pub fn validate(&self) -> Result<()> {
        let op = "rope_table";
        self.positions.check_u32(op, "positions", [1, self.positions.cols])?;
        self.inverse_frequencies.check_f32(op, "inverse_frequencies", [1, self.table.cols / 2])?;
        self.table.check_f32(op, "table", [self.positions.cols, self.inverse_frequencies.cols * 2])
    }

    /// Bytes that must be moved.
    pub fn bytes(&self) -> u64 {
        (self.table.rows * self.table.cols * 4) as u64
    }

    pub(crate) fn reference(&self, memory: &mut Memory) {
        let inverse_frequencies = memory.row(self.inverse_frequencies);
        // The angle is rounded to f32 as in transformers: that rounding is part of the model.
        let angles = |p: u32| inverse_frequencies.iter().map(move |f| f64::from(p as f32 * f)).collect::<Vec<f64>>();
        let row = |p: u32| {
            let angles = angles(p);
            let cos = angles.iter().map(|a| a.cos() as f32 * self.scale);
            cos.chain(angles.iter().map(|a| a.sin() as f32 * self.scale)).collect()
        };
        let rows: Vec<Vec<f32>> = memory.ids(self.positions)[0].iter().map(|p| row(*p)).collect();
        memory.set_rows(self.table, &rows);
    }
}

/// Which two elements of a head rotate together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopePairs {
    /// `(2i, 2i + 1)` (GLM-5, DeepSeek's main attention).
    Interleaved,
    /// `(i, i + dim / 2)` (Llama, Qwen, gpt-oss, DeepSeek-V3.2's indexer).
    HalfSplit,
}

/// Rotates `dim` columns of every head in place; pairs stay where they are. Head `h` starts at column `h * head_stride`.
#[derive(Debug, Clone, Copy)]
pub struct Rope {
    /// `[num_tokens, >= (num_heads - 1) * head_stride + dim]`, updated; slice columns to skip a part before the first head.
    pub x: Tensor,
    /// Heads.
    pub num_heads: usize,
    /// Columns between the starts of two heads.
    pub head_stride: usize,
    /// `[num_tokens, dim]` from [`RopeTable`].
    pub table: Tensor,
    /// Which elements rotate together.
    pub pairs: RopePairs,
}

impl Rope {
    /// Checks the contract.
    ///
    /// # Errors
    /// [`crate::Error::Contract`], naming the argument.
    pub fn validate(&self) -> Result<()> {
        let op = "rope";
        self.x.check_f32(op, "x", [self.x.rows, self.x.cols])?;
        self.table.check_f32(op, "table", [self.x.rows, self.table.cols])?;
        expect(op, self.num_heads > 0, "num_heads", self.num_heads, "at least 1")?;
        expect(op, self.table.cols.is_multiple_of(2), "columns of the table", self.table.cols, "an even number")?;
        let needed = (self.num_heads - 1) * self.head_stride + self.table.cols;
        expect(op, self.x.cols >= needed, "columns of x", self.x.cols, format_args!("at least {needed}"))
    }

    /// Bytes that must be moved.
    pub fn bytes(&self) -> u64 {
        (self.x.rows * self.table.cols * (2 * self.num_heads + 1) * 4) as u64
    }

    pub(crate) fn reference(&self, memory: &mut Memory) {
        let table = memory.rows(self.table);
        let mut x = memory.rows(self.x);
        let half = self.table.cols / 2;
        for (row, table) in x.iter_mut().zip(&table) {
            for head in 0..self.num_heads {
                for i in 0..half {
                    let (a, b) = match self.pairs {
                        RopePairs::Interleaved => (2 * i, 2 * i + 1),
                        RopePairs::HalfSplit => (i, i + half),
                    };
                    let (a, b) = (head * self.head_stride + a, head * self.head_stride + b);
                    let (cos, sin) = (f64::from(table[i]), f64::from(table[half + i]));
                    let (xa, xb) = (f64::from(row[a]), f64::from(row[b]));
                    (row[a], row[b]) = ((xa * cos - xb * sin) as f32, (xb * cos + xa * sin) as f32);
                }
            }
        }
        memory.set_rows(self.x, &x);
    }
}

pub(crate) fn cases() -> Vec<Case> {
    let positions = [0u32, 1, 63, 4095, 1_000_000];
    let case = |pairs: RopePairs, heads: usize, head_stride: usize, dim: usize, first: usize| {
        let name = format!("{pairs:?}, {heads} heads of {head_stride}, {dim} columns from {first}");
        // An f32 angle of a million radians: the sine's own error is that of the argument reduction, far below 64 terms.
        Case::new("rope", name, positions.len(), Tolerance::exact(64), move |backend, picked| {
            let inverse: Vec<f32> = (0..dim / 2).map(|i| 8e6f32.powf(-2.0 * i as f32 / dim as f32)).collect();
            let inverse_frequencies = upload_row(backend, &inverse)?;
            let pos = upload_ids(backend, &[picked.iter().map(|r| positions[*r]).collect()])?;
            let table = zeros(backend, picked.len(), dim)?;
            backend.rope_table(&RopeTable { positions: pos, inverse_frequencies, scale: 1.25, table })?;
            let width = heads * head_stride;
            let x = upload(backend, &normal_rows(14, positions.len(), width), picked)?;
            backend.rope(&Rope { x: x.columns(first, width - first), num_heads: heads, head_stride, table, pairs })?;
            Ok(vec![floats(backend, "table", table)?, floats(backend, "x", x)?])
        })
    };
    vec![
        case(RopePairs::Interleaved, 4, 48, 16, 32),
        case(RopePairs::HalfSplit, 3, 64, 64, 0),
        case(RopePairs::HalfSplit, 2, 32, 16, 0),
        case(RopePairs::Interleaved, 1, 64, 64, 0),
    ]
}
