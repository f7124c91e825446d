//! Steps of one row: operations that follow each other are launched as one kernel of `kernels/decode.cu`.
//!
//! A recorded step is looked at as a whole ([`Op`]s), from its first operation to its last. Where a run of operations has a
//! kernel of its own it is launched instead; its results are the same bits, which `tests/recorded.rs` checks. What has no such
//! kernel is launched operation by operation.
//!
//! | operations | kernels |
//! |---|---|
//! | `rms_norm`, `linear` | `line` (the norm is made by every block for itself) |
//! | `rms_norm`, `linear` of the router | `pair` without a pair |
//! | `gate_up` | `pair` without a router |
//! | `linear` whose output the next `rms_norm` adds | `line` with a residual |
//! | `rms_norm` and second product of the queries, `rms_norm` of the latent, two `rope`, `kv_store`, `linear_heads`, `attend_mla`, `linear_heads` | `row_heads` (latent.rs), up to 512 positions |
//! | `rms_norm` of the latent, two `rope`, `kv_store`, `linear_heads` | `heads` with a latent |
//! | `rms_norm` of queries' and keys' heads, two `rope`, `kv_store`, `attend_gqa` | `gqa` |
//! | `attend_mla`, `linear_heads` | `attend`, `heads` that joins |
//! | `rms_norm`, `linear` of the router, `route`, `gate_up` and `linear` of the shared expert if there is one, `moe_gate_up`, `moe_down` | `pair`: the router, the choice and the shared expert's first half; `up`: the chosen experts' first half and the shared expert's second; `experts_down` |

use super::experts::router_kind;
use super::few::{few_format, is_few};
use super::products::{Input, slices};
use super::{CudaBackend, WARPS};
use crate::args;
use crate::args::{Mat, Part, RowInput};
use crate::buffers::Parts;
use crate::driver::DevicePtr;
use crate::weights::{deep_bytes, fast_format, pipe_bytes, takes_digits};
use moellon_ops::program::Op;
use moellon_ops::{
    AttendMla, Cache, CacheDtype, KvStore, Linear, LinearHeads, Result, RmsNorm, Rope, RopePairs, Tensor, Weight,
};
use moellon_tensor::WeightFormat;

/// Columns of a row that a block keeps in registers (`ROW_STEPS * ROW_COLUMNS` of row.cuh).
pub(super) const ROW_COLUMNS: usize = 8192;
/// Columns of a head's input that it keeps.
const HEAD_COLUMNS: usize = 2048;
/// Most blocks that a multiprocessor has at a time: registers bound them (`__launch_bounds__` of the kernels).
const BLOCKS: usize = 3;
/// Shared memory of a multiprocessor, and what a block has of it that is not asked for: static arrays, and a reserved kilobyte.
const SHARED: usize = 228 << 10;
const STATIC_SHARED: u32 = 7 << 10;
/// Where a step is, operation by operation.
pub(super) struct Cursor<'a> {
    ops: &'a [Op],
    pub(super) at: usize,
    /// The norm that comes next finds its delta added already.
    pub(super) added: bool,
}

impl<'a> Cursor<'a> {
    pub(super) fn rest(&self) -> &'a [Op] {
        &self.ops[self.at..]
    }

    /// The residual that a producer of `out` adds to if the operation after `count` more is a norm that would add it.
    pub(super) fn residual_after(&self, count: usize, out: Tensor) -> Option<Tensor> {
        match self.ops.get(self.at + count) {
            Some(Op::RmsNorm(n)) if n.delta == Some(out) && n.x.rows == out.rows && n.x.cols == out.cols => Some(n.x),
            _ => None,
        }
    }
}

impl CudaBackend {
    /// Launches a step.
    pub(super) fn run_program(&mut self, ops: &[Op]) -> Result<()> {
        let mut cursor = Cursor { ops, at: 0, added: false };
        while cursor.at < ops.len() {
            if self.fused(&mut cursor)? {
                continue;
            }
            match &ops[cursor.at] {
                Op::RmsNorm(norm) if cursor.added => self.rms_norm_now(&RmsNorm { delta: None, ..*norm })?,
                op => self.execute(op)?,
            }
            cursor.added = false;
            cursor.at += 1;
        }
        Ok(())
    }

