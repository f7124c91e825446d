//! The operations: which kernel, which grid, which scratch memory.

mod attention;
mod products;

use crate::device::{AdapterChoice, Device, Memory, NAME, SelfTest, device_error};
use crate::kernels::Kernel;
use crate::stream::Stream;
use crate::weights::{Company, DeviceWeight};
use moellon_ops::backend::WeightFormatSet;
use moellon_ops::{
    ActivationPrecision, Add, Argmax, AttendGqa, AttendMla, Backend, Buffer, Cache, CacheDtype, Caps, ElementType,
    Embed, Error, Experts, ExpertsSource, GateUp, GatherRows, IndexScore, IndexTopk, KvStore, LayerNorm, Linear,
    LinearHeads, MoeDown, MoeGateUp, Result, RmsNorm, Rope, RopePairs, RopeTable, Route, Scoring, Stage, Tensor,
    Weight, WeightSource,
};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use self::products::{Spreads, WorkListKey};

/// How to open the back end.
#[derive(Clone)]
pub struct WgpuOptions {
    /// Which adapter.
    pub adapter: AdapterChoice,
    /// Where compiled kernels are kept from one run to the next, on adapters whose API can.
    pub cache_folder: Option<PathBuf>,
    /// Decode small codes with integers even where the adapter keeps binary16 subnormals: for tests.
    pub without_half_subnormals: bool,
    /// Told how many kernels are compiled while weights are loaded.
    pub progress: Option<Arc<dyn Fn(usize) + Send + Sync>>,
}

impl Default for WgpuOptions {
    fn default() -> Self {
        WgpuOptions {
            adapter: AdapterChoice { ordinal: 0, allow_software: true },
            cache_folder: None,
            without_half_subnormals: false,
            progress: None,
        }
    }
}

impl std::fmt::Debug for WgpuOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WgpuOptions").field("adapter", &self.adapter).field("cache_folder", &self.cache_folder).finish()
    }
}

struct DeviceExperts {
    gate: DeviceWeight,
    up: DeviceWeight,
    down: DeviceWeight,
}

struct DeviceCache {
    memory: Memory,
    /// Words of a row: two bfloat16 a word.
    row_words: usize,
}

struct DeviceBuffer {
    memory: Memory,
    spreads: Spreads,
}

/// Scratch memory that grows to the largest step seen.
#[derive(Default)]
struct Scratch {
    memory: Option<Memory>,
}

impl Scratch {
    fn get(&mut self, what: &str, bytes: u64, device: &mut Device) -> Result<Memory> {
        if let Some(memory) = self.memory.as_ref().filter(|m| m.bytes >= bytes) {
            return Ok(memory.clone());
        }
        if let Some(old) = self.memory.take() {
            device.forget(&old);
        }
        let fresh = device.alloc(what, bytes)?;
        self.memory = Some(fresh.clone());
        Ok(fresh)
    }
}

/// Activations, weights and caches on one adapter.
pub struct WgpuBackend {
    caps: Caps,
    device: Device,
    stream: Stream,
    buffers: HashMap<u32, DeviceBuffer>,
    next_buffer: u32,
    weights: Vec<DeviceWeight>,
    experts: Vec<DeviceExperts>,
    caches: Vec<DeviceCache>,
    scratch: [Scratch; 2],
    parts: Scratch,
    list: Scratch,
    /// What `list` holds.
    listed: Option<WorkListKey>,
    /// Bound where a kernel's optional argument is not given.
    nothing: Memory,
    staging: Option<wgpu::Buffer>,
    progress: Option<Arc<dyn Fn(usize) + Send + Sync>>,
}

/// Offset and stride of a view, as kernels take them.
fn place(tensor: Tensor) -> [u32; 2] {
    [tensor.offset as u32, tensor.stride as u32]
}

