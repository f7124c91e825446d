//! Attention over paged rows, for grouped-query and latent attention alike: heads that share keys, keys and values in
//! one cache row, softmax on the fly.
//!
//! A row's context is cut into chunks of [`CHUNK`] positions, counted from its first one. A chunk's scores stay in L1,
//! its cache rows are read once for the scores of all heads and found in L2 for the values. Between chunks each head
//! keeps its largest score, the sum of its weights and its weighted values ([`Sums`]), rescaled when the largest changes.
//! These begin anew with every part of [`PART_KEYS`] positions and are joined in the order of the parts, so that parts may be
//! computed by different threads. All of this depends on the row alone.
//!
//! `unsafe`: SIMD kernels over raw cache rows.
#![allow(unsafe_code)]
// Loops run over arrays of registers, several at once; iterators would hide vectors in closures.
#![allow(clippy::needless_range_loop)]

use crate::memory::CacheRows;
use crate::simd::math::exp;
use crate::simd::{Kernel, Level, Simd};
use moellon_ops::CacheDtype;

/// Positions of a chunk.
pub(crate) const CHUNK: usize = 128;
/// Positions of a part of a context, a multiple of [`CHUNK`]: long enough that joining parts costs a thousandth of
/// computing them, short enough that the 2048 positions of sparse attention are work for four threads.
pub(crate) const PART_KEYS: usize = 4 * CHUNK;
/// Heads whose scores are computed together: their accumulators, two positions at once, fill 8 registers.
const HEADS: usize = 4;
/// The same where there are 32 registers: keys and values, which have to be widened first, serve twice as many products.
const MANY_HEADS: usize = 8;
/// Lanes.
const LANES: usize = 16;
/// Rows whose keys and values are fetched ahead of the scores: cache rows are a stride apart or anywhere, so hardware
/// finds no stream.
pub(crate) const PREFETCH_ROWS: usize = 8;

/// What heads of one token share.
#[derive(Clone, Copy)]
pub(crate) struct KeysAndValues {
    pub(crate) rows: CacheRows,
    /// First element of the keys in a cache row.
    pub(crate) key_at: usize,
    /// Elements of a key.
    pub(crate) key_dim: usize,
    /// First element of the values in a cache row.
    pub(crate) value_at: usize,
    /// Elements of a value.
    pub(crate) value_dim: usize,
}

/// What heads know of the positions so far.
pub(crate) struct Sums<'a> {
    /// `[num_heads]`: largest score, and the sum of weights.
    pub(crate) largest: &'a mut [f32],
    pub(crate) sums: &'a mut [f32],
    /// `[num_heads][padded value_dim]`: weighted values.
    pub(crate) values: &'a mut [f32],
}

/// Floats that [`Sums`] needs: whole vectors, so that what follows begins with one.
pub(crate) fn sums_floats(num_heads: usize, value_dim: usize) -> usize {
    (num_heads * (value_dim.next_multiple_of(LANES) + 2)).next_multiple_of(LANES)
}

impl<'a> Sums<'a> {
    /// Cuts `space` ([`sums_floats`] floats, or more), which holds sums already or anything.
    pub(crate) fn new(space: &'a mut [f32], num_heads: usize, value_dim: usize) -> Self {
        let (values, rest) = space.split_at_mut(num_heads * value_dim.next_multiple_of(LANES));
        let (largest, rest) = rest.split_at_mut(num_heads);
        Sums { largest, sums: &mut rest[..num_heads], values }
    }

    /// No positions yet. `sinks[h]`: a logit that takes its share of the softmax and has no value.
    pub(crate) fn clear(&mut self, sinks: Option<&[f32]>) {
        self.values.fill(0.0);
        match sinks {
            Some(sinks) => {
                self.largest.copy_from_slice(sinks);
                self.sums.fill(1.0);
            }
            None => {
                self.largest.fill(f32::NEG_INFINITY);
                self.sums.fill(0.0);
            }
        }
    }

    /// Becomes a copy of `other`, which has as many heads.
    pub(crate) fn copy_from(&mut self, other: &Sums<'_>) {
        self.largest.copy_from_slice(other.largest);
        self.sums.copy_from_slice(other.sums);
        self.values.copy_from_slice(other.values);
    }

