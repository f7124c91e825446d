//! Products of activation rows with weight tiles: the kernels where nearly all bytes of a step are read.
//!
//! A kernel call reads up to four tiles at once (streams: memory is faster when several are read in parallel, and
//! their accumulators hide the latency of each other) and multiplies every decoded line with up to eight activation
//! rows. Whatever the numbers, a row's result comes from the same operations in the same order:
//!
//! - 8-bit activations: exact i32 sums of the columns that share a scale (16 for NVFP4, 64 for affine groups of 64 and
//!   more, else 32); then f32, fused multiply-adds, scale after scale and group after group;
//! - f32 activations: one fused multiply-add a column, in order.
//!
//! So a row gives the same bits alone, in a batch, on any number of threads and at any [`crate::CpuLevel`].
//!
//! `unsafe`: unchecked reads of tiles and rows; [`multiply`] checks lengths first.
#![allow(unsafe_code)]
// Loops run over arrays of registers, several at once; iterators would hide vectors in closures.
#![allow(clippy::needless_range_loop)]

#[cfg(target_arch = "x86_64")]
mod amx;
mod codes;
mod e4m3;
mod exact;
mod expanded;
mod float;
mod int8;
mod wide;

use crate::activations::{Across, Int8Layout};
use crate::layout::{Coding, NVFP4_SCALE_EXPONENT, TILE_ROWS, TileLayout};
use crate::pack::TileMap;
use crate::simd::{Kernel, Level, Simd};
use codes::{Affine, E2m1};
use expanded::Expansion;
pub(crate) use expanded::{Gathered, reads_rows_across};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Streams that any kernel reads at most.
pub(crate) const MAX_STREAMS: usize = 4;
/// Activation rows that any kernel takes at most.
pub(crate) const MAX_ROWS: usize = 8;
/// Activation rows that [`Product::run`] takes at most: 64 rows of 2048 columns stay in L2 while tile after tile is
/// multiplied with them.
pub(crate) const ROW_BLOCK: usize = 64;
/// How far ahead of the reads lines are fetched into the nearest cache, in each stream.
const PREFETCH_BYTES: usize = 512;
/// And into the next one: the nearest cache has room for too few lines on their way to hide what memory takes (the commit that brought
/// it has steps with both and with one fetch 2 KiB ahead).
const PREFETCH_FAR_BYTES: usize = 2048;
/// Where a kernel reads one stream alone (eight rows): 2 KiB of one stream are fewer lines than memory has on their way.
const PREFETCH_FAR_ALONE_BYTES: usize = 8192;

/// The form in which a kernel reads activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RowForm {
    /// `[padded_cols]` f32.
    F32,
    /// [`Int8Layout`] with a scale for so many blocks.
    Int8 {
        /// [`Int8Layout::scale_blocks`]
        scale_blocks: usize,
    },
}

/// How activations meet quantized weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ActivationMode {
    /// f32 activations times dequantized weights, f32 accumulation: for references and golden tests.
    Exact,
    /// Activations rounded to 8 bits with one scale per 32 columns, or 64 where the weights' own groups have 64 or more, for
    /// integer and E2M1 weights; f32 for the others.
    #[default]
    Int8,
}

impl ActivationMode {
    /// The form of activations for weights of this layout.
    pub(crate) fn row_form(self, layout: &TileLayout) -> RowForm {
        match (self, layout.coding) {
            (ActivationMode::Exact, _) => RowForm::F32,
            (ActivationMode::Int8, Coding::Affine { .. } | Coding::Mxfp4 | Coding::Nvfp4) => {
                RowForm::Int8 { scale_blocks: layout.scale_blocks }
            }
            // 8-bit floats have 4 significant bits and a wide range: as integers they would lose it.
            (ActivationMode::Int8, Coding::F32 | Coding::F16 | Coding::Bf16 | Coding::Fp8Block | Coding::Mxfp8) => {
                RowForm::F32
            }
        }
    }
}

/// What a kernel works on.
pub(crate) struct TileArgs<'a> {
    layout: &'a TileLayout,
    int8: Option<&'a Int8Layout>,
    tiles: [*const u8; MAX_STREAMS],
    rows: [*const u8; MAX_ROWS],
    /// Expanded tiles only: the blocks that `tiles` hold. Sums of those before are in `out`.
    first_block: usize,
    end_block: usize,
    /// Expanded tiles only: [`codes::Codes::STEPS`].
    wide_steps: usize,
    /// Multiplied with every output.
    global_scale: f32,
    /// `[streams][rows][16]`
    out: *mut f32,
}

