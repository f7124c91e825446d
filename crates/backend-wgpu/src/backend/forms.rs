//! The forms in which products read activations: floats (`kernels/spread.wgsl`) or integers (`kernels/digits.wgsl`). Whoever writes a view
//! that products read writes their forms too (`kernels/forms.wgsl`); where nobody has, a kernel of its own makes them out of the view.

use super::WgpuBackend;
use crate::device::{Memory, device_error};
use crate::kernels::{Code, Kernel};
use moellon_ops::{Result, Rope, Tensor};

/// How the rows of an input are cut: heads, or the slots of a token's experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Parts {
    pub(super) count: usize,
    pub(super) stride: usize,
    pub(super) cols: usize,
}

impl Parts {
    pub(super) fn whole(x: Tensor) -> Self {
        Parts { count: 1, stride: x.cols, cols: x.cols }
    }

    fn chunks(&self) -> usize {
        self.cols.div_ceil(32)
    }
}

/// How activations lie for a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Floats,
    /// With so many codes of the weight a byte.
    Integers {
        per_byte: usize,
    },
}

impl Form {
    /// 16-byte elements of a chunk.
    fn chunk_quads(self) -> usize {
        match self {
            Form::Floats => 8,
            Form::Integers { .. } => 7,
        }
    }

    /// 16-byte elements of a row.
    pub(super) fn row_quads(self, parts: Parts) -> usize {
        self.chunk_quads() * parts.chunks() * parts.count
    }
}

/// A view of a buffer in another form.
struct Spread {
    offset: usize,
    stride: usize,
    parts: Parts,
    form: Form,
    memory: Memory,
    /// Rows that hold what the buffer holds.
    current_rows: usize,
}

impl Spread {
    fn is_of(&self, x: Tensor) -> bool {
        self.offset == x.offset && (x.rows == 1 || self.stride == x.stride)
    }
}

/// The views of a buffer that were ever read by a product.
#[derive(Default)]
pub(super) struct Spreads(Vec<Spread>);

impl Spreads {
    /// The buffer was written.
    pub(super) fn forget(&mut self) {
        self.0.iter_mut().for_each(|spread| spread.current_rows = 0);
    }

    pub(super) fn memories(&self) -> impl Iterator<Item = &Memory> {
        self.0.iter().map(|spread| &spread.memory)
    }
}

/// An input of a product.
#[derive(Clone)]
pub(super) struct Input {
    pub(super) memory: Memory,
    /// 16-byte elements between rows and between parts of a row.
    pub(super) token_step: usize,
    pub(super) part_step: usize,
}

/// Where a kernel with `forms.wgsl` writes. What is not written has the memory of something that is.
#[derive(Clone)]
pub(super) struct OutputForms {
    pub(super) memory: Memory,
    pub(super) floats: Memory,
    pub(super) integers: Memory,
    /// `forms` and the five arguments after it.
    pub(super) arguments: [u32; 6],
}

impl OutputForms {
    /// As rows only.
    pub(super) fn plain(memory: Memory) -> Self {
        let (floats, integers) = (memory.clone(), memory.clone());
        OutputForms { memory, floats, integers, arguments: [1, 1, 1, 0, 0, 1] }
    }

    /// In one form only, of rows in whole parts.
    pub(super) fn only(memory: Memory, form: Form, parts: Parts) -> Self {
        let (kind, per_byte) = match form {
            Form::Floats => (2, 1),
            Form::Integers { per_byte } => (4, per_byte),
        };
        let arguments = [kind, parts.count, parts.stride, parts.cols, parts.chunks(), per_byte].map(|n| n as u32);
        OutputForms { memory: memory.clone(), floats: memory.clone(), integers: memory, arguments }
    }

    /// The one form beside rows, for kernels that write one.
    pub(super) fn form(&self) -> &Memory {
        if self.arguments[0] & 4 != 0 { &self.integers } else { &self.floats }
    }

    /// Without the rows, where there is another form.
    pub(super) fn without_rows(mut self) -> Self {
        if self.arguments[0] & 6 != 0 {
            self.arguments[0] &= 6;
            self.memory = self.form().clone();
        }
        self
    }

    /// Whether rows are written.
    pub(super) fn has_rows(&self) -> bool {
        self.arguments[0] & 1 != 0
    }
}

/// Which other forms a kernel can write.
#[derive(Debug, Clone, Copy)]
pub(super) enum Writes {
    /// Floats and integers at once.
    Both,
    /// One of them; integers only where every workgroup has whole chunks of a part, from columns that are multiples of this many.
    One { whole_columns: usize },
}

impl WgpuBackend {
    /// The form in which products with weights of `code` read activations.
    pub(super) fn form_for(&self, code: Code) -> Form {
        match code.per_byte().filter(|_| self.device.self_test.integer_products) {
            Some(per_byte) => Form::Integers { per_byte },
            None => Form::Floats,
        }
    }

    /// The place of a form of `x` among its buffer's, with room for its rows.
    fn spread_index(&mut self, x: Tensor, parts: Parts, form: Form) -> Result<usize> {
        let device = &mut self.device;
        let Some(buffer) = self.buffers.get_mut(&x.buffer.id) else {
            return Err(device_error(format!("buffer {} was freed or never made", x.buffer.id)));
        };
        let bytes = (x.rows * form.row_quads(parts) * 16) as u64;
        let spreads = &mut buffer.spreads.0;
        let stride = if x.rows == 1 { x.cols } else { x.stride };
        let index = match spreads.iter().position(|s| s.is_of(x) && s.parts == parts && s.form == form) {
            Some(index) => index,
            None => {
                let memory = device.alloc("activations for products", bytes)?;
                spreads.push(Spread { offset: x.offset, stride, parts, form, memory, current_rows: 0 });
                spreads.len() - 1
            }
        };
        let spread = &mut spreads[index];
        if spread.memory.bytes < bytes {
            device.forget(&spread.memory);
            spread.memory = device.alloc("activations for products", bytes)?;
            spread.current_rows = 0;
        }
        Ok(index)
    }

