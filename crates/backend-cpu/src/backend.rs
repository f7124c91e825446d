//! [`CpuBackend`]: the operations of `moellon-ops` on this machine's cores.

use crate::expert_lists::ExpertLists;
use crate::memory::Memory;
use crate::prepare::PrepareSpace;
use crate::product::ActivationMode;
use crate::scratch::Scratch;
use crate::simd::{CpuLevel, Level};
use crate::weights::{LoadedExperts, LoadedWeight, out_of_memory};
use crate::work::{Item, Queues};
use moellon_ops::backend::WeightFormatSet;
use moellon_ops::{
    ActivationPrecision, Add, Argmax, AttendGqa, AttendMla, Backend, Buffer, Cache, CacheDtype, Caps, ElementType,
    Embed, Error, Experts, ExpertsSource, GateUp, GatherRows, IndexScore, IndexTopk, KvStore, LayerNorm, Linear,
    LinearHeads, MoeDown, MoeGateUp, Result, RmsNorm, Rope, RopeTable, Route, Tensor, Weight, WeightSource,
};
use moellon_tensor::pool::{Pool, PoolOptions, partition};
use std::ops::Range;

/// Elements below which an operation over rows stays on the calling thread: less work than waking the others.
const PARALLEL_ELEMENTS: usize = 16 * 1024;

/// How a [`CpuBackend`] is set up.
#[derive(Debug, Clone, Copy, Default)]
pub struct CpuOptions {
    /// Threads, the caller included; `None` for one per available core.
    pub threads: Option<usize>,
    /// Whether threads stay on their cores. The thread that runs operations is pinned at its first one, unless it is the
    /// process's main thread.
    pub pin: bool,
    /// Vector instructions; `None` for the best that the machine has.
    pub level: Option<CpuLevel>,
    /// How activations meet quantized weights.
    pub activation: ActivationMode,
}

/// The CPU back end. Operations run when they are called.
pub struct CpuBackend {
    pub(crate) caps: Caps,
    pub(crate) pool: Pool,
    pub(crate) level: Level,
    pub(crate) mode: ActivationMode,
    pub(crate) memory: Memory,
    pub(crate) weights: Vec<LoadedWeight>,
    pub(crate) experts: Vec<LoadedExperts>,
    pub(crate) space: PrepareSpace,
    pub(crate) scratch: Scratch,
    pub(crate) lists: ExpertLists,
    pub(crate) items: Vec<Item>,
    pub(crate) queues: Queues,
    /// Whether a step has begun that nobody has read from.
    in_step: bool,
}

/// Memory for work space ran out.
pub(crate) fn no_memory(error: std::io::Error) -> Error {
    Error::Device { backend: "cpu", message: error.to_string() }
}

fn contract(op: &'static str, what: &str, found: impl ToString, expected: impl ToString) -> Error {
    Error::Contract { op, what: what.to_owned(), found: found.to_string(), expected: expected.to_string() }
}

impl CpuBackend {
    /// Starts the threads.
    ///
    /// # Errors
    /// If the machine has not the level asked for, or no threads are asked for.
    pub fn new(options: CpuOptions) -> Result<Self> {
        let wanted = options.level.unwrap_or_else(CpuLevel::detect);
        let Some(level) = Level::new(wanted) else {
            let available: Vec<&str> = CpuLevel::available().map(CpuLevel::name).collect();
            return Err(contract(
                "new",
                "level of vector instructions",
                wanted,
                format!("one of {}", available.join(", ")),
            ));
        };
        if options.threads == Some(0) {
            return Err(contract("new", "threads", 0, "at least 1"));
        }
        let pool = Pool::new(PoolOptions { threads: options.threads, pin: options.pin });
        let caps = Caps {
            name: "cpu",
            device: format!("{} threads, {wanted}", pool.num_threads()),
            activations: match options.activation {
                ActivationMode::Exact => ActivationPrecision::Exact,
                ActivationMode::Int8 => ActivationPrecision::Int8,
            },
            formats: WeightFormatSet::ALL,
            memory_bytes: moellon_tensor::arena::free_memory_bytes(),
            samples: false,
        };
        Ok(CpuBackend {
            caps,
            pool,
            level,
            mode: options.activation,
            memory: Memory::default(),
            weights: Vec::new(),
            experts: Vec::new(),
            space: PrepareSpace::default(),
            scratch: Scratch::default(),
            lists: ExpertLists::default(),
            items: Vec::new(),
            queues: Queues::default(),
            in_step: false,
        })
    }

    /// The threads.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// The vector instructions in use.
    pub fn level(&self) -> CpuLevel {
        self.level.name()
    }

    /// A step begins: the team stays awake until something is read.
    fn begin_step(&mut self) {
        self.end_step();
        self.pool.begin_step();
        self.in_step = true;
    }

    fn end_step(&mut self) {
        if std::mem::take(&mut self.in_step) {
            self.pool.end_step();
        }
    }

    /// Calls `rows` for all of `0..num_rows`, on several threads if `elements_per_row` make it worth it.
    pub(crate) fn run_rows(&self, num_rows: usize, elements_per_row: usize, rows: impl Fn(Range<usize>) + Sync) {
        run_rows_of_threads(&self.pool, num_rows, elements_per_row, |_, range| rows(range));
    }
}