/// Kernels in every size.
const ALL_SIZES: [usize; 4] = [4, 2, 2, 1];

/// The entry of a [`Simd::STREAMS`] for `rows` rows.
const fn streams_for(streams: [usize; 4], rows: usize) -> usize {
    match rows {
        1 => streams[0],
        2 => streams[1],
        3 | 4 => streams[2],
        _ => streams[3],
    }
}

/// A kernel for `T` tiles and `R` rows.
trait TileKernel {
    /// [`Simd::STREAMS`] of the kernel: one that is not made for speed comes in fewer sizes, because every size is
    /// compiled for every level.
    const STREAMS: [usize; 4] = ALL_SIZES;
    /// [`Kernel::BYTE_DOTS`]
    const BYTE_DOTS: bool = false;
    /// [`Kernel::WIDE_DOTS`]
    #[cfg_attr(not(target_arch = "aarch64"), allow(dead_code, reason = "levels that care are of AArch64"))]
    const WIDE_DOTS: bool = false;
    /// [`Kernel::LOOKS_UP`]
    const LOOKS_UP: bool = false;

    /// # Safety
    /// `args` holds `T` whole tiles of the layout, `R` rows in the kernel's form and room for `T * R * 16` floats.
    unsafe fn run<S: Simd, const T: usize, const R: usize>(s: S, args: &TileArgs<'_>);
}

struct Sized<B, const T: usize, const R: usize>(PhantomData<B>);

impl<B: TileKernel, const T: usize, const R: usize> Kernel for Sized<B, T, R> {
    type Args = TileArgs<'static>;

    const BYTE_DOTS: bool = B::BYTE_DOTS;
    const WIDE_DOTS: bool = B::WIDE_DOTS;
    const LOOKS_UP: bool = B::LOOKS_UP;

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &TileArgs<'static>) {
        if const { T <= streams_for(S::STREAMS, R) && T <= streams_for(B::STREAMS, R) } {
            // SAFETY: the caller's promise.
            unsafe { B::run::<S, T, R>(s, args) }
        } else {
            unreachable!("`Product::run` calls kernels in the sizes that their level has")
        }
    }
}

/// # Safety
/// As [`TileKernel::run`].
unsafe fn run_sized<B: TileKernel>(level: Level, streams: usize, rows: usize, args: &TileArgs<'_>) {
    // SAFETY: only the lifetime changes, and no kernel keeps its arguments.
    let args = unsafe { std::mem::transmute::<&TileArgs<'_>, &TileArgs<'static>>(args) };
    // SAFETY: the caller's promise.
    unsafe {
        match (streams, rows) {
            (4, 1) => level.call::<Sized<B, 4, 1>>(args),
            (2, 1) => level.call::<Sized<B, 2, 1>>(args),
            (2, 2) => level.call::<Sized<B, 2, 2>>(args),
            (2, 3) => level.call::<Sized<B, 2, 3>>(args),
            (2, 4) => level.call::<Sized<B, 2, 4>>(args),
            (1, 1) => level.call::<Sized<B, 1, 1>>(args),
            (1, 2) => level.call::<Sized<B, 1, 2>>(args),
            (1, 3) => level.call::<Sized<B, 1, 3>>(args),
            (1, 4) => level.call::<Sized<B, 1, 4>>(args),
            (1, 8) => level.call::<Sized<B, 1, 8>>(args),
            (streams, rows) => unreachable!("`Product::run` never asks for {streams} tiles and {rows} rows"),
        }
    }
}

/// Activation rows that products read.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    form: RowForm,
    int8: Option<&'a Int8Layout>,
    first: *const u8,
    len_bytes: usize,
    stride_bytes: usize,
    /// Numbers of the 8-bit rows from `first` on. Then [`Across::ROWS`] rows behind the last one may be read as well.
    across: Option<Across>,
    ids: &'a [u32],
}

impl<'a> Rows<'a> {
    /// Rows in form `form` (8-bit rows with their layout), `stride_bytes` apart from `first` on, of which `ids` are to
    /// be multiplied, in this order.
    ///
    /// # Safety
    /// `len_bytes` bytes from `first` on are valid for reads, and nobody writes them, as long as the value is used.
    pub(crate) unsafe fn new(
        form: RowForm,
        int8: Option<&'a Int8Layout>,
        first: *const u8,
        len_bytes: usize,
        stride_bytes: usize,
        ids: &'a [u32],
    ) -> Self {
        Rows { form, int8, first, len_bytes, stride_bytes, across: None, ids }
    }

