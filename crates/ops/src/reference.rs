//! The reference back end: plain vectors, decoded weights, f64 sums. Slow and obvious; it is never optimised.

use crate::Result;
use crate::backend::{ActivationPrecision, Backend, Caps, WeightFormatSet};
use crate::buffer::{Buffer, Cache, CacheDtype, ElementType, Paging, Tensor};
use crate::ops::*;
use crate::weight::{Experts, ExpertsSource, Weight, WeightSource};
use moellon_tensor::{MatrixView, WeightFormat};
use std::borrow::Cow;

enum Data {
    F32(Vec<f32>),
    U32(Vec<u32>),
}

struct DecodedWeight {
    /// `[count * rows * cols]`
    values: Vec<f32>,
    /// `[count * rows]`
    bias: Option<Vec<f32>>,
}

struct DecodedExperts {
    /// `[num_experts * intermediate * hidden]`
    gate: Vec<f32>,
    /// `[num_experts * intermediate * hidden]`
    up: Vec<f32>,
    /// `[num_experts * hidden * intermediate]`
    down: Vec<f32>,
    /// gate `[num_experts * intermediate]`, up the same, down `[num_experts * hidden]`
    biases: Option<[Vec<f32>; 3]>,
}

/// What the reference implementations of operations read and write.
#[derive(Default)]
pub struct Memory {
    buffers: Vec<Data>,
    caches: Vec<Vec<f32>>,
    weights: Vec<DecodedWeight>,
    experts: Vec<DecodedExperts>,
    bf16_activations: bool,
}

impl Memory {
    /// The input of a product with weights of `format` as they meet them.
    fn activations<'a>(&self, x: &'a [f32], format: WeightFormat) -> Cow<'a, [f32]> {
        if self.bf16_activations && format.is_quantized() {
            x.iter().map(|x| round_to_bf16(*x)).collect()
        } else {
            x.into()
        }
    }

    /// `[rows][cols]` floats of a view.
    pub(crate) fn rows(&self, view: Tensor) -> Vec<Vec<f32>> {
        let Data::F32(data) = &self.buffers[view.buffer.id as usize] else {
            panic!("validate() checked the element type")
        };
        (0..view.rows).map(|r| data[view.offset + r * view.stride..][..view.cols].to_vec()).collect()
    }

    /// The only row of a `[1, cols]` view.
    pub(crate) fn row(&self, view: Tensor) -> Vec<f32> {
        self.rows(view).remove(0)
    }

    /// `[rows][cols]` integers of a view.
    pub(crate) fn ids(&self, view: Tensor) -> Vec<Vec<u32>> {
        let Data::U32(data) = &self.buffers[view.buffer.id as usize] else {
            panic!("validate() checked the element type")
        };
        (0..view.rows).map(|r| data[view.offset + r * view.stride..][..view.cols].to_vec()).collect()
    }

    /// Writes `[rows][cols]` floats.
    pub(crate) fn set_rows(&mut self, view: Tensor, rows: &[Vec<f32>]) {
        let Data::F32(data) = &mut self.buffers[view.buffer.id as usize] else {
            panic!("validate() checked the element type")
        };
        for (r, row) in rows.iter().enumerate() {
            data[view.offset + r * view.stride..][..view.cols].copy_from_slice(row);
        }
    }

    /// Writes `[rows][cols]` integers.
    pub(crate) fn set_ids(&mut self, view: Tensor, rows: &[Vec<u32>]) {
        let Data::U32(data) = &mut self.buffers[view.buffer.id as usize] else {
            panic!("validate() checked the element type")
        };
        for (r, row) in rows.iter().enumerate() {
            data[view.offset + r * view.stride..][..view.cols].copy_from_slice(row);
        }
    }

    /// `y = x Wᵀ + bias` for matrix `index` of a weight.
    pub(crate) fn apply(&self, weight: &Weight, index: usize, x: &[f32]) -> Vec<f32> {
        let decoded = &self.weights[weight.id as usize];
        let matrix = &decoded.values[index * weight.rows * weight.cols..][..weight.rows * weight.cols];
        let bias = decoded.bias.as_ref().map(|b| &b[index * weight.rows..][..weight.rows]);
        matvec(matrix, bias, &self.activations(x, weight.format))
    }

    /// Row `row` of the first matrix of a weight.
    pub(crate) fn weight_row(&self, weight: &Weight, row: usize) -> Vec<f32> {
        self.weights[weight.id as usize].values[row * weight.cols..][..weight.cols].to_vec()
    }

    /// Gate and up projections of one expert.
    pub(crate) fn expert_gate_up(&self, experts: &Experts, expert: usize, x: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let decoded = &self.experts[experts.id as usize];
        let size = experts.intermediate_size * experts.hidden_size;
        let bias = |which: usize| {
            decoded
                .biases
                .as_ref()
                .map(|b| &b[which][expert * experts.intermediate_size..][..experts.intermediate_size])
        };
        let gate = matvec(&decoded.gate[expert * size..][..size], bias(0), &self.activations(x, experts.gate_format));
        let up = matvec(&decoded.up[expert * size..][..size], bias(1), &self.activations(x, experts.up_format));
        (gate, up)
    }

    /// Down projection of one expert.
    pub(crate) fn expert_down(&self, experts: &Experts, expert: usize, x: &[f32]) -> Vec<f32> {
        let decoded = &self.experts[experts.id as usize];
        let size = experts.intermediate_size * experts.hidden_size;
        let bias = decoded.biases.as_ref().map(|b| &b[2][expert * experts.hidden_size..][..experts.hidden_size]);
        matvec(&decoded.down[expert * size..][..size], bias, &self.activations(x, experts.down_format))
    }

    /// Row `slot` of a cache.
    pub(crate) fn cache_row(&self, cache: &Cache, slot: usize) -> &[f32] {
        &self.caches[cache.id as usize][slot * cache.width..][..cache.width]
    }

    /// Writes row `slot` of a cache, rounded to its type.
    pub(crate) fn set_cache_row(&mut self, cache: &Cache, slot: usize, row: &[f32]) {
        let stored = &mut self.caches[cache.id as usize][slot * cache.width..][..cache.width];
        for (to, from) in stored.iter_mut().zip(row) {
            *to = match cache.dtype {
                CacheDtype::F32 => *from,
                CacheDtype::Bf16 => round_to_bf16(*from),
            };
        }
    }

    /// Slots of positions `0..=position` of row `t`'s sequence, in order, and the position itself.
    pub(crate) fn context(&self, paging: &Paging, t: usize) -> (usize, Vec<usize>) {
        let position = self.ids(paging.positions)[0][t] as usize;
        let sequence = self.ids(paging.sequences)[0][t] as usize;
        let blocks = &self.ids(paging.block_table)[sequence];
        let slot = |p: usize| blocks[p / paging.block_size] as usize * paging.block_size + p % paging.block_size;
        (position, (0..=position).map(slot).collect())
    }
}

