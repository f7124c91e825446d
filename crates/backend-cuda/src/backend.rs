//! The operations: which kernel, which grid, which scratch memory. One piece: a method an operation, in the order of the trait.

mod products;

use self::products::{WeightRef, activation_args, gemv_variant, slices};

use crate::args;
use crate::args::{Mat, Matmul, Part, Routing};
use crate::buffers::{DeviceBuffer, Parts};
use crate::driver::{Device, DevicePtr, Graph, Memory, NAME, device_error};
use crate::kernels::{ATTENTION_SHARED, Kernels};
use crate::weights::{DeviceWeight, Loader, format_name, product_suffix, ring_bytes};
use moellon_ops::backend::WeightFormatSet;
use moellon_ops::{
    Activation, ActivationPrecision, Add, Argmax, AttendGqa, AttendMla, Backend, Buffer, Cache, CacheDtype, Caps,
    ElementType, Embed, Error, Experts, ExpertsSource, GateUp, GatherRows, IndexScore, IndexTopk, KvStore, LayerNorm,
    Linear, LinearHeads, MoeDown, MoeGateUp, Paging, Result, RmsNorm, Rope, RopePairs, RopeTable, Route, Scoring,
    Tensor, Weight, WeightSource,
};
use moellon_tensor::WeightFormat;
use std::collections::HashMap;
use std::path::PathBuf;

/// Rows up to which products stream weights once past all rows in registers (`gemv`); more go through `gemm`. The results
/// are the same bits.
const GEMV_ROWS: usize = 16;
/// Warps of a block of products.
const WARPS: usize = 8;
/// Choices of experts (rows times top-k) that one block of the weighted sum keeps.
const DOWN_SLOTS: usize = 128;
/// Keys in one part of an attention row (`SPLIT` of attention.cu).
const SPLIT: usize = 64;
/// Keys that attention keeps in shared memory at a time (`TILE`).
const TILE: u32 = 32;
/// Most bytes of partial attention results at a time.
const PARTIAL_BYTES: usize = 256 << 20;

/// How to open the back end.
#[derive(Debug, Clone, Default)]
pub struct CudaOptions {
    /// Which GPU.
    pub ordinal: usize,
    /// A folder of CUBINs to use instead of those in this binary, for work on kernels.
    pub kernels: Option<PathBuf>,
}

struct DeviceExperts {
    gate: DeviceWeight,
    up: DeviceWeight,
    down: DeviceWeight,
}

struct DeviceCache {
    memory: Memory,
}

/// Scratch memory that grows to the largest step seen.
#[derive(Default)]
struct Scratch {
    memory: Option<Memory>,
}

impl Scratch {
    fn pointer(&mut self, what: &str, bytes: u64, device: &mut Device) -> Result<DevicePtr> {
        if self.memory.as_ref().is_none_or(|m| m.bytes() < bytes) {
            device.synchronize()?;
            self.memory = None;
            self.memory = Some(device.alloc(what, bytes)?);
        }
        Ok(self.memory.as_ref().map_or(0, Memory::pointer))
    }
}

/// Activations, weights and caches on one NVIDIA GPU.
pub struct CudaBackend {
    caps: Caps,
    buffers: HashMap<u32, DeviceBuffer>,
    weights: Vec<DeviceWeight>,
    experts: Vec<DeviceExperts>,
    caches: Vec<DeviceCache>,
    next_buffer: u32,
    scratch: [Scratch; 2],
    partial: Scratch,
    sorted: Scratch,
    /// Whose choices `sorted` holds.
    sorted_for: Option<Tensor>,
    loader: Option<Loader>,
    graphs: HashMap<u64, Recording>,
    recording: Option<u64>,
    kernels: Kernels,
    // Last: everything above is freed before the context is given back.
    device: Device,
}

/// What is known about a step with some key.
enum Recording {
    /// It ran once, which made all scratch memory; the next time it is recorded.
    Seen,
    Ready(Graph),
}

impl CudaBackend {
    /// Opens a GPU and loads the kernels.
    ///
    /// # Errors
    /// [`Error::Device`] in one line: no driver, no such GPU, no kernels for it.
    pub fn new(options: &CudaOptions) -> Result<Self> {
        let mut device = Device::open(options.ordinal)?;
        let kernels = Kernels::load(&mut device, options.kernels.as_deref())?;
        let (_, total) = device.memory()?;
        let caps = Caps {
            name: NAME,
            device: format!(
                "{}, {} multiprocessors, {:.1} GiB, driver for CUDA {}.{}",
                device.name,
                device.multiprocessors,
                total as f64 / f64::from(1 << 30),
                device.driver_version / 1000,
                device.driver_version % 1000 / 10,
            ),
            activations: ActivationPrecision::Half,
            formats: WeightFormatSet::ALL,
            memory_bytes: Some(total),
        };
        Ok(CudaBackend {
            caps,
            buffers: HashMap::new(),
            weights: Vec::new(),
            experts: Vec::new(),
            caches: Vec::new(),
            next_buffer: 0,
            scratch: Default::default(),
            partial: Scratch::default(),
            sorted: Scratch::default(),
            sorted_for: None,
            loader: None,
            graphs: HashMap::new(),
            recording: None,
            kernels,
            device,
        })
    }