    /// The same rows, their numbers side by side as well.
    ///
    /// # Safety
    /// `across` holds the numbers of all rows, and nobody writes them; [`Across::ROWS`] rows behind the last one are valid
    /// for reads, whatever is in them.
    pub(crate) unsafe fn with_across(self, across: Across) -> Self {
        Rows { across: Some(across), ..self }
    }

    /// Other rows of the same buffer.
    pub(crate) fn with_ids<'b>(&self, ids: &'b [u32]) -> Rows<'b>
    where
        'a: 'b,
    {
        Rows { ids, ..*self }
    }

    /// Whether `other` is the same rows of the same buffer in the same form.
    pub(crate) fn are_those_of(&self, other: &Rows<'_>) -> bool {
        self.first == other.first && self.form == other.form && std::ptr::eq(self.ids, other.ids)
    }

    /// Which rows.
    pub(crate) fn ids(&self) -> &'a [u32] {
        self.ids
    }
}

/// Multiplies tiles `tiles` of matrix `matrix` with `rows` and hands all results to `sink(tile, i, values)`: 16 outputs each of the
/// rows `rows.ids()[i..i + values.len()]`.
///
/// # Panics
/// If tiles, rows or their layouts do not fit each other.
pub(crate) fn multiply(
    level: Level,
    mode: ActivationMode,
    weights: (&[u8], &TileMap),
    matrix: usize,
    tiles: Range<usize>,
    rows: &Rows<'_>,
    mut sink: impl FnMut(usize, usize, &[[f32; TILE_ROWS]]),
) {
    let product = Product::new(level, mode, weights, matrix, tiles.clone(), rows);
    #[cfg(target_arch = "x86_64")]
    let _tiles = crate::simd::amx::Use;
    let mut gathered = Gathered::default();
    for (number, ids) in rows.ids.chunks(ROW_BLOCK).enumerate() {
        let rows = product.side_by_side(&rows.with_ids(ids), &mut gathered);
        for_each_tile_group(product.max_streams(ids.len()), tiles.clone(), |first, step, streams| {
            let tile = |t| first + t * step;
            product.run(&rows, tile, streams, &mut |t, i, values| sink(tile(t), number * ROW_BLOCK + i, values));
        });
    }
}

/// Lines at the start of each stream that [`fetch_starts`] fetches.
const START_LINES: usize = 16;

/// Fetches the first lines of tiles that will be multiplied next with `num_rows` rows, from elsewhere in memory than those
/// now: kernels fetch what follows.
///
/// # Panics
/// If the tiles are not there.
pub(crate) fn fetch_starts(
    level: Level,
    mode: ActivationMode,
    (bytes, map): (&[u8], &TileMap),
    matrix: usize,
    tiles: Range<usize>,
    num_rows: usize,
) {
    let product = Product { level, mode, bytes, map, matrix, row_bytes: 0 };
    let mut starts = Starts { lines: [std::ptr::null(); MAX_STREAMS], count: 0 };
    starts.count = product.max_streams(num_rows).min(tiles.len());
    for t in 0..starts.count {
        let tile = tiles.start + t * (tiles.len() / starts.count);
        starts.lines[t] = bytes[map.tile_offset(matrix, tile)..].as_ptr();
    }
    // SAFETY: fetching is a hint, allowed for any address.
    unsafe { level.call::<Starts>(&starts) }
}

/// Where streams begin.
struct Starts {
    lines: [*const u8; MAX_STREAMS],
    count: usize,
}

impl Kernel for Starts {
    type Args = Starts;

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &Starts) {
        for line in 0..START_LINES {
            for start in &args.lines[..args.count] {
                s.prefetch_far(start.wrapping_add(line * crate::layout::LINE_BYTES));
            }
        }
    }
}

/// Calls `each(first, step, streams)`: tiles `first + t * step` for `t < streams` are read at once. A stream runs through
/// consecutive tiles, so that hardware prefetchers and our own find the next one where they look for it.
pub(crate) fn for_each_tile_group(max_streams: usize, tiles: Range<usize>, mut each: impl FnMut(usize, usize, usize)) {
    let mut rest = tiles;
    let mut streams = max_streams;
    while !rest.is_empty() {
        let steps = rest.len() / streams;
        for step in 0..steps {
            each(rest.start + step, steps, streams);
        }
        rest.start += steps * streams;
        streams = (streams / 2).max(1);
    }
}

