//! Attention over a chunk of bf16 rows with the tile registers of AMX.
//!
//! A tile instruction multiplies bfloat16 and adds in f32, sixteen times as many products a cycle as AVX-512 has for floats. Keys and
//! values are bf16 in the cache. Queries and weights of the softmax are f32: each is split into a bf16 and a bf16 for what it
//! leaves, 2^-18 of the number away from it, and multiplied in both parts. The softmax stays in f32. This is not what other levels compute to the last bit,
//! so only [`crate::ActivationMode::Int8`] uses it (whose activations are 2^-8 away).
//!
//! - *Scores* are keys (16 positions by 32 columns a tile, as they are) times queries (pairs of columns by 16 heads, packed once a unit), which
//!   leaves heads in lanes: the softmax needs no sum across lanes.
//! - *Values* are weights (16 heads by 32 positions) times values, which are the first columns of keys (pairs of positions by 16 columns,
//!   interleaved in the nearest cache while the columns before are multiplied).
//!
//! A sum goes over columns, or positions, in their order, high part before low part, whoever shares the tile: what a head gets depends
//! on its token alone.
//!
//! `unsafe`: assembly and vector instructions over raw cache rows.
#![allow(unsafe_code)]
// Loops run over arrays of registers, several at once; iterators would hide vectors in closures.
#![allow(clippy::needless_range_loop)]

use crate::attention::{CHUNK, Heads, KeysAndValues, PREFETCH_ROWS, check_row, prefetch_row};
use crate::chunk_rows::query_floats;
use crate::simd::amx::{Shape, configure};
use crate::simd::math::exp;
use crate::simd::{Kernel, Level, Simd};
use moellon_ops::CacheDtype;
use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;

/// Heads of a tile, positions of a tile of keys.
pub(crate) const TILE: usize = 16;
/// Columns of a tile of keys, positions of a tile of weights: what an instruction sums.
const DEPTH: usize = 32;
/// Bytes of a row of a tile, and of a tile.
const LINE_BYTES: usize = 64;
const TILE_BYTES: usize = TILE * LINE_BYTES;
/// Floats of a tile.
const TILE_FLOATS: usize = TILE_BYTES / 4;

/// Whether there are kernels for `num_heads` heads over such rows.
pub(crate) fn fits(level: Level, shared: &KeysAndValues, num_heads: usize) -> bool {
    level.has_bf16_tiles()
        && shared.rows.dtype == CacheDtype::Bf16
        && num_heads.is_multiple_of(TILE)
        && shared.key_dim.is_multiple_of(TILE)
        && shared.value_dim.is_multiple_of(DEPTH)
        && shared.value_at == shared.key_at
        && shared.value_dim <= shared.key_dim
}

/// Keys of a chunk as tiles, `[CHUNK / 16][columns / 32]`, and behind them weights of up to `num_heads` heads (see [`ChunkArgs`]).
pub(crate) struct TileRows<'a> {
    space: &'a mut [f32],
    /// Rows that are there; zeros follow up to a multiple of [`DEPTH`].
    count: usize,
}

impl<'a> TileRows<'a> {
    /// Floats that it needs.
    pub(crate) fn num_floats(shared: &KeysAndValues, num_heads: usize) -> usize {
        Self::key_floats(shared) + CHUNK * num_heads
    }

    /// Floats of keys.
    fn key_floats(shared: &KeysAndValues) -> usize {
        CHUNK * query_floats(shared.key_dim, true) / 2
    }

    /// Room for rows, and none there.
    pub(crate) fn new(space: &'a mut [f32]) -> Self {
        TileRows { space, count: 0 }
    }

    /// The next rows are of another chunk.
    pub(crate) fn forget(&mut self) {
        self.count = 0;
    }

