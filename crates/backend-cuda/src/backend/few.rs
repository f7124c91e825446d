//! Steps of two to 32 rows: several sequences, or one whose drafts are verified. Products are launched as the kernels of
//! `kernels/few.cu`, the router's choice, the chosen experts and the shared one together; the rest operation by operation. The results are the
//! bits of the single operations, which `tests/recorded.rs` checks.

use super::decode::{even, shares};
use super::products::{Input, activation_args, slices};
use super::{COUNTERS, CudaBackend, GEMV_ROWS, WARPS};
use crate::args;
use crate::args::{FewPair, Mat, Part};
use crate::buffers::{DIGITS_BYTES, Parts};
use crate::driver::DevicePtr;
use crate::weights::{LINE_WARPS, fast_format, few_group_bytes, few_line_bytes, takes_digits, tile_bytes};
use moellon_ops::{
    AttendMla, GateUp, KvStore, Linear, LinearHeads, MoeDown, MoeGateUp, Result, RmsNorm, Rope, Route, Tensor, Weight,
};
use moellon_tensor::WeightFormat;

/// `MAX_CHOICES` and `MAX_EXPERTS` of few.cu.
const MAX_CHOICES: usize = 256;
const MAX_EXPERTS: usize = 512;
/// Rows that share a pass over an expert's weights (`GROUP`).
const GROUP: usize = 8;
/// Row tiles of a warp (`TALL`).
const TALL: usize = 2;
/// Threads of blocks with the warp that copies rows.
const THREADS: u32 = 32 * (WARPS as u32 + 1);
const LINE_THREADS: u32 = 32 * (LINE_WARPS as u32 + 1);
/// Bytes of `Plan` of few.cu.
const PLAN_BYTES: u64 = 16 + 6 * MAX_CHOICES as u64;
/// Shared memory that the warps that choose experts may have.
const CHOICE_SHARED: usize = 40 << 10;

/// Whether a step of so many rows has these kernels.
pub(super) fn is_few(rows: usize) -> bool {
    (2..=GEMV_ROWS).contains(&rows)
}

/// Rows as products with weights of `format` read them, and the bytes between two of them.
fn rows_of(input: &Input, format: WeightFormat, cols: usize) -> (DevicePtr, u64) {
    if takes_digits(format) {
        (input.digits(), (cols.div_ceil(64) * DIGITS_BYTES) as u64)
    } else {
        (input.x.twin, 2 * u64::from(input.x.stride))
    }
}

/// Name of a format in the kernels for a few rows of `cols` columns. Rows in bfloat16 are copied by whole tiles, so they must have those.
fn few_name(format: WeightFormat, cols: usize) -> Option<&'static str> {
    let whole = takes_digits(format) || cols.is_multiple_of(64);
    fast_format(format).filter(|_| whole)
}

/// [`few_name`] of a weight.
pub(super) fn few_format(weight: Weight) -> Option<&'static str> {
    few_name(weight.format, weight.cols)
}

/// How many blocks share the slices of each of `groups` groups of row tiles of `tiles` tiles: what is left waiting if few blocks have all
/// of a row each, against adding the slices of several blocks. Times in those of a block's eight tiles at full bandwidth.
fn slice_shares(groups: usize, slices: usize, tiles: usize, rows: usize, multiprocessors: usize) -> usize {
    /// Adding what several blocks have.
    const JOIN: f64 = 20.0;
    // Blocks that a multiprocessor needs to hide what multiplying waits for.
    let hidden = match rows {
        ..=8 => 1.5,
        9..=16 => 2.0,
        _ => 3.0,
    };
    let time = |shares: usize| {
        let blocks = (groups * shares) as f64 / multiprocessors as f64;
        let blocks = if blocks <= 3.0 { blocks.ceil() } else { blocks };
        tiles.div_ceil(shares) as f64 * blocks.max(hidden) + if shares > 1 { JOIN } else { 0.0 }
    };
    let choices = [1, 2, 4, 8].into_iter().filter(|n| *n <= slices);
    choices.min_by(|a, b| time(*a).total_cmp(&time(*b))).unwrap_or(1)
}

/// Blocks for so many units where `most` are resident. Where some would have two units and others one, all have two: the second units
/// would have the device to themselves (36 us for GLM-5.2's queries with 32 rows, 27 with fewer blocks; H200, cuda-decode-layer).
fn line_blocks(units: usize, most: usize) -> usize {
    if units <= 2 * most { even(units, most) } else { most }
}

