//! AWQ's and GPTQ's packed integers, turned into affine codes when they are read. Both store `(code - zero) * scale` with
//! one zero point and scale a group of inputs, input-major, in words of 32 bits:
//!
//! | | `qweight` I32 | `qzeros` I32 | `scales` F16, BF16 |
//! |---|---|---|---|
//! | AWQ (gemm) | `[cols, rows / 8]`: 8 outputs a word, in the order 0 2 4 6 1 3 5 7 | `[groups, rows / 8]`, likewise | `[groups, rows]` |
//! | GPTQ | `[cols * bits / 32, rows]`: consecutive inputs | `[groups, rows * bits / 32]`, one less than meant | `[groups, rows]` |
//!
//! An affine offset is then `-zero * scale`. That has up to 9 + 11 significant bits, so scales and offsets are f32 here, and
//! every weight is exactly what the checkpoint means. `checkpoint_format: gptq_v2` stores zero points as they are. GPTQ's
//! `g_idx` must say that groups are consecutive (no act-order): an affine group is.

use crate::{Checkpoint, Error, Result, TensorView};
use moellon_tensor::bits::pack_row;
use moellon_tensor::{Dtype, OwnedMatrix, ScaleDtype, WeightFormat};
use serde_json::Value;

/// Output that AWQ keeps at each place of a word, from the lowest bits on.
const AWQ_ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
/// Outputs that are unpacked together: AWQ's words of them fill a cache line.
const OUTPUTS: usize = 128;

/// Whose packing it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Packing {
    Awq,
    Gptq { zero_offset: u32 },
}

/// A weight that is being read.
struct Packed<'a> {
    packing: Packing,
    bits: usize,
    group: usize,
    shape: [usize; 2],
    /// Words of a row of `codes` and of `zeros`.
    words: [usize; 2],
    codes: &'a [[u8; 4]],
    zeros: &'a [[u8; 4]],
    /// `[groups, rows]`
    scales: Vec<f32>,
}

/// The matrix `[rows, cols]` of the module `path`, whose tensors are `qweight`, `qzeros` and `scales`.
///
/// # Errors
/// A packing that is neither, groups that are not consecutive or of a size without a format, or tensors that do not fit.
pub(crate) fn read(checkpoint: &Checkpoint, path: &str, shape: [usize; 2]) -> Result<OwnedMatrix> {
    let [rows, cols] = shape;
    let part = |suffix: &str| checkpoint.require(&format!("{path}.{suffix}"));
    let (codes, zeros, scales) = (part("qweight")?, part("qzeros")?, part("scales")?);
    let (packing, bits) = packing(checkpoint, path, &codes, shape)?;
    let words = match packing {
        Packing::Awq => [rows * bits / 32; 2],
        Packing::Gptq { .. } => [rows, rows * bits / 32],
    };
    let groups = match *scales.shape {
        [groups, outputs] if groups > 0 && outputs == rows && cols.is_multiple_of(groups) => groups,
        _ => {
            let expected = format!("[groups, {rows}] with a divisor of the {cols} inputs");
            return Err(scales.wrong("shape", format!("{:?}", scales.shape), expected));
        }
    };
    let scale_dtype = match scales.dtype {
        Dtype::F16 => ScaleDtype::F16,
        Dtype::Bf16 => ScaleDtype::Bf16,
        other => {
            return Err(scales.wrong("dtype", other, "F16 or BF16 (their products with zero points are exact in f32)"));
        }
    };
    let lines = match packing {
        Packing::Awq => cols,
        Packing::Gptq { .. } => cols * bits / 32,
    };
    for (tensor, dims) in [(&codes, [lines, words[0]]), (&zeros, [groups, words[1]])] {
        if tensor.dtype != Dtype::I32 {
            return Err(tensor.wrong("dtype", tensor.dtype, Dtype::I32));
        }
        tensor.expect_shape(&dims)?;
    }
    if let Some(order) = checkpoint.tensor(&format!("{path}.g_idx")) {
        expect_consecutive(&order, cols, cols / groups)?;
    }
    // Both fit: bits is at most 8, a group at most the columns of a tensor in memory.
    let group = u32::try_from(cols / groups).unwrap_or(u32::MAX);
    let format = WeightFormat::Affine { bits: bits as u8, group, scale: ScaleDtype::F32 };
    let weight = |source| Error::Weight { weight: path.to_owned(), source };
    format.validate(cols).map_err(weight)?;
    let mut values = vec![0.0; groups * rows];
    scale_dtype.read_slice(scales.bytes, 0, &mut values);
    let packed = Packed {
        packing,
        bits,
        group: cols / groups,
        shape,
        words,
        codes: codes.bytes.as_chunks().0,
        zeros: zeros.bytes.as_chunks().0,
        scales: values,
    };
    let matrix = packed.unpack(format).map_err(weight)?;
    // The copy is what counts from here on.
    for tensor in [codes, zeros, scales] {
        checkpoint.release(tensor.bytes);
    }
    Ok(matrix)
}

