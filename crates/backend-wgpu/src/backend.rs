//! The operations: which kernel, which grid, which scratch memory.

mod attention;
mod beside;
mod experts;
mod forms;
mod fused;
mod operations;
mod products;
mod tiles;

use crate::device::{AdapterChoice, Device, Memory, NAME, SelfTest, device_error};
use crate::kernels::{Company, Kernel, Matrices};
use crate::stream::Stream;
use crate::weights::DeviceWeight;
use moellon_ops::backend::WeightFormatSet;
use moellon_ops::program::Op;
use moellon_ops::{
    ActivationPrecision, Add, Argmax, AttendGqa, AttendMla, Backend, Buffer, Cache, CacheDtype, Caps, ElementType,
    Embed, Error, Experts, ExpertsSource, GateUp, GatherRows, IndexScore, IndexTopk, KvStore, LayerNorm, Linear,
    LinearHeads, MoeDown, MoeGateUp, Result, RmsNorm, Rope, RopeTable, Route, Stage, StepTimes, Tensor, Weight,
    WeightSource,
};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use self::forms::Spreads;
use self::products::WorkListKey;
use self::tiles::{FewestRows, TiledKey};

/// How to open the back end.
#[derive(Clone)]
pub struct WgpuOptions {
    /// Which adapter.
    pub adapter: AdapterChoice,
    /// Where compiled kernels are kept from one run to the next, on adapters whose API can.
    pub cache_folder: Option<PathBuf>,
    /// Decode small codes with integers even where the adapter keeps binary16 subnormals: for tests.
    pub without_half_subnormals: bool,
    /// Copy weights into memory of the adapter's own even where it shares the host's: for tests.
    pub without_shared_memory: bool,
    /// Leave kernels and commands to wgpu even where Vulkan is below it: for tests.
    pub without_vulkan: bool,
    /// Multiply floats even where the adapter multiplies integers: for tests.
    pub without_integer_products: bool,
    /// Launch as if kernels could have few bindings: for tests.
    pub without_many_bindings: bool,
    /// Multiply prompts as few rows, even where cooperative matrices could: for measurements.
    pub without_matrices: bool,
    /// Multiply as prompts from two rows on, a number at a time where there are no cooperative matrices: for tests.
    pub few_rows_by_tiles: bool,
    /// Told how many kernels are compiled while weights are loaded.
    pub progress: Option<Arc<dyn Fn(usize) + Send + Sync>>,
}

