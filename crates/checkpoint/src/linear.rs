//! Weights of linear layers: the format is read off the tensors of a module, in every convention we know.
//!
//! | tensors beside `<path>.` | format |
//! |---|---|
//! | `weight` F32, F16, BF16 | plain |
//! | `weight` U32, `scales` and `biases` floats | MLX affine: `bits = 32 * words / cols`, `group = cols / scales` |
//! | `weight` U32, `scales` U8, optional `global_scale` | MLX mxfp4, mxfp8, nvfp4 by (bits, group); scale / 2688 |
//! | `weight` F8_E4M3, `weight_scale_inv` F32 | FP8 blocks of `weight_block_size` (128 x 128 without one) |
//! | `weight` F8_E4M3, `weight_scale` F32 | FP8 per tensor or per row, as one block or blocks of one row |
//! | `weight` U8, `weight_scale` F8_E4M3, `weight_scale_2` F32 | ModelOpt NVFP4 (`input_scale` is of activations) |
//! | `weight_packed` U8, `weight_scale` F8_E4M3, `weight_global_scale` F32 | compressed-tensors NVFP4 (reciprocal) |
//! | `weight_packed` U8, `weight_scale` U8 or F8_E8M0 | compressed-tensors MXFP4 |
//! | `qweight` and `qzeros` I32, `scales` F16 or BF16 | AWQ or GPTQ: converted to affine with f32 scales (`packed_integers.rs`) |

use crate::checkpoint::missing;
use crate::declared::declared;
use crate::{Checkpoint, Error, Matrix, Result, TensorView, packed_integers};
use moellon_tensor::encode::NVFP4_RANGE;
use moellon_tensor::{Dtype, MatrixView, WeightFormat};

/// Suffixes that make a module a weight.
const WEIGHT_SUFFIXES: [&str; 3] = ["weight", "weight_packed", "qweight"];

impl Checkpoint {
    /// The weight `[rows, cols]` (output features, input features) of the linear layer `path`, e.g.
    /// `model.layers.3.self_attn.q_a_proj`. Values are not read: call [`Checkpoint::check_finite`] when they are.
    ///
    /// # Errors
    /// If there is none, its format is unknown or not supported, a tensor has another dtype or shape than the format
    /// and `shape` ask for, or the `quantization` entry of `config.json` says something else.
    pub fn linear(&self, path: &str, shape: [usize; 2]) -> Result<Matrix<'_>> {
        let expected = format!("a weight {shape:?}");
        self.linear_opt(path, shape)?.ok_or_else(|| missing(self.dir(), &format!("{path}.weight"), &expected))
    }

    /// As [`Checkpoint::linear`], `None` if the module has no weight.
    ///
    /// # Errors
    /// As [`Checkpoint::linear`], but for a missing weight.
    pub fn linear_opt(&self, path: &str, shape: [usize; 2]) -> Result<Option<Matrix<'_>>> {
        if self.tensor(&format!("{path}.qweight")).is_some() {
            check_shape(path, Stack::None, shape)?;
            return packed_integers::read(self, path, shape).map(|matrix| Some(Matrix::Owned(matrix)));
        }
        Ok(self.weights(path, Stack::None, shape)?.map(|views| Matrix::Borrowed(views[0])))
    }

    /// The weights `[count, rows, cols]` of a module that stacks matrices (experts, heads), one view each; `None` if
    /// the module has no weight.
    pub(crate) fn stacked_opt(
        &self,
        path: &str,
        count: usize,
        shape: [usize; 2],
    ) -> Result<Option<Vec<MatrixView<'_>>>> {
        self.weights(path, Stack::Of(count), shape)
    }

    /// Whether the module `path` has a weight of any format.
    pub(crate) fn has_weight(&self, path: &str) -> bool {
        WEIGHT_SUFFIXES.iter().any(|suffix| self.tensor(&format!("{path}.{suffix}")).is_some())
    }

    fn weights(&self, path: &str, stack: Stack, shape: [usize; 2]) -> Result<Option<Vec<MatrixView<'_>>>> {
        if !self.has_weight(path) {
            return Ok(None);
        }
        check_shape(path, stack, shape)?;
        let module = Module { checkpoint: self, path, stack, shape };
        let weights = module.read()?;
        declared(&self.config, path)?.check(path, weights.format)?;
        module.split(&weights).map(Some)
    }

    /// Checks that a weight holds no NaN and no infinity ([`MatrixView::check_finite`]), naming it in the error.
    ///
    /// # Errors
    /// [`Error::Weight`] with the part, row and group.
    pub fn check_finite(weight: &str, matrix: &MatrixView<'_>) -> Result<()> {
        matrix.check_finite().map_err(|source| Error::Weight { weight: weight.to_owned(), source })
    }
}

