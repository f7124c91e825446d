//! AVX-512 (F, BW, VL, DQ, VNNI): sixteen lanes are one register. VBMI is not needed; where it is, a look-up needs no mask before it.

use super::Simd;
use std::arch::x86_64::*;

/// The AVX-512 levels. A value proves avx512{f,bw,vl,dq,vnni}, avx2, fma and f16c, and avx512vbmi if `VBMI`.
#[derive(Clone, Copy)]
pub(crate) struct Avx512<const VBMI: bool> {
    _proof: (),
}

impl<const VBMI: bool> Avx512<VBMI> {
    /// # Safety
    /// The processor has the features named at the type.
    #[inline(always)]
    pub(crate) unsafe fn new() -> Self {
        Avx512 { _proof: () }
    }
}

/// A value intrinsic: `self` proves that the processor has it.
macro_rules! intrinsic {
    ($call:expr) => {
        // SAFETY: `self` proves the target features.
        unsafe { $call }
    };
}

impl<const VBMI: bool> Simd for Avx512<VBMI> {
    type F = __m512;
    type I = __m512i;
    type Pairs = __m512i;

    const STREAMS: [usize; 4] = [4, 2, 2, 1];
    const MANY_REGISTERS: bool = true;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        intrinsic!(_mm512_set1_ps(x))
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> __m512 {
        intrinsic!(_mm512_loadu_ps(from))
    }

