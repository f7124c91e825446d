//! Names of weight formats as plans and flags write them.

use crate::{Error, Result};
use moellon_tensor::{ScaleDtype, WeightFormat};

/// Names that [`parse`] takes, for messages.
pub const NAMES: &str = "affine-2..6, affine-8 (with -g32, -g64 or -g128, default -g64; -f16 or -f32 for scales of that type, default bf16), \
     nvfp4, mxfp4, mxfp8, fp8, bf16, f16 or f32";

/// The format of that name. Affine scales are bf16 where the name says nothing else, FP8 blocks 128 x 128.
///
/// # Errors
/// Names what was found and what there is.
pub fn parse(name: &str) -> Result<WeightFormat> {
    let unknown = || Error::mismatch("weight format", name, NAMES);
    Ok(match name {
        "nvfp4" => WeightFormat::Nvfp4,
        "mxfp4" => WeightFormat::Mxfp4,
        "mxfp8" => WeightFormat::Mxfp8,
        "fp8" | "fp8-128x128" => WeightFormat::Fp8Block { block_rows: 128, block_cols: 128 },
        "bf16" => WeightFormat::Bf16,
        "f16" => WeightFormat::F16,
        "f32" => WeightFormat::F32,
        _ => {
            let rest = name.strip_prefix("affine-").ok_or_else(unknown)?;
            let (rest, scale) = [ScaleDtype::F16, ScaleDtype::F32]
                .into_iter()
                .find_map(|scale| Some((rest.strip_suffix(scale_suffix(scale))?, scale)))
                .unwrap_or((rest, ScaleDtype::Bf16));
            let (bits, group) = rest.split_once("-g").unwrap_or((rest, "64"));
            let bits = bits.parse().map_err(|_| unknown())?;
            let group = group.parse().map_err(|_| unknown())?;
            let format = WeightFormat::Affine { bits, group, scale };
            // 384 columns are legal in every group.
            format.validate(384).map_err(|_| unknown())?;
            // One bit is readable; MLX writes it with another rule and nothing here searches it.
            if bits == 1 {
                return Err(unknown());
            }
            format
        }
    })
}

/// What the name of an affine format ends in.
const fn scale_suffix(scale: ScaleDtype) -> &'static str {
    match scale {
        ScaleDtype::Bf16 => "",
        ScaleDtype::F16 => "-f16",
        ScaleDtype::F32 => "-f32",
    }
}

/// The name that [`parse`] takes back.
pub fn name(format: WeightFormat) -> String {
    match format {
        WeightFormat::Fp8Block { block_rows: 128, block_cols: 128 } => "fp8".to_owned(),
        WeightFormat::Affine { scale, .. } => format!("{format}{}", scale_suffix(scale)),
        other => other.to_string(),
    }
}

/// MLX's `mode` of a format that MLX has.
pub(crate) fn mlx_mode(format: WeightFormat) -> Option<&'static str> {
    match format {
        WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 | WeightFormat::Fp8Block { .. } => None,
        WeightFormat::Affine { .. } => Some("affine"),
        WeightFormat::Mxfp4 => Some("mxfp4"),
        WeightFormat::Mxfp8 => Some("mxfp8"),
        WeightFormat::Nvfp4 => Some("nvfp4"),
    }
}

/// The nearest format that rows of `cols` columns can have: a smaller affine group, else bf16, as quantizers leave such
/// matrices.
pub(crate) fn fit(format: WeightFormat, cols: usize) -> WeightFormat {
    if format.validate(cols).is_ok() {
        return format;
    }
    if let WeightFormat::Affine { bits, scale, .. } = format {
        for group in [64, 32] {
            let smaller = WeightFormat::Affine { bits, group, scale };
            if group < format.group().unwrap_or(0) as u32 && smaller.validate(cols).is_ok() {
                return smaller;
            }
        }
    }
    WeightFormat::Bf16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back() {
        for name in
            ["affine-2-g32", "affine-3-g64", "affine-4-g128-f32", "affine-8-g64-f16", "nvfp4", "mxfp4", "fp8", "bf16"]
        {
            assert_eq!(super::name(parse(name).expect("known")), name);
        }
        assert_eq!(super::name(parse("affine-3").expect("known")), "affine-3-g64");
        for name in ["affine-7", "affine-1", "affine-4-g16", "q4_k", "affine-"] {
            let message = parse(name).unwrap_err().to_string();
            assert!(message.contains(name) && message.contains("nvfp4"), "{message}");
        }
    }

    #[test]
    fn rows_that_are_no_whole_groups_get_smaller_groups_or_stay_plain() {
        let format = |name| parse(name).expect("known");
        assert_eq!(fit(format("affine-4-g128"), 64), format("affine-4-g64"));
        assert_eq!(fit(format("affine-4"), 32), format("affine-4-g32"));
        assert_eq!(fit(format("affine-4-g32"), 48), WeightFormat::Bf16);
        assert_eq!(fit(format("nvfp4"), 48), WeightFormat::Nvfp4);
        assert_eq!(fit(format("nvfp4"), 40), WeightFormat::Bf16);
    }
}