/// A checked product: layouts and forms agree, tiles are inside their buffer.
pub(crate) struct Product<'a> {
    level: Level,
    mode: ActivationMode,
    bytes: &'a [u8],
    map: &'a TileMap,
    matrix: usize,
    row_bytes: usize,
}

impl<'a> Product<'a> {
    /// Checks tiles and forms.
    ///
    /// # Panics
    /// If the tiles are not there, or `rows` have another form or length than the kernel reads.
    pub(crate) fn new(
        level: Level,
        mode: ActivationMode,
        (bytes, map): (&'a [u8], &'a TileMap),
        matrix: usize,
        tiles: Range<usize>,
        rows: &Rows<'_>,
    ) -> Self {
        let layout = &map.layout;
        assert!(matrix < map.count && tiles.end <= map.tiles, "tiles {tiles:?} of matrix {matrix}");
        let end = map.tile_offset(matrix, tiles.end.max(1) - 1) + layout.tile_bytes;
        assert!(end <= bytes.len(), "tiles end at {end} of {} bytes", bytes.len());
        assert_eq!(rows.form, mode.row_form(layout), "form of the activations");
        let row_bytes = match (rows.form, rows.int8) {
            (RowForm::F32, _) => layout.padded_cols() * 4,
            (RowForm::Int8 { scale_blocks }, Some(int8)) => {
                let found = (int8.blocks, int8.scale_blocks);
                assert_eq!(found, (layout.blocks, scale_blocks), "blocks of the 8-bit activations, and of a scale");
                int8.row_bytes
            }
            (RowForm::Int8 { .. }, None) => unreachable!("8-bit rows come with their layout"),
        };
        Product { level, mode, bytes, map, matrix, row_bytes }
    }

    /// Multiplies tiles `tile(0..streams)` with all of `rows` (up to [`ROW_BLOCK`] of those that [`Product::new`] saw, or
    /// others of the same buffer; `streams` is [`Product::max_streams`] of their number, or less) and hands `sink(t, i, values)` the
    /// results of tile `tile(t)` and rows `rows.ids()[i..i + values.len()]`, as often as it takes.
    #[inline]
    pub(crate) fn run(
        &self,
        rows: &Rows<'_>,
        tile: impl Fn(usize) -> usize,
        streams: usize,
        sink: &mut impl FnMut(usize, usize, &[[f32; TILE_ROWS]]),
    ) {
        let layout = &self.map.layout;
        let max_rows = match self.streams() {
            [_, 0, _, _] => 1,
            [_, _, 0, _] => 2,
            [_, _, _, 0] => 4,
            _ => MAX_ROWS,
        };
        // Written by kernels before it is read.
        let mut out = MaybeUninit::<[[f32; TILE_ROWS]; MAX_STREAMS * MAX_ROWS]>::uninit();
        let mut args = TileArgs {
            layout,
            int8: rows.int8,
            tiles: [std::ptr::null(); MAX_STREAMS],
            rows: [std::ptr::null(); MAX_ROWS],
            first_block: 0,
            end_block: layout.blocks,
            wide_steps: 0,
            global_scale: self.map.global_scales[self.matrix],
            out: out.as_mut_ptr().cast(),
        };
        for (t, slot) in args.tiles.iter_mut().enumerate().take(streams) {
            // A slice index: a tile outside of the buffer panics.
            *slot = self.bytes[self.map.tile_offset(self.matrix, tile(t))..][..layout.tile_bytes].as_ptr();
        }
        let mut done = match self.expansion(rows.ids.len()) {
            Expansion::Packed => 0,
            expansion => self.run_expanded(expansion, rows, streams, args.tiles, sink),
        };
        while done < rows.ids.len() {
            // Sizes are 1, 2, 3, 4 and 8 rows: five are four and one, and the second pass finds the tile in a cache.
            let count = match (rows.ids.len() - done).min(max_rows) {
                5..=7 => 4,
                count => count,
            };
            self.set_rows(rows, &rows.ids[done..done + count], &mut args);
            // SAFETY: tiles and rows were cut out of their buffers above; `new` checked that layouts and forms agree;
            // `out` has room for the largest kernel.
            unsafe { self.dispatch(streams, count, &args) };
            for t in 0..streams {
                let first = args.out.cast::<[f32; TILE_ROWS]>().wrapping_add(t * count);
                // SAFETY: the kernel wrote `streams * count` results.
                sink(t, done, unsafe { std::slice::from_raw_parts(first, count) });
            }
            done += count;
        }
    }

