//! `moellon lever`: hypotheses about speed, tested on this machine and model.

mod arm;
mod check;
mod experiment;
mod quality;
mod variant;
mod workload;

pub use experiment::{Point, Tested};

use crate::cli::{ActivationsChoice, DeviceOptions, LeverCommand, LeverOptions, LeverTestOptions};
use crate::model_source::ModelSource;
use crate::{backend, provenance, table};
use anyhow::{Context, Result, ensure};
use moellon_lab::disturbance::SystemWitness;
use moellon_lab::lever::{Lever, Setting, Verdict, all};
use moellon_lab::receipt::{self, MeasuredModel, Provenance, Receipt};
use moellon_lab::{Machine, StealClock};
use moellon_model::weights::Weights;
use moellon_text::Tokenizer;
use serde::Serialize;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// Something, or the reason why it cannot be here, which is no error.
pub type Applicable<T> = Result<T, String>;

/// Texts that are part of the program: Rust sources of this project at one moment, so that runs can be compared.
const PROMPTS: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../levers/texts/prompts.txt"));
const HELD: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../levers/texts/held.txt"));

/// Runs the command.
pub fn run(options: &LeverOptions) -> Result<()> {
    let levers = all(options.levers.as_deref())?;
    match &options.command {
        LeverCommand::List => list(&levers),
        LeverCommand::Show { names } => {
            for lever in pick(&levers, names)? {
                show(lever);
            }
        }
        LeverCommand::Run { names, test } => run_levers(&pick(&levers, names)?, test, "levers")?,
        LeverCommand::All { test } => run_levers(&levers.values().collect::<Vec<_>>(), test, "levers")?,
        LeverCommand::Verdicts { receipts } => verdicts(receipts)?,
        LeverCommand::Check { test, runs, slowdown } => check::run(test, *runs, *slowdown)?,
    }
    Ok(())
}

fn pick<'a>(levers: &'a BTreeMap<String, Lever>, names: &[String]) -> Result<Vec<&'a Lever>> {
    let known = || levers.keys().cloned().collect::<Vec<_>>().join(", ");
    names
        .iter()
        .map(|name| levers.get(name).with_context(|| format!("lever {name}: unknown, expected one of {}", known())))
        .collect()
}

fn list(levers: &BTreeMap<String, Lever>) {
    let row = |lever: &Lever| {
        vec![
            lever.name.clone(),
            lever.title.clone(),
            lever.workload.name().to_owned(),
            if lever.lossless { "same output" } else { "other predictions" }.to_owned(),
            if lever.notes.is_some() { "yes" } else { "" }.to_owned(),
        ]
    };
    let rows: Vec<Vec<String>> = levers.values().map(row).collect();
    table::print(&["lever", "what", "work", "claims", "in the notes"], &rows);
}

fn show(lever: &Lever) {
    println!("{}: {}\n", lever.name, lever.title);
    println!("hypothesis  {}", lever.hypothesis);
    if let Some(notes) = &lever.notes {
        println!("the notes   {notes}");
    }
    println!("work        {}, {} tokens behind {}", lever.workload.name(), lever.tokens, lever.prompt);
    println!(
        "measures    {} ({})",
        lever.unit,
        if lever.lossless { "the output must be the same" } else { "predictions may change" }
    );
    if lever.common != Setting::default() {
        println!("common      {}", lever.common.label());
    }
    println!("A           {}", lever.a.label());
    lever.b.iter().for_each(|b| println!("B           {}", b.label()));
    let rule = &lever.rule;
    println!(
        "decides     {:.0} % of time, {:.0} % sure, {} to {} pairs of windows, {:.0} s at most",
        100.0 * rule.minimum_effect,
        100.0 * rule.confidence,
        rule.min_pairs,
        rule.max_pairs,
        rule.max_seconds
    );
    if !lever.lossless {
        let quality = lever.quality;
        println!(
            "            KL at most {} nats, same next token at least {:.0} %",
            quality.max_kl,
            100.0 * quality.min_top1
        );
    }
    println!();
}

/// What all levers of a run have in common.
pub struct Base {
    /// The model; `None` for the bundled one.
    pub directory: Option<PathBuf>,
    pub device: DeviceOptions,
    pub machine: Machine,
    pub tokenizer: Arc<Tokenizer>,
    /// Positions that the model was made for.
    pub max_position: usize,
    /// Tokens that prompts are cut from and experts are calibrated with.
    pub text: Vec<u32>,
    /// SHA-256 of that text.
    pub text_hash: String,
    /// Tokens that predictions are compared on.
    pub held: Vec<u32>,
    /// Folder for quantized and pruned copies.
    pub variants: PathBuf,
    /// Read bandwidth before the run.
    pub read_gb_s: f64,
}

