//! The best scale and offset of an affine group: a search over clipped ranges, each refitted by weighted least squares,
//! scored with scale and offset as they will be stored. (The idea of llama.cpp's `make_qkx2_quants` and of MSE-optimal
//! clipping; weights are the second moments of the inputs, so that the score is the expected squared error of outputs.)

use crate::simd::{LANES, round_even, sum_lanes};
use moellon_tensor::ScaleDtype;

/// Scale and offset, as stored, and the weighted squared error with them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct AffineFit {
    pub(crate) scale: f32,
    pub(crate) offset: f32,
    pub(crate) error: f64,
}

/// A group that is searched: values and weights `[group]`, both of whole vectors.
#[derive(Clone, Copy)]
pub(crate) struct Group<'a> {
    pub(crate) values: &'a [f32],
    pub(crate) weights: &'a [f32],
}

/// Sums that a least-squares fit of scale and offset needs, for the codes that one grid gives.
struct Moments {
    code: f64,
    code_code: f64,
    code_value: f64,
    error: f64,
}

impl Group<'_> {
    /// Rounds every value to the grid and sums up.
    #[inline(always)]
    fn assess(&self, scale: f32, offset: f32, largest: f32) -> Moments {
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        let mut code = [0.0f32; LANES];
        let mut code_code = [0.0f32; LANES];
        let mut code_value = [0.0f32; LANES];
        let mut error = [0.0f32; LANES];
        let chunks = self.values.as_chunks::<LANES>().0.iter().zip(self.weights.as_chunks::<LANES>().0);
        for (values, weights) in chunks {
            for lane in 0..LANES {
                let (value, weight) = (values[lane], weights[lane]);
                let q = round_even(((value - offset) * inverse).max(0.0).min(largest));
                let weighted = weight * q;
                let difference = value - (q * scale + offset);
                code[lane] += weighted;
                code_code[lane] += weighted * q;
                code_value[lane] += weighted * value;
                error[lane] += weight * difference * difference;
            }
        }
        Moments {
            code: sum_lanes(&code),
            code_code: sum_lanes(&code_code),
            code_value: sum_lanes(&code_value),
            error: sum_lanes(&error),
        }
    }

    /// Minimum and maximum, and the weighted sums of one and of the values.
    #[inline(always)]
    fn range_and_sums(&self) -> ([f32; 2], [f64; 2]) {
        let mut min = [f32::INFINITY; LANES];
        let mut max = [f32::NEG_INFINITY; LANES];
        let mut weight_sum = [0.0f32; LANES];
        let mut value_sum = [0.0f32; LANES];
        let chunks = self.values.as_chunks::<LANES>().0.iter().zip(self.weights.as_chunks::<LANES>().0);
        for (values, weights) in chunks {
            for lane in 0..LANES {
                min[lane] = min[lane].min(values[lane]);
                max[lane] = max[lane].max(values[lane]);
                weight_sum[lane] += weights[lane];
                value_sum[lane] += weights[lane] * values[lane];
            }
        }
        let min = min.iter().fold(f32::INFINITY, |a, &b| a.min(b));
        let max = max.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
        ([min, max], [sum_lanes(&weight_sum), sum_lanes(&value_sum)])
    }
}

/// Shares of the full range that the search begins with, from a little more than all of it downwards. Fewer bits gain from
/// clipping more.
#[inline(always)]
fn narrowest_share(bits: u32) -> f32 {
    match bits {
        0..=2 => 0.40,
        3 => 0.55,
        4 => 0.68,
        5 => 0.82,
        _ => 0.92,
    }
}

/// Ranges that are tried.
const SHARES: usize = 14;
/// Rounds of refitting after which a fit that still improves is left alone.
const REFITS: usize = 4;

struct Search<'a> {
    group: Group<'a>,
    dtype: ScaleDtype,
    largest: f32,
    weight_sum: f64,
    value_sum: f64,
    best: AffineFit,
}

