//! Levers: hypotheses about speed as data. A lever is a TOML file that says what is switched, on which work, what is measured
//! and what decides; `levers/*.toml` are part of the program, and a folder of one's own adds to them or replaces them by name.
//! What the fields mean is in `docs/levers.md`.

use crate::statistics::Rule;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// A lever that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A folder or file.
    #[error("{path}: {source}")]
    Io {
        /// Which.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// Not what a lever looks like.
    #[error("lever {name}: {what}")]
    Form {
        /// Its file's name.
        name: String,
        /// What was found, and what is expected.
        what: String,
    },
}

/// What the arms of a lever do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Workload {
    /// Sequences continue texts, all at once; a unit is a token of all sequences together.
    Decode,
    /// A long prompt up to its first token; a unit is a prompt.
    FirstToken,
    /// Whole answers to questions in the chat template; a unit is an answer.
    Answer,
    /// Requests that arrive together and are served to the end; a unit is a request.
    Serve,
}

impl Workload {
    /// The name that files and tables use.
    pub const fn name(self) -> &'static str {
        match self {
            Workload::Decode => "decode",
            Workload::FirstToken => "first-token",
            Workload::Answer => "answer",
            Workload::Serve => "serve",
        }
    }

    /// What one unit of its time is.
    pub const fn unit(self) -> &'static str {
        match self {
            Workload::Decode => "token",
            Workload::FirstToken => "first token",
            Workload::Answer => "answer",
            Workload::Serve => "request",
        }
    }
}

/// One arm: what differs from the engine as it is. Every field may be left out.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Setting {
    /// Name in tables.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Format or plan that the weights are quantized to first (as in `moellon quantize`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weights: Option<String>,
    /// Share of the experts that is pruned first, by REAP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prune: Option<f64>,
    /// Experts that a token uses, fewer than the model's by this many.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fewer_active_experts: Option<usize>,
    /// Positions that sparse attention sees, as a multiple of the model's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub index_topk_factor: Option<f64>,
    /// `off`, `ngram`, `mtp`, `auto` or `draft`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub speculate: Option<String>,
    /// Format of the copy of the model that drafts, where `speculate` is `draft`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub draft_weights: Option<String>,
    /// Drafts a step at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub draft_depth: Option<usize>,
    /// Drafts are made whether they pay or not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub draft_always: Option<bool>,
    /// Sequences at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch: Option<usize>,
    /// Whether all sequences continue the same text: they route alike.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identical_prompts: Option<bool>,
    /// Threads; all cores without.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// Type of cached keys and values: `bf16` or `f32`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<String>,
    /// How activations meet quantized weights: `int8` or `exact`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub activations: Option<String>,
    /// Where a prompt's prefix is: `cold` (nowhere), `warm` (in memory) or `disk`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefix: Option<String>,
    /// Requests with the same prefix at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub concurrent: Option<usize>,
    /// Whether the model thinks before it answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub thinking: Option<bool>,
    /// Tokens that a thought may take.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub thinking_budget: Option<usize>,
    /// Whether weights lie in huge pages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub huge_pages: Option<bool>,
    /// Whether routed experts are multiplied in one operation, each distinct one read once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fused_experts: Option<bool>,
    /// Back end: `cpu`, `cuda` or `wgpu`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend: Option<String>,
    /// How steps reach a GPU: `recorded` (one graph), `launched` (one by one) or `persistent` (one kernel).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<String>,
    /// A planted slowdown: this share of each step's time is waited away. For testing the lab itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slowdown: Option<f64>,
}

impl Setting {
    /// Its name in tables: the label, or what it sets.
    pub fn label(&self) -> String {
        if let Some(label) = &self.label {
            return label.clone();
        }
        let value = serde_json::to_value(self).unwrap_or_default();
        let fields: Vec<String> = value.as_object().into_iter().flatten().map(|(k, v)| format!("{k} {v}")).collect();
        if fields.is_empty() { "as it is".to_owned() } else { fields.join(", ").replace('"', "") }
    }

    /// This setting with what `other` sets on top.
    #[must_use]
    pub fn with(&self, other: &Setting) -> Setting {
        let merged = |a: &Setting, b: &Setting| -> Option<Setting> {
            let mut value = serde_json::to_value(a).ok()?;
            let fields = value.as_object_mut()?;
            fields.extend(serde_json::to_value(b).ok()?.as_object()?.clone());
            serde_json::from_value(value).ok()
        };
        merged(self, other).expect("a setting is a JSON object and back")
    }
}

/// What decides about a lever that changes predictions.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct QualityRule {
    /// Mean `KL(A || B)` over tokens at most, in nats.
    pub max_kl: f64,
    /// Share of tokens with the same most likely next token at least.
    pub min_top1: f64,
}