    /// Adds the positions of the next part.
    ///
    /// # Panics
    /// If it has other heads.
    pub(crate) fn join(&mut self, level: Level, next: &Sums<'_>) {
        let num_heads = self.largest.len();
        assert!(
            next.largest.len() == num_heads && next.values.len() == self.values.len(),
            "{} heads and {} values joined to {num_heads} and {}",
            next.largest.len(),
            next.values.len(),
            self.values.len()
        );
        let args = Join {
            num_heads,
            value_stride: self.values.len() / num_heads.max(1),
            largest: self.largest.as_mut_ptr(),
            sums: self.sums.as_mut_ptr(),
            values: self.values.as_mut_ptr(),
            next: [next.largest.as_ptr(), next.sums.as_ptr(), next.values.as_ptr()],
        };
        // SAFETY: both have so many heads, values in whole vectors.
        unsafe { level.call::<Join>(&args) }
    }

    /// The result of head `head`: weighted values over the sum of weights.
    pub(crate) fn write_average(&self, head: usize, out: &mut [f32]) {
        let stride = out.len().next_multiple_of(LANES);
        let inverse = 1.0 / self.sums[head];
        for (out, value) in out.iter_mut().zip(&self.values[head * stride..]) {
            *out = value * inverse;
        }
    }
}

/// [`Sums::join`]
struct Join {
    num_heads: usize,
    value_stride: usize,
    largest: *mut f32,
    sums: *mut f32,
    values: *mut f32,
    /// Largest, sums and values of the next part.
    next: [*const f32; 3],
}

impl Kernel for Join {
    type Args = Self;

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &Self) {
        let [next_largest, next_sums, next_values] = args.next;
        for head in 0..args.num_heads {
            // SAFETY: the caller's promise.
            unsafe {
                let both = [*args.largest.add(head), *next_largest.add(head)];
                let largest = s.max_lane(s.max(s.splat(both[0]), s.splat(both[1])));
                let mut factors = [[0.0; LANES]; 2];
                for (factor, part) in factors.iter_mut().zip(both) {
                    s.store(exp(s, s.splat(part - largest)), factor.as_mut_ptr());
                }
                let [before, after] = [factors[0][0], factors[1][0]];
                *args.largest.add(head) = largest;
                *args.sums.add(head) = *args.sums.add(head) * before + *next_sums.add(head) * after;
                for first in (0..args.value_stride).step_by(LANES) {
                    let at = head * args.value_stride + first;
                    let value = s.mul(s.load(args.values.add(at)), s.splat(before));
                    s.store(s.mul_add(s.load(next_values.add(at)), s.splat(after), value), args.values.add(at));
                }
            }
        }
    }
}

/// Work space of one thread.
pub(crate) struct Heads<'a> {
    /// `[num_heads][padded key_dim]`, zeros behind each query.
    pub(crate) queries: &'a mut [f32],
    /// Of the current part.
    pub(crate) sums: Sums<'a>,
    pub(crate) num_heads: usize,
}

/// Floats that [`Heads`] needs.
pub(crate) fn heads_floats(num_heads: usize, key_dim: usize, value_dim: usize) -> usize {
    num_heads * key_dim.next_multiple_of(LANES) + sums_floats(num_heads, value_dim)
}

impl<'a> Heads<'a> {
    /// Cuts `space` ([`heads_floats`] floats, or more). Queries and sums are to be written.
    pub(crate) fn new(space: &'a mut [f32], num_heads: usize, [key_dim, value_dim]: [usize; 2]) -> Self {
        let (queries, rest) = space.split_at_mut(num_heads * key_dim.next_multiple_of(LANES));
        if key_dim % LANES != 0 {
            queries.fill(0.0);
        }
        Heads { queries, sums: Sums::new(rest, num_heads, value_dim), num_heads }
    }

    /// The query of head `head`.
    pub(crate) fn query_mut(&mut self, head: usize, key_dim: usize) -> &mut [f32] {
        let stride = key_dim.next_multiple_of(LANES);
        &mut self.queries[head * stride..][..key_dim]
    }
}

/// Keys and values of a chunk as f32, where so many heads and tokens read them that widening them for every group of heads would
/// take a fifth of the time: `[CHUNK][keys, then values that are no part of them]`.
pub(crate) struct WideRows<'a> {
    space: &'a mut [f32],
    /// Rows that are there.
    count: usize,
}