impl WgpuBackend {
    /// Opens an adapter, tests it and compiles the kernels that do not depend on weights.
    ///
    /// # Errors
    /// [`Error::Device`] in one line: no adapter, no such adapter, what it lacks.
    pub fn new(options: &WgpuOptions) -> Result<Self> {
        let mut device = Device::open(options.adapter, options.cache_folder.as_deref())?;
        if options.without_half_subnormals {
            device.self_test.half_subnormals = false;
        }
        let nothing = device.alloc("an argument that is not given", 16)?;
        let report = &device.report;
        let caps = Caps {
            name: NAME,
            device: format!("{} ({}), {} {}", report.name, report.kind, report.api, report.driver),
            activations: ActivationPrecision::Exact,
            formats: WeightFormatSet::ALL,
            memory_bytes: None,
        };
        let mut backend = WgpuBackend {
            caps,
            device,
            stream: Stream::default(),
            buffers: HashMap::new(),
            next_buffer: 0,
            weights: Vec::new(),
            experts: Vec::new(),
            caches: Vec::new(),
            scratch: Default::default(),
            parts: Scratch::default(),
            list: Scratch::default(),
            listed: None,
            nothing,
            staging: None,
            progress: options.progress.clone(),
        };
        backend.compile(Kernel::fixed())?;
        Ok(backend)
    }

    /// What the adapter does where WGSL leaves it a choice.
    pub fn self_test(&self) -> SelfTest {
        self.device.self_test
    }

    /// How many kernels were compiled so far, and how long that took.
    pub fn compiled(&self) -> (usize, Duration) {
        self.device.compiled()
    }

    /// Compiles kernels now, so that no step has to.
    fn compile(&mut self, kernels: impl IntoIterator<Item = Kernel>) -> Result<()> {
        let before = self.device.compiled().0;
        for kernel in kernels {
            let known = self.device.compiled().0;
            self.device.pipeline(kernel)?;
            if let Some(progress) = self.progress.as_ref().filter(|_| self.device.compiled().0 > known) {
                progress(self.device.compiled().0);
            }
        }
        if self.device.compiled().0 > before {
            self.device.save_cache();
        }
        Ok(())
    }

    fn buffer(&self, tensor: Tensor) -> Result<&DeviceBuffer> {
        self.buffers
            .get(&tensor.buffer.id)
            .ok_or_else(|| device_error(format!("buffer {} was freed or never made", tensor.buffer.id)))
    }

    fn memory(&self, tensor: Tensor) -> Result<Memory> {
        Ok(self.buffer(tensor)?.memory.clone())
    }

    fn optional(&self, tensor: Option<Tensor>) -> Result<(Memory, [u32; 2])> {
        match tensor {
            Some(tensor) => Ok((self.memory(tensor)?, place(tensor))),
            None => Ok((self.nothing.clone(), [0, 0])),
        }
    }

    /// Memory of a view that is about to be written: other forms of it are stale.
    fn output(&mut self, tensor: Tensor) -> Result<Memory> {
        if self.listed.is_some_and(|listed| listed.ids.buffer.id == tensor.buffer.id) {
            self.listed = None;
        }
        let id = tensor.buffer.id;
        let buffer =
            self.buffers.get_mut(&id).ok_or_else(|| device_error(format!("buffer {id} was freed or never made")))?;
        buffer.spreads.forget();
        Ok(buffer.memory.clone())
    }

    /// Appends a kernel to the stream.
    fn run(&mut self, kernel: Kernel, memories: &[&Memory], arguments: &[u32], grid: [usize; 3]) -> Result<()> {
        const MOST: usize = 65535;
        if let Some(too_many) = grid.iter().find(|n| **n > MOST) {
            return Err(device_error(format!(
                "a grid of {too_many} workgroups in one dimension, expected at most {MOST}"
            )));
        }
        let pipeline = self.device.pipeline(kernel)?;
        let group = self.device.bind(&pipeline, memories);
        self.stream.push(&pipeline, group, arguments, grid.map(|n| n as u32), &self.device);
        Ok(())
    }

