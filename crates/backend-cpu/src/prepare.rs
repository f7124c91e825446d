//! Preparing activation rows for products: each form that some weight wants is made once, by all threads, in memory
//! that is reused from step to step.
//!
//! `unsafe`: raw rows that threads fill together.
#![allow(unsafe_code)]

use crate::activations::{Across, Int8Layout, round_part_to_int8};
use crate::layout::BLOCK_COLS;
use crate::memory::Floats;
use crate::product::{RowForm, Rows, reads_rows_across};
use crate::simd::Level;
use moellon_tensor::arena::AlignedBuf;
use moellon_tensor::pool::partition;

/// Blocks that one thread rounds at least: sums over 128 columns belong together.
const BLOCKS_PER_UNIT: usize = 4;

/// Where activation rows stand: `outer * inner` rows of `cols` floats; row `o * inner + i` starts at
/// `pointer + o * outer_stride + i * inner_stride`.
#[derive(Clone, Copy)]
pub(crate) struct RowSource<'a> {
    pointer: *const f32,
    cols: usize,
    outer: usize,
    inner: usize,
    outer_stride: usize,
    inner_stride: usize,
    /// Which of these rows the prepared ones are, if not all as they stand.
    order: Option<&'a [u32]>,
}

impl<'a> RowSource<'a> {
    /// The rows of a view.
    pub(crate) fn rows(x: &Floats) -> Self {
        let pointer = if x.rows == 0 { std::ptr::null() } else { x.pointer(0).cast_const() };
        RowSource {
            pointer,
            cols: x.cols,
            outer: x.rows,
            inner: 1,
            outer_stride: x.stride,
            inner_stride: 0,
            order: None,
        }
    }

    /// Heads of the rows of a view: row `h * rows + t` is columns `h * head_stride .. + cols` of row `t`.
    pub(crate) fn heads(x: &Floats, num_heads: usize, head_stride: usize, cols: usize) -> Self {
        assert!((num_heads - 1) * head_stride + cols <= x.cols, "heads are inside the rows");
        RowSource {
            cols,
            outer: num_heads,
            inner: x.rows,
            outer_stride: head_stride,
            inner_stride: x.stride,
            ..Self::rows(x)
        }
    }

    /// Rows cut into `parts`: row `t * parts + i` is part `i` of row `t`.
    pub(crate) fn parts(x: &Floats, parts: usize) -> Self {
        let cols = x.cols / parts;
        RowSource { cols, inner: parts, inner_stride: cols, ..Self::rows(x) }
    }

    /// The same rows in another order: prepared row `i` is row `order[i]`.
    pub(crate) fn in_order(self, order: &'a [u32]) -> Self {
        let num_rows = self.outer * self.inner;
        assert!(order.iter().all(|row| (*row as usize) < num_rows), "rows below {num_rows}");
        RowSource { order: Some(order), ..self }
    }

    /// How many rows.
    pub(crate) fn num_rows(&self) -> usize {
        self.order.map_or(self.outer * self.inner, <[u32]>::len)
    }

    fn row(&self, row: usize) -> *const f32 {
        let row = self.order.map_or(row, |order| order[row] as usize);
        self.pointer.wrapping_add(row / self.inner * self.outer_stride + row % self.inner * self.inner_stride)
    }

    /// Floats between two rows, if that is the same everywhere.
    fn uniform_stride(&self) -> Option<usize> {
        if self.order.is_some() {
            None
        } else if self.inner == 1 {
            Some(self.outer_stride)
        } else if self.outer == 1 || self.outer_stride == self.inner * self.inner_stride {
            Some(self.inner_stride)
        } else {
            None
        }
    }
}

/// Memory for prepared rows, reused.
#[derive(Default)]
pub(crate) struct PrepareSpace {
    int8: Option<AlignedBuf<u8>>,
    across: Option<AlignedBuf<u8>>,
    float: Option<AlignedBuf<u8>>,
    /// 0, 1, 2, ..: the ids of all rows.
    identity: Vec<u32>,
}

/// Rows in the forms asked for, filled by [`Prepared::fill`].
pub(crate) struct Prepared<'a> {
    source: RowSource<'a>,
    int8_layout: Int8Layout,
    int8: Option<*mut u8>,
    /// Numbers of 8-bit rows, for tile registers.
    across: Option<Across>,
    float: Option<FloatRows>,
    identity: &'a [u32],
}

#[derive(Clone, Copy)]
struct FloatRows {
    first: *const u8,
    stride_bytes: usize,
    /// Where to copy rows, unless they are read where they are.
    copy: Option<*mut u8>,
}

// SAFETY: addresses of rows that `fill` writes in disjoint parts and others read afterwards.
unsafe impl Sync for Prepared<'_> {}

