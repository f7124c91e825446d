//! The back end: memory, weights, caches, and steps that are recorded and replayed.

mod decode;
mod experts;
mod few;
mod gqa;
mod latent;
mod lines;
mod operations;
mod products;

use crate::args;
use crate::args::Mat;
use crate::buffers::DeviceBuffer;
use crate::driver::{Device, DevicePtr, Graph, Memory, NAME, device_error};
use crate::kernels::Kernels;
use crate::loader::Loader;
use crate::weights::DeviceWeight;
use moellon_ops::backend::WeightFormatSet;
use moellon_ops::program::Op;
use moellon_ops::{
    ActivationPrecision, Add, Argmax, AttendGqa, AttendMla, Backend, Buffer, Cache, CacheDtype, Caps, ElementType,
    Embed, Error, Experts, ExpertsSource, GateUp, GatherRows, IndexScore, IndexTopk, KernelTime, KvStore, LayerNorm,
    Linear, LinearHeads, MoeDown, MoeGateUp, Paging, Result, RmsNorm, Rope, RopeTable, Route, Sample, Tensor, Weight,
    WeightSource,
};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::PathBuf;

/// Rows up to which products stream weights once past all rows in registers (`gemv`); more go through `gemm`. The results
/// are the same bits.
const GEMV_ROWS: usize = 32;
/// Warps of a block of products.
const WARPS: usize = 8;
/// Choices of experts (rows times top-k) that one block of the weighted sum keeps.
const DOWN_SLOTS: usize = 256;
/// Keys that attention keeps in shared memory at a time (`TILE`).
const TILE: u32 = 32;
/// Counters that kernels of a step share: `up` has one for 64 hidden values of the chosen experts, `few_line` one for the row tiles of a warp.
const COUNTERS: usize = 16384;
/// Most bytes of partial attention results at a time.
const PARTIAL_BYTES: usize = 256 << 20;

/// How to open the back end.
#[derive(Debug, Clone, Default)]
pub struct CudaOptions {
    /// Which GPU.
    pub ordinal: usize,
    /// A folder of CUBINs to use instead of those in this binary, for work on kernels.
    pub kernels: Option<PathBuf>,
    /// Compile kernels here although this binary has some for the GPU.
    pub compile: bool,
    /// Where kernels that were compiled here are kept.
    pub cache_folder: Option<PathBuf>,
}

struct DeviceExperts {
    gate: DeviceWeight,
    up: DeviceWeight,
    down: DeviceWeight,
}

struct DeviceCache {
    memory: Memory,
}

/// Scratch memory that grows to the largest step seen. Smaller ones are kept: recorded steps point at them.
#[derive(Default)]
struct Scratch {
    memory: Vec<Memory>,
}

/// Below this scratch memory at least doubles when it grows, so that few smaller ones are kept.
const SCRATCH_DOUBLES: u64 = 32 << 20;