    /// Adds what is missing of the chunk of `slots`, of which earlier ones are there.
    ///
    /// # Panics
    /// If there is no room, a slot is not in the cache, or the level has no tiles.
    pub(crate) fn extend(&mut self, level: Level, shared: &KeysAndValues, slots: &[u32]) {
        assert!(fits(level, shared, TILE), "tiles for {} and {} columns", shared.key_dim, shared.value_dim);
        check_row(shared);
        assert!(slots.len() <= CHUNK && self.space.len() >= Self::key_floats(shared), "room for a chunk");
        if self.count >= slots.len() {
            return;
        }
        let rows = pointers(shared, slots);
        let (rows, first) = (&rows[..slots.len()], self.count);
        let args = GatherArgs { shared, rows, first, to: self.space.as_mut_ptr().cast() };
        // SAFETY: rows are inside the cache, which nobody writes during this operation; there is room for all of them. Only the
        // lifetime changes, and the kernel keeps nothing.
        unsafe {
            level.call_with_tiles::<Gather>(std::mem::transmute::<&GatherArgs<'_>, &GatherArgs<'static>>(&args));
        }
        self.count = slots.len();
    }

    /// Makes operands of queries, which are rows of [`query_floats`], in their place. No rows are there then.
    ///
    /// # Panics
    /// If sizes disagree or the level has no tiles.
    pub(crate) fn pack_queries(&mut self, level: Level, shared: &KeysAndValues, queries: &mut [f32]) {
        let columns = query_floats(shared.key_dim, true);
        assert!(self.space.len() >= TILE * columns, "room for a tile of heads");
        self.count = 0;
        assert!(queries.len().is_multiple_of(TILE * columns), "queries of whole tiles of heads");
        for queries in queries.chunks_exact_mut(TILE * columns) {
            let from = &mut self.space[..TILE * columns];
            from.copy_from_slice(queries);
            let args = PackArgs { columns, from: from.as_ptr(), to: queries.as_mut_ptr().cast() };
            // SAFETY: both are 16 rows of whole tiles.
            unsafe { level.call_with_tiles::<Pack>(&args) }
        }
    }

    /// Adds the first `count` rows to the state of all heads, whose queries are packed. Rows of `next` are fetched meanwhile.
    ///
    /// # Panics
    /// If there are fewer rows, a slot is not in the cache, or the work space has other sizes.
    pub(crate) fn attend(
        &mut self,
        level: Level,
        shared: &KeysAndValues,
        scale: f32,
        heads: &mut Heads<'_>,
        count: usize,
        next: &[u32],
    ) {
        let num_heads = heads.num_heads;
        let products = self.products(level, shared, heads.queries, num_heads, count);
        assert!(self.space.len() >= Self::num_floats(shared, num_heads), "room for weights");
        let sums = &mut heads.sums;
        assert_eq!(sums.values.len(), num_heads * shared.value_dim, "values");
        assert!(sums.largest.len() == num_heads && sums.sums.len() == num_heads, "sums");
        let next_rows = pointers(shared, next);
        let args = ChunkArgs {
            products,
            next: &next_rows[..next.len()],
            weights: self.space[Self::key_floats(shared)..].as_mut_ptr().cast(),
            value_dim: shared.value_dim,
            scale,
            num_heads,
            largest: sums.largest.as_mut_ptr(),
            sums: sums.sums.as_mut_ptr(),
            weighted: sums.values.as_mut_ptr(),
        };
        // SAFETY: sizes were checked above, and that rows are there. Only the lifetime changes, and the kernel keeps nothing.
        unsafe { level.call_with_tiles::<Chunk>(std::mem::transmute::<&ChunkArgs<'_>, &ChunkArgs<'static>>(&args)) }
    }

    /// `out[i] = Σ_h weights[h] * relu(queries[h] · key_i * scale)` for the first rows: scores of the indexer. Queries are packed.
    ///
    /// # Panics
    /// If there are fewer rows, or the work space has other sizes.
    pub(crate) fn index(
        &self,
        level: Level,
        shared: &KeysAndValues,
        scale: f32,
        (queries, weights): (&[f32], &[f32]),
        out: &mut [f32],
    ) {
        let products = self.products(level, shared, queries, weights.len(), out.len());
        let mut totals = [0.0; CHUNK];
        let args = IndexArgs { products, scale, weights, out: totals.as_mut_ptr() };
        // SAFETY: sizes were checked, and that rows are there. Only the lifetime changes, and the kernel keeps nothing.
        unsafe { level.call_with_tiles::<Index>(std::mem::transmute::<&IndexArgs<'_>, &IndexArgs<'static>>(&args)) }
        out.copy_from_slice(&totals[..out.len()]);
    }