    fn load(
        &mut self,
        name: &str,
        matrices: &[moellon_tensor::MatrixView<'_>],
        bias: Option<&[f32]>,
        company: Company,
    ) -> Result<DeviceWeight> {
        let weight = DeviceWeight::load(name, matrices, bias, company, &mut self.device)?;
        self.compile(Kernel::of_code(weight.code, self.device.tokens()))?;
        Ok(weight)
    }

    /// Everything that is kept in another form is stale: before a step is recorded and after one is replayed.
    fn forget_forms(&mut self) {
        self.listed = None;
        self.buffers.values_mut().for_each(|buffer| buffer.spreads.forget());
    }

    fn write(&mut self, dst: Tensor, src: &[u8]) -> Result<()> {
        check_host("write", dst, src.len())?;
        let memory = self.output(dst)?;
        // What waits was appended before; writes of the queue run before the next submission.
        self.stream.flush(&self.device);
        let at = 4 * dst.offset as u64;
        if dst.stride == dst.cols || dst.rows == 1 {
            self.device.queue.write_buffer(&memory.buffer, at, src);
        } else {
            for (row, src) in src.chunks_exact(4 * dst.cols).enumerate() {
                self.device.queue.write_buffer(&memory.buffer, at + 4 * (row * dst.stride) as u64, src);
            }
        }
        Ok(())
    }

    fn read(&mut self, src: Tensor, dst: &mut [u8]) -> Result<()> {
        check_host("read", src, dst.len())?;
        let memory = self.memory(src)?;
        if dst.is_empty() {
            return Ok(());
        }
        // All rows with what stands between them, in one copy.
        if src.stride == src.cols || src.rows == 1 {
            return self.download(&memory, 4 * src.offset as u64, dst);
        }
        let mut all = vec![0; 4 * src.extent()];
        self.download(&memory, 4 * src.offset as u64, &mut all)?;
        for (row, dst) in dst.chunks_exact_mut(4 * src.cols).enumerate() {
            dst.copy_from_slice(&all[4 * row * src.stride..][..4 * src.cols]);
        }
        Ok(())
    }

    /// Waits for the stream and copies whole words.
    fn download(&mut self, from: &Memory, at: u64, dst: &mut [u8]) -> Result<()> {
        let bytes = dst.len() as u64;
        let staging = match self.staging.take().filter(|staging| staging.size() >= bytes) {
            Some(staging) => staging,
            None => self.device.staging(bytes.next_power_of_two())?,
        };
        self.stream.flush(&self.device);
        let mut encoder = self.device.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        encoder.copy_buffer_to_buffer(&from.buffer, at, &staging, 0, bytes);
        self.device.queue.submit([encoder.finish()]);
        self.device.map_read(&staging, dst)?;
        self.staging = Some(staging);
        Ok(())
    }
}

impl Drop for WgpuBackend {
    fn drop(&mut self) {
        // Nothing of ours may be in use when memory is given back.
        let _ = self.stream.wait(&self.device);
    }
}

impl Backend for WgpuBackend {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn alloc(&mut self, what: &str, element: ElementType, len: usize) -> Result<Buffer> {
        let memory = self.device.alloc(what, 4 * len as u64)?;
        let id = self.next_buffer;
        self.next_buffer += 1;
        self.buffers.insert(id, DeviceBuffer { memory, spreads: Spreads::default() });
        Ok(Buffer { id, element, len })
    }

    fn free(&mut self, buffer: Buffer) {
        self.stream.flush(&self.device);
        self.stream.forget_recordings();
        if let Some(freed) = self.buffers.remove(&buffer.id) {
            self.device.forget(&freed.memory);
            freed.spreads.memories().for_each(|memory| self.device.forget(memory));
        }
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
        self.stream.wait(&self.device)
    }

