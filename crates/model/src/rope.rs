//! Rope frequencies: plain and yarn.

use crate::Result;
use crate::fields::Fields;

/// Frequencies and factors of one model's rope.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeScaling {
    /// `[dim / 2]` radians per position.
    pub inverse_frequencies: Vec<f32>,
    /// Factor on cosine and sine.
    pub scale: f32,
    /// Factor on MLA's softmax scale (DeepSeek's `mscale` squared), 1.0 without yarn.
    pub softmax_factor: f64,
}

/// Reads `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before), for `dim` rotated elements.
///
/// # Errors
/// Names the field that is missing or a rope type that we do not know.
pub(crate) fn parse(config: &Fields<'_>, dim: usize) -> Result<RopeScaling> {
    let nested = config.object("rope_parameters");
    let scaling = nested.or_else(|| config.object("rope_scaling"));
    let theta = match nested.map(|n| n.optional_number("rope_theta")).transpose()?.flatten() {
        Some(theta) if theta > 0.0 => theta,
        Some(_) => return Err(nested.unwrap_or(*config).error("rope_theta", "a positive number")),
        None => config.positive_number("rope_theta")?,
    };
    let kind = match scaling {
        Some(s) => s.optional_text("rope_type")?.or(s.optional_text("type")?).unwrap_or("default"),
        None => "default",
    };
    match (kind, scaling) {
        ("default", _) => Ok(plain(theta, dim)),
        ("yarn", Some(fields)) => yarn(theta, dim, &fields),
        (_, fields) => Err(fields.unwrap_or(*config).error("rope_type", "default or yarn")),
    }
}

fn plain(theta: f64, dim: usize) -> RopeScaling {
    let inverse_frequencies = (0..dim / 2).map(|i| (1.0 / theta.powf(2.0 * i as f64 / dim as f64)) as f32).collect();
    RopeScaling { inverse_frequencies, scale: 1.0, softmax_factor: 1.0 }
}

/// YaRN (Peng et al. 2023) as transformers computes it: slow dimensions are interpolated by `factor`, fast ones kept, a
/// linear ramp between `beta_fast` and `beta_slow` rotations over the original context.
fn yarn(theta: f64, dim: usize, fields: &Fields<'_>) -> Result<RopeScaling> {
    let factor = fields.positive_number("factor")?;
    let original_context = fields.positive_number("original_max_position_embeddings")?;
    let log_scale = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
    // A zero mscale counts as absent, as in Python.
    let mscale = fields.optional_number("mscale")?.filter(|m| *m != 0.0);
    let mscale_all_dim = fields.optional_number("mscale_all_dim")?.filter(|m| *m != 0.0);
    let scale = match (fields.optional_number("attention_factor")?, mscale, mscale_all_dim) {
        (Some(factor), _, _) => factor,
        (None, Some(m), Some(all)) => log_scale(m) / log_scale(all),
        _ => log_scale(1.0),
    };
    let rotations_dim = |rotations: f64| {
        dim as f64 * (original_context / (rotations * 2.0 * std::f64::consts::PI)).ln() / (2.0 * theta.ln())
    };
    let positive_or = |key: &str, default: f64| {
        Ok(fields.optional_number(key)?.filter(|x| *x != 0.0).unwrap_or(default)) as Result<f64>
    };
    let (mut low, mut high) =
        (rotations_dim(positive_or("beta_fast", 32.0)?), rotations_dim(positive_or("beta_slow", 1.0)?));
    if fields.flag_or("truncate", true)? {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min(dim as f64 - 1.0));
    if low == high {
        high += 0.001;
    }
    let inverse_frequency = |i: usize| {
        let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
        let frequency = theta.powf(2.0 * i as f64 / dim as f64);
        (ramp / (factor * frequency) + (1.0 - ramp) / frequency) as f32
    };
    let softmax_factor = mscale_all_dim.map_or(1.0, |m| log_scale(m).powi(2));
    Ok(RopeScaling {
        inverse_frequencies: (0..dim / 2).map(inverse_frequency).collect(),
        scale: scale as f32,
        softmax_factor,
    })
}