    /// Packed queries of `num_heads` heads and the first `count` rows, checked.
    fn products(
        &self,
        level: Level,
        shared: &KeysAndValues,
        queries: &[f32],
        num_heads: usize,
        count: usize,
    ) -> Products {
        assert!(fits(level, shared, num_heads), "tiles for {num_heads} heads");
        assert!((1..=self.count).contains(&count), "{count} of {} rows", self.count);
        assert!(self.space.len() >= Self::key_floats(shared), "room for a chunk");
        let key_tiles = query_floats(shared.key_dim, true) / DEPTH;
        assert_eq!(queries.len(), num_heads * key_tiles * DEPTH, "queries");
        Products { keys: self.space.as_ptr().cast(), key_tiles, queries: queries.as_ptr().cast(), count }
    }
}

/// Where rows of `slots` are.
///
/// # Panics
/// If one is not in the cache, or there are more than a chunk has.
fn pointers(shared: &KeysAndValues, slots: &[u32]) -> [*const u8; CHUNK] {
    let mut rows = [std::ptr::null::<u8>(); CHUNK];
    for (row, slot) in rows[..slots.len()].iter_mut().zip(slots) {
        *row = shared.rows.pointer(*slot as usize);
    }
    rows
}

/// Fetches rows of `slots` into the second-nearest cache.
///
/// # Panics
/// If one is not in the cache, or there are more than a chunk has.
pub(crate) fn fetch(shared: &KeysAndValues, slots: &[u32]) {
    for row in &pointers(shared, slots)[..slots.len()] {
        for byte in (0..2 * shared.key_dim).step_by(LINE_BYTES) {
            // SAFETY: every processor with tiles has the instruction, and any address is allowed.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(row.wrapping_add(2 * shared.key_at + byte).cast()) }
        }
    }
}

struct GatherArgs<'a> {
    shared: &'a KeysAndValues,
    rows: &'a [*const u8],
    /// The first row to gather.
    first: usize,
    to: *mut u8,
}

/// Cache rows to tiles of keys.
struct Gather;

impl Kernel for Gather {
    type Args = GatherArgs<'static>;

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &GatherArgs<'static>) {
        let GatherArgs { shared, rows, first, to } = *args;
        let key_tiles = shared.key_dim.div_ceil(DEPTH);
        for i in 0..PREFETCH_ROWS {
            prefetch_row::<S, true>(s, shared, rows, first + i);
        }
        for position in first..rows.len().next_multiple_of(DEPTH) {
            prefetch_row::<S, true>(s, shared, rows, position + PREFETCH_ROWS);
            // Zeros behind the last row: nothing is read of it.
            let (row, mask) = rows.get(position).map_or((rows[0], 0), |row| (*row, u32::MAX));
            let key = row.wrapping_add(2 * shared.key_at);
            let line = to.wrapping_add(position / TILE * key_tiles * TILE_BYTES + position % TILE * LINE_BYTES);
            for tile in 0..key_tiles {
                let columns = shared.key_dim - tile * DEPTH;
                let mask = if columns < DEPTH { mask & 0xffff } else { mask };
                // SAFETY: the caller's promise: rows hold keys (masked where there is no row or no column), and there is room for a
                // chunk of tiles. The level has AVX-512.
                unsafe {
                    let keys = _mm512_maskz_loadu_epi16(mask, key.wrapping_add(tile * LINE_BYTES).cast());
                    _mm512_storeu_si512(line.add(tile * TILE_BYTES).cast(), keys);
                }
            }
        }
    }
}

