//! [`moellon_ops::IndexTopk`]: the k-th best score by selection, then one pass that keeps what is at least as good.
//!
//! `unsafe`: threads write different rows.
#![allow(unsafe_code)]

use crate::backend::CpuBackend;
use moellon_ops::{IndexTopk, Result};
use moellon_tensor::pool::partition;

/// A number whose order is: larger scores first, then earlier positions.
fn key(score: f32, position: usize) -> u64 {
    let bits = score.to_bits();
    // The total order of floats as unsigned integers, turned around.
    let descending = if bits >> 31 == 0 { 0x7fff_ffff - bits } else { bits };
    u64::from(descending) << 32 | position as u64
}

pub(crate) fn run(backend: &mut CpuBackend, op: &IndexTopk) -> Result<()> {
    let k = op.ids.cols;
    let (scores, positions) = (backend.memory.floats(op.scores), backend.memory.integers(op.positions));
    let (ids, counts) = (backend.memory.integers(op.ids), backend.memory.integers(op.counts));
    // SAFETY: nobody writes the positions, and only this thread runs now.
    let positions = unsafe { positions.row(0) };
    let longest = positions.iter().max().map_or(0, |p| *p as usize + 1);
    // Two floats' room a key.
    let scratch = backend.scratch.per_thread(backend.pool.num_threads(), 2 * longest);
    backend.pool.run(|index, num_threads| {
        // SAFETY: each thread takes its own part.
        let keys: &mut [u64] = bytemuck::cast_slice_mut(unsafe { &mut scratch.part(index)[..2 * longest] });
        for t in partition(scores.rows, num_threads, index, 1) {
            let num_keys = positions[t] as usize + 1;
            // SAFETY: nobody writes the scores; this row of `ids` is this thread's.
            let (scores, ids) = unsafe { (&scores.row(t)[..num_keys], ids.row_mut(t)) };
            let count = k.min(num_keys);
            if count == num_keys {
                for (position, id) in ids[..count].iter_mut().enumerate() {
                    *id = position as u32;
                }
            } else {
                let keys = &mut keys[..num_keys];
                for (position, (slot, score)) in keys.iter_mut().zip(scores).enumerate() {
                    *slot = key(*score, position);
                }
                let (_, last, _) = keys.select_nth_unstable(count - 1);
                let last = *last;
                let kept = scores.iter().enumerate().filter(|(position, score)| key(**score, *position) <= last);
                for (id, (position, _)) in ids.iter_mut().zip(kept) {
                    *id = position as u32;
                }
            }
            // SAFETY: element `t` of the only row of `counts` is this thread's.
            unsafe { counts.write(t, count as u32) };
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::key;

    #[test]
    fn keys_are_ordered_like_scores_and_then_positions() {
        let scores = [f32::INFINITY, 3.5, 1.0, f32::MIN_POSITIVE, 0.0, -0.0, -1e-40, -1.0, -7.0, f32::NEG_INFINITY];
        for pair in scores.windows(2) {
            assert!(key(pair[0], 9) < key(pair[1], 0), "{pair:?}");
        }
        assert!(key(0.0, 3) < key(0.0, 4));
    }
}
