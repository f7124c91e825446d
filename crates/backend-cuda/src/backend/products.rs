//! Products with weights: which form the activations take, which kernel, which grid.

use super::{CudaBackend, DeviceExperts, GEMV_ROWS, WARPS};
use crate::args;
use crate::args::{Mat, Matmul, Part, Routing};
use crate::buffers::{Form, Parts};
use crate::driver::{DevicePtr, device_error};
use crate::weights::{
    DeviceWeight, PROMPT_ROWS, PROMPT_TOKENS, blocked_bytes, fast_format, format_name, product_suffix, prompt_bytes,
    ring_bytes, takes_digits,
};
use moellon_ops::{Activation, Experts, Result, Tensor, Weight};
use moellon_tensor::WeightFormat;

/// Rows of weights that a block of `gemm` has, and rows of activations.
const GEMM_ROWS: usize = 256;
const GEMM_TOKENS: usize = 64;

/// An input of a product in the form that its weights want.
#[derive(Clone, Copy, Default)]
pub(super) struct Input {
    pub(super) x: Mat,
    digits: DevicePtr,
    parts: u32,
    head_stride: u32,
}

impl Input {
    /// Where the digits lie, 0 without.
    pub(super) fn digits(&self) -> DevicePtr {
        self.digits
    }

    /// Columns between the inputs of two heads, 0 without.
    pub(super) fn head_stride(&self) -> u32 {
        self.head_stride
    }

    /// The arguments of a product, the weights left out.
    pub(super) fn args(&self, cols: usize, routing: Routing) -> Matmul {
        Matmul {
            num_parts: 1,
            slices: slices(cols) as u32,
            x: self.x,
            x_head_stride: self.head_stride,
            digits: self.digits,
            digits_parts: self.parts,
            routing,
            ..Matmul::default()
        }
    }
}

/// Which of the kernels for few rows: groups of eight that it has registers for.
pub(super) fn gemv_variant(rows: usize) -> usize {
    rows.div_ceil(8).next_power_of_two()
}

/// Slices that a row of weights is cut into: a function of its columns alone, because the order of sums depends on it.
pub(super) fn slices(cols: usize) -> usize {
    match cols.div_ceil(64) {
        64.. => 8,
        16.. => 4,
        4.. => 2,
        _ => 1,
    }
}

/// Warps that share a row of plain weights: a function of the columns alone, like [`slices`].
pub(super) fn plain_warps(cols: usize) -> usize {
    cols.div_ceil(256).next_power_of_two().min(WARPS)
}

pub(super) fn activation_args(activation: Activation) -> args::Activation {
    match activation {
        Activation::SwiGlu => args::Activation::default(),
        Activation::ClampedSwiGlu { alpha, limit } => args::Activation { kind: 1, alpha, limit, pad: 0 },
    }
}

/// A weight among those of the back end.
#[derive(Clone, Copy)]
pub(super) enum WeightRef {
    Linear(Weight),
    Gate(Experts),
    Up(Experts),
    Down(Experts),
}

impl WeightRef {
    fn of<'a>(&self, weights: &'a [DeviceWeight], experts: &'a [DeviceExperts]) -> &'a DeviceWeight {
        match self {
            WeightRef::Linear(w) => &weights[w.id as usize],
            WeightRef::Gate(e) => &experts[e.id as usize].gate,
            WeightRef::Up(e) => &experts[e.id as usize].up,
            WeightRef::Down(e) => &experts[e.id as usize].down,
        }
    }

    /// Matrices of the weight.
    fn count(&self) -> u32 {
        match self {
            WeightRef::Linear(w) => w.count as u32,
            WeightRef::Gate(e) | WeightRef::Up(e) | WeightRef::Down(e) => e.num_experts as u32,
        }
    }
}

/// The compute capability with wgmma.
pub(super) const WGMMA: (i32, i32) = (9, 0);