/// Indices that interleave half `half` of two vectors of 32 numbers.
///
/// # Safety
/// The level has AVX-512.
#[inline(always)]
unsafe fn interleaving(half: u16) -> __m512i {
    let mut indices = [0u16; 32];
    let mut i = 0;
    while i < 16 {
        indices[2 * i] = half * 16 + i as u16;
        indices[2 * i + 1] = 32 + half * 16 + i as u16;
        i += 1;
    }
    // SAFETY: 64 bytes.
    unsafe { _mm512_loadu_si512(indices.as_ptr().cast()) }
}

/// `x` as bf16 in the high halves of lanes, and what it leaves as another.
#[inline(always)]
fn split<S: Simd>(s: S, x: S::F) -> [S::I; 2] {
    let high = round(s, x);
    [high, round(s, s.sub(x, s.cast_to_f(high)))]
}

/// `x` rounded to bf16, nearest even, in the high half of each lane.
#[inline(always)]
fn round<S: Simd>(s: S, x: S::F) -> S::I {
    let bits = s.cast_to_i(x);
    let odd = s.and(s.shr(bits, 16), s.splat_i(1));
    s.and(s.add_i(bits, s.add_i(odd, s.splat_i(0x7fff))), s.splat_i(0xffff_0000_u32 as i32))
}

/// Sixteen lines of sixteen 4-byte numbers.
#[repr(C, align(64))]
struct Square([MaybeUninit<u32>; TILE_FLOATS]);

impl Square {
    #[inline(always)]
    fn new() -> Self {
        Square([MaybeUninit::uninit(); _])
    }

    #[inline(always)]
    fn line(&mut self, line: usize) -> *mut f32 {
        self.0[line * TILE..][..TILE].as_mut_ptr().cast()
    }
}

/// Lines of `from` to columns of `to`.
///
/// # Safety
/// All of `from` is written, `to` is valid for writes of a tile; the level has AVX-512.
#[inline(always)]
unsafe fn transpose(from: &Square, to: *mut u8) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut x = [_mm512_setzero_si512(); 16];
        for i in 0..16 {
            x[i] = _mm512_loadu_si512(from.0.as_ptr().add(i * TILE).cast());
        }
        let mut twos = x;
        for i in 0..8 {
            twos[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
            twos[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
        }
        // `fours[4 g + j]`: in quarter q, column 4 q + j of lines 4 g to 4 g + 3.
        let mut fours = x;
        for g in 0..4 {
            for half in 0..2 {
                let (a, b) = (twos[4 * g + half], twos[4 * g + 2 + half]);
                fours[4 * g + 2 * half] = _mm512_unpacklo_epi64(a, b);
                fours[4 * g + 2 * half + 1] = _mm512_unpackhi_epi64(a, b);
            }
        }
        for j in 0..4 {
            let [a, b, c, d] = [fours[j], fours[4 + j], fours[8 + j], fours[12 + j]];
            let even = [_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0x88>(c, d)];
            let odd = [_mm512_shuffle_i32x4::<0xdd>(a, b), _mm512_shuffle_i32x4::<0xdd>(c, d)];
            let columns = [
                _mm512_shuffle_i32x4::<0x88>(even[0], even[1]),
                _mm512_shuffle_i32x4::<0x88>(odd[0], odd[1]),
                _mm512_shuffle_i32x4::<0xdd>(even[0], even[1]),
                _mm512_shuffle_i32x4::<0xdd>(odd[0], odd[1]),
            ];
            for (quarter, column) in columns.into_iter().enumerate() {
                _mm512_storeu_si512(to.add((4 * quarter + j) * LINE_BYTES).cast(), column);
            }
        }
    }
}

struct PackArgs {
    /// A multiple of [`DEPTH`].
    columns: usize,
    /// `[16][columns]`
    from: *const f32,
    /// `[columns / 32][high, low]` tiles: pairs of columns by heads.
    to: *mut u8,
}

/// Queries of 16 heads to operands.
struct Pack;

