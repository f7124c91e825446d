//! Steps of one row: operations that follow each other are stages of one kernel that stays on the device (`kernels/step.cu`).
//!
//! A recorded step is looked at as a whole ([`Op`]s), from its first operation to its last. What has a stage waits in a list; the
//! list is launched before whatever has none, and at the end. Results are the same bits as those of the operations one by one,
//! which `tests/recorded.rs` checks.
//!
//! | operations | stages |
//! |---|---|
//! | `rms_norm`, `linear` | line (the norm is made by every block for itself) |
//! | `linear` whose output the next `rms_norm` adds | line with a residual |
//! | `rms_norm` of the latent, two `rope`, `kv_store`, `linear_heads` | heads with a latent |
//! | `attend_mla`, `linear_heads` | a kernel, then heads that join its parts |
//! | `rms_norm`, `gate_up` | pair |
//! | `rms_norm`, `linear` of the router, `route`, `gate_up` and `linear` of the shared expert, `moe_gate_up`, `moe_down` | pair with a router, line that chooses, routed pair, down |

use super::products::{activation_args, plain_warps, slices};
use super::{CudaBackend, WARPS};
use crate::args::{
    self, DownStage, HeadsStage, LineStage, Mat, PairStage, Part, RowInput, STAGE_DOWN, STAGE_HEADS, STAGE_LINE,
    STAGE_PAIR, Stage, StageBody,
};
use crate::buffers::{DIGITS_BYTES, Parts};
use crate::driver::{DevicePtr, Memory, device_error};
use crate::kernels::{STEP_RING, STEP_ROWS};
use crate::program::Op;
use crate::weights::{fast_format, takes_digits};
use moellon_ops::{
    AttendMla, Cache, CacheDtype, GateUp, KvStore, Linear, LinearHeads, MoeDown, MoeGateUp, Result, RmsNorm, Rope,
    RopePairs, Route, Tensor, Weight,
};
use moellon_tensor::WeightFormat;

/// Columns of a row whose norm is kept in registers (`ROW_STEPS * ROW_COLUMNS` of row.cuh).
const ROW_COLUMNS: usize = 8192;
/// Columns of a head's input (256 threads with eight each).
const HEAD_COLUMNS: usize = 2048;
/// Warps of a block: those that multiply and those that feed them (`STEP_WARPS` and `FEEDERS` of step.cu).
const STEP_WARPS: u32 = 24 + 4;
/// Bytes for the sums of `down` in a block (`RESULT_BYTES` of step.cu).
const RESULT_BYTES: usize = 8192;
/// Most experts that a router may choose from (`Shared::scores` of step.cu).
const CHOSEN_FROM: usize = 256;

/// The stages of one launch in device memory, and the counters with which its blocks wait for each other.
pub(super) struct Table {
    stages: Memory,
    arrived: Memory,
    num_stages: u32,
}

/// Stages that wait to be launched.
#[derive(Default)]
pub(super) struct Stages {
    list: Vec<Stage>,
    /// Format of the routed experts, and of everything else.
    experts: Option<&'static str>,
    rest: Option<&'static str>,
    row_bytes: usize,
    /// The normed row that lies at the start of the rows, and whether as digits.
    in_row: Option<(Tensor, bool)>,
    /// Tables of the launches of this step: made while it runs, used while it is recorded.
    tables: Vec<Table>,
    used: usize,
    recorded: bool,
}

/// Whose format a stage has.
#[derive(Debug, Clone, Copy)]
enum Role {
    Experts(&'static str),
    Rest(&'static str),
    None,
}

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
            Some(Op::RmsNorm(n)) if n.delta == Some(out) && n.x.rows == 1 && n.x.cols == out.cols => Some(n.x),
            _ => None,
        }
    }

    fn pass(&mut self, count: usize, added: bool) -> bool {
        self.at += count;
        self.added = added;
        true
    }
}

/// The operations of a layer of experts behind its norm.
struct Moe<'a> {
    router: (Weight, Tensor),
    route: &'a Route,
    shared: Option<(&'a GateUp, (Weight, Tensor))>,
    up: &'a MoeGateUp,
    down: &'a MoeDown,
}