/// Whose packing the tensors have, by their shape, held against the config.
fn packing(
    checkpoint: &Checkpoint,
    path: &str,
    codes: &TensorView<'_>,
    [rows, cols]: [usize; 2],
) -> Result<(Packing, usize)> {
    let config = checkpoint.config.get("quantization_config").unwrap_or(&Value::Null);
    let text = |key: &str| config.get(key).and_then(Value::as_str).unwrap_or_default().to_ascii_lowercase();
    let unsupported = |format: String| Error::Unsupported {
        module: path.to_owned(),
        format,
        instead: "supported are AWQ (gemm) with 4 bits and GPTQ with 2, 4 or 8, in consecutive groups".to_owned(),
    };
    let (packing, bits) = match *codes.shape {
        [inputs, words] if inputs == cols && words * 8 == rows => (Packing::Awq, 4),
        [words, outputs] if outputs == rows && words < cols && (words * 32).is_multiple_of(cols) => {
            let zero_offset = u32::from(text("checkpoint_format") != "gptq_v2");
            (Packing::Gptq { zero_offset }, words * 32 / cols)
        }
        _ => {
            let method = config.get("quant_method").unwrap_or(&Value::Null);
            return Err(unsupported(format!(
                "a qweight of shape {:?} for [{rows}, {cols}] (quant_method {method})",
                codes.shape
            )));
        }
    };
    let version = text("version");
    if packing == Packing::Awq && !["", "gemm"].contains(&version.as_str()) {
        return Err(unsupported(format!("an AWQ weight of version {version}")));
    }
    if ![2, 4, 8].contains(&bits) || !(rows * bits).is_multiple_of(32) {
        return Err(unsupported(format!("a GPTQ weight of {bits} bits and {rows} outputs")));
    }
    match config.get("bits").and_then(Value::as_u64) {
        Some(declared) if declared != bits as u64 => {
            Err(Error::module(path, "bits of its qweight", bits, format!("{declared}, as config.json says")))
        }
        _ => Ok((packing, bits)),
    }
}

/// Checks that input `k` is of group `k / group`.
fn expect_consecutive(order: &TensorView<'_>, cols: usize, group: usize) -> Result<()> {
    if order.dtype != Dtype::I32 {
        return Err(order.wrong("dtype", order.dtype, Dtype::I32));
    }
    order.expect_shape(&[cols])?;
    let groups = order.bytes.as_chunks().0.iter().map(|&bytes| i32::from_le_bytes(bytes));
    match groups.enumerate().find(|&(input, found)| usize::try_from(found) != Ok(input / group)) {
        Some((input, found)) => {
            let expected = format!("{}: groups of consecutive inputs (no act-order)", input / group);
            Err(order.wrong(format!("group of input {input}"), found, expected))
        }
        None => Ok(()),
    }
}

impl Packed<'_> {
    /// The word and the lowest bit of output `row`'s value in a line of `words` words that are packed along the outputs.
    fn place(&self, row: usize) -> (usize, usize) {
        let per_word = 32 / self.bits;
        let place = match self.packing {
            Packing::Awq => {
                AWQ_ORDER.iter().position(|&output| output == row % per_word).expect("the order has all eight")
            }
            Packing::Gptq { .. } => row % per_word,
        };
        (row / per_word, place * self.bits)
    }

    fn mask(&self, word: [u8; 4], shift: usize) -> u32 {
        (u32::from_le_bytes(word) >> shift) & ((1 << self.bits) - 1)
    }

    fn code(&self, row: usize, col: usize) -> u8 {
        let value = match self.packing {
            Packing::Awq => {
                let (word, shift) = self.place(row);
                self.mask(self.codes[col * self.words[0] + word], shift)
            }
            Packing::Gptq { .. } => {
                let per_word = 32 / self.bits;
                self.mask(self.codes[col / per_word * self.words[0] + row], col % per_word * self.bits)
            }
        };
        value as u8
    }

    fn zero(&self, row: usize, group: usize) -> u32 {
        let (word, shift) = self.place(row);
        let stored = self.mask(self.zeros[group * self.words[1] + word], shift);
        match self.packing {
            Packing::Awq => stored,
            Packing::Gptq { zero_offset } => stored + zero_offset,
        }
    }

    fn unpack(&self, format: WeightFormat) -> moellon_tensor::Result<OwnedMatrix> {
        let [rows, cols] = self.shape;
        let mut matrix = OwnedMatrix::zeroed(format, self.shape)?;
        let row_bytes = format.code_row_bytes(cols);
        let groups = cols / self.group;
        let mut codes = vec![0u8; OUTPUTS.min(rows) * cols];
        for first in (0..rows).step_by(OUTPUTS) {
            let block = first..rows.min(first + OUTPUTS);
            for col in 0..cols {
                for row in block.clone() {
                    codes[(row - first) * cols + col] = self.code(row, col);
                }
            }
            for row in block {
                pack_row(
                    &codes[(row - first) * cols..][..cols],
                    self.bits,
                    &mut matrix.codes[row * row_bytes..][..row_bytes],
                );
                for group in 0..groups {
                    let scale = self.scales[group * rows + row];
                    ScaleDtype::F32.write(scale, &mut matrix.scales, row * groups + group);
                    let offset = -(self.zero(row, group) as f32) * scale;
                    ScaleDtype::F32.write(offset, &mut matrix.offsets, row * groups + group);
                }
            }
        }
        Ok(matrix)
    }
}