impl Kernel for Pack {
    type Args = PackArgs;

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &PackArgs) {
        let mut parts = [Square::new(), Square::new()];
        for tile in 0..args.columns / DEPTH {
            // SAFETY: the caller's promise: whole tiles of columns. The level has AVX-512, whose vectors are 64 bytes.
            unsafe {
                for head in 0..TILE {
                    let from = args.from.add(head * args.columns + tile * DEPTH);
                    let (first, second) = (split(s, s.load(from)), split(s, s.load(from.add(TILE))));
                    for part in 0..2 {
                        // The high halves of all lanes, in order.
                        let to = parts[part].line(head).cast::<u8>();
                        for (half, lanes) in [first[part], second[part]].into_iter().enumerate() {
                            let mut words = [0.0f32; TILE];
                            s.store(s.cast_to_f(s.shr(lanes, 16)), words.as_mut_ptr());
                            let words = _mm512_cvtepi32_epi16(_mm512_loadu_si512(words.as_ptr().cast()));
                            _mm256_storeu_si256(to.add(half * LINE_BYTES / 2).cast(), words);
                        }
                    }
                }
                for (part, square) in parts.iter().enumerate() {
                    transpose(square, args.to.add((2 * tile + part) * TILE_BYTES));
                }
            }
        }
    }
}

/// What scores are products of.
struct Products {
    /// [`TileRows`]
    keys: *const u8,
    key_tiles: usize,
    /// `[tile of heads]` of what [`Pack`] makes.
    queries: *const u8,
    /// Rows.
    count: usize,
}

impl Products {
    /// Groups of [`DEPTH`] rows, the last one with zeros.
    fn steps(&self) -> usize {
        self.count.div_ceil(DEPTH)
    }
}

struct ChunkArgs<'a> {
    products: Products,
    /// Rows to fetch.
    next: &'a [*const u8],
    /// `[tile of heads][CHUNK / 32][high, low]` tiles: heads by positions.
    weights: *mut u8,
    value_dim: usize,
    scale: f32,
    num_heads: usize,
    /// As in [`crate::attention::Sums`].
    largest: *mut f32,
    sums: *mut f32,
    weighted: *mut f32,
}

impl ChunkArgs<'_> {
    /// The tile of weights of these heads and positions.
    fn weights(&self, tile: usize, step: usize, part: usize) -> *mut u8 {
        self.weights.wrapping_add(((tile * (CHUNK / DEPTH) + step) * 2 + part) * TILE_BYTES)
    }
}

/// `[position][head]`: scores of a chunk for up to 32 heads.
#[repr(C, align(64))]
struct Scores([MaybeUninit<f32>; CHUNK * SCORE_HEADS]);

/// Heads of [`Scores`].
const SCORE_HEADS: usize = 2 * TILE;

/// `[CHUNK / 32][2]` tiles of values: pairs of positions by 16 columns.
#[repr(C, align(64))]
struct Values([MaybeUninit<u8>; CHUNK / DEPTH * 2 * TILE_BYTES]);

/// A chunk for all heads.
struct Chunk;

impl Kernel for Chunk {
    type Args = ChunkArgs<'static>;

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &ChunkArgs<'static>) {
        let mut scores = Scores([MaybeUninit::uninit(); _]);
        let mut values = [const { Values([MaybeUninit::uninit(); _]) }; 2];
        let tiles = args.num_heads / TILE;
        // Each step of scores fetches as many rows, column by column.
        let fetched = args.next.len().div_ceil(tiles.div_ceil(2) * args.products.steps());
        let mut next = args.next.chunks(fetched.max(1));
        // SAFETY: `args` holds rows, queries and state of all heads; each reads what the one before wrote; only levels with tiles run this.
        unsafe {
            configure(Shape { rows: TILE, cols: LINE_BYTES });
            for tile in (0..tiles).step_by(2) {
                for step in 0..args.products.steps() {
                    let next = next.next().unwrap_or(&[]);
                    if tile + 2 <= tiles {
                        score::<S, 2>(s, &args.products, tile, step, next, &mut scores);
                    } else {
                        score::<S, 1>(s, &args.products, tile, step, next, &mut scores);
                    }
                }
                for h in 0..2.min(tiles - tile) {
                    weigh(s, args, tile + h, h, &scores);
                }
            }
            interleave(&args.products, 0, &mut values[0]);
            for columns in 0..args.value_dim / DEPTH {
                for tile in (0..tiles).step_by(2) {
                    if tile + 2 <= tiles {
                        add_values::<2>(args, tile, columns, &values[columns % 2]);
                    } else {
                        add_values::<1>(args, tile, columns, &values[columns % 2]);
                    }
                    // Vectors work while tiles do.
                    if tile == 0 && (columns + 1) * DEPTH < args.value_dim {
                        interleave(&args.products, columns + 1, &mut values[(columns + 1) % 2]);
                    }
                }
            }
        }
    }
}

