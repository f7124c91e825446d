//! Weight formats: which bits stand for which numbers. Bit layouts: `docs/formats.md`.

use crate::{Dtype, Error, Result};
use std::fmt;

/// The three float types of scales, offsets and plain weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ScaleDtype {
    /// binary32
    F32,
    /// binary16
    F16,
    /// bfloat16
    Bf16,
}

impl ScaleDtype {
    /// Bytes of one scale.
    pub const fn size_bytes(self) -> usize {
        match self {
            ScaleDtype::F32 => 4,
            ScaleDtype::F16 | ScaleDtype::Bf16 => 2,
        }
    }

    /// The tensor dtype of such scales.
    pub const fn dtype(self) -> Dtype {
        match self {
            ScaleDtype::F32 => Dtype::F32,
            ScaleDtype::F16 => Dtype::F16,
            ScaleDtype::Bf16 => Dtype::Bf16,
        }
    }

    /// The float type that `dtype` is, if it is one of the three.
    pub const fn from_dtype(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F32 => Some(ScaleDtype::F32),
            Dtype::F16 => Some(ScaleDtype::F16),
            Dtype::Bf16 => Some(ScaleDtype::Bf16),
            _ => None,
        }
    }

    /// `value` rounded to this type (nearest, ties to even; beyond the range to infinity) and widened again.
    pub fn round(self, value: f32) -> f32 {
        match self {
            ScaleDtype::F32 => value,
            ScaleDtype::F16 => half::f16::from_f32(value).to_f32(),
            ScaleDtype::Bf16 => half::bf16::from_f32(value).to_f32(),
        }
    }

    /// Element `at` of little-endian `bytes`, widened exactly.
    ///
    /// # Panics
    /// If `bytes` is too short.
    pub fn read(self, bytes: &[u8], at: usize) -> f32 {
        let pair = || [bytes[2 * at], bytes[2 * at + 1]];
        match self {
            ScaleDtype::F32 => f32::from_le_bytes(bytes[4 * at..][..4].try_into().expect("the slice has 4 bytes")),
            ScaleDtype::F16 => half::f16::from_le_bytes(pair()).to_f32(),
            ScaleDtype::Bf16 => half::bf16::from_le_bytes(pair()).to_f32(),
        }
    }

    /// Elements `first..first + out.len()` of little-endian `bytes`, widened exactly.
    ///
    /// # Panics
    /// If `bytes` is too short.
    pub fn read_slice(self, bytes: &[u8], first: usize, out: &mut [f32]) {
        let bytes = &bytes[first * self.size_bytes()..][..out.len() * self.size_bytes()];
        // One loop a type, so that each vectorises.
        match self {
            ScaleDtype::F32 => widen(bytes.as_chunks().0, out, f32::from_le_bytes),
            ScaleDtype::F16 => widen(bytes.as_chunks().0, out, |b| half::f16::from_le_bytes(b).to_f32()),
            ScaleDtype::Bf16 => {
                widen(bytes.as_chunks().0, out, |b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16))
            }
        }
    }

    /// Writes `value`, rounded, as element `at` of little-endian `bytes`.
    ///
    /// # Panics
    /// If `bytes` is too short.
    pub fn write(self, value: f32, bytes: &mut [u8], at: usize) {
        match self {
            ScaleDtype::F32 => bytes[4 * at..][..4].copy_from_slice(&value.to_le_bytes()),
            ScaleDtype::F16 => bytes[2 * at..][..2].copy_from_slice(&half::f16::from_f32(value).to_le_bytes()),
            ScaleDtype::Bf16 => bytes[2 * at..][..2].copy_from_slice(&half::bf16::from_f32(value).to_le_bytes()),
        }
    }
}

fn widen<const BYTES: usize>(elements: &[[u8; BYTES]], out: &mut [f32], value: impl Fn([u8; BYTES]) -> f32) {
    for (out, &element) in out.iter_mut().zip(elements) {
        *out = value(element);
    }
}

/// How the numbers of a weight matrix are coded. Canonical layout of every format: row-major, each row one
/// little-endian bit stream of codes (element `i` of a `b`-bit row is bits `[i*b, (i+1)*b)`), and one row of scales
/// (and offsets) beside it. MLX, ModelOpt, compressed-tensors and gpt-oss checkpoints all hold these bytes already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    /// Plain binary32.
    F32,
    /// Plain binary16.
    F16,
    /// Plain bfloat16.
    Bf16,
    /// E4M3 codes times one f32 scale per `block_rows` x `block_cols` tile (DeepSeek-V3 and GLM FP8 checkpoints).
    Fp8Block {
        /// Rows that share a scale (128 in every published checkpoint).
        block_rows: u32,
        /// Columns that share a scale (128).
        block_cols: u32,
    },
    /// `code * scale + offset` with unsigned `bits`-bit codes and one scale and offset per `group` columns (MLX affine).
    Affine {
        /// 1, 2, 3, 4, 5, 6 or 8.
        bits: u8,
        /// 32, 64 or 128 columns.
        group: u32,
        /// Type of scales and offsets.
        scale: ScaleDtype,
    },
    /// E2M1 codes, one E8M0 scale per 32 columns (OCP MXFP4).
    Mxfp4,
    /// E4M3 codes, one E8M0 scale per 32 columns (OCP MXFP8).
    Mxfp8,
    /// E2M1 codes, one E4M3 scale per 16 columns, optionally one f32 per matrix ([`crate::MatrixView::global_scale`]).
    Nvfp4,
}

