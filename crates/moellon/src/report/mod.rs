//! `moellon report`: everything that is known of this machine and a model, as one HTML file or as JSON. What receipts say is
//! taken from them; a roofline that they lack is measured now.

mod chart;
mod page;

use crate::advice::{self, Findings};
use crate::cli::{ActivationsChoice, BenchOptions, CacheChoice, DraftVocab, ModelOptions, ReportOptions};
use crate::lever::{self, Tested};
use crate::{backend, provenance, roofline};
use anyhow::{Context, Result};
use moellon_lab::receipt::{MeasuredMachine, MeasuredModel, Receipt, Seal};
use moellon_lab::roofline::{BatchPoint, CostModel, OVERLAP};
use moellon_model::draft_precision::DraftVocabulary;
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;

/// What the page shows; `--json` prints it.
#[derive(Debug, Serialize)]
pub struct Report {
    pub date: String,
    pub version: String,
    pub machine: MeasuredMachine,
    pub model: MeasuredModel,
    pub roofline: roofline::Roofline,
    /// Name and hash of the receipt that the roofline is from; none where it was measured for this report.
    pub roofline_receipt: Option<[String; 2]>,
    /// Batch curves of other models on this processor, from receipts.
    pub other_curves: Vec<Curve>,
    /// What limits, in words.
    pub limits: Vec<String>,
    /// What would pay, in words.
    pub advice: Vec<String>,
    /// Gain of speculation by drafts a step: pairs of acceptance and factor, predicted.
    pub speculation: Vec<(usize, Vec<(f64, f64)>)>,
    /// What levers measured: name, acceptance, factor.
    pub speculation_measured: Vec<(String, f64, f64)>,
    /// Quality over bits.
    pub quality: Vec<QualityPoint>,
    /// Levers, the last test of each, and the short hash of its receipt.
    pub levers: Vec<(Tested, String)>,
    /// All receipts of the folder: name, kind, hash in full or what is wrong.
    pub receipts: Vec<[String; 3]>,
    /// Files of the folder that are no receipts, and why.
    pub unread_receipts: Vec<String>,
}

/// Steps by batch size, measured and predicted.
#[derive(Debug, Serialize)]
pub struct Curve {
    pub model: MeasuredModel,
    pub cost: CostModel,
    pub batches: Vec<BatchPoint>,
    /// Name and hash of the receipt.
    pub receipt: [String; 2],
}

/// A variant's distance from the model over its size.
#[derive(Debug, Serialize)]
pub struct QualityPoint {
    pub label: String,
    /// How the codes were chosen.
    pub method: String,
    pub bits_per_weight: f64,
    /// Mean KL divergence in nats.
    pub kl: f64,
}

/// Runs the command.
pub fn run(options: &ReportOptions) -> Result<()> {
    let report = collect(options)?;
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
        return Ok(());
    }
    let html = page::html(&report);
    let folder = options.out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder).with_context(|| folder.display().to_string())?;
    file.write_all(html.as_bytes())?;
    file.as_file().sync_all()?;
    file.persist(&options.out).with_context(|| options.out.display().to_string())?;
    println!("{} ({})", options.out.display(), crate::table::bytes(html.len() as f64));
    Ok(())
}

fn collect(options: &ReportOptions) -> Result<Report> {
    let (receipts, unread) = lever::receipts_if_any(&options.receipts)?;
    unread.iter().for_each(|line| eprintln!("not a receipt: {line}"));
    let mut backend = backend::create(&options.device, ActivationsChoice::Int8)?;
    let provenance = provenance::provenance(backend.as_mut())?;
    let (machine, cpu) = (provenance.machine, moellon_lab::Machine::this().cpu);
    let name = match &options.model.model {
        Some(directory) => directory.display().to_string(),
        None => crate::model_source::BUNDLED_NAME.to_owned(),
    };
    let intact: Vec<Receipt> = receipts.iter().filter(|r| matches!(r.seal, Seal::Intact(_))).cloned().collect();
    let (of_model, others): (Vec<Stored>, Vec<Stored>) =
        stored_rooflines(&intact, &cpu).into_iter().partition(|(_, model, _)| model.name == name);
    let other_curves = others.into_iter().map(|(roofline, model, receipt)| {
        let roofline::Roofline { cost, batches, .. } = roofline;
        Curve { model, cost, batches, receipt }
    });
    let (roofline, model, roofline_receipt) = match of_model.into_iter().next_back() {
        Some((roofline, model, receipt)) => (roofline, model, Some(receipt)),
        None => {
            eprintln!("no roofline of {name} on this processor in {}: measuring", options.receipts.display());
            let (roofline, model) = roofline::measure(&bench_options(options), backend.as_mut(), &[])?;
            (roofline, model, None)
        }
    };
    let of_model: Vec<Receipt> = intact.iter().filter(|r| r.value["model"]["name"] == name.as_str()).cloned().collect();
    let levers = lever::last_tests(&of_model, &cpu);
    let kept = lever::kept(&levers);
    let now = moellon_lab::Machine::this();
    let findings = Findings {
        cores: machine.cores,
        one_thread: machine.read_gb_s_1_thread,
        all_threads: machine.read_gb_s,
        steal_percent: 0.0,
        free_bytes: now.free_bytes,
        gpus: &machine.gpus,
        cost: &roofline.cost,
        model: &model.name,
        model_bytes: crate::model_source::ModelSource::open(options.model.model.as_deref())?.checkpoint.size_bytes(),
        kept: &kept,
        tested: !levers.is_empty(),
    };
    let (limits, advice) = (advice::limits(&findings), advice::levers(&findings));
    let acceptances = || (0..=20).map(|i| f64::from(i) / 20.0);
    let gain = |drafts: usize| acceptances().map(|p| (p, roofline.cost.speculation(drafts, p, OVERLAP))).collect();
    let speculation = [1, 2, 3, 5].map(|drafts| (drafts, gain(drafts))).into();
    let speculation_measured = speculation_measured(&levers);
    let quality = quality(&levers, &intact_or_scripted(&receipts, &name));
    Ok(Report {
        date: provenance::today(),
        version: provenance.version,
        receipts: receipts.iter().map(receipt_row).collect(),
        unread_receipts: unread,
        machine,
        model,
        roofline,
        roofline_receipt,
        other_curves: other_curves.collect(),
        limits,
        advice,
        speculation,
        speculation_measured,
        quality,
        levers,
    })
}