    /// Launches what starts at the cursor as a kernel of its own, if there is one, and moves past it.
    fn fused(&mut self, cursor: &mut Cursor<'_>) -> Result<bool> {
        if self.router_and_experts(cursor)? {
            return Ok(true);
        }
        if self.row_heads(cursor)? {
            return Ok(true);
        }
        if let Some(count) = self.grouped_attention(cursor.rest())? {
            cursor.at += count;
            cursor.added = false;
            return Ok(true);
        }
        let rest = cursor.rest();
        match rest {
            [Op::RmsNorm(latent), Op::Rope(q), Op::Rope(k), Op::KvStore { parts, slots, cache }, ..]
                if is_few(latent.x.rows) =>
            {
                let store = KvStore { parts, slots: *slots, cache: *cache };
                if !self.few_latent(latent, [q, k], &store)? {
                    return Ok(false);
                }
                cursor.at += 4;
            }
            [
                Op::RmsNorm(latent),
                Op::Rope(q),
                Op::Rope(k),
                Op::KvStore { parts, slots, cache },
                Op::LinearHeads(heads),
                ..,
            ] => {
                let store = KvStore { parts, slots: *slots, cache: *cache };
                if !self.heads_with_latent(latent, [q, k], &store, heads)? {
                    return Ok(false);
                }
                cursor.at += 5;
            }
            [Op::RmsNorm(norm), Op::Linear { x, parts }, ..] => {
                let delta = norm.delta.is_some() && !cursor.added;
                if delta || norm.x.rows != 1 || norm.out != *x || norm.x.cols > ROW_COLUMNS {
                    return Ok(false);
                }
                if let [(weight, out)] = parts[..]
                    && router_kind(norm, weight).is_some()
                {
                    self.router((norm, weight, out), None, None)?;
                    cursor.at += 2;
                } else {
                    // In place: other blocks still read the raw values, so nobody gets the floats of the norm.
                    let in_place = norm.x == norm.out;
                    if in_place && self.reads_floats(&rest[2..], norm.out) {
                        return Ok(false);
                    }
                    let Some(input) = self.norm_input(norm, parts[0].0)? else { return Ok(false) };
                    let residual = (parts.len() == 1).then(|| cursor.residual_after(2, parts[0].1)).flatten();
                    self.line(input, parts, *x, residual)?;
                    cursor.added = residual.is_some();
                    cursor.at += 2;
                    return Ok(true);
                }
            }
            [Op::Linear { x, parts }, ..] if is_few(x.rows) => {
                if !parts.iter().any(|(w, _)| few_format(*w).is_some()) {
                    return Ok(false);
                }
                let whole = parts.len() == 1;
                let residual = whole.then(|| cursor.residual_after(1, parts[0].1)).flatten();
                self.few_linear(*x, parts, residual)?;
                cursor.added = residual.is_some();
                cursor.at += 1;
                return Ok(true);
            }
            [Op::Linear { x, parts }, ..] => {
                let Some(input) = self.plain_input(*x, parts[0].0)? else { return Ok(false) };
                let residual = (parts.len() == 1).then(|| cursor.residual_after(1, parts[0].1)).flatten();
                self.line(input, parts, *x, residual)?;
                cursor.added = residual.is_some();
                cursor.at += 1;
                return Ok(true);
            }
            [Op::AttendMla(attend), Op::LinearHeads(heads), ..] if is_few(attend.q_latent.rows) => {
                if !self.few_attend(attend, heads)? {
                    return Ok(false);
                }
                cursor.at += 1;
            }
            [Op::AttendMla(attend), Op::LinearHeads(heads), after @ ..] => {
                if !self.heads_of_attention(attend, heads, after.first())? {
                    return Ok(false);
                }
                cursor.at += 2;
            }
            [Op::LinearHeads(heads), ..] if is_few(heads.x.rows) => {
                if !self.few_heads(heads)? {
                    return Ok(false);
                }
                cursor.at += 1;
            }
            [Op::LinearHeads(heads), ..] => {
                let Some(args) = self.heads_args(heads)? else { return Ok(false) };
                self.heads(heads, args)?;
                cursor.at += 1;
            }
            [
                Op::Route(route),
                Op::GateUp(shared),
                Op::Linear { x, parts },
                Op::MoeGateUp(up),
                Op::MoeDown(down),
                ..,
            ] => {
                let residual = cursor.residual_after(5, down.out);
                if *x != shared.out || parts.len() != 1 || down.plus != Some(parts[0].1) {
                    return Ok(false);
                }
                if !self.experts(None, route, Some((shared, parts)), up, down, residual)? {
                    return Ok(false);
                }
                cursor.at += 5;
                cursor.added = residual.is_some();
                return Ok(true);
            }
            [Op::Route(route), Op::MoeGateUp(up), Op::MoeDown(down), ..] => {
                let residual = cursor.residual_after(3, down.out);
                if !self.experts(None, route, None, up, down, residual)? {
                    return Ok(false);
                }
                cursor.at += 3;
                cursor.added = residual.is_some();
                return Ok(true);
            }
            [Op::GateUp(op), ..] if is_few(op.x.rows) => {
                if !self.few_gate_up(op)? {
                    return Ok(false);
                }
                cursor.at += 1;
            }
            [Op::GateUp(op), ..] => {
                if !self.pair(op)? {
                    return Ok(false);
                }
                cursor.at += 1;
            }
            _ => return Ok(false),
        }
        cursor.added = false;
        Ok(true)
    }