impl CudaBackend {
    /// Launches a step; with the tables of an earlier run while it is recorded. Returns those that the launches point at.
    pub(super) fn run_program(&mut self, ops: &[Op], tables: Option<Vec<Table>>) -> (Result<()>, Vec<Table>) {
        self.stages = Stages { recorded: tables.is_some(), tables: tables.unwrap_or_default(), ..Stages::default() };
        let launched = self.launch_program(ops);
        (launched, std::mem::take(&mut self.stages).tables)
    }

    fn launch_program(&mut self, ops: &[Op]) -> Result<()> {
        let mut cursor = Cursor { ops, at: 0, added: false };
        while cursor.at < ops.len() {
            if self.staged(&mut cursor)? {
                continue;
            }
            self.flush()?;
            match &ops[cursor.at] {
                Op::RmsNorm(norm) if cursor.added => self.rms_norm_now(&RmsNorm { delta: None, ..*norm })?,
                op => self.execute(op)?,
            }
            cursor.pass(1, false);
        }
        self.flush()
    }

    /// Makes stages of what starts at the cursor, if there are any for it, and moves past it.
    fn staged(&mut self, cursor: &mut Cursor<'_>) -> Result<bool> {
        match cursor.rest() {
            [
                Op::RmsNorm(latent),
                Op::Rope(q),
                Op::Rope(k),
                Op::KvStore { parts, slots, cache },
                Op::LinearHeads(heads),
                ..,
            ] => {
                let store = KvStore { parts, slots: *slots, cache: *cache };
                Ok(self.heads_with_latent(latent, [q, k], &store, heads)? && cursor.pass(5, false))
            }
            [
                Op::RmsNorm(norm),
                Op::Linear { x, parts: router },
                Op::Route(route),
                Op::GateUp(shared),
                Op::Linear { x: h, parts: shared_down },
                Op::MoeGateUp(up),
                Op::MoeDown(down),
                ..,
            ] if *h == shared.out && shared_down.len() == 1 && down.plus == Some(shared_down[0].1) => {
                let shared = Some((shared, shared_down[0]));
                self.norm_then(cursor, norm, *x, router, Some((route, shared, up, down)))
            }
            [
                Op::RmsNorm(norm),
                Op::Linear { x, parts },
                Op::Route(route),
                Op::MoeGateUp(up),
                Op::MoeDown(down),
                ..,
            ] => self.norm_then(cursor, norm, *x, parts, Some((route, None, up, down))),
            [Op::RmsNorm(norm), Op::Linear { x, parts }, ..] => self.norm_then(cursor, norm, *x, parts, None),
            [Op::RmsNorm(norm), Op::GateUp(op), ..] if norm.out == op.x => {
                if !fits_norm(norm, cursor.added) || norm.x == norm.out {
                    return Ok(false);
                }
                let Some(input) = self.norm_input(norm, op.gate.format)? else { return Ok(false) };
                Ok(self.dense_pair(op, input)? && cursor.pass(2, false))
            }
            [Op::GateUp(op), ..] => {
                let Some(input) = self.plain_input(op.x, op.gate.format)? else { return Ok(false) };
                Ok(self.dense_pair(op, input)? && cursor.pass(1, false))
            }
            [Op::Linear { x, parts }, ..] => {
                let Some(input) = self.plain_input(*x, parts[0].0.format)? else { return Ok(false) };
                let residual = (parts.len() == 1).then(|| cursor.residual_after(1, parts[0].1)).flatten();
                Ok(self.line(input, parts, *x, residual)? && cursor.pass(1, residual.is_some()))
            }
            [Op::AttendMla(attend), Op::LinearHeads(heads), after @ ..] => {
                Ok(self.heads_of_attention(attend, heads, after.first())? && cursor.pass(2, false))
            }
            [Op::LinearHeads(heads), ..] => {
                let Some(args) = self.heads_args(heads)? else { return Ok(false) };
                Ok(self.heads(heads, args)? && cursor.pass(1, false))
            }
            _ => Ok(false),
        }
    }

