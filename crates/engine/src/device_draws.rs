//! Tokens that the device chooses, so that 150,000 logits a row stay where they are. The draws are those of the sampler: the same
//! random bits give the same token, and a sequence takes what was drawn only if it would draw with these bits itself.

use crate::engine::{Engine, EngineError};
use crate::scheduler::Share;
use moellon_ops::{Backend, Buffer, Draw, ElementType, Sample, Tensor};

/// Room for the draws of a step.
pub(crate) struct DeviceDraws {
    /// u32 `[max_logit_rows, 6]`
    draws: Buffer,
    /// u32 `[max_logit_rows, 2]`
    out: Buffer,
}

/// What the device chose for one row.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Drawn {
    /// With which bits; `None` for the largest logit.
    pub(crate) bits: Option<u64>,
    pub(crate) token: u32,
    /// Probability of the likeliest token; NaN where the logit of `token` is.
    pub(crate) certainty: f32,
}

impl DeviceDraws {
    /// `None` on a back end that draws nothing.
    pub(crate) fn new(max_logit_rows: usize, backend: &mut dyn Backend) -> moellon_ops::Result<Option<Self>> {
        if !backend.caps().samples {
            return Ok(None);
        }
        let draws = backend.alloc("draws of tokens", ElementType::U32, max_logit_rows * Draw::WORDS)?;
        let out = backend.alloc("drawn tokens", ElementType::U32, max_logit_rows * 2)?;
        Ok(Some(DeviceDraws { draws, out }))
    }
}

impl Engine {
    /// Chooses on the device for all rows of sequences that need nothing else of their logits, in one operation; `first_rows` are the rows
    /// of logits of each share that reaches its end. One `None` a row where the device chooses nothing. The largest logit of a single row
    /// is left to the operation that finds just that.
    pub(crate) fn draw_on_device(
        &mut self,
        shares: &[Share],
        first_rows: &[Option<usize>],
        logits: Tensor,
    ) -> Result<Vec<Option<Drawn>>, EngineError> {
        let mut drawn: Vec<Option<Drawn>> = vec![None; logits.rows];
        let Some(DeviceDraws { draws, out }) = &self.draws else { return Ok(drawn) };
        let mut words = vec![[0; Draw::WORDS]; logits.rows];
        for (share, first) in shares.iter().zip(first_rows) {
            let (sequence, Some(first)) = (&self.running[share.sequence], *first) else { continue };
            if !sequence.needs_no_logits() || (sequence.takes_argmax() && logits.rows == 1) {
                continue;
            }
            for (row, draw) in (first..=first + share.num_drafts).zip(sequence.next_draws()) {
                let bits = (!sequence.takes_argmax()).then_some(draw.bits);
                drawn[row] = Some(Drawn { bits, token: 0, certainty: 0.0 });
                words[row] = draw.words();
            }
        }
        let Some(first) = drawn.iter().position(Option::is_some) else { return Ok(drawn) };
        let rows = drawn.iter().rposition(Option::is_some).map_or(0, |last| last + 1 - first);
        let (draws, out) = (draws.tensor(rows, Draw::WORDS), out.tensor(rows, 2));
        self.backend.write_u32(draws, words[first..first + rows].as_flattened())?;
        self.backend.sample(&Sample { logits: logits.row_range(first, rows), draws, out })?;
        let mut found = vec![0; rows * 2];
        self.backend.read_u32(out, &mut found)?;
        for (drawn, found) in drawn[first..].iter_mut().zip(found.chunks_exact(2)) {
            if let Some(drawn) = drawn {
                (drawn.token, drawn.certainty) = (found[0], f32::from_bits(found[1]));
            }
        }
        Ok(drawn)
    }
}