    fn buffer(&mut self, tensor: Tensor) -> Result<&mut DeviceBuffer> {
        self.buffers
            .get_mut(&tensor.buffer.id)
            .ok_or_else(|| device_error(format!("buffer {} was freed or never made", tensor.buffer.id)))
    }

    fn input(&mut self, tensor: Tensor) -> Result<Mat> {
        Ok(self.buffer(tensor)?.input(tensor))
    }

    fn optional(&mut self, tensor: Option<Tensor>) -> Result<Mat> {
        tensor.map_or(Ok(Mat::default()), |t| self.input(t))
    }

    fn output(&mut self, tensor: Tensor) -> Result<Mat> {
        Ok(self.buffer(tensor)?.output(tensor))
    }

    /// Address of a view of integers or of a single row.
    fn address(&mut self, tensor: Tensor) -> Result<DevicePtr> {
        Ok(self.buffer(tensor)?.at(tensor.offset))
    }

    fn paging(&mut self, paging: &Paging) -> Result<args::Paging> {
        Ok(args::Paging {
            positions: self.address(paging.positions)?,
            sequences: self.address(paging.sequences)?,
            block_table: self.address(paging.block_table)?,
            max_blocks: paging.block_table.stride as u32,
            block_size: paging.block_size as u32,
        })
    }

    fn loader(&mut self) -> Result<Loader> {
        match self.loader.take() {
            Some(loader) => Ok(loader),
            None => Loader::new(&mut self.device),
        }
    }

    /// Scratch memory as `[rows, cols]` floats.
    fn scratch(&mut self, which: usize, rows: usize, cols: usize) -> Result<Mat> {
        let p = self.scratch[which].pointer("scratch of a step", 4 * (rows * cols) as u64, &mut self.device)?;
        Ok(Mat { p, twin: 0, rows: rows as u32, cols: cols as u32, stride: cols as u32, pad: 0 })
    }

    /// `out = f(gate, up)` of two scratch matrices.
    fn activate(&mut self, gate: Mat, up: Mat, out: Mat, activation: Activation) -> Result<()> {
        let kernel = self.kernels.rows("activate_rows")?;
        let args = args::Activate { gate, up, out, activation: activation_args(activation) };
        self.device.launch(&kernel, [out.cols.div_ceil(256), out.rows, 1], 256, 0, &args)
    }

    /// A kernel that has one block a row.
    fn row_kernel<A: Copy>(&mut self, name: &str, rows: usize, block: u32, shared: u32, args: &A) -> Result<()> {
        let kernel = self.kernels.rows(name)?;
        self.device.launch(&kernel, [rows as u32, 1, 1], block, shared, args)
    }

    /// Attention in parts and their join, a range of rows at a time so that the parts stay within their memory.
    fn attend(
        &mut self,
        mut args: args::Attend,
        num_tokens: usize,
        max_keys: usize,
        index_rows: Option<usize>,
    ) -> Result<()> {
        let splits = max_keys.div_ceil(SPLIT).max(1);
        let row_bytes = args.num_heads as usize * splits * (2 + args.value_dim as usize) * 4;
        let chunk = (PARTIAL_BYTES / row_bytes).clamp(1, num_tokens.max(1));
        args.partial = self.partial.pointer("parts of attention", (chunk * row_bytes) as u64, &mut self.device)?;
        args.max_splits = splits as u32;
        let lanes = [64, 128, 256, 512].into_iter().find(|d| *d >= args.value_dim);
        let Some(lanes) = lanes else {
            return Err(device_error(format!("a value head has {} elements, expected at most 512", args.value_dim)));
        };
        let (dtype, size) = if args.cache_bf16 == 1 { ("bf16", 2) } else { ("f32", 4) };
        let kernel = self.kernels.attention(&format!("attend{}_{dtype}", lanes / 64))?;
        let join = self.kernels.attention("attend_join")?;
        // The sizes of `attend` in attention.cu.
        let per = 16 / size;
        let padded = (args.q_dim + args.q_rope_dim).next_multiple_of(per);
        let values = if args.values_are_keys == 1 { 0 } else { args.value_dim.next_multiple_of(per) };
        let shared = 4 * args.heads_per_block * padded + size * TILE * (padded + per + values);
        if shared > ATTENTION_SHARED - 1024 {
            return Err(device_error(format!(
                "attention needs {shared} bytes of shared memory for keys of {} elements, expected at most {}",
                args.q_dim + args.q_rope_dim,
                ATTENTION_SHARED - 1024
            )));
        }
        let groups = args.num_heads / args.heads_per_block;
        let whole = args;
        for first in (0..num_tokens).step_by(chunk) {
            let rows = chunk.min(num_tokens - first);
            let mut part = whole;
            let skip = |m: Mat| Mat {
                p: if m.p == 0 { 0 } else { m.p + 4 * first as u64 * u64::from(m.stride) },
                twin: if m.twin == 0 { 0 } else { m.twin + 2 * first as u64 * u64::from(m.stride) },
                ..m
            };
            (part.q, part.q_rope, part.out) = (skip(whole.q), skip(whole.q_rope), skip(whole.out));
            part.paging.positions += 4 * first as u64;
            part.paging.sequences += 4 * first as u64;
            if let Some(stride) = index_rows {
                part.index_ids += 4 * (first * stride) as u64;
                part.index_counts += 4 * first as u64;
            }
            self.device.launch(&kernel, [splits as u32, groups, rows as u32], 256, shared, &part)?;
            self.device.launch(&join, [args.num_heads, rows as u32, 1], 128, 0, &part)?;
        }
        Ok(())
    }

