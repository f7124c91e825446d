//! `moellon bench --kernels`: the hot operations of a layer one by one.

use crate::cli::{ActivationsChoice, BackendChoice, BenchOptions, DeviceOptions};
use crate::{backend, bench, doctor, table};
use anyhow::{Context, Result};
use moellon_lab::ladder::{Ladder, LadderPlan, LadderReport, Rung};
use moellon_lab::plain::{PlainBackend, Without};
use moellon_model::synthetic::{FormatPlan, preset};
use moellon_ops::Backend;

/// Measures on `best` and prints.
pub fn run(options: &BenchOptions, synthetic: &str, best: &mut dyn Backend) -> Result<()> {
    let config = preset(synthetic)?;
    let format = FormatPlan::parse(&options.format)
        .with_context(|| format!("--format is {}, expected {}", options.format, FormatPlan::NAMES))?;
    let on_cpu = DeviceOptions { backend: BackendChoice::Cpu, ..options.device.clone() };
    let mut reference = backend::create(&on_cpu, ActivationsChoice::Exact)?;
    // On the CPU nothing is recorded; what makes its experts fast is taken away instead.
    let mut plain = match best.caps().name {
        "cpu" => {
            let inner = backend::create(&on_cpu, options.activations)?;
            Some(PlainBackend::new(inner, Without { fused_experts: true }))
        }
        _ => None,
    };
    let meter = doctor::BandwidthMeter::new(options.device.threads)?;
    let mut ladder = Ladder {
        config: &config,
        format,
        best,
        plain: plain.as_mut().map(|plain| plain as &mut dyn Backend),
        reference: reference.as_mut(),
        measure_read: &|| meter.measure(),
        progress: &mut |line| eprintln!("{line}"),
    };
    let plan = LadderPlan {
        rows: options.batch.clone(),
        prompts: options.prompt.iter().copied().filter(|rows| *rows > 1).collect(),
        context: bench::one_context(options)?,
        passes: options.windows,
        seed: options.seed,
    };
    let report = ladder.run(&plan, &format!("synthetic {synthetic}"), &options.format)?;
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print(&report);
    }
    Ok(())
}

fn print(report: &LadderReport) {
    println!(
        "{}\ncompared with {}\n{}, {}\nread bandwidth {:.1} GB/s\n",
        report.backend, report.reference, report.model, report.format, report.measured_read_gb_s
    );
    let cells = |rung: &Rung| {
        vec![
            rung.operation.clone(),
            rung.rows.to_string(),
            rung.implementation.clone(),
            format!("{:.1} ({:.1}-{:.1})", rung.microseconds, rung.quartiles[0], rung.quartiles[1]),
            table::bytes(rung.bytes as f64),
            format!("{:.1}", rung.gb_s),
            format!("{:.0} %", rung.bandwidth_share * 100.0),
            format!("{:.2}", rung.tflop_s),
            rung.distinct_experts.map_or_else(|| "-".to_owned(), |experts| format!("{experts:.1}")),
            if rung.check.is_empty() { "-".to_owned() } else { rung.check.clone() },
        ]
    };
    let rows: Vec<Vec<String>> = report.rungs.iter().map(cells).collect();
    table::print(
        &["operation", "rows", "rung", "us (quartiles)", "bytes", "GB/s", "share", "TFLOP/s", "experts", "check"],
        &rows,
    );
    for rung in report.rungs.iter().filter(|rung| !rung.kernels.is_empty()) {
        println!("\nkernels of {}, {} rows", rung.operation, rung.rows);
        let rows: Vec<Vec<String>> = rung
            .kernels
            .iter()
            .map(|k| vec![k.name.clone(), format!("{:.1}", k.launches), format!("{:.1}", k.microseconds)])
            .collect();
        table::print(&["kernel", "launches", "us"], &rows);
    }
}
