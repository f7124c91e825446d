//! [`moellon_ops::GateUp`], and what it shares with [`moellon_ops::MoeGateUp`]: two products and the activation.
//!
//! `unsafe`: threads write disjoint columns of the output; a SIMD kernel.
#![allow(unsafe_code)]

use crate::backend::CpuBackend;
use crate::layout::TILE_ROWS;
use crate::linear::{results_are_written, write_tile};
use crate::pack::TileMap;
use crate::prepare::RowSource;
use crate::product::{ActivationMode, Gathered, MAX_ROWS, MAX_STREAMS, Product, ROW_BLOCK, Rows, for_each_tile_group};
use crate::simd::{Kernel, Level, Simd, math};
use crate::weights::Bias;
use crate::work::{Item, tile_cost};
use moellon_ops::{Activation, GateUp, Result};
use std::ops::Range;

/// One of the two matrices, and its activations.
pub(crate) struct Half<'a> {
    pub(crate) weights: (&'a [u8], &'a TileMap),
    pub(crate) bias: Option<&'a Bias>,
    pub(crate) rows: Rows<'a>,
}

impl<'a> Half<'a> {
    fn rows_of_block(&self, range: &Range<usize>) -> Rows<'a> {
        self.rows.with_ids(&self.rows.ids()[range.clone()])
    }
}

/// `gate[i] = f(gate[i], up[i])` for the first `count` vectors.
struct Activate<'a> {
    gate: *mut f32,
    up: *const f32,
    count: usize,
    activation: &'a Activation,
}

impl Kernel for Activate<'_> {
    type Args = Activate<'static>;

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &Activate<'static>) {
        for i in 0..args.count {
            // SAFETY: both hold `count` vectors.
            unsafe {
                let gate = s.load(args.gate.add(i * TILE_ROWS));
                let up = s.load(args.up.add(i * TILE_ROWS));
                let value = match *args.activation {
                    Activation::SwiGlu => s.mul(s.mul(gate, math::sigmoid(s, gate)), up),
                    Activation::ClampedSwiGlu { alpha, limit } => {
                        let gate = s.min(gate, s.splat(limit));
                        let up = s.max(s.min(up, s.splat(limit)), s.splat(-limit));
                        let gated = s.mul(gate, math::sigmoid(s, s.mul(gate, s.splat(alpha))));
                        s.mul(s.add(up, s.splat(1.0)), gated)
                    }
                };
                s.store(value, args.gate.add(i * TILE_ROWS));
            }
        }
    }
}