    fn fresh_weight(
        &mut self,
        name: &str,
        matrices: &[moellon_tensor::MatrixView<'_>],
        bias: Option<&[f32]>,
    ) -> Result<DeviceWeight> {
        let mut loader = self.loader()?;
        let loaded = loader.load(name, matrices, bias, &mut self.device, &mut self.kernels);
        self.loader = Some(loader);
        loaded
    }
}

/// Threads for a kernel that works on a row of `cols` elements with one block: a function of `cols` alone, for the same reason.
fn row_threads(cols: usize) -> u32 {
    (cols.div_ceil(8).next_multiple_of(32)).clamp(32, 1024) as u32
}

impl Backend for CudaBackend {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn alloc(&mut self, what: &str, element: ElementType, len: usize) -> Result<Buffer> {
        let memory = self.device.alloc_zeroed(what, 4 * len as u64)?;
        let id = self.next_buffer;
        self.next_buffer += 1;
        self.buffers.insert(id, DeviceBuffer::new(memory));
        Ok(Buffer { id, element, len })
    }

    fn free(&mut self, buffer: Buffer) {
        self.graphs.clear();
        self.buffers.remove(&buffer.id);
    }

    fn write_f32(&mut self, dst: Tensor, src: &[f32]) -> Result<()> {
        self.write(dst, bytemuck::cast_slice(src))
    }

    fn write_u32(&mut self, dst: Tensor, src: &[u32]) -> Result<()> {
        self.write(dst, bytemuck::cast_slice(src))
    }

    fn read_f32(&mut self, src: Tensor, dst: &mut [f32]) -> Result<()> {
        self.read(src, bytemuck::cast_slice_mut(dst))
    }

    fn read_u32(&mut self, src: Tensor, dst: &mut [u32]) -> Result<()> {
        self.read(src, bytemuck::cast_slice_mut(dst))
    }

    fn synchronize(&mut self) -> Result<()> {
        self.device.synchronize()
    }

    fn measure_read(&mut self) -> Result<Option<f64>> {
        const BYTES: u64 = 4 << 30;
        const PASSES: u32 = 5;
        let memory = self.device.alloc_zeroed("measuring bandwidth", BYTES)?;
        let kernel = self.kernels.rows("read_all")?;
        let args = args::Read { p: memory.pointer(), len: BYTES / 16, out: memory.pointer() };
        let blocks = self.device.multiprocessors * 4;
        let mut best = 0.0f64;
        for pass in 0..=PASSES {
            self.device.synchronize()?;
            let started = std::time::Instant::now();
            self.device.launch(&kernel, [blocks, 1, 1], 512, 0, &args)?;
            self.device.synchronize()?;
            // The first pass warms up. The time of a launch (microseconds) counts against a millisecond.
            if pass > 0 {
                best = best.max(BYTES as f64 / started.elapsed().as_secs_f64());
            }
        }
        Ok(Some(best))
    }

    fn records_steps(&self) -> bool {
        true
    }

    fn replay(&mut self, key: u64) -> Result<bool> {
        match self.graphs.get(&key) {
            Some(Recording::Ready(graph)) => self.device.launch_graph(graph).map(|()| true),
            _ => Ok(false),
        }
    }