    /// A norm and the products of its row: a layer of experts, or a line.
    #[allow(clippy::type_complexity)] // The operations of the pattern as they stand.
    fn norm_then(
        &mut self,
        cursor: &mut Cursor<'_>,
        norm: &RmsNorm,
        x: Tensor,
        parts: &[(Weight, Tensor)],
        moe: Option<(&Route, Option<(&GateUp, (Weight, Tensor))>, &MoeGateUp, &MoeDown)>,
    ) -> Result<bool> {
        if !fits_norm(norm, cursor.added) || norm.out != x {
            return Ok(false);
        }
        if let (Some((route, shared, up, down)), [router]) = (moe, parts) {
            let count = if shared.is_some() { 7 } else { 5 };
            let residual = cursor.residual_after(count, down.out);
            let moe = Moe { router: *router, route, shared, up, down };
            if self.moe(norm, &moe, residual)? {
                return Ok(cursor.pass(count, residual.is_some()));
            }
        }
        // In place: other blocks still read the raw values, so nobody gets the floats of the norm.
        let in_place = norm.x == norm.out;
        if in_place && self.reads_floats(&cursor.rest()[2..], norm.out) {
            return Ok(false);
        }
        let Some(input) = self.norm_input(norm, parts[0].0.format)? else { return Ok(false) };
        let residual = (parts.len() == 1).then(|| cursor.residual_after(2, parts[0].1)).flatten();
        Ok(self.line(input, parts, x, residual)? && cursor.pass(2, residual.is_some()))
    }

    // ---- the list ----

    /// Whether there is a kernel for stages with these formats; without one of them the other's stands for both.
    fn has_step(&mut self, experts: Option<&'static str>, rest: Option<&'static str>) -> Result<bool> {
        match (experts.or(rest), rest.or(experts)) {
            (Some(experts), Some(rest)) => Ok(self.kernels.step(experts, rest)?.is_some()),
            _ => Ok(true),
        }
    }

    /// Launches the list if stages with these formats cannot be in it.
    fn make_room(&mut self, roles: &[Role]) -> Result<bool> {
        let fit = |mut experts: Option<&'static str>, mut rest: Option<&'static str>| {
            for role in roles {
                let (slot, name) = match role {
                    Role::Experts(name) => (&mut experts, *name),
                    Role::Rest(name) => (&mut rest, *name),
                    Role::None => continue,
                };
                if *slot.get_or_insert(name) != name {
                    return None;
                }
            }
            Some((experts, rest))
        };
        if let Some((experts, rest)) = fit(self.stages.experts, self.stages.rest)
            && self.has_step(experts, rest)?
        {
            return Ok(true);
        }
        self.flush()?;
        match fit(None, None) {
            Some((experts, rest)) => self.has_step(experts, rest),
            None => Ok(false),
        }
    }

    /// Appends a stage whose format `make_room` has found room for. `row_bytes` from `x_at` on are its row.
    fn push(&mut self, role: Role, stage: Stage, row_bytes: usize) {
        match role {
            Role::Experts(name) => self.stages.experts = Some(name),
            Role::Rest(name) => self.stages.rest = Some(name),
            Role::None => {}
        }
        if stage.x_at == 0 && row_bytes > 0 {
            self.stages.in_row = None;
        }
        self.stages.row_bytes = self.stages.row_bytes.max(stage.x_at as usize + row_bytes);
        self.stages.list.push(stage);
    }

    /// Launches what waits.
    fn flush(&mut self) -> Result<()> {
        let mut list = std::mem::take(&mut self.stages.list);
        let (experts, rest) = (self.stages.experts.take(), self.stages.rest.take());
        let row_bytes = std::mem::take(&mut self.stages.row_bytes).next_multiple_of(128) as u32;
        self.stages.in_row = None;
        if list.is_empty() {
            return Ok(());
        }
        // The launch waits for what came before it.
        list[0].waits = 0;
        let (Some(experts), Some(rest)) = (experts.or(rest), rest.or(experts)) else {
            return Err(device_error("stages without products were to be launched, expected at least one"));
        };
        let kernel = self.kernels.step(experts, rest)?.expect("make_room found it");
        if !self.stages.recorded {
            let device = &mut self.device;
            let stages = device.alloc("stages of a step", std::mem::size_of_val(&list[..]) as u64)?;
            let arrived = device.alloc_zeroed("counters of a step", 4 * list.len() as u64)?;
            device.upload_args(stages.pointer(), &list)?;
            self.stages.tables.push(Table { stages, arrived, num_stages: list.len() as u32 });
        }
        let used = self.stages.used;
        self.stages.used += 1;
        let table = self.stages.tables.get(used).filter(|t| t.num_stages as usize == list.len());
        let Some(table) = table else {
            return Err(device_error(format!(
                "launch {used} of a step that is recorded has {} stages, expected those of the run before",
                list.len()
            )));
        };
        let args = args::Step {
            stages: table.stages.pointer(),
            arrived: table.arrived.pointer(),
            num_stages: table.num_stages,
            pad: 0,
        };
        let grid = [self.device.multiprocessors, 1, 1];
        self.device.launch(&kernel, grid, 32 * STEP_WARPS, STEP_RING + row_bytes, &args)
    }

