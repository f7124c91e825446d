//! Products with many rows: tiles are unpacked for all rows of a block, part by part ([`super::wide`]) or, for tile registers, record by
//! record ([`super::amx`]).

#[cfg(target_arch = "x86_64")]
use super::amx;
#[cfg(target_arch = "x86_64")]
use super::codes::E2M1_FACTOR;
use super::codes::{Affine, Codes, E2m1, Wide, steps_of_bits};
use super::{MAX_ROWS, MAX_STREAMS, Product, ROW_BLOCK, Rows, Sized, TileArgs, TileKernel, int8, streams_for, wide};
use crate::activations::Across;
use crate::layout::{BLOCK_COLS, Coding, LINE_BYTES, TILE_ROWS};
use crate::product::ActivationMode;
use crate::simd::Level;
use std::cell::Cell;
use std::mem::MaybeUninit;

/// Rows from which on tiles are expanded: four calls of four rows pay for it. Two calls do not: the second finds the tile
/// in the nearest cache, and unpacking again costs less than writing and reading what was unpacked.
const EXPAND_ROWS: usize = 16;
/// Rows from which on tile registers are at least as fast as dot products of bytes, by `kernel_speed` with both levels.
#[cfg(target_arch = "x86_64")]
const AMX_ROWS: usize = 5;
/// Rows of a call with expanded tiles.
pub(super) const WIDE_ROWS: usize = 4;
/// Expanded tiles that a call reads at most.
pub(super) const STREAMS: usize = 2;

/// What is done with tiles before they are multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Expansion {
    /// Nothing: every call unpacks.
    Packed,
    /// Expanded, for dot products of bytes.
    Wide,
    /// Record by record, for tile registers.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "no other processor has them"))]
    Amx,
}

/// Memory for rows that are copied to stand side by side: a thread's own, kept from one product to the next.
#[derive(Default)]
pub(crate) struct Gathered {
    lines: Vec<Line>,
}

#[derive(Clone, Copy)]
#[repr(align(64))]
#[allow(dead_code, reason = "read as bytes")]
struct Line([u8; LINE_BYTES]);

thread_local! {
    static KEPT: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

impl Gathered {
    /// Room for `num_lines` lines.
    fn room(&mut self, num_lines: usize) -> *mut u8 {
        if self.lines.is_empty() {
            self.lines = KEPT.take();
        }
        if self.lines.len() < num_lines {
            self.lines.resize(num_lines.next_power_of_two(), Line([0; LINE_BYTES]));
        }
        self.lines.as_mut_ptr().cast()
    }
}

impl Drop for Gathered {
    fn drop(&mut self) {
        if !self.lines.is_empty() {
            KEPT.set(std::mem::take(&mut self.lines));
        }
    }
}

/// 0, 1, 2, ..: ids of rows that stand side by side.
static FIRST_IDS: [u32; ROW_BLOCK] = {
    let mut ids = [0; ROW_BLOCK];
    let mut i = 0;
    while i < ROW_BLOCK {
        ids[i] = i as u32;
        i += 1;
    }
    ids
};

/// Whether products at `level` with `num_rows` rows may read rows across ([`Rows::with_across`]).
pub(crate) fn reads_rows_across(level: Level, num_rows: usize) -> bool {
    #[cfg(target_arch = "x86_64")]
    return level.has_tiles() && num_rows >= AMX_ROWS;
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (level, num_rows);
        false
    }
}

