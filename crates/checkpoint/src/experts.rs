//! Routed experts: one projection of all experts of a layer, from every layout that checkpoints use.
//!
//! | layout | tensors below the block's path |
//! |---|---|
//! | per expert | `experts.E.gate_proj.*` (`up_proj`, `down_proj`), in every format of a linear layer |
//! | Mixtral | `experts.E.w1.*` is gate, `w3` up, `w2` down |
//! | stacked (MLX) | `switch_mlp.gate_proj.*` or `experts.gate_proj.*`, with a leading dimension of experts |
//! | fused | `experts.gate_up_proj` `[E, 2I, H]`, gate rows first, and `experts.down_proj` `[E, H, I]` |
//! | gpt-oss | `experts.gate_up_proj` `[E, H, 2I]` and `down_proj` `[E, I, H]`, transposed; gate and up alternate |
//! | gpt-oss MXFP4 | `experts.gate_up_proj_blocks` `[E, 2I, H/32, 16]`, `_scales` `[E, 2I, H/32]`: gate is the even rows |
//!
//! The two layouts of `gate_up_proj` can have the same shape; gpt-oss is told by its `gate_up_proj_bias`.

use crate::checkpoint::missing;
use crate::mla::transposed;
use crate::vector::floats;
use crate::{Checkpoint, Error, Matrix, Result, TensorView};
use moellon_tensor::{Dtype, MatrixView, OwnedMatrix, WeightFormat};
use std::collections::BTreeSet;
use std::fmt;

/// One of the three matrices of an expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Projection {
    /// `[moe_intermediate_size, hidden_size]`, through the activation.
    Gate,
    /// `[moe_intermediate_size, hidden_size]`.
    Up,
    /// `[hidden_size, moe_intermediate_size]`.
    Down,
}

impl Projection {
    /// The name in most checkpoints.
    pub const fn name(self) -> &'static str {
        match self {
            Projection::Gate => "gate_proj",
            Projection::Up => "up_proj",
            Projection::Down => "down_proj",
        }
    }

    /// The name in Mixtral's checkpoints.
    const fn mixtral_name(self) -> &'static str {
        match self {
            Projection::Gate => "w1",
            Projection::Up => "w3",
            Projection::Down => "w2",
        }
    }
}

/// Which of the layouts a block has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layout {
    PerExpert,
    Mixtral,
    /// Below `switch_mlp` or `experts`.
    Stacked(&'static str),
    Fused,
    GptOss,
    GptOssMxfp4,
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Layout::PerExpert => f.write_str("experts.E.gate_proj"),
            Layout::Mixtral => f.write_str("experts.E.w1"),
            Layout::Stacked(below) => write!(f, "{below}.gate_proj"),
            Layout::Fused => f.write_str("experts.gate_up_proj"),
            Layout::GptOss => f.write_str("experts.gate_up_proj with gate_up_proj_bias"),
            Layout::GptOssMxfp4 => f.write_str("experts.gate_up_proj_blocks"),
        }
    }
}