    /// Points `args` at rows `ids`.
    fn set_rows(&self, rows: &Rows<'_>, ids: &[u32], args: &mut TileArgs<'_>) {
        for (slot, id) in args.rows.iter_mut().zip(ids) {
            *slot = self.row(rows, *id);
        }
    }

    /// Where row `id` starts.
    ///
    /// # Panics
    /// If it is not whole.
    fn row(&self, rows: &Rows<'_>, id: u32) -> *const u8 {
        let end = id as usize * rows.stride_bytes + self.row_bytes;
        assert!(end <= rows.len_bytes, "row {id} ends at {end} of {} bytes", rows.len_bytes);
        rows.first.wrapping_add(id as usize * rows.stride_bytes)
    }

    /// How many tiles to read at once when `num_rows` rows are multiplied.
    pub(crate) fn max_streams(&self, num_rows: usize) -> usize {
        match self.expansion(num_rows) {
            // Five to seven rows are four and the rest, each in a pass of its own (`run`).
            Expansion::Packed => match num_rows {
                5..=7 => streams_for(self.streams(), 4).max(1),
                _ => streams_for(self.streams(), num_rows).max(1),
            },
            // One stream: what a core reads while it multiplies is then all that its caches wait for.
            Expansion::Amx => 1,
            Expansion::Wide => expanded::STREAMS.min(streams_for(self.level.streams(), expanded::WIDE_ROWS)),
        }
    }

    /// Sizes in which the kernel of this coding exists at this level.
    fn streams(&self) -> [usize; 4] {
        let kernel = match (self.mode, self.map.layout.coding) {
            (ActivationMode::Exact, Coding::Affine { .. } | Coding::Mxfp4 | Coding::Nvfp4) => exact::SIZES,
            (ActivationMode::Exact, Coding::F32 | Coding::F16 | Coding::Bf16 | Coding::Fp8Block | Coding::Mxfp8)
            | (ActivationMode::Int8, _) => ALL_SIZES,
        };
        let level = self.level.streams();
        std::array::from_fn(|i| kernel[i].min(level[i]))
    }

    /// # Safety
    /// As [`TileKernel::run`].
    unsafe fn dispatch(&self, streams: usize, rows: usize, args: &TileArgs<'_>) {
        let level = self.level;
        // SAFETY: the caller's promise.
        unsafe {
            match (self.map.layout.coding, self.mode) {
                (Coding::F32, _) => run_sized::<float::F32>(level, streams, rows, args),
                (Coding::F16, _) => run_sized::<float::F16>(level, streams, rows, args),
                (Coding::Bf16, _) => run_sized::<float::Bf16>(level, streams, rows, args),
                (Coding::Fp8Block | Coding::Mxfp8, _) => run_sized::<e4m3::E4m3>(level, streams, rows, args),
                (Coding::Affine { bits }, ActivationMode::Int8) => match bits {
                    2 => run_sized::<int8::Grouped<Affine<2>>>(level, streams, rows, args),
                    3 => run_sized::<int8::Grouped<Affine<3>>>(level, streams, rows, args),
                    4 => run_sized::<int8::Grouped<Affine<4>>>(level, streams, rows, args),
                    5 => run_sized::<int8::Grouped<Affine<5>>>(level, streams, rows, args),
                    6 => run_sized::<int8::Grouped<Affine<6>>>(level, streams, rows, args),
                    8 => run_sized::<int8::Grouped<Affine<8>>>(level, streams, rows, args),
                    other => unreachable!("affine codes of {other} bits: WeightFormat::validate"),
                },
                (Coding::Mxfp4, ActivationMode::Int8) => run_sized::<int8::Mxfp4<E2m1>>(level, streams, rows, args),
                (Coding::Nvfp4, ActivationMode::Int8) => run_sized::<int8::Nvfp4<E2m1>>(level, streams, rows, args),
                (Coding::Affine { .. } | Coding::Mxfp4 | Coding::Nvfp4, ActivationMode::Exact) => {
                    run_sized::<exact::Exact>(level, streams, rows, args);
                }
            }
        }
    }
}