/// The bench that the roofline of a report needs.
fn bench_options(options: &ReportOptions) -> BenchOptions {
    BenchOptions {
        model: ModelOptions { model: options.model.model.clone() },
        device: options.device.clone(),
        synthetic: None,
        format: "affine-4".to_owned(),
        speculate: None,
        kernels: false,
        draft_vocab: DraftVocab(DraftVocabulary::Auto),
        batch: vec![1, 2, 4, 8],
        context: vec![128],
        block_size: 64,
        prompt: vec![512],
        chunk: 512,
        steps: 16,
        windows: 7,
        identical: false,
        seed: 1,
        activations: ActivationsChoice::Int8,
        cache: CacheChoice::Bf16,
        stages: false,
        json: false,
    }
}

/// A roofline that a receipt holds.
type Stored = (roofline::Roofline, MeasuredModel, [String; 2]);

/// The rooflines of this processor, the last of each model and format.
fn stored_rooflines(receipts: &[Receipt], cpu: &str) -> Vec<Stored> {
    let fits = |r: &&Receipt| r.value["kind"] == "roofline" && r.value["machine"]["cpu"] == cpu;
    // One that another version wrote in another form is passed over, and said to be.
    let read = |r: &Receipt| -> Option<Stored> {
        let roofline = serde_json::from_value(r.value["samples"].clone());
        let model = serde_json::from_value::<MeasuredModel>(r.value["model"].clone());
        match roofline.and_then(|roofline| Ok((roofline, model?))) {
            Ok((roofline, model)) => Some((roofline, model, [r.name.clone(), r.short_hash().to_owned()])),
            Err(error) => {
                eprintln!("{}: not a roofline that this version reads: {error}", r.name);
                None
            }
        }
    };
    let mut last: BTreeMap<[String; 2], Stored> = BTreeMap::new();
    for stored in receipts.iter().filter(fits).filter_map(read) {
        last.insert([stored.1.name.clone(), stored.1.format.clone()], stored);
    }
    last.into_values().collect()
}

fn receipt_row(receipt: &Receipt) -> [String; 3] {
    let kind = receipt.value["kind"].as_str().unwrap_or("schema 1").to_owned();
    let seal = match &receipt.seal {
        Seal::Intact(hash) => hash.clone(),
        Seal::Broken { .. } => "BROKEN".to_owned(),
        Seal::None => "no content hash".to_owned(),
    };
    [receipt.name.clone(), kind, seal]
}

/// Levers whose second arm drafted.
fn speculation_measured(levers: &[(Tested, String)]) -> Vec<(String, f64, f64)> {
    let mut measured = Vec::new();
    for (tested, _) in levers {
        for point in &tested.points {
            let Some(m) = &point.measured else { continue };
            if let (Some(accepted), Some(speedup)) = (m.b.extra.get("accepted %"), m.speedup) {
                measured.push((tested.lever.name.clone(), accepted / 100.0, speedup.mean));
            }
        }
    }
    measured
}

/// Receipts of surgery on the bundled model are written by a script and name no model.
fn intact_or_scripted(receipts: &[Receipt], model: &str) -> Vec<Receipt> {
    let bundled = model == crate::model_source::BUNDLED_NAME;
    let wanted = |r: &&Receipt| bundled && r.value["name"] == "surgery-curve" && !matches!(r.seal, Seal::Broken { .. });
    receipts.iter().filter(wanted).cloned().collect()
}

fn quality(levers: &[(Tested, String)], surgery: &[Receipt]) -> Vec<QualityPoint> {
    let mut points = Vec::new();
    for receipt in surgery {
        for sample in receipt.value["samples"].as_array().into_iter().flatten() {
            let text = |name: &str| sample[name].as_str().unwrap_or_default().to_owned();
            let (bits, kl) = (sample["bits_per_weight"].as_f64(), sample["kl_mean"].as_f64());
            if let (Some(bits_per_weight), Some(kl), false) = (bits, kl, text("formats").is_empty()) {
                points.push(QualityPoint { label: text("formats"), method: text("method"), bits_per_weight, kl });
            }
        }
    }
    if points.is_empty() {
        for (tested, _) in levers.iter().filter(|(t, _)| t.lever.name == "weight-format") {
            for point in &tested.points {
                let (Some([_, quality]), Some([a, b])) = (point.quality, point.bytes) else { continue };
                // The model as it is has the bits that its bytes say; the copy's bytes are in proportion.
                let bits_per_weight = 16.0 * b.bytes_per_token / a.bytes_per_token;
                points.push(QualityPoint {
                    label: point.arms[1].clone(),
                    method: "search".to_owned(),
                    bits_per_weight,
                    kl: quality.kl,
                });
            }
        }
    }
    points
}
