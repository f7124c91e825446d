//! Tiny checkpoints in every layout and format, for tests (feature `testing`).

use crate::writer::{TensorSpec, Writer, WriterOptions};
use crate::{Projection, Result};
use moellon_tensor::encode::{EncodeOptions, GlobalScale, NVFP4_RANGE, encode_matrix};
use moellon_tensor::rng::SplitMix64;
use moellon_tensor::{Dtype, OwnedMatrix, ScaleDtype, WeightFormat};
use serde_json::Value;
use std::path::Path;

/// How a linear layer's weight is stored. The names say whose convention it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// `weight` as floats.
    Plain(ScaleDtype),
    /// `weight` and `weight_scale_inv`.
    Fp8Block([u32; 2]),
    /// `weight`, `scales`, `biases`.
    MlxAffine(u8, u32, ScaleDtype),
    /// `weight` and `scales`.
    MlxMxfp4,
    /// `weight` and `scales`.
    MlxMxfp8,
    /// `weight` and `scales`.
    MlxNvfp4,
    /// `weight`, `scales` and `global_scale`.
    MlxNvfp4Global,
    /// `weight`, `weight_scale`, `weight_scale_2` and an `input_scale`.
    ModelOptNvfp4,
    /// `weight_packed`, `weight_scale`, `weight_global_scale`.
    CompressedTensorsNvfp4,
    /// `weight_packed` and `weight_scale`.
    CompressedTensorsMxfp4,
    /// `qweight`, `qzeros` and f16 `scales` in groups of 32, four bits.
    Awq,
}

impl Storage {
    /// One of each, for loops over formats.
    pub const ALL: [Storage; 18] = [
        Storage::Plain(ScaleDtype::F32),
        Storage::Plain(ScaleDtype::F16),
        Storage::Plain(ScaleDtype::Bf16),
        Storage::Fp8Block([32, 48]),
        Storage::MlxAffine(1, 64, ScaleDtype::Bf16),
        Storage::MlxAffine(2, 64, ScaleDtype::F16),
        Storage::MlxAffine(3, 64, ScaleDtype::Bf16),
        Storage::MlxAffine(4, 32, ScaleDtype::F32),
        Storage::MlxAffine(4, 128, ScaleDtype::Bf16),
        Storage::MlxAffine(5, 64, ScaleDtype::Bf16),
        Storage::MlxAffine(6, 64, ScaleDtype::F16),
        Storage::MlxAffine(8, 64, ScaleDtype::Bf16),
        Storage::MlxMxfp4,
        Storage::MlxMxfp8,
        Storage::MlxNvfp4,
        Storage::MlxNvfp4Global,
        Storage::ModelOptNvfp4,
        Storage::CompressedTensorsNvfp4,
    ];

    /// The weight format that it decodes as.
    pub const fn format(self) -> WeightFormat {
        match self {
            Storage::Plain(dtype) => WeightFormat::plain(dtype),
            Storage::Awq => WeightFormat::Affine { bits: 4, group: 32, scale: ScaleDtype::F32 },
            Storage::Fp8Block([block_rows, block_cols]) => WeightFormat::Fp8Block { block_rows, block_cols },
            Storage::MlxAffine(bits, group, scale) => WeightFormat::Affine { bits, group, scale },
            Storage::MlxMxfp4 | Storage::CompressedTensorsMxfp4 => WeightFormat::Mxfp4,
            Storage::MlxMxfp8 => WeightFormat::Mxfp8,
            Storage::MlxNvfp4 | Storage::MlxNvfp4Global | Storage::ModelOptNvfp4 | Storage::CompressedTensorsNvfp4 => {
                WeightFormat::Nvfp4
            }
        }
    }

    /// Encodes `values` `[rows, cols]` as this storage would hold them.
    pub fn encode(self, shape: [usize; 2], values: &[f32]) -> OwnedMatrix {
        if self == Storage::Awq {
            return encode_awq(shape, values);
        }
        let global_scale = if self == Storage::MlxNvfp4 { GlobalScale::Off } else { GlobalScale::FromValues };
        let options = EncodeOptions { arithmetic: ScaleDtype::F32, global_scale };
        let mut matrix = encode_matrix(self.format(), shape, values, options).expect("test values can be encoded");
        // Two conventions store another number; what comes back is rounded once more.
        if self == Storage::CompressedTensorsNvfp4 {
            matrix.global_scale = 1.0 / (1.0 / matrix.global_scale);
        } else if self == Storage::MlxNvfp4Global {
            matrix.global_scale = matrix.global_scale * NVFP4_RANGE / NVFP4_RANGE;
        }
        matrix
    }
}