    /// Blocks that are resident at a time with `shared` bytes of shared memory each.
    pub(super) fn resident(&self, shared: u32) -> usize {
        let fit = SHARED / (shared + STATIC_SHARED) as usize;
        self.device.multiprocessors as usize * fit.clamp(1, BLOCKS)
    }

    /// Whether one of the next operations, as long as `x` holds what it holds, reads it as floats.
    pub(super) fn reads_floats(&self, ops: &[Op], x: Tensor) -> bool {
        for op in ops {
            match op {
                Op::Linear { x: read, parts }
                    if read.buffer.id == x.buffer.id
                        && (*read != x || parts.iter().any(|(w, _)| fast_format(w.format).is_none())) =>
                {
                    return true;
                }
                // The norm of the next layer's: written anew before.
                Op::Linear { parts, .. } if parts.iter().any(|(_, out)| out.buffer.id == x.buffer.id) => return false,
                Op::GatherRows(op) if op.x.buffer.id == x.buffer.id => return true,
                Op::Add(op) if op.x.buffer.id == x.buffer.id || op.y.buffer.id == x.buffer.id => return true,
                Op::AttendGqa(op) if op.q.buffer.id == x.buffer.id => return true,
                Op::LinearHeads(op) if op.x.buffer.id == x.buffer.id => return true,
                Op::RmsNorm(op) if op.x.buffer.id == x.buffer.id => return true,
                _ => {}
            }
        }
        false
    }

    /// The form that a weight of `format` reads `x` in, written by the caller: digits, or the twin of the view.
    fn written_forms(&mut self, x: Tensor) -> Result<(Mat, DevicePtr)> {
        let out = self.output(x)?;
        Ok((out, self.buffer(x)?.digits_written(x)))
    }

    /// The norm of a row as the input of products with `weight`.
    pub(super) fn norm_input(&mut self, norm: &RmsNorm, weight: Weight) -> Result<Option<RowInput>> {
        let offsets = [norm.x.offset, norm.out.offset, norm.weight.offset];
        if fast_format(weight.format).is_none() || !is_wide(norm.x.cols, &offsets) {
            return Ok(None);
        }
        let x = self.input(norm.x)?;
        let weight = self.address(norm.weight)?;
        let (mut out, out_digits) = self.written_forms(norm.out)?;
        if norm.x == norm.out {
            out.p = 0;
        }
        Ok(Some(RowInput { x, digits: 0, kind: 2, eps: norm.eps, weight, out, out_digits }))
    }

