//! Experts of a step of one row: the router with the choice, the chosen experts and the shared one, in three kernels of `kernels/decode.cu`.

use super::decode::{Cursor, direct, even, is_wide, row_bytes, shares};
use super::few::is_few;
use super::products::{activation_args, plain_warps, slices};
use super::{COUNTERS, CudaBackend, WARPS};
use crate::args;
use crate::args::{Mat, RowInput, UpPair};
use crate::buffers::Parts;
use crate::weights::{fast_format, pipe_bytes, takes_digits, tile_bytes};
use moellon_ops::program::Op;
use moellon_ops::{GateUp, Linear, MoeDown, MoeGateUp, Result, RmsNorm, Route, Tensor, Weight};
use moellon_tensor::WeightFormat;

/// Most blocks of `pair` that a multiprocessor has at a time: its norm needs more registers than other kernels.
const PAIR_BLOCKS: usize = 2;
/// Most experts that a router may choose from where a block makes the choice, a thread an expert.
const CHOSEN_FROM: usize = 256;

impl CudaBackend {
    /// The router beside the shared expert's first half, if there is one, and what follows it up to the chosen experts' second, from the cursor on.
    pub(super) fn router_and_experts(&mut self, cursor: &mut Cursor<'_>) -> Result<bool> {
        let [Op::RmsNorm(norm), Op::Linear { x: normed, parts: router }, Op::Route(route), rest @ ..] = cursor.rest()
        else {
            return Ok(false);
        };
        let (shared, experts, count) = match rest {
            [Op::GateUp(op), Op::Linear { x, parts }, experts @ ..] if *x == op.out => {
                (Some((op, parts.as_slice())), experts, 7)
            }
            experts => (None, experts, 5),
        };
        let [Op::MoeGateUp(up), Op::MoeDown(down), ..] = experts else { return Ok(false) };
        let [(weight, logits)] = router[..] else { return Ok(false) };
        let added = norm.delta.is_none() || cursor.added;
        let chained = norm.out == *normed && route.logits == logits && up.x == norm.out;
        let beside = match shared {
            Some((op, [(_, out)])) => {
                let reads = op.x == norm.out && op.gate.cols == weight.cols && down.plus == Some(*out);
                reads && self.pair_format(op).is_some()
            }
            Some(_) => false,
            None => down.plus.is_none(),
        };
        if !(added && chained && beside) || router_kind(norm, weight).is_none() {
            return Ok(false);
        }
        let residual = cursor.residual_after(count, down.out);
        let router = Some((norm, weight, logits));
        if !self.experts(router, route, shared, up, down, residual)? {
            return Ok(false);
        }
        cursor.at += count;
        cursor.added = residual.is_some();
        Ok(true)
    }