/// Round to nearest even, NaN kept.
pub(crate) fn round_to_bf16(x: f32) -> f32 {
    if x.is_nan() {
        return x;
    }
    let bits = x.to_bits();
    f32::from_bits((bits.wrapping_add(0x7fff + (bits >> 16 & 1))) & 0xffff_0000)
}

/// Sum of products in f64.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

fn matvec(matrix: &[f32], bias: Option<&[f32]>, x: &[f32]) -> Vec<f32> {
    let add = |row: usize| bias.map_or(0.0, |b| f64::from(b[row]));
    matrix.chunks_exact(x.len()).enumerate().map(|(row, w)| (dot(w, x) + add(row)) as f32).collect()
}

/// Weighted softmax average: scores `[n]` (already scaled), values `[n]` rows, optional sink logit.
pub(crate) fn softmax_average(scores: &[f64], values: &[&[f32]], sink: Option<f32>) -> Vec<f32> {
    let max = scores.iter().copied().chain(sink.map(f64::from)).fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let total: f64 = weights.iter().sum::<f64>() + sink.map_or(0.0, |s| (f64::from(s) - max).exp());
    let width = values.first().map_or(0, |v| v.len());
    (0..width)
        .map(|i| (weights.iter().zip(values).map(|(w, v)| w * f64::from(v[i])).sum::<f64>() / total) as f32)
        .collect()
}

/// The reference back end.
pub struct ReferenceBackend {
    caps: Caps,
    memory: Memory,
}

impl Default for ReferenceBackend {
    fn default() -> Self {
        Self::new()
    }
}

impl ReferenceBackend {
    /// An empty one.
    pub fn new() -> Self {
        let caps = Caps {
            name: "reference",
            device: "plain vectors, f64 sums".to_owned(),
            activations: ActivationPrecision::Exact,
            formats: WeightFormatSet::ALL,
            memory_bytes: None,
            samples: true,
        };
        ReferenceBackend { caps, memory: Memory::default() }
    }

    /// One that rounds activations to bfloat16 before they meet quantized weights, as back ends with
    /// [`ActivationPrecision::Half`] may.
    pub fn with_bf16_activations() -> Self {
        let mut backend = Self::new();
        backend.caps.activations = ActivationPrecision::Half;
        backend.memory.bf16_activations = true;
        backend
    }
}

