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

/// Layouts of 8-bit rows: with a scale for one block and for two.
const INT8_FORMS: usize = 2;

/// Which of [`INT8_FORMS`] has a scale for `scale_blocks` blocks.
const fn int8_form(scale_blocks: usize) -> usize {
    scale_blocks - 1
}

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
    int8: [Int8Space; INT8_FORMS],
    float: Option<AlignedBuf<u8>>,
    /// 0, 1, 2, ..: the ids of all rows.
    identity: Vec<u32>,
}

/// Memory for 8-bit rows of one layout.
#[derive(Default)]
struct Int8Space {
    rows: Option<AlignedBuf<u8>>,
    across: Option<AlignedBuf<u8>>,
}

/// Rows in the forms asked for, filled by [`Prepared::fill`].
pub(crate) struct Prepared<'a> {
    source: RowSource<'a>,
    /// Blocks of a row.
    blocks: usize,
    /// By [`int8_form`].
    int8: [Option<Int8Rows>; INT8_FORMS],
    float: Option<FloatRows>,
    identity: &'a [u32],
}

/// 8-bit rows of one layout.
#[derive(Clone, Copy)]
struct Int8Rows {
    layout: Int8Layout,
    first: *mut u8,
    /// Numbers of the rows, for tile registers.
    across: Option<Across>,
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
        let (blocks, num_rows) = (source.cols.div_ceil(BLOCK_COLS), source.num_rows());
        let across = reads_rows_across(level, num_rows);
        let (mut int8, mut wants_float) = ([None; INT8_FORMS], false);
        for form in forms {
            let RowForm::Int8 { scale_blocks } = form else {
                wants_float = true;
                continue;
            };
            let number = int8_form(scale_blocks);
            if int8[number].is_none() {
                let layout = Int8Layout::new(source.cols, scale_blocks);
                int8[number] = Some(self.int8[number].room(layout, num_rows, across)?);
            }
        }
        let float = match (wants_float, source.uniform_stride()) {
            (false, _) => None,
            // Whole blocks at equal distances: kernels read them where they are.
            (true, Some(stride)) if source.cols.is_multiple_of(BLOCK_COLS) => {
                Some(FloatRows { first: source.pointer.cast(), stride_bytes: stride * 4, copy: None })
            }
            (true, _) => {
                let stride_bytes = blocks * BLOCK_COLS * 4;
                let copy = grown(&mut self.float, num_rows * stride_bytes)?;
                Some(FloatRows { first: copy, stride_bytes, copy: Some(copy) })
            }
        };
        let known = self.identity.len() as u32;
        self.identity.extend(known..(num_rows as u32).max(known));
        Ok(Prepared { source, blocks, int8, float, identity: &self.identity[..num_rows] })
    }
}

impl Int8Space {
    /// Room for `num_rows` rows, with `across` for their numbers side by side as well.
    fn room(&mut self, layout: Int8Layout, num_rows: usize, across: bool) -> std::io::Result<Int8Rows> {
        // Tile registers read whole groups of rows.
        let room = if across { num_rows + Across::ROWS } else { num_rows };
        let first = grown(&mut self.rows, room * layout.row_bytes)?;
        let across = match across {
            true => {
                let floats = grown(&mut self.across, 4 * Across::num_floats(&layout, num_rows))?;
                Some(Across::new(floats.cast(), num_rows))
            }
            false => None,
        };
        Ok(Int8Rows { layout, first, across })
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
        self.int8.iter().any(Option::is_some) || self.float.is_some_and(|f| f.copy.is_some())
    }

    /// Does the share of thread `index`. Rows may be read when all threads are done.
    ///
    /// # Safety
    /// The source's rows are valid and nobody writes them; each index is called by one thread, once.
    pub(crate) unsafe fn fill(&self, level: Level, index: usize, num_threads: usize) {
        let blocks = self.blocks;
        let units_per_row = blocks.div_ceil(BLOCKS_PER_UNIT);
        let mut units = partition(self.source.num_rows() * units_per_row, num_threads, index, 1);
        while !units.is_empty() {
            let (row, first) = (units.start / units_per_row, units.start % units_per_row);
            let count = units.len().min(units_per_row - first);
            units.start += count;
            let range = [first * BLOCKS_PER_UNIT, ((first + count) * BLOCKS_PER_UNIT).min(blocks)];
            let x = self.source.row(row);
            for Int8Rows { layout, first, across } in self.int8.iter().flatten() {
                // SAFETY: `prepare` made room for all rows; parts of a row by different threads are different blocks.
                unsafe {
                    let to = first.add(row * layout.row_bytes);
                    round_part_to_int8(level, x, to, *layout, range);
                    if let Some(across) = across {
                        across.at_row(row).copy(layout, to, range);
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
        let num_rows = self.source.num_rows();
        let len_bytes =
            |stride_bytes, row_bytes| if num_rows == 0 { 0 } else { (num_rows - 1) * stride_bytes + row_bytes };
        match form {
            RowForm::Int8 { scale_blocks } => {
                let int8 = self.int8[int8_form(scale_blocks)].as_ref().expect("8-bit rows were asked for");
                let (first, row_bytes) = (int8.first.cast_const(), int8.layout.row_bytes);
                let len_bytes = len_bytes(row_bytes, row_bytes);
                // SAFETY: rows stand there, whole, and `fill` wrote their numbers, with room behind the last one; the rest is
                // the caller's promise.
                unsafe {
                    let rows = Rows::new(form, Some(&int8.layout), first, len_bytes, row_bytes, self.identity);
                    int8.across.map_or(rows, |across| rows.with_across(across))
                }
            }
            RowForm::F32 => {
                let FloatRows { first, stride_bytes, .. } = self.float.expect("f32 rows were asked for");
                let len_bytes = len_bytes(stride_bytes, self.blocks * BLOCK_COLS * 4);
                // SAFETY: as above.
                unsafe { Rows::new(form, None, first, len_bytes, stride_bytes, self.identity) }
            }
        }
    }

    /// The ids of rows `range`.
    pub(crate) fn ids(&self, range: std::ops::Range<usize>) -> &[u32] {
        &self.identity[range]
    }
}