    // ---- inputs ----

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

    /// The norm of a row as the input of products with weights of `format`.
    fn norm_input(&mut self, norm: &RmsNorm, format: WeightFormat) -> Result<Option<RowInput>> {
        let fits = row_bytes(format, norm.x.cols) <= STEP_ROWS as usize;
        if fast_format(format).is_none() || !fits || ![norm.x, norm.out, norm.weight].into_iter().all(in_eights) {
            return Ok(None);
        }
        let x = self.input(norm.x)?;
        let weight = self.address(norm.weight)?;
        let mut out = self.output(norm.out)?;
        let out_digits = self.buffer(norm.out)?.digits_written(norm.out);
        if norm.x == norm.out {
            out.p = 0;
        }
        Ok(Some(RowInput { x, digits: 0, kind: 2, eps: norm.eps, weight, out, out_digits }))
    }

    /// A row as it is as the input of products with weights of `format`: in the form it has, or made by every block for itself.
    fn plain_input(&mut self, x: Tensor, format: WeightFormat) -> Result<Option<RowInput>> {
        if fast_format(format).is_none() || x.rows != 1 || row_bytes(format, x.cols) > STEP_ROWS as usize {
            return Ok(None);
        }
        let whole = Parts { count: 1, stride: x.cols, cols: x.cols };
        let mat = self.input(x)?;
        if takes_digits(format) && self.buffer(x)?.has_digits(x, whole) {
            let (digits, _) = self.digits_of(x, whole)?;
            return Ok(Some(RowInput { x: mat, digits, ..RowInput::default() }));
        }
        if !takes_digits(format) && x.offset.is_multiple_of(8) && self.buffer(x)?.has_twin(x) {
            return Ok(Some(RowInput { x: self.twin(x)?, ..RowInput::default() }));
        }
        Ok(in_eights(x).then(|| RowInput { x: mat, kind: 1, ..RowInput::default() }))
    }

    fn digits_of(&mut self, x: Tensor, parts: Parts) -> Result<(DevicePtr, bool)> {
        let buffer = self.buffers.get_mut(&x.buffer.id);
        let buffer = buffer.ok_or_else(|| device_error(format!("buffer {} was freed", x.buffer.id)))?;
        buffer.digits(x, parts, &mut self.device)
    }

    /// The view that a producer adds to.
    fn residual(&mut self, x: Tensor) -> Result<Mat> {
        let mat = self.input(x)?;
        self.buffer(x)?.written_by_host();
        Ok(mat)
    }

    // ---- stages ----

    /// Products of one row with weights; those of another format than the first follow one by one.
    fn line(
        &mut self,
        input: RowInput,
        parts: &[(Weight, Tensor)],
        x: Tensor,
        residual: Option<Tensor>,
    ) -> Result<bool> {
        let format = parts[0].0.format;
        let (same, others): (Vec<_>, Vec<_>) = parts.iter().copied().partition(|(w, _)| w.format == format);
        let cols = parts[0].0.cols;
        let role = Role::Rest(fast_format(format).expect("checked by who made the input"));
        if !self.make_room(&[role])? {
            return Ok(false);
        }
        let mut input = input;
        for group in same.chunks(4) {
            let mut line = self.line_stage(input, group)?;
            if let Some(residual) = residual {
                line.residual = self.residual(residual)?;
            }
            self.push(role, stage(STAGE_LINE, cols, StageBody { line }), row_bytes(format, cols));
            // Written once; the next group finds the row where it is.
            input = RowInput { kind: 3, out: Mat::default(), out_digits: 0, ..input };
        }
        if !others.is_empty() {
            self.flush()?;
            self.linear_now(&Linear { x, parts: &others })?;
        }
        Ok(true)
    }

