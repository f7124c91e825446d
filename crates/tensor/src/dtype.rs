//! Element types of tensors as they stand in a checkpoint or a buffer.

use std::fmt;

/// Element type of a tensor. Names follow safetensors (`F32`, `BF16`, `F8_E4M3`, ...).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE 754 binary64; only read from checkpoints, never computed on.
    F64,
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32.
    Bf16,
    /// Float with 4 exponent and 3 mantissa bits, no infinities (OCP FP8 E4M3FN).
    F8E4m3,
    /// Float with 5 exponent and 2 mantissa bits.
    F8E5m2,
    /// Power-of-two scale, `2^(code - 127)` (OCP MX E8M0).
    F8E8m0,
    /// Signed 8-bit integer.
    I8,
    /// Unsigned 8-bit integer; packed codes and minifloat scales travel as this too.
    U8,
    /// Signed 16-bit integer.
    I16,
    /// Unsigned 16-bit integer.
    U16,
    /// Signed 32-bit integer.
    I32,
    /// Unsigned 32-bit integer; MLX packs codes into these.
    U32,
    /// Signed 64-bit integer.
    I64,
    /// Unsigned 64-bit integer.
    U64,
    /// One byte, 0 or 1.
    Bool,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn size_bytes(self) -> usize {
        match self {
            Dtype::F8E4m3 | Dtype::F8E5m2 | Dtype::F8E8m0 | Dtype::I8 | Dtype::U8 | Dtype::Bool => 1,
            Dtype::F16 | Dtype::Bf16 | Dtype::I16 | Dtype::U16 => 2,
            Dtype::F32 | Dtype::I32 | Dtype::U32 => 4,
            Dtype::F64 | Dtype::I64 | Dtype::U64 => 8,
        }
    }

    /// The name that safetensors headers use.
    pub const fn safetensors_name(self) -> &'static str {
        match self {
            Dtype::F64 => "F64",
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
            Dtype::Bf16 => "BF16",
            Dtype::F8E4m3 => "F8_E4M3",
            Dtype::F8E5m2 => "F8_E5M2",
            Dtype::F8E8m0 => "F8_E8M0",
            Dtype::I8 => "I8",
            Dtype::U8 => "U8",
            Dtype::I16 => "I16",
            Dtype::U16 => "U16",
            Dtype::I32 => "I32",
            Dtype::U32 => "U32",
            Dtype::I64 => "I64",
            Dtype::U64 => "U64",
            Dtype::Bool => "BOOL",
        }
    }

    /// The inverse of [`Dtype::safetensors_name`]; `None` for a name we do not know.
    pub fn from_safetensors_name(name: &str) -> Option<Self> {
        use Dtype::*;
        [F64, F32, F16, Bf16, F8E4m3, F8E5m2, F8E8m0, I8, U8, I16, U16, I32, U32, I64, U64, Bool]
            .into_iter()
            .find(|d| d.safetensors_name() == name)
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.safetensors_name())
    }
}
