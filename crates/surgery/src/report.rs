//! What lies beside a product: `surgery.json`, a receipt of how it was made and how near it is to its source, and a model
//! card that says the same in words. Both are functions of the result alone, with no times in them, so that a resumed run
//! ends with the same bytes.

use crate::formats;
use crate::inventory::{Module, Role};
use crate::quantize::Source;
use moellon_tensor::WeightFormat;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Name of the receipt in a model directory.
pub const RECEIPT_FILE: &str = "surgery.json";

/// The receipt of one operation.
#[derive(Debug, Clone)]
pub struct Receipt {
    command: &'static str,
    source_name: String,
    source_identity: String,
    /// Receipts of earlier operations on the source, oldest first.
    history: Vec<Value>,
    /// What the command was told and what it found.
    pub details: Map<String, Value>,
    modules: Vec<ModuleRow>,
}

#[derive(Debug, Clone)]
struct ModuleRow {
    name: String,
    role: Role,
    mtp: bool,
    source_format: String,
    format: String,
    weights: u64,
    bytes: u64,
    relative_error: f64,
    lossless: bool,
}

impl Receipt {
    pub(crate) fn new(command: &'static str, source: Source<'_>) -> Self {
        let earlier = source.files.iter().find(|(name, _)| name == RECEIPT_FILE);
        let history = earlier.and_then(|(_, bytes)| serde_json::from_slice::<Value>(bytes).ok()).map_or_else(
            Vec::new,
            |mut receipt| {
                let history = receipt.as_object_mut().and_then(|receipt| receipt.remove("history"));
                let mut history = history.and_then(|h| h.as_array().cloned()).unwrap_or_default();
                // The modules of an earlier step are no longer there.
                receipt.as_object_mut().map(|receipt| receipt.remove("modules"));
                history.push(receipt);
                history
            },
        );
        Receipt {
            command,
            source_name: source.name.to_owned(),
            source_identity: source.checkpoint.identity(),
            history,
            details: Map::new(),
            modules: Vec::new(),
        }
    }

    pub(crate) fn add_module(&mut self, module: &Module, format: WeightFormat, entry: &Value) {
        let integer = |key: &str| entry.get(key).and_then(Value::as_u64).unwrap_or(0);
        self.modules.push(ModuleRow {
            name: module.name.clone(),
            role: module.role,
            mtp: module.mtp,
            source_format: formats::name(module.source_format),
            format: formats::name(format),
            weights: module.num_weights(),
            bytes: integer("bytes"),
            relative_error: relative_error(entry),
            lossless: entry.get("lossless").and_then(Value::as_bool).unwrap_or(false),
        });
    }

    fn totals(&self) -> (u64, u64) {
        self.modules.iter().fold((0, 0), |(weights, bytes), row| (weights + row.weights, bytes + row.bytes))
    }

    /// The receipt as JSON.
    pub fn to_json(&self) -> Value {
        let (weights, bytes) = self.totals();
        let modules: Vec<Value> = self
            .modules
            .iter()
            .map(|row| {
                json!({
                    "name": row.name,
                    "source_format": row.source_format,
                    "format": row.format,
                    "weights": row.weights,
                    "bytes": row.bytes,
                    "snr_db": snr_db(row.relative_error),
                    "lossless": row.lossless,
                })
            })
            .collect();
        let mut receipt = Map::new();
        receipt.insert("schema".to_owned(), json!(1));
        receipt.insert("command".to_owned(), json!(self.command));
        receipt.insert("version".to_owned(), json!(env!("CARGO_PKG_VERSION")));
        receipt.insert("source".to_owned(), json!({ "name": self.source_name, "identity": self.source_identity }));
        receipt.extend(self.details.clone());
        receipt.insert(
            "totals".to_owned(),
            json!({ "weights": weights, "bytes": bytes, "bits_per_weight": bits_per_weight(weights, bytes) }),
        );
        receipt.insert("modules".to_owned(), json!(modules));
        receipt.insert("history".to_owned(), json!(self.history));
        Value::Object(receipt)
    }

