//! [`moellon_ops::Linear`]: products of one batch of activations with one or several weights.
//!
//! `unsafe`: threads write disjoint columns of the outputs.
#![allow(unsafe_code)]

use crate::backend::CpuBackend;
use crate::layout::TILE_ROWS;
use crate::memory::Floats;
use crate::prepare::RowSource;
use crate::product::multiply;
use crate::weights::Bias;
use crate::work::{Item, tile_cost};
use moellon_ops::{Linear, Result};

/// Writes a line of results. A step's weights have pushed it out of the caches since it was written last, so a plain store would read it
/// from memory first, with all stores behind it waiting: 38 ns a line, which made one row 6 % slower and four rows 15 % (scratch runs of
/// `kernel_speed`; whole steps are in receipt `cpu-step-variants-past-caches`). [`results_are_written`] comes before others read it.
#[inline]
fn write_past_caches(values: &[f32; TILE_ROWS], to: &mut [f32; TILE_ROWS]) {
    #[cfg(target_arch = "x86_64")]
    if to.as_ptr().addr().is_multiple_of(64) {
        use std::arch::x86_64::{_mm_loadu_ps, _mm_stream_ps};
        for i in (0..TILE_ROWS).step_by(4) {
            // SAFETY: every x86-64 has SSE; both arrays hold the four floats, and `to` is aligned.
            unsafe { _mm_stream_ps(to.as_mut_ptr().add(i), _mm_loadu_ps(values.as_ptr().add(i))) };
        }
        return;
    }
    *to = *values;
}

/// Orders what this thread wrote with [`write_tile`] before anything that it does next: barriers do not.
#[inline]
pub(crate) fn results_are_written() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has SSE.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

/// Copies the outputs of a tile to its columns of row `row`, as far as they exist.
///
/// # Safety
/// Nobody else reads or writes these columns.
pub(crate) unsafe fn write_tile(
    out: &Floats,
    row: usize,
    first_col: usize,
    num_cols: usize,
    tile: usize,
    values: &[f32; TILE_ROWS],
) {
    let count = (num_cols - tile * TILE_ROWS).min(TILE_ROWS);
    // SAFETY: the caller's promise.
    let part = unsafe { out.part_mut(row, first_col + tile * TILE_ROWS, count) };
    match <&mut [f32; TILE_ROWS]>::try_from(&mut *part) {
        Ok(part) => write_past_caches(values, part),
        Err(_) => part.copy_from_slice(&values[..count]),
    }
}

/// [`write_tile`] for rows from `first_row` on, with the bias of matrix `matrix`, if there is one.
///
/// # Safety
/// As [`write_tile`].
pub(crate) unsafe fn write_rows(
    out: &Floats,
    first_row: usize,
    [first_col, num_cols]: [usize; 2],
    tile: usize,
    values: &[[f32; TILE_ROWS]],
    (bias, matrix): (Option<&Bias>, usize),
) {
    for (row, values) in (first_row..).zip(values) {
        let mut values = *values;
        if let Some(bias) = bias {
            bias.add_to(matrix, tile, &mut values);
        }
        // SAFETY: the caller's promise.
        unsafe { write_tile(out, row, first_col, num_cols, tile, &values) };
    }
}

pub(crate) fn run(backend: &mut CpuBackend, op: &Linear<'_>) -> Result<()> {
    let (level, mode) = (backend.level, backend.mode);
    let weights = &backend.weights;
    let weight = |part: usize| &weights[op.parts[part].0.id as usize];
    let form = |part: usize| mode.row_form(&weight(part).packed.map.layout);
    let source = RowSource::rows(&backend.memory.floats(op.x));
    let num_rows = source.num_rows();
    let prepared =
        backend.space.prepare(level, source, (0..op.parts.len()).map(form)).map_err(crate::backend::no_memory)?;
    backend.items.clear();
    backend.items.extend((0..op.parts.len()).map(|part| {
        let map = &weight(part).packed.map;
        Item { tiles: map.tiles, tile_cost: tile_cost(map.layout.tile_bytes, map.layout.cols, num_rows) }
    }));
    backend.queues.fill_for_items(&backend.items, backend.pool.num_threads());
    let (pool, memory, items, queues) = (&backend.pool, &backend.memory, &backend.items, &backend.queues);
    pool.run(|index, num_threads| {
        if prepared.needs_fill() {
            // SAFETY: `x` is not an output; the barrier stands between this and the reads.
            unsafe { prepared.fill(level, index, num_threads) };
            pool.barrier();
        }
        queues.share(items, index, |part, tiles| {
            let loaded = weight(part);
            let out = memory.floats(op.parts[part].1);
            // SAFETY: filled before the barrier.
            let rows = unsafe { prepared.rows(form(part)) };
            let packed = &loaded.packed;
            multiply(level, mode, (&packed.bytes, &packed.map), 0, tiles, &rows, |tile, first, values| {
                // SAFETY: tiles are shared out, and parts have different outputs.
                unsafe { write_rows(&out, first, [0, packed.map.rows], tile, values, (loaded.bias.as_ref(), 0)) };
            });
        });
        results_are_written();
    });
    Ok(())
}