impl Scratch {
    fn pointer(&mut self, what: &str, bytes: u64, device: &mut Device) -> Result<DevicePtr> {
        let held = self.memory.last().map_or(0, Memory::bytes);
        if held < bytes {
            let bytes = if held < SCRATCH_DOUBLES { bytes.max(2 * held) } else { bytes };
            self.memory.push(device.alloc_zeroed(what, bytes)?);
        }
        Ok(self.memory.last().map_or(0, Memory::pointer))
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
    /// Digits of a product of many rows, in the order of its tiles.
    blocked: Scratch,
    /// Counters of `up` in decode.cu and `few_line` in few.cu: zero between two steps.
    arrived: Scratch,
    /// The choice of experts of a step of a few rows: `Plan` of few.cu.
    plan: Scratch,
    /// What the chosen experts of a step of a few rows give, before it is added.
    results: Scratch,
    /// Sums of slices that several blocks of `few_line` have.
    slice_sums: Scratch,
    /// Whose choices `sorted` holds.
    sorted_for: Option<Tensor>,
    loader: Option<Loader>,
    graphs: HashMap<u64, Recording>,
    recording: Option<u64>,
    /// The operations of the step that is being recorded.
    program: Option<Vec<Op>>,
    kernels: Kernels,
    // Last: everything above is freed before the context is given back.
    device: Device,
}

/// What is known about a step with some key.
enum Recording {
    /// It ran once, operation by operation, which made all scratch memory.
    Seen,
    /// It ran with operations fused, which loaded all kernels; the next time it is recorded.
    Fused,
    /// The graph, and the operations that it was made of.
    Ready(Graph, Vec<Op>),
}

impl CudaBackend {
    /// Opens a GPU and loads the kernels.
    ///
    /// # Errors
    /// [`Error::Device`] in one line: no driver, no such GPU, no kernels for it.
    pub fn new(options: &CudaOptions) -> Result<Self> {
        let mut device = Device::open(options.ordinal)?;
        let kernels = Kernels::load(&mut device, options)?;
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
            samples: true,
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
            blocked: Scratch::default(),
            arrived: Scratch::default(),
            plan: Scratch::default(),
            results: Scratch::default(),
            slice_sums: Scratch::default(),
            sorted_for: None,
            loader: None,
            graphs: HashMap::new(),
            recording: None,
            program: None,
            kernels,
            device,
        })
    }

    pub(super) fn buffer(&mut self, tensor: Tensor) -> Result<&mut DeviceBuffer> {
        self.buffers
            .get_mut(&tensor.buffer.id)
            .ok_or_else(|| device_error(format!("buffer {} was freed or never made", tensor.buffer.id)))
    }

    pub(super) fn input(&mut self, tensor: Tensor) -> Result<Mat> {
        Ok(self.buffer(tensor)?.input(tensor))
    }

    pub(super) fn optional(&mut self, tensor: Option<Tensor>) -> Result<Mat> {
        tensor.map_or(Ok(Mat::default()), |t| self.input(t))
    }

    pub(super) fn output(&mut self, tensor: Tensor) -> Result<Mat> {
        Ok(self.buffer(tensor)?.output(tensor))
    }

    /// Address of a view of integers or of a single row.
    pub(super) fn address(&mut self, tensor: Tensor) -> Result<DevicePtr> {
        Ok(self.buffer(tensor)?.at(tensor.offset))
    }

    pub(super) fn paging(&mut self, paging: &Paging) -> Result<args::Paging> {
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
    pub(super) fn scratch(&mut self, which: usize, rows: usize, cols: usize) -> Result<Mat> {
        let p = self.scratch[which].pointer("scratch of a step", 4 * (rows * cols) as u64, &mut self.device)?;
        Ok(Mat { p, twin: 0, rows: rows as u32, cols: cols as u32, stride: cols as u32, pad: 0 })
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
            Some(Recording::Ready(graph, _)) => self.device.launch_graph(graph).map(|()| true),
            _ => Ok(false),
        }
    }

    fn begin_recording(&mut self, key: u64) -> Result<()> {
        // Neither memory may be made nor kernels loaded while recording: two runs do that.
        match self.graphs.entry(key) {
            Entry::Vacant(entry) => {
                entry.insert(Recording::Seen);
            }
            Entry::Occupied(_) => {
                self.recording = Some(key);
                self.program = Some(Vec::new());
            }
        }
        Ok(())
    }

    fn end_recording(&mut self, complete: bool) -> Result<()> {
        let Some(key) = self.recording.take() else { return Ok(()) };
        let program = self.program.take().unwrap_or_default();
        if !complete {
            self.graphs.remove(&key);
            return Ok(());
        }
        if matches!(self.graphs.get(&key), Some(Recording::Seen)) {
            self.run_program(&program)?;
            self.graphs.insert(key, Recording::Fused);
            return Ok(());
        }
        self.device.begin_capture()?;
        let launched = self.run_program(&program);
        let graph = self.device.end_capture();
        if let Err(error) = launched {
            self.graphs.remove(&key);
            return Err(error);
        }
        let graph = graph?;
        self.device.launch_graph(&graph)?;
        self.graphs.insert(key, Recording::Ready(graph, program));
        Ok(())
    }

    fn time_kernels(&mut self, key: u64) -> Result<Vec<KernelTime>> {
        let Some(Recording::Ready(_, program)) = self.graphs.get(&key) else { return Ok(Vec::new()) };
        // The driver call that reads the clock is as young as that.
        if self.device.driver_version < 12080 {
            return Ok(Vec::new());
        }
        let program = program.clone();
        self.device.synchronize()?;
        self.device.start_clock()?;
        let launched = self.run_program(&program);
        let times = self.device.stop_clock();
        launched?;
        Ok(times?.into_iter().map(|(name, seconds)| KernelTime { name: name.to_owned(), seconds }).collect())
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
        self.submit(Op::Embed(*op))
    }

    fn rope_table(&mut self, op: &RopeTable) -> Result<()> {
        self.submit(Op::RopeTable(*op))
    }

    fn rms_norm(&mut self, op: &RmsNorm) -> Result<()> {
        self.submit(Op::RmsNorm(*op))
    }

    fn layer_norm(&mut self, op: &LayerNorm) -> Result<()> {
        self.submit(Op::LayerNorm(*op))
    }

    fn linear(&mut self, op: &Linear<'_>) -> Result<()> {
        self.submit(Op::Linear { x: op.x, parts: op.parts.to_vec() })
    }

    fn linear_heads(&mut self, op: &LinearHeads) -> Result<()> {
        self.submit(Op::LinearHeads(*op))
    }

    fn rope(&mut self, op: &Rope) -> Result<()> {
        self.submit(Op::Rope(*op))
    }

    fn kv_store(&mut self, op: &KvStore<'_>) -> Result<()> {
        self.submit(Op::KvStore { parts: op.parts.to_vec(), slots: op.slots, cache: op.cache })
    }

    fn attend_gqa(&mut self, op: &AttendGqa) -> Result<()> {
        self.submit(Op::AttendGqa(*op))
    }

    fn attend_mla(&mut self, op: &AttendMla) -> Result<()> {
        self.submit(Op::AttendMla(*op))
    }

    fn index_score(&mut self, op: &IndexScore) -> Result<()> {
        self.submit(Op::IndexScore(*op))
    }

    fn index_topk(&mut self, op: &IndexTopk) -> Result<()> {
        self.submit(Op::IndexTopk(*op))
    }

    fn route(&mut self, op: &Route) -> Result<()> {
        self.submit(Op::Route(*op))
    }

    fn moe_gate_up(&mut self, op: &MoeGateUp) -> Result<()> {
        self.submit(Op::MoeGateUp(*op))
    }

    fn moe_down(&mut self, op: &MoeDown) -> Result<()> {
        self.submit(Op::MoeDown(*op))
    }

    fn gate_up(&mut self, op: &GateUp) -> Result<()> {
        self.submit(Op::GateUp(*op))
    }

    fn add(&mut self, op: &Add) -> Result<()> {
        self.submit(Op::Add(*op))
    }

    fn gather_rows(&mut self, op: &GatherRows) -> Result<()> {
        self.submit(Op::GatherRows(*op))
    }

    fn argmax(&mut self, op: &Argmax) -> Result<()> {
        self.submit(Op::Argmax(*op))
    }

    fn sample(&mut self, op: &Sample) -> Result<()> {
        self.submit(Op::Sample(*op))
    }
}