    fn measure_read(&mut self) -> Result<Option<f64>> {
        const PASSES: usize = 5;
        /// Several times any cache; less where one binding cannot have as much.
        const BYTES: u64 = 2 << 30;
        let bytes = BYTES.min(self.device.max_binding_bytes());
        let memory = self.device.alloc("measuring bandwidth", bytes)?;
        let nothing = self.nothing.clone();
        let invocations = 4096 * 256;
        let mut best = 0.0f64;
        for pass in 0..=PASSES {
            self.synchronize()?;
            let started = std::time::Instant::now();
            let arguments = [(bytes / 16) as u32, invocations as u32];
            self.run(Kernel::ReadAll, &[&nothing, &memory], &arguments, [invocations / 256, 1, 1])?;
            self.synchronize()?;
            // The first pass warms up. The time of a submission (microseconds) counts against milliseconds.
            if pass > 0 {
                best = best.max(bytes as f64 / started.elapsed().as_secs_f64());
            }
        }
        self.device.forget(&memory);
        Ok(Some(best))
    }

    fn records_steps(&self) -> bool {
        true
    }

    fn replay(&mut self, key: u64) -> Result<bool> {
        let known = self.stream.replay(key, &self.device);
        if known {
            self.forget_forms();
        }
        Ok(known)
    }

    fn begin_recording(&mut self, key: u64) -> Result<()> {
        self.forget_forms();
        self.stream.begin(key);
        Ok(())
    }

    fn end_recording(&mut self, complete: bool) -> Result<()> {
        self.stream.end(complete, &self.device);
        Ok(())
    }

    fn alloc_cache(&mut self, what: &str, dtype: CacheDtype, num_slots: usize, width: usize) -> Result<Cache> {
        let row_words = (width * dtype.size_bytes()).div_ceil(4);
        let memory = self.device.alloc(what, (num_slots * row_words * 4) as u64)?;
        self.caches.push(DeviceCache { memory, row_words });
        Ok(Cache { id: self.caches.len() as u32 - 1, dtype, num_slots, width })
    }

    fn read_cache(&mut self, cache: Cache, first_slot: usize, dst: &mut [u8]) -> Result<()> {
        cache.check_rows("read_cache", first_slot, dst.len())?;
        let DeviceCache { memory, row_words } = &self.caches[cache.id as usize];
        let (memory, padded) = (memory.clone(), 4 * row_words);
        let mut rows = vec![0; dst.len() / cache.row_bytes() * padded];
        if rows.is_empty() {
            return Ok(());
        }
        self.download(&memory, (first_slot * padded) as u64, &mut rows)?;
        for (dst, row) in dst.chunks_exact_mut(cache.row_bytes()).zip(rows.chunks_exact(padded)) {
            dst.copy_from_slice(&row[..cache.row_bytes()]);
        }
        Ok(())
    }

    fn write_cache(&mut self, cache: Cache, first_slot: usize, src: &[u8]) -> Result<()> {
        cache.check_rows("write_cache", first_slot, src.len())?;
        let DeviceCache { memory, row_words } = &self.caches[cache.id as usize];
        let padded = 4 * row_words;
        let mut rows = vec![0; src.len() / cache.row_bytes() * padded];
        for (row, src) in rows.chunks_exact_mut(padded).zip(src.chunks_exact(cache.row_bytes())) {
            row[..src.len()].copy_from_slice(src);
        }
        self.stream.flush(&self.device);
        self.device.queue.write_buffer(&memory.buffer, (first_slot * padded) as u64, &rows);
        Ok(())
    }

    fn load_weight(&mut self, source: &WeightSource<'_>) -> Result<Weight> {
        let weight = source.describe(self.weights.len() as u32)?;
        let company = if weight.count == 1 { Company::Alone } else { Company::All };
        let loaded = self.load(source.name, source.matrices, source.bias, company)?;
        self.weights.push(loaded);
        Ok(weight)
    }

