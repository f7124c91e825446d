//! NEON: sixteen lanes are four registers. With `DOTPROD` the byte products are `sdot` (by `asm!`: the intrinsic is not
//! stable in Rust 1.95); without it they are widening multiplies. Both are signed, so the eighth bit of a code is
//! multiplied apart. With `I8MM` expanded tiles are multiplied with `smmla`, which does twice as many products.
// Loops run over arrays of registers, several at once; iterators would hide vectors in closures.
#![allow(clippy::needless_range_loop)]

use super::Simd;
use std::arch::aarch64::*;
use std::arch::asm;

/// The NEON levels. A value proves neon and, if `DOTPROD`, dotprod and, if `I8MM`, i8mm.
#[derive(Clone, Copy)]
pub(crate) struct Neon<const DOTPROD: bool, const I8MM: bool> {
    _proof: (),
}

impl<const DOTPROD: bool, const I8MM: bool> Neon<DOTPROD, I8MM> {
    /// # Safety
    /// The processor has the features named at the type.
    #[inline(always)]
    pub(crate) unsafe fn new() -> Self {
        Neon { _proof: () }
    }
}

#[derive(Clone, Copy)]
pub(crate) struct F([float32x4_t; 4]);
#[derive(Clone, Copy)]
pub(crate) struct I([int32x4_t; 4]);

/// A value intrinsic: `self` proves that the processor has it.
macro_rules! intrinsic {
    ($call:expr) => {
        // SAFETY: `self` proves the target features.
        unsafe { $call }
    };
}

/// One expression for each of the four quarters.
macro_rules! quarters {
    ($out:ident: $i:ident => $value:expr) => {
        $out([
            {
                let $i = 0;
                intrinsic!($value)
            },
            {
                let $i = 1;
                intrinsic!($value)
            },
            {
                let $i = 2;
                intrinsic!($value)
            },
            {
                let $i = 3;
                intrinsic!($value)
            },
        ])
    };
}

/// `acc + Σ a_j b_j` per lane over signed bytes.
#[inline(always)]
fn signed_dot4<const DOTPROD: bool, const I8MM: bool>(
    _proof: Neon<DOTPROD, I8MM>,
    acc: int32x4_t,
    a: int8x16_t,
    b: int8x16_t,
) -> int32x4_t {
    if DOTPROD {
        let mut out = acc;
        // SAFETY: `_proof` says that the processor has dotprod. Registers only.
        unsafe {
            asm!(
                ".arch_extension dotprod",
                "sdot {out:v}.4s, {a:v}.16b, {b:v}.16b",
                out = inout(vreg) out,
                a = in(vreg) a,
                b = in(vreg) b,
                options(pure, nomem, nostack, preserves_flags)
            );
        }
        return out;
    }
    intrinsic!({
        // Products fit 16 bits (127 * 127); sums of two are widened to 32, then sums of pairs are whole lanes.
        let low = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)));
        let high = vpaddlq_s16(vmull_high_s8(a, b));
        vaddq_s32(acc, vpaddq_s32(low, high))
    })
}

impl<const DOTPROD: bool, const I8MM: bool> Simd for Neon<DOTPROD, I8MM> {
    type F = F;
    type I = I;
    type Pairs = I;

    const STREAMS: [usize; 4] = [2, 2, 1, 0];
    const MANY_REGISTERS: bool = false;
    const EIGHTS: bool = I8MM;

