//! `moellon compare`.

use super::options::CompareOptions;
use super::reporter::Reporter;
use super::{backends, texts};
use crate::model_source::ModelSource;
use crate::table;
use anyhow::{Context, Result};
use moellon_surgery::compare::Comparison;
use moellon_surgery::{Source, compare, picture};

/// Runs the command.
pub fn run(options: &CompareOptions) -> Result<()> {
    let directory = options.model.model.as_deref();
    let model = ModelSource::open(directory)?;
    let reference = ModelSource::open(options.reference.as_deref()).context("--ref")?;
    let tokenizer = model.tokenizer(directory)?;
    let positions = model.config.max_position_embeddings.min(reference.config.max_position_embeddings);
    let texts = texts::read(&options.texts, &tokenizer, positions)?;
    let mut reporter = Reporter::new("comparing");
    let mut make = backends(&options.device)?;
    let comparison =
        compare::compare(source(&model), source(&reference), &texts.sequences, &mut make, &mut |p| reporter.report(p))?;
    drop(reporter);
    if let Some(path) = &options.picture {
        let title = format!("{} against {}", model.api_name(), reference.api_name());
        let svg = picture::comparison(&title, &comparison);
        std::fs::write(path, svg).with_context(|| format!("--picture {}", path.display()))?;
    }
    if options.json {
        println!("{}", serde_json::to_string_pretty(&comparison)?);
    } else {
        print(&comparison);
    }
    Ok(())
}

fn source(model: &ModelSource) -> Source<'_> {
    Source { name: &model.name, checkpoint: &model.checkpoint, config: &model.config, files: &[] }
}

fn print(comparison: &Comparison) {
    let c = comparison;
    println!("tokens              {}", c.tokens);
    println!(
        "KL divergence       mean {:.5} +- {:.5}, median {:.5}, 99.9 % {:.4}, worst {:.4} nats",
        c.kl_mean, c.kl_standard_error, c.kl_median, c.kl_p999, c.kl_max
    );
    println!(
        "beyond the top {}  {:.3} % of the reference's probability (included above)",
        compare::TOP,
        100.0 * c.tail_mass
    );
    println!("same next token     {:.2} %", 100.0 * c.top1_agreement);
    println!("perplexity          {:.4}, reference {:.4}", c.ppl, c.ref_ppl);
    if let (Some(own), Some(reference)) = (c.mtp_agreement, c.ref_mtp_agreement) {
        println!("MTP drafts right    {:.2} %, reference {:.2} %", 100.0 * own, 100.0 * reference);
    }
    println!("bits per weight     {:.3}, reference {:.3}", c.bits_per_weight, c.ref_bits_per_weight);
    println!("size                {}, reference {}", table::bytes(c.bytes as f64), table::bytes(c.ref_bytes as f64));
    let layers: Vec<String> = c.layer_snr_db.iter().map(|db| format!("{db:.1}")).collect();
    println!("SNR after layers    {} dB", layers.join(" "));
}