    fn line_stage(&mut self, input: RowInput, parts: &[(Weight, Tensor)]) -> Result<LineStage> {
        let mut line = LineStage { num_parts: parts.len() as u32, input, ..LineStage::default() };
        let mut units = 0;
        for (i, (weight, out)) in parts.iter().enumerate() {
            line.part[i] = Part { w: self.weights[weight.id as usize].packed, out: self.output(*out)? };
            line.first_unit[i] = units;
            units += weight.rows.div_ceil(16) as u32;
            line.first_unit[i + 1..].fill(units);
        }
        Ok(line)
    }

    /// The arguments of a product a head, if there is a stage for it.
    fn heads_args(&mut self, op: &LinearHeads) -> Result<Option<HeadsStage>> {
        let format = op.weight.format;
        if fast_format(format).is_none() || op.x.rows != 1 || op.weight.cols > HEAD_COLUMNS {
            return Ok(None);
        }
        let eights =
            op.x_head_stride.is_multiple_of(8) && op.x.offset.is_multiple_of(8) && op.weight.cols.is_multiple_of(8);
        if !eights || self.heads_bytes(op.weight) > STEP_ROWS as usize {
            return Ok(None);
        }
        Ok(Some(HeadsStage {
            w: self.weights[op.weight.id as usize].packed,
            x: self.address(op.x)?,
            x_head_stride: op.x_head_stride as u32,
            num_heads: op.weight.count as u32,
            ..HeadsStage::default()
        }))
    }

    /// Row tiles that a block has of a product a head.
    fn units_of_block(&self, weight: Weight) -> usize {
        (weight.count * weight.rows.div_ceil(16)).div_ceil(self.device.multiprocessors as usize)
    }

    /// Shared memory for the inputs of the heads that these belong to (which may begin and end within one), also as floats.
    fn heads_bytes(&self, weight: Weight) -> usize {
        let row_tiles = weight.rows.div_ceil(16);
        let heads = (self.units_of_block(weight) + row_tiles - 2) / row_tiles + 1;
        heads * (row_bytes(weight.format, weight.cols) + 4 * weight.cols) + 16
    }

    fn heads(&mut self, op: &LinearHeads, mut args: HeadsStage) -> Result<bool> {
        let format = op.weight.format;
        let role = Role::Rest(fast_format(format).expect("checked by who made the arguments"));
        if !self.make_room(&[role])? {
            return Ok(false);
        }
        args.out = self.output(op.out)?;
        if args.out_digits != 0 {
            self.buffer(op.out)?.digits_written(op.out);
        }
        let bytes = self.heads_bytes(op.weight);
        self.push(role, stage(STAGE_HEADS, op.weight.cols, StageBody { heads: args }), bytes);
        Ok(true)
    }

    /// The rest of latent attention's input beside the queries' product with its heads.
    fn heads_with_latent(
        &mut self,
        norm: &RmsNorm,
        [q, k]: [&Rope; 2],
        store: &KvStore<'_>,
        heads: &LinearHeads,
    ) -> Result<bool> {
        let in_place = norm.delta.is_none() && norm.x == norm.out && norm.x.rows == 1 && norm.x.cols <= HEAD_COLUMNS;
        let stored = matches!(store.parts, [latent, k_pe] if *latent == norm.x && *k_pe == k.x);
        let rotated = k.num_heads == 1 && q.table == k.table && q.pairs == k.pairs && q.x.rows == 1;
        // The product reads what is not rotated.
        let head_end = heads.x.offset + heads.weight.cols;
        let apart =
            heads.x.buffer.id == q.x.buffer.id && q.head_stride == heads.x_head_stride && q.x.offset >= head_end;
        if !(in_place && stored && rotated && apart) {
            return Ok(false);
        }
        let Some(mut args) = self.heads_args(heads)? else { return Ok(false) };
        args.has_latent = 1;
        args.latent = args::Latent {
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
        };
        self.heads(heads, args)
    }

