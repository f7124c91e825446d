//! Large zeroed host memory for weights, caches and work space, aligned to cache lines and backed by huge pages.
//!
//! `unsafe`: owning memory from `mmap` or the allocator and viewing it as a slice.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::fmt;
use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};

/// Alignment of every buffer: a cache line, the width of the widest vector register.
pub const ALIGNMENT_BYTES: usize = 64;
/// Buffers of at least this size are aligned to it and ask for huge pages: fewer TLB misses, and hardware prefetchers
/// that stop at page ends run on.
pub const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Whether buffers ask for huge pages.
static HUGE_PAGES: AtomicBool = AtomicBool::new(true);

/// Whether buffers that are allocated from now on ask for huge pages (they do unless told) or for none, whatever the system
/// does by itself: for measuring what huge pages bring.
pub fn set_huge_pages(wanted: bool) {
    HUGE_PAGES.store(wanted, Ordering::Relaxed);
}

/// Owned memory of `len` elements, zeroed, at a multiple of [`ALIGNMENT_BYTES`] (of [`HUGE_PAGE_BYTES`] when that
/// large). Pages are mapped when first touched, so the thread that fills a part decides on which NUMA node it lies.
pub struct AlignedBuf<T> {
    pointer: NonNull<T>,
    len: usize,
    layout: Layout,
    mapped: bool,
}

// SAFETY: the buffer owns its memory alone, like `Vec<T>`.
unsafe impl<T: Send> Send for AlignedBuf<T> {}
// SAFETY: shared access gives only `&[T]`.
unsafe impl<T: Sync> Sync for AlignedBuf<T> {}

impl<T: bytemuck::Zeroable + Copy> AlignedBuf<T> {
    /// `len` zeroed elements.
    ///
    /// # Errors
    /// If the system has not that much memory (or address space) to give.
    pub fn zeroed(len: usize) -> io::Result<Self> {
        let out_of_memory = || {
            let size_bytes = len.saturating_mul(size_of::<T>());
            io::Error::new(io::ErrorKind::OutOfMemory, format!("no memory for a buffer of {size_bytes} bytes"))
        };
        let size_bytes = len.checked_mul(size_of::<T>()).ok_or_else(out_of_memory)?;
        let huge = size_bytes >= HUGE_PAGE_BYTES;
        let alignment = if huge { HUGE_PAGE_BYTES } else { ALIGNMENT_BYTES.max(align_of::<T>()) };
        let layout = Layout::from_size_align(size_bytes, alignment).map_err(|_| out_of_memory())?;
        if size_bytes == 0 {
            let pointer = NonNull::without_provenance(std::num::NonZero::new(alignment).expect("64 or more"));
            return Ok(AlignedBuf { pointer, len, layout, mapped: false });
        }
        if let Some(pointer) = huge.then(|| map_huge(size_bytes)).flatten() {
            return Ok(AlignedBuf { pointer: pointer.cast(), len, layout, mapped: true });
        }
        // SAFETY: the layout's size is not zero.
        let pointer = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(out_of_memory)?;
        Ok(AlignedBuf { pointer: pointer.cast(), len, layout, mapped: false })
    }
}

impl<T> AlignedBuf<T> {
    /// The first element. For owners that hand out raw views: no reference to the whole buffer is made, so views stay
    /// valid beside each other.
    pub fn as_non_null(&self) -> NonNull<T> {
        self.pointer
    }

    /// Elements, without a reference to them.
    pub fn num_elements(&self) -> usize {
        self.len
    }
}

impl<T> Deref for AlignedBuf<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `pointer` holds `len` elements, zeroed (a legal `T`) or written since.
        unsafe { std::slice::from_raw_parts(self.pointer.as_ptr(), self.len) }
    }
}

impl<T> DerefMut for AlignedBuf<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.as_ptr(), self.len) }
    }
}

impl<T> Drop for AlignedBuf<T> {
    fn drop(&mut self) {
        if self.layout.size() == 0 {
            return;
        }
        if self.mapped {
            unmap(self.pointer.cast(), self.layout.size());
        } else {
            // SAFETY: allocated in `zeroed` with this layout.
            unsafe { dealloc(self.pointer.cast().as_ptr(), self.layout) };
        }
    }
}

impl<T> fmt::Debug for AlignedBuf<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuf({} bytes at {:p})", self.layout.size(), self.pointer)
    }
}