/// Floats of a row of [`WideRows`], whole vectors, and where values start in it.
fn wide_row(shared: &KeysAndValues) -> [usize; 2] {
    let (key_end, value_end) = (shared.key_at + shared.key_dim, shared.value_at + shared.value_dim);
    if shared.key_at <= shared.value_at && value_end <= key_end {
        return [shared.key_dim.next_multiple_of(LANES), shared.value_at - shared.key_at];
    }
    let keys = shared.key_dim.next_multiple_of(LANES);
    [keys + shared.value_dim.next_multiple_of(LANES), keys]
}

impl<'a> WideRows<'a> {
    /// Floats that it needs.
    pub(crate) fn num_floats(shared: &KeysAndValues) -> usize {
        CHUNK * wide_row(shared)[0]
    }

    /// Room for rows, and none there.
    pub(crate) fn new(space: &'a mut [f32]) -> Self {
        WideRows { space, count: 0 }
    }

    /// The next rows are of another chunk.
    pub(crate) fn forget(&mut self) {
        self.count = 0;
    }

    /// Adds what is missing of the chunk of `slots`, of which earlier ones are there.
    ///
    /// # Panics
    /// If there is no room, or a slot is not in the cache.
    pub(crate) fn extend(&mut self, level: Level, shared: &KeysAndValues, slots: &[u32]) {
        check_row(shared);
        assert!(slots.len() <= CHUNK && self.space.len() >= Self::num_floats(shared), "room for a chunk");
        let [stride, values_at] = wide_row(shared);
        let mut rows = [std::ptr::null::<u8>(); CHUNK];
        for (row, slot) in rows.iter_mut().zip(slots) {
            *row = shared.rows.pointer(*slot as usize);
        }
        if self.count < slots.len() {
            let args = Widen {
                shared,
                rows: &rows[self.count..slots.len()],
                to: self.space[self.count * stride..].as_mut_ptr(),
            };
            let args = WidenTo { args, stride, values_at };
            // SAFETY: rows are inside the cache, which nobody writes during this operation; there is room for all of them. Only the
            // lifetime changes, and the kernel keeps nothing.
            unsafe { level.call::<WidenTo<'static>>(std::mem::transmute::<&WidenTo<'_>, &WidenTo<'static>>(&args)) }
            self.count = slots.len();
        }
    }
}

struct Widen<'a> {
    shared: &'a KeysAndValues,
    rows: &'a [*const u8],
    to: *mut f32,
}

/// Widens rows of bf16 to rows of f32, `stride` apart.
struct WidenTo<'a> {
    args: Widen<'a>,
    stride: usize,
    values_at: usize,
}

impl Kernel for WidenTo<'_> {
    type Args = WidenTo<'static>;

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &WidenTo<'static>) {
        let Widen { shared, rows, to } = args.args;
        for i in 0..PREFETCH_ROWS {
            prefetch_row::<S, true>(s, shared, rows, i);
        }
        for i in 0..rows.len() {
            prefetch_row::<S, true>(s, shared, rows, i + PREFETCH_ROWS);
            let to = to.wrapping_add(i * args.stride);
            // SAFETY: the caller's promise.
            unsafe {
                widen(s, rows[i], shared.key_at, shared.key_dim, to);
                if args.values_at >= shared.key_dim {
                    widen(s, rows[i], shared.value_at, shared.value_dim, to.add(args.values_at));
                }
            }
        }
    }
}

/// Elements `at .. at + dim` of a row of bf16 as f32.
///
/// # Safety
/// They are there, and `to` has room for whole vectors.
#[inline(always)]
unsafe fn widen<S: Simd>(s: S, row: *const u8, at: usize, dim: usize, to: *mut f32) {
    for first in (0..dim).step_by(LANES) {
        // SAFETY: the caller's promise.
        unsafe {
            let wide = if first + LANES <= dim {
                load_elements::<S, true>(s, row, at + first)
            } else {
                load_last_elements::<S, true>(s, row, at + first, dim - first)
            };
            s.store(wide, to.add(first));
        }
    }
}

