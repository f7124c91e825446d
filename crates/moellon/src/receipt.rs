//! `moellon receipt`: verify, compare, show and seal the records of measurements.

use crate::cli::{ReceiptCommand, ReceiptOptions};
use crate::table;
use anyhow::{Context, Result, bail};
use moellon_lab::receipt::{self, Receipt, Seal};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Runs the command.
pub fn run(options: &ReceiptOptions) -> Result<()> {
    match &options.command {
        ReceiptCommand::Verify { files } => verify(&expand(files)?),
        ReceiptCommand::Diff { before, after, samples } => diff(before, after, *samples),
        ReceiptCommand::Show { files } => {
            for path in expand(files)? {
                show(&Receipt::read(&path)?);
            }
            Ok(())
        }
        ReceiptCommand::Seal { files } => {
            for path in files {
                let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
                receipt::write(path, &receipt::seal_text(&path.display().to_string(), &text)?)?;
                println!("{}: sealed", path.display());
            }
            Ok(())
        }
    }
}

/// Files, and the receipts in folders.
fn expand(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in paths {
        if !path.is_dir() {
            files.push(path.clone());
            continue;
        }
        let entries = std::fs::read_dir(path).with_context(|| path.display().to_string())?;
        let mut inside: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        inside.retain(|file| file.extension().is_some_and(|ending| ending == "json"));
        inside.sort();
        files.extend(inside);
    }
    Ok(files)
}

fn verify(files: &[PathBuf]) -> Result<()> {
    let mut bad = 0;
    for path in files {
        let said = match Receipt::read(path) {
            Ok(receipt) => match receipt.seal {
                Seal::Intact(hash) => format!("ok, schema {}, sha256 {hash}", receipt.schema),
                Seal::None => format!("schema {}: no content hash", receipt.schema),
                Seal::Broken { stated, found } => {
                    bad += 1;
                    format!("BROKEN: content_sha256 is {stated}, the content's is {found}")
                }
            },
            Err(error) => {
                bad += 1;
                format!("BROKEN: {error}")
            }
        };
        println!("{}: {said}", path.display());
    }
    if bad > 0 {
        bail!("{bad} of {} receipts do not hold", files.len());
    }
    Ok(())
}

fn diff(before: &Path, after: &Path, samples: bool) -> Result<()> {
    let [before, after] = [Receipt::read(before)?, Receipt::read(after)?];
    let differences = receipt::diff(&before.value, &after.value);
    let cell = |value: &Option<Value>| {
        let text = value.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string);
        if text.chars().count() > 48 { text.chars().take(46).collect::<String>() + ".." } else { text }
    };
    let (of_samples, others): (Vec<_>, Vec<_>) = differences.iter().partition(|d| d.path.starts_with("samples"));
    let listed: Vec<_> = if samples { differences.iter().collect() } else { others };
    let rows: Vec<Vec<String>> = listed.iter().map(|d| vec![d.path.clone(), cell(&d.before), cell(&d.after)]).collect();
    table::print(&["member", &before.name, &after.name], &rows);
    if !samples && !of_samples.is_empty() {
        println!("and {} samples (--samples)", of_samples.len());
    }
    Ok(())
}

fn show(receipt: &Receipt) {
    let value = &receipt.value;
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    };
    println!(
        "{}: schema {}, {}",
        receipt.name,
        receipt.schema,
        match &receipt.seal {
            Seal::Intact(hash) => format!("sha256 {hash}"),
            Seal::Broken { .. } => "BROKEN".to_owned(),
            Seal::None => "no content hash".to_owned(),
        }
    );
    let machine = &value["machine"];
    println!("date      {}, commit {}", text(&value["date"]), text(&value["commit"]));
    println!(
        "machine   {}, {} cores, {}, {:.1} GB/s read, steal {} %",
        text(&machine["cpu"]),
        text(&machine["cores"]),
        text(&machine["cpu_level"]),
        machine["read_gb_s"].as_f64().unwrap_or(0.0),
        text(&value["steal_pct"])
    );
    if let Some(gpus) = machine["gpus"].as_array().filter(|gpus| !gpus.is_empty()) {
        let names: Vec<String> = gpus.iter().map(text).collect();
        println!("gpu       {}, driver {}", names.join(", "), text(&machine["driver"]));
    }
    if let Some(gb_s) = machine["device_read_gb_s"].as_f64() {
        println!("device    {}, {gb_s:.0} GB/s read", text(&machine["device"]));
    }
    println!("program   {}, sha256 {}", text(&value["version"]), text(&value["binary_sha256"]));
    if value["model"].is_object() {
        let model = &value["model"];
        println!("model     {}, {}, sha256 {}", text(&model["name"]), text(&model["format"]), text(&model["sha256"]));
    }
    for command in value["commands"].as_array().into_iter().flatten() {
        println!("command   {}", text(command));
    }
    for verdict in value["verdicts"].as_array().into_iter().flatten() {
        println!("verdict   {}: {}", text(&verdict["lever"]), text(&verdict["verdict"]).replace('_', " "));
    }
    for (name, rows) in value["tables"].as_object().into_iter().flatten() {
        let rows: Vec<&serde_json::Map<String, Value>> =
            rows.as_array().into_iter().flatten().filter_map(Value::as_object).collect();
        let mut columns: Vec<&str> = Vec::new();
        for column in rows.iter().flat_map(|row| row.keys()) {
            if !columns.contains(&column.as_str()) {
                columns.push(column);
            }
        }
        let cell =
            |row: &&serde_json::Map<String, Value>, column: &&str| row.get(*column).map_or_else(String::new, text);
        let cells: Vec<Vec<String>> =
            rows.iter().map(|row| columns.iter().map(|column| cell(row, column)).collect()).collect();
        println!("\n{name}");
        table::print(&columns, &cells);
    }
    println!();
}
