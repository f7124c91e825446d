//! Variants of a model that levers compare: quantized or pruned copies, made once and kept in the user's cache folder.

use super::{Applicable, Base};
use crate::model_source::ModelSource;
use crate::{provenance, surgery, table};
use anyhow::{Context, Result};
use moellon_surgery::encoder::{EncoderOptions, Method};
use moellon_surgery::prune::{self, MtpExperts, Score};
use moellon_surgery::stats::MomentsMode;
use moellon_surgery::stream::Sequences;
use moellon_surgery::{Plan, Source, Stats, calibrate, formats, quantize};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// Larger models are not copied for an experiment.
const LARGEST_BYTES: u64 = 4_000_000_000;

/// Tokens that experts are judged by before they are pruned.
const CALIBRATION_TOKENS: usize = 8192;

/// The directory of the model with the weights of that format or plan and that share of its experts pruned; `None` for the
/// bundled model as it is.
pub fn directory(base: &Base, weights: Option<&str>, prune: Option<f64>) -> Result<Applicable<Option<PathBuf>>> {
    let mut directory = base.directory.clone();
    if weights.is_none() && prune.is_none() {
        return Ok(Ok(directory));
    }
    let size = ModelSource::open(directory.as_deref())?.checkpoint.size_bytes();
    if size > LARGEST_BYTES {
        let (found, most) = (table::bytes(size as f64), table::bytes(LARGEST_BYTES as f64));
        return Ok(Err(format!("the model has {found}; copies for an experiment are made of models up to {most}")));
    }
    if let Some(ratio) = prune {
        directory = match pruned(base, ratio)? {
            Ok(path) => Some(path),
            Err(reason) => return Ok(Err(reason)),
        };
    }
    if let Some(weights) = weights {
        directory = match quantized(base, directory.as_deref(), weights)? {
            Ok(path) => Some(path),
            Err(reason) => return Ok(Err(reason)),
        };
    }
    Ok(Ok(directory))
}

/// Where the variant is kept that `recipe` makes of a model.
fn place(base: &Base, identity: &str, recipe: &str) -> Result<PathBuf> {
    let key = provenance::hex(&Sha256::digest(format!("{identity} {recipe} {}", env!("CARGO_PKG_VERSION"))));
    std::fs::create_dir_all(&base.variants).with_context(|| base.variants.display().to_string())?;
    Ok(base.variants.join(&key[..20]))
}

fn quantized(base: &Base, directory: Option<&Path>, weights: &str) -> Result<Applicable<PathBuf>> {
    let model = ModelSource::open(directory)?;
    let place = place(base, &model.checkpoint.identity(), &format!("quantize {weights}"))?;
    if place.exists() {
        return Ok(Ok(place));
    }
    let plan = match formats::parse(weights) {
        Ok(format) => Plan::uniform(format),
        Err(_) => Plan::preset(weights).with_context(|| format!("{weights} is no format and no preset plan"))?,
    };
    let files = model.companion_files(directory)?;
    let source = Source { name: &model.name, checkpoint: &model.checkpoint, config: &model.config, files: &files };
    if let Some(first) = quantize::requantized(source, &plan)?.first() {
        return Ok(Err(format!("{first} is quantized already: errors of two formats would add up")));
    }
    eprintln!("  making {weights} of {}", model.name);
    let encoder = EncoderOptions { method: Method::Search, nvfp4_global_scale: true };
    let settings = quantize::QuantizeOptions { plan: &plan, stats: None, encoder, max_shard_bytes: 1 << 30 };
    quantize::quantize(source, settings, &place, &mut |_| {})?;
    Ok(Ok(place))
}

fn pruned(base: &Base, ratio: f64) -> Result<Applicable<PathBuf>> {
    let directory = base.directory.as_deref();
    let model = ModelSource::open(directory)?;
    let identity = model.checkpoint.identity();
    let place_of_model = place(base, &identity, &format!("prune {ratio} {}", base.text_hash))?;
    if place_of_model.exists() {
        return Ok(Ok(place_of_model));
    }
    let files = model.companion_files(directory)?;
    let source = Source { name: &model.name, checkpoint: &model.checkpoint, config: &model.config, files: &files };
    let calibration = place(base, &identity, &format!("calibrate {}", base.text_hash))?;
    if !calibration.exists() {
        eprintln!("  calibrating {}", model.name);
        let sequence_len = 512.min(model.config.max_position_embeddings);
        let sequences = Sequences::cut(std::slice::from_ref(&base.text), sequence_len, CALIBRATION_TOKENS)?;
        let texts = vec![["lever texts".to_owned(), base.text_hash.clone()]];
        let settings = calibrate::CalibrateOptions { texts, sequence_len, moments: MomentsMode::None };
        let mut backends = surgery::backends(&base.device)?;
        calibrate::calibrate(source, &sequences, &settings, &calibration, &mut backends, &mut |_| {})?;
    }
    let experts = prune::experts_per_layer(source)?;
    let (n_group, active) = (model.config.moe.n_group.max(1), model.config.moe.num_experts_per_tok);
    // A whole number of experts in each group.
    let keep = ((experts as f64 * (1.0 - ratio) / n_group as f64).round() as usize) * n_group;
    if keep < active || keep == experts {
        return Ok(Err(format!("{keep} of {experts} experts would stay, and a token uses {active}")));
    }
    eprintln!("  keeping {keep} of {experts} experts of {}", model.name);
    let stats = Stats::open(&calibration)?;
    let settings = prune::PruneOptions { keep, score: Score::Reap, mtp: MtpExperts::Whole, max_shard_bytes: 1 << 30 };
    prune::prune(source, &stats, settings, &place_of_model, &mut |_| {})?;
    Ok(Ok(place_of_model))
}