struct IndexArgs<'a> {
    products: Products,
    scale: f32,
    /// Of all heads.
    weights: &'a [f32],
    /// `[CHUNK]`, zeros.
    out: *mut f32,
}

/// Scores of the indexer.
struct Index;

impl Kernel for Index {
    type Args = IndexArgs<'static>;

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &IndexArgs<'static>) {
        let mut scores = Scores([MaybeUninit::uninit(); _]);
        let tiles = args.weights.len() / TILE;
        let scale = s.splat(args.scale);
        // SAFETY: `args` holds rows and queries; scores are read after they were written; only levels with tiles run this.
        unsafe {
            configure(Shape { rows: TILE, cols: LINE_BYTES });
            for tile in (0..tiles).step_by(2) {
                for step in 0..args.products.steps() {
                    if tile + 2 <= tiles {
                        score::<S, 2>(s, &args.products, tile, step, &[], &mut scores);
                    } else {
                        score::<S, 1>(s, &args.products, tile, step, &[], &mut scores);
                    }
                }
                for first in (0..args.products.count).step_by(4) {
                    let mut totals = [s.splat(0.0); 4];
                    for i in 0..4 {
                        for h in 0..2.min(tiles - tile) {
                            let at = (first + i) * SCORE_HEADS + h * TILE;
                            let score = s.mul(s.load(scores.0.as_ptr().add(at).cast()), scale);
                            let weight = s.load(args.weights.as_ptr().add((tile + h) * TILE));
                            totals[i] = s.mul_add(weight, s.max(score, s.splat(0.0)), totals[i]);
                        }
                    }
                    for (i, total) in s.sum_4(totals).into_iter().enumerate() {
                        *args.out.add(first + i) += total;
                    }
                }
            }
        }
    }
}

/// Scores of 32 positions for `H` tiles of heads from tile `tile` on. Fetches `next`.
///
/// # Safety
/// Queries, keys and heads exist, and the registers have the shape.
#[inline(always)]
unsafe fn score<S: Simd, const H: usize>(
    s: S,
    args: &Products,
    tile: usize,
    step: usize,
    next: &[*const u8],
    scores: &mut Scores,
) {
    let key_tiles = args.key_tiles;
    let keys = args.keys.wrapping_add(2 * step * key_tiles * TILE_BYTES);
    let queries = args.queries.wrapping_add(tile * key_tiles * 2 * TILE_BYTES);
    let scores = scores.0[step * DEPTH * SCORE_HEADS..][..DEPTH * SCORE_HEADS].as_mut_ptr();
    // SAFETY: the caller's promise. Nothing else touches tile registers.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            options(nomem, nostack, preserves_flags)
        );
        for column in 0..key_tiles {
            for row in next {
                s.prefetch_far(row.wrapping_add(column * LINE_BYTES));
            }
            let query = queries.add(2 * column * TILE_BYTES);
            asm!(
                "tileloadd tmm4, [{first} + {line}]",
                "tileloadd tmm5, [{second} + {line}]",
                "tileloadd tmm6, [{query} + {line}]",
                "tileloadd tmm7, [{query} + {line} + 1024]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm5, tmm6",
                "tdpbf16ps tmm0, tmm4, tmm7",
                "tdpbf16ps tmm1, tmm5, tmm7",
                first = in(reg) keys.add(column * TILE_BYTES),
                second = in(reg) keys.add((key_tiles + column) * TILE_BYTES),
                query = in(reg) query,
                line = in(reg) LINE_BYTES,
                options(nostack, readonly, preserves_flags)
            );
            if H == 2 {
                asm!(
                    "tileloadd tmm6, [{query} + {line}]",
                    "tileloadd tmm7, [{query} + {line} + 1024]",
                    "tdpbf16ps tmm2, tmm4, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm6",
                    "tdpbf16ps tmm2, tmm4, tmm7",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    query = in(reg) query.add(key_tiles * 2 * TILE_BYTES),
                    line = in(reg) LINE_BYTES,
                    options(nostack, readonly, preserves_flags)
                );
            }
        }
        asm!(
            "tilestored [{first} + {position}], tmm0",
            "tilestored [{second} + {position}], tmm1",
            first = in(reg) scores,
            second = in(reg) scores.add(TILE * SCORE_HEADS),
            position = in(reg) SCORE_HEADS * 4,
            options(nostack, preserves_flags)
        );
        if H == 2 {
            asm!(
                "tilestored [{first} + {position} + 64], tmm2",
                "tilestored [{second} + {position} + 64], tmm3",
                first = in(reg) scores,
                second = in(reg) scores.add(TILE * SCORE_HEADS),
                position = in(reg) SCORE_HEADS * 4,
                options(nostack, preserves_flags)
            );
        }
    }
}