/// Distinct experts that `rows` rows choose, if every choice is as likely as any other.
fn expected_experts(num_experts: usize, top_k: usize, rows: usize) -> usize {
    let missed = (1.0 - top_k as f64 / num_experts as f64).powi(rows as i32);
    ((1.0 - missed) * num_experts as f64).ceil() as usize
}

impl CudaBackend {
    /// Products of a few rows with weights of any formats; `residual` is for a single weight.
    pub(super) fn few_linear(&mut self, x: Tensor, parts: &[(Weight, Tensor)], residual: Option<Tensor>) -> Result<()> {
        let mut rest = parts.to_vec();
        while let Some((first, _)) = rest.first().copied() {
            let (same, others): (Vec<_>, Vec<_>) = rest.into_iter().partition(|(w, _)| w.format == first.format);
            rest = others;
            match few_format(first) {
                Some(name) => {
                    for group in same.chunks(4) {
                        self.few_line(x, name, group, residual)?;
                    }
                }
                None => self.linear_now(&Linear { x, parts: &same })?,
            }
        }
        Ok(())
    }

    /// Up to four weights of one format.
    fn few_line(&mut self, x: Tensor, name: &str, parts: &[(Weight, Tensor)], residual: Option<Tensor>) -> Result<()> {
        let (format, cols) = (parts[0].0.format, parts[0].0.cols);
        let input = self.whole_input(x, format)?;
        let (from, x_bytes) = rows_of(&input, format, cols);
        let mut args = args::Dense {
            num_parts: parts.len() as u32,
            x: from,
            x_bytes,
            matrices: 1,
            residual: residual.map_or(Ok(Mat::default()), |r| self.residual(r))?,
            ..args::Dense::default()
        };
        for (i, (weight, out)) in parts.iter().enumerate() {
            args.part[i] = Part { w: self.weights[weight.id as usize].packed, out: self.output(*out)? };
        }
        self.launch_line(args, name, format, x.rows)
    }

    /// A product a head. False without a kernel.
    pub(super) fn few_heads(&mut self, op: &LinearHeads) -> Result<bool> {
        let (format, cols, heads) = (op.weight.format, op.weight.cols, op.weight.count);
        let Some(name) = few_format(op.weight) else { return Ok(false) };
        op.validate()?;
        let input = self.product_input(op.x, format, Parts { count: heads, stride: op.x_head_stride, cols })?;
        let (from, bytes) = rows_of(&input, format, cols);
        let (x_bytes, x_matrix_bytes) =
            if takes_digits(format) { (bytes * heads as u64, bytes as u32) } else { (bytes, 2 * input.head_stride()) };
        let mut args = args::Dense {
            num_parts: 1,
            x: from,
            x_bytes,
            matrices: heads as u32,
            x_matrix_bytes,
            ..args::Dense::default()
        };
        args.part[0] = Part { w: self.weights[op.weight.id as usize].packed, out: self.output(op.out)? };
        self.launch_line(args, name, format, op.x.rows)?;
        Ok(true)
    }

    /// Cuts the parts into units and launches.
    fn launch_line(&mut self, mut dense: args::Dense, name: &str, format: WeightFormat, rows: usize) -> Result<()> {
        let (variant, rows_of_kernel) = match rows {
            ..=4 => ("line4", 4),
            5..=8 => ("line8", 8),
            9..=16 => ("line16", 16),
            _ => ("line32", 32),
        };
        let cols = dense.part[0].w.cols as usize;
        (dense.slices, dense.rows) = (slices(cols) as u32, rows as u32);
        if self.launch_lines(&dense, format)? {
            return Ok(());
        }
        let mut units = 0;
        for i in 0..dense.num_parts as usize {
            dense.first_unit[i] = units;
            units += dense.part[i].w.rows.div_ceil((16 * TALL * LINE_WARPS) as u32);
            dense.first_unit[i + 1] = units;
        }
        let groups = (units * dense.matrices) as usize;
        let multiprocessors = self.device.multiprocessors as usize;
        let mut args = args::FewLine { dense, ..args::FewLine::default() };
        let mut shares = slice_shares(groups, slices(cols), cols.div_ceil(64), rows, multiprocessors);
        if shares > 1 && groups * LINE_WARPS <= COUNTERS {
            let floats = groups * slices(cols) * 16 * TALL * LINE_WARPS * rows_of_kernel.max(8);
            args.sums = self.slice_sums.pointer("sums of slices", 4 * floats as u64, &mut self.device)?;
            args.arrived = self.counters(COUNTERS)?;
        } else {
            shares = 1;
        }
        args.shares = shares as u32;
        let shared = few_line_bytes(format, rows_of_kernel as u32);
        let kernel = self.kernels.few(&format!("few_{variant}_{name}"))?;
        let blocks = line_blocks(groups * shares, self.device.resident_blocks(&kernel, LINE_THREADS, shared)?) as u32;
        self.device.launch(&kernel, [blocks, 1, 1], LINE_THREADS, shared, &args)
    }