    fn load_experts(&mut self, source: &ExpertsSource<'_>) -> Result<Experts> {
        let experts = source.describe(self.experts.len() as u32)?;
        let bias = |i: usize| source.biases.map(|b| b[i]);
        let gate = self.load(source.name, source.gate, bias(0), Company::Few)?;
        let up = self.load(source.name, source.up, bias(1), Company::Few)?;
        let down = self.load(source.name, source.down, bias(2), Company::Few)?;
        self.experts.push(DeviceExperts { gate, up, down });
        Ok(experts)
    }

    fn embed(&mut self, op: &Embed) -> Result<()> {
        op.validate()?;
        let (ids, out) = (self.memory(op.token_ids)?, self.output(op.out)?);
        let table = &self.weights[op.table.id as usize];
        let (code, chunks, extra) = (table.code, table.chunks, table.extra.clone());
        let rest = [table.block_columns as u32, table.scale_words as u32, u32::from(table.has_global)];
        let shards: Vec<_> = table
            .shards
            .iter()
            .map(|s| (s.codes.clone(), s.scales.clone(), [s.first_row as u32, s.num_rows as u32]))
            .collect();
        for (codes, scales, [first_row, num_rows]) in shards {
            let [out_offset, out_stride] = place(op.out);
            let head = [op.token_ids.offset as u32, out_offset, out_stride, op.out.cols as u32, chunks as u32];
            let arguments = [&head[..], &[first_row, num_rows], &rest[..]].concat();
            let grid = [chunks.div_ceil(64), op.token_ids.cols, 1];
            self.run(Kernel::Embed(code), &[&out, &ids, &codes, &scales, &extra], &arguments, grid)?;
        }
        Ok(())
    }

    fn rope_table(&mut self, op: &RopeTable) -> Result<()> {
        op.validate()?;
        let (positions, inverse) = (self.memory(op.positions)?, self.memory(op.inverse_frequencies)?);
        let table = self.output(op.table)?;
        let [offset, stride] = place(op.table);
        let arguments = [
            op.positions.offset as u32,
            op.inverse_frequencies.offset as u32,
            offset,
            stride,
            (op.table.cols / 2) as u32,
            op.scale.to_bits(),
        ];
        self.run(Kernel::RopeTable, &[&positions, &inverse, &table], &arguments, [op.table.rows, 1, 1])
    }

    fn rms_norm(&mut self, op: &RmsNorm) -> Result<()> {
        op.validate()?;
        let (delta, [delta_offset, delta_stride]) = self.optional(op.delta)?;
        let x = if op.delta.is_some() { self.output(op.x)? } else { self.memory(op.x)? };
        let (weight, out) = (self.memory(op.weight)?, self.output(op.out)?);
        let ([x_offset, x_stride], [out_offset, out_stride]) = (place(op.x), place(op.out));
        let arguments = [
            x_offset,
            x_stride,
            delta_offset,
            delta_stride,
            out_offset,
            out_stride,
            op.weight.offset as u32,
            op.x.cols as u32,
            u32::from(op.delta.is_some()),
            op.eps.to_bits(),
        ];
        self.run(Kernel::RmsNorm, &[&x, &delta, &out, &weight], &arguments, [op.x.rows, 1, 1])
    }

    fn layer_norm(&mut self, op: &LayerNorm) -> Result<()> {
        op.validate()?;
        let (x, weight, bias) = (self.memory(op.x)?, self.memory(op.weight)?, self.memory(op.bias)?);
        let out = self.output(op.out)?;
        let ([x_offset, x_stride], [out_offset, out_stride]) = (place(op.x), place(op.out));
        let arguments = [
            x_offset,
            x_stride,
            out_offset,
            out_stride,
            op.weight.offset as u32,
            op.bias.offset as u32,
            op.x.cols as u32,
            op.eps.to_bits(),
        ];
        self.run(Kernel::LayerNorm, &[&x, &out, &weight, &bias], &arguments, [op.x.rows, 1, 1])
    }