fn decode_all(matrices: &[MatrixView<'_>]) -> Vec<f32> {
    let mut values = Vec::new();
    for matrix in matrices {
        for row in 0..matrix.rows {
            let start = values.len();
            values.resize(start + matrix.cols, 0.0);
            matrix.decode_row(row, &mut values[start..]);
        }
    }
    values
}

macro_rules! operations {
    ($($method:ident: $op:ty),* $(,)?) => {
        $(fn $method(&mut self, op: &$op) -> Result<()> {
            op.validate()?;
            op.reference(&mut self.memory);
            Ok(())
        })*
    };
}

impl Backend for ReferenceBackend {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn alloc(&mut self, _what: &str, element: ElementType, len: usize) -> Result<Buffer> {
        self.memory.buffers.push(match element {
            ElementType::F32 => Data::F32(vec![0.0; len]),
            ElementType::U32 => Data::U32(vec![0; len]),
        });
        Ok(Buffer { id: self.memory.buffers.len() as u32 - 1, element, len })
    }

    fn free(&mut self, buffer: Buffer) {
        self.memory.buffers[buffer.id as usize] = Data::U32(Vec::new());
    }

    fn write_f32(&mut self, dst: Tensor, src: &[f32]) -> Result<()> {
        dst.check_f32("write_f32", "dst", [dst.rows, dst.cols])?;
        crate::error::expect_eq("write_f32", "elements of src", src.len(), dst.rows * dst.cols)?;
        self.memory.set_rows(dst, &src.chunks(dst.cols.max(1)).map(<[f32]>::to_vec).collect::<Vec<_>>());
        Ok(())
    }

    fn write_u32(&mut self, dst: Tensor, src: &[u32]) -> Result<()> {
        dst.check_u32("write_u32", "dst", [dst.rows, dst.cols])?;
        crate::error::expect_eq("write_u32", "elements of src", src.len(), dst.rows * dst.cols)?;
        self.memory.set_ids(dst, &src.chunks(dst.cols.max(1)).map(<[u32]>::to_vec).collect::<Vec<_>>());
        Ok(())
    }

    fn read_f32(&mut self, src: Tensor, dst: &mut [f32]) -> Result<()> {
        src.check_f32("read_f32", "src", [src.rows, src.cols])?;
        crate::error::expect_eq("read_f32", "elements of dst", dst.len(), src.rows * src.cols)?;
        dst.copy_from_slice(&self.memory.rows(src).concat());
        Ok(())
    }

    fn read_u32(&mut self, src: Tensor, dst: &mut [u32]) -> Result<()> {
        src.check_u32("read_u32", "src", [src.rows, src.cols])?;
        crate::error::expect_eq("read_u32", "elements of dst", dst.len(), src.rows * src.cols)?;
        dst.copy_from_slice(&self.memory.ids(src).concat());
        Ok(())
    }

    fn alloc_cache(&mut self, _what: &str, dtype: CacheDtype, num_slots: usize, width: usize) -> Result<Cache> {
        self.memory.caches.push(vec![0.0; num_slots * width]);
        Ok(Cache { id: self.memory.caches.len() as u32 - 1, dtype, num_slots, width })
    }

    fn read_cache(&mut self, cache: Cache, first_slot: usize, dst: &mut [u8]) -> Result<()> {
        cache.check_rows("read_cache", first_slot, dst.len())?;
        for (row, dst) in dst.chunks_exact_mut(cache.row_bytes()).enumerate() {
            let values = self.memory.cache_row(&cache, first_slot + row);
            for (value, dst) in values.iter().zip(dst.chunks_exact_mut(cache.dtype.size_bytes())) {
                match cache.dtype {
                    CacheDtype::F32 => dst.copy_from_slice(&value.to_le_bytes()),
                    // Stored values are rounded: the lower half is zero.
                    CacheDtype::Bf16 => dst.copy_from_slice(&value.to_le_bytes()[2..]),
                }
            }
        }
        Ok(())
    }

    fn write_cache(&mut self, cache: Cache, first_slot: usize, src: &[u8]) -> Result<()> {
        cache.check_rows("write_cache", first_slot, src.len())?;
        for (row, src) in src.chunks_exact(cache.row_bytes()).enumerate() {
            let element = |bytes: &[u8]| match cache.dtype {
                CacheDtype::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
                CacheDtype::Bf16 => f32::from_le_bytes([0, 0, bytes[0], bytes[1]]),
            };
            let values: Vec<f32> = src.chunks_exact(cache.dtype.size_bytes()).map(element).collect();
            self.memory.set_cache_row(&cache, first_slot + row, &values);
        }
        Ok(())
    }

    fn load_weight(&mut self, source: &WeightSource<'_>) -> Result<Weight> {
        let weight = source.describe(self.memory.weights.len() as u32)?;
        let bias = source.bias.map(<[f32]>::to_vec);
        self.memory.weights.push(DecodedWeight { values: decode_all(source.matrices), bias });
        Ok(weight)
    }

    fn load_experts(&mut self, source: &ExpertsSource<'_>) -> Result<Experts> {
        let experts = source.describe(self.memory.experts.len() as u32)?;
        self.memory.experts.push(DecodedExperts {
            gate: decode_all(source.gate),
            up: decode_all(source.up),
            down: decode_all(source.down),
            biases: source.biases.map(|b| b.map(<[f32]>::to_vec)),
        });
        Ok(experts)
    }

    operations! {
        embed: Embed,
        rope_table: RopeTable,
        rms_norm: RmsNorm,
        layer_norm: LayerNorm,
        linear: Linear<'_>,
        linear_heads: LinearHeads,
        rope: Rope,
        kv_store: KvStore<'_>,
        attend_gqa: AttendGqa,
        attend_mla: AttendMla,
        index_score: IndexScore,
        index_topk: IndexTopk,
        route: Route,
        moe_gate_up: MoeGateUp,
        moe_down: MoeDown,
        gate_up: GateUp,
        add: Add,
        gather_rows: GatherRows,
        argmax: Argmax,
        sample: Sample,
    }
}