    /// Attention whose parts are joined by the product behind it, which also makes digits for the one after.
    fn heads_of_attention(&mut self, op: &AttendMla, heads: &LinearHeads, after: Option<&Op>) -> Result<bool> {
        let joined =
            heads.x == op.out && heads.x_head_stride == op.kv_lora_rank && heads.weight.cols == op.kv_lora_rank;
        if !joined || op.q_latent.rows != 1 || heads.weight.cols > 512 {
            return Ok(false);
        }
        let Some(mut args) = self.heads_args(heads)? else { return Ok(false) };
        self.flush()?;
        let (mut attend, max_keys) = self.attend_mla_args(op)?;
        self.attend_parts(&mut attend, 1, max_keys)?;
        (args.joins, args.attend) = (1, attend);
        // A block must have whole tiles of digits.
        let whole = heads.weight.rows.is_multiple_of(64) && self.units_of_block(heads.weight).is_multiple_of(4);
        let wanted = matches!(after, Some(Op::Linear { x, .. }) if *x == heads.out);
        if whole && wanted {
            args.out_digits = self.buffer(heads.out)?.digits_written(heads.out);
        }
        self.heads(heads, args)
    }

    /// Gate and up of a dense feed-forward or of a shared expert, without their input.
    fn pair_args(&mut self, op: &GateUp) -> Result<Option<PairStage>> {
        if op.gate.format != op.up.format || fast_format(op.gate.format).is_none() || op.x.rows != 1 {
            return Ok(None);
        }
        Ok(Some(PairStage {
            gate: self.weights[op.gate.id as usize].packed,
            up: self.weights[op.up.id as usize].packed,
            out: self.output(op.out)?,
            activation: activation_args(op.activation),
            ..PairStage::default()
        }))
    }

    fn dense_pair(&mut self, op: &GateUp, input: RowInput) -> Result<bool> {
        let Some(pair) = self.pair_args(op)? else { return Ok(false) };
        let role = Role::Rest(fast_format(op.gate.format).expect("a pair has one"));
        if !self.make_room(&[role])? {
            return Ok(false);
        }
        let pair = PairStage { input, ..pair };
        self.push(role, stage(STAGE_PAIR, op.gate.cols, StageBody { pair }), row_bytes(op.gate.format, op.gate.cols));
        Ok(true)
    }

    /// The norm, the router and the shared expert; the choice; the chosen experts.
    fn moe(&mut self, norm: &RmsNorm, moe: &Moe<'_>, residual: Option<Tensor>) -> Result<bool> {
        let Some(roles) = self.moe_roles(norm, moe) else { return Ok(false) };
        let (experts, up) = (moe.up.experts, moe.up);
        let (hidden, width, top_k) = (experts.hidden_size, experts.intermediate_size, up.ids.cols);
        let digits = takes_digits(experts.gate_format);
        let norm_bytes = row_bytes(experts.gate_format, hidden);
        let Some(input) = self.norm_input(norm, experts.gate_format)? else { return Ok(false) };
        if !self.make_room(&roles)? {
            return Ok(false);
        }
        // The router, and the shared expert's first half.
        let mut pair = match moe.shared {
            Some((op, _)) => self.pair_args(op)?.expect("its roles were found"),
            None => PairStage::default(),
        };
        let (router, logits) = moe.router;
        let weight = &self.weights[router.id as usize];
        (pair.router, pair.router_bias) = (weight.plain, weight.bias());
        pair.router_rows = router.rows as u32;
        pair.router_kind = match router.format {
            WeightFormat::F32 => 0,
            WeightFormat::F16 => 1,
            _ => 2,
        };
        pair.router_out = self.output(logits)?;
        pair.input = input;
        // Its format decides how the row lies; without one, that of the experts.
        pair.gate.cols = hidden as u32;
        // The router reads the row as floats, which lie behind it.
        self.push(roles[0], stage(STAGE_PAIR, hidden, StageBody { pair }), norm_bytes + 4 * hidden);
        self.stages.in_row = Some((norm.out, digits));
        // The shared expert's second half, and the choice beside it.
        let mut line = match moe.shared {
            Some((op, down)) => {
                let x = self.input(op.out)?;
                self.line_stage(RowInput { x, kind: 1, ..RowInput::default() }, &[down])?
            }
            None => LineStage::default(),
        };
        line.route = self.route_args(moe.route)?;
        let (cols, bytes) = match moe.shared {
            Some((_, (weight, _))) => (weight.cols, row_bytes(weight.format, weight.cols)),
            None => (hidden, 0),
        };
        let mut choice = stage(STAGE_LINE, cols, StageBody { line });
        choice.x_at = norm_bytes as u32;
        self.push(Role::None, choice, bytes);
        // The chosen experts, which find the row where it is.
        let packed = {
            let e = &self.experts[experts.id as usize];
            (e.gate.packed, e.up.packed, e.down.packed)
        };
        let pair = PairStage {
            gate: packed.0,
            up: packed.1,
            out: self.output(up.out)?,
            input: RowInput { kind: 3, ..RowInput::default() },
            top_k: top_k as u32,
            activation: activation_args(up.activation),
            ..PairStage::default()
        };
        let mut routed = stage(STAGE_PAIR, hidden, StageBody { pair });
        routed.waits = 0;
        self.push(roles[1], routed, 0);
        let down = DownStage {
            w: packed.2,
            plus: self.optional(moe.down.plus)?,
            out: self.output(moe.down.out)?,
            residual: residual.map_or(Ok(Mat::default()), |r| self.residual(r))?,
            h: self.address(up.out)?,
            top_k: top_k as u32,
            pad: 0,
        };
        let bytes = top_k * row_bytes(experts.down_format, width);
        self.push(roles[1], stage(STAGE_DOWN, width, StageBody { down }), bytes);
        Ok(true)
    }