/// Adds `slots` (up to [`CHUNK`]) to the state of all heads. `fetches`: whether rows are not in a cache yet. `wide`: these rows as f32, if
/// they were widened.
///
/// # Panics
/// If a slot is not in the cache, or the work space has other sizes.
pub(crate) fn attend_chunk(
    level: Level,
    shared: &KeysAndValues,
    scale: f32,
    heads: &mut Heads<'_>,
    slots: &[u32],
    fetches: bool,
    wide: Option<&WideRows<'_>>,
) {
    assert!(slots.len() <= CHUNK);
    let (key_stride, value_stride) = (shared.key_dim.next_multiple_of(LANES), shared.value_dim.next_multiple_of(LANES));
    assert_eq!(heads.queries.len(), heads.num_heads * key_stride, "queries");
    assert_eq!(heads.sums.values.len(), heads.num_heads * value_stride, "values");
    check_row(shared);
    let mut rows = [std::ptr::null::<u8>(); CHUNK];
    let [stride, values_at] = wide_row(shared);
    let of_wide = KeysAndValues { key_at: 0, value_at: values_at, ..*shared };
    match wide {
        Some(wide) => {
            assert!(slots.len() <= wide.count, "{} of {} rows are wide", wide.count, slots.len());
            for (row, wide) in rows.iter_mut().zip(wide.space.chunks_exact(stride)) {
                *row = wide.as_ptr().cast();
            }
        }
        None => {
            for (row, slot) in rows.iter_mut().zip(slots) {
                *row = shared.rows.pointer(*slot as usize);
            }
        }
    }
    let mut args = ChunkArgs {
        shared: if wide.is_some() { &of_wide } else { shared },
        rows: &rows[..slots.len()],
        scale,
        fetches: fetches && wide.is_none(),
        num_heads: heads.num_heads,
        queries: heads.queries.as_ptr(),
        largest: heads.sums.largest.as_mut_ptr(),
        sums: heads.sums.sums.as_mut_ptr(),
        values: heads.sums.values.as_mut_ptr(),
    };
    // SAFETY: sizes were checked above; rows are inside the cache, which nobody writes during this operation.
    unsafe {
        match (shared.rows.dtype, wide) {
            (CacheDtype::F32, _) | (CacheDtype::Bf16, Some(_)) => call::<false>(level, &mut args),
            (CacheDtype::Bf16, None) => call::<true>(level, &mut args),
        }
    }
}

pub(crate) fn check_row(shared: &KeysAndValues) {
    let width = shared.rows.row_bytes / shared.rows.dtype.size_bytes();
    assert!(
        shared.key_at + shared.key_dim <= width && shared.value_at + shared.value_dim <= width,
        "keys and values in a row"
    );
}

unsafe fn call<const BF16: bool>(level: Level, args: &mut ChunkArgs<'_>) {
    // SAFETY: only the lifetime changes, and the kernel keeps nothing; the rest is the caller's promise.
    unsafe { level.call::<Chunk<BF16>>(std::mem::transmute::<&ChunkArgs<'_>, &ChunkArgs<'static>>(args)) }
}

struct ChunkArgs<'a> {
    shared: &'a KeysAndValues,
    rows: &'a [*const u8],
    scale: f32,
    /// Whether rows are fetched ahead: the first time that a thread reads them.
    fetches: bool,
    num_heads: usize,
    queries: *const f32,
    largest: *mut f32,
    sums: *mut f32,
    values: *mut f32,
}

struct Chunk<const BF16: bool>;

/// 16 elements of a cache row.
///
/// # Safety
/// `row` is valid for reads of elements `at .. at + 16`.
#[inline(always)]
unsafe fn load_elements<S: Simd, const BF16: bool>(s: S, row: *const u8, at: usize) -> S::F {
    // SAFETY: the caller's promise.
    unsafe {
        if BF16 { s.cast_to_f(s.shl(s.load_u16(row.add(2 * at)), 16)) } else { s.load(row.cast::<f32>().add(at)) }
    }
}

/// The first `count` (below 16) of these elements, zeros after them.
///
/// # Safety
/// `row` is valid for reads of elements `at .. at + count`.
#[inline(always)]
unsafe fn load_last_elements<S: Simd, const BF16: bool>(s: S, row: *const u8, at: usize, count: usize) -> S::F {
    let mut buffer = [0u8; 64];
    let size_bytes = if BF16 { 2 } else { 4 };
    // SAFETY: the caller's promise; the buffer holds 16 elements.
    unsafe {
        std::ptr::copy_nonoverlapping(row.add(at * size_bytes), buffer.as_mut_ptr(), count * size_bytes);
        load_elements::<S, BF16>(s, buffer.as_ptr(), 0)
    }
}