    /// A row as it is as the input of products with `weight`: in the form it has, or made by every block for itself.
    pub(super) fn plain_input(&mut self, x: Tensor, weight: Weight) -> Result<Option<RowInput>> {
        if fast_format(weight.format).is_none() || x.rows != 1 {
            return Ok(None);
        }
        let whole = Parts { count: 1, stride: x.cols, cols: x.cols };
        let ready = takes_digits(weight.format) && self.buffer(x)?.has_digits(x, whole);
        // Beyond this many columns the conversion costs more than a kernel of its own.
        if ready || x.cols > HEAD_COLUMNS || !takes_digits(weight.format) || !is_wide(x.cols, &[x.offset]) {
            let input = self.whole_input(x, weight.format)?;
            return Ok(Some(direct(&input)));
        }
        Ok(Some(RowInput { x: self.input(x)?, kind: 1, ..RowInput::default() }))
    }

    /// The arguments of a product of one row with up to four weights of one format; and how many times `tile_rows` rows they have.
    pub(super) fn line_args(
        &mut self,
        input: RowInput,
        parts: &[(Weight, Tensor)],
        residual: Option<Tensor>,
        tile_rows: usize,
    ) -> Result<(args::Line, usize)> {
        let slices = slices(parts[0].0.cols) as u32;
        let mut args = args::Line { num_parts: parts.len() as u32, slices, input, ..args::Line::default() };
        let mut units = 0;
        for (i, (weight, out)) in parts.iter().enumerate() {
            args.part[i] = Part { w: self.weights[weight.id as usize].packed, out: self.output(*out)? };
            args.first_unit[i] = units;
            units += weight.rows.div_ceil(tile_rows) as u32;
            args.first_unit[i + 1] = units;
        }
        if let Some(residual) = residual {
            args.residual = self.residual(residual)?;
        }
        Ok((args, units as usize))
    }

    /// Products of one row with weights; those of another format than the first follow one by one.
    pub(super) fn line(
        &mut self,
        input: RowInput,
        parts: &[(Weight, Tensor)],
        x: Tensor,
        residual: Option<Tensor>,
    ) -> Result<()> {
        let format = parts[0].0.format;
        let (same, others): (Vec<_>, Vec<_>) = parts.iter().copied().partition(|(w, _)| w.format == format);
        let cols = parts[0].0.cols;
        let name = fast_format(format).expect("checked by who made the input");
        let mut input = input;
        for group in same.chunks(4) {
            let side = WARPS / slices(cols);
            let rounds = group.iter().map(|(w, _)| w.rows.div_ceil(32)).sum::<usize>().div_ceil(side);
            let multiprocessors = self.device.multiprocessors as usize;
            let deep =
                is_deep(input.kind, rounds, multiprocessors) && self.kernels.has_decode(&format!("deep_{name}"))?;
            let (kernel, tile_rows, ring) =
                if deep { ("deep", 32, deep_bytes(format)) } else { ("line", 16, pipe_bytes(format, 1)) };
            let (args, units) = self.line_args(input, group, residual, tile_rows)?;
            let shared = ring + row_bytes(&input, format, cols);
            let most = if deep { multiprocessors } else { self.resident(shared) };
            let kernel = self.kernels.decode(&format!("{kernel}_{name}"))?;
            self.device.launch(&kernel, [even(units.div_ceil(side), most) as u32, 1, 1], 256, shared, &args)?;
            // Written once.
            (input.out, input.out_digits) = (Mat::default(), 0);
        }
        if others.is_empty() {
            return Ok(());
        }
        self.linear_now(&Linear { x, parts: &others })
    }

    /// The view that a producer adds to.
    pub(super) fn residual(&mut self, x: Tensor) -> Result<Mat> {
        let mat = self.input(x)?;
        self.buffer(x)?.written_by_host();
        Ok(mat)
    }

    pub(super) fn router_args(&mut self, norm: &RmsNorm, weight: Weight, out: Tensor) -> Result<args::Router> {
        let x = self.input(norm.x)?;
        let norm_weight = self.address(norm.weight)?;
        let (normed, out_digits) = self.written_forms(norm.out)?;
        let device_weight = &self.weights[weight.id as usize];
        let (weights, bias) = (device_weight.plain, device_weight.bias());
        Ok(args::Router {
            weights,
            bias,
            out: self.output(out)?,
            input: RowInput { x, digits: 0, kind: 2, eps: norm.eps, weight: norm_weight, out: normed, out_digits },
            rows: weight.rows as u32,
            cols: weight.cols as u32,
        })
    }

