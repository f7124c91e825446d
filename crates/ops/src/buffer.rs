//! Handles to device memory. They are plain numbers: the back end owns the memory, so a model can hold them across
//! steps without lifetimes, and the same step can be recorded once and replayed.

use crate::error::{expect, expect_eq};
use crate::{Error, Result};

/// Element type of a device buffer. Activations are f32, ids and positions u32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ElementType {
    /// 32-bit float.
    F32,
    /// 32-bit unsigned integer.
    U32,
}

/// A piece of device memory of `len` elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Buffer {
    /// The back end's number for it.
    pub id: u32,
    /// Element type.
    pub element: ElementType,
    /// Elements.
    pub len: usize,
}

impl Buffer {
    /// The first `rows * cols` elements as `[rows, cols]`.
    pub fn tensor(self, rows: usize, cols: usize) -> Tensor {
        Tensor { buffer: self, offset: 0, rows, cols, stride: cols }
    }
}

/// A 2-D view of a [`Buffer`]: `rows` rows of `cols` elements, `stride` elements apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tensor {
    /// The memory.
    pub buffer: Buffer,
    /// First element.
    pub offset: usize,
    /// Rows; for activations the tokens of the batch.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Elements between the starts of two rows, at least `cols`.
    pub stride: usize,
}

impl Tensor {
    /// Columns `[first, first + cols)` of every row.
    ///
    /// # Panics
    /// If the range leaves the view: column ranges come from the model's config, not from input.
    #[must_use]
    pub fn columns(self, first: usize, cols: usize) -> Tensor {
        assert!(first + cols <= self.cols, "columns {first}..{} of a view with {} columns", first + cols, self.cols);
        Tensor { offset: self.offset + first, cols, ..self }
    }

    /// Rows `[first, first + rows)`.
    ///
    /// # Panics
    /// If the range leaves the view.
    #[must_use]
    pub fn row_range(self, first: usize, rows: usize) -> Tensor {
        assert!(first + rows <= self.rows, "rows {first}..{} of a view with {} rows", first + rows, self.rows);
        Tensor { offset: self.offset + first * self.stride, rows, ..self }
    }

    /// The same elements with every row cut into `parts` rows (heads as rows).
    ///
    /// # Panics
    /// If the view is not contiguous or `parts` does not divide its columns.
    #[must_use]
    pub fn split_rows(self, parts: usize) -> Tensor {
        assert!(self.stride == self.cols, "split_rows of a view with stride {} and {} columns", self.stride, self.cols);
        assert!(self.cols.is_multiple_of(parts), "split_rows of {} columns into {parts} parts", self.cols);
        let cols = self.cols / parts;
        Tensor { rows: self.rows * parts, cols, stride: cols, ..self }
    }

    /// Elements from the first to one past the last.
    pub fn extent(&self) -> usize {
        if self.rows == 0 { 0 } else { (self.rows - 1) * self.stride + self.cols }
    }

    /// Checks element type, shape and that the view lies inside its buffer.
    pub(crate) fn check(&self, op: &'static str, name: &str, element: ElementType, shape: [usize; 2]) -> Result<()> {
        expect_eq(op, format_args!("element type of {name}"), self.buffer.element, element)?;
        expect_eq(op, format_args!("shape of {name}"), [self.rows, self.cols], shape)?;
        expect(
            op,
            self.stride >= self.cols,
            format_args!("row stride of {name}"),
            self.stride,
            "at least its columns",
        )?;
        let end = self.offset + self.extent();
        if end > self.buffer.len {
            return Err(Error::Contract {
                op,
                what: format!("end of {name} in its buffer"),
                found: end.to_string(),
                expected: format!("at most {}", self.buffer.len),
            });
        }
        Ok(())
    }

    /// [`Tensor::check`] for f32.
    pub(crate) fn check_f32(&self, op: &'static str, name: &str, shape: [usize; 2]) -> Result<()> {
        self.check(op, name, ElementType::F32, shape)
    }

    /// [`Tensor::check`] for u32.
    pub(crate) fn check_u32(&self, op: &'static str, name: &str, shape: [usize; 2]) -> Result<()> {
        self.check(op, name, ElementType::U32, shape)
    }
}

/// Element type of cached rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CacheDtype {
    /// As computed; for references and golden tests.
    F32,
    /// Rounded to bfloat16 when stored: half the bytes, the precision that checkpoints are trained with.
    Bf16,
}

impl CacheDtype {
    /// Bytes of one element.
    pub const fn size_bytes(self) -> usize {
        match self {
            CacheDtype::F32 => 4,
            CacheDtype::Bf16 => 2,
        }
    }
}

/// Rows that attention reads back: keys and values `[k | v]`, latents `[c | k_pe]`, or index keys. One row per slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cache {
    /// The back end's number for it.
    pub id: u32,
    /// Element type.
    pub dtype: CacheDtype,
    /// Rows (blocks times block size).
    pub num_slots: usize,
    /// Elements of a row.
    pub width: usize,
}

impl Cache {
    /// Bytes of one row.
    pub const fn row_bytes(&self) -> usize {
        self.width * self.dtype.size_bytes()
    }

    /// Checks that `size_bytes` on the host are whole rows that lie inside the cache from `first_slot` on.
    ///
    /// # Errors
    /// [`Error::Contract`].
    pub fn check_rows(&self, op: &'static str, first_slot: usize, size_bytes: usize) -> Result<()> {
        let row_bytes = self.row_bytes();
        let whole = size_bytes.is_multiple_of(row_bytes);
        expect(
            op,
            whole,
            "bytes on the host",
            size_bytes,
            format_args!("a multiple of {row_bytes}, the bytes of a row"),
        )?;
        let end = first_slot.saturating_add(size_bytes / row_bytes);
        expect(op, end <= self.num_slots, "end of the rows", end, format_args!("at most {}", self.num_slots))
    }
}

/// Where the rows of a batch find their keys. Row `t` attends the keys at positions `0..=positions[t]` of its sequence;
/// the key at position `p` lies in slot `block_table[sequence][p / block_size] * block_size + p % block_size`.
#[derive(Debug, Clone, Copy)]
pub struct Paging {
    /// `[1, num_tokens]` u32: position of each row in its sequence.
    pub positions: Tensor,
    /// `[1, num_tokens]` u32: which row of `block_table` each row uses.
    pub sequences: Tensor,
    /// `[num_sequences, max_blocks]` u32.
    pub block_table: Tensor,
    /// Slots of a block.
    pub block_size: usize,
    /// One more than the largest position in the batch: what work buffers must hold.
    pub max_context: usize,
}

impl Paging {
    /// Checks the shapes for `num_tokens` rows.
    pub(crate) fn check(&self, op: &'static str, num_tokens: usize) -> Result<()> {
        self.positions.check_u32(op, "positions", [1, num_tokens])?;
        self.sequences.check_u32(op, "sequences", [1, num_tokens])?;
        self.block_table.check_u32(op, "block_table", [self.block_table.rows, self.block_table.cols])?;
        expect(op, self.block_size > 0, "block_size", self.block_size, "at least 1")?;
        let room = self.block_table.cols * self.block_size;
        expect(
            op,
            self.max_context <= room,
            "max_context",
            self.max_context,
            format_args!("at most {room}, the slots of the block table"),
        )
    }
}