/// [`CpuBackend::run_rows`] for work that needs memory of its own: `rows(thread, range)`.
pub(crate) fn run_rows_of_threads(
    pool: &Pool,
    num_rows: usize,
    elements_per_row: usize,
    rows: impl Fn(usize, Range<usize>) + Sync,
) {
    if num_rows < 2 || num_rows * elements_per_row < PARALLEL_ELEMENTS {
        rows(0, 0..num_rows);
    } else {
        pool.run(|index, num_threads| rows(index, partition(num_rows, num_threads, index, 1)));
    }
}

/// Checks a host copy: element type, bounds, length.
fn check_copy(op: &'static str, tensor: Tensor, element: ElementType, host_len: usize) -> Result<()> {
    if tensor.buffer.element != element {
        return Err(contract(op, "element type", format!("{:?}", tensor.buffer.element), format!("{element:?}")));
    }
    if tensor.offset + tensor.extent() > tensor.buffer.len {
        return Err(contract(
            op,
            "end of the view",
            tensor.offset + tensor.extent(),
            format!("at most {}", tensor.buffer.len),
        ));
    }
    if host_len != tensor.rows * tensor.cols {
        return Err(contract(op, "elements on the host", host_len, tensor.rows * tensor.cols));
    }
    Ok(())
}

macro_rules! operations {
    ($($method:ident: $op:ty => $run:path),* $(,)?) => {
        $(fn $method(&mut self, op: &$op) -> Result<()> {
            op.validate()?;
            self.pool.pin_caller();
            $run(self, op)
        })*
    };
}

impl Backend for CpuBackend {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn alloc(&mut self, what: &str, element: ElementType, len: usize) -> Result<Buffer> {
        self.memory.alloc(element, len).map_err(|_| out_of_memory(what, len as u64 * 4))
    }

    fn free(&mut self, buffer: Buffer) {
        self.memory.free(buffer);
    }

    fn write_f32(&mut self, dst: Tensor, src: &[f32]) -> Result<()> {
        check_copy("write_f32", dst, ElementType::F32, src.len())?;
        self.memory.write_floats(dst, src);
        Ok(())
    }

    fn write_u32(&mut self, dst: Tensor, src: &[u32]) -> Result<()> {
        check_copy("write_u32", dst, ElementType::U32, src.len())?;
        self.memory.write_integers(dst, src);
        Ok(())
    }

    fn read_f32(&mut self, src: Tensor, dst: &mut [f32]) -> Result<()> {
        check_copy("read_f32", src, ElementType::F32, dst.len())?;
        self.end_step();
        self.memory.read_floats(src, dst);
        Ok(())
    }

    fn read_u32(&mut self, src: Tensor, dst: &mut [u32]) -> Result<()> {
        check_copy("read_u32", src, ElementType::U32, dst.len())?;
        self.end_step();
        self.memory.read_integers(src, dst);
        Ok(())
    }

    fn alloc_cache(&mut self, what: &str, dtype: CacheDtype, num_slots: usize, width: usize) -> Result<Cache> {
        let needed_bytes = (num_slots * width * dtype.size_bytes()) as u64;
        self.memory.alloc_cache(dtype, num_slots, width).map_err(|_| out_of_memory(what, needed_bytes))
    }

    fn read_cache(&mut self, cache: Cache, first_slot: usize, dst: &mut [u8]) -> Result<()> {
        cache.check_rows("read_cache", first_slot, dst.len())?;
        self.memory.read_cache_rows(cache, first_slot, dst);
        Ok(())
    }

    fn write_cache(&mut self, cache: Cache, first_slot: usize, src: &[u8]) -> Result<()> {
        cache.check_rows("write_cache", first_slot, src.len())?;
        self.memory.write_cache_rows(cache, first_slot, src);
        Ok(())
    }

    fn load_weight(&mut self, source: &WeightSource<'_>) -> Result<Weight> {
        let weight = source.describe(self.weights.len() as u32)?;
        self.weights.push(LoadedWeight::load(&self.pool, source, &weight)?);
        Ok(weight)
    }

    fn load_experts(&mut self, source: &ExpertsSource<'_>) -> Result<Experts> {
        let experts = source.describe(self.experts.len() as u32)?;
        self.experts.push(LoadedExperts::load(&self.pool, source, &experts)?);
        Ok(experts)
    }

    fn synchronize(&mut self) -> Result<()> {
        self.end_step();
        Ok(())
    }

    fn embed(&mut self, op: &Embed) -> Result<()> {
        op.validate()?;
        self.pool.pin_caller();
        // The first operation of every step.
        self.begin_step();
        crate::embed::run(self, op)
    }

    operations! {
        rope_table: RopeTable => crate::rope::run_table,
        rms_norm: RmsNorm => crate::rms_norm::run,
        layer_norm: LayerNorm => crate::layer_norm::run,
        linear: Linear<'_> => crate::linear::run,
        linear_heads: LinearHeads => crate::linear_heads::run,
        rope: Rope => crate::rope::run,
        kv_store: KvStore<'_> => crate::kv_store::run,
        attend_gqa: AttendGqa => crate::attend_gqa::run,
        attend_mla: AttendMla => crate::attend_mla::run,
        index_score: IndexScore => crate::index_score::run,
        index_topk: IndexTopk => crate::index_topk::run,
        route: Route => crate::route::run,
        moe_gate_up: MoeGateUp => crate::moe_gate_up::run,
        moe_down: MoeDown => crate::moe_down::run,
        gate_up: GateUp => crate::gate_up::run,
        add: Add => crate::add::run,
        gather_rows: GatherRows => crate::gather_rows::run,
        argmax: Argmax => crate::argmax::run,
    }
}