    fn begin_recording(&mut self, key: u64) -> Result<()> {
        // The first run makes scratch memory and twins, which must not happen while recording.
        if self.graphs.insert(key, Recording::Seen).is_some() {
            self.device.begin_capture()?;
            self.recording = Some(key);
        }
        Ok(())
    }

    fn end_recording(&mut self, complete: bool) -> Result<()> {
        let Some(key) = self.recording.take() else { return Ok(()) };
        let graph = self.device.end_capture();
        if !complete {
            self.graphs.remove(&key);
            return Ok(());
        }
        let graph = graph?;
        self.device.launch_graph(&graph)?;
        self.graphs.insert(key, Recording::Ready(graph));
        Ok(())
    }

    fn alloc_cache(&mut self, what: &str, dtype: CacheDtype, num_slots: usize, width: usize) -> Result<Cache> {
        let memory = self.device.alloc_zeroed(what, (num_slots * width * dtype.size_bytes()) as u64)?;
        self.caches.push(DeviceCache { memory });
        Ok(Cache { id: self.caches.len() as u32 - 1, dtype, num_slots, width })
    }

    fn read_cache(&mut self, cache: Cache, first_slot: usize, dst: &mut [u8]) -> Result<()> {
        cache.check_rows("read_cache", first_slot, dst.len())?;
        let from = self.caches[cache.id as usize].memory.pointer() + (first_slot * cache.row_bytes()) as u64;
        self.device.download(from, dst)
    }

    fn write_cache(&mut self, cache: Cache, first_slot: usize, src: &[u8]) -> Result<()> {
        cache.check_rows("write_cache", first_slot, src.len())?;
        let to = self.caches[cache.id as usize].memory.pointer() + (first_slot * cache.row_bytes()) as u64;
        self.device.upload(to, src)
    }

    fn load_weight(&mut self, source: &WeightSource<'_>) -> Result<Weight> {
        let weight = source.describe(self.weights.len() as u32)?;
        let loaded = self.fresh_weight(source.name, source.matrices, source.bias)?;
        self.weights.push(loaded);
        Ok(weight)
    }

    fn load_experts(&mut self, source: &ExpertsSource<'_>) -> Result<Experts> {
        let experts = source.describe(self.experts.len() as u32)?;
        let bias = |i: usize| source.biases.map(|b| b[i]);
        let gate = self.fresh_weight(source.name, source.gate, bias(0))?;
        let up = self.fresh_weight(source.name, source.up, bias(1))?;
        let down = self.fresh_weight(source.name, source.down, bias(2))?;
        self.experts.push(DeviceExperts { gate, up, down });
        Ok(experts)
    }

    fn embed(&mut self, op: &Embed) -> Result<()> {
        op.validate()?;
        let token_ids = self.address(op.token_ids)?;
        let out = self.output(op.out)?;
        let table = &self.weights[op.table.id as usize];
        let rows = op.token_ids.cols as u32;
        match format_name(table.format) {
            Some(name) => {
                let kernel = self.kernels.pack(&format!("embed_{name}"))?;
                let args = args::EmbedPacked { table: table.packed, token_ids, out };
                self.device.launch(&kernel, [rows, 1, 1], 256, 0, &args)
            }
            None => {
                let kernel = self.kernels.pack("embed_plain")?;
                let kind = match table.format {
                    WeightFormat::F32 => 0,
                    WeightFormat::F16 => 1,
                    _ => 2,
                };
                let args = args::EmbedPlain { table: table.plain, token_ids, out, cols: table.cols as u32, kind };
                self.device.launch(&kernel, [rows, 1, 1], 256, 0, &args)
            }
        }
    }

    fn rope_table(&mut self, op: &RopeTable) -> Result<()> {
        op.validate()?;
        let args = args::RopeTable {
            positions: self.address(op.positions)?,
            inverse_frequencies: self.address(op.inverse_frequencies)?,
            table: self.output(op.table)?,
            scale: op.scale,
            pad: 0,
        };
        self.row_kernel("rope_table", op.table.rows, 32, 0, &args)
    }

    fn rms_norm(&mut self, op: &RmsNorm) -> Result<()> {
        op.validate()?;
        let delta = self.optional(op.delta)?;
        let weight = self.address(op.weight)?;
        let x = if op.delta.is_some() { self.output(op.x)? } else { self.input(op.x)? };
        // The residual's own twin is never read.
        let args =
            args::RmsNorm { x: Mat { twin: 0, ..x }, delta, out: self.output(op.out)?, weight, eps: op.eps, pad: 0 };
        if op.delta.is_some() {
            self.buffer(op.x)?.written_by_host();
        }
        self.row_kernel("rms_norm", op.x.rows, row_threads(op.x.cols), 0, &args)
    }