impl Default for WgpuOptions {
    fn default() -> Self {
        WgpuOptions {
            adapter: AdapterChoice { ordinal: 0, allow_software: true },
            cache_folder: None,
            without_half_subnormals: false,
            without_shared_memory: false,
            without_vulkan: false,
            without_integer_products: false,
            without_many_bindings: false,
            without_matrices: false,
            few_rows_by_tiles: false,
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
    tiles: Scratch,
    /// Activations of experts and of the shared expert, as products read them.
    gated: Scratch,
    /// What `tiles` holds.
    tiled: Option<TiledKey>,
    /// Rows from which products go by tiles.
    fewest_rows: FewestRows,
    /// The step that is recorded: its key, its operations with the stages they belong to.
    recording: Option<(u64, Vec<(Stage, Op)>)>,
    /// The part of a step that operations belong to now.
    stage: Stage,
    /// What `list` holds.
    listed: Option<WorkListKey>,
    /// Bound where a kernel's optional argument is not given.
    nothing: Memory,
    /// How many workgroups of a dispatch whose last one goes on are done: zero between dispatches.
    arrivals: Memory,
    progress: Option<Arc<dyn Fn(usize) + Send + Sync>>,
}

/// Counters of [`WgpuBackend::arrivals`].
const MOST_ARRIVALS: usize = 1024;

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
        let mut device = Device::open(options.adapter, options.cache_folder.as_deref(), !options.without_vulkan)?;
        if options.without_half_subnormals {
            device.self_test.half_subnormals = false;
        }
        device.shares_memory &= !options.without_shared_memory;
        device.binds_many &= !options.without_many_bindings;
        device.orders_memory &= !options.without_many_bindings;
        if options.without_integer_products {
            device.self_test.integer_products = false;
        }
        if options.without_matrices || options.without_integer_products {
            device.matrices = None;
        } else if options.few_rows_by_tiles && device.self_test.shader_f16 {
            device.matrices.get_or_insert(Matrices::Plain);
        }
        let nothing = device.alloc("an argument that is not given", 16)?;
        let arrivals = device.alloc("workgroups that are done", 4 * MOST_ARRIVALS as u64)?;
        let report = &device.report;
        let caps = Caps {
            name: NAME,
            device: format!("{} ({}), {} {}", report.name, report.kind, report.api, report.driver),
            activations: ActivationPrecision::Exact,
            formats: WeightFormatSet::ALL,
            memory_bytes: None,
            samples: false,
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
            tiles: Scratch::default(),
            gated: Scratch::default(),
            tiled: None,
            fewest_rows: if options.few_rows_by_tiles { FewestRows::ALWAYS } else { FewestRows::MEASURED },
            recording: None,
            stage: Stage::Embed,
            listed: None,
            nothing,
            arrivals,
            progress: options.progress.clone(),
        };
        backend.compile(Kernel::fixed())?;
        if backend.device.self_test.subgroups {
            backend.compile(Kernel::of_subgroups())?;
        }
        if backend.device.orders_memory {
            backend.compile([Kernel::ArgmaxAtOnce])?;
        }
        if backend.device.matrices.is_some() {
            backend.compile(Kernel::of_tiles())?;
        }
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

    /// The kernels of the recorded step that ran last: name, workgroups, and seconds by the adapter's clock. Where
    /// commands are wgpu's each has a pass of its own, whose start is part of its time. Nothing where there is no such clock.
    ///
    /// # Errors
    /// A failing device.
    pub fn time_kernels(&mut self) -> Result<Vec<(Arc<str>, [u32; 3], f64)>> {
        let times = self.stream.time_kernels(&self.device)?;
        self.forget_forms();
        Ok(times)
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

    /// An argument that may be absent. `instead` is bound then: memory that the kernel has anyway, so that it waits for nobody else.
    fn optional(&self, tensor: Option<Tensor>, instead: &Memory) -> Result<(Memory, [u32; 2])> {
        match tensor {
            Some(tensor) => Ok((self.memory(tensor)?, place(tensor))),
            None => Ok((instead.clone(), [0, 0])),
        }
    }

    /// Memory of a view that a kernel is about to write.
    fn output(&mut self, tensor: Tensor) -> Result<Memory> {
        let memory = self.overwritten(tensor)?;
        self.device.inputs.borrow_mut().written_by_device(&memory);
        Ok(memory)
    }

    /// Memory of a view that is about to be written: other forms of it are stale.
    fn overwritten(&mut self, tensor: Tensor) -> Result<Memory> {
        if self.listed.is_some_and(|listed| listed.ids.buffer.id == tensor.buffer.id) {
            self.listed = None;
        }
        if self.tiled.is_some_and(|tiled| tiled.is_of(tensor.buffer.id)) {
            self.tiled = None;
        }
        let id = tensor.buffer.id;
        let buffer =
            self.buffers.get_mut(&id).ok_or_else(|| device_error(format!("buffer {id} was freed or never made")))?;
        buffer.spreads.forget();
        Ok(buffer.memory.clone())
    }

    /// Launches an operation, or keeps it until its step is complete.
    fn issue(&mut self, op: Op) -> Result<()> {
        match &mut self.recording {
            Some((_, ops)) => {
                ops.push((self.stage, op));
                Ok(())
            }
            None => self.execute(&op),
        }
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
        self.stream.push(&pipeline, group, arguments, grid.map(|n| n as u32), self.stage, &self.device);
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
        let binds_many = self.device.binds_many;
        let mut kernels = Kernel::of_code(weight.code, company, self.device.tokens());
        if self.device.matrices.is_some() && self.fewest_rows.are_for(company) {
            kernels.extend(Kernel::tiles_of(weight.code, company));
        }
        let orders = self.device.orders_memory;
        let fits = |k: &Kernel| (binds_many || !k.binds_many()) && (orders || !k.meets_itself());
        self.compile(kernels.into_iter().filter(fits))?;
        Ok(weight)
    }

    /// Everything that is kept in another form is stale: before a step is recorded and after one is replayed.
    fn forget_forms(&mut self) {
        self.listed = None;
        self.tiled = None;
        self.buffers.values_mut().for_each(|buffer| buffer.spreads.forget());
    }

    fn write(&mut self, dst: Tensor, src: &[u8]) -> Result<()> {
        check_host("write", dst, src.len())?;
        let memory = self.overwritten(dst)?;
        // What waits was appended before; writes of the queue run before the next submission.
        self.stream.flush(&self.device);
        let at = 4 * dst.offset as u64;
        if dst.stride == dst.cols || dst.rows == 1 {
            self.device.write(&memory, at, src);
        } else {
            for (row, src) in src.chunks_exact(4 * dst.cols).enumerate() {
                self.device.write(&memory, at + 4 * (row * dst.stride) as u64, src);
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
            return self.stream.download(&memory, 4 * src.offset as u64, dst, &self.device);
        }
        let mut all = vec![0; 4 * src.extent()];
        self.stream.download(&memory, 4 * src.offset as u64, &mut all, &self.device)?;
        for (row, dst) in dst.chunks_exact_mut(4 * src.cols).enumerate() {
            dst.copy_from_slice(&all[4 * row * src.stride..][..4 * src.cols]);
        }
        Ok(())
    }
}

impl Drop for WgpuBackend {
    fn drop(&mut self) {
        // Nothing of ours may be in use when memory is given back.
        let _ = self.stream.wait(&self.device);
    }
}

/// Operations that are checked, then launched or recorded as they are.
macro_rules! operations {
    ($($method:ident: $op:ident),* $(,)?) => {
        $(fn $method(&mut self, op: &$op) -> Result<()> {
            op.validate()?;
            self.issue(Op::$op(*op))
        })*
    };
}

impl Backend for WgpuBackend {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn alloc(&mut self, what: &str, element: ElementType, len: usize) -> Result<Buffer> {
        let bytes = 4 * len as u64;
        let memory = match element {
            ElementType::U32 => self.device.alloc_numbers(what, bytes)?,
            ElementType::F32 => self.device.alloc(what, bytes)?,
        };
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
        let known = self.stream.replay(key, &self.device)?;
        if known {
            self.forget_forms();
        }
        Ok(known)
    }

    fn begin_recording(&mut self, key: u64) -> Result<()> {
        self.recording = Some((key, Vec::new()));
        Ok(())
    }

    fn end_recording(&mut self, complete: bool) -> Result<()> {
        let Some((key, ops)) = self.recording.take().filter(|_| complete) else { return Ok(()) };
        self.forget_forms();
        self.stream.begin(key);
        let launched = self.launch_step(&ops);
        self.stream.end(launched.is_ok(), &self.device);
        launched
    }

    fn time_replay(&mut self, key: u64) -> Result<Option<StepTimes>> {
        let times = self.stream.time_replay(key, &self.device)?;
        self.forget_forms();
        Ok(times)
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
        self.stream.download(&memory, (first_slot * padded) as u64, &mut rows, &self.device)?;
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
        self.device.write(memory, (first_slot * padded) as u64, &rows);
        Ok(())
    }

    fn load_weight(&mut self, source: &WeightSource<'_>) -> Result<Weight> {
        let weight = source.describe(self.weights.len() as u32)?;
        let company = if weight.count == 1 { Company::Alone } else { Company::Heads };
        let loaded = self.load(source.name, source.matrices, source.bias, company)?;
        self.weights.push(loaded);
        Ok(weight)
    }

    fn load_experts(&mut self, source: &ExpertsSource<'_>) -> Result<Experts> {
        let experts = source.describe(self.experts.len() as u32)?;
        let bias = |i: usize| source.biases.map(|b| b[i]);
        let gate = self.load(source.name, source.gate, bias(0), Company::Experts)?;
        let up = self.load(source.name, source.up, bias(1), Company::Experts)?;
        let down = self.load(source.name, source.down, bias(2), Company::Experts)?;
        self.experts.push(DeviceExperts { gate, up, down });
        Ok(experts)
    }

    operations! {
        embed: Embed,
        rope_table: RopeTable,
        rms_norm: RmsNorm,
        layer_norm: LayerNorm,
        linear_heads: LinearHeads,
        rope: Rope,
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
    }

    fn linear(&mut self, op: &Linear<'_>) -> Result<()> {
        op.validate()?;
        self.issue(Op::Linear { x: op.x, parts: op.parts.to_vec() })
    }

    fn kv_store(&mut self, op: &KvStore<'_>) -> Result<()> {
        op.validate()?;
        self.issue(Op::KvStore { parts: op.parts.to_vec(), slots: op.slots, cache: op.cache })
    }

    fn stage(&mut self, stage: Stage) {
        self.stage = stage;
    }
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
