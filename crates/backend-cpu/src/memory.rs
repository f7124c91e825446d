//! Device memory of this back end: host buffers behind the handles of `moellon-ops`.
//!
//! `unsafe`: views are raw, because operations read and write parts of one buffer at once, on several threads.
#![allow(unsafe_code)]

use moellon_ops::{Buffer, Cache, CacheDtype, ElementType, Tensor};
use moellon_tensor::arena::AlignedBuf;
use std::io;

/// Buffers and caches by their handles' numbers.
#[derive(Default)]
pub(crate) struct Memory {
    /// 4-byte elements; `None` once freed.
    buffers: Vec<Option<AlignedBuf<u32>>>,
    /// Cache rows.
    caches: Vec<AlignedBuf<u8>>,
}

/// A view of floats: `rows` rows of `cols`, `stride` apart.
#[derive(Clone, Copy)]
pub(crate) struct Floats {
    pointer: *mut f32,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) stride: usize,
}

/// A view of integers.
#[derive(Clone, Copy)]
pub(crate) struct Integers {
    pointer: *mut u32,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    stride: usize,
}

/// Rows of a cache.
#[derive(Clone, Copy)]
pub(crate) struct CacheRows {
    pointer: *mut u8,
    pub(crate) dtype: CacheDtype,
    pub(crate) num_slots: usize,
    pub(crate) row_bytes: usize,
}

// SAFETY: views are addresses; every access is `unsafe` and its caller promises that it does not race.
unsafe impl Send for Floats {}
// SAFETY: as above.
unsafe impl Sync for Floats {}
// SAFETY: as above.
unsafe impl Send for Integers {}
// SAFETY: as above.
unsafe impl Sync for Integers {}
// SAFETY: as above.
unsafe impl Send for CacheRows {}
// SAFETY: as above.
unsafe impl Sync for CacheRows {}

impl Floats {
    /// Row `row`.
    ///
    /// # Safety
    /// Nobody writes any of it while the slice lives.
    #[inline]
    pub(crate) unsafe fn row(&self, row: usize) -> &[f32] {
        // SAFETY: inside the buffer (checked when the view was made); the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts(self.pointer(row), self.cols) }
    }

    /// Columns `first .. first + len` of row `row`.
    ///
    /// # Safety
    /// Nobody else reads or writes any of them while the slice lives.
    #[inline]
    #[expect(clippy::mut_from_ref, reason = "the view is an address; the caller promises that parts are disjoint")]
    pub(crate) unsafe fn part_mut(&self, row: usize, first: usize, len: usize) -> &mut [f32] {
        assert!(first + len <= self.cols, "columns {first}..{} of {}", first + len, self.cols);
        // SAFETY: inside the buffer; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.pointer(row).add(first), len) }
    }

    /// Where row `row` starts.
    #[inline]
    pub(crate) fn pointer(&self, row: usize) -> *mut f32 {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: rows of the view are inside the buffer.
        unsafe { self.pointer.add(row * self.stride) }
    }
}

impl Integers {
    /// Row `row`.
    ///
    /// # Safety
    /// Nobody writes any of it while the slice lives.
    #[inline]
    pub(crate) unsafe fn row(&self, row: usize) -> &[u32] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: rows of the view are inside the buffer; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts(self.pointer.add(row * self.stride), self.cols) }
    }

    /// Row `row`, to write.
    ///
    /// # Safety
    /// Nobody else reads or writes any of it while the slice lives.
    #[inline]
    #[expect(clippy::mut_from_ref, reason = "the view is an address; the caller promises that parts are disjoint")]
    pub(crate) unsafe fn row_mut(&self, row: usize) -> &mut [u32] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: rows of the view are inside the buffer; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.add(row * self.stride), self.cols) }
    }
}

impl Integers {
    /// Writes element `col` of the first row.
    ///
    /// # Safety
    /// Nobody else reads or writes it at the same time.
    #[inline]
    pub(crate) unsafe fn write(&self, col: usize, value: u32) {
        assert!(self.rows > 0 && col < self.cols, "column {col} of {}", self.cols);
        // SAFETY: inside the buffer; the rest is the caller's promise.
        unsafe { self.pointer.add(col).write(value) }
    }
}

impl CacheRows {
    /// Where slot `slot` starts.
    #[inline]
    pub(crate) fn pointer(&self, slot: usize) -> *mut u8 {
        assert!(slot < self.num_slots, "slot {slot} of {}", self.num_slots);
        // SAFETY: rows are inside the cache.
        unsafe { self.pointer.add(slot * self.row_bytes) }
    }
}

impl Memory {
    /// A new zeroed buffer.
    pub(crate) fn alloc(&mut self, element: ElementType, len: usize) -> io::Result<Buffer> {
        self.buffers.push(Some(AlignedBuf::zeroed(len)?));
        Ok(Buffer { id: self.buffers.len() as u32 - 1, element, len })
    }