    /// The formats of a layer of experts, [everything else, experts], if its operations fit together and have stages.
    fn moe_roles(&self, norm: &RmsNorm, moe: &Moe<'_>) -> Option<[Role; 2]> {
        let Moe { router: (router, logits), route, shared, up, down } = moe;
        let experts = up.experts;
        let (hidden, width, top_k) = (experts.hidden_size, experts.intermediate_size, up.ids.cols);
        let chosen = down.h == up.out && down.ids == up.ids && up.ids == route.ids && down.weights == route.weights;
        let name = fast_format(experts.gate_format)?;
        let same = experts.gate_format == experts.up_format && fast_format(experts.down_format)? == name;
        let plain = matches!(router.format, WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16);
        let routed = *logits == route.logits && plain && plain_warps(router.cols) == WARPS;
        let row_tiles = hidden.div_ceil(16).div_ceil(self.device.multiprocessors as usize);
        let fits = route.n_group <= 1
            && top_k <= 32
            && experts.num_experts <= CHOSEN_FROM
            && width.is_multiple_of(64)
            && row_bytes(experts.gate_format, hidden) + 4 * hidden <= STEP_ROWS as usize
            && row_tiles * top_k * slices(width) * 64 <= RESULT_BYTES
            && top_k * row_bytes(experts.down_format, width) <= STEP_ROWS as usize;
        let in_place = norm.x == norm.out;
        if !chosen || !same || !routed || !fits || in_place || up.x != norm.out || up.x.rows != 1 {
            return None;
        }
        let rest = match shared {
            Some((op, (weight, _))) => {
                let rest = fast_format(op.gate.format)?;
                let alike = op.x == up.x && op.gate.format == op.up.format && op.gate.cols == hidden;
                let form = takes_digits(op.gate.format) == takes_digits(experts.gate_format);
                let bytes = row_bytes(experts.gate_format, hidden) + row_bytes(weight.format, weight.cols);
                if !alike || !form || fast_format(weight.format)? != rest || bytes > STEP_ROWS as usize {
                    return None;
                }
                rest
            }
            // The router alone takes the row in the form of the experts, which is that of everything else in a kernel.
            None => return Some([Role::None, Role::Experts(name)]),
        };
        Some([Role::Rest(rest), Role::Experts(name)])
    }

    fn cache_address(&self, cache: Cache) -> DevicePtr {
        self.caches[cache.id as usize].memory.pointer()
    }
}

/// Whether the row of a norm can be made by every block for itself.
fn fits_norm(norm: &RmsNorm, added: bool) -> bool {
    (norm.delta.is_none() || added) && norm.x.rows == 1 && norm.x.cols <= ROW_COLUMNS
}

/// Whether a row can be read and written eight elements at a time.
fn in_eights(x: Tensor) -> bool {
    x.offset.is_multiple_of(8) && x.cols.is_multiple_of(8)
}

/// A stage that waits for the one before it, with its row at the start of the rows.
fn stage(kind: u32, cols: usize, body: StageBody) -> Stage {
    Stage { kind, waits: 1, slices: slices(cols) as u32, x_at: 0, body }
}

/// Shared memory for a row of `cols` columns in the form that `format` reads.
fn row_bytes(format: WeightFormat, cols: usize) -> usize {
    cols.div_ceil(64) * if takes_digits(format) { DIGITS_BYTES } else { 128 }
}