/// A base, and what a receipt says about where it was measured.
pub fn base(test: &LeverTestOptions) -> Result<(Base, Provenance, MeasuredModel)> {
    let provenance = provenance::provenance(backend::create(&test.device, ActivationsChoice::Int8)?.as_mut())?;
    let directory = test.model.model.clone();
    let source = ModelSource::open(directory.as_deref())?;
    let tokenizer = source.tokenizer(directory.as_deref())?;
    let weights = Weights::describe(&source.config, &source.checkpoint)?;
    let read = |path: &Option<PathBuf>, built_in: &str| match path {
        Some(path) => std::fs::read_to_string(path).with_context(|| path.display().to_string()),
        None => Ok(built_in.to_owned()),
    };
    let (text, held) = (read(&test.text, PROMPTS)?, read(&test.held_text, HELD)?);
    let variants = provenance::cache_folder().context("the system names no cache folder (HOME)")?.join("variants");
    let base = Base {
        directory,
        device: test.device.clone(),
        machine: Machine::this(),
        max_position: source.config.max_position_embeddings,
        text: tokenizer.encode_ordinary(&text)?,
        text_hash: provenance::hex(&Sha256::digest(text.as_bytes())),
        held: tokenizer.encode_ordinary(&held)?,
        tokenizer,
        variants,
        read_gb_s: provenance.machine.model_read_gb_s(),
    };
    ensure!(base.held.len() >= 2, "--held-text has {} tokens, expected 2 or more", base.held.len());
    Ok((base, provenance, provenance::model(&source, &weights.account)))
}

fn run_levers(levers: &[&Lever], test: &LeverTestOptions, command: &str) -> Result<()> {
    let (base, provenance, model) = base(test)?;
    let mut witness = SystemWitness::new();
    let steal = StealClock::start();
    let started = Instant::now();
    let mut tested = Vec::new();
    let before = if test.fresh { BTreeMap::new() } else { earlier(&test.receipts, &provenance, &model)? };
    for (i, lever) in levers.iter().enumerate() {
        let from = Instant::now();
        let mut result =
            experiment::run(&base, lever, &mut witness).with_context(|| format!("lever {}", lever.name))?;
        if let Some((earlier, receipt)) = before.get(&lever.name).filter(|(earlier, _)| earlier.lever == **lever) {
            experiment::stand(&mut result, earlier, receipt);
        }
        let seconds = from.elapsed().as_secs_f64();
        eprintln!("{}/{} {}: {} ({seconds:.1} s)", i + 1, levers.len(), lever.name, result.verdict.name());
        tested.push(result);
    }
    let seconds = started.elapsed().as_secs_f64();
    print(&tested);
    println!("\n{} levers in {seconds:.0} s, steal {:.2} %", tested.len(), steal.steal_percent());
    if test.no_receipt {
        return Ok(());
    }
    let name = test.name.clone().unwrap_or_else(|| format!("{command}-{}", short_name(&model.name)));
    let rows: Vec<Value> = tested.iter().flat_map(|t| t.points.iter().map(|p| table_row(t, p))).collect();
    let claims: Vec<Value> = tested.iter().filter_map(claim_row).collect();
    let mut tables = vec![(name.clone(), rows)];
    if !claims.is_empty() {
        tables.push((format!("{name}-notes"), claims));
    }
    let repeat = repeat(&tested, &before);
    if repeat.levers > 0 {
        println!(
            "{} of {} verdicts as before, {} of them by this run alone",
            repeat.same, repeat.levers, repeat.same_alone
        );
        tables.push(("levers-again".to_owned(), vec![repeat.row(&name, seconds)]));
    }
    let note = json!({ "levers": tested.len(), "seconds": seconds, "again": repeat });
    let verdicts = tested.iter().map(|t| json!({ "lever": t.lever.name, "verdict": t.verdict })).collect();
    let samples = serde_json::to_value(&tested)?;
    let record = Record {
        kind: "levers",
        name: &name,
        provenance,
        model: Some(model),
        steal_pct: steal.steal_percent(),
        note,
        samples,
        verdicts,
        tables,
    };
    let path = record.write(&test.receipts)?;
    println!("{}", path.display());
    Ok(())
}

