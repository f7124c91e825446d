//! Steps of one row: operations that follow each other are launched as one kernel of `kernels/decode.cu`.
//!
//! A recorded step is looked at as a whole ([`Op`]s), from its first operation to its last. Where a run of operations has a
//! kernel of its own it is launched instead; its results are the same bits, which `tests/recorded.rs` checks. What has no such
//! kernel is launched operation by operation.
//!
//! | operations | kernels |
//! |---|---|
//! | `rms_norm`, `linear` | `line` (the norm is made by every block for itself) |
//! | `rms_norm`, `linear` of the router | `router` |
//! | `linear` whose output the next `rms_norm` adds | `line` with a residual |
//! | `rms_norm` of the latent, two `rope`, `kv_store`, `linear_heads` | `heads` with a latent |
//! | `attend_mla`, `linear_heads` | `attend`, `heads` that joins |
//! | `route`, `gate_up` and `linear` of the shared expert, `moe_gate_up`, `moe_down` | `up`, `line`, `experts_down` |

use super::few::{few_format, is_few};
use super::products::{Input, activation_args, plain_warps, slices};
use super::{COUNTERS, CudaBackend, WARPS};
use crate::args;
use crate::args::{Mat, Part, RowInput, UpPair};
use crate::buffers::Parts;
use crate::driver::DevicePtr;
use crate::weights::{fast_format, pipe_bytes, takes_digits, tile_bytes};
use moellon_ops::program::Op;
use moellon_ops::{
    AttendMla, Cache, CacheDtype, GateUp, KvStore, Linear, LinearHeads, MoeDown, MoeGateUp, Result, RmsNorm, Rope,
    RopePairs, Route, Tensor, Weight,
};
use moellon_tensor::WeightFormat;

/// Columns of a row that a block keeps in registers (`ROW_STEPS * ROW_COLUMNS` of row.cuh).
const ROW_COLUMNS: usize = 8192;
/// Columns of a head's input that it keeps.
const HEAD_COLUMNS: usize = 2048;
/// Most blocks that a multiprocessor has at a time: registers bound them (`__launch_bounds__` of the kernels).
const BLOCKS: usize = 3;
/// Shared memory of a multiprocessor, and what a block has of it that is not asked for: static arrays, and a reserved kilobyte.
const SHARED: usize = 228 << 10;
const STATIC_SHARED: u32 = 6 << 10;
/// Most experts that a router may choose from where every block chooses for itself.
const CHOSEN_FROM: usize = 256;

/// Where a step is, operation by operation.
struct Cursor<'a> {
    ops: &'a [Op],
    at: usize,
    /// The norm that comes next finds its delta added already.
    added: bool,
}

impl<'a> Cursor<'a> {
    fn rest(&self) -> &'a [Op] {
        &self.ops[self.at..]
    }

    /// The residual that a producer of `out` adds to if the operation after `count` more is a norm that would add it.
    fn residual_after(&self, count: usize, out: Tensor) -> Option<Tensor> {
        match self.ops.get(self.at + count) {
            Some(Op::RmsNorm(n)) if n.delta == Some(out) && n.x.rows == out.rows && n.x.cols == out.cols => Some(n.x),
            _ => None,
        }
    }
}

impl CudaBackend {
    /// Launches a step.
    pub(super) fn run_program(&mut self, ops: &[Op]) -> Result<()> {
        let one_row = ops.iter().any(|op| matches!(op, Op::RmsNorm(norm) if norm.x.rows == 1));
        self.device.overlaps = !one_row;
        let launched = self.launch_program(ops);
        self.device.overlaps = true;
        launched
    }