impl Default for QualityRule {
    fn default() -> Self {
        QualityRule { max_kl: 0.05, min_top1: 0.9 }
    }
}

/// A hypothesis and how it is tested.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Lever {
    /// Its file's name without the ending.
    #[serde(default)]
    pub name: String,
    /// A few words.
    pub title: String,
    /// What is believed, and why.
    pub hypothesis: String,
    /// What the notes that Moellon began with measured, in their unit: the claim that is tested again here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub notes: Option<String>,
    /// In which unit to state the result beside time: `tok/s`, `x`, `accepted %`, `tokens a step`, ..
    pub unit: String,
    /// What the arms do.
    pub workload: Workload,
    /// Whether both arms must give the same tokens.
    pub lossless: bool,
    /// Tokens that a window generates for each sequence (or the prompt's length, for first tokens).
    pub tokens: usize,
    /// Tokens of the texts that are continued.
    pub prompt: usize,
    /// What both arms have in common.
    #[serde(default)]
    pub common: Setting,
    /// Without the lever.
    #[serde(default)]
    pub a: Setting,
    /// With it; several are several points of a curve, each compared with A.
    pub b: Vec<Setting>,
    /// When enough was seen.
    #[serde(default)]
    pub rule: Rule,
    /// What predictions may lose, where they may.
    #[serde(default)]
    pub quality: QualityRule,
}

impl Lever {
    /// Reads a lever from the text of the file `name.toml`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(name: &str, text: &str) -> Result<Self, Error> {
        let form = |what: String| Error::Form { name: name.to_owned(), what };
        let lever: Lever = basic_toml::from_str(text).map_err(|e| form(e.to_string()))?;
        if lever.b.is_empty() {
            return Err(form("[[b]] is missing, expected one at least".to_owned()));
        }
        if lever.tokens < 2 || lever.prompt < 2 {
            let found = format!("tokens is {} and prompt {}, expected 2 or more", lever.tokens, lever.prompt);
            return Err(form(found));
        }
        let rule = &lever.rule;
        let sane = (1e-3..1.0).contains(&rule.minimum_effect)
            && (0.5..1.0).contains(&rule.confidence)
            && rule.min_pairs >= 5
            && rule.max_pairs >= rule.min_pairs
            && rule.max_seconds > 0.0
            && rule.running_per_building >= 0.0;
        if !sane {
            return Err(form(format!(
                "rule is {rule:?}, expected minimum_effect 0.001 to 1, confidence 0.5 to 1, 5 pairs or more, max_pairs not below min_pairs, max_seconds above 0, running_per_building 0 or more"
            )));
        }
        let settings = lever.b.iter().chain([&lever.a, &lever.common]);
        for setting in settings {
            check(setting).map_err(&form)?;
        }
        Ok(Lever { name: name.to_owned(), ..lever })
    }
}

/// Words and ranges of a setting.
fn check(setting: &Setting) -> Result<(), String> {
    let word = |what: &str, value: &Option<String>, known: &[&str]| match value {
        Some(value) if !known.contains(&value.as_str()) => {
            Err(format!("{what} is {value}, expected one of {}", known.join(", ")))
        }
        _ => Ok(()),
    };
    word("speculate", &setting.speculate, &["off", "ngram", "mtp", "auto", "draft"])?;
    word("cache", &setting.cache, &["bf16", "f32"])?;
    word("activations", &setting.activations, &["int8", "exact"])?;
    word("prefix", &setting.prefix, &["cold", "warm", "disk"])?;
    word("backend", &setting.backend, &["cpu", "cuda", "wgpu"])?;
    word("steps", &setting.steps, &["recorded", "launched", "persistent"])?;
    let share = |what: &str, value: Option<f64>| match value {
        Some(value) if !(0.0..1.0).contains(&value) => Err(format!("{what} is {value}, expected 0 to 1")),
        _ => Ok(()),
    };
    share("prune", setting.prune)?;
    share("slowdown", setting.slowdown)?;
    if setting.index_topk_factor.is_some_and(|factor| !(factor > 0.0 && factor.is_finite())) {
        return Err("index-topk-factor is not positive, expected a positive number".to_owned());
    }
    let positive = |what: &str, value: Option<usize>| match value {
        Some(0) => Err(format!("{what} is 0, expected 1 or more")),
        _ => Ok(()),
    };
    positive("batch", setting.batch)?;
    positive("threads", setting.threads)?;
    positive("concurrent", setting.concurrent)?;
    positive("draft-depth", setting.draft_depth)
}

/// Names and texts of files in `levers/`.
macro_rules! built_in {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../levers/", $name, ".toml")))),*]
    };
}