/// Products of `H` queries with the keys of `P` rows: `out[h][p]`.
///
/// # Safety
/// Queries are `key_stride` apart and padded, rows hold `dim` elements from `at` on.
#[inline(always)]
unsafe fn dots<S: Simd, const BF16: bool, const H: usize, const P: usize>(
    s: S,
    queries: *const f32,
    rows: &[*const u8; P],
    at: usize,
    dim: usize,
) -> [[f32; P]; H] {
    let stride = dim.next_multiple_of(LANES);
    let mut acc = [[s.splat(0.0); P]; H];
    let mut first = 0;
    while first < dim {
        let mut key = [s.splat(0.0); P];
        for p in 0..P {
            // SAFETY: the caller's promise.
            key[p] = unsafe {
                if first + LANES <= dim {
                    load_elements::<S, BF16>(s, rows[p], at + first)
                } else {
                    load_last_elements::<S, BF16>(s, rows[p], at + first, dim - first)
                }
            };
        }
        for h in 0..H {
            // SAFETY: the caller's promise.
            let query = unsafe { s.load(queries.add(h * stride + first)) };
            for p in 0..P {
                acc[h][p] = s.mul_add(query, key[p], acc[h][p]);
            }
        }
        first += LANES;
    }
    let mut out = [[0.0; P]; H];
    for p in 0..P {
        let mut h = 0;
        while h + 4 <= H {
            let sums = s.sum_4([acc[h][p], acc[h + 1][p], acc[h + 2][p], acc[h + 3][p]]);
            for i in 0..4 {
                out[h + i][p] = sums[i];
            }
            h += 4;
        }
        while h < H {
            out[h][p] = s.sum(acc[h][p]);
            h += 1;
        }
    }
    out
}

/// Fetches keys and values of row `i` of a chunk, if there is one.
#[inline(always)]
pub(crate) fn prefetch_row<S: Simd, const BF16: bool>(s: S, shared: &KeysAndValues, rows: &[*const u8], i: usize) {
    let size_bytes = if BF16 { 2 } else { 4 };
    let Some(row) = rows.get(i) else { return };
    let key_end = shared.key_at + shared.key_dim;
    for byte in (shared.key_at * size_bytes..key_end * size_bytes).step_by(64) {
        s.prefetch(row.wrapping_add(byte));
    }
    // Latent values are a part of their keys.
    if shared.value_at >= key_end {
        for byte in (shared.value_at * size_bytes..(shared.value_at + shared.value_dim) * size_bytes).step_by(64) {
            s.prefetch(row.wrapping_add(byte));
        }
    }
}

/// `scores[h][i]` for `H` heads and all rows of a chunk, `scores` being `H` arrays of [`CHUNK`]. `is_first`: the first
/// heads of a chunk fetch rows ahead for all.
///
/// # Safety
/// As [`dots`]; `scores` is valid for writes.
#[inline(always)]
unsafe fn score_heads<S: Simd, const BF16: bool, const H: usize>(
    s: S,
    queries: *const f32,
    rows: &[*const u8],
    shared: &KeysAndValues,
    is_first: bool,
    scale: f32,
    scores: *mut [f32; CHUNK],
) {
    let (at, dim) = (shared.key_at, shared.key_dim);
    if is_first {
        for i in 0..PREFETCH_ROWS {
            prefetch_row::<S, BF16>(s, shared, rows, i);
        }
    }
    let mut i = 0;
    while S::MANY_REGISTERS && i + 2 <= rows.len() {
        if is_first {
            prefetch_row::<S, BF16>(s, shared, rows, i + PREFETCH_ROWS);
            prefetch_row::<S, BF16>(s, shared, rows, i + PREFETCH_ROWS + 1);
        }
        // SAFETY: the caller's promise.
        unsafe {
            let pair = dots::<S, BF16, H, 2>(s, queries, &[rows[i], rows[i + 1]], at, dim);
            for h in 0..H {
                (*scores.add(h))[i] = pair[h][0] * scale;
                (*scores.add(h))[i + 1] = pair[h][1] * scale;
            }
        }
        i += 2;
    }
    while i < rows.len() {
        if is_first {
            prefetch_row::<S, BF16>(s, shared, rows, i + PREFETCH_ROWS);
        }
        // SAFETY: the caller's promise.
        unsafe {
            let one = dots::<S, BF16, H, 1>(s, queries, &[rows[i]], at, dim);
            for h in 0..H {
                (*scores.add(h))[i] = one[h][0] * scale;
            }
        }
        i += 1;
    }
}