    fn launch_program(&mut self, ops: &[Op]) -> Result<()> {
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
                    && self.router(norm, weight, out)?
                {
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
                if !self.experts(route, Some((shared, parts)), up, down, residual)? {
                    return Ok(false);
                }
                cursor.at += 5;
                cursor.added = residual.is_some();
                return Ok(true);
            }
            [Op::Route(route), Op::MoeGateUp(up), Op::MoeDown(down), ..] => {
                let residual = cursor.residual_after(3, down.out);
                if !self.experts(route, None, up, down, residual)? {
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
                let Some(pair) = self.dense_pair(op)? else { return Ok(false) };
                let format = op.gate.format;
                let name = fast_format(format).expect("a pair has one");
                let shared = pipe_bytes(format, 2);
                let slices = slices(op.gate.cols);
                let blocks = even(op.gate.rows.div_ceil(16).div_ceil(WARPS / slices), self.resident(shared)) as u32;
                let args = args::Up {
                    shared: pair,
                    shared_blocks: blocks,
                    slices: slices as u32,
                    activation: activation_args(op.activation),
                    ..args::Up::default()
                };
                let kernel = self.kernels.decode(&format!("up_{name}_{name}"))?;
                self.device.launch(&kernel, [blocks, 1, 1], 256, shared, &args)?;
                cursor.at += 1;
            }
            _ => return Ok(false),
        }
        cursor.added = false;
        Ok(true)
    }

    /// Blocks that are resident at a time with `shared` bytes of shared memory each.
    fn resident(&self, shared: u32) -> usize {
        let fit = SHARED / (shared + STATIC_SHARED) as usize;
        self.device.multiprocessors as usize * fit.clamp(1, BLOCKS)
    }

