//! A back end that can be told to fail.

use moellon_ops::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// What goes wrong next.
#[derive(Clone, Default)]
pub(crate) struct Fault(Arc<AtomicU8>);

const PANIC: u8 = 1;
const DEVICE: u8 = 2;
const NAN: u8 = 3;

impl Fault {
    /// The next step panics.
    pub(crate) fn panic(&self) {
        self.0.store(PANIC, Ordering::SeqCst);
    }

    /// The device fails in the next step.
    pub(crate) fn fail(&self) {
        self.0.store(DEVICE, Ordering::SeqCst);
    }

    /// The next floats that are read are NaN.
    pub(crate) fn nan(&self) {
        self.0.store(NAN, Ordering::SeqCst);
    }

    fn take(&self, fault: u8) -> bool {
        self.0.compare_exchange(fault, 0, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }
}

/// Passes everything on, unless a fault is due.
pub(crate) struct FaultyBackend {
    inner: Box<dyn Backend>,
    fault: Fault,
}

impl FaultyBackend {
    pub(crate) fn wrap(inner: Box<dyn Backend>) -> (Box<dyn Backend>, Fault) {
        let fault = Fault::default();
        (Box::new(FaultyBackend { inner, fault: fault.clone() }), fault)
    }
}

macro_rules! pass_on {
    ($($method:ident: $op:ty),* $(,)?) => {
        $(fn $method(&mut self, op: &$op) -> Result<()> {
            self.inner.$method(op)
        })*
    };
}

impl Backend for FaultyBackend {
    fn caps(&self) -> &backend::Caps {
        self.inner.caps()
    }
    fn alloc(&mut self, what: &str, element: ElementType, len: usize) -> Result<Buffer> {
        self.inner.alloc(what, element, len)
    }
    fn free(&mut self, buffer: Buffer) {
        self.inner.free(buffer);
    }
    fn write_f32(&mut self, dst: Tensor, src: &[f32]) -> Result<()> {
        self.inner.write_f32(dst, src)
    }
    fn write_u32(&mut self, dst: Tensor, src: &[u32]) -> Result<()> {
        self.inner.write_u32(dst, src)
    }
    fn read_f32(&mut self, src: Tensor, dst: &mut [f32]) -> Result<()> {
        self.inner.read_f32(src, dst)?;
        if self.fault.take(NAN) {
            dst.fill(f32::NAN);
        }
        Ok(())
    }
    fn read_u32(&mut self, src: Tensor, dst: &mut [u32]) -> Result<()> {
        self.inner.read_u32(src, dst)
    }
    fn alloc_cache(&mut self, what: &str, dtype: CacheDtype, num_slots: usize, width: usize) -> Result<Cache> {
        self.inner.alloc_cache(what, dtype, num_slots, width)
    }
    fn read_cache(&mut self, cache: Cache, first_slot: usize, dst: &mut [u8]) -> Result<()> {
        self.inner.read_cache(cache, first_slot, dst)
    }
    fn write_cache(&mut self, cache: Cache, first_slot: usize, src: &[u8]) -> Result<()> {
        self.inner.write_cache(cache, first_slot, src)
    }
    fn load_weight(&mut self, source: &WeightSource<'_>) -> Result<Weight> {
        self.inner.load_weight(source)
    }
    fn load_experts(&mut self, source: &ExpertsSource<'_>) -> Result<Experts> {
        self.inner.load_experts(source)
    }
    fn embed(&mut self, op: &Embed) -> Result<()> {
        assert!(!self.fault.take(PANIC), "an injected panic");
        if self.fault.take(DEVICE) {
            return Err(Error::Device { backend: "faulty", message: "an injected failure".to_owned() });
        }
        self.inner.embed(op)
    }
    pass_on! {
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
    }
}