/// The softmax of tile `tile` of heads, which is tile `h` of the scores: weights, sums, and what was before rescaled.
///
/// # Safety
/// Scores are there, and room for weights.
#[inline(always)]
unsafe fn weigh<S: Simd>(s: S, args: &ChunkArgs<'_>, tile: usize, h: usize, scores: &Scores) {
    let (count, scale) = (args.products.count, s.splat(args.scale));
    let first_score: *const f32 = scores.0[h * TILE..].as_ptr().cast();
    let (largest_to, sums_to) = (args.largest.wrapping_add(tile * TILE), args.sums.wrapping_add(tile * TILE));
    // SAFETY: the caller's promise.
    unsafe {
        let before = s.load(largest_to);
        let mut largest = before;
        for i in 0..count {
            largest = s.max(largest, s.mul(s.load(first_score.add(i * SCORE_HEADS)), scale));
        }
        let mut sum = s.splat(0.0);
        let mut parts = [Square::new(), Square::new()];
        for step in 0..args.products.steps() {
            for line in 0..TILE {
                let mut halves = [[s.splat_i(0); 2]; 2];
                for (odd, half) in halves.iter_mut().enumerate() {
                    let position = step * DEPTH + 2 * line + odd;
                    if position < count {
                        let score = s.mul(s.load(first_score.add(position * SCORE_HEADS)), scale);
                        let weight = exp(s, s.sub(score, largest));
                        sum = s.add(sum, weight);
                        *half = split(s, weight);
                    }
                }
                for part in 0..2 {
                    let both = s.or(s.shr(halves[0][part], 16), halves[1][part]);
                    s.store(s.cast_to_f(both), parts[part].line(line));
                }
            }
            for (part, square) in parts.iter().enumerate() {
                transpose(square, args.weights(tile, step, part));
            }
        }
        // The first chunk without a sink: minus infinity minus anything, and there is nothing to rescale.
        let factor = exp(s, s.sub(before, largest));
        s.store(s.mul_add(s.load(sums_to), factor, sum), sums_to);
        s.store(largest, largest_to);
        let mut factors = [0.0f32; TILE];
        s.store(factor, factors.as_mut_ptr());
        for (head, factor) in factors.into_iter().enumerate() {
            // A product with one changes nothing.
            if factor != 1.0 {
                let weighted = args.weighted.add((tile * TILE + head) * args.value_dim);
                for first in (0..args.value_dim).step_by(TILE) {
                    let at = weighted.add(first);
                    s.store(s.mul(s.load(at), s.splat(factor)), at);
                }
            }
        }
    }
}