/// Whether the parts of a view's bfloat16 twin start at multiples of 16 bytes and end there, as kernels read them.
fn is_aligned(x: Tensor, parts: Parts) -> bool {
    x.offset.is_multiple_of(8)
        && parts.cols.is_multiple_of(8)
        && (x.rows == 1 || x.stride.is_multiple_of(8))
        && (parts.count == 1 || parts.stride.is_multiple_of(8))
}

impl CudaBackend {
    /// The view with a current bfloat16 twin.
    pub(super) fn twin(&mut self, tensor: Tensor) -> Result<Mat> {
        let aligned = tensor.offset.is_multiple_of(8) && (tensor.rows == 1 || tensor.stride.is_multiple_of(8));
        if !aligned {
            return Err(device_error(format!(
                "input of a product starts at element {} with stride {}, expected multiples of 8",
                tensor.offset, tensor.stride
            )));
        }
        let buffer = self.buffers.get_mut(&tensor.buffer.id);
        let buffer = buffer.ok_or_else(|| device_error(format!("buffer {} was freed", tensor.buffer.id)))?;
        let (x, stale) = buffer.twin_input(tensor, &mut self.device)?;
        if stale {
            let kernel = self.kernels.rows("write_twin")?;
            let grid = [x.rows, x.cols.div_ceil(1024).min(64), 1];
            self.device.launch(&kernel, grid, 256, 0, &args::Twin { x })?;
        }
        Ok(x)
    }

    /// `out[rows] = x W` for one weight that may have many matrices: heads, or experts chosen by `routing`.
    pub(super) fn product(&mut self, weight: WeightRef, x: Input, out: Mat, routing: Routing) -> Result<()> {
        let (kernels, device) = (&mut self.kernels, &mut self.device);
        let (w, count) = (weight.of(&self.weights, &self.experts), weight.count());
        let Some(name) = product_suffix(w.format) else {
            let kernel = kernels.rows(match w.format {
                WeightFormat::F32 => "plain_f32",
                WeightFormat::F16 => "plain_f16",
                _ => "plain_bf16",
            })?;
            let warps = plain_warps(w.cols);
            let few = x.x.rows > 1 && routing.ids == 0 && count == 1;
            let wide = w.cols.is_multiple_of(8) && x.x.stride.is_multiple_of(4) && x.x.p.is_multiple_of(16);
            if few && wide && warps == WARPS {
                return self.plain_few(weight, x, out);
            }
            // A router has few rows of weights: blocks share the rows of x. Experts have as many rows of x as they are chosen.
            let (chunk, shares) = match routing.ids {
                0 if x.x.rows <= GEMV_ROWS as u32 => (2, x.x.rows.div_ceil(2).max(1)),
                0 => (8, x.x.rows.div_ceil(8)),
                _ => (8, 1),
            };
            let args = args::Plain {
                weights: w.plain,
                bias: w.bias(),
                x: x.x,
                out,
                routing,
                matrix_elements: (w.rows * w.cols) as u64,
                rows: w.rows as u32,
                cols: w.cols as u32,
                x_head_stride: x.head_stride,
                warps: warps as u32,
                chunk,
                pad: 0,
            };
            let blocks = w.rows.div_ceil(WARPS / warps) as u32;
            return device.launch(&kernel, [blocks, count, shares], 256, 0, &args);
        };
        let mut args = x.args(w.cols, routing);
        args.part[0] = Part { w: w.packed, out };
        let rows = x.x.rows as usize;
        if routing.ids == 0 && rows <= GEMV_ROWS {
            let blocks = w.rows.div_ceil(16).div_ceil(WARPS / slices(w.cols)) as u32;
            args.first_block[1] = blocks;
            let kernel = kernels.matmul(&format!("linear{}_{name}", gemv_variant(rows)))?;
            return device.launch(&kernel, [blocks, count, 1], 256, ring_bytes(w.format, 1), &args);
        }
        if device.capability == WGMMA && fast_format(w.format).is_some() {
            return self.prompt_product(&[(weight, out)], x, routing);
        }
        let rows = if routing.ids == 0 { rows } else { routing.num_tokens as usize };
        let grid = [w.rows.div_ceil(GEMM_ROWS) as u32, count, rows.div_ceil(GEMM_TOKENS) as u32];
        let kernel = kernels.matmul(&format!("gemm_{name}"))?;
        device.launch(&kernel, grid, 256, 0, &args)
    }