/// Bytes that this process may still take: what the system has available, or its control group's limit if that is less.
/// `None` where the system does not say.
pub fn free_memory_bytes() -> Option<u64> {
    let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let available = line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024;
    // Version 2 control groups; an unlimited one says `max`, which is no number. Cached files count as used there but
    // make room, such as those of the checkpoint being loaded.
    let limit = number("/sys/fs/cgroup/memory.max").zip(number("/sys/fs/cgroup/memory.current"));
    let cached = std::fs::read_to_string("/sys/fs/cgroup/memory.stat")
        .ok()
        .and_then(|stat| stat.lines().find_map(|line| line.strip_prefix("file "))?.parse::<u64>().ok());
    let left = limit.map(|(max, current)| max.saturating_sub(current.saturating_sub(cached.unwrap_or(0))));
    Some(left.map_or(available, |left| left.min(available)))
}

/// Anonymous memory at a multiple of [`HUGE_PAGE_BYTES`]; `None` where the system refuses or has no such call.
#[cfg(unix)]
fn map_huge(size_bytes: usize) -> Option<NonNull<u8>> {
    let reserved_bytes = size_bytes.checked_add(HUGE_PAGE_BYTES)?;
    // SAFETY: a fresh private mapping, no address asked for.
    let start = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            reserved_bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANON,
            -1,
            0,
        )
    };
    if start == libc::MAP_FAILED {
        return None;
    }
    let start = start.cast::<u8>();
    let head_bytes = start.align_offset(HUGE_PAGE_BYTES);
    let page_bytes = page_bytes();
    // Give back what lies before the aligned start and after the last page.
    let end_bytes = head_bytes + size_bytes.next_multiple_of(page_bytes);
    // SAFETY: `head_bytes` is below 2 MiB, so the aligned start lies inside the reserved range; both parts given back
    // are whole pages of our own mapping that nobody uses.
    let aligned = unsafe {
        if head_bytes > 0 {
            libc::munmap(start.cast(), head_bytes);
        }
        if end_bytes < reserved_bytes {
            libc::munmap(start.add(end_bytes).cast(), reserved_bytes - end_bytes);
        }
        start.add(head_bytes)
    };
    #[cfg(target_os = "linux")]
    // SAFETY: advice on our own mapping; a refusal costs speed only.
    unsafe {
        let advice = if HUGE_PAGES.load(Ordering::Relaxed) { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
        libc::madvise(aligned.cast(), size_bytes, advice);
    }
    NonNull::new(aligned)
}

#[cfg(unix)]
fn page_bytes() -> usize {
    // SAFETY: no preconditions.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(4096)
}

#[cfg(unix)]
fn unmap(pointer: NonNull<u8>, size_bytes: usize) {
    // SAFETY: `map_huge` left exactly these pages mapped.
    unsafe { libc::munmap(pointer.as_ptr().cast(), size_bytes.next_multiple_of(page_bytes())) };
}

#[cfg(not(unix))]
fn map_huge(_size_bytes: usize) -> Option<NonNull<u8>> {
    None
}

#[cfg(not(unix))]
fn unmap(_pointer: NonNull<u8>, _size_bytes: usize) {
    unreachable!("only memory from map_huge is marked as mapped");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_zeroed_aligned_and_writable_to_the_last_element() {
        for len in [0, 1, 15, 1000, HUGE_PAGE_BYTES / 4 - 1, HUGE_PAGE_BYTES / 4, HUGE_PAGE_BYTES + 77] {
            let mut buffer = AlignedBuf::<f32>::zeroed(len).unwrap();
            assert_eq!(buffer.len(), len);
            let alignment = if len * 4 >= HUGE_PAGE_BYTES { HUGE_PAGE_BYTES } else { ALIGNMENT_BYTES };
            assert_eq!(buffer.as_ptr() as usize % alignment, 0);
            assert!(buffer.iter().all(|x| *x == 0.0));
            if let Some(last) = buffer.last_mut() {
                *last = 1.0;
            }
            buffer.fill(2.0);
            assert!(buffer.iter().all(|x| *x == 2.0));
        }
    }

    #[test]
    fn free_memory_is_plausible_where_it_is_known() {
        if let Some(free) = free_memory_bytes() {
            assert!(free > 1 << 20 && free < 1 << 50, "{free} bytes");
        }
    }

    #[test]
    fn impossible_sizes_are_errors() {
        assert!(AlignedBuf::<f32>::zeroed(usize::MAX).is_err());
        assert!(AlignedBuf::<u8>::zeroed(isize::MAX as usize - 64).is_err());
    }
}