    fn layer_norm(&mut self, op: &LayerNorm) -> Result<()> {
        op.validate()?;
        let args = args::LayerNorm {
            x: self.input(op.x)?,
            weight: self.address(op.weight)?,
            bias: self.address(op.bias)?,
            out: self.output(op.out)?,
            eps: op.eps,
            pad: 0,
        };
        self.row_kernel("layer_norm", op.x.rows, row_threads(op.x.cols), 0, &args)
    }

    fn linear(&mut self, op: &Linear<'_>) -> Result<()> {
        op.validate()?;
        let mut rest: Vec<(Weight, Tensor)> = op.parts.to_vec();
        while let Some(first) = rest.first().copied() {
            let format = self.weights[first.0.id as usize].format;
            // Weights of one format share a launch.
            let (same, others): (Vec<_>, Vec<_>) =
                rest.into_iter().partition(|(w, _)| self.weights[w.id as usize].format == format);
            rest = others;
            let x = self.whole_input(op.x, format)?;
            let fused = product_suffix(format).filter(|_| op.x.rows <= GEMV_ROWS && same.len() > 1);
            let Some(name) = fused else {
                for (weight, out) in same {
                    let out = self.output(out)?;
                    self.product(WeightRef::Linear(weight), x, out, Routing::default())?;
                }
                continue;
            };
            for group in same.chunks(4) {
                let mut args = x.args(op.x.cols, Routing::default());
                args.num_parts = group.len() as u32;
                let mut blocks = 0;
                for (i, (weight, out)) in group.iter().enumerate() {
                    args.part[i] = Part { w: self.weights[weight.id as usize].packed, out: self.output(*out)? };
                    args.first_block[i] = blocks;
                    blocks += weight.rows.div_ceil(16).div_ceil(WARPS / slices(op.x.cols)) as u32;
                    args.first_block[i + 1] = blocks;
                }
                let kernel = self.kernels.matmul(&format!("linear{}_{name}", gemv_variant(op.x.rows)))?;
                self.device.launch(&kernel, [blocks, 1, 1], 256, ring_bytes(format, 1), &args)?;
            }
        }
        Ok(())
    }

    fn linear_heads(&mut self, op: &LinearHeads) -> Result<()> {
        op.validate()?;
        let format = self.weights[op.weight.id as usize].format;
        if format_name(format).is_some() && !op.x_head_stride.is_multiple_of(8) {
            return Err(device_error(format!("stride of heads is {}, expected a multiple of 8", op.x_head_stride)));
        }
        let parts = Parts { count: op.weight.count, stride: op.x_head_stride, cols: op.weight.cols };
        let x = self.product_input(op.x, format, parts)?;
        let out = self.output(op.out)?;
        self.product(WeightRef::Linear(op.weight), x, out, Routing::default())
    }

    fn rope(&mut self, op: &Rope) -> Result<()> {
        op.validate()?;
        let args = args::Rope {
            table: self.input(op.table)?,
            x: self.output(op.x)?,
            num_heads: op.num_heads as u32,
            head_stride: op.head_stride as u32,
            interleaved: u32::from(op.pairs == RopePairs::Interleaved),
            pad: 0,
        };
        let pairs = op.num_heads * op.table.cols / 2;
        let kernel = self.kernels.rows("rope")?;
        self.device.launch(&kernel, [pairs.div_ceil(128) as u32, op.x.rows as u32, 1], 128, 0, &args)
    }

    fn kv_store(&mut self, op: &KvStore<'_>) -> Result<()> {
        op.validate()?;
        let mut parts = [Mat::default(); 4];
        if op.parts.len() > parts.len() {
            return Err(device_error(format!("{} parts of a cache row, expected at most 4", op.parts.len())));
        }
        for (part, tensor) in parts.iter_mut().zip(op.parts) {
            *part = self.input(*tensor)?;
        }
        let args = args::KvStore {
            parts,
            slots: self.address(op.slots)?,
            cache: self.caches[op.cache.id as usize].memory.pointer(),
            num_parts: op.parts.len() as u32,
            width: op.cache.width as u32,
            is_bf16: u32::from(op.cache.dtype == CacheDtype::Bf16),
            pad: 0,
        };
        self.row_kernel("kv_store", op.slots.cols, row_threads(op.cache.width), 0, &args)
    }

