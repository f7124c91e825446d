//! `moellon quantize`.

use super::options::{MethodChoice, QuantizeOptions, Switch};
use super::reporter::{Reporter, span};
use crate::model_source::ModelSource;
use crate::table;
use anyhow::{Context, Result, ensure};
use moellon_surgery::encoder::{EncoderOptions, Method};
use moellon_surgery::stats::MomentsMode;
use moellon_surgery::{Plan, Source, Stats, formats, quantize};
use std::path::Path;
use std::time::Instant;

/// Runs the command.
pub fn run(options: &QuantizeOptions) -> Result<()> {
    let directory = options.model.model.as_deref();
    let model = ModelSource::open(directory)?;
    let files = model.companion_files(directory)?;
    let source = Source { name: &model.name, checkpoint: &model.checkpoint, config: &model.config, files: &files };
    let plan = match (&options.plan, &options.format) {
        (Some(plan), _) => read_plan(plan)?,
        (None, format) => Plan::uniform(formats::parse(format.as_deref().unwrap_or_default()).context("--format")?),
    };
    let stats = options.stats.as_deref().map(Stats::open).transpose().context("--stats")?;
    let has_moments = stats.as_ref().is_some_and(|stats| stats.info.moments != MomentsMode::None);
    let method = match options.method {
        Some(MethodChoice::Rtn) => Method::Rtn,
        Some(MethodChoice::Search) => Method::Search,
        Some(MethodChoice::Gptq) => {
            ensure!(has_moments, "--method gptq has no --stats with moments (moellon calibrate --moments layer)");
            Method::Gptq
        }
        None if has_moments => Method::Gptq,
        None => Method::Search,
    };
    ensure!(options.shard_gb > 0.0, "--shard-gb is {}, expected more than 0", options.shard_gb);
    let twice = quantize::requantized(source, &plan)?;
    if let Some(first) = twice.first() {
        eprintln!(
            "warning: {} modules are quantized already ({first} first): errors add up; start from the original weights \
             where there are any",
            twice.len()
        );
    }
    let encoder = EncoderOptions { method, nvfp4_global_scale: options.nvfp4_global_scale == Switch::On };
    let max_shard_bytes = (options.shard_gb * 1e9) as usize;
    let started = Instant::now();
    let mut reporter = Reporter::new("quantizing");
    let mut last = None;
    let settings = quantize::QuantizeOptions { plan: &plan, stats: stats.as_ref(), encoder, max_shard_bytes };
    quantize::quantize(source, settings, &options.out, &mut |progress| {
        last = progress.snr_db.filter(|db| db.is_finite());
        reporter.report(progress);
    })?;
    drop(reporter);
    let product = ModelSource::open(Some(&options.out))?;
    println!(
        "{}: {} ({}), {}{} in {}",
        options.out.display(),
        plan.name,
        method.name(),
        table::bytes(product.checkpoint.size_bytes() as f64),
        last.map_or(String::new(), |db| format!(", signal to noise {db:.1} dB")),
        span(started.elapsed()),
    );
    Ok(())
}

/// A plan file or a preset.
fn read_plan(name: &str) -> Result<Plan> {
    let path = Path::new(name);
    if path.exists() { Ok(Plan::read(path)?) } else { Plan::preset(name).context("--plan is no file and no preset") }
}