    /// Whether products of many rows with weights of this format are `prompt_*`: where the GPU has wgmma and scales stand behind their tile.
    pub(super) fn takes_wgmma(&self, format: WeightFormat) -> bool {
        self.device.capability == WGMMA && fast_format(format).is_some()
    }

    /// Products of more than [`GEMV_ROWS`] rows with weights of one format and as many columns that share `x`; at most four.
    pub(super) fn prompt_product(&mut self, parts: &[(WeightRef, Mat)], x: Input, routing: Routing) -> Result<()> {
        let (kernels, device) = (&mut self.kernels, &mut self.device);
        let of = |weight: &WeightRef| weight.of(&self.weights, &self.experts);
        let (first, count) = (of(&parts[0].0), parts[0].0.count());
        let (format, col_tiles) = (first.format, first.cols.div_ceil(64) as u32);
        let name = fast_format(format).ok_or_else(|| device_error(format!("{format:?} has no product by wgmma")))?;
        let mut args = x.args(first.cols, routing);
        args.num_parts = parts.len() as u32;
        for (i, (weight, out)) in parts.iter().enumerate() {
            args.part[i] = Part { w: of(weight).packed, out: *out };
            args.first_block[i + 1] = args.first_block[i] + of(weight).rows.div_ceil(PROMPT_ROWS) as u32;
        }
        let blocks = args.first_block[parts.len()];
        // Tiles of rows: experts have at most one each that is not full.
        let tokens = PROMPT_TOKENS as u32;
        let (row_tiles, heads) = match routing.ids {
            0 => (x.x.rows.div_ceil(tokens), count),
            _ => (routing.num_tokens * routing.top_k / tokens + count, 1),
        };
        args.num_experts = if routing.ids == 0 { 0 } else { count };
        let bytes = u64::from(heads) * u64::from(row_tiles) * u64::from(col_tiles) * blocked_bytes(format) as u64;
        let blocked = self.blocked.pointer("activations of a prompt in tiles", bytes, device)?;
        let block = args::Block {
            routing,
            x: x.x,
            digits: args.digits,
            out: blocked,
            rows: x.x.rows,
            tiles: col_tiles,
            parts: args.digits_parts,
            experts: args.num_experts,
            cols: first.cols as u32,
            head_stride: x.head_stride,
        };
        let kernel = kernels.prompt(if takes_digits(format) { "block_digits" } else { "block_twins" })?;
        device.launch(&kernel, [4 * col_tiles.div_ceil(8), row_tiles, heads], 256, 0, &block)?;
        args.digits = blocked;
        let kernel = kernels.prompt(&format!("prompt_{name}"))?;
        device.launch(&kernel, [blocks, row_tiles, heads], 512, prompt_bytes(format), &args)
    }

    /// A product of a few rows with a plain weight that has few rows itself: a router.
    fn plain_few(&mut self, weight: WeightRef, x: Input, out: Mat) -> Result<()> {
        /// Rows of weights and of x that a block has (`PLAIN_TALL`, `PLAIN_WIDE`).
        const TALL: usize = 4;
        const WIDE: usize = 4;
        let w = weight.of(&self.weights, &self.experts);
        let kernel = self.kernels.rows(match w.format {
            WeightFormat::F32 => "plain_few_f32",
            WeightFormat::F16 => "plain_few_f16",
            _ => "plain_few_bf16",
        })?;
        let args = args::Plain {
            weights: w.plain,
            bias: w.bias(),
            x: x.x,
            out,
            routing: Routing::default(),
            matrix_elements: 0,
            rows: w.rows as u32,
            cols: w.cols as u32,
            x_head_stride: 0,
            warps: WARPS as u32,
            chunk: 0,
            pad: 0,
        };
        let grid = [w.rows.div_ceil(TALL) as u32, (x.x.rows as usize).div_ceil(WIDE) as u32, 1];
        self.device.launch(&kernel, grid, 256, 0, &args)
    }