/// Fetches what one of `T` streams, which is at `at`, reads soon.
#[inline(always)]
fn fetch_ahead<S: Simd, const T: usize>(s: S, at: *const u8) {
    s.prefetch(at.wrapping_add(PREFETCH_BYTES));
    s.prefetch_far(at.wrapping_add(if T == 1 { PREFETCH_FAR_ALONE_BYTES } else { PREFETCH_FAR_BYTES }));
}

/// Writes the accumulators times the global scale.
///
/// # Safety
/// `args.out` has room for `T * R * 16` floats.
#[inline(always)]
unsafe fn finish<S: Simd, const T: usize, const R: usize>(
    s: S,
    args: &TileArgs<'_>,
    factor: f32,
    total: &[[S::F; R]; T],
) {
    let factor = s.splat(args.global_scale * factor);
    for t in 0..T {
        for r in 0..R {
            // SAFETY: the caller's promise.
            unsafe { s.store(s.mul(total[t][r], factor), args.out.add((t * R + r) * TILE_ROWS)) };
        }
    }
}

/// The number of type `F32`, `F16` or `Bf16` in each of 16 lanes.
///
/// # Safety
/// `from` is valid for reads of 16 numbers.
#[inline(always)]
unsafe fn load_scales<S: Simd>(s: S, dtype: moellon_tensor::ScaleDtype, from: *const u8) -> S::F {
    use moellon_tensor::ScaleDtype;
    // SAFETY: the caller's promise.
    unsafe {
        match dtype {
            ScaleDtype::F32 => s.load(from.cast()),
            ScaleDtype::F16 => s.load_f16(from),
            ScaleDtype::Bf16 => s.cast_to_f(s.shl(s.load_u16(from), 16)),
        }
    }
}

/// E8M0 scales of 16 rows. Code 255 (NaN) does not occur: loading refuses it.
///
/// # Safety
/// `from` is valid for reads of 16 bytes.
#[inline(always)]
unsafe fn load_e8m0<S: Simd>(s: S, from: *const u8) -> S::F {
    // SAFETY: the caller's promise.
    let codes = unsafe { s.load_u8(from) };
    // 2^(code - 127): the code is the exponent, except code 0, which is the subnormal 2^-127.
    let exponent = s.shl(codes, 23);
    let is_zero = s.greater(s.splat_i(1), codes);
    s.cast_to_f(s.or(exponent, s.and(is_zero, s.splat_i(1 << 22))))
}

/// NVFP4 scales of 16 rows for both halves of block `within` (0 or 1) of a record.
///
/// # Safety
/// `line` is the record's line of scales, behind its codes.
#[inline(always)]
unsafe fn nvfp4_scales<S: Simd>(s: S, line: *const u8, within: usize) -> [S::F; 2] {
    // The block's two bytes of each row end up in the upper half of its lane; below is anything. For the first block two
    // bytes of codes are read as well.
    // SAFETY: the caller's promise.
    let lanes = unsafe { s.load_i(line.sub(2).add(2 * within)) };
    [nvfp4_scale_lanes(s, s.shl(lanes, 4)), nvfp4_scale_lanes(s, s.shr(lanes, 4))]
}

/// The values of scales in bits 20 to 27 of the lanes (what else is there does not matter).
#[inline(always)]
fn nvfp4_scale_lanes<S: Simd>(s: S, moved: S::I) -> S::F {
    let bits = s.and(moved, s.splat_i(0x0ff0_0000));
    s.cast_to_f(s.add_i(bits, s.splat_i((NVFP4_SCALE_EXPONENT << 23) as i32)))
}

/// The values of E4M3 codes in the top bytes of the lanes (what is below does not matter).
#[inline(always)]
fn e4m3_value<S: Simd>(s: S, top: S::I) -> S::F {
    // Sign, four bits of exponent and three of mantissa go where f32 has them; a product moves the exponent's bias from
    // 7 to 127 and normalises subnormals, exactly. 0x7F is 480; where that should be NaN, loading refuses it.
    let bits = s.and(s.sar(top, 4), s.splat_i(0x87f0_0000_u32 as i32));
    s.mul(s.cast_to_f(bits), s.splat(f32::from_bits((127 + 120) << 23)))
}

#[cfg(test)]
mod tests;