impl Product<'_> {
    /// How `num_rows` rows are multiplied at this level.
    pub(super) fn expansion(&self, num_rows: usize) -> Expansion {
        let (integers, small_codes) = match self.map.layout.coding {
            Coding::Affine { bits } => (true, bits < 8),
            Coding::Mxfp4 | Coding::Nvfp4 => (true, true),
            Coding::F32 | Coding::F16 | Coding::Bf16 | Coding::Fp8Block | Coding::Mxfp8 => (false, false),
        };
        if self.mode != ActivationMode::Int8 || !integers {
            return Expansion::Packed;
        }
        #[cfg(target_arch = "x86_64")]
        if reads_rows_across(self.level, num_rows) {
            return Expansion::Amx;
        }
        let has_kernels = small_codes && streams_for(self.level.streams(), WIDE_ROWS) > 0;
        if has_kernels && num_rows >= EXPAND_ROWS { Expansion::Wide } else { Expansion::Packed }
    }

    /// Whether `other` reads `num_rows` rows as this product does.
    pub(crate) fn expands_as(&self, other: &Product<'_>, num_rows: usize) -> bool {
        self.expansion(num_rows) == other.expansion(num_rows)
    }

    /// `rows` (at most [`ROW_BLOCK`]) as [`Product::run`] wants them: for tile registers copied to `gathered`, unless they
    /// stand one after the other with their numbers across.
    pub(crate) fn side_by_side<'b>(&self, rows: &Rows<'b>, gathered: &'b mut Gathered) -> Rows<'b> {
        let num_rows = rows.ids.len();
        assert!(num_rows <= ROW_BLOCK, "{num_rows} rows, expected at most {ROW_BLOCK}");
        let is_ready = rows.across.is_some() && are_consecutive(rows.ids);
        let (Expansion::Amx, Some(int8), false) = (self.expansion(num_rows), rows.int8, is_ready) else {
            return *rows;
        };
        let codes_bytes = int8.blocks * BLOCK_COLS;
        // An odd number of lines, or the rows would share a few sets of the nearest cache.
        let lines = codes_bytes.div_ceil(LINE_BYTES) | 1;
        let (stride_bytes, padded) = (lines * LINE_BYTES, num_rows.next_multiple_of(Across::ROWS));
        let across_lines = Across::num_floats(int8, num_rows).div_ceil(LINE_BYTES / 4);
        let room = gathered.room(padded * lines + across_lines);
        let across = Across::new(room.wrapping_add(padded * stride_bytes).cast(), num_rows);
        for (i, id) in rows.ids.iter().enumerate() {
            let from = self.row(rows, *id);
            // SAFETY: `row` checked that the row is whole, and there is room for all codes and numbers.
            unsafe {
                std::ptr::copy_nonoverlapping(from, room.add(i * stride_bytes), codes_bytes);
                across.at_row(i).copy(int8, from, [0, int8.blocks]);
            }
        }
        let len_bytes = num_rows * stride_bytes;
        Rows { first: room, len_bytes, stride_bytes, across: Some(across), ids: &FIRST_IDS[..num_rows], ..*rows }
    }

    /// Multiplies rows with up to [`STREAMS`] tiles that the kernel unpacks for more than one call, and returns how many: as many of
    /// the first ones as the kernel takes.
    pub(super) fn run_expanded(
        &self,
        expansion: Expansion,
        rows: &Rows<'_>,
        streams: usize,
        tiles: [*const u8; MAX_STREAMS],
        sink: &mut impl FnMut(usize, usize, &[[f32; TILE_ROWS]]),
    ) -> usize {
        assert!(rows.ids.len() <= ROW_BLOCK && streams <= STREAMS);
        let mut out = MaybeUninit::<[[f32; TILE_ROWS]; STREAMS * ROW_BLOCK]>::uninit();
        let out: *mut [f32; TILE_ROWS] = out.as_mut_ptr().cast();
        #[cfg(target_arch = "x86_64")]
        if expansion == Expansion::Amx {
            let count = rows.ids.len();
            for (t, tile) in tiles.into_iter().enumerate().take(streams) {
                self.multiply_amx(rows, tile, out.wrapping_add(t * ROW_BLOCK));
            }
            // SAFETY: the kernel wrote the results of all rows, in order.
            hand_over([streams, count], |t, i| unsafe { &*out.add(t * ROW_BLOCK + i) }, sink);
            return count;
        }
        let _ = expansion;
        let count = rows.ids.len() / WIDE_ROWS * WIDE_ROWS;
        let rows = rows.with_ids(&rows.ids[..count]);
        let mut parts = [const { wide::Part([MaybeUninit::uninit(); _]) }; STREAMS];
        let layout = &self.map.layout;
        let mut end = 0;
        while end < layout.blocks {
            let blocks = end..(end + wide::PART_BLOCKS).min(layout.blocks);
            end = blocks.end;
            for (t, part) in parts.iter_mut().enumerate().take(streams) {
                let to = part.0.as_mut_ptr().cast::<u8>();
                let from = tiles[t].wrapping_add(layout.block_offset(blocks.start));
                let expand = wide::ExpandArgs { layout, from, blocks: blocks.len(), to };
                // SAFETY: the tile is whole, and the part has room for `PART_BLOCKS` blocks.
                unsafe { self.dispatch_expand(&expand) };
            }
            let parts = parts.each_ref().map(|part| part.0.as_ptr().cast::<u8>());
            self.multiply_wide(&rows, streams, parts, blocks, out);
        }
        let place = |t, i| (i / WIDE_ROWS * streams + t) * WIDE_ROWS + i % WIDE_ROWS;
        // SAFETY: kernels wrote the results of every group.
        hand_over([streams, count], |t, i| unsafe { &*out.add(place(t, i)) }, sink);
        count
    }

    /// Rows in groups of [`WIDE_ROWS`] times parts of tiles.
    fn multiply_wide(
        &self,
        rows: &Rows<'_>,
        streams: usize,
        parts: [*const u8; STREAMS],
        blocks: std::ops::Range<usize>,
        out: *mut [f32; TILE_ROWS],
    ) {
        let layout = &self.map.layout;
        let mut args = TileArgs {
            layout,
            int8: rows.int8,
            tiles: [std::ptr::null(); MAX_STREAMS],
            rows: [std::ptr::null(); MAX_ROWS],
            first_block: blocks.start,
            end_block: blocks.end,
            wide_steps: match layout.coding {
                Coding::Affine { bits } => steps_of_bits(bits as usize),
                _ => E2m1::STEPS,
            },
            global_scale: self.map.global_scales[self.matrix],
            out: out.cast(),
        };
        args.tiles[..STREAMS].copy_from_slice(&parts);
        for (group, ids) in rows.ids.chunks_exact(WIDE_ROWS).enumerate() {
            self.set_rows(rows, ids, &mut args);
            args.out = out.wrapping_add(group * streams * WIDE_ROWS).cast();
            // SAFETY: the parts were expanded, rows are whole, `out` has room for every group.
            unsafe { self.dispatch_wide(streams, &args) };
        }
    }

    /// All rows times a packed tile: results to `out`, which has room for [`ROW_BLOCK`].
    #[cfg(target_arch = "x86_64")]
    fn multiply_amx(&self, rows: &Rows<'_>, tile: *const u8, out: *mut [f32; TILE_ROWS]) {
        let layout = &self.map.layout;
        let (Some(int8), Some(across)) = (rows.int8, rows.across) else { unreachable!("`side_by_side` comes first") };
        assert!(are_consecutive(rows.ids), "`side_by_side` comes first");
        let (first, num_rows) = (rows.ids[0] as usize, rows.ids.len());
        let end = (first + num_rows - 1) * rows.stride_bytes + int8.blocks * BLOCK_COLS;
        assert!(end <= rows.len_bytes, "rows end at {end} of {} bytes", rows.len_bytes);
        let factor = match layout.coding {
            Coding::Affine { .. } => 1.0,
            _ => 1.0 / E2M1_FACTOR,
        };
        let args = amx::AmxArgs {
            layout,
            int8,
            tile,
            rows: rows.first.wrapping_add(first * rows.stride_bytes),
            stride_bytes: rows.stride_bytes,
            across: across.at_row(first),
            num_rows,
            factor: self.map.global_scales[self.matrix] * factor,
            out: out.cast(),
        };
        // SAFETY: the tile is whole, rows are as well and at equal distances, more of them and their numbers may be read, `out` has
        // room for all of them.
        unsafe {
            match layout.coding {
                Coding::Affine { bits } => match bits {
                    2 => self.run_grouped::<Affine<2>>(&args),
                    3 => self.run_grouped::<Affine<3>>(&args),
                    4 => self.run_grouped::<Affine<4>>(&args),
                    5 => self.run_grouped::<Affine<5>>(&args),
                    6 => self.run_grouped::<Affine<6>>(&args),
                    8 => self.run_grouped::<Affine<8>>(&args),
                    other => unreachable!("affine codes of {other} bits: WeightFormat::validate"),
                },
                Coding::Mxfp4 => self.run_amx::<amx::Mxfp4>(&args),
                Coding::Nvfp4 => self.run_amx::<amx::Nvfp4>(&args),
                coding => unreachable!("`Product::expansion` says no to {coding:?}"),
            }
        }
    }

    /// # Safety
    /// As [`amx::Amx`].
    #[cfg(target_arch = "x86_64")]
    unsafe fn run_grouped<C: Codes>(&self, args: &amx::AmxArgs<'_>) {
        // SAFETY: the caller's promise.
        unsafe {
            match (self.map.layout.record_blocks, self.map.layout.scale_blocks) {
                (1, 1) => self.run_amx::<amx::Grouped<C, 1, 1>>(args),
                (2, 2) => self.run_amx::<amx::Grouped<C, 2, 2>>(args),
                (4, 2) => self.run_amx::<amx::Grouped<C, 4, 2>>(args),
                found => unreachable!("affine groups and scales of {found:?} blocks: `activation_scale_blocks`"),
            }
        }
    }

    /// # Safety
    /// As [`amx::Amx`].
    #[cfg(target_arch = "x86_64")]
    unsafe fn run_amx<F: amx::Family>(&self, args: &amx::AmxArgs<'_>) {
        // SAFETY: only the lifetime changes, and no kernel keeps its arguments.
        let args = unsafe { std::mem::transmute::<&amx::AmxArgs<'_>, &amx::AmxArgs<'static>>(args) };
        // SAFETY: the caller's promise.
        unsafe { self.level.call_with_tiles::<amx::Amx<F>>(args) }
    }

    /// # Safety
    /// `args` holds a part of a tile of this product and room to expand it.
    unsafe fn dispatch_expand(&self, args: &wide::ExpandArgs<'_>) {
        let level = self.level;
        // SAFETY: only the lifetime changes, and no kernel keeps its arguments.
        let args = unsafe { std::mem::transmute::<&wide::ExpandArgs<'_>, &wide::ExpandArgs<'static>>(args) };
        // SAFETY: the caller's promise.
        unsafe {
            match self.map.layout.coding {
                Coding::Affine { bits: 2 } => level.call::<wide::Expand<Affine<2>>>(args),
                Coding::Affine { bits: 3 } => level.call::<wide::Expand<Affine<3>>>(args),
                Coding::Affine { bits: 4 } => level.call::<wide::Expand<Affine<4>>>(args),
                Coding::Affine { bits: 5 } => level.call::<wide::Expand<Affine<5>>>(args),
                Coding::Affine { bits: 6 } => level.call::<wide::Expand<Affine<6>>>(args),
                Coding::Mxfp4 | Coding::Nvfp4 => level.call::<wide::Expand<E2m1>>(args),
                coding => unreachable!("`Product::expansion` says no to {coding:?}"),
            }
        }
    }

    /// # Safety
    /// As [`TileKernel::run`], with expanded tiles.
    unsafe fn dispatch_wide(&self, streams: usize, args: &TileArgs<'_>) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.map.layout.coding {
                Coding::Affine { bits } => match steps_of_bits(bits as usize) {
                    8 => self.run_wide::<int8::Grouped<Wide<8>>>(streams, args),
                    4 => self.run_wide::<int8::Grouped<Wide<4>>>(streams, args),
                    _ => self.run_wide::<int8::Grouped<Wide<2>>>(streams, args),
                },
                Coding::Mxfp4 => self.run_wide::<int8::Mxfp4<Wide<4>>>(streams, args),
                Coding::Nvfp4 => self.run_wide::<int8::Nvfp4<Wide<4>>>(streams, args),
                coding => unreachable!("`Product::expansion` says no to {coding:?}"),
            }
        }
    }

    /// # Safety
    /// As [`TileKernel::run`].
    unsafe fn run_wide<B: TileKernel>(&self, streams: usize, args: &TileArgs<'_>) {
        // SAFETY: only the lifetime changes, and no kernel keeps its arguments.
        let args = unsafe { std::mem::transmute::<&TileArgs<'_>, &TileArgs<'static>>(args) };
        // SAFETY: the caller's promise.
        unsafe {
            match streams {
                1 => self.level.call::<Sized<B, 1, WIDE_ROWS>>(args),
                2 => self.level.call::<Sized<B, 2, WIDE_ROWS>>(args),
                streams => unreachable!("`Product::max_streams` never gives {streams} expanded tiles"),
            }
        }
    }
}

/// Hands the results of `streams` tiles and `count` rows to `sink`. Row by row: outputs of many rows stand whole pages apart, and those
/// of one tile share a set of the nearest cache. A prompt's attention products took 130 ms so and 150 to 180 ms tile by tile.
fn hand_over<'a>(
    [streams, count]: [usize; 2],
    result: impl Fn(usize, usize) -> &'a [f32; TILE_ROWS],
    sink: &mut impl FnMut(usize, usize, &[[f32; TILE_ROWS]]),
) {
    for i in 0..count {
        for t in 0..streams {
            sink(t, i, std::slice::from_ref(result(t, i)));
        }
    }
}

/// Whether each id is the one before and one.
fn are_consecutive(ids: &[u32]) -> bool {
    ids.windows(2).all(|pair| pair[1] == pair[0] + 1)
}
