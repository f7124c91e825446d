//! Tile registers (AMX): whether this process may use them, and their configuration.
//!
//! A tile instruction multiplies up to 16 rows of 64 bytes with 16 columns: eight times as many products a cycle as
//! AVX-512 VNNI. Sums are exact integers, so they are the same sums. The compiler never uses tile registers, so code here
//! is inline assembly that names them.
//!
//! `unsafe`: assembly.
#![allow(unsafe_code)]

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::cell::Cell;
use std::sync::OnceLock;

/// Whether the processor has tiles of bytes and the system lets this process use them. Linux wants to be asked, because
/// every thread that does needs 8 KiB more for its saved registers.
#[allow(unused_unsafe, reason = "CPUID is a safe function in some versions of the standard library")]
pub(crate) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        /// CPUID leaf 7, EDX.
        const AMX_TILE_AND_INT8: u32 = 1 << 24 | 1 << 25;
        // SAFETY: callers have AVX-512, so the processor has CPUID leaf 7.
        let features = unsafe { __cpuid_count(7, 0) };
        features.edx & AMX_TILE_AND_INT8 == AMX_TILE_AND_INT8 && is_saved() && is_permitted()
    })
}

/// Whether the tiles multiply bf16 as well, where they are available.
#[allow(unused_unsafe, reason = "CPUID is a safe function in some versions of the standard library")]
pub(crate) fn has_bf16() -> bool {
    /// CPUID leaf 7, EDX.
    const AMX_BF16: u32 = 1 << 22;
    // SAFETY: callers have AVX-512, so the processor has CPUID leaf 7.
    unsafe { __cpuid_count(7, 0) }.edx & AMX_BF16 != 0
}

/// Whether the system saves tile registers: XCR0 bits 17 and 18.
fn is_saved() -> bool {
    const TILE_STATE: u32 = 0b11 << 17;
    let low: u32;
    // SAFETY: a processor with AVX-512 under a system that has enabled it has XGETBV; it reads a control register.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") _, options(nomem, nostack, preserves_flags)) };
    low & TILE_STATE == TILE_STATE
}

/// Asks Linux for the use of tile data (`arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)`).
#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    const XTILEDATA: i64 = 18;
    let status: i64;
    // SAFETY: a system call that changes nothing but this permission; the kernel overwrites RCX and R11.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => status,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XTILEDATA,
            out("rcx") _,
            out("r11") _,
            options(nostack)
        );
    }
    status == 0
}

#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

/// What the registers of a thread hold: four of sums, two of activations, two of operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Activation rows, 1 to 16.
    pub(crate) rows: usize,
    /// Columns that an instruction multiplies: a multiple of 4, up to 64.
    pub(crate) cols: usize,
}

thread_local! {
    /// The shape of this thread's registers, unless they are given back.
    static SHAPE: Cell<Option<Shape>> = const { Cell::new(None) };
}

/// What LDTILECFG reads.
#[repr(C, align(64))]
#[allow(dead_code, reason = "the processor reads it")]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    /// Bytes of a row.
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Gives this thread's registers the shape, if they have another one: that takes 185 cycles and clears them. Sums are 16
/// numbers of 4 bytes a row, activations `cols` bytes; operands are `cols / 4` rows of 64 bytes.
///
/// # Safety
/// [`is_available`] said yes.
///
/// # Panics
/// If no register has that shape.
#[inline]
pub(crate) unsafe fn configure(shape: Shape) {
    if SHAPE.get() == Some(shape) {
        return;
    }
    let Shape { rows, cols } = shape;
    assert!((1..=16).contains(&rows) && cols <= 64 && cols.is_multiple_of(4), "tile registers of {rows} x {cols}");
    let mut config = TileConfig { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    for (i, (rows, row_bytes)) in
        [(rows, 64); 4].into_iter().chain([(rows, cols); 2]).chain([(cols / 4, 64); 2]).enumerate()
    {
        (config.rows[i], config.row_bytes[i]) = (rows as u8, row_bytes as u16);
    }
    // SAFETY: the value is 64 bytes in the documented layout; the rest is the caller's promise.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(readonly, nostack, preserves_flags)) }
    SHAPE.set(Some(shape));
}

/// While it lives, this thread may use tile registers; then it gives them back, if it did: a thread without them is
/// switched faster, and its core sleeps deeper.
pub(crate) struct Use;

impl Drop for Use {
    fn drop(&mut self) {
        if SHAPE.take().is_some() {
            // SAFETY: the registers are in use, so there are some.
            unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) }
        }
    }
}