impl Checkpoint {
    /// One projection of all routed experts of the block `path` (`model.layers.3.mlp`,
    /// `model.layers.3.block_sparse_moe`), each `[rows, cols]`. `num_experts` is a check; the tensors are counted.
    ///
    /// # Errors
    /// If there are no experts or one in the middle is missing, there are two layouts, there are others than
    /// `num_experts`, or as [`Checkpoint::linear`].
    pub fn experts(
        &self,
        path: &str,
        projection: Projection,
        num_experts: Option<usize>,
        shape: [usize; 2],
    ) -> Result<Vec<Matrix<'_>>> {
        if shape.contains(&0) {
            return Err(Error::module(
                path,
                "expert shape that the config asks for",
                format!("{shape:?}"),
                "positive dimensions",
            ));
        }
        let layout = self.expert_layout(path)?;
        let found = self.count_experts(path, layout)?;
        if num_experts.is_some_and(|expected| expected != found) {
            return Err(Error::module(path, "experts in the checkpoint", found, num_experts.unwrap_or_default()));
        }
        let name = projection.name();
        match layout {
            Layout::PerExpert => self.experts_one_by_one(path, name, found, shape),
            Layout::Mixtral => self.experts_one_by_one(path, projection.mixtral_name(), found, shape),
            Layout::Stacked(below) => {
                let path = format!("{path}.{below}.{name}");
                let views = self.stacked_opt(&path, found, shape)?;
                Ok(borrowed(views.ok_or_else(|| missing(self.dir(), &format!("{path}.weight"), "stacked experts"))?))
            }
            Layout::Fused => self.fused_experts(path, projection, found, shape).map(borrowed),
            Layout::GptOss => self.gpt_oss_experts(path, projection, found, shape),
            Layout::GptOssMxfp4 => self.gpt_oss_mxfp4_experts(path, projection, found, shape).map(borrowed),
        }
    }

    /// Routed experts of the block `path`, counted from its tensors; 0 if it has none (a dense layer).
    ///
    /// # Errors
    /// If one in the middle is missing or there are two layouts.
    pub fn num_experts(&self, path: &str) -> Result<usize> {
        match self.expert_layouts(path).as_slice() {
            [] => Ok(0),
            _ => self.count_experts(path, self.expert_layout(path)?),
        }
    }

    /// The biases of one projection, `[num_experts, rows]` flattened; `None` if the experts have none.
    ///
    /// # Errors
    /// If a tensor is not a float tensor of the right shape, has a NaN, or only some experts have a bias.
    pub fn expert_biases(&self, path: &str, projection: Projection, rows: usize) -> Result<Option<Vec<f32>>> {
        let layout = self.expert_layout(path)?;
        let count = self.count_experts(path, layout)?;
        match layout {
            Layout::PerExpert => self.expert_biases_one_by_one(path, projection.name(), count, rows),
            Layout::Mixtral => self.expert_biases_one_by_one(path, projection.mixtral_name(), count, rows),
            Layout::Stacked(below) => self
                .tensor(&format!("{path}.{below}.{}.bias", projection.name()))
                .map(|tensor| floats(&tensor, &[count, rows]))
                .transpose(),
            Layout::Fused => Ok(None),
            Layout::GptOss | Layout::GptOssMxfp4 => {
                let tensor = |name: &str| self.require(&format!("{path}.experts.{name}"));
                let first = match projection {
                    Projection::Down => return floats(&tensor("down_proj_bias")?, &[count, rows]).map(Some),
                    Projection::Gate => 0,
                    Projection::Up => 1,
                };
                let both = floats(&tensor("gate_up_proj_bias")?, &[count, doubled(path, rows)?])?;
                Ok(Some(both.into_iter().skip(first).step_by(2).collect()))
            }
        }
    }

    fn expert_layout(&self, path: &str) -> Result<Layout> {
        match self.expert_layouts(path).as_slice() {
            [layout] => Ok(*layout),
            [] => Err(missing(self.dir(), &format!("{path}: every expert"), "experts or switch_mlp below it")),
            several => {
                let found: Vec<String> = several.iter().map(Layout::to_string).collect();
                Err(Error::module(path, "layouts of its experts", found.join(" and "), "one"))
            }
        }
    }

    fn expert_layouts(&self, path: &str) -> Vec<Layout> {
        let has = |name: &str| self.tensor(&format!("{path}.experts.{name}")).is_some();
        let indexed = |name: &str| self.numbered_experts(path).any(|(_, rest)| rest.split('.').next() == Some(name));
        let gpt_oss = has("gate_up_proj_bias");
        [
            (Layout::PerExpert, indexed("gate_proj")),
            (Layout::Mixtral, indexed("w1")),
            (Layout::Stacked("switch_mlp"), self.has_weight(&format!("{path}.switch_mlp.gate_proj"))),
            (Layout::Stacked("experts"), self.has_weight(&format!("{path}.experts.gate_proj"))),
            (Layout::Fused, has("gate_up_proj") && !gpt_oss),
            (Layout::GptOss, has("gate_up_proj") && gpt_oss),
            (Layout::GptOssMxfp4, has("gate_up_proj_blocks")),
        ]
        .into_iter()
        .filter_map(|(layout, present)| present.then_some(layout))
        .collect()
    }

    /// Tensors `<path>.experts.<number>.<rest>` as `(number, rest)`.
    fn numbered_experts(&self, path: &str) -> impl Iterator<Item = (usize, &str)> {
        let prefix = format!("{path}.experts.");
        let len = prefix.len();
        self.names_under(prefix).filter_map(move |name| {
            let (number, rest) = name[len..].split_once('.')?;
            Some((number.parse().ok()?, rest))
        })
    }

    fn count_experts(&self, path: &str, layout: Layout) -> Result<usize> {
        let stacked = |tensor: &str| {
            let tensor = self.require(&format!("{path}.{tensor}"))?;
            match tensor.shape.first() {
                Some(&count) if count > 0 => Ok(count),
                _ => Err(tensor.wrong(
                    "shape",
                    format!("{:?}", tensor.shape),
                    "a leading dimension of at least 1 expert",
                )),
            }
        };
        match layout {
            Layout::PerExpert | Layout::Mixtral => {
                let numbers: BTreeSet<usize> = self.numbered_experts(path).map(|(number, _)| number).collect();
                let count = numbers.len();
                match numbers.iter().enumerate().find(|(at, number)| at != *number) {
                    Some((first_gap, _)) => {
                        let last = numbers.last().copied().unwrap_or_default();
                        let expected = format!("experts 0 to {last} without a gap");
                        Err(missing(self.dir(), &format!("{path}.experts.{first_gap}"), &expected))
                    }
                    None => Ok(count),
                }
            }
            Layout::Stacked(below) => {
                let module = format!("{below}.gate_proj");
                let packed = self.tensor(&format!("{path}.{module}.weight_packed")).is_some();
                stacked(&format!("{module}.{}", if packed { "weight_packed" } else { "weight" }))
            }
            Layout::Fused | Layout::GptOss => stacked("experts.gate_up_proj"),
            Layout::GptOssMxfp4 => stacked("experts.gate_up_proj_blocks"),
        }
    }

    fn experts_one_by_one(&self, path: &str, name: &str, count: usize, shape: [usize; 2]) -> Result<Vec<Matrix<'_>>> {
        (0..count).map(|expert| self.linear(&format!("{path}.experts.{expert}.{name}"), shape)).collect()
    }

    fn expert_biases_one_by_one(&self, path: &str, name: &str, count: usize, rows: usize) -> Result<Option<Vec<f32>>> {
        let bias = |expert: usize| format!("{path}.experts.{expert}.{name}.bias");
        if (0..count).all(|expert| self.tensor(&bias(expert)).is_none()) {
            return Ok(None);
        }
        let mut all = Vec::new();
        for expert in 0..count {
            all.extend(self.vector(&bias(expert), rows)?);
        }
        Ok(Some(all))
    }

    /// `[E, 2I, H]` with gate rows first, or `[E, H, I]`: plain floats.
    fn fused_experts(
        &self,
        path: &str,
        projection: Projection,
        count: usize,
        [rows, cols]: [usize; 2],
    ) -> Result<Vec<MatrixView<'_>>> {
        let (name, stored_rows, first_row) = match projection {
            Projection::Gate => ("gate_up_proj", doubled(path, rows)?, 0),
            Projection::Up => ("gate_up_proj", doubled(path, rows)?, rows),
            Projection::Down => ("down_proj", rows, 0),
        };
        let tensor = self.require(&format!("{path}.experts.{name}"))?;
        tensor.expect_shape(&[count, stored_rows, cols])?;
        let views = plain_stack(&tensor, count, [stored_rows, cols])?;
        Ok(views.iter().map(|view| view.row_range(first_row..first_row + rows)).collect())
    }

    /// `[E, H, 2I]` with alternating columns, or `[E, I, H]`: plain floats, input-major, so every expert is copied.
    fn gpt_oss_experts(
        &self,
        path: &str,
        projection: Projection,
        count: usize,
        [rows, cols]: [usize; 2],
    ) -> Result<Vec<Matrix<'_>>> {
        let (name, stored_cols, first_and_step) = match projection {
            Projection::Gate => ("gate_up_proj", doubled(path, rows)?, (0, 2)),
            Projection::Up => ("gate_up_proj", doubled(path, rows)?, (1, 2)),
            Projection::Down => ("down_proj", rows, (0, 1)),
        };
        let tensor = self.require(&format!("{path}.experts.{name}"))?;
        tensor.expect_shape(&[count, cols, stored_cols])?;
        let views = plain_stack(&tensor, count, [cols, stored_cols])?;
        Ok(views.iter().map(|view| Matrix::Owned(every_row(&transposed(view), first_and_step))).collect())
    }

    /// `[E, rows, cols / 32, 16]` blocks of two codes a byte with `[E, rows, cols / 32]` E8M0 scales.
    fn gpt_oss_mxfp4_experts(
        &self,
        path: &str,
        projection: Projection,
        count: usize,
        [rows, cols]: [usize; 2],
    ) -> Result<Vec<MatrixView<'_>>> {
        let (name, stored_rows, (first, step)) = match projection {
            Projection::Gate => ("gate_up_proj", doubled(path, rows)?, (0, 2)),
            Projection::Up => ("gate_up_proj", doubled(path, rows)?, (1, 2)),
            Projection::Down => ("down_proj", rows, (0, 1)),
        };
        let module = format!("{path}.experts.{name}");
        let weight = |source| Error::Weight { weight: module.clone(), source };
        WeightFormat::Mxfp4.validate(cols).map_err(weight)?;
        let blocks = self.require(&format!("{module}_blocks"))?;
        let scales = self.require(&format!("{module}_scales"))?;
        for (tensor, shape) in
            [(&blocks, &[count, stored_rows, cols / 32, 16][..]), (&scales, &[count, stored_rows, cols / 32])]
        {
            if tensor.dtype != Dtype::U8 {
                return Err(tensor.wrong("dtype", tensor.dtype, Dtype::U8));
            }
            tensor.expect_shape(shape)?;
        }
        (0..count)
            .map(|expert| {
                let (codes, scales) = (nth(blocks.bytes, expert, count), nth(scales.bytes, expert, count));
                MatrixView::new("its tensors", WeightFormat::Mxfp4, [stored_rows, cols], codes, scales, &[])
                    .and_then(|view| view.every_row(first, step))
                    .map_err(weight)
            })
            .collect()
    }
}

