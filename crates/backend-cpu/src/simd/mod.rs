//! Vectors of 16 lanes, whatever the processor has: each kernel is written once over [`Simd`] and instantiated for
//! every [`CpuLevel`].
//!
//! The unit is 64 bytes: 16 f32, 16 i32, or one line of packed codes (16 lanes of 4 bytes). Sixteen rows of a weight
//! tile are the sixteen lanes, so no kernel sums across lanes of a product, and all levels perform the same operations
//! on a lane in the same order. Every operation here is exact or correctly rounded (fused multiply-add included), so
//! **all levels give the same bits**; tests compare them with `==`. The one exception are kernels of bf16 tiles, which are no [`Simd`]
//! code (`attend_tiles`): compared with a tolerance, and with `==` among batches.
//!
//! `unsafe`: intrinsics and unchecked loads. A value of a [`Simd`] type is the proof that the processor has the
//! instructions, and only [`CpuLevel::call`] makes one.
#![allow(unsafe_code)]

mod dispatch;
pub(crate) mod math;
pub(crate) mod portable;

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;

pub use dispatch::CpuLevel;
pub(crate) use dispatch::{Kernel, Level};

/// Sixteen lanes. Methods without pointers are safe: holding the token proves that the instructions exist.
///
/// Kernels must be `#[inline(always)]` all the way down from [`Kernel::run`] and must not pass vectors through closures,
/// or the instructions land in functions compiled without the target feature.
pub(crate) trait Simd: Copy {
    /// 16 f32.
    type F: Copy;
    /// 16 i32, or 64 bytes.
    type I: Copy;
    /// Sums of products of bytes on their way to 16 i32: 16-bit pairs where that saves instructions, else just `I`.
    type Pairs: Copy;