/// Values of columns `32 * columns ..` as operands.
///
/// # Safety
/// There are so many; the level has AVX-512.
#[inline(always)]
unsafe fn interleave(args: &Products, columns: usize, values: &mut Values) {
    // SAFETY: the caller's promise.
    unsafe {
        let [low, high] = [interleaving(0), interleaving(1)];
        for step in 0..args.steps() {
            let to: *mut u8 = values.0[2 * step * TILE_BYTES..][..2 * TILE_BYTES].as_mut_ptr().cast();
            for line in 0..TILE {
                let tile = (2 * step + 2 * line / TILE) * args.key_tiles + columns;
                let from = args.keys.add(tile * TILE_BYTES + 2 * line % TILE * LINE_BYTES);
                let (even, odd) = (_mm512_loadu_si512(from.cast()), _mm512_loadu_si512(from.add(LINE_BYTES).cast()));
                let to = to.add(line * LINE_BYTES);
                _mm512_storeu_si512(to.cast(), _mm512_permutex2var_epi16(even, low, odd));
                _mm512_storeu_si512(to.add(TILE_BYTES).cast(), _mm512_permutex2var_epi16(even, high, odd));
            }
        }
    }
}

/// Adds weighted values for `H` tiles of heads from tile `tile` on, columns `32 * columns ..`.
///
/// # Safety
/// Heads, columns, weights and values are there, and the registers have the shape.
#[inline(always)]
unsafe fn add_values<const H: usize>(args: &ChunkArgs<'_>, tile: usize, columns: usize, values: &Values) {
    let weighted = args.weighted.wrapping_add(tile * TILE * args.value_dim + columns * DEPTH);
    let next_heads = weighted.wrapping_add(TILE * args.value_dim);
    let head_bytes = args.value_dim * 4;
    // SAFETY: the caller's promise. Nothing else touches tile registers.
    unsafe {
        asm!(
            "tileloadd tmm0, [{to} + {head}]",
            "tileloadd tmm1, [{to} + {head} + 64]",
            to = in(reg) weighted,
            head = in(reg) head_bytes,
            options(nostack, readonly, preserves_flags)
        );
        if H == 2 {
            asm!(
                "tileloadd tmm2, [{to} + {head}]",
                "tileloadd tmm3, [{to} + {head} + 64]",
                to = in(reg) next_heads,
                head = in(reg) head_bytes,
                options(nostack, readonly, preserves_flags)
            );
        }
        for step in 0..args.products.steps() {
            asm!(
                "tileloadd tmm6, [{values} + {line}]",
                "tileloadd tmm7, [{values} + {line} + 1024]",
                "tileloadd tmm4, [{weights} + {line}]",
                "tileloadd tmm5, [{weights} + {line} + 1024]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm0, tmm5, tmm6",
                "tdpbf16ps tmm1, tmm5, tmm7",
                values = in(reg) values.0.as_ptr().add(2 * step * TILE_BYTES),
                weights = in(reg) args.weights(tile, step, 0),
                line = in(reg) LINE_BYTES,
                options(nostack, readonly, preserves_flags)
            );
            if H == 2 {
                asm!(
                    "tileloadd tmm4, [{weights} + {line}]",
                    "tileloadd tmm5, [{weights} + {line} + 1024]",
                    "tdpbf16ps tmm2, tmm4, tmm6",
                    "tdpbf16ps tmm3, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    weights = in(reg) args.weights(tile + 1, step, 0),
                    line = in(reg) LINE_BYTES,
                    options(nostack, readonly, preserves_flags)
                );
            }
        }
        asm!(
            "tilestored [{to} + {head}], tmm0",
            "tilestored [{to} + {head} + 64], tmm1",
            to = in(reg) weighted,
            head = in(reg) head_bytes,
            options(nostack, preserves_flags)
        );
        if H == 2 {
            asm!(
                "tilestored [{to} + {head}], tmm2",
                "tilestored [{to} + {head} + 64], tmm3",
                to = in(reg) next_heads,
                head = in(reg) head_bytes,
                options(nostack, preserves_flags)
            );
        }
    }
}
