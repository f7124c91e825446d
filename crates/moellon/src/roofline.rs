//! `moellon roofline`: what a token reads, what that allows, what is reached, and what would be if.

use crate::cli::{BenchOptions, RooflineOptions};
use crate::doctor::BandwidthMeter;
use crate::lever::{Record, short_name};
use crate::model_source::ModelSource;
use crate::{backend, bench, provenance, table};
use anyhow::{Context, Result, anyhow};
use moellon_lab::StealClock;
use moellon_lab::bench::{Bench, BenchPlan, BenchReport};
use moellon_lab::receipt::MeasuredModel;
use moellon_lab::roofline::{BatchPoint, CostModel, WhatIf};
use moellon_ops::Backend;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Everything that the roofline says, as receipts and `--json` have it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Roofline {
    /// Read bandwidth of the host by threads, GB/s.
    pub bandwidth_by_threads: Vec<(usize, f64)>,
    /// Of the device that computes, measured around the steps, GB/s.
    pub read_gb_s: f64,
    /// Parts and what follows from them, fitted at batch 1.
    pub cost: CostModel,
    /// Positions that were cached.
    pub context: usize,
    /// Tokens a second that bytes allow at batch 1.
    pub ceiling_tok_s: f64,
    /// Tokens a second that are reached.
    pub achieved_tok_s: f64,
    /// Predicted against measured.
    pub batches: Vec<BatchPoint>,
    /// Tokens a second by prediction.
    pub what_if: Vec<(String, f64)>,
    /// Steps, stages and prompts.
    pub bench: BenchReport,
}

/// Runs the command.
pub fn run(options: &RooflineOptions) -> Result<()> {
    // A wrong flag should not be found out after the measurement.
    let what_if = parse(&options.what_if)?;
    let steal = StealClock::start();
    let mut backend = backend::create(&options.bench.device, options.bench.activations)?;
    let (roofline, model) = measure(&options.bench, backend.as_mut(), &what_if)?;
    if options.bench.json {
        println!("{}", serde_json::to_string_pretty(&roofline)?);
    } else {
        print(&roofline, &model);
    }
    if let Some(folder) = &options.receipts {
        let name = options.name.clone().unwrap_or_else(|| format!("roofline-{}", short_name(&model.name)));
        let record = Record {
            kind: "roofline",
            name: &name,
            provenance: provenance::provenance(backend.as_mut())?,
            steal_pct: steal.steal_percent(),
            note: json!({ "context": roofline.context, "batch_error": worst_bound_error(&roofline.batches) }),
            verdicts: Vec::new(),
            tables: vec![
                ("roofline".to_owned(), rows(&roofline, &model)),
                ("what-if".to_owned(), what_if_rows(&roofline, &model)),
            ],
            samples: serde_json::to_value(&roofline)?,
            model: Some(model),
        };
        eprintln!("{}", record.write(folder)?.display());
    }
    Ok(())
}

fn parse(texts: &[String]) -> Result<Vec<(String, WhatIf)>> {
    let parse = |text: &String| Ok((text.clone(), text.parse().map_err(|e: String| anyhow!("--what-if {e}"))?));
    texts.iter().map(parse).collect()
}