/// Name and text of every lever that is part of the program.
const BUILT_IN: &[(&str, &str)] = built_in![
    "activations",
    "active-experts",
    "batch-copies",
    "batch-distinct",
    "batch-identical",
    "cuda-graph",
    "cuda-wgpu",
    "draft-model",
    "fused-experts",
    "huge-pages",
    "index-topk",
    "kv-format",
    "mtp",
    "ngram",
    "nvfp4",
    "persistent-kernel",
    "prefix-cache",
    "prefix-concurrent",
    "pruning",
    "serving",
    "speculation-auto",
    "thinking",
    "threads",
    "weight-format",
];

/// All levers by name: those of the program, and those of `folder` instead or besides.
///
/// # Errors
/// A folder that cannot be read, or a file that is no lever.
pub fn all(folder: Option<&Path>) -> Result<BTreeMap<String, Lever>, Error> {
    let mut levers = BTreeMap::new();
    for (name, text) in BUILT_IN {
        levers.insert((*name).to_owned(), Lever::parse(name, text)?);
    }
    let Some(folder) = folder else { return Ok(levers) };
    let io = |path: &Path| {
        let path = path.display().to_string();
        move |source| Error::Io { path, source }
    };
    for entry in std::fs::read_dir(folder).map_err(io(folder))? {
        let path = entry.map_err(io(folder))?.path();
        if path.extension().is_none_or(|ending| ending != "toml") {
            continue;
        }
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let text = std::fs::read_to_string(&path).map_err(io(&path))?;
        levers.insert(name.clone(), Lever::parse(&name, &text)?);
    }
    Ok(levers)
}

/// What a lever is worth here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It is faster, and what it must keep is kept.
    Keep,
    /// It is not faster, or it costs more quality than its rule allows.
    Drop,
    /// The machine did not let it be decided.
    Undecided,
    /// It cannot be tried here.
    NotApplicable,
}

impl Verdict {
    /// The words that tables use.
    pub const fn name(self) -> &'static str {
        match self {
            Verdict::Keep => "keep",
            Verdict::Drop => "drop",
            Verdict::Undecided => "undecided",
            Verdict::NotApplicable => "not applicable",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str =
        "title = 't'\nhypothesis = 'h'\nunit = 'x'\nworkload = 'decode'\nlossless = true\ntokens = 8\nprompt = 8\n";

    #[test]
    fn every_built_in_lever_is_one() {
        let levers = all(None).unwrap();
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../levers");
        let files = std::fs::read_dir(&folder).unwrap().flatten();
        let files = files.map(|f| f.path()).filter(|path| path.extension().is_some_and(|ending| ending == "toml"));
        let mut names: Vec<String> = files.map(|f| f.file_stem().unwrap().to_string_lossy().into_owned()).collect();
        names.sort();
        // A file that is not in the list would be forgotten by the program.
        assert_eq!(levers.keys().cloned().collect::<Vec<_>>(), names);
        // Each of the notes' nine levers is tested again.
        assert!(levers.values().filter(|lever| lever.notes.is_some()).count() >= 9);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let error = |text: &str| Lever::parse("mine", &format!("{MINIMAL}{text}")).unwrap_err().to_string();
        assert!(error("").contains("missing field `b`"), "{}", error(""));
        assert!(
            error("[[b]]\nspeculate = 'maybe'\n")
                .ends_with("speculate is maybe, expected one of off, ngram, mtp, auto, draft")
        );
        assert!(error("[[b]]\nprune = 1.5\n").ends_with("prune is 1.5, expected 0 to 1"));
        assert!(error("[[b]]\nbatch = 0\n").ends_with("batch is 0, expected 1 or more"));
        assert!(error("[[b]]\nspeed = 2\n").contains("unknown field `speed`"));
        assert!(error("[[b]]\n[rule]\nminimum_effect = 0.0\n").contains("expected minimum_effect 0.001 to 1"));
    }

    #[test]
    fn settings_are_merged_and_named() {
        let a = Setting { batch: Some(8), cache: Some("bf16".to_owned()), ..Setting::default() };
        let b = a.with(&Setting { batch: Some(2), ..Setting::default() });
        assert_eq!((b.batch, b.cache.as_deref()), (Some(2), Some("bf16")));
        assert_eq!(b.label(), "batch 2, cache bf16");
        assert_eq!(Setting::default().label(), "as it is");
    }

    #[test]
    fn a_folder_adds_and_replaces() {
        let folder = std::env::temp_dir().join(format!("moellon-levers-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("mine.toml"), format!("{MINIMAL}[[b]]\nbatch = 2\n")).unwrap();
        let levers = all(Some(&folder)).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        assert_eq!(levers["mine"].b[0].batch, Some(2));
        assert_eq!(levers.len(), all(None).unwrap().len() + 1);
    }
}