impl CudaBackend {
    /// Launches an operation, or keeps it where a step is being recorded.
    fn submit(&mut self, op: Op) -> Result<()> {
        match &mut self.program {
            Some(program) => {
                program.push(op);
                Ok(())
            }
            None => self.execute(&op),
        }
    }

    /// Launches one operation.
    fn execute(&mut self, op: &Op) -> Result<()> {
        match op {
            Op::Embed(op) => self.embed_now(op),
            Op::RopeTable(op) => self.rope_table_now(op),
            Op::RmsNorm(op) => self.rms_norm_now(op),
            Op::LayerNorm(op) => self.layer_norm_now(op),
            Op::Linear { x, parts } => self.linear_now(&Linear { x: *x, parts }),
            Op::LinearHeads(op) => self.linear_heads_now(op),
            Op::Rope(op) => self.rope_now(op),
            Op::KvStore { parts, slots, cache } => self.kv_store_now(&KvStore { parts, slots: *slots, cache: *cache }),
            Op::AttendGqa(op) => self.attend_gqa_now(op),
            Op::AttendMla(op) => self.attend_mla_now(op),
            Op::IndexScore(op) => self.index_score_now(op),
            Op::IndexTopk(op) => self.index_topk_now(op),
            Op::Route(op) => self.route_now(op),
            Op::MoeGateUp(op) => self.moe_gate_up_now(op),
            Op::MoeDown(op) => self.moe_down_now(op),
            Op::GateUp(op) => self.gate_up_now(op),
            Op::Add(op) => self.add_now(op),
            Op::GatherRows(op) => self.gather_rows_now(op),
            Op::Argmax(op) => self.argmax_now(op),
            Op::Sample(op) => self.sample_now(op),
        }
    }

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