/// A tensor with its data.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Name, dtype and shape.
    pub spec: TensorSpec,
    /// Little-endian data.
    pub bytes: Vec<u8>,
}

/// A checkpoint that is being put together in memory.
#[derive(Debug, Clone, Default)]
pub struct Builder {
    /// The tensors so far; tests may change them before [`Builder::write`].
    pub tensors: Vec<Tensor>,
}

impl Builder {
    /// Adds a tensor.
    pub fn add(&mut self, name: &str, dtype: Dtype, shape: &[usize], bytes: Vec<u8>) -> &mut Self {
        let spec = TensorSpec { name: name.to_owned(), dtype, shape: shape.to_vec() };
        assert_eq!(spec.size_bytes(), Some(bytes.len()), "bytes of {name}");
        self.tensors.push(Tensor { spec, bytes });
        self
    }

    /// Adds a float tensor, rounded to `dtype`.
    pub fn add_floats(&mut self, name: &str, dtype: ScaleDtype, shape: &[usize], values: &[f32]) -> &mut Self {
        let bytes = OwnedMatrix::plain(dtype, [1, values.len()], values).codes;
        self.add(name, dtype.dtype(), shape, bytes)
    }

    /// Adds the weight of the linear layer `path` and returns it as a reader must give it back.
    pub fn add_linear(&mut self, path: &str, storage: Storage, shape: [usize; 2], values: &[f32]) -> OwnedMatrix {
        let matrix = storage.encode(shape, values);
        self.add_stack(path, storage, None, std::slice::from_ref(&matrix));
        matrix
    }

    /// Adds weights stacked along a leading dimension, `values` `[count, rows, cols]`.
    pub fn add_stacked(&mut self, path: &str, storage: Storage, shape: [usize; 2], values: &[f32]) -> Vec<OwnedMatrix> {
        let matrices: Vec<OwnedMatrix> =
            values.chunks_exact(shape[0] * shape[1]).map(|values| storage.encode(shape, values)).collect();
        self.add_stack(path, storage, Some(matrices.len()), &matrices);
        matrices
    }