    #[inline(always)]
    fn splat(self, x: f32) -> F {
        F([intrinsic!(vdupq_n_f32(x)); 4])
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> F {
        quarters!(F: i => vld1q_f32(from.add(4 * i)))
    }

    #[inline(always)]
    unsafe fn store(self, x: F, to: *mut f32) {
        for i in 0..4 {
            intrinsic!(vst1q_f32(to.add(4 * i), x.0[i]));
        }
    }

    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        quarters!(F: i => vaddq_f32(a.0[i], b.0[i]))
    }

    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        quarters!(F: i => vsubq_f32(a.0[i], b.0[i]))
    }

    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        quarters!(F: i => vmulq_f32(a.0[i], b.0[i]))
    }

    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        quarters!(F: i => vdivq_f32(a.0[i], b.0[i]))
    }

    #[inline(always)]
    fn mul_add(self, a: F, b: F, c: F) -> F {
        quarters!(F: i => vfmaq_f32(c.0[i], a.0[i], b.0[i]))
    }

    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        quarters!(F: i => vmaxq_f32(a.0[i], b.0[i]))
    }

    #[inline(always)]
    fn min(self, a: F, b: F) -> F {
        quarters!(F: i => vminq_f32(a.0[i], b.0[i]))
    }

    #[inline(always)]
    fn sum(self, x: F) -> f32 {
        intrinsic!({
            let four = vaddq_f32(vaddq_f32(x.0[0], x.0[2]), vaddq_f32(x.0[1], x.0[3]));
            let two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
            vget_lane_f32::<0>(two) + vget_lane_f32::<1>(two)
        })
    }

    #[inline(always)]
    fn max_lane(self, x: F) -> f32 {
        intrinsic!(vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.0[0], x.0[2]), vmaxq_f32(x.0[1], x.0[3]))))
    }

    #[inline(always)]
    fn splat_i(self, x: i32) -> I {
        I([intrinsic!(vdupq_n_s32(x)); 4])
    }

    #[inline(always)]
    unsafe fn splat_4_bytes(self, from: *const u8) -> I {
        I([intrinsic!(vdupq_n_s32(from.cast::<i32>().read_unaligned())); 4])
    }

    #[inline(always)]
    unsafe fn load_i(self, from: *const u8) -> I {
        quarters!(I: i => vreinterpretq_s32_u8(vld1q_u8(from.add(16 * i))))
    }

    #[inline(always)]
    unsafe fn load_u8(self, from: *const u8) -> I {
        intrinsic!({
            let bytes = vld1q_u8(from);
            let (low, high) = (vmovl_u8(vget_low_u8(bytes)), vmovl_high_u8(bytes));
            I([
                vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))),
                vreinterpretq_s32_u32(vmovl_high_u16(low)),
                vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))),
                vreinterpretq_s32_u32(vmovl_high_u16(high)),
            ])
        })
    }

    #[inline(always)]
    unsafe fn load_u16(self, from: *const u8) -> I {
        quarters!(I: i => vreinterpretq_s32_u32(vmovl_u16(vreinterpret_u16_u8(vld1_u8(from.add(8 * i))))))
    }

    #[inline(always)]
    unsafe fn store_low_bytes(self, x: I, to: *mut u8) {
        intrinsic!({
            let low = vcombine_s16(vmovn_s32(x.0[0]), vmovn_s32(x.0[1]));
            let high = vcombine_s16(vmovn_s32(x.0[2]), vmovn_s32(x.0[3]));
            vst1q_s8(to.cast(), vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
        })
    }

    #[inline(always)]
    fn and(self, a: I, b: I) -> I {
        quarters!(I: i => vandq_s32(a.0[i], b.0[i]))
    }

    #[inline(always)]
    fn or(self, a: I, b: I) -> I {
        quarters!(I: i => vorrq_s32(a.0[i], b.0[i]))
    }

    #[inline(always)]
    fn shl(self, x: I, bits: u32) -> I {
        let count = intrinsic!(vdupq_n_s32(bits as i32));
        quarters!(I: i => vshlq_s32(x.0[i], count))
    }

    #[inline(always)]
    fn shr(self, x: I, bits: u32) -> I {
        let count = intrinsic!(vdupq_n_s32(-(bits as i32)));
        quarters!(I: i => vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(x.0[i]), count)))
    }

    #[inline(always)]
    fn sar(self, x: I, bits: u32) -> I {
        let count = intrinsic!(vdupq_n_s32(-(bits as i32)));
        quarters!(I: i => vshlq_s32(x.0[i], count))
    }

    #[inline(always)]
    fn add_i(self, a: I, b: I) -> I {
        quarters!(I: i => vaddq_s32(a.0[i], b.0[i]))
    }

    #[inline(always)]
    fn sub_i(self, a: I, b: I) -> I {
        quarters!(I: i => vsubq_s32(a.0[i], b.0[i]))
    }

    #[inline(always)]
    fn greater(self, a: I, b: I) -> I {
        quarters!(I: i => vreinterpretq_s32_u32(vcgtq_s32(a.0[i], b.0[i])))
    }

    #[inline(always)]
    fn sum_i(self, x: I) -> i32 {
        intrinsic!(vaddvq_s32(vaddq_s32(vaddq_s32(x.0[0], x.0[2]), vaddq_s32(x.0[1], x.0[3]))))
    }

    #[inline(always)]
    fn to_f(self, x: I) -> F {
        quarters!(F: i => vcvtq_f32_s32(x.0[i]))
    }

    #[inline(always)]
    fn to_i(self, x: F) -> I {
        quarters!(I: i => vcvtnq_s32_f32(x.0[i]))
    }

    #[inline(always)]
    fn cast_to_f(self, x: I) -> F {
        quarters!(F: i => vreinterpretq_f32_s32(x.0[i]))
    }

    #[inline(always)]
    fn cast_to_i(self, x: F) -> I {
        quarters!(I: i => vreinterpretq_s32_f32(x.0[i]))
    }

    #[inline(always)]
    fn look_up(self, table: I, bytes: I) -> I {
        quarters!(I: i => vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(table.0[0]), vreinterpretq_u8_s32(bytes.0[i]))))
    }

    #[inline(always)]
    fn load_table(self, table: &[u8; 16]) -> I {
        I([intrinsic!(vreinterpretq_s32_u8(vld1q_u8(table.as_ptr()))); 4])
    }

    #[inline(always)]
    fn dot4_u7(self, acc: I, a: I, b: I) -> I {
        quarters!(I: i => signed_dot4(self, acc.0[i], vreinterpretq_s8_s32(a.0[i]), vreinterpretq_s8_s32(b.0[i])))
    }

    #[inline(always)]
    fn dot4_u8(self, acc: I, a: I, b: I) -> I {
        // code = low seven bits + 64 * high + 64 * high, all of them signed bytes.
        let low = self.and(a, self.splat_i(0x7f7f_7f7f));
        let half = self.and(self.shr(a, 1), self.splat_i(0x4040_4040));
        self.dot4_u7(self.dot4_u7(self.dot4_u7(acc, low, b), half, b), half, b)
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
    fn prefetch(self, address: *const u8) {
        // SAFETY: a prefetch never faults.
        unsafe { asm!("prfm pldl1keep, [{0}]", in(reg) address, options(readonly, nostack, preserves_flags)) };
    }

    #[inline(always)]
    fn prefetch_far(self, address: *const u8) {
        // SAFETY: a prefetch never faults.
        unsafe { asm!("prfm pldl2keep, [{0}]", in(reg) address, options(readonly, nostack, preserves_flags)) };
    }

    #[inline(always)]
    unsafe fn store_eights(self, low: I, high: I, to: *mut u8) {
        for i in 0..4 {
            intrinsic!({
                let to = to.cast::<i32>().add(8 * i);
                vst1q_s32(to, vzip1q_s32(low.0[i], high.0[i]));
                vst1q_s32(to.add(4), vzip2q_s32(low.0[i], high.0[i]));
            });
        }
    }

    #[inline(always)]
    unsafe fn dot_eights<const R: usize>(
        self,
        codes: *const u8,
        x: &[*const u8; R],
        [first, count]: [usize; 2],
    ) -> [I; R] {
        assert!(R == 4, "{R} rows, expected two pairs: their sums fill half of the registers");
        // Of each pair of rows of activations and each pair of lanes: four sums.
        let mut sums = [[intrinsic!(vdupq_n_s32(0)); 8]; 2];
        let mut m = first;
        while m < first + count {
            // SAFETY: the caller's promise: eight columns of `R` rows, and of 16 lanes.
            unsafe {
                let pair = |p: usize| {
                    let low = vld1_s8(x[2 * p].add(4 * m).cast());
                    vcombine_s8(low, vld1_s8(x[2 * p + 1].add(4 * m).cast()))
                };
                let pairs = [pair(0), pair(1)];
                for lanes in 0..8 {
                    let weights = vld1q_s8(codes.add(64 * m + 16 * lanes).cast());
                    for p in 0..2 {
                        sums[p][lanes] = matrix_dot8(self, sums[p][lanes], weights, pairs[p]);
                    }
                }
            }
            m += 2;
        }
        let mut out = [self.splat_i(0); R];
        for p in 0..2 {
            for i in 0..4 {
                let (a, b) = (sums[p][2 * i], sums[p][2 * i + 1]);
                out[2 * p].0[i] = intrinsic!(vuzp1q_s32(a, b));
                out[2 * p + 1].0[i] = intrinsic!(vuzp2q_s32(a, b));
            }
        }
        out
    }
}

/// `acc + a bᵀ` for two rows of eight signed bytes each.
#[inline(always)]
fn matrix_dot8<const DOTPROD: bool, const I8MM: bool>(
    _proof: Neon<DOTPROD, I8MM>,
    acc: int32x4_t,
    a: int8x16_t,
    b: int8x16_t,
) -> int32x4_t {
    assert!(I8MM, "only levels with i8mm keep codes as eights");
    let mut out = acc;
    // SAFETY: `_proof` says that the processor has i8mm. Registers only.
    unsafe {
        asm!(
            ".arch_extension i8mm",
            "smmla {out:v}.4s, {a:v}.16b, {b:v}.16b",
            out = inout(vreg) out,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    out
}
