//! `moellon calibrate`.

use super::options::{CalibrateOptions, MomentsChoice};
use super::reporter::{Reporter, span};
use super::{backends, texts};
use crate::model_source::ModelSource;
use anyhow::Result;
use moellon_surgery::stats::MomentsMode;
use moellon_surgery::{Source, calibrate};
use std::time::Instant;

/// Runs the command.
pub fn run(options: &CalibrateOptions) -> Result<()> {
    let directory = options.model.model.as_deref();
    let model = ModelSource::open(directory)?;
    let tokenizer = model.tokenizer(directory)?;
    let texts = texts::read(&options.texts, &tokenizer, model.config.max_position_embeddings)?;
    let source = Source { name: &model.name, checkpoint: &model.checkpoint, config: &model.config, files: &[] };
    let moments = match options.moments {
        MomentsChoice::None => MomentsMode::None,
        MomentsChoice::Layer => MomentsMode::Layer,
        MomentsChoice::Expert => MomentsMode::Expert,
    };
    let settings = calibrate::CalibrateOptions { texts: texts.names, sequence_len: options.texts.sequence, moments };
    let started = Instant::now();
    let mut reporter = Reporter::new("calibrating");
    let mut make = backends(&options.device)?;
    calibrate::calibrate(source, &texts.sequences, &settings, &options.out, &mut make, &mut |p| reporter.report(p))?;
    drop(reporter);
    println!("{}: {} tokens in {}", options.out.display(), texts.sequences.num_tokens(), span(started.elapsed()));
    Ok(())
}