/// `values[h] += Σ_i weights[h][i] * row_i` for `H` heads and `V` vectors of the values, the last of them with `last`
/// elements.
///
/// # Safety
/// Rows hold the elements from `at` on; `values` are `stride` apart; `weights` are `H` arrays.
#[inline(always)]
unsafe fn add_values<S: Simd, const BF16: bool, const H: usize, const V: usize>(
    s: S,
    rows: &[*const u8],
    at: usize,
    last: usize,
    weights: *const [f32; CHUNK],
    values: *mut f32,
    stride: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut acc = [[s.splat(0.0); V]; H];
        for h in 0..H {
            for v in 0..V {
                acc[h][v] = s.load(values.add(h * stride + v * LANES));
            }
        }
        for i in 0..rows.len() {
            let mut value = [s.splat(0.0); V];
            for v in 0..V {
                value[v] = if v + 1 < V || last == LANES {
                    load_elements::<S, BF16>(s, rows[i], at + v * LANES)
                } else {
                    load_last_elements::<S, BF16>(s, rows[i], at + v * LANES, last)
                };
            }
            for h in 0..H {
                let weight = s.splat((*weights.add(h))[i]);
                for v in 0..V {
                    acc[h][v] = s.mul_add(weight, value[v], acc[h][v]);
                }
            }
        }
        for h in 0..H {
            for v in 0..V {
                s.store(acc[h][v], values.add(h * stride + v * LANES));
            }
        }
    }
}

/// Scores, softmax weights and values of `H` heads from head `head` on.
///
/// # Safety
/// As [`Chunk`]; heads exist.
#[inline(always)]
unsafe fn attend_heads<S: Simd, const BF16: bool, const H: usize>(s: S, args: &ChunkArgs<'_>, head: usize) {
    let shared = args.shared;
    let (key_stride, value_stride) = (shared.key_dim.next_multiple_of(LANES), shared.value_dim.next_multiple_of(LANES));
    let count = args.rows.len();
    let mut scores = std::mem::MaybeUninit::<[[f32; CHUNK]; H]>::uninit();
    let scores: *mut [f32; CHUNK] = scores.as_mut_ptr().cast();
    // SAFETY: the caller's promise; scores are whole vectors, and those read were written before.
    unsafe {
        let queries = args.queries.add(head * key_stride);
        let fetches = args.fetches && head == 0;
        score_heads::<S, BF16, H>(s, queries, args.rows, shared, fetches, args.scale, scores);
        for h in 0..H {
            let scores = scores.add(h).cast::<f32>();
            // Behind the last score: nothing is larger, and it weighs nothing.
            for i in count..count.next_multiple_of(LANES) {
                *scores.add(i) = f32::NEG_INFINITY;
            }
            let mut largest = s.load(scores);
            for first in (LANES..count).step_by(LANES) {
                largest = s.max(largest, s.load(scores.add(first)));
            }
            let before = *args.largest.add(head + h);
            let largest = s.max_lane(s.max(largest, s.splat(before)));
            let mut sum = s.splat(0.0);
            for first in (0..count).step_by(LANES) {
                let weight = exp(s, s.sub(s.load(scores.add(first)), s.splat(largest)));
                s.store(weight, scores.add(first));
                // Padding has e^-87 by the clamp of `exp`: far below the rounding of a sum of at least one.
                sum = s.add(sum, weight);
            }
            let mut factor = [0.0; LANES];
            // The first chunk without a sink: minus infinity minus anything, and there is nothing to rescale.
            s.store(exp(s, s.splat(before - largest)), factor.as_mut_ptr());
            let sums = args.sums.add(head + h);
            *sums = *sums * factor[0] + s.sum(sum);
            *args.largest.add(head + h) = largest;
            let values = args.values.add((head + h) * value_stride);
            for first in (0..value_stride).step_by(LANES) {
                s.store(s.mul(s.load(values.add(first)), s.splat(factor[0])), values.add(first));
            }
        }
        let values = args.values.add(head * value_stride);
        let mut first = 0;
        while S::MANY_REGISTERS && first + 2 * LANES <= shared.value_dim {
            let to = values.add(first);
            add_values::<S, BF16, H, 2>(s, args.rows, shared.value_at + first, LANES, scores, to, value_stride);
            first += 2 * LANES;
        }
        while first < shared.value_dim {
            let (to, last) = (values.add(first), (shared.value_dim - first).min(LANES));
            add_values::<S, BF16, H, 1>(s, args.rows, shared.value_at + first, last, scores, to, value_stride);
            first += LANES;
        }
    }
}

