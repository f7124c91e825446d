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

impl Backend for FaultyBackend {
    moellon_ops::forward_backend! {
        inner: caps alloc free write_f32 write_u32 read_u32 alloc_cache read_cache write_cache load_weight load_experts
            rope_table rms_norm layer_norm linear linear_heads rope kv_store attend_gqa attend_mla
            index_score index_topk route moe_gate_up moe_down gate_up add gather_rows argmax sample
    }

    fn read_f32(&mut self, src: Tensor, dst: &mut [f32]) -> Result<()> {
        self.inner.read_f32(src, dst)?;
        if self.fault.take(NAN) {
            dst.fill(f32::NAN);
        }
        Ok(())
    }

    fn embed(&mut self, op: &Embed) -> Result<()> {
        assert!(!self.fault.take(PANIC), "an injected panic");
        if self.fault.take(DEVICE) {
            return Err(Error::Device { backend: "faulty", message: "an injected failure".to_owned() });
        }
        self.inner.embed(op)
    }
}
