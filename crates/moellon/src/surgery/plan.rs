//! `moellon plan`.

use super::options::PlanOptions;
use super::reporter::{Reporter, span};
use super::{backends, texts};
use crate::model_source::ModelSource;
use anyhow::{Context, Result};
use moellon_surgery::allocate::{self, Budget};
use moellon_surgery::inventory::Inventory;
use moellon_surgery::sensitivity::{self, Sensitivity};
use moellon_surgery::{Source, Stats, formats};
use moellon_tensor::WeightFormat;
use std::time::Instant;

/// Runs the command.
pub fn run(options: &PlanOptions) -> Result<()> {
    let directory = options.model.model.as_deref();
    let model = ModelSource::open(directory)?;
    let source = Source { name: &model.name, checkpoint: &model.checkpoint, config: &model.config, files: &[] };
    let budget = match (options.bpw, options.size_gb, options.token_gb) {
        (Some(bits), ..) => Budget::BitsPerWeight(bits),
        (_, Some(gb), _) => Budget::Bytes(gb * 1e9),
        (.., gb) => Budget::BytesPerToken(gb.unwrap_or_default() * 1e9),
    };
    let parse = |name: &String| formats::parse(name).map_err(anyhow::Error::from);
    if let Some(names) = &options.depth_u {
        let [wide, narrow] = [&names[0], &names[1]].map(parse);
        let inventory = Inventory::take(&model.config, &model.checkpoint)?;
        let plan = allocate::depth_u(
            &model.config,
            &inventory,
            wide.context("--depth-u")?,
            narrow.context("--depth-u")?,
            budget,
        )?;
        plan.write(&options.out)?;
        println!("{}: {}", options.out.display(), plan.name);
        return Ok(());
    }
    let candidates = options.formats.iter().map(parse).collect::<Result<Vec<_>>>().context("--formats")?;
    let sensitivities = read_or_measure(options, &model, source, &candidates)?;
    let (plan, expected) = sensitivity::plan(source, &sensitivities, &candidates, budget)?;
    plan.write(&options.out)?;
    println!("{}: {}, expected divergence {expected:.4} nats", options.out.display(), plan.name);
    Ok(())
}

fn read_or_measure(
    options: &PlanOptions,
    model: &ModelSource,
    source: Source<'_>,
    candidates: &[WeightFormat],
) -> Result<Vec<Sensitivity>> {
    if let Some(path) = options.sensitivities.as_deref().filter(|path| path.exists()) {
        let text = std::fs::read(path).with_context(|| format!("--sensitivities {}", path.display()))?;
        return serde_json::from_slice(&text).with_context(|| format!("--sensitivities {}", path.display()));
    }
    let stats = options.stats.as_deref().map(Stats::open).transpose().context("--stats")?;
    let tokenizer = model.tokenizer(options.model.model.as_deref())?;
    let texts = texts::read(&options.texts, &tokenizer, model.config.max_position_embeddings)?;
    let started = Instant::now();
    let mut reporter = Reporter::new("measuring");
    let mut make = backends(&options.device)?;
    let found =
        sensitivity::measure(source, stats.as_ref(), &texts.sequences, candidates, &mut make, &mut |progress| {
            reporter.report(progress);
        })?;
    drop(reporter);
    println!(
        "{} modules measured on {} tokens in {}",
        found.len(),
        texts.sequences.num_tokens(),
        span(started.elapsed())
    );
    if let Some(path) = &options.sensitivities {
        let mut text = serde_json::to_vec_pretty(&found)?;
        text.push(b'\n');
        std::fs::write(path, text).with_context(|| format!("--sensitivities {}", path.display()))?;
    }
    Ok(found)
}
