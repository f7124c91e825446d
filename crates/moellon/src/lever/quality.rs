//! What a setting costs in predictions: its logits against those of the model as it is, on the same text.

use super::arm::{self, Loaded, Room};
use super::{Applicable, Base};
use anyhow::Result;
use moellon_lab::lever::Setting;
use moellon_model::Session;
use moellon_model::batch::LogitRows;
use moellon_model::session::read_logits;
use moellon_surgery::distance::{LogitDistance, Quality};

/// Tokens that are compared, in sequences of [`SEQUENCE`].
const TOKENS: usize = 2048;

/// Positions of a sequence.
const SEQUENCE: usize = 1024;

/// Rows of a step.
const CHUNK: usize = 128;

/// Of `setting` against the model as it is.
pub fn quality(base: &Base, setting: &Setting) -> Result<Applicable<Quality>> {
    let held = &base.held[..base.held.len().min(TOKENS)];
    let positions = SEQUENCE.min(base.max_position);
    let room = Room { sequences: 1, positions, cached: 0 };
    let [model, reference] = [setting, &Setting::default()].map(|setting| arm::load(base, setting, room));
    let (mut model, mut reference) = match (model?, reference?) {
        (Ok(model), Ok(reference)) => (model, reference),
        (Err(reason), _) | (_, Err(reason)) => return Ok(Err(reason)),
    };
    let vocab_size = reference.source.config.vocab_size;
    let mut distance = LogitDistance::default();
    for sequence in held.chunks(positions) {
        let mut sessions = [Session::new(), Session::new()];
        for (at, chunk) in sequence.chunks(CHUNK).enumerate() {
            let logits = |loaded: &mut Loaded, session: &mut Session| -> Result<Vec<f32>> {
                let backend = loaded.backend.as_mut();
                let rows = session.step(chunk, LogitRows::All, &mut loaded.decoder, backend, None)?;
                Ok(read_logits(rows, backend)?)
            };
            let found = logits(&mut model, &mut sessions[0])?;
            let expected = logits(&mut reference, &mut sessions[1])?;
            let next: Vec<Option<u32>> =
                (0..chunk.len()).map(|row| sequence.get(at * CHUNK + row + 1).copied()).collect();
            distance.add(&found, &expected, vocab_size, &next);
        }
    }
    Ok(Ok(distance.quality()))
}
