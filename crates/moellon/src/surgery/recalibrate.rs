//! `moellon recalibrate`.

use super::options::RecalibrateOptions;
use super::reporter::{Reporter, span};
use super::{backends, texts};
use crate::model_source::ModelSource;
use anyhow::{Context, Result, ensure};
use moellon_surgery::{Source, recalibrate};
use std::time::Instant;

/// Runs the command.
pub fn run(options: &RecalibrateOptions) -> Result<()> {
    let directory = options.model.model.as_deref();
    let model = ModelSource::open(directory)?;
    let reference = ModelSource::open(options.reference.as_deref()).context("--ref")?;
    let files = model.companion_files(directory)?;
    let tokenizer = reference.tokenizer(options.reference.as_deref())?;
    let texts = texts::read(&options.texts, &tokenizer, reference.config.max_position_embeddings)?;
    ensure!(options.shard_gb > 0.0, "--shard-gb is {}, expected more than 0", options.shard_gb);
    let max_shard_bytes = (options.shard_gb * 1e9) as usize;
    let settings = recalibrate::RecalibrateOptions { texts: texts.names, max_shard_bytes };
    let started = Instant::now();
    let mut reporter = Reporter::new("recalibrating");
    let mut make = backends(&options.device)?;
    recalibrate::recalibrate(
        Source { name: &model.name, checkpoint: &model.checkpoint, config: &model.config, files: &files },
        Source { name: &reference.name, checkpoint: &reference.checkpoint, config: &reference.config, files: &[] },
        &texts.sequences,
        &settings,
        &options.out,
        &mut make,
        &mut |progress| reporter.report(progress),
    )?;
    drop(reporter);
    println!(
        "{}: routers fitted on {} tokens in {}",
        options.out.display(),
        texts.sequences.num_tokens(),
        span(started.elapsed())
    );
    Ok(())
}
