//! Shapes of published models, by name.

use crate::config::{Ffn, IndexSource, ModelConfig};
use crate::{Error, Result, arch};

/// Names and `config.json` fields. The pruned GLM-5.2 variants differ in their expert count only.
const PRESETS: [(&str, &str); 6] = [
    ("qwen3-30b-a3b", include_str!("qwen3-30b-a3b.json")),
    ("glm-5.2-77", include_str!("glm-5.2-77.json")),
    ("glm-5.2-59", include_str!("glm-5.2-59.json")),
    ("deepseek-v3", include_str!("deepseek-v3.json")),
    ("gpt-oss-120b", include_str!("gpt-oss-120b.json")),
    ("gpt-oss-20b", include_str!("gpt-oss-20b.json")),
];

/// Names of the presets, for messages.
pub fn preset_names() -> String {
    PRESETS.map(|(name, _)| name).join(", ")
}

/// The config of `PRESET[:layers=N][,vocab=N][,mtp=N]`, without MTP layers unless they are asked for. A slice takes N layers from the first with experts on, so that what is
/// measured is what most of the model does.
///
/// # Errors
/// An unknown preset or option, by name.
pub fn preset(spec: &str) -> Result<ModelConfig> {
    let (name, options) = spec.split_once(':').unwrap_or((spec, ""));
    let found = PRESETS.into_iter().find(|(preset, _)| *preset == name);
    let (_, json) = found.ok_or_else(|| Error::config("--synthetic", name, preset_names()))?;
    let json = serde_json::from_str(json).map_err(|e| Error::config(format!("preset {name}"), e, "JSON"))?;
    let mut config = arch::parse(&json)?;
    config.num_mtp_layers = 0;
    for option in options.split(',').filter(|o| !o.is_empty()) {
        let (key, value) = option.split_once('=').unwrap_or((option, ""));
        let limit = match key {
            "layers" => config.layers.len(),
            "vocab" => config.vocab_size,
            "mtp" => 1,
            _ => return Err(Error::config("--synthetic option", option, "layers=N, vocab=N or mtp=1")),
        };
        let number = value.parse::<usize>().ok().filter(|n| (1..=limit).contains(n));
        let number =
            number.ok_or_else(|| Error::config(format!("--synthetic {key}"), value, format!("1 to {limit}")))?;
        match key {
            "layers" => slice(&mut config, number),
            "mtp" => config.num_mtp_layers = number,
            _ => config.vocab_size = number,
        }
    }
    Ok(config)
}

fn slice(config: &mut ModelConfig, num_layers: usize) {
    let first_moe = config.layers.iter().position(|l| l.ffn == Ffn::Moe).unwrap_or(0);
    let first = first_moe.min(config.layers.len() - num_layers);
    config.layers = config.layers[first..first + num_layers].to_vec();
    // A slice may begin inside a group of layers that share an index set.
    if let Some(layer) = config.layers.first_mut().filter(|l| l.index == IndexSource::Shared) {
        layer.index = IndexSource::Own;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::{FormatPlan, Synthetic};
    use crate::weights::Weights;

    #[test]
    fn published_parameter_counts() {
        let count = |spec: &str| {
            let config = preset(spec).expect("preset is known");
            let plan = FormatPlan::parse("affine-4").expect("plan is known");
            // One layer of each kind is enough to count them all.
            let layers = config.layers.len();
            let parameters = |slice: &str| {
                let config = preset(slice).expect("slice is legal");
                Weights::describe(&config, &Synthetic::new(&config, plan, 0))
                    .expect("preset is consistent")
                    .account
                    .trunk()
                    .parameters as f64
            };
            let (one, two) =
                (parameters(&format!("{spec}:layers=1,vocab=64")), parameters(&format!("{spec}:layers=2,vocab=64")));
            (one + (two - one) * (layers - 1) as f64) / 1e9
        };
        // Without embeddings: Qwen3-30B-A3B has 29.9 B of its 30.5 B parameters in its layers.
        let qwen = count("qwen3-30b-a3b");
        assert!((29.8..30.0).contains(&qwen), "{qwen}");
    }

    #[test]
    fn options_are_checked_by_name() {
        let error = |spec: &str| preset(spec).unwrap_err().to_string();
        assert!(error("gpt-5").contains("--synthetic is gpt-5, expected qwen3-30b-a3b"));
        assert!(error("glm-5.2-77:layers=99").contains("--synthetic layers is 99, expected 1 to 78"));
        assert!(error("glm-5.2-77:depth=1").contains("--synthetic option is depth=1"));
        assert_eq!(preset("glm-5.2-77:layers=12").expect("legal").layers.len(), 12);
    }
}