    fn linear(&mut self, op: &Linear<'_>) -> Result<()> {
        op.validate()?;
        self.linear_parts(op)
    }

    fn linear_heads(&mut self, op: &LinearHeads) -> Result<()> {
        op.validate()?;
        self.product_of_heads(op)
    }

    fn rope(&mut self, op: &Rope) -> Result<()> {
        op.validate()?;
        let (table, x) = (self.memory(op.table)?, self.output(op.x)?);
        let ([x_offset, x_stride], [table_offset, table_stride]) = (place(op.x), place(op.table));
        let half = op.table.cols / 2;
        let arguments = [
            x_offset,
            x_stride,
            table_offset,
            table_stride,
            op.num_heads as u32,
            op.head_stride as u32,
            half as u32,
            u32::from(op.pairs == RopePairs::Interleaved),
        ];
        self.run(Kernel::Rope, &[&x, &table], &arguments, [(op.num_heads * half).div_ceil(128), op.x.rows, 1])
    }

    fn kv_store(&mut self, op: &KvStore<'_>) -> Result<()> {
        op.validate()?;
        if op.parts.len() > 4 {
            return Err(device_error(format!("{} parts of a cache row, expected at most 4", op.parts.len())));
        }
        let slots = self.memory(op.slots)?;
        let DeviceCache { memory: cache, row_words } = &self.caches[op.cache.id as usize];
        let (cache, row_words) = (cache.clone(), *row_words);
        let mut memories = Vec::new();
        let mut arguments = Vec::new();
        let mut end = 0;
        for i in 0..4 {
            let (memory, view) = self.optional(op.parts.get(i).copied())?;
            memories.push(memory);
            end += op.parts.get(i).map_or(0, |part| part.cols);
            arguments.extend(view);
            if i < 3 {
                arguments.push(end as u32);
            }
        }
        let is_bf16 = u32::from(op.cache.dtype == CacheDtype::Bf16);
        arguments.extend([op.slots.offset as u32, op.cache.width as u32, row_words as u32, is_bf16]);
        let [a, b, c, d] = &memories[..] else { unreachable!("four parts were pushed") };
        let grid = [row_words.div_ceil(128), op.slots.cols, 1];
        self.run(Kernel::KvStore, &[a, b, c, d, &slots, &cache], &arguments, grid)
    }

    fn attend_gqa(&mut self, op: &AttendGqa) -> Result<()> {
        op.validate()?;
        self.attend_heads(op)
    }

    fn attend_mla(&mut self, op: &AttendMla) -> Result<()> {
        op.validate()?;
        self.attend_latent(op)
    }

    fn index_score(&mut self, op: &IndexScore) -> Result<()> {
        op.validate()?;
        self.score_positions(op)
    }

    fn index_topk(&mut self, op: &IndexTopk) -> Result<()> {
        op.validate()?;
        let (scores, positions) = (self.memory(op.scores)?, self.memory(op.positions)?);
        let (ids, counts) = (self.output(op.ids)?, self.output(op.counts)?);
        let ([scores_offset, scores_stride], [ids_offset, ids_stride]) = (place(op.scores), place(op.ids));
        let arguments = [
            scores_offset,
            scores_stride,
            op.positions.offset as u32,
            ids_offset,
            ids_stride,
            op.counts.offset as u32,
            op.ids.cols as u32,
        ];
        self.run(Kernel::IndexTopk, &[&scores, &positions, &ids, &counts], &arguments, [op.scores.rows, 1, 1])
    }

