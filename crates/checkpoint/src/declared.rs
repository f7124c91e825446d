//! What the config says of a module's quantization. The tensors decide how a weight is read; this is only held
//! against them, so that a config of another revision is found at load.

use crate::{Error, Result};
use moellon_tensor::WeightFormat;
use serde_json::Value;

/// The config's word on one module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Declared {
    /// No word.
    Nothing,
    /// `"<path>": false`.
    Plain,
    /// An MLX entry of the module itself, or the default of all quantized modules.
    Mlx { group_size: u64, bits: u64, mode: String, of_module: bool },
}

/// Looks `path` up in an MLX `quantization` dictionary (mlx-lm writes it as `quantization_config` as well).
pub(crate) fn declared(config: &Value, path: &str) -> Result<Declared> {
    let dictionary = match config.get("quantization") {
        Some(dictionary) => dictionary,
        // Hugging Face's own `quantization_config` names a method and has no entries by path.
        None => match config.get("quantization_config") {
            Some(dictionary) if dictionary.get("quant_method").is_none() => dictionary,
            _ => return Ok(Declared::Nothing),
        },
    };
    match dictionary.get(path) {
        Some(Value::Bool(false)) => Ok(Declared::Plain),
        Some(entry) if entry.is_object() => parse_entry(path, entry, true),
        // `true` means the default.
        None | Some(Value::Bool(true)) if dictionary.get("bits").is_some() => parse_entry(path, dictionary, false),
        None | Some(Value::Null) => Ok(Declared::Nothing),
        Some(other) => Err(Error::module(path, "quantization entry of config.json", other, "an object or false")),
    }
}

fn parse_entry(path: &str, entry: &Value, of_module: bool) -> Result<Declared> {
    let number = |key: &str| {
        entry.get(key).and_then(Value::as_u64).ok_or_else(|| {
            let found = entry.get(key).map_or("none".to_owned(), Value::to_string);
            Error::module(path, format!("quantization {key} of config.json"), found, "a positive integer")
        })
    };
    let mode = match entry.get("mode") {
        None | Some(Value::Null) => "affine".to_owned(),
        Some(Value::String(mode)) => mode.clone(),
        Some(other) => return Err(Error::module(path, "quantization mode of config.json", other, "a string")),
    };
    Ok(Declared::Mlx { group_size: number("group_size")?, bits: number("bits")?, mode, of_module })
}

impl Declared {
    /// Holds the declaration against the format that the tensors have.
    ///
    /// # Errors
    /// Names both.
    pub(crate) fn check(&self, path: &str, format: WeightFormat) -> Result<()> {
        let wrong = |expected: String| {
            Err(Error::module(
                path,
                "format of its tensors",
                describe(format),
                format!("{expected}, as config.json says"),
            ))
        };
        match self {
            Declared::Nothing => Ok(()),
            Declared::Plain if format.is_quantized() => wrong("plain floats (quantization: false)".to_owned()),
            Declared::Plain => Ok(()),
            // The default applies to the modules that are quantized; the others are simply not.
            Declared::Mlx { of_module: false, .. } if !format.is_quantized() => Ok(()),
            Declared::Mlx { group_size, bits, mode, .. } => {
                let agrees = *mode == mlx_mode(format)
                    && *bits == format.code_bits() as u64
                    && format.group() == usize::try_from(*group_size).ok();
                if agrees { Ok(()) } else { wrong(format!("{mode} with {bits} bits and group size {group_size}")) }
            }
        }
    }
}

fn describe(format: WeightFormat) -> String {
    match format.group() {
        None => format!("plain {format}"),
        Some(group) => format!("{} with {} bits and group size {group}", mlx_mode(format), format.code_bits()),
    }
}

/// MLX's name of a format.
fn mlx_mode(format: WeightFormat) -> &'static str {
    match format {
        WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 => "plain",
        WeightFormat::Fp8Block { .. } => "fp8 blocks",
        WeightFormat::Affine { .. } => "affine",
        WeightFormat::Mxfp4 => "mxfp4",
        WeightFormat::Mxfp8 => "mxfp8",
        WeightFormat::Nvfp4 => "nvfp4",
    }
}