    fn attend_gqa(&mut self, op: &AttendGqa) -> Result<()> {
        op.validate()?;
        let group = op.num_heads / op.num_kv_heads;
        let heads_per_block = (1..=WARPS.min(group)).rev().find(|h| group.is_multiple_of(*h)).unwrap_or(1);
        let args = args::Attend {
            q: self.input(op.q)?,
            q_rope: Mat::default(),
            out: self.output(op.out)?,
            cache: self.caches[op.cache.id as usize].memory.pointer(),
            partial: 0,
            sinks: op.sinks.map_or(Ok(0), |s| self.address(s))?,
            index_ids: 0,
            index_counts: 0,
            paging: self.paging(&op.paging)?,
            index_stride: 0,
            num_heads: op.num_heads as u32,
            heads_per_block: heads_per_block as u32,
            heads_per_key: group as u32,
            q_dim: op.head_dim as u32,
            q_rope_stride: 0,
            q_rope_dim: 0,
            cache_width: op.cache.width as u32,
            cache_bf16: u32::from(op.cache.dtype == CacheDtype::Bf16),
            key_first: 0,
            key_step: op.head_dim as u32,
            value_first: (op.num_kv_heads * op.head_dim) as u32,
            value_step: op.head_dim as u32,
            value_dim: op.head_dim as u32,
            values_are_keys: 0,
            window: op.window.unwrap_or(0) as u32,
            max_splits: 0,
            scale: op.scale,
        };
        let max_keys = op.window.map_or(op.paging.max_context, |w| w.min(op.paging.max_context));
        self.attend(args, op.q.rows, max_keys, None)
    }

    fn attend_mla(&mut self, op: &AttendMla) -> Result<()> {
        op.validate()?;
        let heads_per_block =
            (1..=WARPS.min(op.num_heads)).rev().find(|h| op.num_heads.is_multiple_of(*h)).unwrap_or(1);
        let (index_ids, index_counts, index_stride) = match op.index {
            Some(index) => (self.address(index.ids)?, self.address(index.counts)?, index.ids.stride),
            None => (0, 0, 0),
        };
        let args = args::Attend {
            q: self.input(op.q_latent)?,
            q_rope: self.input(op.q_rope)?,
            out: self.output(op.out)?,
            cache: self.caches[op.cache.id as usize].memory.pointer(),
            partial: 0,
            sinks: 0,
            index_ids,
            index_counts,
            paging: self.paging(&op.paging)?,
            index_stride: index_stride as u32,
            num_heads: op.num_heads as u32,
            heads_per_block: heads_per_block as u32,
            heads_per_key: op.num_heads as u32,
            q_dim: op.kv_lora_rank as u32,
            q_rope_stride: op.q_rope_head_stride as u32,
            q_rope_dim: op.qk_rope_head_dim as u32,
            cache_width: op.cache.width as u32,
            cache_bf16: u32::from(op.cache.dtype == CacheDtype::Bf16),
            key_first: 0,
            key_step: 0,
            value_first: 0,
            value_step: 0,
            value_dim: op.kv_lora_rank as u32,
            values_are_keys: 1,
            window: 0,
            max_splits: 0,
            scale: op.scale,
        };
        let max_keys = op.index.map_or(op.paging.max_context, |i| i.ids.cols.min(op.paging.max_context));
        self.attend(args, op.q_latent.rows, max_keys, op.index.map(|i| i.ids.stride))
    }

    fn index_score(&mut self, op: &IndexScore) -> Result<()> {
        op.validate()?;
        let args = args::IndexScore {
            q: self.input(op.q)?,
            weights: self.input(op.weights)?,
            scores: self.output(op.scores)?,
            cache: self.caches[op.cache.id as usize].memory.pointer(),
            paging: self.paging(&op.paging)?,
            num_heads: op.num_heads as u32,
            head_dim: op.head_dim as u32,
            cache_bf16: u32::from(op.cache.dtype == CacheDtype::Bf16),
            pad: 0,
            scale: op.scale,
            pad2: 0,
        };
        let shared = 4 * (op.num_heads * (op.head_dim + 1) + WARPS * op.head_dim) as u32;
        let kernel = self.kernels.attention("index_score")?;
        let grid = [op.paging.max_context.div_ceil(64) as u32, op.q.rows as u32, 1];
        self.device.launch(&kernel, grid, 256, shared, &args)
    }

    fn index_topk(&mut self, op: &IndexTopk) -> Result<()> {
        op.validate()?;
        let args = args::IndexTopk {
            scores: self.input(op.scores)?,
            positions: self.address(op.positions)?,
            ids: self.address(op.ids)?,
            counts: self.address(op.counts)?,
            ids_stride: op.ids.stride as u32,
            k: op.ids.cols as u32,
        };
        let kernel = self.kernels.attention("index_topk")?;
        self.device.launch(&kernel, [op.scores.rows as u32, 1, 1], 1024, 0, &args)
    }

