//! Device buffers. Products of quantized weights read their activations in another form than f32, which is kept beside the buffer:
//!
//! - a *twin*, for formats that are multiplied as bfloat16: the same elements at the same offsets, which producers write too
//!   once it exists;
//! - *digits* (`kernels/packed.cuh`), for affine formats: whole views, written by a kernel of their own.
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
    digits: Vec<DigitsOf>,
}

/// A view of a buffer whose rows are cut into parts, as digits.
struct DigitsOf {
    region: Region,
    parts: Parts,
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
        DeviceBuffer { memory, twin: None, current: Vec::new(), digits: Vec::new() }
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
        self.digits.iter_mut().for_each(|d| d.current = false);
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

    /// Address of the view as digits, and whether they have to be written first (which the caller then does).
    pub(crate) fn digits(&mut self, tensor: Tensor, parts: Parts, device: &mut Device) -> Result<(DevicePtr, bool)> {
        let region = Region::of(tensor);
        let known = self.digits.iter().position(|d| d.region == region && d.parts == parts);
        let index = match known {
            Some(index) => index,
            None => {
                let bytes = tensor.rows * parts.count * parts.cols.div_ceil(64) * DIGITS_BYTES;
                let memory = device.alloc("activations as digits", bytes as u64)?;
                self.digits.push(DigitsOf { region, parts, memory, current: false });
                self.digits.len() - 1
            }
        };
        let digits = &mut self.digits[index];
        let stale = !std::mem::replace(&mut digits.current, true);
        Ok((digits.memory.pointer(), stale))
    }

    /// Address of the view as digits where somebody reads it so; the caller, who writes the view, then writes them. 0: nobody.
    pub(crate) fn digits_written(&mut self, tensor: Tensor) -> DevicePtr {
        let region = Region::of(tensor);
        let parts = Parts { count: 1, stride: tensor.cols, cols: tensor.cols };
        match self.digits.iter_mut().find(|d| d.region == region && d.parts == parts) {
            Some(digits) => {
                digits.current = true;
                digits.memory.pointer()
            }
            None => 0,
        }
    }

    /// Whether the view's digits are current.
    pub(crate) fn has_digits(&self, tensor: Tensor, parts: Parts) -> bool {
        let region = Region::of(tensor);
        self.digits.iter().any(|d| d.current && d.region == region && d.parts == parts)
    }

    /// Floats were written without the other forms.
    pub(crate) fn written_by_host(&mut self) {
        self.current.clear();
        self.digits.iter_mut().for_each(|d| d.current = false);
    }
}
