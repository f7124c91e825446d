//! AVX2, FMA and F16C: sixteen lanes are two registers. With `VNNI` (AVX-VNNI: Alder Lake, Zen 5 and later) the byte
//! products are one instruction; without it they are `maddubs`, whose 16-bit pair sums hold only for codes up to 127.

use super::Simd;
use std::arch::x86_64::*;

/// The AVX2 levels. A value proves avx2, fma, f16c and, if `VNNI`, avxvnni.
#[derive(Clone, Copy)]
pub(crate) struct Avx2<const VNNI: bool> {
    _proof: (),
}

impl<const VNNI: bool> Avx2<VNNI> {
    /// # Safety
    /// The processor has the features named at the type.
    #[inline(always)]
    pub(crate) unsafe fn new() -> Self {
        Avx2 { _proof: () }
    }
}

#[derive(Clone, Copy)]
pub(crate) struct F(__m256, __m256);
#[derive(Clone, Copy)]
pub(crate) struct I(__m256i, __m256i);

/// A value intrinsic: `self` proves that the processor has it.
macro_rules! intrinsic {
    ($call:expr) => {
        // SAFETY: `self` proves the target features.
        unsafe { $call }
    };
}

/// One operation on both halves.
macro_rules! both {
    ($out:ident: $op:ident($($x:ident),*)) => {
        $out(intrinsic!($op($($x.0),*)), intrinsic!($op($($x.1),*)))
    };
}

/// Lanes (i, i + 8).
#[inline(always)]
fn both_added<const VNNI: bool>(_proof: Avx2<VNNI>, x: F) -> __m256 {
    intrinsic!(_mm256_add_ps(x.0, x.1))
}

/// Sums of four vectors of eight lanes, each as the tree (i, i+4), (i, i+2), (i, i+1): the trees share instructions.
///
/// # Safety
/// The processor has AVX.
#[inline(always)]
pub(super) unsafe fn sum_4_eights([a, b, c, d]: [__m256; 4]) -> [f32; 4] {
    intrinsic!({
        // [a a a a b b b b] and [c c c c d d d d], then [a a c c b b d d], then one of each.
        let fours = |x, y| _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(x, y), _mm256_permute2f128_ps::<0x31>(x, y));
        let (ab, cd) = (fours(a, b), fours(c, d));
        let twos = _mm256_add_ps(_mm256_shuffle_ps::<0x44>(ab, cd), _mm256_shuffle_ps::<0xee>(ab, cd));
        let ones = _mm256_add_ps(twos, _mm256_movehdup_ps(twos));
        let (low, high) = (_mm256_castps256_ps128(ones), _mm256_extractf128_ps::<1>(ones));
        let lane_2 = |x| _mm_cvtss_f32(_mm_movehl_ps(x, x));
        [_mm_cvtss_f32(low), _mm_cvtss_f32(high), lane_2(low), lane_2(high)]
    })
}

/// Largest lanes of four vectors of eight.
///
/// # Safety
/// The processor has AVX.
#[inline(always)]
pub(super) unsafe fn max_4_eights([a, b, c, d]: [__m256; 4]) -> [f32; 4] {
    intrinsic!({
        // [a a b b a a b b] and [c c d d c c d d], then [a b c d a b c d], then one of each.
        let twos = |x, y| _mm256_max_ps(_mm256_unpacklo_ps(x, y), _mm256_unpackhi_ps(x, y));
        let (ab, cd) = (twos(a, b), twos(c, d));
        let fours = _mm256_max_ps(_mm256_shuffle_ps::<0x44>(ab, cd), _mm256_shuffle_ps::<0xee>(ab, cd));
        let ones = _mm_max_ps(_mm256_castps256_ps128(fours), _mm256_extractf128_ps::<1>(fours));
        let mut out = [0.0; 4];
        _mm_storeu_ps(out.as_mut_ptr(), ones);
        out
    })
}

/// Sums of four vectors of eight integers.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
pub(super) unsafe fn sum_i_4_eights([a, b, c, d]: [__m256i; 4]) -> [i32; 4] {
    intrinsic!({
        let eights = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
        let ones = _mm_add_epi32(_mm256_castsi256_si128(eights), _mm256_extracti128_si256::<1>(eights));
        let mut out = [0; 4];
        _mm_storeu_si128(out.as_mut_ptr().cast(), ones);
        out
    })
}

impl<const VNNI: bool> Simd for Avx2<VNNI> {
    type F = F;
    type I = I;
    type Pairs = I;