fn activate(
    level: Level,
    gate: &mut [[f32; TILE_ROWS]],
    up: &[[f32; TILE_ROWS]],
    count: usize,
    activation: Activation,
) {
    assert!(count <= gate.len() && count <= up.len());
    let args = Activate { gate: gate.as_mut_ptr().cast(), up: up.as_ptr().cast(), count, activation: &activation };
    // SAFETY: both arrays hold `count` vectors; the kernel keeps no reference, so the lifetime may be called static.
    unsafe { level.call::<Activate<'static>>(&std::mem::transmute::<Activate<'_>, Activate<'static>>(args)) };
}

/// Multiplies tiles `tiles` of matrix `matrix` of gate and up with their rows (equally many), activates, and hands
/// `sink(tile, i, values)` the results of the rows' `i`-th id. Both tiles of a pair are read before the next pair.
pub(crate) fn gate_up_tiles(
    (level, mode): (Level, ActivationMode),
    gate: &Half<'_>,
    up: &Half<'_>,
    matrix: usize,
    tiles: Range<usize>,
    activation: Activation,
    sink: impl FnMut(usize, usize, &[f32; TILE_ROWS]),
) {
    // Few rows are the common case, and clearing room for many would cost as much as reading a tile.
    if gate.rows.ids().len() <= MAX_ROWS {
        tiles_with_room::<{ MAX_STREAMS * MAX_ROWS }>((level, mode), gate, up, matrix, tiles, activation, sink);
    } else {
        tiles_with_room::<{ 2 * ROW_BLOCK }>((level, mode), gate, up, matrix, tiles, activation, sink);
    }
}

/// [`gate_up_tiles`] with room for `ROOM` results of each half: streams times rows.
fn tiles_with_room<const ROOM: usize>(
    (level, mode): (Level, ActivationMode),
    gate: &Half<'_>,
    up: &Half<'_>,
    matrix: usize,
    tiles: Range<usize>,
    activation: Activation,
    mut sink: impl FnMut(usize, usize, &[f32; TILE_ROWS]),
) {
    let gate_product = Product::new(level, mode, gate.weights, matrix, tiles.clone(), &gate.rows);
    let up_product = Product::new(level, mode, up.weights, matrix, tiles.clone(), &up.rows);
    let num_rows = gate.rows.ids().len();
    // Results of the rows of a tile stand together: `[streams][rows]`.
    let (mut gated, mut upped) = ([[0.0; TILE_ROWS]; ROOM], [[0.0; TILE_ROWS]; ROOM]);
    #[cfg(target_arch = "x86_64")]
    let _tiles = crate::simd::amx::Use;
    let (mut gate_space, mut up_space) = (Gathered::default(), Gathered::default());
    for start in (0..num_rows).step_by(ROW_BLOCK) {
        let range = start..(start + ROW_BLOCK).min(num_rows);
        let count = range.len();
        let gate_rows = gate_product.side_by_side(&gate.rows_of_block(&range), &mut gate_space);
        let up_rows = if up.rows.are_those_of(&gate.rows) && up_product.expands_as(&gate_product, count) {
            gate_rows
        } else {
            up_product.side_by_side(&up.rows_of_block(&range), &mut up_space)
        };
        let streams = gate_product.max_streams(count).min(up_product.max_streams(count));
        for_each_tile_group(streams, tiles.clone(), |first, step, streams| {
            let tile = |t: usize| first + t * step;
            for (product, half, rows, out) in
                [(&gate_product, gate, &gate_rows, &mut gated), (&up_product, up, &up_rows, &mut upped)]
            {
                product.run(rows, tile, streams, &mut |t, i, values| {
                    let values_out = &mut out[t * count + i..][..values.len()];
                    values_out.copy_from_slice(values);
                    if let Some(bias) = half.bias {
                        values_out.iter_mut().for_each(|values| bias.add_to(matrix, tile(t), values));
                    }
                });
            }
            activate(level, &mut gated, &upped, streams * count, activation);
            for t in 0..streams {
                for i in 0..count {
                    sink(tile(t), start + i, &gated[t * count + i]);
                }
            }
        });
    }
}

pub(crate) fn run(backend: &mut CpuBackend, op: &GateUp) -> Result<()> {
    let (level, mode) = (backend.level, backend.mode);
    let (gate, up) = (&backend.weights[op.gate.id as usize], &backend.weights[op.up.id as usize]);
    let (gate_map, up_map) = (&gate.packed.map, &up.packed.map);
    let forms = [gate_map, up_map].map(|map| mode.row_form(&map.layout));
    let source = RowSource::rows(&backend.memory.floats(op.x));
    let num_rows = source.num_rows();
    let prepared = backend.space.prepare(level, source, forms.into_iter()).map_err(crate::backend::no_memory)?;
    let out = backend.memory.floats(op.out);
    let tile_bytes = gate_map.layout.tile_bytes + up_map.layout.tile_bytes;
    let items = [Item { tiles: gate_map.tiles, tile_cost: tile_cost(tile_bytes, 2 * op.x.cols, num_rows) }];
    backend.queues.fill_for_items(&items, backend.pool.num_threads());
    let (pool, queues) = (&backend.pool, &backend.queues);
    pool.run(|index, num_threads| {
        if prepared.needs_fill() {
            // SAFETY: `x` is not the output; the barrier stands between this and the reads.
            unsafe { prepared.fill(level, index, num_threads) };
            pool.barrier();
        }
        queues.share(&items, index, |_, tiles| {
            // SAFETY: filled before the barrier.
            let rows = forms.map(|form| unsafe { prepared.rows(form) });
            let gate = Half { weights: (&gate.packed.bytes, gate_map), bias: gate.bias.as_ref(), rows: rows[0] };
            let up = Half { weights: (&up.packed.bytes, up_map), bias: up.bias.as_ref(), rows: rows[1] };
            gate_up_tiles((level, mode), &gate, &up, 0, tiles, op.activation, |tile, row, values| {
                // SAFETY: tiles are shared out.
                unsafe { write_tile(&out, row, 0, gate_map.rows, tile, values) };
            });
        });
        results_are_written();
    });
    Ok(())
}
