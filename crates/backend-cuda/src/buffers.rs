//! Device buffers. Products of quantized weights read their activations in another form than f32, which is kept beside the buffer:
//!
//! - a *twin*, for formats that are multiplied as bfloat16: the same elements at the same offsets, which producers write too
//!   once it exists;
//! - *digits* (`kernels/packed.cuh`), for affine formats: whole views, written by a kernel of their own;
//! - *padded parts*, for formats that are multiplied as bfloat16 where the twin's parts would not start at multiples of 16 bytes or
//!   not end there: each part from such a place on, zeros behind it.
//!
//! What is current is tracked here; what is not is written before it is read.

use crate::args::Mat;
use crate::driver::{Device, DevicePtr, Memory};
use moellon_ops::{Result, Tensor};

/// One buffer.
pub(crate) struct DeviceBuffer {
    pub(crate) memory: Memory,
    twin: Option<Memory>,
    /// Regions of the twin that hold what the buffer holds.
    current: Vec<Region>,
    forms: Vec<FormOf>,
}

/// What the parts of a row are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    Digits,
    /// bfloat16, [`Parts::padded`] columns a part.
    Padded,
}

/// A view of a buffer whose rows are cut into parts, in another form.
struct FormOf {
    region: Region,
    parts: Parts,
    form: Form,
    memory: Memory,
    current: bool,
}

/// How the rows of an input are cut: heads, or the slots of a token's experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Parts {
    pub(crate) count: usize,
    pub(crate) stride: usize,
    pub(crate) cols: usize,
}

impl Parts {
    /// Columns of a part that starts and ends at multiples of 16 bytes in bfloat16.
    pub(crate) fn padded(&self) -> usize {
        self.cols.next_multiple_of(8)
    }
}

/// Bytes of 64 columns as digits (`DIGITS_BYTES` of packed.cuh).
pub(crate) const DIGITS_BYTES: usize = 144;

/// A view without its buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Region {
    offset: usize,
    rows: usize,
    cols: usize,
    stride: usize,
}

impl Region {
    fn of(tensor: Tensor) -> Self {
        Region { offset: tensor.offset, rows: tensor.rows, cols: tensor.cols, stride: tensor.stride }
    }

    /// Whether every element of `other` is in `self`.
    fn contains(&self, other: &Region) -> bool {
        if other.offset < self.offset {
            return false;
        }
        // A view of one row has any stride.
        if self.rows == 1 {
            return other.rows == 1 && other.offset + other.cols <= self.offset + self.cols;
        }
        let stride_fits = other.rows == 1 || other.stride == self.stride;
        let (row, col) = ((other.offset - self.offset) / self.stride, (other.offset - self.offset) % self.stride);
        stride_fits && col + other.cols <= self.cols && row + other.rows <= self.rows
    }
}

impl DeviceBuffer {
    pub(crate) fn new(memory: Memory) -> Self {
        DeviceBuffer { memory, twin: None, current: Vec::new(), forms: Vec::new() }
    }

    /// Address of element `offset`, 4 bytes each.
    pub(crate) fn at(&self, offset: usize) -> DevicePtr {
        self.memory.pointer() + 4 * offset as u64
    }

    fn mat(&self, tensor: Tensor) -> Mat {
        Mat {
            p: self.at(tensor.offset),
            twin: self.twin.as_ref().map_or(0, |t| t.pointer() + 2 * tensor.offset as u64),
            rows: tensor.rows as u32,
            cols: tensor.cols as u32,
            stride: tensor.stride as u32,
            pad: 0,
        }
    }

    /// The view for reading floats.
    pub(crate) fn input(&self, tensor: Tensor) -> Mat {
        Mat { twin: 0, ..self.mat(tensor) }
    }

    /// The view for writing: the twin is written beside it, if there is one.
    pub(crate) fn output(&mut self, tensor: Tensor) -> Mat {
        let region = Region::of(tensor);
        self.forms.iter_mut().for_each(|f| f.current = false);
        if self.twin.is_some() && !self.current.iter().any(|r| r.contains(&region)) {
            // Views that share elements with this one and have another shape are not worth telling apart.
            self.current.clear();
            self.current.push(region);
        }
        self.mat(tensor)
    }

    /// The view for reading the twin, and whether it has to be written first (which the caller then does).
    pub(crate) fn twin_input(&mut self, tensor: Tensor, device: &mut Device) -> Result<(Mat, bool)> {
        if self.twin.is_none() {
            self.twin = Some(device.alloc_zeroed("bfloat16 activations", self.memory.bytes() / 2)?);
        }
        let region = Region::of(tensor);
        let stale = !self.current.iter().any(|r| r.contains(&region));
        if stale {
            self.current.push(region);
        }
        Ok((self.mat(tensor), stale))
    }

    /// Address of the view in another form, and whether it has to be written first (which the caller then does).
    pub(crate) fn form(
        &mut self,
        tensor: Tensor,
        parts: Parts,
        form: Form,
        device: &mut Device,
    ) -> Result<(DevicePtr, bool)> {
        let index = match self.find(tensor, parts, form) {
            Some(index) => index,
            None => {
                let (what, bytes) = match form {
                    Form::Digits => ("activations as digits", parts.cols.div_ceil(64) * DIGITS_BYTES),
                    Form::Padded => ("bfloat16 activations, padded", 2 * parts.padded()),
                };
                let memory = device.alloc(what, (tensor.rows * parts.count * bytes) as u64)?;
                self.forms.push(FormOf { region: Region::of(tensor), parts, form, memory, current: false });
                self.forms.len() - 1
            }
        };
        let found = &mut self.forms[index];
        let stale = !std::mem::replace(&mut found.current, true);
        Ok((found.memory.pointer(), stale))
    }

    /// [`DeviceBuffer::form`] as digits.
    pub(crate) fn digits(&mut self, tensor: Tensor, parts: Parts, device: &mut Device) -> Result<(DevicePtr, bool)> {
        self.form(tensor, parts, Form::Digits, device)
    }

    fn find(&self, tensor: Tensor, parts: Parts, form: Form) -> Option<usize> {
        let region = Region::of(tensor);
        self.forms.iter().position(|f| f.region == region && f.parts == parts && f.form == form)
    }

    /// Address of the view as digits where somebody reads it so; the caller, who writes the view, then writes them. 0: nobody.
    pub(crate) fn digits_written(&mut self, tensor: Tensor) -> DevicePtr {
        let parts = Parts { count: 1, stride: tensor.cols, cols: tensor.cols };
        match self.find(tensor, parts, Form::Digits) {
            Some(index) => {
                self.forms[index].current = true;
                self.forms[index].memory.pointer()
            }
            None => 0,
        }
    }

    /// Whether the view's digits are current.
    pub(crate) fn has_digits(&self, tensor: Tensor, parts: Parts) -> bool {
        self.find(tensor, parts, Form::Digits).is_some_and(|index| self.forms[index].current)
    }

    /// Floats were written without the other forms.
    pub(crate) fn written_by_host(&mut self) {
        self.current.clear();
        self.forms.iter_mut().for_each(|f| f.current = false);
    }
}