    /// Makes room for a form of `x` before anybody writes `x`, so that its writer can write the form.
    pub(super) fn expect_spread(&mut self, x: Tensor, parts: Parts, form: Form) -> Result<()> {
        self.spread_index(x, parts, form).map(|_| ())
    }

    /// `x` in the form that products with weights of `code` read, made now unless it is there.
    pub(super) fn spread(&mut self, x: Tensor, parts: Parts, code: Code) -> Result<Input> {
        let form = self.form_for(code);
        let index = self.spread_index(x, parts, form)?;
        let source = self.memory(x)?;
        let buffer = self.buffers.get_mut(&x.buffer.id).expect("the index was found in it");
        let spread = &mut buffer.spreads.0[index];
        let stale = spread.current_rows < x.rows;
        spread.current_rows = spread.current_rows.max(x.rows);
        let part_step = form.chunk_quads() * parts.chunks();
        let input = Input { memory: spread.memory.clone(), token_step: form.row_quads(parts), part_step };
        if stale {
            let place = [x.offset, x.stride, parts.stride, parts.count, parts.cols, parts.chunks()].map(|n| n as u32);
            match form {
                Form::Floats => {
                    let grid = [(8 * parts.chunks()).div_ceil(256), parts.count, x.rows];
                    self.run(Kernel::Spread, &[&source, &input.memory], &place, grid)?;
                }
                Form::Integers { per_byte } => {
                    let arguments = [&place[..], &[per_byte as u32]].concat();
                    let grid = [parts.chunks().div_ceil(8), parts.count, x.rows];
                    self.run(Kernel::WriteDigits, &[&input.memory, &source], &arguments, grid)?;
                }
            }
        }
        Ok(input)
    }

    /// A view that is about to be written, all of its rows, in every form that is wanted and that the writer can write.
    pub(super) fn output_forms(&mut self, out: Tensor, writes: Writes) -> Result<OutputForms> {
        let memory = self.output(out)?;
        let buffer = self.buffers.get_mut(&out.buffer.id).expect("output found it");
        let mut forms = OutputForms::plain(memory);
        let mut written: Option<Parts> = None;
        for spread in buffer.spreads.0.iter_mut().filter(|s| s.is_of(out)) {
            let parts = spread.parts;
            // Parts must not say less than the whole row, or columns would land in parts that do not exist.
            let covers = parts.count * parts.stride >= out.cols && parts.stride * (parts.count - 1) < out.cols;
            let fits = spread.memory.bytes >= (16 * out.rows * spread.form.row_quads(parts)) as u64;
            let whole = |columns: usize| [columns, parts.cols, parts.stride].iter().all(|n| n.is_multiple_of(32));
            let possible = match (writes, spread.form) {
                (Writes::Both, Form::Floats) => forms.arguments[0] & 2 == 0,
                (Writes::Both, Form::Integers { .. }) => forms.arguments[0] & 4 == 0,
                (Writes::One { .. }, _) if written.is_some() => false,
                (Writes::One { .. }, Form::Floats) => true,
                (Writes::One { whole_columns }, Form::Integers { .. }) => whole(whole_columns),
            };
            if !covers || !fits || !possible || written.is_some_and(|written| written != parts) {
                continue;
            }
            written = Some(parts);
            spread.current_rows = out.rows;
            let place = [parts.count, parts.stride, parts.cols, parts.chunks()].map(|n| n as u32);
            forms.arguments[1..5].copy_from_slice(&place);
            match spread.form {
                Form::Floats => {
                    forms.arguments[0] |= 2;
                    forms.floats = spread.memory.clone();
                }
                Form::Integers { per_byte } => {
                    forms.arguments[0] |= 4;
                    forms.arguments[5] = per_byte as u32;
                    forms.integers = spread.memory.clone();
                }
            }
        }
        Ok(forms)
    }

    /// Whether every form of `x` that products ever read holds what `x` does: then they need no rows.
    pub(super) fn has_every_form(&self, x: Tensor) -> bool {
        let spreads = self.buffers.get(&x.buffer.id).map(|buffer| &buffer.spreads.0);
        spreads.is_some_and(|all| all.iter().filter(|s| s.is_of(x)).all(|s| s.current_rows >= x.rows))
    }

    /// The heads that `op` rotates in place: forms of the columns in front of them still hold.
    pub(super) fn rotated(&mut self, op: &Rope) -> Result<Memory> {
        let memory = self.memory(op.x)?;
        let buffer = self.buffers.get_mut(&op.x.buffer.id).expect("its memory was found");
        let apart = |s: &Spread| {
            s.parts.count >= op.num_heads
                && s.parts.stride == op.head_stride
                && s.offset + s.parts.cols <= op.x.offset
                && op.x.offset + op.table.cols <= s.offset + s.parts.stride
        };
        buffer.spreads.0.iter_mut().filter(|s| !apart(s)).for_each(|s| s.current_rows = 0);
        Ok(memory)
    }
}