fn check_shape(path: &str, stack: Stack, shape: [usize; 2]) -> Result<()> {
    // Times the 8 bits of the widest packed integer.
    if shape.contains(&0) || stack.count() == 0 || shape.iter().any(|&size| size > usize::MAX / 64) {
        let found = format!("{:?}", stack.shape(&shape));
        return Err(Error::module(path, "shape that the config asks for", found, "positive dimensions"));
    }
    Ok(())
}

/// Whether a module's tensors have a leading dimension.
#[derive(Debug, Clone, Copy)]
enum Stack {
    None,
    Of(usize),
}

impl Stack {
    fn count(self) -> usize {
        match self {
            Stack::None => 1,
            Stack::Of(count) => count,
        }
    }

    /// `dims` with the leading dimension, if there is one.
    fn shape(self, dims: &[usize]) -> Vec<usize> {
        match self {
            Stack::None => dims.to_vec(),
            Stack::Of(count) => std::iter::once(count).chain(dims.iter().copied()).collect(),
        }
    }
}

/// A module that is being read.
struct Module<'a, 'p> {
    checkpoint: &'a Checkpoint,
    path: &'p str,
    stack: Stack,
    shape: [usize; 2],
}

/// The tensors of a module once their meaning is known.
struct Weights<'a> {
    format: WeightFormat,
    codes: TensorView<'a>,
    scales: Option<TensorView<'a>>,
    offsets: Option<TensorView<'a>>,
    /// One for all matrices, or one each.
    global_scales: Vec<f32>,
}