    /// Whether one of the next operations, as long as `x` holds what it holds, reads it as floats.
    fn reads_floats(&self, ops: &[Op], x: Tensor) -> bool {
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
    fn norm_input(&mut self, norm: &RmsNorm, weight: Weight) -> Result<Option<RowInput>> {
        if fast_format(weight.format).is_none() {
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
    fn plain_input(&mut self, x: Tensor, weight: Weight) -> Result<Option<RowInput>> {
        if fast_format(weight.format).is_none() || x.rows != 1 {
            return Ok(None);
        }
        let whole = Parts { count: 1, stride: x.cols, cols: x.cols };
        let ready = takes_digits(weight.format) && self.buffer(x)?.has_digits(x, whole);
        // Beyond this many columns the conversion costs more than a kernel of its own.
        if ready || x.cols > HEAD_COLUMNS || !takes_digits(weight.format) {
            let input = self.whole_input(x, weight.format)?;
            return Ok(Some(direct(&input)));
        }
        Ok(Some(RowInput { x: self.input(x)?, kind: 1, ..RowInput::default() }))
    }

    /// Products of one row with weights; those of another format than the first follow one by one.
    fn line(&mut self, input: RowInput, parts: &[(Weight, Tensor)], x: Tensor, residual: Option<Tensor>) -> Result<()> {
        let format = parts[0].0.format;
        let (same, others): (Vec<_>, Vec<_>) = parts.iter().copied().partition(|(w, _)| w.format == format);
        let cols = parts[0].0.cols;
        let name = fast_format(format).expect("checked by who made the input");
        let mut input = input;
        for group in same.chunks(4) {
            let mut args = args::Line {
                num_parts: group.len() as u32,
                slices: slices(cols) as u32,
                input,
                ..args::Line::default()
            };
            let mut units = 0;
            for (i, (weight, out)) in group.iter().enumerate() {
                args.part[i] = Part { w: self.weights[weight.id as usize].packed, out: self.output(*out)? };
                args.first_unit[i] = units;
                units += weight.rows.div_ceil(16) as u32;
                args.first_unit[i + 1] = units;
            }
            if let Some(residual) = residual {
                args.residual = self.residual(residual)?;
            }
            let shared = pipe_bytes(format, 1) + row_bytes(&input, format, cols);
            let blocks = even((units as usize).div_ceil(WARPS / slices(cols)), self.resident(shared)) as u32;
            let kernel = self.kernels.decode(&format!("line_{name}"))?;
            self.device.launch(&kernel, [blocks, 1, 1], 256, shared, &args)?;
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

    /// The norm and the router's product, if the weight is a plain one of a width that the kernel has.
    fn router(&mut self, norm: &RmsNorm, weight: Weight, out: Tensor) -> Result<bool> {
        let kernel = match weight.format {
            WeightFormat::F32 => "router_f32",
            WeightFormat::F16 => "router_f16",
            WeightFormat::Bf16 => "router_bf16",
            _ => return Ok(false),
        };
        let aligned = [norm.x, norm.out, norm.weight].iter().all(|t| t.offset.is_multiple_of(4));
        if norm.x == norm.out || plain_warps(weight.cols) != WARPS || !weight.cols.is_multiple_of(8) || !aligned {
            return Ok(false);
        }
        let x = self.input(norm.x)?;
        let norm_weight = self.address(norm.weight)?;
        let (normed, out_digits) = self.written_forms(norm.out)?;
        let device_weight = &self.weights[weight.id as usize];
        let (weights, bias) = (device_weight.plain, device_weight.bias());
        let args = args::Router {
            weights,
            bias,
            out: self.output(out)?,
            input: RowInput { x, digits: 0, kind: 2, eps: norm.eps, weight: norm_weight, out: normed, out_digits },
            rows: weight.rows as u32,
            cols: weight.cols as u32,
        };
        let kernel = self.kernels.decode(kernel)?;
        self.device.launch(&kernel, [weight.rows as u32, 1, 1], 256, 0, &args)?;
        Ok(true)
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

    /// Gate and up of a dense feed-forward or of a shared expert.
    fn dense_pair(&mut self, op: &GateUp) -> Result<Option<UpPair>> {
        if op.gate.format != op.up.format || fast_format(op.gate.format).is_none() || op.x.rows != 1 {
            return Ok(None);
        }
        let x = direct(&self.whole_input(op.x, op.gate.format)?);
        Ok(Some(UpPair {
            gate: self.weights[op.gate.id as usize].packed,
            up: self.weights[op.up.id as usize].packed,
            out: self.output(op.out)?,
            x: if takes_digits(op.gate.format) { x.digits } else { x.x.twin },
        }))
    }

    /// The router's choice, the chosen experts and the shared one.
    fn experts(
        &mut self,
        route: &Route,
        shared: Option<(&GateUp, &[(Weight, Tensor)])>,
        up: &MoeGateUp,
        down: &MoeDown,
        residual: Option<Tensor>,
    ) -> Result<bool> {
        let experts = up.experts;
        let (hidden, width, top_k) = (experts.hidden_size, experts.intermediate_size, up.ids.cols);
        let same = down.h == up.out && down.ids == up.ids && up.ids == route.ids && down.weights == route.weights;
        let formats = (fast_format(experts.gate_format), fast_format(experts.down_format));
        if same && is_few(up.x.rows) {
            return self.few_experts(route, shared, up, down, residual);
        }
        let (Some(name), Some(down_name)) = formats else { return Ok(false) };
        let fits = route.n_group <= 1
            && top_k <= 32
            && top_k * width / 64 <= COUNTERS
            && experts.num_experts <= CHOSEN_FROM
            && width.is_multiple_of(64);
        if !same || !fits || up.x.rows != 1 || experts.gate_format != experts.up_format {
            return Ok(false);
        }
        let mut args = args::Up { slices: slices(hidden) as u32, chooses: 1, ..args::Up::default() };
        let mut other = name;
        if let Some((op, _)) = shared {
            let kernel_name = fast_format(op.gate.format);
            let known = match kernel_name {
                Some(other) => other == name || self.kernels.has_decode(&format!("up_{name}_{other}"))?,
                None => false,
            };
            let alike = op.x == up.x && op.activation == up.activation && op.gate.cols == hidden;
            if !known || !alike {
                return Ok(false);
            }
            let Some(pair) = self.dense_pair(op)? else { return Ok(false) };
            (args.shared, other) = (pair, kernel_name.unwrap_or(name));
        }
        let x = direct(&self.whole_input(up.x, experts.gate_format)?);
        args.route = self.route_args(route)?;
        args.activation = activation_args(up.activation);
        let out = self.output(up.out)?;
        let packed = {
            let e = &self.experts[experts.id as usize];
            (e.gate.packed, e.up.packed, e.down.packed)
        };
        let from = if takes_digits(experts.gate_format) { x.digits } else { x.x.twin };
        args.routed = UpPair { gate: packed.0, up: packed.1, out, x: from };
        // The hidden values in the form that `down` reads.
        let parts = Parts { count: top_k, stride: width, cols: width };
        let mut h = DevicePtr::default();
        if takes_digits(experts.down_format) {
            let buffer = self.buffers.get_mut(&up.out.buffer.id).expect("output found it");
            (h, _) = buffer.digits(up.out, parts, &mut self.device)?;
            args.h_digits = h;
            args.arrived = self.counters(COUNTERS)?;
        }
        let side = WARPS / slices(hidden);
        let units = |rows: usize| rows.div_ceil(16).div_ceil(side);
        let routed = units(top_k * width);
        let mut ring = pipe_bytes(experts.gate_format, 2);
        let mut blocks = even(routed, self.resident(ring));
        if let Some((op, _)) = shared {
            ring = ring.max(pipe_bytes(op.gate.format, 2));
            let own = (units(op.gate.rows), tile_bytes(op.gate.format));
            let (first, rest) = shares(own, (routed, tile_bytes(experts.gate_format)), self.resident(ring));
            args.shared_blocks = first as u32;
            blocks = first + rest;
        }
        let total = blocks as u32;
        let scores = 4 * (2 * experts.num_experts + 2) as u32;
        let kernel = self.kernels.decode(&format!("up_{name}_{other}"))?;
        self.device.launch(&kernel, [total, 1, 1], 256, ring.max(scores), &args)?;
        if let Some((op, linear)) = shared
            && let Some(input) = self.plain_input(op.out, linear[0].0)?
        {
            self.line(input, linear, op.out, None)?;
        } else if let Some((op, linear)) = shared {
            self.linear_now(&Linear { x: op.out, parts: linear })?;
        }
        let (x, part_bytes) = if takes_digits(experts.down_format) {
            (h, (width.div_ceil(64) * crate::buffers::DIGITS_BYTES) as u64)
        } else {
            (self.twin(up.out)?.twin, 2 * width as u64)
        };
        let args = args::Down {
            w: packed.2,
            weights: self.input(down.weights)?,
            plus: self.optional(down.plus)?,
            out: self.output(down.out)?,
            residual: residual.map_or(Ok(Mat::default()), |r| self.residual(r))?,
            ids: self.address(down.ids)?,
            x,
            part_bytes,
            slices: slices(width) as u32,
            top_k: top_k as u32,
        };
        let results = (2 * top_k * slices(width) * 16 * 4) as u32;
        let shared = pipe_bytes(experts.down_format, 1) + results;
        let blocks = even(hidden.div_ceil(16), self.resident(shared)) as u32;
        let kernel = self.kernels.decode(&format!("experts_down_{down_name}"))?;
        self.device.launch(&kernel, [blocks, 1, 1], 256, shared, &args)?;
        Ok(true)
    }

    fn cache_address(&self, cache: Cache) -> DevicePtr {
        self.caches[cache.id as usize].memory.pointer()
    }
}

/// A row that is read in the form that it has.
fn direct(input: &Input) -> RowInput {
    RowInput { x: input.x, digits: input.digits(), ..RowInput::default() }
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
fn row_bytes(input: &RowInput, format: WeightFormat, cols: usize) -> u32 {
    if input.kind == 0 {
        return 0;
    }
    let tile = if takes_digits(format) { crate::buffers::DIGITS_BYTES } else { 128 };
    (cols.div_ceil(64) * tile) as u32
}