    fn add_stack(&mut self, path: &str, storage: Storage, count: Option<usize>, matrices: &[OwnedMatrix]) {
        let OwnedMatrix { format, rows, cols, .. } = matrices[0];
        let stacked = |dims: &[usize]| -> Vec<usize> { count.into_iter().chain(dims.iter().copied()).collect() };
        let join = |part: fn(&OwnedMatrix) -> &Vec<u8>| matrices.iter().flat_map(part).copied().collect::<Vec<u8>>();
        let name = |suffix: &str| format!("{path}.{suffix}");
        let (code_bytes, groups) = (format.code_row_bytes(cols), format.scales_per_row(cols));
        let global_scales =
            |convert: fn(f32) -> f32| -> Vec<f32> { matrices.iter().map(|m| convert(m.global_scale)).collect() };
        let (codes, scales) = (join(|m| &m.codes), join(|m| &m.scales));
        let scale_shape = stacked(&[rows, groups]);
        match storage {
            Storage::Plain(dtype) => {
                self.add(&name("weight"), dtype.dtype(), &stacked(&[rows, cols]), codes);
            }
            Storage::Fp8Block(_) => {
                self.add(&name("weight"), Dtype::F8E4m3, &stacked(&[rows, cols]), codes);
                self.add(&name("weight_scale_inv"), Dtype::F32, &stacked(&[format.scale_rows(rows), groups]), scales);
            }
            Storage::MlxAffine(_, _, dtype) => {
                self.add(&name("weight"), Dtype::U32, &stacked(&[rows, code_bytes / 4]), codes);
                self.add(&name("scales"), dtype.dtype(), &scale_shape, scales);
                self.add(&name("biases"), dtype.dtype(), &scale_shape, join(|m| &m.offsets));
            }
            Storage::MlxMxfp4 | Storage::MlxMxfp8 | Storage::MlxNvfp4 | Storage::MlxNvfp4Global => {
                self.add(&name("weight"), Dtype::U32, &stacked(&[rows, code_bytes / 4]), codes);
                self.add(&name("scales"), Dtype::U8, &scale_shape, scales);
                if let Storage::MlxNvfp4Global = storage {
                    let amax = global_scales(|scale| scale * NVFP4_RANGE);
                    self.add_floats(&name("global_scale"), ScaleDtype::F32, &[amax.len()], &amax);
                }
            }
            Storage::ModelOptNvfp4 => {
                self.add(&name("weight"), Dtype::U8, &stacked(&[rows, code_bytes]), codes);
                self.add(&name("weight_scale"), Dtype::F8E4m3, &scale_shape, scales);
                let values = global_scales(|scale| scale);
                self.add_floats(&name("weight_scale_2"), ScaleDtype::F32, count.as_slice(), &values);
                self.add_floats(&name("input_scale"), ScaleDtype::F32, &[], &[0.5]);
            }
            Storage::CompressedTensorsNvfp4 => {
                self.add(&name("weight_packed"), Dtype::U8, &stacked(&[rows, code_bytes]), codes);
                self.add(&name("weight_scale"), Dtype::F8E4m3, &scale_shape, scales);
                let values = global_scales(|scale| 1.0 / scale);
                self.add_floats(&name("weight_global_scale"), ScaleDtype::F32, &[values.len()], &values);
            }
            Storage::Awq => {
                assert!(count.is_none(), "AWQ stacks nothing");
                let words = |values: &dyn Fn(usize, usize) -> u8, lines: usize| -> Vec<u8> {
                    let word = |line: usize, w: usize| {
                        // Output 8w + n is the n-th of the places 0 4 1 5 2 6 3 7.
                        let places = [0, 4, 1, 5, 2, 6, 3, 7].iter().enumerate();
                        places.map(|(n, place)| u32::from(values(8 * w + n, line)) << (4 * place)).sum::<u32>()
                    };
                    (0..lines)
                        .flat_map(|line| (0..rows / 8).map(move |w| (line, w)))
                        .flat_map(|(line, w)| word(line, w).to_le_bytes())
                        .collect()
                };
                let floats = |bytes: &[u8]| {
                    let mut values = vec![0.0; rows * groups];
                    ScaleDtype::F32.read_slice(bytes, 0, &mut values);
                    values
                };
                let (scale, offset) = (floats(&scales), floats(&matrices[0].offsets));
                let code = |row: usize, col: usize| (codes[row * code_bytes + col / 2] >> (4 * (col % 2))) & 15;
                let zero =
                    |row: usize, group: usize| (-offset[row * groups + group] / scale[row * groups + group]) as u8;
                let scales: Vec<f32> = (0..groups * rows).map(|at| scale[at % rows * groups + at / rows]).collect();
                self.add(&name("qweight"), Dtype::I32, &[cols, rows / 8], words(&code, cols));
                self.add(&name("qzeros"), Dtype::I32, &[groups, rows / 8], words(&zero, groups));
                self.add_floats(&name("scales"), ScaleDtype::F16, &[groups, rows], &scales);
            }
            Storage::CompressedTensorsMxfp4 => {
                self.add(&name("weight_packed"), Dtype::U8, &stacked(&[rows, code_bytes]), codes);
                self.add(&name("weight_scale"), Dtype::U8, &scale_shape, scales);
            }
        }
    }