fn borrowed(views: Vec<MatrixView<'_>>) -> Vec<Matrix<'_>> {
    views.into_iter().map(Matrix::Borrowed).collect()
}

/// `2 * rows`, for gate and up in one tensor.
fn doubled(path: &str, rows: usize) -> Result<usize> {
    rows.checked_mul(2).ok_or_else(|| Error::module(path, "rows of an expert", rows, "a size that fits memory"))
}

/// Part `at` of `count` equal parts.
fn nth(bytes: &[u8], at: usize, count: usize) -> &[u8] {
    let size_bytes = bytes.len() / count;
    &bytes[at * size_bytes..][..size_bytes]
}

/// The matrices of a float tensor `[count, rows, cols]`, whose shape was checked.
fn plain_stack<'a>(tensor: &TensorView<'a>, count: usize, shape: [usize; 2]) -> Result<Vec<MatrixView<'a>>> {
    let format = WeightFormat::plain(tensor.expect_float()?);
    (0..count)
        .map(|at| {
            MatrixView::new("its bytes", format, shape, nth(tensor.bytes, at, count), &[], &[])
                .map_err(|source| Error::Weight { weight: tensor.name.to_owned(), source })
        })
        .collect()
}

/// A copy of every `step`-th row of a plain matrix, from `first` on.
fn every_row(matrix: &OwnedMatrix, (first, step): (usize, usize)) -> OwnedMatrix {
    let row_bytes = matrix.format.code_row_bytes(matrix.cols);
    let rows: Vec<&[u8]> = matrix.codes.chunks_exact(row_bytes).skip(first).step_by(step).collect();
    OwnedMatrix {
        format: matrix.format,
        rows: rows.len(),
        cols: matrix.cols,
        codes: rows.concat(),
        scales: Vec::new(),
        offsets: Vec::new(),
        global_scale: matrix.global_scale,
    }
}