/// Measures a model's steps and holds the cost model against them.
pub fn measure(
    options: &BenchOptions,
    backend: &mut dyn Backend,
    what_if: &[(String, WhatIf)],
) -> Result<(Roofline, MeasuredModel)> {
    let context = bench::one_context(options)?;
    let (mut decoder, name, _, load) = bench::open(options, backend)?;
    let sha256 = match options.synthetic {
        Some(_) => None,
        None => Some(ModelSource::open(options.model.model.as_deref())?.checkpoint.identity()),
    };
    let account = decoder.weights().account.clone();
    let format = provenance::formats(&account);
    let model = MeasuredModel { name, sha256, format, bytes_per_token: account.trunk().bytes_per_token };
    let mut batches = options.batch.clone();
    if !batches.contains(&1) {
        batches.insert(0, 1);
    }
    let plan = BenchPlan {
        batches,
        contexts: vec![context],
        prompts: options.prompt.clone(),
        steps: options.steps,
        windows: options.windows,
        identical: options.identical,
        seed: options.seed,
    };
    let cores = moellon_lab::Machine::this().cores;
    let mut threads: Vec<usize> = std::iter::successors(Some(1), |n| Some(n * 2)).take_while(|n| *n < cores).collect();
    threads.push(cores);
    let mut bandwidth_by_threads = Vec::new();
    let meter = BandwidthMeter::new(options.device.threads)?;
    for count in threads {
        bandwidth_by_threads.push((count, meter.with_threads(count).measure().gb_per_s));
    }
    let measure_read = || meter.measure();
    let mut progress = |line: &str| eprintln!("{line}");
    let mut bench = Bench {
        decoder: &mut decoder,
        backend,
        weight_bytes: load.bytes,
        measure_read: &measure_read,
        progress: &mut progress,
    };
    let report = bench.run(&plan, &model.name, &model.format)?;
    let one = report.results.iter().find(|r| r.batch == 1).context("batch 1 was measured")?;
    // The bandwidth of the same windows as batch 1: on a shared machine it changes within a minute.
    let cost = CostModel::new(&account, decoder.config(), context, one.measured_read_gb_s * 1e9);
    let cost = CostModel { unions: one.unions.clone(), ..cost }.calibrated(one.step_ms / 1e3);
    let measured: Vec<(usize, f64, f64)> =
        report.results.iter().map(|r| (r.batch, r.step_ms / 1e3, r.distinct_experts)).collect();
    // Each batch size is compared under the bandwidth of its own windows.
    let batches = report
        .results
        .iter()
        .zip(&measured)
        .flat_map(|(r, m)| {
            CostModel { bandwidth: r.measured_read_gb_s * 1e9, ..cost.clone() }.check(std::slice::from_ref(m))
        })
        .collect();
    let mut predicted = Vec::new();
    for (text, what_if) in what_if {
        predicted.push((text.clone(), cost.tok_per_s(what_if).map_err(|e| anyhow!("--what-if {text}: {e}"))?));
    }
    let roofline = Roofline {
        bandwidth_by_threads,
        read_gb_s: one.measured_read_gb_s,
        ceiling_tok_s: 1.0 / cost.ceiling_seconds(1.0),
        achieved_tok_s: one.decode_tok_s,
        cost,
        context,
        batches,
        what_if: predicted,
        bench: report,
    };
    Ok((roofline, model))
}

/// The largest error of a prediction where bandwidth decides; `None` where it never does.
pub fn worst_bound_error(batches: &[BatchPoint]) -> Option<f64> {
    batches.iter().filter(|b| b.bandwidth_bound).map(|b| b.error.abs()).max_by(f64::total_cmp)
}