/// How a run compares with the one before it, of the same program, model and machine.
#[derive(Debug, Default, Serialize)]
struct Repeat {
    /// Receipts of the earlier verdicts.
    before: BTreeSet<String>,
    /// Levers that were tested before.
    levers: usize,
    /// Of these, verdicts that are the same.
    same: usize,
    /// The same if earlier verdicts had not been known.
    same_alone: usize,
    /// The same for points: A against one B.
    points: usize,
    points_same: usize,
    points_same_alone: usize,
}

fn repeat(tested: &[Tested], before: &BTreeMap<String, (Tested, String)>) -> Repeat {
    let mut repeat = Repeat::default();
    for test in tested {
        let Some((earlier, receipt)) = before.get(&test.lever.name).filter(|(b, _)| b.lever == test.lever) else {
            continue;
        };
        repeat.before.insert(receipt.clone());
        repeat.levers += 1;
        repeat.same += usize::from(test.verdict == earlier.verdict);
        repeat.same_alone += usize::from(test.verdict_alone() == earlier.verdict);
        for (now, then) in test.points.iter().zip(&earlier.points) {
            repeat.points += 1;
            repeat.points_same += usize::from(now.verdict == then.verdict);
            repeat.points_same_alone += usize::from(now.alone.unwrap_or(now.verdict) == then.verdict);
        }
    }
    repeat
}

impl Repeat {
    fn row(&self, name: &str, seconds: f64) -> Value {
        let of = |same: usize, all: usize| format!("{same} of {all}");
        json!({
            "run": name,
            "after": self.before.iter().cloned().collect::<Vec<_>>().join(", "),
            "seconds": format!("{seconds:.0}"),
            "verdicts as before": of(self.same, self.levers),
            "by this run alone": of(self.same_alone, self.levers),
            "points as before": of(self.points_same, self.points),
            "points by this run alone": of(self.points_same_alone, self.points),
        })
    }
}

/// The last test of each lever by this very program with this model on this machine, and its receipt.
fn earlier(
    folder: &Path,
    provenance: &Provenance,
    model: &MeasuredModel,
) -> Result<BTreeMap<String, (Tested, String)>> {
    let mut last = BTreeMap::new();
    for receipt in receipts_if_any(folder)?.0 {
        let value = &receipt.value;
        let is_same = value["kind"] == "levers"
            && matches!(receipt.seal, receipt::Seal::Intact(_))
            && value["binary_sha256"] == provenance.binary_sha256.as_str()
            && value["machine"]["cpu"] == provenance.machine.cpu.as_str()
            && value["machine"]["cores"] == provenance.machine.cores
            && value["machine"]["device"] == json!(provenance.machine.device)
            && value["model"]["sha256"] == json!(model.sha256);
        if !is_same {
            continue;
        }
        let tested: Vec<Tested> =
            serde_json::from_value(value["samples"].clone()).with_context(|| receipt.name.clone())?;
        last.extend(tested.into_iter().map(|test| (test.lever.name.clone(), (test, receipt.name.clone()))));
    }
    Ok(last)
}

/// `moellon-tiny` of `moellon-tiny (bundled)` or of a path.
pub fn short_name(model: &str) -> String {
    let last = model.rsplit('/').next().unwrap_or(model);
    last.split([' ', ':']).next().unwrap_or(last).to_owned()
}

/// What becomes a receipt.
pub struct Record<'a> {
    pub kind: &'a str,
    pub name: &'a str,
    pub provenance: Provenance,
    pub model: Option<MeasuredModel>,
    pub steal_pct: f64,
    /// What a reader should know first.
    pub note: Value,
    pub samples: Value,
    pub verdicts: Vec<Value>,
    /// Tables for documents, by name.
    pub tables: Vec<(String, Vec<Value>)>,
}

impl Record<'_> {
    /// Writes a sealed receipt of today into `folder`.
    pub fn write(self, folder: &Path) -> Result<PathBuf> {
        let path = provenance::new_path(folder, self.name)?;
        let mut value = Map::new();
        let mut put = |name: &str, member: Value| value.insert(name.to_owned(), member);
        put("schema", json!(receipt::SCHEMA));
        put("kind", json!(self.kind));
        put("name", json!(self.name));
        put("date", json!(provenance::today()));
        put("commit", json!(self.provenance.commit));
        put("version", json!(self.provenance.version));
        put("binary_sha256", json!(self.provenance.binary_sha256));
        put("machine", serde_json::to_value(&self.provenance.machine)?);
        put("model", serde_json::to_value(&self.model)?);
        put("steal_pct", json!(rounded(self.steal_pct)));
        put("commands", json!([provenance::command_line()]));
        put("note", self.note);
        put("verdicts", Value::Array(self.verdicts));
        put(
            "tables",
            self.tables.into_iter().map(|(name, rows)| (name, Value::Array(rows))).collect::<Map<_, _>>().into(),
        );
        put("samples", shortened(self.samples));
        receipt::write(&path, &receipt::seal(&Value::Object(value)))?;
        Ok(path)
    }
}