    fn route(&mut self, op: &Route) -> Result<()> {
        op.validate()?;
        if op.ids.cols > 32 {
            return Err(device_error(format!("{} experts a token, expected at most 32", op.ids.cols)));
        }
        self.sorted_for = None;
        let args = args::Route {
            logits: self.input(op.logits)?,
            weights: self.output(op.weights)?,
            correction_bias: op.correction_bias.map_or(Ok(0), |b| self.address(b))?,
            ids: self.address(op.ids)?,
            ids_stride: op.ids.stride as u32,
            scoring: match op.scoring {
                Scoring::Sigmoid => 0,
                Scoring::SoftmaxThenTopk => 1,
                Scoring::TopkThenSoftmax => 2,
            },
            n_group: op.n_group as u32,
            topk_group: op.topk_group as u32,
            norm_topk_prob: u32::from(op.norm_topk_prob),
            top_k: op.ids.cols as u32,
            factor: op.routed_scaling_factor,
            pad: 0,
        };
        let shared = 4 * (2 * op.logits.cols + 2 * op.n_group) as u32;
        self.row_kernel("route", op.logits.rows, 32, shared, &args)
    }

    fn moe_gate_up(&mut self, op: &MoeGateUp) -> Result<()> {
        op.validate()?;
        let (tokens, top_k, width) = (op.x.rows, op.ids.cols, op.experts.intermediate_size);
        if tokens == 0 {
            return Ok(());
        }
        let x = self.whole_input(op.x, op.experts.gate_format)?;
        let fused = op.experts.gate_format == op.experts.up_format && tokens <= GEMV_ROWS;
        if let Some(name) = product_suffix(op.experts.gate_format).filter(|_| fused) {
            let routing = self.routing(op.ids, false)?;
            let out = self.output(op.out)?;
            let experts = &self.experts[op.experts.id as usize];
            let mut args = x.args(op.experts.hidden_size, routing);
            args.num_parts = 2;
            args.part[0] = Part { w: experts.gate.packed, out };
            args.part[1] = Part { w: experts.up.packed, out };
            args.activation = activation_args(op.activation);
            let kernel = self.kernels.matmul(&format!("gate_up{}_{name}", gemv_variant(tokens)))?;
            let blocks = width.div_ceil(16).div_ceil(WARPS / slices(op.experts.hidden_size)) as u32;
            let shared = ring_bytes(op.experts.gate_format, 2);
            return self.device.launch(&kernel, [blocks, (tokens * top_k) as u32, 1], 256, shared, &args);
        }
        if op.out.stride != op.out.cols && tokens > 1 {
            return Err(device_error(format!(
                "out of moe_gate_up has stride {}, expected {}",
                op.out.stride, op.out.cols
            )));
        }
        let routing = self.sorted_routing(op.ids, op.experts.num_experts, false)?;
        let up_x = self.whole_input(op.x, op.experts.up_format)?;
        let gate = self.scratch(0, tokens * top_k, width)?;
        let up = self.scratch(1, tokens * top_k, width)?;
        self.product(WeightRef::Gate(op.experts), x, gate, routing)?;
        self.product(WeightRef::Up(op.experts), up_x, up, routing)?;
        let out = self.output(op.out)?;
        let out = Mat { rows: (tokens * top_k) as u32, cols: width as u32, stride: width as u32, ..out };
        self.activate(gate, up, out, op.activation)
    }

    fn moe_down(&mut self, op: &MoeDown) -> Result<()> {
        op.validate()?;
        let (tokens, top_k) = (op.h.rows, op.ids.cols);
        if tokens == 0 {
            return Ok(());
        }
        let width = op.experts.intermediate_size;
        let x = self.product_input(op.h, op.experts.down_format, Parts { count: top_k, stride: width, cols: width })?;
        let weights = self.input(op.weights)?;
        let plus = self.optional(op.plus)?;
        let results = (slices(width) * tokens * top_k * 16 * 4) as u32;
        let fused = tokens <= GEMV_ROWS && tokens * top_k <= DOWN_SLOTS;
        if let Some(name) = product_suffix(op.experts.down_format).filter(|_| fused) {
            let routing = self.routing(op.ids, true)?;
            let out = self.output(op.out)?;
            let w = self.experts[op.experts.id as usize].down.packed;
            let mut args = Matmul { weights, plus, ..x.args(width, routing) };
            args.part[0] = Part { w, out };
            let kernel = self.kernels.matmul(&format!("down{}_{name}", gemv_variant(tokens)))?;
            let blocks = op.experts.hidden_size.div_ceil(16) as u32;
            let shared = ring_bytes(op.experts.down_format, 1) + results;
            return self.device.launch(&kernel, [blocks, 1, 1], 256, shared, &args);
        }
        let routing = self.sorted_routing(op.ids, op.experts.num_experts, true)?;
        let y = self.scratch(0, tokens * top_k, op.experts.hidden_size)?;
        self.product(WeightRef::Down(op.experts), x, y, routing)?;
        let out = self.output(op.out)?;
        let args = args::Combine { y, weights, plus, out, top_k: top_k as u32, pad: 0 };
        let kernel = self.kernels.rows("moe_combine")?;
        self.device.launch(&kernel, [out.cols.div_ceil(256), out.rows, 1], 256, 0, &args)
    }