    #[inline(always)]
    unsafe fn store(self, x: __m512, to: *mut f32) {
        intrinsic!(_mm512_storeu_ps(to, x))
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_div_ps(a, b))
    }

    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        intrinsic!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_max_ps(a, b))
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_min_ps(a, b))
    }

    #[inline(always)]
    fn sum(self, x: __m512) -> f32 {
        intrinsic!({
            let eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        })
    }

    #[inline(always)]
    fn sum_4(self, x: [__m512; 4]) -> [f32; 4] {
        let mut eights = [intrinsic!(_mm256_setzero_ps()); 4];
        for i in 0..4 {
            eights[i] = intrinsic!(_mm256_add_ps(_mm512_castps512_ps256(x[i]), _mm512_extractf32x8_ps::<1>(x[i])));
        }
        intrinsic!(super::avx2::sum_4_eights(eights))
    }

    #[inline(always)]
    fn max_lane(self, x: __m512) -> f32 {
        intrinsic!(_mm512_reduce_max_ps(x))
    }

    #[inline(always)]
    fn max_lane_4(self, x: [__m512; 4]) -> [f32; 4] {
        let mut eights = [intrinsic!(_mm256_setzero_ps()); 4];
        for i in 0..4 {
            eights[i] = intrinsic!(_mm256_max_ps(_mm512_castps512_ps256(x[i]), _mm512_extractf32x8_ps::<1>(x[i])));
        }
        intrinsic!(super::avx2::max_4_eights(eights))
    }

    #[inline(always)]
    fn sum_i_4(self, x: [__m512i; 4]) -> [i32; 4] {
        let mut eights = [intrinsic!(_mm256_setzero_si256()); 4];
        for i in 0..4 {
            let halves = [intrinsic!(_mm512_castsi512_si256(x[i])), intrinsic!(_mm512_extracti64x4_epi64::<1>(x[i]))];
            eights[i] = intrinsic!(_mm256_add_epi32(halves[0], halves[1]));
        }
        intrinsic!(super::avx2::sum_i_4_eights(eights))
    }

    #[inline(always)]
    fn splat_i(self, x: i32) -> __m512i {
        intrinsic!(_mm512_set1_epi32(x))
    }

    #[inline(always)]
    unsafe fn splat_4_bytes(self, from: *const u8) -> __m512i {
        intrinsic!(_mm512_set1_epi32(from.cast::<i32>().read_unaligned()))
    }

    #[inline(always)]
    unsafe fn load_i(self, from: *const u8) -> __m512i {
        intrinsic!(_mm512_loadu_si512(from.cast()))
    }

    #[inline(always)]
    unsafe fn load_u8(self, from: *const u8) -> __m512i {
        intrinsic!(_mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast())))
    }

    #[inline(always)]
    unsafe fn load_u16(self, from: *const u8) -> __m512i {
        intrinsic!(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast())))
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const u8) -> __m512 {
        intrinsic!(_mm512_cvtph_ps(_mm256_loadu_si256(from.cast())))
    }

    #[inline(always)]
    unsafe fn store_low_bytes(self, x: __m512i, to: *mut u8) {
        intrinsic!(_mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(x)))
    }

    #[inline(always)]
    fn and(self, a: __m512i, b: __m512i) -> __m512i {
        intrinsic!(_mm512_and_si512(a, b))
    }

    #[inline(always)]
    fn or(self, a: __m512i, b: __m512i) -> __m512i {
        intrinsic!(_mm512_or_si512(a, b))
    }

    #[inline(always)]
    fn shl(self, x: __m512i, bits: u32) -> __m512i {
        intrinsic!(_mm512_sll_epi32(x, _mm_cvtsi32_si128(bits as i32)))
    }

    #[inline(always)]
    fn shr(self, x: __m512i, bits: u32) -> __m512i {
        intrinsic!(_mm512_srl_epi32(x, _mm_cvtsi32_si128(bits as i32)))
    }

    #[inline(always)]
    fn sar(self, x: __m512i, bits: u32) -> __m512i {
        intrinsic!(_mm512_sra_epi32(x, _mm_cvtsi32_si128(bits as i32)))
    }

    #[inline(always)]
    fn add_i(self, a: __m512i, b: __m512i) -> __m512i {
        intrinsic!(_mm512_add_epi32(a, b))
    }

    #[inline(always)]
    fn sub_i(self, a: __m512i, b: __m512i) -> __m512i {
        intrinsic!(_mm512_sub_epi32(a, b))
    }

    #[inline(always)]
    fn greater(self, a: __m512i, b: __m512i) -> __m512i {
        intrinsic!(_mm512_maskz_set1_epi32(_mm512_cmpgt_epi32_mask(a, b), -1))
    }

    #[inline(always)]
    fn sum_i(self, x: __m512i) -> i32 {
        intrinsic!(_mm512_reduce_add_epi32(x))
    }

    #[inline(always)]
    fn to_f(self, x: __m512i) -> __m512 {
        intrinsic!(_mm512_cvtepi32_ps(x))
    }

    #[inline(always)]
    fn to_i(self, x: __m512) -> __m512i {
        intrinsic!(_mm512_cvtps_epi32(x))
    }

    #[inline(always)]
    fn cast_to_f(self, x: __m512i) -> __m512 {
        intrinsic!(_mm512_castsi512_ps(x))
    }

    #[inline(always)]
    fn cast_to_i(self, x: __m512) -> __m512i {
        intrinsic!(_mm512_castps_si512(x))
    }

    #[inline(always)]
    fn look_up(self, table: __m512i, bytes: __m512i) -> __m512i {
        intrinsic!(_mm512_shuffle_epi8(table, bytes))
    }

    #[inline(always)]
    fn look_up_low(self, table: __m512i, bytes: __m512i) -> __m512i {
        if VBMI {
            // By six bits, and the table is there four times.
            return intrinsic!(_mm512_permutexvar_epi8(bytes, table));
        }
        self.look_up(table, self.and(bytes, self.splat_i(0x0f0f_0f0f)))
    }

    #[inline(always)]
    fn load_table(self, table: &[u8; 16]) -> __m512i {
        intrinsic!(_mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast())))
    }

    #[inline(always)]
    fn dot4_u7(self, acc: __m512i, a: __m512i, b: __m512i) -> __m512i {
        self.dot4_u8(acc, a, b)
    }

    #[inline(always)]
    fn dot4_u8(self, acc: __m512i, a: __m512i, b: __m512i) -> __m512i {
        intrinsic!(_mm512_dpbusd_epi32(acc, a, b))
    }

    #[inline(always)]
    fn open_pairs(self, acc: __m512i) -> __m512i {
        acc
    }

    #[inline(always)]
    fn dot4_pairs(self, pairs: __m512i, a: __m512i, b: __m512i) -> __m512i {
        self.dot4_u7(pairs, a, b)
    }

    #[inline(always)]
    fn close_pairs(self, _acc: __m512i, pairs: __m512i) -> __m512i {
        pairs
    }

    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        intrinsic!(_mm_prefetch::<_MM_HINT_T0>(address.cast()))
    }

    #[inline(always)]
    fn prefetch_far(self, address: *const u8) {
        intrinsic!(_mm_prefetch::<_MM_HINT_T1>(address.cast()))
    }
}