impl PrepareSpace {
    /// Makes room for the rows of `source` in the forms that `forms` yields, for products at `level`.
    pub(crate) fn prepare<'a>(
        &'a mut self,
        level: Level,
        source: RowSource<'a>,
        forms: impl Iterator<Item = RowForm>,
    ) -> std::io::Result<Prepared<'a>> {
        let int8_layout = Int8Layout::new(source.cols);
        let num_rows = source.num_rows();
        let (mut wants_int8, mut wants_float) = (false, false);
        for form in forms {
            match form {
                RowForm::Int8 => wants_int8 = true,
                RowForm::F32 => wants_float = true,
            }
        }
        let across = wants_int8 && reads_rows_across(level, num_rows);
        let int8 = match wants_int8 {
            true => {
                // Tile registers read whole groups of rows.
                let room = if across { num_rows + Across::ROWS } else { num_rows };
                Some(grown(&mut self.int8, room * int8_layout.row_bytes)?)
            }
            false => None,
        };
        let across = match across {
            true => {
                let floats = grown(&mut self.across, 4 * Across::num_floats(&int8_layout, num_rows))?;
                Some(Across::new(floats.cast(), num_rows))
            }
            false => None,
        };
        let float = match (wants_float, source.uniform_stride()) {
            (false, _) => None,
            // Whole blocks at equal distances: kernels read them where they are.
            (true, Some(stride)) if source.cols.is_multiple_of(BLOCK_COLS) => {
                Some(FloatRows { first: source.pointer.cast(), stride_bytes: stride * 4, copy: None })
            }
            (true, _) => {
                let stride_bytes = int8_layout.blocks * BLOCK_COLS * 4;
                let copy = grown(&mut self.float, num_rows * stride_bytes)?;
                Some(FloatRows { first: copy, stride_bytes, copy: Some(copy) })
            }
        };
        let known = self.identity.len() as u32;
        self.identity.extend(known..(num_rows as u32).max(known));
        Ok(Prepared { source, int8_layout, int8, across, float, identity: &self.identity[..num_rows] })
    }
}

/// The start of `space`, enlarged to `size_bytes` if it is smaller.
fn grown(space: &mut Option<AlignedBuf<u8>>, size_bytes: usize) -> std::io::Result<*mut u8> {
    if space.as_ref().is_none_or(|s| s.num_elements() < size_bytes) {
        // A power of two: a growing batch does not reallocate at every step.
        *space = Some(AlignedBuf::zeroed(size_bytes.next_power_of_two())?);
    }
    Ok(space.as_ref().expect("was just made").as_non_null().as_ptr())
}

impl Prepared<'_> {
    /// Whether [`Prepared::fill`] has anything to do.
    pub(crate) fn needs_fill(&self) -> bool {
        self.int8.is_some() || self.float.is_some_and(|f| f.copy.is_some())
    }

    /// Does the share of thread `index`. Rows may be read when all threads are done.
    ///
    /// # Safety
    /// The source's rows are valid and nobody writes them; each index is called by one thread, once.
    pub(crate) unsafe fn fill(&self, level: Level, index: usize, num_threads: usize) {
        let blocks = self.int8_layout.blocks;
        let units_per_row = blocks.div_ceil(BLOCKS_PER_UNIT);
        let mut units = partition(self.source.num_rows() * units_per_row, num_threads, index, 1);
        while !units.is_empty() {
            let (row, first) = (units.start / units_per_row, units.start % units_per_row);
            let count = units.len().min(units_per_row - first);
            units.start += count;
            let range = [first * BLOCKS_PER_UNIT, ((first + count) * BLOCKS_PER_UNIT).min(blocks)];
            let x = self.source.row(row);
            if let Some(rows) = self.int8 {
                // SAFETY: `prepare` made room for all rows; parts of a row by different threads are different blocks.
                unsafe {
                    let to = rows.add(row * self.int8_layout.row_bytes);
                    round_part_to_int8(level, x, to, self.int8_layout, range);
                    if let Some(across) = self.across {
                        across.at_row(row).copy(&self.int8_layout, to, range);
                    }
                }
            }
            if let Some(FloatRows { stride_bytes, copy: Some(rows), .. }) = self.float {
                let start = range[0] * BLOCK_COLS;
                let (end, padded) = ((range[1] * BLOCK_COLS).min(self.source.cols), range[1] * BLOCK_COLS);
                // SAFETY: as above; the source row holds `cols` floats.
                unsafe {
                    let to = rows.add(row * stride_bytes).cast::<f32>();
                    std::ptr::copy_nonoverlapping(x.add(start), to.add(start), end - start);
                    std::ptr::write_bytes(to.add(end), 0, padded - end);
                }
            }
        }
    }

    /// All rows in one of the forms that were asked for.
    ///
    /// # Safety
    /// All threads have filled their share, and nobody writes the rows while the result is used.
    ///
    /// # Panics
    /// If the form was not asked for.
    pub(crate) unsafe fn rows(&self, form: RowForm) -> Rows<'_> {
        let (int8, num_rows) = (&self.int8_layout, self.source.num_rows());
        let (first, stride_bytes, row_bytes) = match form {
            RowForm::Int8 => {
                (self.int8.expect("8-bit rows were asked for").cast_const(), int8.row_bytes, int8.row_bytes)
            }
            RowForm::F32 => {
                let float = self.float.expect("f32 rows were asked for");
                (float.first, float.stride_bytes, int8.blocks * BLOCK_COLS * 4)
            }
        };
        let len_bytes = if num_rows == 0 { 0 } else { (num_rows - 1) * stride_bytes + row_bytes };
        // SAFETY: rows stand there, whole; the rest is the caller's promise.
        let rows = unsafe { Rows::new(form, Some(int8), first, len_bytes, stride_bytes, self.identity) };
        match (form, self.across) {
            // SAFETY: `fill` wrote the numbers of all rows, and there is room behind the last one.
            (RowForm::Int8, Some(across)) => unsafe { rows.with_across(across) },
            _ => rows,
        }
    }

    /// The ids of rows `range`.
    pub(crate) fn ids(&self, range: std::ops::Range<usize>) -> &[u32] {
        &self.identity[range]
    }
}