    fn gate_up(&mut self, op: &GateUp) -> Result<()> {
        op.validate()?;
        let x = self.whole_input(op.x, op.gate.format)?;
        let fused = op.gate.format == op.up.format && op.x.rows <= GEMV_ROWS;
        if let Some(name) = product_suffix(op.gate.format).filter(|_| fused) {
            let out = self.output(op.out)?;
            let mut args = x.args(op.x.cols, Routing::default());
            args.num_parts = 2;
            args.part[0] = Part { w: self.weights[op.gate.id as usize].packed, out };
            args.part[1] = Part { w: self.weights[op.up.id as usize].packed, out };
            args.activation = activation_args(op.activation);
            let kernel = self.kernels.matmul(&format!("gate_up{}_{name}", gemv_variant(op.x.rows)))?;
            let blocks = op.gate.rows.div_ceil(16).div_ceil(WARPS / slices(op.x.cols)) as u32;
            return self.device.launch(&kernel, [blocks, 1, 1], 256, ring_bytes(op.gate.format, 2), &args);
        }
        let up_x = self.whole_input(op.x, op.up.format)?;
        let gate = self.scratch(0, op.x.rows, op.gate.rows)?;
        let up = self.scratch(1, op.x.rows, op.gate.rows)?;
        self.product(WeightRef::Linear(op.gate), x, gate, Routing::default())?;
        self.product(WeightRef::Linear(op.up), up_x, up, Routing::default())?;
        let out = self.output(op.out)?;
        self.activate(gate, up, out, op.activation)
    }

    fn add(&mut self, op: &Add) -> Result<()> {
        op.validate()?;
        let args = args::Add { y: self.input(op.y)?, x: self.output(op.x)? };
        let kernel = self.kernels.rows("add")?;
        self.device.launch(&kernel, [op.x.cols.div_ceil(256) as u32, op.x.rows as u32, 1], 256, 0, &args)
    }

    fn gather_rows(&mut self, op: &GatherRows) -> Result<()> {
        op.validate()?;
        let args = args::Gather { x: self.input(op.x)?, rows: self.address(op.rows)?, out: self.output(op.out)? };
        self.row_kernel("gather_rows", op.rows.cols, 256, 0, &args)
    }

    fn argmax(&mut self, op: &Argmax) -> Result<()> {
        op.validate()?;
        let args = args::Argmax {
            logits: self.input(op.logits)?,
            out: self.address(op.out)?,
            out_stride: op.out.stride as u32,
            pad: 0,
        };
        self.row_kernel("argmax", op.logits.rows, 1024, 0, &args)
    }
}

impl CudaBackend {
    fn write(&mut self, dst: Tensor, src: &[u8]) -> Result<()> {
        check_host("write", dst, src.len())?;
        let row_bytes = 4 * dst.cols;
        let base = self.buffer(dst)?;
        base.written_by_host();
        let base = base.at(dst.offset);
        self.sorted_for = None;
        if dst.stride == dst.cols || dst.rows == 1 {
            return self.device.upload(base, src);
        }
        for (row, src) in src.chunks_exact(row_bytes).enumerate() {
            self.device.upload(base + (4 * row * dst.stride) as u64, src)?;
        }
        Ok(())
    }

    fn read(&mut self, src: Tensor, dst: &mut [u8]) -> Result<()> {
        check_host("read", src, dst.len())?;
        let row_bytes = 4 * src.cols;
        let base = self.address(src)?;
        if src.stride == src.cols || src.rows == 1 {
            return self.device.download(base, dst);
        }
        for (row, dst) in dst.chunks_exact_mut(row_bytes).enumerate() {
            self.device.download(base + (4 * row * src.stride) as u64, dst)?;
        }
        Ok(())
    }
}

/// Checks that a copy has the view's size and stays inside its buffer.
fn check_host(op: &'static str, tensor: Tensor, bytes: usize) -> Result<()> {
    let expected = 4 * tensor.rows * tensor.cols;
    if bytes != expected {
        return Err(Error::Contract {
            op,
            what: "bytes on the host".into(),
            found: bytes.to_string(),
            expected: expected.to_string(),
        });
    }
    let end = tensor.offset + tensor.extent();
    if end > tensor.buffer.len {
        return Err(Error::Contract {
            op,
            what: "end of the view in its buffer".into(),
            found: end.to_string(),
            expected: format!("at most {}", tensor.buffer.len),
        });
    }
    Ok(())
}
