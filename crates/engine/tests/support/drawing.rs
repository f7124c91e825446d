//! A back end that draws tokens where the logits are, as a GPU does, and counts the rows of logits that are read.

use moellon_ops::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What the engine did.
#[derive(Clone, Default)]
pub(crate) struct Counts {
    rows_read: Arc<AtomicUsize>,
    rows_drawn: Arc<AtomicUsize>,
}

impl Counts {
    /// Whole rows of logits that were copied to the host since the last call, and rows that were drawn.
    pub(crate) fn take(&self) -> [usize; 2] {
        [&self.rows_read, &self.rows_drawn].map(|count| count.swap(0, Ordering::SeqCst))
    }
}

pub(crate) struct DrawingBackend {
    inner: Box<dyn Backend>,
    caps: Caps,
    counts: Counts,
    vocab_size: usize,
}

impl DrawingBackend {
    pub(crate) fn wrap(inner: Box<dyn Backend>, vocab_size: usize) -> (Box<dyn Backend>, Counts) {
        let (caps, counts) = (Caps { samples: true, ..inner.caps().clone() }, Counts::default());
        (Box::new(DrawingBackend { inner, caps, counts: counts.clone(), vocab_size }), counts)
    }
}

impl Backend for DrawingBackend {
    moellon_ops::forward_backend! {
        inner: alloc free write_f32 write_u32 read_u32 alloc_cache read_cache write_cache load_weight load_experts
            embed rope_table rms_norm layer_norm linear linear_heads rope kv_store attend_gqa attend_mla
            index_score index_topk route moe_gate_up moe_down gate_up add gather_rows argmax
    }

    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn read_f32(&mut self, src: Tensor, dst: &mut [f32]) -> Result<()> {
        if src.cols == self.vocab_size {
            self.counts.rows_read.fetch_add(src.rows, Ordering::SeqCst);
        }
        self.inner.read_f32(src, dst)
    }

    fn sample(&mut self, op: &Sample) -> Result<()> {
        op.validate()?;
        let (rows, cols) = (op.logits.rows, op.logits.cols);
        let (mut logits, mut words) = (vec![0.0; rows * cols], vec![0; rows * Draw::WORDS]);
        self.inner.read_f32(op.logits, &mut logits)?;
        self.inner.read_u32(op.draws, &mut words)?;
        let drawn = logits.chunks(cols).zip(words.chunks(Draw::WORDS)).map(|(logits, words)| {
            let (token, certainty) = sample::draw_row(logits, words);
            [token, certainty.to_bits()]
        });
        self.counts.rows_drawn.fetch_add(rows, Ordering::SeqCst);
        self.inner.write_u32(op.out, drawn.collect::<Vec<_>>().as_flattened())
    }
}