    /// The model card.
    fn card(&self) -> String {
        let (weights, bytes) = self.totals();
        let mut card = String::new();
        let title = match self.command {
            "prune" => "pruned",
            "recalibrate" => "pruned, routers recalibrated",
            _ => "quantized",
        };
        let base = self.source_name.rsplit('/').next().unwrap_or(&self.source_name);
        let mut line = |text: String| {
            card.push_str(&text);
            card.push('\n');
        };
        line(format!("---\nlibrary_name: mlx\ntags: [moellon, moe, {title}]\n---\n"));
        line(format!("# {base}, {title}\n"));
        line(format!(
            "Made by `moellon {}` {} from `{}` (identity `{}`): {} weights in {} bytes, {:.3} bits a weight.\n",
            self.command,
            env!("CARGO_PKG_VERSION"),
            self.source_name,
            &self.source_identity[..16],
            weights,
            bytes,
            bits_per_weight(weights, bytes),
        ));
        for sentence in self.sentences() {
            line(format!("- {sentence}"));
        }
        line("\n| part | formats | weights | bits a weight | signal to noise, dB |\n|---|---|---|---|---|".to_owned());
        let mut parts: BTreeMap<(bool, Role), Vec<&ModuleRow>> = BTreeMap::new();
        for row in &self.modules {
            parts.entry((row.mtp, row.role)).or_default().push(row);
        }
        for ((mtp, role), rows) in parts {
            let mut formats: Vec<&str> = rows.iter().map(|row| row.format.as_str()).collect();
            formats.sort_unstable();
            formats.dedup();
            let weights: u64 = rows.iter().map(|row| row.weights).sum();
            let bytes: u64 = rows.iter().map(|row| row.bytes).sum();
            let noise: f64 = rows.iter().map(|row| row.relative_error * row.weights as f64).sum::<f64>();
            let snr = snr_db(noise / weights.max(1) as f64).map_or("exact".to_owned(), |db| format!("{db:.1}"));
            let name = if mtp { format!("MTP {}", role.name()) } else { role.name().to_owned() };
            line(format!(
                "| {name} | {} | {weights} | {:.3} | {snr} |",
                formats.join(", "),
                bits_per_weight(weights, bytes)
            ));
        }
        line(format!(
            "\nSignal to noise is that of outputs where the calibration knew the inputs' moments, else of the weights, \
             weighted by importance where there was any. Every module is listed in `{RECEIPT_FILE}`; `moellon compare` \
             measures what it means for the model's predictions.\n"
        ));
        line("```sh\nmoellon run -m . -p \"...\"\nmlx_lm.generate --model . --prompt \"...\"\n```".to_owned());
        card
    }

    /// The details in words.
    fn sentences(&self) -> Vec<String> {
        let mut sentences = Vec::new();
        let text = |key: &str| self.details.get(key).and_then(Value::as_str);
        if let Some(method) = text("method") {
            sentences.push(match method {
                "rtn" => "Codes are rounded to nearest, as MLX does it.".to_owned(),
                "search" => "Scales and offsets were searched for the least weighted error.".to_owned(),
                _ => "Scales and offsets were searched, then codes chosen with error feedback (GPTQ).".to_owned(),
            });
        }
        if let Some(plan) = self.details.get("plan") {
            sentences.push(format!("Formats follow the plan `{}`.", plan["name"].as_str().unwrap_or("unnamed")));
        }
        if let Some(calibration) = self.details.get("calibration").filter(|c| !c.is_null()) {
            let texts = calibration["texts"].as_array().map_or(0, Vec::len);
            sentences.push(format!("Calibrated with {} tokens of {texts} texts.", calibration["tokens"]));
        }
        if let Some(modules) = self.details.get("requantized_modules").and_then(Value::as_array)
            && !modules.is_empty()
        {
            sentences.push(format!(
                "**{} modules were quantized in the source already**: their errors add up. Better to start from the \
                 original weights.",
                modules.len()
            ));
        }
        if let Some(score) = text("score") {
            sentences.push(format!(
                "Experts kept a layer: {}; chosen by `{score}`. `expert_keep` in `config.json` has their original \
                 numbers.",
                self.details.get("kept_experts").map_or_else(String::new, Value::to_string)
            ));
        }
        if let Some(routers) = self.details.get("routers").and_then(Value::as_array) {
            let mean = |key: &str| {
                let errors = routers.iter().filter_map(|router| router[key].as_str()?.parse::<f64>().ok());
                errors.sum::<f64>() / routers.len().max(1) as f64
            };
            sentences.push(format!(
                "Routers of {} blocks were fitted to the experts that are left: of the squared output of the routed \
                 experts, {:.3} was missing or wrong before and {:.3} is now (mean over blocks, on tokens not learned from).",
                routers.len(),
                mean("relative_error_before"),
                mean("relative_error"),
            ));
        }
        for step in &self.history {
            sentences.push(format!("Before that: `moellon {}`.", step["command"].as_str().unwrap_or("?")));
        }
        sentences
    }
}

/// The relative squared error that a journal entry notes, as text; 0 where nothing was lost.
pub(crate) fn relative_error(entry: &Value) -> f64 {
    entry.get("relative_error").and_then(Value::as_str).and_then(|text| text.parse().ok()).unwrap_or(0.0)
}

fn bits_per_weight(weights: u64, bytes: u64) -> f64 {
    bytes as f64 * 8.0 / weights.max(1) as f64
}

/// `None` where nothing was lost.
fn snr_db(relative_error: f64) -> Option<f64> {
    (relative_error > 0.0).then(|| -10.0 * relative_error.log10())
}

/// The files beside the shards: the source's, the receipt and the card.
pub(crate) fn files(source: Source<'_>, receipt: &Receipt) -> Vec<(String, Vec<u8>)> {
    let own = |name: &str| name == RECEIPT_FILE || name == "README.md";
    let mut files: Vec<(String, Vec<u8>)> = source.files.iter().filter(|(name, _)| !own(name)).cloned().collect();
    let mut text = String::new();
    writeln!(text, "{:#}", receipt.to_json()).expect("a String takes all text");
    files.push((RECEIPT_FILE.to_owned(), text.into_bytes()));
    files.push(("README.md".to_owned(), receipt.card().into_bytes()));
    files
}