fn print(roofline: &Roofline, model: &MeasuredModel) {
    println!("{}\n{}, {}\n", roofline.bench.backend, model.name, model.format);
    let threads: Vec<String> =
        roofline.bandwidth_by_threads.iter().map(|(n, gb_s)| format!("{gb_s:.1} GB/s on {n}")).collect();
    println!("read bandwidth  {} threads; {:.1} GB/s around the steps\n", threads.join(", "), roofline.read_gb_s);
    let total = roofline.cost.bytes(1.0);
    let mut rows: Vec<Vec<String>> = roofline
        .cost
        .parts
        .iter()
        .map(|p| {
            vec![
                p.component.replace('_', " "),
                table::bytes(p.bytes_per_token),
                format!("{:.1} %", 100.0 * p.bytes_per_token / total),
                format!("{:.2}", p.bits_per_weight),
                p.formats.join(", "),
            ]
        })
        .collect();
    let cache = roofline.cost.cache_bytes;
    rows.push(vec![
        format!("cache at {}", roofline.context),
        table::bytes(cache),
        format!("{:.1} %", 100.0 * cache / total),
        String::new(),
        "bf16".to_owned(),
    ]);
    rows.push(vec!["total".to_owned(), table::bytes(total), "100.0 %".to_owned(), String::new(), String::new()]);
    table::print(&["component", "a token reads", "share", "bits a weight", "format"], &rows);
    println!(
        "\nceiling {:.1} tok/s, reached {:.1}: {:.0} %\n",
        roofline.ceiling_tok_s,
        roofline.achieved_tok_s,
        100.0 * roofline.cost.efficiency
    );
    let rows: Vec<Vec<String>> = roofline
        .batches
        .iter()
        .map(|b| {
            vec![
                b.batch.to_string(),
                format!("{:.2}", b.measured_ms),
                format!("{:.2}", b.predicted_ms),
                format!("{:+.0} %", 100.0 * b.error),
                format!("{:.0} %", 100.0 * b.bandwidth_share),
                format!("{:.1} ({:.1})", b.distinct_experts, b.predicted_experts),
                if b.bandwidth_bound { "bandwidth" } else { "something else: computing, or many small operations" }
                    .to_owned(),
            ]
        })
        .collect();
    table::print(&["batch", "ms a step", "predicted", "error", "share", "experts (predicted)", "bound by"], &rows);
    match worst_bound_error(&roofline.batches) {
        Some(error) => println!("predictions are within {:.0} % where bandwidth decides", (100.0 * error).ceil()),
        None => println!("bandwidth decides nowhere here: predictions by bytes do not hold on this machine"),
    }
    for result in roofline.bench.results.iter().filter(|r| r.batch == 1) {
        println!("\nstages of a step, batch 1 (profiled apart: each operation is waited for)");
        let rows: Vec<Vec<String>> = result
            .stages
            .iter()
            .map(|s| {
                vec![
                    s.stage.clone(),
                    format!("{:.1}", s.microseconds),
                    table::bytes(s.bytes as f64),
                    format!("{:.1}", s.gb_s),
                    format!("{:.0} %", 100.0 * s.gb_s / roofline.read_gb_s),
                    s.operations.to_string(),
                ]
            })
            .collect();
        table::print(&["stage", "us", "bytes", "GB/s", "share", "operations"], &rows);
    }
    if !roofline.what_if.is_empty() {
        println!("\nwhat if (by the same model)");
        let rows: Vec<Vec<String>> = roofline
            .what_if
            .iter()
            .map(|(text, tok_s)| {
                vec![text.clone(), format!("{tok_s:.1}"), format!("{:.2}x", tok_s / roofline.achieved_tok_s)]
            })
            .collect();
        table::print(&["what if", "tok/s", "of now"], &rows);
    }
}

fn rows(roofline: &Roofline, model: &MeasuredModel) -> Vec<Value> {
    let row = |b: &BatchPoint| {
        json!({
            "model": model.name,
            "batch": b.batch,
            "tok/s": format!("{:.1}", 1e3 * b.batch as f64 / b.measured_ms),
            "ms a step": format!("{:.2}", b.measured_ms),
            "predicted": format!("{:.2}", b.predicted_ms),
            "error": format!("{:+.0} %", 100.0 * b.error),
            "share of bandwidth": format!("{:.0} %", 100.0 * b.bandwidth_share),
            "distinct experts (predicted)": format!("{:.1} ({:.1})", b.distinct_experts, b.predicted_experts),
            "bound by": if b.bandwidth_bound { "bandwidth" } else { "something else" },
        })
    };
    roofline.batches.iter().map(row).collect()
}

fn what_if_rows(roofline: &Roofline, model: &MeasuredModel) -> Vec<Value> {
    let row = |(text, tok_s): &(String, f64)| {
        json!({
            "model": model.name,
            "what if": text,
            "tok/s": format!("{tok_s:.1}"),
            "of what is reached at batch 1": format!("{:.2}x", tok_s / roofline.achieved_tok_s),
        })
    };
    roofline.what_if.iter().map(row).collect()
}