    /// Latent attention's input: the norm and the rotation of its keys, their rows in the cache, the rotation of its queries.
    pub(super) fn few_latent(&mut self, norm: &RmsNorm, [q, k]: [&Rope; 2], store: &KvStore<'_>) -> Result<bool> {
        let Some(args) = self.latent_args(norm, [q, k], store)? else { return Ok(false) };
        let pairs = q.num_heads * q.table.cols / 2;
        let kernel = self.kernels.few("latent_rows")?;
        self.device.launch(&kernel, [1 + pairs.div_ceil(512) as u32, norm.x.rows as u32, 1], 256, 0, &args)?;
        Ok(true)
    }

    /// Attention whose result is also written as the digits that the product behind it reads.
    pub(super) fn few_attend(&mut self, op: &AttendMla, heads: &LinearHeads) -> Result<bool> {
        let rank = op.kv_lora_rank;
        let read = heads.x == op.out && heads.x_head_stride == rank && heads.weight.cols == rank;
        if !read || !takes_digits(heads.weight.format) || !rank.is_multiple_of(256) {
            return Ok(false);
        }
        op.validate()?;
        let (args, max_keys) = self.attend_mla_args(op)?;
        let parts = Parts { count: op.num_heads, stride: rank, cols: rank };
        let buffer = self.buffers.get_mut(&op.out.buffer.id).expect("the arguments named it");
        let (digits, _) = buffer.digits(op.out, parts, &mut self.device)?;
        self.attend(args, op.q_latent.rows, max_keys, op.index.map(|i| i.ids.stride), digits)?;
        Ok(true)
    }

    /// Gate and up of a dense feed-forward or of a shared expert; `None` without a kernel.
    fn few_pair(&mut self, op: &GateUp) -> Result<Option<FewPair>> {
        if op.gate.format != op.up.format || few_format(op.gate).is_none() {
            return Ok(None);
        }
        let input = self.whole_input(op.x, op.gate.format)?;
        let (x, x_bytes) = rows_of(&input, op.gate.format, op.x.cols);
        let out = self.output(op.out)?;
        let width = op.gate.rows;
        let mut digits = 0;
        // Whoever reads h reads it as digits if its own format is alike, which is the case of every model that we know.
        if takes_digits(op.gate.format) && width.is_multiple_of(64) {
            let parts = Parts { count: 1, stride: width, cols: width };
            let buffer = self.buffers.get_mut(&op.out.buffer.id).expect("output found it");
            (digits, _) = buffer.digits(op.out, parts, &mut self.device)?;
        }
        let (gate, up) = (self.weights[op.gate.id as usize].packed, self.weights[op.up.id as usize].packed);
        Ok(Some(FewPair { gate, up, out, x, x_bytes, digits }))
    }

    /// Gate and up alone. False without a kernel.
    pub(super) fn few_gate_up(&mut self, op: &GateUp) -> Result<bool> {
        let Some(pair) = self.few_pair(op)? else { return Ok(false) };
        let name = fast_format(op.gate.format).expect("a pair has one");
        let shared = few_group_bytes(op.gate.format);
        let units = (op.gate.rows.div_ceil(16) * op.x.rows.div_ceil(GROUP)).div_ceil(WARPS);
        let kernel = self.kernels.few(&format!("few_up_{name}_{name}"))?;
        let blocks = units.min(self.device.resident_blocks(&kernel, THREADS, shared)?) as u32;
        let args = args::FewUp {
            shared: pair,
            shared_blocks: blocks,
            slices: slices(op.gate.cols) as u32,
            rows: op.x.rows as u32,
            activation: activation_args(op.activation),
            ..args::FewUp::default()
        };
        self.device.launch(&kernel, [blocks, 1, 1], THREADS, shared, &args)?;
        Ok(true)
    }