impl Search<'_> {
    /// Scores a stored grid and returns its moments.
    #[inline(always)]
    fn score(&mut self, scale: f32, offset: f32) -> Moments {
        let moments = self.group.assess(scale, offset, self.largest);
        if moments.error < self.best.error && scale.is_finite() && offset.is_finite() {
            self.best = AffineFit { scale, offset, error: moments.error };
        }
        moments
    }

    /// The least-squares scale and offset for the codes of `moments`, rounded as they are stored.
    #[inline(always)]
    fn refit(&self, moments: &Moments) -> Option<(f32, f32)> {
        let determinant = self.weight_sum * moments.code_code - moments.code * moments.code;
        if determinant <= 1e-9 * self.weight_sum * moments.code_code {
            return None;
        }
        let scale = (self.weight_sum * moments.code_value - moments.code * self.value_sum) / determinant;
        let scale = self.dtype.round(scale as f32);
        // The offset that is best with the scale as it is stored.
        let offset = (self.value_sum - f64::from(scale) * moments.code) / self.weight_sum;
        Some((scale, self.dtype.round(offset as f32)))
    }

    /// Refits from an unrounded grid on until nothing improves.
    #[inline(always)]
    fn descend(&mut self, scale: f32, offset: f32, rounds: usize) {
        let mut moments = self.group.assess(scale, offset, self.largest);
        let mut last = f64::INFINITY;
        for _ in 0..rounds {
            let Some((scale, offset)) = self.refit(&moments) else { return };
            moments = self.score(scale, offset);
            if moments.error >= last {
                return;
            }
            last = moments.error;
        }
    }
}

/// Searches one group. `start` is a grid that the result will not be worse than (round-to-nearest's).
#[inline(always)]
pub(crate) fn search(group: Group<'_>, bits: u32, dtype: ScaleDtype, start: (f32, f32)) -> AffineFit {
    let largest = ((1u32 << bits) - 1) as f32;
    let ([min, max], [weight_sum, value_sum]) = group.range_and_sums();
    let best = AffineFit { scale: start.0, offset: start.1, error: f64::INFINITY };
    let mut search = Search { group, dtype, largest, weight_sum, value_sum, best };
    let moments = search.score(start.0, start.1);
    if max <= min || moments.error == 0.0 || weight_sum <= 0.0 {
        return search.best;
    }
    let (center, width) = ((min + max) * 0.5, max - min);
    let narrowest = narrowest_share(bits);
    let grid = |low_share: f32, high_share: f32| {
        let (low, high) = (center - 0.5 * width * low_share, center + 0.5 * width * high_share);
        ((high - low) / largest, low)
    };
    let mut best_share = (f64::INFINITY, 1.0);
    for step in 0..SHARES {
        let share = 1.04 + (narrowest - 1.04) * step as f32 / (SHARES - 1) as f32;
        let (scale, offset) = grid(share, share);
        search.descend(scale, offset, 2);
        if search.best.error < best_share.0 {
            best_share = (search.best.error, share);
        }
    }
    // One-sided clipping around the best symmetric one.
    let share = best_share.1;
    let outer = (share + 0.5 * (1.04 - share)).max(share + 0.04);
    for (low_share, high_share) in [(share, outer), (outer, share), (share, 1.04), (1.04, share)] {
        let (scale, offset) = grid(low_share, high_share);
        search.descend(scale, offset, 2);
    }
    let AffineFit { scale, offset, .. } = search.best;
    search.descend(scale, offset, REFITS);
    if bits >= 5 {
        polish(&mut search);
    }
    search.best
}

/// A stored scale is off by up to 2^-9 of itself, which is half a step at the far end of an 8-bit grid: try its neighbours,
/// with the offsets around the best for each.
#[inline(always)]
fn polish(search: &mut Search<'_>) {
    let AffineFit { scale, offset, .. } = search.best;
    let ulp = match search.dtype {
        ScaleDtype::F32 => return,
        ScaleDtype::F16 => 1.0 / 1024.0,
        ScaleDtype::Bf16 => 1.0 / 128.0,
    };
    let moments = search.group.assess(scale, offset, search.largest);
    for steps in [-1.0f32, 0.0, 1.0] {
        let near_scale = search.dtype.round(scale * (1.0 + steps * ulp));
        let exact = ((search.value_sum - f64::from(near_scale) * moments.code) / search.weight_sum) as f32;
        for nudge in [-1.0f32, 0.0, 1.0] {
            search.score(near_scale, search.dtype.round(exact * (1.0 + nudge * ulp)));
        }
    }
}
