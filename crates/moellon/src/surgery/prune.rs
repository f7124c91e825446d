//! `moellon prune`.

use super::options::{MtpChoice, PruneOptions, ScoreChoice};
use super::reporter::{Reporter, span};
use crate::model_source::ModelSource;
use crate::table;
use anyhow::{Context, Result, ensure};
use moellon_surgery::prune::{self, MtpExperts, Score};
use moellon_surgery::{Source, Stats};
use std::time::Instant;

/// Runs the command.
pub fn run(options: &PruneOptions) -> Result<()> {
    let directory = options.model.model.as_deref();
    let model = ModelSource::open(directory)?;
    let files = model.companion_files(directory)?;
    let source = Source { name: &model.name, checkpoint: &model.checkpoint, config: &model.config, files: &files };
    let stats = Stats::open(&options.stats).context("--stats")?;
    let keep = match (options.keep, options.ratio) {
        (Some(keep), _) => keep,
        (None, ratio) => {
            let ratio = ratio.unwrap_or_default();
            ensure!((0.0..1.0).contains(&ratio), "--ratio is {ratio}, expected 0 or more and less than 1");
            (prune::experts_per_layer(source)? as f64 * (1.0 - ratio)).round() as usize
        }
    };
    let score = match options.score {
        ScoreChoice::Reap => Score::Reap,
        ScoreChoice::WeightedSum => Score::WeightedSum,
        ScoreChoice::ReapRms => Score::ReapRms,
        ScoreChoice::Frequency => Score::Frequency,
        ScoreChoice::MeanNorm => Score::MeanNorm,
        ScoreChoice::Random => Score::Random(options.seed),
    };
    let mtp = match options.mtp {
        MtpChoice::Whole => MtpExperts::Whole,
        MtpChoice::Pruned => MtpExperts::Pruned,
    };
    ensure!(options.shard_gb > 0.0, "--shard-gb is {}, expected more than 0", options.shard_gb);
    let max_shard_bytes = (options.shard_gb * 1e9) as usize;
    let started = Instant::now();
    let mut reporter = Reporter::new("pruning");
    let settings = prune::PruneOptions { keep, score, mtp, max_shard_bytes };
    prune::prune(source, &stats, settings, &options.out, &mut |progress| reporter.report(progress))?;
    drop(reporter);
    let product = ModelSource::open(Some(&options.out))?;
    println!(
        "{}: {keep} experts a layer by {}, {} in {}",
        options.out.display(),
        score.name(),
        table::bytes(product.checkpoint.size_bytes() as f64),
        span(started.elapsed()),
    );
    Ok(())
}