    /// The router's choice and the groups of rows that products read. Returns where they are.
    fn route_plan(&mut self, route: &Route) -> Result<DevicePtr> {
        route.validate()?;
        self.sorted_for = None;
        let plan = self.plan.pointer("choice of experts", PLAN_BYTES, &mut self.device)?;
        let rows = route.logits.rows;
        let warp_floats = 2 * (route.logits.cols + route.n_group);
        let warps = (CHOICE_SHARED / (4 * warp_floats)).clamp(1, 32).min(rows);
        let args =
            args::Plan { route: self.route_args(route)?, plan, rows: rows as u32, warp_floats: warp_floats as u32 };
        let kernel = self.kernels.few("route_plan")?;
        self.device.launch(&kernel, [1, 1, 1], 32 * warps as u32, (4 * warps * warp_floats) as u32, &args)?;
        Ok(plan)
    }

    /// The shared expert's first half as part of the same kernel as that of the chosen experts: its matrices, its width, and the format;
    /// launched by itself where there is no kernel for both formats.
    fn few_beside(
        &mut self,
        shared: Option<(&GateUp, &[(Weight, Tensor)])>,
        up: &MoeGateUp,
    ) -> Result<(Option<(FewPair, usize)>, WeightFormat)> {
        let format = up.experts.gate_format;
        let Some((op, _)) = shared else { return Ok((None, format)) };
        if let (Some(name), Some(other)) = (fast_format(format), fast_format(op.gate.format)) {
            let alike = op.x == up.x && op.activation == up.activation;
            if alike
                && (other == name || self.kernels.has_few(&format!("few_up_{name}_{other}"))?)
                && let Some(pair) = self.few_pair(op)?
            {
                return Ok((Some((pair, op.gate.rows)), op.gate.format));
            }
        }
        if !self.few_gate_up(op)? {
            self.gate_up_now(op)?;
        }
        Ok((None, format))
    }

