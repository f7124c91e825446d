//! [`moellon_ops::RopeTable`] and [`moellon_ops::Rope`].
//!
//! `unsafe`: threads write different rows.
#![allow(unsafe_code)]

use crate::backend::CpuBackend;
use moellon_ops::{Result, Rope, RopePairs, RopeTable};

pub(crate) fn run_table(backend: &mut CpuBackend, op: &RopeTable) -> Result<()> {
    let (positions, table) = (backend.memory.integers(op.positions), backend.memory.floats(op.table));
    let frequencies = backend.memory.floats(op.inverse_frequencies);
    // Once a step: sine and cosine in f64, as the reference has them.
    backend.run_rows(table.rows, table.cols * 32, |rows| {
        for t in rows {
            // SAFETY: rows of the table are this thread's; nobody writes the others.
            let (position, frequencies, row) =
                unsafe { (positions.row(0)[t], frequencies.row(0), table.part_mut(t, 0, table.cols)) };
            let (cosines, sines) = row.split_at_mut(frequencies.len());
            for ((frequency, cosine), sine) in frequencies.iter().zip(cosines).zip(sines) {
                // The angle is rounded to f32 as in transformers: that rounding is part of the model.
                let (sin, cos) = f64::from(position as f32 * frequency).sin_cos();
                (*cosine, *sine) = (cos as f32 * op.scale, sin as f32 * op.scale);
            }
        }
    });
    Ok(())
}

pub(crate) fn run(backend: &mut CpuBackend, op: &Rope) -> Result<()> {
    let (x, table) = (backend.memory.floats(op.x), backend.memory.floats(op.table));
    let (dim, half) = (op.table.cols, op.table.cols / 2);
    backend.run_rows(x.rows, op.num_heads * dim, |rows| {
        for t in rows {
            // SAFETY: rows of `x` are this thread's; nobody writes the table.
            let (table, row) = unsafe { (table.row(t), x.part_mut(t, 0, x.cols)) };
            let (cosines, sines) = table.split_at(half);
            for head in 0..op.num_heads {
                let head = &mut row[head * op.head_stride..][..dim];
                match op.pairs {
                    RopePairs::Interleaved => {
                        for ((pair, cos), sin) in head.as_chunks_mut::<2>().0.iter_mut().zip(cosines).zip(sines) {
                            *pair = rotate(*pair, *cos, *sin);
                        }
                    }
                    RopePairs::HalfSplit => {
                        let (first, second) = head.split_at_mut(half);
                        for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cosines).zip(sines) {
                            [*a, *b] = rotate([*a, *b], *cos, *sin);
                        }
                    }
                }
            }
        }
    });
    Ok(())
}

fn rotate([a, b]: [f32; 2], cos: f32, sin: f32) -> [f32; 2] {
    [a * cos - b * sin, b * cos + a * sin]
}