    /// Weight streams that one kernel call may read at once when it multiplies each line with 1, 2, up to 4, and 8
    /// activation rows: as many as there are registers for accumulators. 0: not so many rows.
    const STREAMS: [usize; 4];
    /// Whether eight accumulators of 16 lanes and what feeds them fit the registers.
    const MANY_REGISTERS: bool;
    /// Whether expanded tiles hold eight columns of each lane together, for [`Simd::dot_eights`].
    const EIGHTS: bool = false;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::F;
    /// 16 floats from memory, no alignment needed.
    ///
    /// # Safety
    /// `from` is valid for reads of 64 bytes.
    unsafe fn load(self, from: *const f32) -> Self::F;
    /// 16 floats to memory.
    ///
    /// # Safety
    /// `to` is valid for writes of 64 bytes.
    unsafe fn store(self, x: Self::F, to: *mut f32);
    /// `a + b`
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a - b`
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b`
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a / b`
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The larger lane; which operand a NaN gives is not defined.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// The smaller lane; which operand a NaN gives is not defined.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// Sum of the lanes, as the tree (i, i+8), (i, i+4), (i, i+2), (i, i+1).
    fn sum(self, x: Self::F) -> f32;
    /// [`Simd::sum`] of four vectors.
    #[inline(always)]
    fn sum_4(self, x: [Self::F; 4]) -> [f32; 4] {
        [self.sum(x[0]), self.sum(x[1]), self.sum(x[2]), self.sum(x[3])]
    }
    /// Largest lane.
    fn max_lane(self, x: Self::F) -> f32;
    /// [`Simd::max_lane`] of four vectors.
    #[inline(always)]
    fn max_lane_4(self, x: [Self::F; 4]) -> [f32; 4] {
        [self.max_lane(x[0]), self.max_lane(x[1]), self.max_lane(x[2]), self.max_lane(x[3])]
    }

    /// All lanes `x`.
    fn splat_i(self, x: i32) -> Self::I;
    /// The same 4 bytes in every lane.
    ///
    /// # Safety
    /// `from` is valid for reads of 4 bytes.
    unsafe fn splat_4_bytes(self, from: *const u8) -> Self::I;
    /// 64 bytes from memory, no alignment needed.
    ///
    /// # Safety
    /// `from` is valid for reads of 64 bytes.
    unsafe fn load_i(self, from: *const u8) -> Self::I;
    /// 16 bytes, each zero-extended to a lane.
    ///
    /// # Safety
    /// `from` is valid for reads of 16 bytes.
    unsafe fn load_u8(self, from: *const u8) -> Self::I;
    /// 16 two-byte numbers, each zero-extended to a lane.
    ///
    /// # Safety
    /// `from` is valid for reads of 32 bytes.
    unsafe fn load_u16(self, from: *const u8) -> Self::I;
    /// 16 binary16 numbers.
    ///
    /// # Safety
    /// `from` is valid for reads of 32 bytes.
    #[inline(always)]
    unsafe fn load_f16(self, from: *const u8) -> Self::F {
        // SAFETY: the caller's promise.
        let half = unsafe { self.load_u16(from) };
        let sign = self.shl(self.and(half, self.splat_i(0x8000)), 16);
        let magnitude = self.shl(self.and(half, self.splat_i(0x7fff)), 13);
        // Re-bias the exponent by a product, which also normalises subnormals; infinity and NaN keep all ones.
        let scaled = self.mul(self.cast_to_f(magnitude), self.splat(f32::from_bits((127 + 112) << 23)));
        let special = self.greater(magnitude, self.splat_i((0x7c00 << 13) - 1));
        let bits = self.or(self.cast_to_i(scaled), self.and(special, self.splat_i(0x7f80_0000)));
        self.cast_to_f(self.or(bits, sign))
    }
    /// The low byte of each lane to 16 bytes.
    ///
    /// # Safety
    /// `to` is valid for writes of 16 bytes.
    unsafe fn store_low_bytes(self, x: Self::I, to: *mut u8);
    /// `a & b`
    fn and(self, a: Self::I, b: Self::I) -> Self::I;
    /// `a | b`
    fn or(self, a: Self::I, b: Self::I) -> Self::I;
    /// Lanes shifted left by a constant.
    fn shl(self, x: Self::I, bits: u32) -> Self::I;
    /// Lanes shifted right by a constant, zeros shifted in.
    fn shr(self, x: Self::I, bits: u32) -> Self::I;
    /// Lanes shifted right by a constant, the sign shifted in.
    fn sar(self, x: Self::I, bits: u32) -> Self::I;
    /// Wrapping sum.
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// Wrapping difference.
    fn sub_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// All ones where the signed `a > b`.
    fn greater(self, a: Self::I, b: Self::I) -> Self::I;
    /// Sum of the lanes.
    fn sum_i(self, x: Self::I) -> i32;
    /// [`Simd::sum_i`] of four vectors.
    #[inline(always)]
    fn sum_i_4(self, x: [Self::I; 4]) -> [i32; 4] {
        [self.sum_i(x[0]), self.sum_i(x[1]), self.sum_i(x[2]), self.sum_i(x[3])]
    }
    /// Integers to floats, nearest even.
    fn to_f(self, x: Self::I) -> Self::F;
    /// Floats within the range of i32 to integers, nearest even.
    fn to_i(self, x: Self::F) -> Self::I;
    /// The same bits as floats.
    fn cast_to_f(self, x: Self::I) -> Self::F;
    /// The same bits as integers.
    fn cast_to_i(self, x: Self::F) -> Self::I;
    /// Each byte (below 16) replaced by that entry of the table.
    ///
    /// The table stands four times in the register, as [`Simd::load_table`] loads it.
    fn look_up(self, table: Self::I, bytes: Self::I) -> Self::I;
    /// A table of 16 bytes for [`Simd::look_up`].
    fn load_table(self, table: &[u8; 16]) -> Self::I;
    /// `acc + a0*b0 + a1*b1 + a2*b2 + a3*b3` per lane, `a` unsigned bytes up to 127, `b` signed bytes. Exact.
    fn dot4_u7(self, acc: Self::I, a: Self::I, b: Self::I) -> Self::I;
    /// The same for any unsigned byte.
    fn dot4_u8(self, acc: Self::I, a: Self::I, b: Self::I) -> Self::I;
    /// [`Simd::look_up`] of the low four bits of each byte, whatever the others are.
    #[inline(always)]
    fn look_up_low(self, table: Self::I, bytes: Self::I) -> Self::I {
        self.look_up(table, self.and(bytes, self.splat_i(0x0f0f_0f0f)))
    }
    /// Starts sums that [`Simd::close_pairs`] adds to `acc`.
    fn open_pairs(self, acc: Self::I) -> Self::Pairs;
    /// [`Simd::dot4_u7`] onto `pairs`. Exact as long as `254 * steps * (largest byte of any a)` stays below 2^15, counting
    /// steps since [`Simd::open_pairs`].
    fn dot4_pairs(self, pairs: Self::Pairs, a: Self::I, b: Self::I) -> Self::Pairs;
    /// `acc` (what [`Simd::open_pairs`] was given) plus the sums.
    fn close_pairs(self, acc: Self::I, pairs: Self::Pairs) -> Self::I;
    /// Two lines of four columns each as eights: 8 bytes of lane 0, then of lane 1, ..
    ///
    /// # Safety
    /// `to` is valid for writes of 128 bytes.
    unsafe fn store_eights(self, _low: Self::I, _high: Self::I, _to: *mut u8) {
        unreachable!("levels without EIGHTS store lines")
    }
    /// Sums of the products of lines `first .. first + count` (two at a time, as [`Simd::store_eights`] stored them, bytes
    /// up to 127) with the same columns of `R` rows of signed bytes. Exact.
    ///
    /// # Safety
    /// `codes` is valid for reads of these lines, and each of `x` of 4 bytes for each line.
    unsafe fn dot_eights<const R: usize>(
        self,
        _codes: *const u8,
        _x: &[*const u8; R],
        _first_and_count: [usize; 2],
    ) -> [Self::I; R] {
        unreachable!("levels without EIGHTS multiply lines")
    }
    /// Hint that the line at `address` will be read soon. Any address is allowed.
    fn prefetch(self, address: *const u8);
    /// The same for the second-nearest cache.
    fn prefetch_far(self, address: *const u8);

    /// The first `len` (at most 16) floats at `from`, zeros after them.
    ///
    /// # Safety
    /// `from` is valid for reads of `len` floats.
    #[inline(always)]
    unsafe fn load_partial(self, from: *const f32, len: usize) -> Self::F {
        debug_assert!(len <= 16);
        let mut buffer = [0.0f32; 16];
        // SAFETY: the caller's promise; the buffer holds 16.
        unsafe {
            std::ptr::copy_nonoverlapping(from, buffer.as_mut_ptr(), len);
            self.load(buffer.as_ptr())
        }
    }

    /// The first `len` (at most 16) lanes to `to`.
    ///
    /// # Safety
    /// `to` is valid for writes of `len` floats.
    #[inline(always)]
    unsafe fn store_partial(self, x: Self::F, to: *mut f32, len: usize) {
        debug_assert!(len <= 16);
        let mut buffer = [0.0f32; 16];
        // SAFETY: the caller's promise; the buffer holds 16.
        unsafe {
            self.store(x, buffer.as_mut_ptr());
            std::ptr::copy_nonoverlapping(buffer.as_ptr(), to, len);
        }
    }
}

#[cfg(test)]
mod tests;