impl<'a> Module<'a, '_> {
    fn part(&self, suffix: &str) -> Option<TensorView<'a>> {
        self.checkpoint.tensor(&format!("{}.{suffix}", self.path))
    }

    fn require(&self, suffix: &str) -> Result<TensorView<'a>> {
        self.checkpoint.require(&format!("{}.{suffix}", self.path))
    }

    fn unsupported(&self, format: impl Into<String>) -> Error {
        Error::Unsupported {
            module: self.path.to_owned(),
            format: format.into(),
            instead: "supported are bf16, f16, f32, FP8 blocks, MLX, and the NVFP4 and MXFP4 of ModelOpt and \
                      compressed-tensors"
                .to_owned(),
        }
    }

    /// Recognises the convention.
    fn read(&self) -> Result<Weights<'a>> {
        for suffix in ["pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b"] {
            if self.part(suffix).is_some() {
                return Err(self.unsupported(format!("a ModelOpt weight with {suffix}")));
            }
        }
        if self.part("qweight").is_some() {
            return Err(self.unsupported(format!("a stacked weight in qweight (quant_method {})", self.quant_method())));
        }
        if let Some(packed) = self.part("weight_packed") {
            return self.read_compressed_tensors(packed);
        }
        let weight = self.require("weight")?;
        match weight.dtype {
            Dtype::F32 => self.read_plain(weight, WeightFormat::F32),
            Dtype::F16 => self.read_plain(weight, WeightFormat::F16),
            Dtype::Bf16 => self.read_plain(weight, WeightFormat::Bf16),
            Dtype::U32 => self.read_mlx(weight),
            Dtype::F8E4m3 => self.read_fp8(weight),
            Dtype::U8 if self.part("weight_scale").is_some() => self.read_modelopt(weight),
            other => Err(self.unsupported(format!(
                "a weight of dtype {other} with {} (quant_method {})",
                self.names_of_parts(),
                self.quant_method()
            ))),
        }
    }

    fn read_plain(&self, weight: TensorView<'a>, format: WeightFormat) -> Result<Weights<'a>> {
        for suffix in ["scales", "weight_scale", "weight_scale_inv"] {
            if let Some(scales) = self.part(suffix) {
                return Err(scales.wrong("place of scales", format!("beside a {} weight", weight.dtype), "codes"));
            }
        }
        weight.expect_shape(&self.stack.shape(&self.shape))?;
        Ok(Weights { format, codes: weight, scales: None, offsets: None, global_scales: vec![1.0] })
    }

    fn read_mlx(&self, weight: TensorView<'a>) -> Result<Weights<'a>> {
        let [rows, cols] = self.shape;
        let scales = self.require("scales")?;
        let words = self.last_dim(&weight)?;
        let groups = self.last_dim(&scales)?;
        let bits = 32 * words / cols;
        if bits * cols != 32 * words || bits == 0 {
            let expected = format!("{cols} * bits / 32 for {cols} input columns");
            return Err(weight.wrong("words in a row", words, expected));
        }
        if groups == 0 || !cols.is_multiple_of(groups) {
            return Err(scales.wrong("scales in a row", groups, format!("a divisor of the {cols} input columns")));
        }
        let group = cols / groups;
        let (format, offsets) = match scales.dtype {
            Dtype::U8 => {
                let format = match (bits, group) {
                    (4, 16) => WeightFormat::Nvfp4,
                    (4, 32) => WeightFormat::Mxfp4,
                    (8, 32) => WeightFormat::Mxfp8,
                    _ => {
                        let expected = "4 and 16 (nvfp4), 4 and 32 (mxfp4) or 8 and 32 (mxfp8)";
                        return Err(scales.wrong("bits and group size", format!("{bits} and {group}"), expected));
                    }
                };
                (format, None)
            }
            _ => {
                let scale = scales.expect_float()?;
                let offsets = self.require("biases")?;
                if offsets.dtype != scales.dtype {
                    return Err(offsets.wrong("dtype", offsets.dtype, format!("{}, that of the scales", scales.dtype)));
                }
                offsets.expect_shape(&self.stack.shape(&[rows, groups]))?;
                // Both fit: bits is at most 32 * words / cols of a tensor in memory, group at most cols.
                let (bits, group) = (u8::try_from(bits).unwrap_or(u8::MAX), u32::try_from(group).unwrap_or(u32::MAX));
                (WeightFormat::Affine { bits, group, scale }, Some(offsets))
            }
        };
        format.validate(cols).map_err(|source| Error::Weight { weight: self.path.to_owned(), source })?;
        weight.expect_shape(&self.stack.shape(&[rows, words]))?;
        scales.expect_shape(&self.stack.shape(&[rows, groups]))?;
        let global_scales = match self.part("global_scale") {
            None => vec![1.0],
            Some(tensor) if format != WeightFormat::Nvfp4 => {
                return Err(tensor.wrong("format of a weight with a global scale", format, WeightFormat::Nvfp4));
            }
            Some(tensor) => self.global_scales(&tensor, |amax| amax / NVFP4_RANGE)?,
        };
        Ok(Weights { format, codes: weight, scales: Some(scales), offsets, global_scales })
    }

    fn read_fp8(&self, weight: TensorView<'a>) -> Result<Weights<'a>> {
        let [rows, cols] = self.shape;
        weight.expect_shape(&self.stack.shape(&self.shape))?;
        let (scales, [block_rows, block_cols]) = match self.part("weight_scale_inv") {
            Some(scales) => (scales, self.weight_block_size()?),
            None => {
                let scales = self.require("weight_scale")?;
                // One scale for the matrix, or one for every row ([rows] or [rows, 1]).
                let per_matrix = scales.shape.iter().product::<usize>() == self.stack.count();
                (scales, if per_matrix { [rows, cols] } else { [1, cols] })
            }
        };
        if scales.dtype != Dtype::F32 {
            return Err(self.unsupported(format!("an FP8 weight with {} scales of {}", scales.dtype, scales.name)));
        }
        let grid = [rows.div_ceil(block_rows), cols.div_ceil(block_cols)];
        let expected_count = grid.iter().product::<usize>() * self.stack.count();
        let is_vector =
            scales.name.ends_with("weight_scale") && scales.shape.iter().product::<usize>() == expected_count;
        if !is_vector && scales.shape != self.stack.shape(&grid) {
            let expected = format!("{:?} for blocks of {block_rows} x {block_cols}", self.stack.shape(&grid));
            return Err(scales.wrong("shape", format!("{:?}", scales.shape), expected));
        }
        let block = |size: usize| {
            u32::try_from(size).map_err(|_| Error::module(self.path, "FP8 block size", size, "at most 4294967295"))
        };
        let format = WeightFormat::Fp8Block { block_rows: block(block_rows)?, block_cols: block(block_cols)? };
        Ok(Weights { format, codes: weight, scales: Some(scales), offsets: None, global_scales: vec![1.0] })
    }

    fn read_modelopt(&self, weight: TensorView<'a>) -> Result<Weights<'a>> {
        let scales = self.require("weight_scale")?;
        if scales.dtype != Dtype::F8E4m3 {
            return Err(scales.wrong("dtype", scales.dtype, "F8_E4M3 (ModelOpt NVFP4)"));
        }
        let global_scale = self.require("weight_scale_2")?;
        let global_scales = self.global_scales(&global_scale, |scale| scale)?;
        self.nibbles(WeightFormat::Nvfp4, weight, scales, global_scales)
    }

    fn read_compressed_tensors(&self, packed: TensorView<'a>) -> Result<Weights<'a>> {
        if packed.dtype != Dtype::U8 {
            return Err(self.unsupported(format!("a compressed-tensors weight packed in {}", packed.dtype)));
        }
        let scales = self.require("weight_scale")?;
        match scales.dtype {
            Dtype::F8E4m3 => {
                let global_scale = self.require("weight_global_scale")?;
                let global_scales = self.global_scales(&global_scale, |divisor| 1.0 / divisor)?;
                self.nibbles(WeightFormat::Nvfp4, packed, scales, global_scales)
            }
            Dtype::U8 | Dtype::F8E8m0 => self.nibbles(WeightFormat::Mxfp4, packed, scales, vec![1.0]),
            other => Err(scales.wrong("dtype", other, "F8_E4M3 (NVFP4), U8 or F8_E8M0 (MXFP4)")),
        }
    }

    /// Two codes a byte, one scale byte a group.
    fn nibbles(
        &self,
        format: WeightFormat,
        codes: TensorView<'a>,
        scales: TensorView<'a>,
        global_scales: Vec<f32>,
    ) -> Result<Weights<'a>> {
        let [rows, cols] = self.shape;
        format.validate(cols).map_err(|source| Error::Weight { weight: self.path.to_owned(), source })?;
        codes.expect_shape(&self.stack.shape(&[rows, format.code_row_bytes(cols)]))?;
        scales.expect_shape(&self.stack.shape(&[rows, format.scales_per_row(cols)]))?;
        Ok(Weights { format, codes, scales: Some(scales), offsets: None, global_scales })
    }

    /// One view for every matrix of the stack.
    fn split(&self, weights: &Weights<'a>) -> Result<Vec<MatrixView<'a>>> {
        let count = self.stack.count();
        let slice = |tensor: Option<TensorView<'a>>, at: usize| -> &'a [u8] {
            tensor.map_or(&[], |tensor| {
                let size_bytes = tensor.bytes.len() / count;
                &tensor.bytes[at * size_bytes..][..size_bytes]
            })
        };
        let Weights { format, codes, scales, offsets, ref global_scales } = *weights;
        (0..count)
            .map(|at| {
                let parts = (slice(Some(codes), at), slice(scales, at), slice(offsets, at));
                MatrixView::new("its tensors", format, self.shape, parts.0, parts.1, parts.2)
                    .map(|view| view.with_global_scale(global_scales[at % global_scales.len()]))
                    .map_err(|source| Error::Weight { weight: self.path.to_owned(), source })
            })
            .collect()
    }

    /// The last dimension of a tensor that must have one more than the stack has.
    fn last_dim(&self, tensor: &TensorView<'_>) -> Result<usize> {
        let rank = self.stack.shape(&self.shape).len();
        match tensor.shape.last() {
            Some(&last) if tensor.shape.len() == rank => Ok(last),
            _ => Err(tensor.wrong("shape", format!("{:?}", tensor.shape), format!("{rank} dimensions"))),
        }
    }

    /// The values of a global scale tensor: one for all, or one for every matrix of the stack.
    fn global_scales(&self, tensor: &TensorView<'_>, convert: impl Fn(f32) -> f32) -> Result<Vec<f32>> {
        if tensor.dtype != Dtype::F32 {
            return Err(tensor.wrong("dtype", tensor.dtype, "F32"));
        }
        let values: Vec<f32> = tensor.bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
        if values.len() != 1 && values.len() != self.stack.count() {
            let expected = match self.stack {
                Stack::None => "1 value".to_owned(),
                Stack::Of(count) => format!("1 or {count} values"),
            };
            return Err(tensor.wrong("shape", format!("{:?}", tensor.shape), expected));
        }
        let converted: Vec<f32> = values.iter().map(|&value| convert(value)).collect();
        match converted.iter().position(|&value| !value.is_finite() || value < 0.0) {
            Some(at) => Err(tensor.wrong(format!("value {at}"), values[at], "a scale that is finite and not negative")),
            None => Ok(converted),
        }
    }

    /// `quantization_config.weight_block_size`, 128 x 128 if the config has none.
    fn weight_block_size(&self) -> Result<[usize; 2]> {
        let config = &self.checkpoint.config;
        let Some(size) = config.get("quantization_config").and_then(|config| config.get("weight_block_size")) else {
            return Ok([128, 128]);
        };
        let sizes: Option<Vec<usize>> = size.as_array().map(|sizes| {
            sizes.iter().filter_map(|size| size.as_u64().and_then(|size| usize::try_from(size).ok())).collect()
        });
        match sizes.as_deref() {
            Some(&[rows, cols]) if rows > 0 && cols > 0 => Ok([rows, cols]),
            _ => Err(Error::module(self.path, "weight_block_size of config.json", size, "[rows, columns]")),
        }
    }

    fn quant_method(&self) -> String {
        let method = self.checkpoint.config.get("quantization_config").and_then(|config| config.get("quant_method"));
        method.map_or("none".to_owned(), |method| method.to_string())
    }

    /// Names of the tensors beside the weight, for messages.
    fn names_of_parts(&self) -> String {
        let names = self.checkpoint.names_under(format!("{}.", self.path));
        let names: Vec<&str> =
            names.filter_map(|name| name.rsplit_once('.')).map(|(_, suffix)| suffix).take(8).collect();
        format!("tensors {}", names.join(", "))
    }
}
