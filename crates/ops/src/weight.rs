//! Weights as the back end holds them (handles) and as a model hands them over (views of a checkpoint).

use crate::Result;
use crate::backend::WeightFormatSet;
use crate::error::{expect, expect_eq};
use moellon_tensor::{MatrixView, WeightFormat};

/// One or several matrices `[rows, cols]` of one format: a linear layer (`count` 1) or one matrix a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Weight {
    /// The back end's number for it.
    pub id: u32,
    /// How it is coded.
    pub format: WeightFormat,
    /// Matrices.
    pub count: usize,
    /// Output features of each.
    pub rows: usize,
    /// Input features of each.
    pub cols: usize,
    /// Whether a bias `[count * rows]` is added to the output.
    pub has_bias: bool,
}

impl Weight {
    /// Bytes of all matrices, scales included.
    pub fn size_bytes(&self) -> u64 {
        self.count as u64 * self.format.matrix_bytes(self.rows, self.cols)
    }
}

/// What a [`Weight`] is loaded from.
#[derive(Debug, Clone)]
pub struct WeightSource<'a> {
    /// Name for messages, e.g. `model.layers.3.self_attn.q_a_proj`.
    pub name: &'a str,
    /// The matrices, all of one shape and format.
    pub matrices: &'a [MatrixView<'a>],
    /// `[count * rows]`, added to the output.
    pub bias: Option<&'a [f32]>,
}

impl WeightSource<'_> {
    /// Checks that the matrices agree and returns the handle's description with `id`.
    ///
    /// # Errors
    /// If there is no matrix, or shapes, formats or the bias disagree.
    pub fn describe(&self, id: u32) -> Result<Weight> {
        let (format, rows, cols) = same_shape("load_weight", self.name, self.matrices)?;
        if let Some(bias) = self.bias {
            expect_eq("load_weight", format_args!("bias of {}", self.name), bias.len(), self.matrices.len() * rows)?;
        }
        Ok(Weight { id, format, count: self.matrices.len(), rows, cols, has_bias: self.bias.is_some() })
    }
}

/// The routed experts of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Experts {
    /// The back end's number for them.
    pub id: u32,
    /// How many there are (after pruning; layers may differ).
    pub num_experts: usize,
    /// Input features of gate and up, output features of down.
    pub hidden_size: usize,
    /// Output features of gate and up, input features of down (`moe_intermediate_size`).
    pub intermediate_size: usize,
    /// Format of the gate matrices.
    pub gate_format: WeightFormat,
    /// Format of the up matrices.
    pub up_format: WeightFormat,
    /// Format of the down matrices.
    pub down_format: WeightFormat,
}

impl Experts {
    /// Bytes of gate and up of one expert.
    pub fn gate_up_bytes(&self) -> u64 {
        self.gate_format.matrix_bytes(self.intermediate_size, self.hidden_size)
            + self.up_format.matrix_bytes(self.intermediate_size, self.hidden_size)
    }

    /// Bytes of down of one expert.
    pub fn down_bytes(&self) -> u64 {
        self.down_format.matrix_bytes(self.hidden_size, self.intermediate_size)
    }
}

/// What [`Experts`] are loaded from: one matrix an expert in each list.
#[derive(Debug, Clone)]
pub struct ExpertsSource<'a> {
    /// Name for messages, e.g. `model.layers.3.mlp.experts`.
    pub name: &'a str,
    /// `[num_experts]` matrices `[intermediate_size, hidden_size]`.
    pub gate: &'a [MatrixView<'a>],
    /// `[num_experts]` matrices `[intermediate_size, hidden_size]`.
    pub up: &'a [MatrixView<'a>],
    /// `[num_experts]` matrices `[hidden_size, intermediate_size]`.
    pub down: &'a [MatrixView<'a>],
    /// `[num_experts * intermediate_size]` each, and `[num_experts * hidden_size]`: gate, up and down biases (gpt-oss).
    pub biases: Option<[&'a [f32]; 3]>,
}

impl ExpertsSource<'_> {
    /// Checks that the matrices agree and returns the handle's description with `id`.
    ///
    /// # Errors
    /// If counts, shapes, formats or biases disagree.
    pub fn describe(&self, id: u32) -> Result<Experts> {
        let op = "load_experts";
        let (gate_format, intermediate_size, hidden_size) = same_shape(op, self.name, self.gate)?;
        let (up_format, up_rows, up_cols) = same_shape(op, self.name, self.up)?;
        let (down_format, down_rows, down_cols) = same_shape(op, self.name, self.down)?;
        let num_experts = self.gate.len();
        expect_eq(
            op,
            format_args!("{}: [gate, up, down] matrices", self.name),
            [self.up.len(), self.down.len()],
            [num_experts; 2],
        )?;
        expect_eq(
            op,
            format_args!("{}: shape of up", self.name),
            [up_rows, up_cols],
            [intermediate_size, hidden_size],
        )?;
        expect_eq(
            op,
            format_args!("{}: shape of down", self.name),
            [down_rows, down_cols],
            [hidden_size, intermediate_size],
        )?;
        if let Some([gate, up, down]) = self.biases {
            let found = [gate.len(), up.len(), down.len()];
            let expected =
                [num_experts * intermediate_size, num_experts * intermediate_size, num_experts * hidden_size];
            expect_eq(op, format_args!("{}: lengths of the biases", self.name), found, expected)?;
        }
        Ok(Experts { id, num_experts, hidden_size, intermediate_size, gate_format, up_format, down_format })
    }
}

fn same_shape(op: &'static str, name: &str, matrices: &[MatrixView<'_>]) -> Result<(WeightFormat, usize, usize)> {
    expect(op, !matrices.is_empty(), format_args!("number of matrices of {name}"), 0, "at least 1")?;
    let first = (matrices[0].format, matrices[0].rows, matrices[0].cols);
    for (index, matrix) in matrices.iter().enumerate() {
        expect_eq(
            op,
            format_args!("{name}: format and shape of matrix {index}"),
            (matrix.format, matrix.rows, matrix.cols),
            first,
        )?;
    }
    Ok(first)
}

/// Checks a weight's format against what a back end takes.
///
/// # Errors
/// [`crate::Error::UnsupportedFormat`], naming weight and formats.
pub fn check_format(backend: &'static str, takes: WeightFormatSet, name: &str, format: WeightFormat) -> Result<()> {
    if takes.contains(format) {
        return Ok(());
    }
    Err(crate::Error::UnsupportedFormat {
        backend,
        weight: name.to_owned(),
        format: format.to_string(),
        takes: takes.to_string(),
    })
}
