//! `moellon bench`: decode and prefill speed against the machine's bandwidth.

use crate::cli::{BenchOptions, CacheChoice, ReplaySpec};
use crate::load::LoadTime;
use crate::model_source::ModelSource;
use crate::{backend, doctor, ladder, load, table};
use anyhow::Result;
use moellon_engine::{Engine, EngineOptions, Policy, Replay, SpeculationOptions};
use moellon_lab::Machine;
use moellon_lab::bench::{Bench, BenchPlan, BenchReport};
use moellon_lab::speculation::{self, ReplayPlan, ReplayReport};
use moellon_model::synthetic::{preset, related_bands};
use moellon_model::{Decoder, DecoderOptions};
use moellon_ops::{Backend, CacheDtype};

/// Runs the command, on a thread of its own: the CPU back end keeps the thread that runs steps on the core that its workers leave
/// free, as an engine's, but not the main thread.
pub fn run(options: &BenchOptions) -> Result<()> {
    std::thread::scope(|scope| match scope.spawn(|| measure(options)).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

fn measure(options: &BenchOptions) -> Result<()> {
    anyhow::ensure!(!options.batch.contains(&0), "--batch has 0, expected positive numbers");
    anyhow::ensure!(options.chunk > 0, "--chunk is 0, expected a positive number");
    let mut backend = backend::create(&options.device, options.activations)?;
    if let (true, Some(synthetic)) = (options.kernels, &options.synthetic) {
        return ladder::run(options, synthetic, backend.as_mut());
    }
    if let (Some(spec), Some(synthetic)) = (&options.speculate, &options.synthetic) {
        return replay(options, spec, synthetic, backend);
    }
    let (mut decoder, model, format, load_time) = open(options, backend.as_mut())?;
    eprintln!(
        "loaded {} of {model} in {:.2} s onto {}",
        table::bytes(load_time.bytes as f64),
        load_time.elapsed.as_secs_f64(),
        backend.caps().device
    );
    let plan = BenchPlan {
        batches: options.batch.clone(),
        contexts: options.context.clone(),
        prompts: options.prompt.clone(),
        steps: options.steps,
        windows: options.windows,
        identical: options.identical,
        seed: options.seed,
    };
    let meter = doctor::BandwidthMeter::new(options.device.threads)?;
    let measure_read = || meter.measure();
    let mut progress = |line: &str| eprintln!("{line}");
    let mut bench = Bench {
        decoder: &mut decoder,
        backend: backend.as_mut(),
        weight_bytes: load_time.bytes,
        measure_read: &measure_read,
        progress: &mut progress,
    };
    let report = bench.run(&plan, &model, &format)?;
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print(&report, options.stages);
    }
    Ok(())
}

/// Speculation with outcomes by a coin.
fn replay(options: &BenchOptions, spec: &ReplaySpec, synthetic: &str, mut backend: Box<dyn Backend>) -> Result<()> {
    let largest_batch = options.batch.iter().copied().max().unwrap_or(1);
    let depth = spec.depth.unwrap_or(8);
    // Windows of both kinds and the warm-up, with every draft right.
    let context = one_context(options)?;
    let tokens = context + (options.steps + 1) * (5 * options.windows) * (depth + 2) + 64 * (depth + 1);
    let block_size = options.block_size as usize;
    let max_context = tokens.next_multiple_of(block_size);
    let sizes = DecoderOptions {
        max_batch_tokens: (largest_batch * (1 + depth)).max(64),
        max_sequences: largest_batch,
        max_logit_rows: (largest_batch * (1 + depth)).max(16),
        max_context,
        block_size,
        num_blocks: largest_batch * max_context / block_size + largest_batch,
        cache_dtype: match options.cache {
            CacheChoice::F32 => CacheDtype::F32,
            CacheChoice::Bf16 => CacheDtype::Bf16,
        },
    };
    let config = preset(synthetic)?;
    let mtp = load::Mtp::ForDrafts(options.draft_vocab.0);
    let (mut decoder, time) =
        load::load_synthetic(&config, &options.format, options.seed, true, mtp, sizes, backend.as_mut())?;
    let loaded = table::bytes(time.bytes as f64);
    let seconds = time.elapsed.as_secs_f64();
    eprintln!("loaded {loaded} of synthetic {synthetic} in {seconds:.2} s onto {}", backend.caps().device);
    // Chance: experts that two independent choices share.
    let chance = config.moe.num_experts_per_tok as f64 / config.moe.num_experts as f64;
    let wanted = if spec.overlaps.is_empty() { vec![chance] } else { spec.overlaps.clone() };
    let bands = related_bands(&config);
    let bands = speculation::bands_of_overlaps(&mut decoder, backend.as_mut(), &bands, context, &wanted)?;
    // Steps of nine rows are several of one: more rounds than this say nothing new.
    let rounds = (options.windows * options.steps).min(24);
    let mut texts = Vec::new();
    for ((tokens, overlap), wanted) in bands.into_iter().zip(wanted) {
        eprintln!(
            "neighbouring tokens share {:.1} % of their experts (wanted {:.1} %)",
            overlap * 100.0,
            wanted * 100.0
        );
        let verify = speculation::verify_cost(&mut decoder, backend.as_mut(), &tokens, context, rounds)?;
        texts.push((tokens, overlap, verify));
    }
    let device = format!("{}: {}", backend.caps().name, backend.caps().device);
    let speculation_options = SpeculationOptions {
        policy: if spec.depth.is_some() { Policy::Always } else { Policy::Governed },
        max_depth: depth,
        replay: Some(Replay { acceptance: 0.0, tokens: 0..1, seed: options.seed }),
        ..SpeculationOptions::default()
    };
    let engine_options = EngineOptions { speculation: Some(speculation_options), ..EngineOptions::default() };
    let mut engine = Engine::new(decoder, backend, engine_options)?;
    for (tokens, overlap, verify) in texts {
        for acceptance in &spec.acceptances {
            eprintln!("drafts right {:.0} %, overlap {:.1} %", acceptance * 100.0, overlap * 100.0);
            engine.set_replay(Replay { acceptance: *acceptance, tokens: tokens.clone(), seed: options.seed });
            let plan = ReplayPlan {
                acceptance: *acceptance,
                batches: options.batch.clone(),
                context,
                tokens: tokens.clone(),
                steps: options.steps,
                windows: options.windows,
            };
            let report = ReplayReport {
                machine: Machine::this(),
                backend: device.clone(),
                model: format!("synthetic {synthetic}"),
                format: options.format.clone(),
                acceptance: *acceptance,
                overlap,
                draft_cost: engine.cost_curve().map_or_else(Vec::new, |curve| curve.drafts().to_vec()),
                results: speculation::replay(&mut engine, &plan, &verify, &mut |line| eprintln!("{line}"))?,
                verify: verify.clone(),
            };
            // A line each: what was measured stays if a later one fails.
            if options.json {
                println!("{}", serde_json::to_string(&report)?);
            } else {
                print_replay(&report);
            }
        }
    }
    Ok(())
}

fn print_replay(report: &ReplayReport) {
    println!("{}\n{}, {}\n", report.backend, report.model, report.format);
    let rows: Vec<Vec<String>> = report
        .verify
        .iter()
        .map(|v| {
            vec![
                v.rows.to_string(),
                format!("{:.2} ({:.2}-{:.2})", v.ms, v.ms_quartiles[0], v.ms_quartiles[1]),
                format!("{:.2}", v.cost),
                format!("{:.2}", v.bytes_cost),
                format!("{:.1}", v.distinct_experts),
            ]
        })
        .collect();
    table::print(&["rows", "ms (quartiles)", "cost", "cost by bytes", "experts"], &rows);
    println!("\ndrafts right {:.0} %, overlap {:.1} %", report.acceptance * 100.0, report.overlap * 100.0);
    let rows: Vec<Vec<String>> = report
        .results
        .iter()
        .map(|r| {
            vec![
                r.batch.to_string(),
                format!("{:.2} ({:.2}-{:.2})", r.plain_ms, r.plain_ms_quartiles[0], r.plain_ms_quartiles[1]),
                format!("{:.2} ({:.2}-{:.2})", r.drafted_ms, r.drafted_ms_quartiles[0], r.drafted_ms_quartiles[1]),
                format!("{:.2}", r.factor),
                format!("{:.2}", r.predicted_factor),
                r.bytes_factor.map_or_else(|| "-".to_owned(), |factor| format!("{factor:.2}")),
                format!("{:.2}", r.depth),
                format!("{:.2}", r.tokens_per_step),
                format!("{:.2}", r.draft_ms),
                format!("{:.1} %, {} discarded", r.steal_pct, r.discarded_windows),
            ]
        })
        .collect();
    table::print(
        &[
            "batch",
            "plain ms a token",
            "drafted ms a token",
            "factor",
            "predicted",
            "by bytes",
            "drafts a step",
            "tokens a step",
            "drafting ms",
            "steal",
        ],
        &rows,
    );
}

/// The context, for what is measured at one.
///
/// # Errors
/// If `--context` has several.
pub fn one_context(options: &BenchOptions) -> Result<usize> {
    match options.context[..] {
        [context] => Ok(context),
        _ => anyhow::bail!("--context has {} numbers, expected one here", options.context.len()),
    }
}

/// A decoder with room for the largest batch at the longest context, or the longest prompt.
pub fn open(options: &BenchOptions, backend: &mut dyn Backend) -> Result<(Decoder, String, String, LoadTime)> {
    let largest_batch = options.batch.iter().copied().max().unwrap_or(1);
    let longest_prompt = options.prompt.iter().copied().max().unwrap_or(1);
    let context = options.context.iter().copied().max().unwrap_or(0);
    let block_size = options.block_size as usize;
    let max_context = (context + 1).max(longest_prompt);
    let blocks = (largest_batch * (context + 1).div_ceil(block_size)).max(longest_prompt.div_ceil(block_size));
    let sizes = DecoderOptions {
        max_batch_tokens: largest_batch.max(longest_prompt.min(options.chunk)),
        max_sequences: largest_batch,
        max_logit_rows: largest_batch,
        max_context,
        block_size,
        num_blocks: blocks,
        cache_dtype: match options.cache {
            CacheChoice::F32 => CacheDtype::F32,
            CacheChoice::Bf16 => CacheDtype::Bf16,
        },
    };
    let Some(spec) = &options.synthetic else {
        let source = ModelSource::open(options.model.model.as_deref())?;
        let (decoder, time) = load::load_sized(&source, sizes, load::Mtp::AsStored, backend)?;
        return Ok((decoder, source.name, "as stored".to_owned(), time));
    };
    let mtp = load::Mtp::AsStored;
    let (decoder, time) =
        load::load_synthetic(&preset(spec)?, &options.format, options.seed, false, mtp, sizes, backend)?;
    Ok((decoder, format!("synthetic {spec}"), options.format.clone(), time))
}

fn print(report: &BenchReport, stages: bool) {
    println!(
        "{}\n{}, {}\nread bandwidth {:.1} GB/s\n",
        report.backend, report.model, report.format, report.measured_read_gb_s
    );
    let rows: Vec<Vec<String>> = report
        .results
        .iter()
        .map(|r| {
            vec![
                r.batch.to_string(),
                r.context.to_string(),
                format!("{:.1}", r.decode_tok_s),
                format!("{:.2} ({:.2}-{:.2})", r.step_ms, r.step_ms_quartiles[0], r.step_ms_quartiles[1]),
                table::bytes(r.bytes_per_step as f64),
                format!("{:.1}", r.bandwidth_gb_s),
                format!("{:.0} %", r.bandwidth_share * 100.0),
                format!("{:.1} ({:.1})", r.distinct_experts, r.expected_experts),
                format!("{:.1} %, {} discarded", r.steal_pct, r.discarded_windows),
            ]
        })
        .collect();
    table::print(
        &[
            "batch",
            "context",
            "tok/s",
            "ms a step (quartiles)",
            "bytes a step",
            "GB/s",
            "share",
            "experts (uniform)",
            "steal",
        ],
        &rows,
    );
    for prefill in &report.prefill {
        println!(
            "prefill {} tokens: {:.1} tok/s, steal {:.1} %, {} discarded",
            prefill.tokens, prefill.tok_s, prefill.steal_pct, prefill.discarded_windows
        );
    }
    if let Some(memory) = report.memory {
        println!(
            "\nresident {} (peak {}, {} in huge pages): weights {}, caches {}",
            table::bytes(memory.resident_bytes as f64),
            table::bytes(memory.peak_bytes as f64),
            table::bytes(memory.huge_page_bytes as f64),
            table::bytes(report.weight_bytes as f64),
            table::bytes(report.cache_bytes as f64)
        );
    }
    if stages {
        let waited = "profiled apart: each operation is waited for".to_owned();
        let of_steps = report.results.iter().map(|r| {
            let clock = r.device_ms.map(|ms| format!("by the device's clock; the whole step {ms:.3} ms"));
            (format!("a step, batch {}", r.batch), clock.unwrap_or_else(|| waited.clone()), &r.stages)
        });
        let of_prompts =
            report.prefill.iter().map(|p| (format!("a prompt of {}", p.tokens), waited.clone(), &p.stages));
        for (what, how, stages) in of_steps.chain(of_prompts) {
            println!("\nstages of {what} ({how})");
            let rows: Vec<Vec<String>> = stages
                .iter()
                .map(|s| {
                    vec![
                        s.stage.clone(),
                        s.operations.to_string(),
                        format!("{:.1}", s.microseconds),
                        table::bytes(s.bytes as f64),
                        format!("{:.1}", s.gb_s),
                    ]
                })
                .collect();
            table::print(&["stage", "operations", "us", "bytes", "GB/s"], &rows);
        }
    }
}