impl<const BF16: bool> Kernel for Chunk<BF16> {
    type Args = ChunkArgs<'static>;

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &ChunkArgs<'static>) {
        let mut head = 0;
        // SAFETY: the caller's promise: all heads have queries and state, rows hold keys and values.
        unsafe {
            while S::MANY_REGISTERS && head + MANY_HEADS <= args.num_heads {
                attend_heads::<S, BF16, MANY_HEADS>(s, args, head);
                head += MANY_HEADS;
            }
            while head + HEADS <= args.num_heads {
                attend_heads::<S, BF16, HEADS>(s, args, head);
                head += HEADS;
            }
            while head < args.num_heads {
                attend_heads::<S, BF16, 1>(s, args, head);
                head += 1;
            }
        }
    }
}

/// `out[i] = Σ_h weights[h] * relu(queries[h] · key_i * scale)` for up to [`CHUNK`] slots: scores of the indexer.
/// `queries` is `[weights.len()][padded key_dim]`.
///
/// # Panics
/// If a slot is not in the cache, or sizes disagree.
pub(crate) fn index_chunk(
    level: Level,
    shared: &KeysAndValues,
    scale: f32,
    queries: &[f32],
    weights: &[f32],
    slots: &[u32],
    out: &mut [f32],
) {
    assert!(slots.len() <= CHUNK && slots.len() == out.len());
    assert_eq!(queries.len(), weights.len() * shared.key_dim.next_multiple_of(LANES), "queries");
    check_row(shared);
    let mut rows = [std::ptr::null::<u8>(); CHUNK];
    for (row, slot) in rows.iter_mut().zip(slots) {
        *row = shared.rows.pointer(*slot as usize);
    }
    let mut scores = [0.0; CHUNK];
    let args = IndexArgs { shared, rows: &rows[..slots.len()], scale, queries, weights, out: scores.as_mut_ptr() };
    // SAFETY: sizes were checked; only the lifetime changes, and the kernel keeps nothing; nobody writes the cache.
    unsafe {
        let args = std::mem::transmute::<&IndexArgs<'_>, &IndexArgs<'static>>(&args);
        match shared.rows.dtype {
            CacheDtype::F32 => level.call::<Index<false>>(args),
            CacheDtype::Bf16 => level.call::<Index<true>>(args),
        }
    }
    out.copy_from_slice(&scores[..out.len()]);
}

struct IndexArgs<'a> {
    shared: &'a KeysAndValues,
    rows: &'a [*const u8],
    scale: f32,
    queries: &'a [f32],
    weights: &'a [f32],
    /// `[CHUNK]`
    out: *mut f32,
}

struct Index<const BF16: bool>;

/// Adds `H` heads from head `head` on.
///
/// # Safety
/// As [`Index`]; heads exist.
#[inline(always)]
unsafe fn index_heads<S: Simd, const BF16: bool, const H: usize>(s: S, args: &IndexArgs<'_>, head: usize) {
    let shared = args.shared;
    let stride = shared.key_dim.next_multiple_of(LANES);
    // Zeros behind the last score: whole vectors are read.
    let mut scores = [[0.0; CHUNK]; H];
    // SAFETY: the caller's promise; scores and outputs are whole vectors.
    unsafe {
        let queries = args.queries.as_ptr().add(head * stride);
        score_heads::<S, BF16, H>(s, queries, args.rows, shared, head == 0, args.scale, scores.as_mut_ptr());
        for first in (0..args.rows.len()).step_by(LANES) {
            let mut total = s.load(args.out.add(first));
            for h in 0..H {
                let positive = s.max(s.load(scores[h].as_ptr().add(first)), s.splat(0.0));
                total = s.mul_add(s.splat(args.weights[head + h]), positive, total);
            }
            s.store(total, args.out.add(first));
        }
    }
}

impl<const BF16: bool> Kernel for Index<BF16> {
    type Args = IndexArgs<'static>;

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &IndexArgs<'static>) {
        let mut head = 0;
        // SAFETY: the caller's promise.
        unsafe {
            while head + HEADS <= args.weights.len() {
                index_heads::<S, BF16, HEADS>(s, args, head);
                head += HEADS;
            }
            while head < args.weights.len() {
                index_heads::<S, BF16, 1>(s, args, head);
                head += 1;
            }
        }
    }
}