    /// `x` in the form that products with weights of `format` read, its rows cut into `parts`.
    pub(super) fn product_input(&mut self, x: Tensor, format: WeightFormat, parts: Parts) -> Result<Input> {
        let head_stride = if parts.count > 1 { parts.stride as u32 } else { 0 };
        let part_count = parts.count as u32;
        let form = if takes_digits(format) { Form::Digits } else { Form::Padded };
        if form == Form::Padded && (format_name(format).is_none() || is_aligned(x, parts)) {
            let x = if format_name(format).is_some() { self.twin(x)? } else { self.input(x)? };
            return Ok(Input { x, digits: 0, parts: part_count, head_stride });
        }
        let buffer = self.buffers.get_mut(&x.buffer.id);
        let buffer = buffer.ok_or_else(|| device_error(format!("buffer {} was freed", x.buffer.id)))?;
        let (out, stale) = buffer.form(x, parts, form, &mut self.device)?;
        let x = buffer.input(x);
        if stale {
            let (name, threads_a_part) = match form {
                Form::Digits => ("write_digits", 8 * parts.cols.div_ceil(64)),
                Form::Padded => ("write_padded", parts.padded() / 8),
            };
            let args = args::Digits {
                x,
                out,
                cols: parts.cols as u32,
                part_stride: parts.stride as u32,
                parts: part_count,
                pad: 0,
            };
            let kernel = self.kernels.pack(name)?;
            let grid = [(parts.count * threads_a_part).div_ceil(256) as u32, x.rows, 1];
            self.device.launch(&kernel, grid, 256, 0, &args)?;
        }
        if form == Form::Digits {
            return Ok(Input { x, digits: out, parts: part_count, head_stride });
        }
        let padded = parts.padded() as u32;
        let x = Mat { twin: out, stride: part_count * padded, ..x };
        Ok(Input { x, digits: 0, parts: part_count, head_stride: padded })
    }

    /// [`CudaBackend::product_input`] for rows in one piece.
    pub(super) fn whole_input(&mut self, x: Tensor, format: WeightFormat) -> Result<Input> {
        self.product_input(x, format, Parts { count: 1, stride: x.cols, cols: x.cols })
    }

    /// Routing for kernels that find an expert's rows themselves.
    pub(super) fn routing(&mut self, ids: Tensor, slots_in_x: bool) -> Result<Routing> {
        Ok(Routing {
            ids: self.address(ids)?,
            ids_stride: ids.stride as u32,
            num_tokens: ids.rows as u32,
            top_k: ids.cols as u32,
            slots_in_x: u32::from(slots_in_x),
            offsets: 0,
            sorted: 0,
        })
    }

    /// Routing with the rows sorted by expert.
    pub(super) fn sorted_routing(&mut self, ids: Tensor, num_experts: usize, slots_in_x: bool) -> Result<Routing> {
        let mut routing = self.routing(ids, slots_in_x)?;
        let words = num_experts + 1 + ids.rows * ids.cols;
        let offsets = self.sorted.pointer("sorting rows by expert", 4 * words as u64, &mut self.device)?;
        (routing.offsets, routing.sorted) = (offsets, offsets + 4 * (num_experts as u64 + 1));
        if self.sorted_for != Some(ids) {
            let args = args::Sort {
                routing,
                offsets: routing.offsets,
                sorted: routing.sorted,
                num_experts: num_experts as u32,
                pad: 0,
            };
            let kernel = self.kernels.matmul("sort_by_expert")?;
            self.device.launch(&kernel, [1, 1, 1], 512, 4 * num_experts as u32, &args)?;
            self.sorted_for = Some(ids);
        }
        Ok(routing)
    }
}
