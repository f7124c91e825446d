//! Loads a model onto a back end, with a progress bar.

use crate::cli::CacheChoice;
use crate::model_source::ModelSource;
use crate::table;
use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use moellon_model::draft_precision::{DraftPrecision, DraftVocabulary};
use moellon_model::provider::WeightProvider;
use moellon_model::synthetic::{FormatPlan, Synthetic};
use moellon_model::weights::Weights;
use moellon_model::{Decoder, DecoderOptions, ModelConfig};
use moellon_ops::{Backend, CacheDtype};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Tokens of a prefill step.
pub const PREFILL_CHUNK: usize = 512;

/// How long the last load took and how much it moved.
#[derive(Debug, Clone, Copy)]
pub struct LoadTime {
    pub bytes: u64,
    pub elapsed: Duration,
}

/// What is loaded of a model's MTP layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mtp {
    /// The weights as they are stored.
    AsStored,
    /// Cheaper ones, for drafts of these tokens.
    ForDrafts(DraftVocabulary),
}

/// Loads weights and allocates caches for `context` positions of one sequence.
pub fn load(
    source: &ModelSource,
    context: usize,
    cache: CacheChoice,
    mtp: Mtp,
    backend: &mut dyn Backend,
) -> Result<(Decoder, LoadTime)> {
    let cache_dtype = match cache {
        CacheChoice::F32 => CacheDtype::F32,
        CacheChoice::Bf16 => CacheDtype::Bf16,
    };
    load_sized(source, DecoderOptions::single_sequence(context, PREFILL_CHUNK.min(context), cache_dtype), mtp, backend)
}

/// Loads weights and allocates what `sizes` says.
pub fn load_sized(
    source: &ModelSource,
    sizes: DecoderOptions,
    mtp: Mtp,
    backend: &mut dyn Backend,
) -> Result<(Decoder, LoadTime)> {
    let started = Instant::now();
    let for_drafts;
    let provider: &dyn WeightProvider = match mtp {
        Mtp::AsStored => &source.checkpoint,
        Mtp::ForDrafts(vocabulary) => {
            for_drafts = DraftPrecision::new(&source.config, vocabulary, &source.checkpoint);
            &for_drafts
        }
    };
    let total = source.checkpoint.size_bytes();
    let bar = progress_bar(total);
    bar.set_message("loading");
    let (mut last_line, mut done) = (Instant::now(), 0);
    let plain = !std::io::stderr().is_terminal();
    let weights = Weights::load(&source.config, provider, backend, &mut |progress| {
        done = progress.done_bytes;
        bar.set_position(done.min(total));
        // Without a terminal, a line every ten seconds tells a log that we are alive.
        if plain && last_line.elapsed() > Duration::from_secs(10) {
            last_line = Instant::now();
            eprintln!("loading {}: {:.1} of {:.1} GB", progress.name, done as f64 / 1e9, total as f64 / 1e9);
        }
    })
    .with_context(|| source.name.clone())?;
    // A shard that somebody wrote to meanwhile may have given half an old model and half a new one.
    source.checkpoint.check_unchanged()?;
    let decoder = Decoder::new(source.config.clone(), weights, sizes, backend)?;
    bar.finish_and_clear();
    Ok((decoder, LoadTime { bytes: done, elapsed: started.elapsed() }))
}

/// Makes random weights of a preset's shapes, in the format of that name, and allocates what `sizes` says. With
/// `related_tokens`, neighbouring tokens share experts ([`moellon_model::synthetic::related_bands`]).
pub fn load_synthetic(
    config: &ModelConfig,
    format: &str,
    seed: u64,
    related_tokens: bool,
    mtp: Mtp,
    sizes: DecoderOptions,
    backend: &mut dyn Backend,
) -> Result<(Decoder, LoadTime)> {
    let plan =
        FormatPlan::parse(format).with_context(|| format!("--format is {format}, expected {}", FormatPlan::NAMES))?;
    let started = Instant::now();
    let mut bytes = 0;
    let bar = progress_bar(0);
    let synthetic = Synthetic::new(config, plan, seed);
    let synthetic = if related_tokens { synthetic.with_related_tokens() } else { synthetic };
    let for_drafts;
    let provider: &dyn WeightProvider = match mtp {
        Mtp::AsStored => &synthetic,
        Mtp::ForDrafts(vocabulary) => {
            for_drafts = DraftPrecision::new(config, vocabulary, &synthetic);
            &for_drafts
        }
    };
    let weights = Weights::load(config, provider, backend, &mut |progress| {
        bytes = progress.done_bytes;
        bar.set_message(format!("making {} ({})", progress.name, table::bytes(bytes as f64)));
        bar.tick();
    })?;
    bar.finish_and_clear();
    let decoder = Decoder::new(config.clone(), weights, sizes, backend)?;
    Ok((decoder, LoadTime { bytes, elapsed: started.elapsed() }))
}

/// A bar on a terminal: of bytes, or only a line where the total is not known (0).
pub fn progress_bar(total_bytes: u64) -> ProgressBar {
    if total_bytes == 0 {
        return ProgressBar::new_spinner();
    }
    // Small models load before a bar could be read.
    if total_bytes < 200 << 20 {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg} {bar:40} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left");
    let bar = ProgressBar::with_draw_target(Some(total_bytes), ProgressDrawTarget::stderr());
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moellon_ops::reference::ReferenceBackend;
    use std::path::PathBuf;

    #[test]
    fn a_shard_that_changes_while_it_is_loaded_is_not_served() {
        let golden = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/golden/glm_moe_dsa");
        let folder = tempfile::tempdir().unwrap();
        for name in ["config.json", "model.safetensors"] {
            std::fs::copy(golden.join(name), folder.path().join(name)).unwrap();
        }
        let source = ModelSource::open(Some(folder.path())).unwrap();
        let shard = std::fs::File::options().append(true).open(folder.path().join("model.safetensors")).unwrap();
        shard.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        let mut backend = ReferenceBackend::new();
        let loaded = load(&source, 32, CacheChoice::F32, Mtp::AsStored, &mut backend);
        let error = loaded.err().expect("the shard has changed").to_string();
        assert!(error.contains("model.safetensors: time of change since it was opened"), "{error}");
    }
}