    fn route(&mut self, op: &Route) -> Result<()> {
        op.validate()?;
        let (num_experts, top_k) = (op.logits.cols, op.ids.cols);
        if num_experts > 1024 || top_k > 64 || op.n_group > 256 {
            return Err(device_error(format!(
                "{num_experts} experts in {} groups, {top_k} of them a token: expected at most 1024, 256 and 64",
                op.n_group
            )));
        }
        let (logits, (bias, [bias_offset, _])) = (self.memory(op.logits)?, self.optional(op.correction_bias)?);
        let (ids, weights) = (self.output(op.ids)?, self.output(op.weights)?);
        let ([logits_offset, logits_stride], [ids_offset, ids_stride]) = (place(op.logits), place(op.ids));
        let [weights_offset, weights_stride] = place(op.weights);
        let arguments = [
            logits_offset,
            logits_stride,
            bias_offset,
            ids_offset,
            ids_stride,
            weights_offset,
            weights_stride,
            num_experts as u32,
            top_k as u32,
            match op.scoring {
                Scoring::Sigmoid => 0,
                Scoring::SoftmaxThenTopk => 1,
                Scoring::TopkThenSoftmax => 2,
            },
            op.n_group as u32,
            op.topk_group as u32,
            u32::from(op.correction_bias.is_some()),
            u32::from(op.norm_topk_prob),
            op.routed_scaling_factor.to_bits(),
        ];
        self.run(Kernel::Route, &[&logits, &bias, &ids, &weights], &arguments, [op.logits.rows, 1, 1])
    }

    fn moe_gate_up(&mut self, op: &MoeGateUp) -> Result<()> {
        op.validate()?;
        self.experts_gate_up(op)
    }

    fn moe_down(&mut self, op: &MoeDown) -> Result<()> {
        op.validate()?;
        self.experts_down(op)
    }

    fn gate_up(&mut self, op: &GateUp) -> Result<()> {
        op.validate()?;
        self.dense_gate_up(op)
    }

    fn add(&mut self, op: &Add) -> Result<()> {
        op.validate()?;
        let (y, x) = (self.memory(op.y)?, self.output(op.x)?);
        let arguments = [place(op.x), place(op.y)].concat();
        let arguments = [&arguments[..], &[op.x.cols as u32]].concat();
        self.run(Kernel::Add, &[&x, &y], &arguments, [op.x.cols.div_ceil(256), op.x.rows, 1])
    }

    fn gather_rows(&mut self, op: &GatherRows) -> Result<()> {
        op.validate()?;
        let (x, rows, out) = (self.memory(op.x)?, self.memory(op.rows)?, self.output(op.out)?);
        let ([x_offset, x_stride], [out_offset, out_stride]) = (place(op.x), place(op.out));
        let arguments = [x_offset, x_stride, op.rows.offset as u32, out_offset, out_stride, op.x.cols as u32];
        self.run(Kernel::GatherRows, &[&x, &rows, &out], &arguments, [op.x.cols.div_ceil(256), op.rows.cols, 1])
    }

    fn argmax(&mut self, op: &Argmax) -> Result<()> {
        op.validate()?;
        let (logits, out) = (self.memory(op.logits)?, self.output(op.out)?);
        let arguments = [&place(op.logits)[..], &place(op.out), &[op.logits.cols as u32]].concat();
        self.run(Kernel::Argmax, &[&logits, &out], &arguments, [op.logits.rows, 1, 1])
    }

    fn stage(&mut self, _stage: Stage) {}
}

/// Checks that a copy has the view's size and stays inside its buffer.
fn check_host(op: &'static str, tensor: Tensor, bytes: usize) -> Result<()> {
    let contract = |what: &str, found: usize, expected: String| Error::Contract {
        op,
        what: what.to_owned(),
        found: found.to_string(),
        expected,
    };
    let expected = 4 * tensor.rows * tensor.cols;
    if bytes != expected {
        return Err(contract("bytes on the host", bytes, expected.to_string()));
    }
    let end = tensor.offset + tensor.extent();
    if end > tensor.buffer.len {
        return Err(contract("end of the view in its buffer", end, format!("at most {}", tensor.buffer.len)));
    }
    Ok(())
}