impl WeightFormat {
    /// Bits of one code.
    pub const fn code_bits(self) -> usize {
        match self {
            WeightFormat::F32 => 32,
            WeightFormat::F16 | WeightFormat::Bf16 => 16,
            WeightFormat::Fp8Block { .. } | WeightFormat::Mxfp8 => 8,
            WeightFormat::Affine { bits, .. } => bits as usize,
            WeightFormat::Mxfp4 | WeightFormat::Nvfp4 => 4,
        }
    }

    /// Columns that share one scale; `None` for plain floats.
    pub const fn group(self) -> Option<usize> {
        match self {
            WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 => None,
            WeightFormat::Fp8Block { block_cols, .. } => Some(block_cols as usize),
            WeightFormat::Affine { group, .. } => Some(group as usize),
            WeightFormat::Mxfp4 | WeightFormat::Mxfp8 => Some(32),
            WeightFormat::Nvfp4 => Some(16),
        }
    }

    /// Whether the value of a code is a small integer or a table entry with a scale beside it (anything but plain floats).
    pub const fn is_quantized(self) -> bool {
        self.group().is_some()
    }

    /// Bytes of the codes of one row of `cols` columns.
    pub const fn code_row_bytes(self, cols: usize) -> usize {
        (cols * self.code_bits()).div_ceil(8)
    }

    /// Scales in one row of `cols` columns (0 for plain floats).
    pub const fn scales_per_row(self, cols: usize) -> usize {
        match self.group() {
            None => 0,
            Some(group) => cols.div_ceil(group),
        }
    }

    /// Rows of scales that a matrix of `rows` rows has.
    pub const fn scale_rows(self, rows: usize) -> usize {
        match self {
            WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 => 0,
            WeightFormat::Fp8Block { block_rows, .. } => rows.div_ceil(block_rows as usize),
            WeightFormat::Affine { .. } | WeightFormat::Mxfp4 | WeightFormat::Mxfp8 | WeightFormat::Nvfp4 => rows,
        }
    }

    /// The plain format of a float type.
    pub const fn plain(dtype: ScaleDtype) -> Self {
        match dtype {
            ScaleDtype::F32 => WeightFormat::F32,
            ScaleDtype::F16 => WeightFormat::F16,
            ScaleDtype::Bf16 => WeightFormat::Bf16,
        }
    }

    /// Bytes of one scale (0 for plain floats).
    pub const fn scale_bytes(self) -> usize {
        match self {
            WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 => 0,
            WeightFormat::Fp8Block { .. } => 4,
            WeightFormat::Affine { scale, .. } => scale.size_bytes(),
            WeightFormat::Mxfp4 | WeightFormat::Mxfp8 | WeightFormat::Nvfp4 => 1,
        }
    }

    /// Whether an offset stands beside every scale.
    pub const fn has_offsets(self) -> bool {
        matches!(self, WeightFormat::Affine { .. })
    }

    /// Bytes that a `[rows, cols]` matrix takes in this format, scales and offsets included.
    pub const fn matrix_bytes(self, rows: usize, cols: usize) -> u64 {
        let per_scale = self.scale_bytes() * if self.has_offsets() { 2 } else { 1 };
        (rows * self.code_row_bytes(cols)) as u64
            + (self.scale_rows(rows) * self.scales_per_row(cols) * per_scale) as u64
    }

    /// Bits per weight of a large matrix, scales and offsets included (4.5 for affine-4 with group 64 and bf16 scales).
    pub fn bits_per_weight(self) -> f64 {
        self.matrix_bytes(128, 3840) as f64 * 8.0 / (128.0 * 3840.0)
    }

    /// Checks that the format exists and that rows of `cols` columns are legal in it.
    ///
    /// # Errors
    /// Names the width, group or column count that is not.
    pub fn validate(self, cols: usize) -> Result<()> {
        if let WeightFormat::Affine { bits, group, .. } = self {
            if !matches!(bits, 1..=6 | 8) {
                return Err(Error::mismatch("affine bits", bits, "1, 2, 3, 4, 5, 6 or 8"));
            }
            if !matches!(group, 32 | 64 | 128) {
                return Err(Error::mismatch("affine group", group, "32, 64 or 128"));
            }
        }
        match (self, self.group()) {
            (WeightFormat::Fp8Block { block_rows, block_cols }, _) if block_rows == 0 || block_cols == 0 => {
                Err(Error::mismatch("FP8 block", format!("{block_rows}x{block_cols}"), "positive sizes"))
            }
            // FP8 blocks may end in a partial block; every other group must be whole.
            (WeightFormat::Fp8Block { .. }, _) | (_, None) => Ok(()),
            (_, Some(group)) if cols.is_multiple_of(group) => Ok(()),
            (_, Some(group)) => {
                Err(Error::mismatch(format!("columns of a {self} matrix"), cols, format!("a multiple of {group}")))
            }
        }
    }
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WeightFormat::F32 => f.write_str("f32"),
            WeightFormat::F16 => f.write_str("f16"),
            WeightFormat::Bf16 => f.write_str("bf16"),
            WeightFormat::Fp8Block { block_rows, block_cols } => write!(f, "fp8-{block_rows}x{block_cols}"),
            WeightFormat::Affine { bits, group, .. } => write!(f, "affine-{bits}-g{group}"),
            WeightFormat::Mxfp4 => f.write_str("mxfp4"),
            WeightFormat::Mxfp8 => f.write_str("mxfp8"),
            WeightFormat::Nvfp4 => f.write_str("nvfp4"),
        }
    }
}