    /// The arguments of a product a head, if there is a kernel.
    fn heads_args(&mut self, op: &LinearHeads) -> Result<Option<args::Heads>> {
        if fast_format(op.weight.format).is_none() || op.x.rows != 1 || op.weight.cols > HEAD_COLUMNS {
            return Ok(None);
        }
        Ok(Some(args::Heads {
            w: self.weights[op.weight.id as usize].packed,
            x: self.address(op.x)?,
            x_head_stride: op.x_head_stride as u32,
            slices: slices(op.weight.cols) as u32,
            ..args::Heads::default()
        }))
    }

    fn heads(&mut self, op: &LinearHeads, mut args: args::Heads) -> Result<()> {
        let format = op.weight.format;
        let name = fast_format(format).expect("checked by who made the arguments");
        args.out = self.output(op.out)?;
        if args.out_digits != 0 {
            self.buffer(op.out)?.digits_written(op.out);
        }
        let blocks = op.weight.rows.div_ceil(16).div_ceil(WARPS / slices(op.weight.cols)) as u32;
        let input = RowInput { kind: 1, ..RowInput::default() };
        let shared = pipe_bytes(format, 1) + row_bytes(&input, format, op.weight.cols);
        let kernel = self.kernels.decode(&format!("heads_{name}"))?;
        self.device.launch(&kernel, [blocks, op.weight.count as u32 + args.has_latent, 1], 256, shared, &args)
    }

    /// The rest of latent attention's input beside the queries' product with its heads.
    fn heads_with_latent(
        &mut self,
        norm: &RmsNorm,
        [q, k]: [&Rope; 2],
        store: &KvStore<'_>,
        heads: &LinearHeads,
    ) -> Result<bool> {
        // The product reads what is not rotated.
        let head_end = heads.x.offset + heads.weight.cols;
        let apart =
            heads.x.buffer.id == q.x.buffer.id && q.head_stride == heads.x_head_stride && q.x.offset >= head_end;
        if !apart || norm.x.rows != 1 {
            return Ok(false);
        }
        let Some(mut args) = self.heads_args(heads)? else { return Ok(false) };
        let Some(latent) = self.latent_args(norm, [q, k], store)? else { return Ok(false) };
        (args.has_latent, args.latent) = (1, latent);
        self.heads(heads, args)?;
        Ok(true)
    }

    /// The arguments of what makes latent attention's keys and rotates its queries, if the operations are those that the kernel knows.
    pub(super) fn latent_args(
        &mut self,
        norm: &RmsNorm,
        [q, k]: [&Rope; 2],
        store: &KvStore<'_>,
    ) -> Result<Option<args::Latent>> {
        let in_place = norm.delta.is_none() && norm.x == norm.out && norm.x.cols <= HEAD_COLUMNS;
        let stored = matches!(store.parts, [latent, k_pe] if *latent == norm.x && *k_pe == k.x);
        let rotated = k.num_heads == 1 && q.table == k.table && q.pairs == k.pairs && q.x.rows == norm.x.rows;
        if !(in_place && stored && rotated) {
            return Ok(None);
        }
        Ok(Some(args::Latent {
            latent: self.output(norm.x)?,
            k_pe: self.output(k.x)?,
            q: self.output(q.x)?,
            table: self.input(q.table)?,
            weight: self.address(norm.weight)?,
            slots: self.address(store.slots)?,
            cache: self.cache_address(store.cache),
            cache_width: store.cache.width as u32,
            cache_bf16: u32::from(store.cache.dtype == CacheDtype::Bf16),
            num_heads: q.num_heads as u32,
            head_stride: q.head_stride as u32,
            interleaved: u32::from(q.pairs == RopePairs::Interleaved),
            eps: norm.eps,
        }))
    }