    /// The format of gate and up of a dense feed-forward or of a shared expert of one row, if there is a kernel.
    fn pair_format(&self, op: &GateUp) -> Option<&'static str> {
        fast_format(op.gate.format).filter(|_| op.gate.format == op.up.format && op.x.rows == 1)
    }

    /// Gate and up of a dense feed-forward. False without a kernel.
    pub(super) fn pair(&mut self, op: &GateUp) -> Result<bool> {
        if self.pair_format(op).is_none() {
            return Ok(false);
        }
        let mut args = args::Pair { input: direct(&self.whole_input(op.x, op.gate.format)?), ..args::Pair::default() };
        self.launch_pair(&mut args, Some(op))?;
        Ok(true)
    }

    /// The router, which also makes the choice if `route` is one that the kernel knows, beside gate and up of a shared expert, whose blocks then make
    /// the norm for themselves. Returns whether the choice is made.
    pub(super) fn router(
        &mut self,
        (norm, weight, logits): (&RmsNorm, Weight, Tensor),
        route: Option<&Route>,
        beside: Option<&GateUp>,
    ) -> Result<bool> {
        let mut args = args::Pair {
            router_kind: router_kind(norm, weight).expect("checked by who names the router"),
            router: self.router_args(norm, weight, logits)?,
            ..args::Pair::default()
        };
        let route = route.filter(|route| route.n_group <= 1 && weight.rows <= CHOSEN_FROM);
        if let Some(route) = route {
            args.route = self.route_args(route)?;
            args.arrived = self.counters(COUNTERS)?;
        }
        args.input = RowInput { out: Mat::default(), out_digits: 0, ..args.router.input };
        self.launch_pair(&mut args, beside)?;
        Ok(route.is_some())
    }

    /// Launches the router that is in `args`, if one is, beside gate and up, if they are given.
    fn launch_pair(&mut self, args: &mut args::Pair, op: Option<&GateUp>) -> Result<()> {
        let rows = args.router.rows;
        let Some(op) = op else {
            // Any of them: there is no pair.
            let kernel = self.kernels.decode("pair_affine4")?;
            return self.device.launch(&kernel, [rows, 1, 1], 256, 0, args);
        };
        let format = op.gate.format;
        let name = self.pair_format(op).expect("checked by who names the pair");
        (args.slices, args.activation) = (slices(op.gate.cols) as u32, activation_args(op.activation));
        args.pair = UpPair {
            gate: self.weights[op.gate.id as usize].packed,
            up: self.weights[op.up.id as usize].packed,
            out: self.output(op.out)?,
            x: 0,
        };
        let shared = pipe_bytes(format, 2) + row_bytes(&args.input, format, op.gate.cols);
        // Blocks of the router are short.
        let resident = self.resident(shared).min(self.device.multiprocessors as usize * PAIR_BLOCKS);
        let most = resident.saturating_sub(rows as usize).max(resident / 2);
        let units = op.gate.rows.div_ceil(16).div_ceil(WARPS / slices(op.gate.cols));
        let kernel = self.kernels.decode(&format!("pair_{name}"))?;
        self.device.launch(&kernel, [rows + even(units, most) as u32, 1, 1], 256, shared, args)
    }

    /// The router's choice, the chosen experts and the shared one, after the router itself where it is given. False, with nothing launched,
    /// without kernels.
    pub(super) fn experts(
        &mut self,
        router: Option<(&RmsNorm, Weight, Tensor)>,
        route: &Route,
        shared: Option<(&GateUp, &[(Weight, Tensor)])>,
        up: &MoeGateUp,
        down: &MoeDown,
        residual: Option<Tensor>,
    ) -> Result<bool> {
        let experts = up.experts;
        let (width, top_k) = (experts.intermediate_size, up.ids.cols);
        let same = down.h == up.out && down.ids == up.ids && up.ids == route.ids && down.weights == route.weights;
        let formats = (fast_format(experts.gate_format), fast_format(experts.down_format));
        if same && is_few(up.x.rows) {
            return self.few_experts(route, shared, up, down, residual);
        }
        let (Some(name), Some(down_name)) = formats else { return Ok(false) };
        let fits = top_k <= 32 && top_k * width / 64 <= COUNTERS && width.is_multiple_of(64);
        if !same || !fits || up.x.rows != 1 || experts.gate_format != experts.up_format {
            return Ok(false);
        }
        let chosen = match (router, shared) {
            (Some(router), shared) => self.router(router, Some(route), shared.map(|(op, _)| op))?,
            (None, Some((op, _))) => {
                if !self.pair(op)? {
                    self.gate_up_now(op)?;
                }
                false
            }
            (None, None) => false,
        };
        if !chosen {
            self.route_now(route)?;
        }
        self.experts_up(name, shared, up)?;
        let hidden = experts.hidden_size;
        let (x, part_bytes) = if takes_digits(experts.down_format) {
            let parts = Parts { count: top_k, stride: width, cols: width };
            let buffer = self.buffers.get_mut(&up.out.buffer.id).expect("output found it");
            let (digits, _) = buffer.digits(up.out, parts, &mut self.device)?;
            (digits, (width.div_ceil(64) * crate::buffers::DIGITS_BYTES) as u64)
        } else {
            (self.twin(up.out)?.twin, 2 * width as u64)
        };
        let args = args::Down {
            w: self.experts[experts.id as usize].down.packed,
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

    /// The chosen experts' gate and up; beside the shared expert's second product, or after it where there is no kernel for
    /// both formats.
    fn experts_up(&mut self, name: &str, shared: Option<(&GateUp, &[(Weight, Tensor)])>, up: &MoeGateUp) -> Result<()> {
        let experts = up.experts;
        let (hidden, width, top_k) = (experts.hidden_size, experts.intermediate_size, up.ids.cols);
        let x = direct(&self.whole_input(up.x, experts.gate_format)?);
        let mut args = args::Up {
            slices: slices(hidden) as u32,
            ids: self.address(up.ids)?,
            top_k: top_k as u32,
            activation: activation_args(up.activation),
            ..args::Up::default()
        };
        let out = self.output(up.out)?;
        let packed = {
            let e = &self.experts[experts.id as usize];
            (e.gate.packed, e.up.packed)
        };
        let from = if takes_digits(experts.gate_format) { x.digits } else { x.x.twin };
        args.routed = UpPair { gate: packed.0, up: packed.1, out, x: from };
        // The hidden values in the form that `down` reads.
        if takes_digits(experts.down_format) {
            let parts = Parts { count: top_k, stride: width, cols: width };
            let buffer = self.buffers.get_mut(&up.out.buffer.id).expect("output found it");
            (args.h_digits, _) = buffer.digits(up.out, parts, &mut self.device)?;
            args.arrived = self.counters(COUNTERS)?;
        }
        let routed = (top_k * width).div_ceil(16).div_ceil(WARPS / slices(hidden));
        let mut ring = pipe_bytes(experts.gate_format, 2);
        let mut blocks = even(routed, self.resident(ring));
        let mut other = name;
        if let Some((op, parts)) = shared {
            let weight = parts[0].0;
            let input = self.plain_input(op.out, weight)?;
            let beside = fast_format(weight.format);
            let known = match beside {
                Some(other) => other == name || self.kernels.has_decode(&format!("up_{name}_{other}"))?,
                None => false,
            };
            match input {
                Some(input) if known => {
                    other = beside.unwrap_or(name);
                    ring = ring.max(pipe_bytes(weight.format, 1) + row_bytes(&input, weight.format, weight.cols));
                    let (line, units) = self.line_args(input, parts, None, 16)?;
                    args.shared = line;
                    let tiles = |cols: usize, format| cols.div_ceil(64) as u32 * tile_bytes(format);
                    let side = WARPS / slices(weight.cols);
                    // Bytes of what a block does at a time: row tiles side by side of the one, both matrices of the other.
                    let own = (units.div_ceil(side), side as u32 * tiles(weight.cols, weight.format));
                    let pairs = 2 * (WARPS / slices(hidden)) as u32 * tiles(hidden, experts.gate_format);
                    let (first, rest) = shares(own, (routed, pairs), self.resident(ring));
                    args.shared_blocks = first as u32;
                    blocks = first + rest;
                }
                Some(input) => self.line(input, parts, op.out, None)?,
                None => self.linear_now(&Linear { x: op.out, parts })?,
            }
        }
        let kernel = self.kernels.decode(&format!("up_{name}_{other}"))?;
        self.device.launch(&kernel, [blocks as u32, 1, 1], 256, ring, &args)
    }
}

/// How the kernels call the type of a router's weight, if it and its norm are ones that they know.
pub(super) fn router_kind(norm: &RmsNorm, weight: Weight) -> Option<u32> {
    let kind = match weight.format {
        WeightFormat::F32 => 0,
        WeightFormat::F16 => 1,
        WeightFormat::Bf16 => 2,
        _ => return None,
    };
    let offsets = [norm.x.offset, norm.out.offset, norm.weight.offset];
    let known = norm.x != norm.out
        && norm.x.rows == 1
        && plain_warps(weight.cols) == WARPS
        && weight.cols <= super::decode::ROW_COLUMNS
        && is_wide(weight.cols, &offsets);
    known.then_some(kind)
}