    /// Adds gpt-oss MXFP4 experts: `gate_up_proj_blocks` and `_scales` (alternating rows) and `down_proj_*`, and the
    /// biases (zeros). Returns gate, up and down per expert as a reader must give them back.
    pub fn add_gpt_oss_experts(
        &mut self,
        block: &str,
        count: usize,
        [inner, hidden]: [usize; 2],
        seed: u64,
    ) -> Vec<[OwnedMatrix; 3]> {
        let mut experts = Vec::new();
        let (mut blocks, mut scales) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
        for expert in 0..count {
            let values = |salt: u64| random_values(inner * hidden, seed + 3 * expert as u64 + salt);
            let [gate, up] = [0, 1].map(|salt| Storage::MlxMxfp4.encode([inner, hidden], &values(salt)));
            let down = Storage::MlxMxfp4.encode([hidden, inner], &values(2));
            for row in 0..inner {
                for part in [&gate, &up] {
                    blocks[0].extend_from_slice(part.view().codes.row(row));
                    scales[0].extend_from_slice(part.view().scales.row(row));
                }
            }
            blocks[1].extend_from_slice(&down.codes);
            scales[1].extend_from_slice(&down.scales);
            experts.push([gate, up, down]);
        }
        let shapes = [("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)];
        for (((name, rows, cols), blocks), scales) in shapes.into_iter().zip(blocks).zip(scales) {
            let name = |suffix: &str| format!("{block}.experts.{name}_{suffix}");
            self.add(&name("blocks"), Dtype::U8, &[count, rows, cols / 32, 16], blocks);
            self.add(&name("scales"), Dtype::U8, &[count, rows, cols / 32], scales);
            self.add_floats(&name("bias"), ScaleDtype::Bf16, &[count, rows], &vec![0.0; count * rows]);
        }
        experts
    }

    /// Adds the three projections of `count` experts one by one, `names` being those of gate, up and down. Returns
    /// them per expert in that order.
    pub fn add_experts(
        &mut self,
        block: &str,
        names: [&str; 3],
        storage: Storage,
        count: usize,
        [inner, hidden]: [usize; 2],
        seed: u64,
    ) -> Vec<[OwnedMatrix; 3]> {
        let projections = [Projection::Gate, Projection::Up, Projection::Down];
        (0..count)
            .map(|expert| {
                projections.map(|projection| {
                    let (at, shape) = match projection {
                        Projection::Gate => (0, [inner, hidden]),
                        Projection::Up => (1, [inner, hidden]),
                        Projection::Down => (2, [hidden, inner]),
                    };
                    let values = random_values(inner * hidden, seed + 3 * expert as u64 + at as u64);
                    self.add_linear(&format!("{block}.experts.{expert}.{}", names[at]), storage, shape, &values)
                })
            })
            .collect()
    }

    /// Writes the checkpoint into `dir`, in shards of at most `max_shard_bytes`.
    ///
    /// # Errors
    /// As [`Writer`].
    pub fn write(&self, dir: &Path, config: &Value, max_shard_bytes: usize) -> Result<()> {
        let specs = self.tensors.iter().map(|tensor| tensor.spec.clone()).collect();
        let mut writer = Writer::create(dir, specs, &WriterOptions { max_shard_bytes, ..WriterOptions::default() })?;
        for tensor in &self.tensors {
            writer.write(&tensor.spec.name, &tensor.bytes)?;
        }
        writer.write_json("config.json", config)?;
        writer.finish()
    }
}

/// Round-to-nearest with integer zero points and f16 scales; offsets are `-zero * scale`.
fn encode_awq([rows, cols]: [usize; 2], values: &[f32]) -> OwnedMatrix {
    const GROUP: usize = 32;
    let mut matrix = OwnedMatrix::zeroed(Storage::Awq.format(), [rows, cols]).expect("columns are whole groups");
    for (at, group) in values.chunks_exact(GROUP).enumerate() {
        let (min, max) = group.iter().fold((0.0f32, 0.0f32), |(min, max), &v| (min.min(v), max.max(v)));
        let scale = ScaleDtype::F16.round(((max - min) / 15.0).max(1e-4));
        let zero = (-min / scale).round().clamp(0.0, 15.0);
        ScaleDtype::F32.write(scale, &mut matrix.scales, at);
        ScaleDtype::F32.write(-zero * scale, &mut matrix.offsets, at);
        for (byte, pair) in matrix.codes[at * GROUP / 2..].iter_mut().zip(group.chunks_exact(2)) {
            let code = |value: f32| (value / scale + zero).round().clamp(0.0, 15.0) as u8;
            *byte = code(pair[0]) | (code(pair[1]) << 4);
        }
    }
    matrix
}

/// `len` values, roughly normal with deviation 0.05, as weights are.
pub fn random_values(len: usize, seed: u64) -> Vec<f32> {
    SplitMix64::new(seed).normals(len, 0.05)
}