    const STREAMS: [usize; 4] = [2, 2, 1, 0];
    const MANY_REGISTERS: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> F {
        let half = intrinsic!(_mm256_set1_ps(x));
        F(half, half)
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> F {
        intrinsic!(F(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))))
    }

    #[inline(always)]
    unsafe fn store(self, x: F, to: *mut f32) {
        intrinsic!({
            _mm256_storeu_ps(to, x.0);
            _mm256_storeu_ps(to.add(8), x.1);
        })
    }

    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        both!(F: _mm256_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        both!(F: _mm256_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        both!(F: _mm256_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        both!(F: _mm256_div_ps(a, b))
    }

    #[inline(always)]
    fn mul_add(self, a: F, b: F, c: F) -> F {
        both!(F: _mm256_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        both!(F: _mm256_max_ps(a, b))
    }

    #[inline(always)]
    fn min(self, a: F, b: F) -> F {
        both!(F: _mm256_min_ps(a, b))
    }

    #[inline(always)]
    fn sum(self, x: F) -> f32 {
        intrinsic!({
            let eight = _mm256_add_ps(x.0, x.1);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        })
    }

    #[inline(always)]
    fn sum_4(self, x: [F; 4]) -> [f32; 4] {
        // SAFETY: `self` proves AVX.
        unsafe { sum_4_eights(x.map(|x| both_added(self, x))) }
    }

    #[inline(always)]
    fn max_lane(self, x: F) -> f32 {
        intrinsic!({
            let eight = _mm256_max_ps(x.0, x.1);
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        })
    }

    #[inline(always)]
    fn max_lane_4(self, x: [F; 4]) -> [f32; 4] {
        intrinsic!(max_4_eights(x.map(|x| _mm256_max_ps(x.0, x.1))))
    }

    #[inline(always)]
    fn sum_i_4(self, x: [I; 4]) -> [i32; 4] {
        intrinsic!(sum_i_4_eights(x.map(|x| _mm256_add_epi32(x.0, x.1))))
    }

    #[inline(always)]
    fn splat_i(self, x: i32) -> I {
        let half = intrinsic!(_mm256_set1_epi32(x));
        I(half, half)
    }

    #[inline(always)]
    unsafe fn splat_4_bytes(self, from: *const u8) -> I {
        let half = intrinsic!(_mm256_set1_epi32(from.cast::<i32>().read_unaligned()));
        I(half, half)
    }

    #[inline(always)]
    unsafe fn load_i(self, from: *const u8) -> I {
        intrinsic!(I(_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())))
    }

    #[inline(always)]
    unsafe fn load_u8(self, from: *const u8) -> I {
        intrinsic!(I(
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast())),
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.add(8).cast())),
        ))
    }

    #[inline(always)]
    unsafe fn load_u16(self, from: *const u8) -> I {
        intrinsic!(I(
            _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast())),
            _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(16).cast())),
        ))
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const u8) -> F {
        intrinsic!(F(
            _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
            _mm256_cvtph_ps(_mm_loadu_si128(from.add(16).cast())),
        ))
    }

    #[inline(always)]
    unsafe fn store_low_bytes(self, x: I, to: *mut u8) {
        intrinsic!({
            // Bytes 0, 4, 8, 12 of each 128-bit half to its first four; the other indices write zeros.
            let pick = _mm256_set1_epi64x(0x8080_8080_0c08_0400_u64 as i64);
            for (half, at) in [(x.0, 0), (x.1, 8)] {
                let low = _mm256_shuffle_epi8(half, pick);
                to.add(at).cast::<i32>().write_unaligned(_mm256_extract_epi32::<0>(low));
                to.add(at + 4).cast::<i32>().write_unaligned(_mm256_extract_epi32::<4>(low));
            }
        })
    }

    #[inline(always)]
    fn and(self, a: I, b: I) -> I {
        both!(I: _mm256_and_si256(a, b))
    }

    #[inline(always)]
    fn or(self, a: I, b: I) -> I {
        both!(I: _mm256_or_si256(a, b))
    }

    #[inline(always)]
    fn shl(self, x: I, bits: u32) -> I {
        let count = intrinsic!(_mm_cvtsi32_si128(bits as i32));
        I(intrinsic!(_mm256_sll_epi32(x.0, count)), intrinsic!(_mm256_sll_epi32(x.1, count)))
    }

    #[inline(always)]
    fn shr(self, x: I, bits: u32) -> I {
        let count = intrinsic!(_mm_cvtsi32_si128(bits as i32));
        I(intrinsic!(_mm256_srl_epi32(x.0, count)), intrinsic!(_mm256_srl_epi32(x.1, count)))
    }

    #[inline(always)]
    fn sar(self, x: I, bits: u32) -> I {
        let count = intrinsic!(_mm_cvtsi32_si128(bits as i32));
        I(intrinsic!(_mm256_sra_epi32(x.0, count)), intrinsic!(_mm256_sra_epi32(x.1, count)))
    }

    #[inline(always)]
    fn add_i(self, a: I, b: I) -> I {
        both!(I: _mm256_add_epi32(a, b))
    }

    #[inline(always)]
    fn sub_i(self, a: I, b: I) -> I {
        both!(I: _mm256_sub_epi32(a, b))
    }

    #[inline(always)]
    fn greater(self, a: I, b: I) -> I {
        both!(I: _mm256_cmpgt_epi32(a, b))
    }

    #[inline(always)]
    fn sum_i(self, x: I) -> i32 {
        intrinsic!({
            let eight = _mm256_add_epi32(x.0, x.1);
            let four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256::<1>(eight));
            let two = _mm_add_epi32(four, _mm_shuffle_epi32::<0b01_00_11_10>(four));
            _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<0b10_11_00_01>(two)))
        })
    }

    #[inline(always)]
    fn to_f(self, x: I) -> F {
        both!(F: _mm256_cvtepi32_ps(x))
    }

    #[inline(always)]
    fn to_i(self, x: F) -> I {
        both!(I: _mm256_cvtps_epi32(x))
    }

    #[inline(always)]
    fn cast_to_f(self, x: I) -> F {
        both!(F: _mm256_castsi256_ps(x))
    }

    #[inline(always)]
    fn cast_to_i(self, x: F) -> I {
        both!(I: _mm256_castps_si256(x))
    }

    #[inline(always)]
    fn look_up(self, table: I, bytes: I) -> I {
        both!(I: _mm256_shuffle_epi8(table, bytes))
    }

    #[inline(always)]
    fn load_table(self, table: &[u8; 16]) -> I {
        let half = intrinsic!(_mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast())));
        I(half, half)
    }

    #[inline(always)]
    fn dot4_u7(self, acc: I, a: I, b: I) -> I {
        if VNNI {
            return both!(I: _mm256_dpbusd_avx_epi32(acc, a, b));
        }
        // Pairs: at most 2 * 127 * 127 = 32258 (activations are within ±127), which 16 bits hold.
        let pairs = both!(I: _mm256_maddubs_epi16(a, b));
        let ones = intrinsic!(_mm256_set1_epi16(1));
        let ones = I(ones, ones);
        let fours = both!(I: _mm256_madd_epi16(pairs, ones));
        self.add_i(acc, fours)
    }

    #[inline(always)]
    fn dot4_u8(self, acc: I, a: I, b: I) -> I {
        if VNNI {
            return both!(I: _mm256_dpbusd_avx_epi32(acc, a, b));
        }
        // Codes above 127 overflow the pair sums: low seven bits and the eighth apart.
        let low = self.and(a, self.splat_i(0x7f7f_7f7f));
        let high = self.and(self.shr(a, 7), self.splat_i(0x0101_0101));
        let pairs = both!(I: _mm256_maddubs_epi16(high, b));
        let weights = intrinsic!(_mm256_set1_epi16(128));
        let weights = I(weights, weights);
        let fours = both!(I: _mm256_madd_epi16(pairs, weights));
        self.dot4_u7(self.add_i(acc, fours), low, b)
    }

    #[inline(always)]
    fn open_pairs(self, acc: I) -> I {
        if VNNI { acc } else { self.splat_i(0) }
    }

    #[inline(always)]
    fn dot4_pairs(self, pairs: I, a: I, b: I) -> I {
        if VNNI {
            return self.dot4_u7(pairs, a, b);
        }
        // Two instructions instead of three: widening waits until `close_pairs`.
        let products = both!(I: _mm256_maddubs_epi16(a, b));
        both!(I: _mm256_add_epi16(pairs, products))
    }

    #[inline(always)]
    fn close_pairs(self, acc: I, pairs: I) -> I {
        if VNNI {
            return pairs;
        }
        let ones = intrinsic!(_mm256_set1_epi16(1));
        let ones = I(ones, ones);
        self.add_i(acc, both!(I: _mm256_madd_epi16(pairs, ones)))
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
