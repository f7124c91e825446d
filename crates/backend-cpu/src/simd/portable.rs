//! Sixteen lanes as arrays: what every other level must equal, and what runs where nothing better exists.
// Loops run over arrays of registers, several at once; iterators would hide vectors in closures.
#![allow(clippy::needless_range_loop)]

use super::Simd;

/// The portable level.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

type F = [f32; 16];
type I = [i32; 16];

macro_rules! lanes {
    ($i:ident => $value:expr) => {{
        let mut out = [Default::default(); 16];
        for $i in 0..16 {
            out[$i] = $value;
        }
        out
    }};
}

#[inline(always)]
fn bytes(x: I) -> [u8; 64] {
    bytemuck::cast(x)
}

impl Simd for Portable {
    type F = F;
    type I = I;
    type Pairs = I;

    const STREAMS: [usize; 4] = [1, 0, 0, 0];
    const MANY_REGISTERS: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> F {
        [x; 16]
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> F {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<F>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(self, x: F, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<F>().write_unaligned(x) }
    }

    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        lanes!(i => a[i] + b[i])
    }

    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        lanes!(i => a[i] - b[i])
    }

    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        lanes!(i => a[i] * b[i])
    }

    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        lanes!(i => a[i] / b[i])
    }

    #[inline(always)]
    fn mul_add(self, a: F, b: F, c: F) -> F {
        lanes!(i => a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        lanes!(i => if a[i] > b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn min(self, a: F, b: F) -> F {
        lanes!(i => if a[i] < b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn sum(self, x: F) -> f32 {
        let mut x = x;
        let mut width = 8;
        while width > 0 {
            for i in 0..width {
                x[i] += x[i + width];
            }
            width /= 2;
        }
        x[0]
    }

    #[inline(always)]
    fn max_lane(self, x: F) -> f32 {
        let mut largest = x[0];
        for lane in x {
            if lane > largest {
                largest = lane;
            }
        }
        largest
    }

    #[inline(always)]
    fn splat_i(self, x: i32) -> I {
        [x; 16]
    }

    #[inline(always)]
    unsafe fn splat_4_bytes(self, from: *const u8) -> I {
        // SAFETY: the caller's promise.
        [unsafe { from.cast::<i32>().read_unaligned() }; 16]
    }

    #[inline(always)]
    unsafe fn load_i(self, from: *const u8) -> I {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<I>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_u8(self, from: *const u8) -> I {
        // SAFETY: the caller's promise.
        let small = unsafe { from.cast::<[u8; 16]>().read_unaligned() };
        lanes!(i => i32::from(small[i]))
    }

    #[inline(always)]
    unsafe fn load_u16(self, from: *const u8) -> I {
        // SAFETY: the caller's promise.
        let small = unsafe { from.cast::<[u16; 16]>().read_unaligned() };
        lanes!(i => i32::from(small[i]))
    }

    #[inline(always)]
    unsafe fn store_low_bytes(self, x: I, to: *mut u8) {
        let low: [u8; 16] = lanes!(i => x[i] as u8);
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[u8; 16]>().write_unaligned(low) }
    }

    #[inline(always)]
    fn and(self, a: I, b: I) -> I {
        lanes!(i => a[i] & b[i])
    }

    #[inline(always)]
    fn or(self, a: I, b: I) -> I {
        lanes!(i => a[i] | b[i])
    }

    #[inline(always)]
    fn shl(self, x: I, bits: u32) -> I {
        lanes!(i => x[i] << bits)
    }

    #[inline(always)]
    fn shr(self, x: I, bits: u32) -> I {
        lanes!(i => (x[i] as u32 >> bits) as i32)
    }

    #[inline(always)]
    fn sar(self, x: I, bits: u32) -> I {
        lanes!(i => x[i] >> bits)
    }

    #[inline(always)]
    fn add_i(self, a: I, b: I) -> I {
        lanes!(i => a[i].wrapping_add(b[i]))
    }

    #[inline(always)]
    fn sub_i(self, a: I, b: I) -> I {
        lanes!(i => a[i].wrapping_sub(b[i]))
    }

    #[inline(always)]
    fn greater(self, a: I, b: I) -> I {
        lanes!(i => -i32::from(a[i] > b[i]))
    }

    #[inline(always)]
    fn sum_i(self, x: I) -> i32 {
        let mut total = 0i32;
        for lane in x {
            total = total.wrapping_add(lane);
        }
        total
    }

    #[inline(always)]
    fn to_f(self, x: I) -> F {
        lanes!(i => x[i] as f32)
    }

    #[inline(always)]
    fn to_i(self, x: F) -> I {
        lanes!(i => x[i].round_ties_even() as i32)
    }

    #[inline(always)]
    fn cast_to_f(self, x: I) -> F {
        bytemuck::cast(x)
    }

    #[inline(always)]
    fn cast_to_i(self, x: F) -> I {
        bytemuck::cast(x)
    }

    #[inline(always)]
    fn look_up(self, table: I, indices: I) -> I {
        let (table, indices) = (bytes(table), bytes(indices));
        let mut out = [0u8; 64];
        for i in 0..64 {
            out[i] = table[usize::from(indices[i] & 15)];
        }
        bytemuck::cast(out)
    }

    #[inline(always)]
    fn load_table(self, table: &[u8; 16]) -> I {
        bytemuck::cast([*table; 4])
    }

    #[inline(always)]
    fn dot4_u7(self, acc: I, a: I, b: I) -> I {
        self.dot4_u8(acc, a, b)
    }

    #[inline(always)]
    fn dot4_u8(self, acc: I, a: I, b: I) -> I {
        let (a, b) = (bytes(a), bytes(b));
        let mut out = acc;
        for i in 0..16 {
            for j in 0..4 {
                out[i] = out[i].wrapping_add(i32::from(a[4 * i + j]) * i32::from(b[4 * i + j] as i8));
            }
        }
        out
    }

    #[inline(always)]
    fn open_pairs(self, acc: I) -> I {
        acc
    }

    #[inline(always)]
    fn dot4_pairs(self, pairs: I, a: I, b: I) -> I {
        self.dot4_u7(pairs, a, b)
    }

    #[inline(always)]
    fn close_pairs(self, _acc: I, pairs: I) -> I {
        pairs
    }

    #[inline(always)]
    fn prefetch(self, _address: *const u8) {}

    #[inline(always)]
    fn prefetch_far(self, _address: *const u8) {}
}
