//! A mutable slice of which several threads write disjoint parts.
//!
//! `unsafe`: handing out overlapping-capable mutable access; callers say why their parts are disjoint.
#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::ops::Range;

/// A borrowed mutable slice that threads share.
#[derive(Clone, Copy)]
pub(crate) struct Disjoint<'a, T> {
    pointer: *mut T,
    len: usize,
    _borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: access goes through `part`, whose callers promise disjoint ranges; that is what `&mut` parts of a slice on
// several threads are.
unsafe impl<T: Send> Send for Disjoint<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    /// Shares `slice`.
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Disjoint { pointer: slice.as_mut_ptr(), len: slice.len(), _borrow: PhantomData }
    }

    /// Elements `range`.
    ///
    /// # Safety
    /// No other part that overlaps `range` is alive, on any thread.
    ///
    /// # Panics
    /// If the range leaves the slice.
    #[expect(clippy::mut_from_ref, reason = "that is its purpose; the caller promises that parts are disjoint")]
    pub(crate) unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "part {range:?} of {} elements", self.len);
        // SAFETY: inside the borrowed slice, and not aliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.add(range.start), range.len()) }
    }
}