    /// The router's choice, the chosen experts and the shared one. False without kernels.
    pub(super) fn few_experts(
        &mut self,
        route: &Route,
        shared: Option<(&GateUp, &[(Weight, Tensor)])>,
        up: &MoeGateUp,
        down: &MoeDown,
        residual: Option<Tensor>,
    ) -> Result<bool> {
        let experts = up.experts;
        let (hidden, width, top_k, rows) = (experts.hidden_size, experts.intermediate_size, up.ids.cols, up.x.rows);
        let formats = (few_name(experts.gate_format, hidden), few_name(experts.down_format, width));
        let (Some(name), Some(down_name)) = formats else { return Ok(false) };
        let groups = expected_experts(experts.num_experts, top_k, rows);
        let fits = top_k <= 32
            && rows * top_k <= MAX_CHOICES
            && experts.num_experts <= MAX_EXPERTS
            && width.is_multiple_of(64)
            && up.out.stride == up.out.cols;
        if !fits || experts.gate_format != experts.up_format {
            return Ok(false);
        }
        let plan = self.route_plan(route)?;
        let mut args = args::FewUp {
            plan,
            slices: slices(hidden) as u32,
            rows: rows as u32,
            top_k: top_k as u32,
            activation: activation_args(up.activation),
            ..args::FewUp::default()
        };
        let units = |rows: usize| rows.div_ceil(16).div_ceil(WARPS);
        let (beside, format) = self.few_beside(shared, up)?;
        let other = fast_format(format).unwrap_or(name);
        let ring = few_group_bytes(experts.gate_format).max(few_group_bytes(format));
        let kernel = self.kernels.few(&format!("few_up_{name}_{other}"))?;
        let resident = self.device.resident_blocks(&kernel, THREADS, ring)?;
        if let Some((pair, width)) = beside {
            args.shared = pair;
            let own = (units(width * rows.div_ceil(GROUP)), tile_bytes(format));
            let routed = (units(groups * experts.intermediate_size), tile_bytes(experts.gate_format));
            args.shared_blocks = shares(own, routed, resident).0 as u32;
        }
        let input = self.whole_input(up.x, experts.gate_format)?;
        let (x, x_bytes) = rows_of(&input, experts.gate_format, hidden);
        let out = self.output(up.out)?;
        let packed = {
            let e = &self.experts[experts.id as usize];
            (e.gate.packed, e.up.packed, e.down.packed)
        };
        args.routed = FewPair { gate: packed.0, up: packed.1, out, x, x_bytes, digits: 0 };
        let parts = Parts { count: top_k, stride: width, cols: width };
        if takes_digits(experts.down_format) {
            let buffer = self.buffers.get_mut(&up.out.buffer.id).expect("output found it");
            (args.routed.digits, _) = buffer.digits(up.out, parts, &mut self.device)?;
        }
        let blocks = resident.min(args.shared_blocks as usize + units(rows * top_k * width)) as u32;
        self.device.launch(&kernel, [blocks, 1, 1], THREADS, ring, &args)?;
        if let Some((op, linear)) = shared {
            self.few_linear(op.out, linear, None)?;
        }
        let (x, part_bytes) = if takes_digits(experts.down_format) {
            (args.routed.digits, (width.div_ceil(64) * DIGITS_BYTES) as u64)
        } else {
            (self.twin(up.out)?.twin, 2 * width as u64)
        };
        let results =
            self.results.pointer("results of experts", (4 * rows * top_k * hidden) as u64, &mut self.device)?;
        let args = args::FewDown { w: packed.2, plan, x, part_bytes, results, slices: slices(width) as u32, pad: 0 };
        let shared = few_group_bytes(experts.down_format);
        let kernel = self.kernels.few(&format!("few_down_{down_name}"))?;
        let most = rows * top_k * hidden.div_ceil(16 * TALL * WARPS);
        let blocks = most.min(self.device.resident_blocks(&kernel, THREADS, shared)?) as u32;
        self.device.launch(&kernel, [blocks, 1, 1], THREADS, shared, &args)?;
        let args = args::FewSum {
            out: self.output(down.out)?,
            weights: self.input(down.weights)?,
            plus: self.optional(down.plus)?,
            residual: residual.map_or(Ok(Mat::default()), |r| self.residual(r))?,
            results,
            top_k: top_k as u32,
            pad: 0,
        };
        let kernel = self.kernels.few("few_sum")?;
        self.device.launch(&kernel, [hidden.div_ceil(256) as u32, rows as u32, 1], 256, 0, &args)?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moellon_tensor::ScaleDtype;

    #[test]
    fn slices_are_shared_where_few_blocks_would_have_work() {
        const H200: usize = 132;
        // GLM-5.2's output projection: 48 blocks of eight row tiles, 256 tiles of columns.
        assert_eq!(slice_shares(48, 8, 256, 32, H200), 8);
        // Its head has more blocks than fit.
        assert_eq!(slice_shares(1210, 8, 96, 32, H200), 1);
        assert_eq!(slice_shares(1210, 8, 96, 4, H200), 1);
        // All that may be shared are whole slices.
        assert_eq!(slice_shares(1, 1, 3, 32, H200), 1);
        for slices in [2, 4, 8] {
            assert_eq!(slice_shares(1, slices, 256, 2, H200), slices);
        }
    }

    #[test]
    fn blocks_of_two_units_have_two_each() {
        // GLM-5.2's queries and output projection for 32 rows, and its head, whose blocks have three or four units.
        assert_eq!([line_blocks(512, 396), line_blocks(384, 396), line_blocks(1210, 396)], [256, 384, 396]);
    }

    /// As many blocks as registers allow (`__launch_bounds__`) also fit into shared memory.
    #[test]
    fn blocks_fit_a_multiprocessor() {
        const SHARED: u32 = 228 << 10;
        for bits in 2..=6 {
            let format = WeightFormat::Affine { bits, group: 64, scale: ScaleDtype::Bf16 };
            // Static arrays: the plan and two units' values of 128 rows; and what the driver keeps.
            let group = few_group_bytes(format) + 10752 + 1024;
            assert!(2 * group <= SHARED, "{bits} bits: two times {group} bytes, expected at most {SHARED}");
            for rows in [4, 8, 16, 32] {
                let line = few_line_bytes(format, rows) + 1024;
                assert!(3 * line <= SHARED, "{bits} bits, {rows} rows: three times {line} bytes, expected {SHARED}");
            }
        }
    }
}