    /// Gives a buffer's memory back.
    pub(crate) fn free(&mut self, buffer: Buffer) {
        self.buffers[buffer.id as usize] = None;
    }

    /// A new zeroed cache.
    pub(crate) fn alloc_cache(&mut self, dtype: CacheDtype, num_slots: usize, width: usize) -> io::Result<Cache> {
        let cache = Cache { id: self.caches.len() as u32, dtype, num_slots, width };
        self.caches.push(AlignedBuf::zeroed(num_slots * cache.row_bytes())?);
        Ok(cache)
    }

    /// A view of floats.
    ///
    /// # Panics
    /// If the handle is not of this back end, was freed, or leaves its buffer.
    pub(crate) fn floats(&self, tensor: Tensor) -> Floats {
        assert_eq!(tensor.buffer.element, ElementType::F32, "validate() checked the element type");
        let Tensor { rows, cols, stride, .. } = tensor;
        Floats { pointer: self.start(tensor).cast(), rows, cols, stride }
    }

    /// A view of integers.
    ///
    /// # Panics
    /// As [`Memory::floats`].
    pub(crate) fn integers(&self, tensor: Tensor) -> Integers {
        assert_eq!(tensor.buffer.element, ElementType::U32, "validate() checked the element type");
        let Tensor { rows, cols, stride, .. } = tensor;
        Integers { pointer: self.start(tensor), rows, cols, stride }
    }

    /// The rows of a cache.
    ///
    /// # Panics
    /// If the handle is not of this back end.
    pub(crate) fn cache(&self, cache: &Cache) -> CacheRows {
        let rows = &self.caches[cache.id as usize];
        let row_bytes = cache.row_bytes();
        assert!(cache.num_slots * row_bytes <= rows.num_elements(), "a cache of this back end");
        CacheRows { pointer: rows.as_non_null().as_ptr(), dtype: cache.dtype, num_slots: cache.num_slots, row_bytes }
    }

    /// Copies host floats `[rows * cols]` into a view.
    pub(crate) fn write_floats(&mut self, dst: Tensor, src: &[f32]) {
        let view = self.floats(dst);
        for (row, src) in src.chunks_exact(dst.cols.max(1)).enumerate() {
            // SAFETY: `&mut self`: no operation runs.
            unsafe { view.part_mut(row, 0, dst.cols).copy_from_slice(src) };
        }
    }

    /// Copies host integers `[rows * cols]` into a view.
    pub(crate) fn write_integers(&mut self, dst: Tensor, src: &[u32]) {
        let view = self.integers(dst);
        for (row, src) in src.chunks_exact(dst.cols.max(1)).enumerate() {
            // SAFETY: `&mut self`: no operation runs.
            unsafe { view.row_mut(row).copy_from_slice(src) };
        }
    }

    /// Copies a view to the host, `[rows * cols]`.
    pub(crate) fn read_floats(&mut self, src: Tensor, dst: &mut [f32]) {
        let view = self.floats(src);
        for (row, dst) in dst.chunks_exact_mut(src.cols.max(1)).enumerate() {
            // SAFETY: `&mut self`: no operation runs.
            dst.copy_from_slice(unsafe { view.row(row) });
        }
    }

    /// Copies a view to the host, `[rows * cols]`.
    pub(crate) fn read_integers(&mut self, src: Tensor, dst: &mut [u32]) {
        let view = self.integers(src);
        for (row, dst) in dst.chunks_exact_mut(src.cols.max(1)).enumerate() {
            // SAFETY: `&mut self`: no operation runs.
            dst.copy_from_slice(unsafe { view.row(row) });
        }
    }

    /// Copies rows from `first_slot` on to the host. The layout is the seam's: row after row, little-endian.
    ///
    /// # Panics
    /// If the rows leave the cache: `Cache::check_rows` comes first.
    pub(crate) fn read_cache_rows(&self, cache: Cache, first_slot: usize, dst: &mut [u8]) {
        let start = first_slot * cache.row_bytes();
        dst.copy_from_slice(&self.caches[cache.id as usize][start..][..dst.len()]);
    }

    /// Copies host rows into the cache from `first_slot` on.
    ///
    /// # Panics
    /// As [`Memory::read_cache_rows`].
    pub(crate) fn write_cache_rows(&mut self, cache: Cache, first_slot: usize, src: &[u8]) {
        let start = first_slot * cache.row_bytes();
        self.caches[cache.id as usize][start..][..src.len()].copy_from_slice(src);
    }

    fn start(&self, tensor: Tensor) -> *mut u32 {
        let buffer = self.buffers[tensor.buffer.id as usize].as_ref().expect("a buffer that was not freed");
        let end = tensor.offset + tensor.extent();
        assert!(end <= buffer.num_elements(), "a view up to {end} of a buffer of {}", buffer.num_elements());
        // SAFETY: inside the buffer, or one past its end for an empty view.
        unsafe { buffer.as_non_null().as_ptr().add(tensor.offset.min(buffer.num_elements())) }
    }
}