/// Six digits are more than any clock here has.
fn rounded(number: f64) -> f64 {
    if number == 0.0 || !number.is_finite() {
        return number;
    }
    let digits = 5 - number.abs().log10().floor() as i32;
    let scale = 10f64.powi(digits);
    (number * scale).round() / scale
}

/// All floats of a value, rounded: nobody can read the rest, and it would fill the repository.
fn shortened(value: Value) -> Value {
    match value {
        Value::Number(number) if number.is_f64() => json!(rounded(number.as_f64().unwrap_or(0.0))),
        Value::Array(values) => Value::Array(values.into_iter().map(shortened).collect()),
        Value::Object(members) => Value::Object(members.into_iter().map(|(k, v)| (k, shortened(v))).collect()),
        other => other,
    }
}

fn speedup(point: &Point) -> String {
    match point.measured.as_ref().and_then(|m| m.speedup) {
        Some(s) => format!("{:.3} ({:.3}-{:.3})", s.mean, s.low, s.high),
        None => "-".to_owned(),
    }
}

fn quality_cell(point: &Point) -> String {
    match point.quality {
        Some([_, b]) => format!("KL {:.4}, {:.1} % the same", b.kl, 100.0 * b.top1),
        None => match &point.measured {
            Some(measured) if measured.same_output => "the same output".to_owned(),
            Some(_) => "another output".to_owned(),
            None => "-".to_owned(),
        },
    }
}

fn pairs(point: &Point) -> String {
    match &point.measured {
        Some(m) => format!("{} ({})", m.windows.kept, m.windows.discarded),
        None => "-".to_owned(),
    }
}

fn share(point: &Point) -> String {
    match point.bytes {
        Some([a, b]) => format!("{:.0} to {:.0} %", 100.0 * a.bandwidth_share, 100.0 * b.bandwidth_share),
        None => "-".to_owned(),
    }
}

fn table_row(tested: &Tested, point: &Point) -> Value {
    json!({
        "lever": tested.lever.name,
        "A against B": point.arms.join(" | ").replace('|', "against"),
        "verdict": point.verdict.name(),
        "times as fast (95 %)": speedup(point),
        "in its unit": point.in_unit,
        "predictions": quality_cell(point),
        "share of bandwidth": share(point),
        "pairs (discarded)": pairs(point),
        "why": point.reason,
    })
}

/// What the notes claimed of a lever, and what its best point (or else its first) gave here, in the same unit.
fn claim_row(tested: &Tested) -> Option<Value> {
    let notes = tested.lever.notes.as_ref()?;
    let points = tested.points.iter().filter(|p| p.verdict == tested.verdict);
    let gain = |p: &&Point| p.measured.as_ref().and_then(|m| m.speedup).map_or(0.0, |s| s.mean);
    let best = points.max_by(|a, b| gain(a).total_cmp(&gain(b)))?;
    Some(json!({
        "lever": tested.lever.name,
        "the notes": notes,
        "here": format!("{}: {}", best.arms[1], best.in_unit),
        "times as fast (95 %)": speedup(best),
        "verdict": tested.verdict.name(),
        "why": best.reason,
    }))
}

fn print(tested: &[Tested]) {
    let row = |t: &Tested, p: &Point| {
        vec![
            t.lever.name.clone(),
            p.arms.join(" | "),
            p.verdict.name().to_owned(),
            speedup(p),
            p.in_unit.clone(),
            quality_cell(p),
            pairs(p),
            p.reason.clone(),
        ]
    };
    let rows: Vec<Vec<String>> = tested.iter().flat_map(|t| t.points.iter().map(move |p| row(t, p))).collect();
    println!();
    table::print(
        &["lever", "A | B", "verdict", "times as fast", "in its unit", "predictions", "pairs (discarded)", "why"],
        &rows,
    );
}