    /// Attention whose parts are joined by the product behind it, which also makes digits for the one after.
    fn heads_of_attention(&mut self, op: &AttendMla, heads: &LinearHeads, after: Option<&Op>) -> Result<bool> {
        let joined =
            heads.x == op.out && heads.x_head_stride == op.kv_lora_rank && heads.weight.cols == op.kv_lora_rank;
        if !joined || op.q_latent.rows != 1 || heads.weight.cols > 512 {
            return Ok(false);
        }
        let Some(mut args) = self.heads_args(heads)? else { return Ok(false) };
        let (mut attend, max_keys) = self.attend_mla_args(op)?;
        self.attend_parts(&mut attend, 1, max_keys)?;
        (args.joins, args.attend) = (1, attend);
        // A block must have whole tiles of digits.
        let block_rows = 16 * WARPS / slices(heads.weight.cols);
        let whole = block_rows.is_multiple_of(64) && heads.weight.rows.is_multiple_of(64);
        let wanted = matches!(after, Some(Op::Linear { x, .. }) if *x == heads.out);
        if whole && wanted {
            args.out_digits = self.buffer(heads.out)?.digits_written(heads.out);
        }
        self.heads(heads, args)?;
        Ok(true)
    }

    pub(super) fn cache_address(&self, cache: Cache) -> DevicePtr {
        self.caches[cache.id as usize].memory.pointer()
    }
}

/// Whether rows of `cols` elements that start at `offsets` of their buffers are read and written as whole vectors.
pub(super) fn is_wide(cols: usize, offsets: &[usize]) -> bool {
    cols.is_multiple_of(8) && offsets.iter().all(|offset| offset.is_multiple_of(8))
}

/// A row that is read in the form that it has.
pub(super) fn direct(input: &Input) -> RowInput {
    RowInput { x: input.x, digits: input.digits(), ..RowInput::default() }
}

/// Whether a product behind a norm (`kind` 2) has one block a multiprocessor with two row tiles a warp, `rounds` times a block's worth of them: where
/// that is about one round or two. With more and smaller blocks, which do not fill the device, a layer of GLM-5.2-77 takes 102.6 us instead of
/// 99.7 (cuda-decode-variants).
fn is_deep(kind: u32, rounds: usize, multiprocessors: usize) -> bool {
    kind == 2 && (multiprocessors / 2..=2 * multiprocessors).contains(&rounds)
}

/// As many blocks, up to `most`, as give each the same number of units, or one less.
pub(super) fn even(units: usize, most: usize) -> usize {
    units.div_ceil(units.div_ceil(most).max(1)).max(1)
}

/// How `most` blocks are shared by two kinds of units, given as (count, bytes of one), so that both end early.
pub(super) fn shares(first: (usize, u32), second: (usize, u32), most: usize) -> (usize, usize) {
    let time = |(units, bytes): (usize, u32), blocks: usize| units.div_ceil(blocks) * bytes as usize;
    let best = (1..most).min_by_key(|&blocks| time(first, blocks).max(time(second, most - blocks))).unwrap_or(1);
    (even(first.0, best), even(second.0, (most - best).max(1)))
}

/// Shared memory for a row that every block makes for itself.
pub(super) fn row_bytes(input: &RowInput, format: WeightFormat, cols: usize) -> u32 {
    if input.kind == 0 {
        return 0;
    }
    let tile = if takes_digits(format) { crate::buffers::DIGITS_BYTES } else { 128 };
    (cols.div_ceil(64) * tile) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_that_leave_room_have_a_block_a_multiprocessor() {
        // GLM-5.2's first and second product of the queries, its head; the same without a norm.
        assert_eq!([82, 256, 4749].map(|rounds| is_deep(2, rounds, 132)), [true, true, false]);
        assert!(!is_deep(0, 82, 132) && !is_deep(2, 4, 132));
    }

    #[test]
    fn blocks_have_as_many_units() {
        assert_eq!([even(512, 396), even(384, 396), even(1, 396), even(0, 396)], [256, 384, 1, 1]);
    }

    #[test]
    fn two_kinds_of_blocks_end_early() {
        // The shared expert's second product beside the chosen experts' first: bytes of what a block does at a time.
        let (first, second) = shares((192, 36_864), (1024, 86_016), 396);
        assert!(first + second <= 396, "{first} and {second} blocks");
        let longest = (192_usize.div_ceil(first) * 36_864).max(1024_usize.div_ceil(second) * 86_016);
        assert_eq!(longest, 3 * 86_016, "{first} and {second} blocks");
    }

    #[test]
    fn rows_are_wide_where_vectors_fit() {
        assert!(is_wide(6144, &[0, 64]));
        assert!(!is_wide(6148, &[0]) && !is_wide(6144, &[4]));
    }
}