/// Receipts of a folder, by name, and why others of its files are none: one of them must not hide the rest.
pub fn receipts(folder: &Path) -> Result<(Vec<Receipt>, Vec<String>)> {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder)
        .with_context(|| folder.display().to_string())?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|ending| ending == "json"))
        .collect();
    paths.sort();
    let (mut receipts, mut unread) = (Vec::new(), Vec::new());
    for path in &paths {
        match Receipt::read(path) {
            Ok(receipt) => receipts.push(receipt),
            Err(error) => unread.push(error.to_string()),
        }
    }
    Ok((receipts, unread))
}

/// The same of a folder that need not be there.
pub fn receipts_if_any(folder: &Path) -> Result<(Vec<Receipt>, Vec<String>)> {
    if folder.is_dir() { receipts(folder) } else { Ok((Vec::new(), Vec::new())) }
}

fn verdicts(folder: &Path) -> Result<()> {
    let mut last: BTreeMap<[String; 3], Vec<String>> = BTreeMap::new();
    let (receipts, unread) = receipts(folder)?;
    unread.iter().for_each(|line| eprintln!("not a receipt: {line}"));
    for receipt in receipts {
        if receipt.value["kind"] != "levers" {
            continue;
        }
        ensure!(
            !matches!(receipt.seal, receipt::Seal::Broken { .. }),
            "{}: its content is not what was sealed (moellon receipt verify)",
            receipt.name
        );
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (model, cpu) = (text(&receipt.value["model"]["name"]), text(&receipt.value["machine"]["cpu"]));
        let tested: Vec<Tested> =
            serde_json::from_value(receipt.value["samples"].clone()).with_context(|| receipt.name.clone())?;
        for test in &tested {
            let points: Vec<String> = test
                .points
                .iter()
                .filter(|p| p.measured.is_some())
                .map(|p| format!("{}: {} ({})", p.arms[1], speedup(p), p.verdict.name()))
                .collect();
            let reason = test.points.first().map_or_else(String::new, |p| p.reason.clone());
            let said = if points.is_empty() { reason } else { points.join("; ") };
            let row = vec![test.verdict.name().to_owned(), said, receipt.short_hash().to_owned()];
            last.insert([model.clone(), cpu.clone(), test.lever.name.clone()], row);
        }
    }
    let rows: Vec<Vec<String>> = last
        .into_iter()
        .map(|([model, cpu, lever], rest)| [vec![lever, format!("{model}, {cpu}")], rest].concat())
        .collect();
    table::print(&["lever", "where", "verdict", "times as fast", "receipt"], &rows);
    Ok(())
}

/// Whether a lever is worth keeping, from the last receipts of this machine's processor: what `doctor` and `report` say.
pub fn last_tests(receipts: &[Receipt], cpu: &str) -> Vec<(Tested, String)> {
    let mut last: BTreeMap<String, (Tested, String)> = BTreeMap::new();
    for receipt in receipts.iter().filter(|r| r.value["kind"] == "levers" && r.value["machine"]["cpu"] == cpu) {
        let tested: Vec<Tested> = serde_json::from_value(receipt.value["samples"].clone()).unwrap_or_default();
        for test in tested {
            last.insert(test.lever.name.clone(), (test, receipt.short_hash().to_owned()));
        }
    }
    last.into_values().collect()
}

/// Points to be kept, best first.
pub fn kept(tests: &[(Tested, String)]) -> Vec<(&Tested, &Point)> {
    let mut kept: Vec<(&Tested, &Point)> = tests
        .iter()
        .flat_map(|(test, _)| test.points.iter().map(move |point| (test, point)))
        .filter(|(_, point)| point.verdict == Verdict::Keep)
        .collect();
    let factor = |point: &Point| point.measured.as_ref().and_then(|m| m.speedup).map_or(1.0, |s| s.mean);
    kept.sort_by(|a, b| factor(b.1).total_cmp(&factor(a.1)));
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_six_digits() {
        assert_eq!(rounded(0.000_123_456_789), 0.000_123_457);
        assert_eq!(rounded(-98_765_432.1), -98_765_400.0);
        assert_eq!(shortened(json!({"a": [1.000_000_4, 7, "x"]})), json!({"a": [1.0, 7, "x"]}));
    }

    #[test]
    fn models_have_short_names() {
        assert_eq!(short_name("moellon-tiny (bundled)"), "moellon-tiny");
        assert_eq!(short_name("/models/GLM-5.2-demolished"), "GLM-5.2-demolished");
        assert_eq!(short_name("synthetic qwen3-30b-a3b:layers=8"), "synthetic");
    }
}
