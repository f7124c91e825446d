//! Receipts: the record of a measurement, as one JSON file that says by its own hash whether anybody changed it.
//!
//! The layout is `docs/receipts.md`, and for programs `docs/receipt.schema.json`. The hash is the first member,
//! `content_sha256`: SHA-256 of the file's text without that member and without white space between tokens. It is a hash of
//! the text and not of values, so that no reader has to agree with another about how numbers are written. Receipts of schema 1,
//! written by scripts, need not carry it.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::path::Path;

/// What this program writes.
pub const SCHEMA: u64 = 2;

const MEMBER: &str = "\"content_sha256\":";

/// A receipt that is none.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// Which.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is no JSON.
    #[error("{path}: {source}")]
    Json {
        /// Which.
        path: String,
        /// Where and what.
        source: serde_json::Error,
    },
    /// It is JSON, but no receipt.
    #[error("{path}: {what}: found {found}, expected {expected}")]
    Form {
        /// Which.
        path: String,
        /// Which member.
        what: String,
        /// What it is.
        found: String,
        /// What it should be.
        expected: String,
    },
}

/// Where and by what something was measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// `git rev-parse HEAD` of the source, `-dirty` behind it where files differ; null outside a checkout.
    pub commit: Option<String>,
    /// SHA-256 of the program that measured.
    pub binary_sha256: String,
    /// Its version.
    pub version: String,
    /// The machine and its read bandwidth, measured then.
    pub machine: MeasuredMachine,
}

/// A machine and what its memory gave.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MeasuredMachine {
    /// Processor model.
    pub cpu: String,
    /// Cores that the program may use.
    pub cores: usize,
    /// Instructions that the CPU back end used.
    pub cpu_level: String,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Operating system and architecture.
    pub os: String,
    /// GPUs by name.
    pub gpus: Vec<String>,
    /// Version of the GPU driver; null without one.
    pub driver: Option<String>,
    /// Decimal gigabytes a second that all threads read.
    pub read_gb_s: f64,
    /// The same with one thread.
    pub read_gb_s_1_thread: f64,
    /// The back end and its device where that is no CPU: `cuda: NVIDIA H200, ..`.
    #[serde(default)]
    pub device: Option<String>,
    /// Decimal gigabytes a second that the device reads from its own memory.
    #[serde(default)]
    pub device_read_gb_s: Option<f64>,
}

impl MeasuredMachine {
    /// GB/s of the memory that models are computed from.
    pub fn model_read_gb_s(&self) -> f64 {
        self.device_read_gb_s.unwrap_or(self.read_gb_s)
    }
}

/// The model that was measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MeasuredModel {
    /// Directory, preset or name.
    pub name: String,
    /// Hash of its weights and config; null for random weights.
    pub sha256: Option<String>,
    /// Formats of its parts in words.
    pub format: String,
    /// Bytes of weights that one token reads.
    pub bytes_per_token: f64,
}

/// A receipt's text: the members of `value` behind the hash over them.
pub fn seal(value: &Value) -> String {
    let text = serde_json::to_string_pretty(value).expect("a JSON value is printable");
    sealed(&text)
}

/// `text`, a JSON object without a hash, with its hash as the first member.
fn sealed(text: &str) -> String {
    let hash = hash(&compact(text));
    let body = text.trim_start().strip_prefix('{').unwrap_or(text);
    format!("{{\n  {MEMBER} \"{hash}\",{}\n", body.trim_end())
}

/// JSON text without white space between its tokens.
fn compact(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let (mut in_string, mut escaped) = (false, false);
    for c in text.chars() {
        if in_string {
            out.push(c);
            (in_string, escaped) = (escaped || c != '"', c == '\\' && !escaped);
        } else if !c.is_ascii_whitespace() {
            in_string = c == '"';
            out.push(c);
        }
    }
    out
}

fn hash(compact: &str) -> String {
    Sha256::digest(compact.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What verification found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seal {
    /// The hash is that of the content.
    Intact(String),
    /// The content is not what was sealed.
    Broken {
        /// The hash that it carries.
        stated: String,
        /// The hash that it has.
        found: String,
    },
    /// It carries none: schema 1.
    None,
}

/// A receipt as it was read.
#[derive(Debug, Clone)]
pub struct Receipt {
    /// File name without the ending.
    pub name: String,
    /// Version of its layout.
    pub schema: u64,
    /// What its hash says.
    pub seal: Seal,
    /// All members.
    pub value: Value,
}

impl Receipt {
    /// Reads the receipt `path`.
    ///
    /// # Errors
    /// A file that cannot be read, or is no receipt of schema 1 or 2.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let text =
            std::fs::read_to_string(path).map_err(|source| Error::Io { path: path.display().to_string(), source })?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        Self::parse(&name, &text).map_err(|error| match error {
            Error::Json { source, .. } => Error::Json { path: path.display().to_string(), source },
            Error::Form { what, found, expected, .. } => {
                Error::Form { path: path.display().to_string(), what, found, expected }
            }
            io @ Error::Io { .. } => io,
        })
    }

    /// Reads a receipt's text.
    ///
    /// # Errors
    /// As [`Receipt::read`].
    pub fn parse(name: &str, text: &str) -> Result<Self, Error> {
        let value: Value =
            serde_json::from_str(text).map_err(|source| Error::Json { path: name.to_owned(), source })?;
        let form = |what: &str, found: String, expected: &str| Error::Form {
            path: name.to_owned(),
            what: what.to_owned(),
            found,
            expected: expected.to_owned(),
        };
        let schema = value["schema"]
            .as_u64()
            .filter(|schema| (1..=SCHEMA).contains(schema))
            .ok_or_else(|| form("schema", value["schema"].to_string(), "1 or 2"))?;
        for (member, is_kind) in required(schema) {
            if !is_kind(&value[member]) {
                return Err(form(member, short(&value[member]), "what docs/receipts.md says"));
            }
        }
        let compact = compact(text);
        let seal = match compact.strip_prefix('{').and_then(|rest| rest.strip_prefix(MEMBER)) {
            None if value.get("content_sha256").is_some() => {
                return Err(form("content_sha256", "another place".to_owned(), "the first member"));
            }
            None if schema >= 2 => return Err(form("content_sha256", "nothing".to_owned(), "the first member")),
            None => Seal::None,
            Some(rest) => {
                let stated = rest.strip_prefix('"').and_then(|rest| rest.split_once("\","));
                let (stated, body) =
                    stated.ok_or_else(|| form("content_sha256", short(&value["content_sha256"]), "a string"))?;
                match hash(&format!("{{{body}")) {
                    found if found == stated => Seal::Intact(found),
                    found => Seal::Broken { stated: stated.to_owned(), found },
                }
            }
        };
        Ok(Receipt { name: name.to_owned(), schema, seal, value })
    }

    /// The first characters of the hash, for tables; `-` without one.
    pub fn short_hash(&self) -> &str {
        match &self.seal {
            Seal::Intact(hash) => &hash[..12],
            Seal::Broken { .. } => "broken",
            Seal::None => "-",
        }
    }
}

type Check = fn(&Value) -> bool;

/// Members that every receipt of a schema has, and of what kind they are.
fn required(schema: u64) -> Vec<(&'static str, Check)> {
    let mut members: Vec<(&'static str, Check)> = vec![
        ("name", Value::is_string),
        ("date", Value::is_string),
        ("commit", |v| v.is_string() || v.is_null()),
        ("binary_sha256", Value::is_string),
        ("machine", Value::is_object),
        ("steal_pct", Value::is_number),
        ("commands", Value::is_array),
        ("samples", |v| v.is_array() || v.is_object()),
        ("tables", Value::is_object),
    ];
    if schema < 2 {
        // Schema 1 had null where a protocol was tested, and nothing measured.
        let nullable: [(&'static str, Check); 3] = [
            ("binary_sha256", |v| v.is_string() || v.is_null()),
            ("machine", |v| v.is_object() || v.is_null()),
            ("steal_pct", |v| v.is_number() || v.is_null()),
        ];
        members.retain(|(name, _)| nullable.iter().all(|(other, _)| other != name));
        members.extend(nullable);
    } else {
        members.extend([
            ("kind", Value::is_string as Check),
            ("version", Value::is_string),
            ("model", |v| v.is_object() || v.is_null()),
            ("verdicts", Value::is_array),
        ]);
    }
    members
}

fn short(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() > 60 { format!("{}..", text.chars().take(60).collect::<String>()) } else { text }
}

/// The text of a receipt of schema 1 with its hash put in: nothing else of it changes.
///
/// # Errors
/// As [`Receipt::parse`], and for one that is sealed already.
pub fn seal_text(name: &str, text: &str) -> Result<String, Error> {
    match Receipt::parse(name, text)?.seal {
        Seal::None => Ok(sealed(text)),
        Seal::Intact(hash) | Seal::Broken { stated: hash, .. } => Err(Error::Form {
            path: name.to_owned(),
            what: "content_sha256".to_owned(),
            found: hash,
            expected: "none: a sealed receipt is not sealed again".to_owned(),
        }),
    }
}

/// One difference between two receipts.
#[derive(Debug, Clone, PartialEq)]
pub struct Difference {
    /// Path of the member, `a.b[3].c`.
    pub path: String,
    /// In the first; `None` where it has none.
    pub before: Option<Value>,
    /// In the second.
    pub after: Option<Value>,
}

/// Where two receipts differ, leaf by leaf, the hash aside.
pub fn diff(before: &Value, after: &Value) -> Vec<Difference> {
    let mut differences = Vec::new();
    compare("", Some(before), Some(after), &mut differences);
    differences.retain(|d| d.path != "content_sha256");
    differences
}

fn compare(path: &str, before: Option<&Value>, after: Option<&Value>, out: &mut Vec<Difference>) {
    match (before, after) {
        (Some(Value::Object(a)), Some(Value::Object(b))) => {
            let keys = a.keys().chain(b.keys().filter(|key| !a.contains_key(*key)));
            for key in keys {
                let inner = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                compare(&inner, a.get(key), b.get(key), out);
            }
        }
        (Some(Value::Array(a)), Some(Value::Array(b))) => {
            for i in 0..a.len().max(b.len()) {
                compare(&format!("{path}[{i}]"), a.get(i), b.get(i), out);
            }
        }
        (a, b) if a == b => {}
        (a, b) => out.push(Difference { path: path.to_owned(), before: a.cloned(), after: b.cloned() }),
    }
}

/// Writes a receipt: temporary name, sync, rename.
///
/// # Errors
/// A folder that cannot be written.
pub fn write(path: &Path, text: &str) -> Result<(), Error> {
    let io = |source| Error::Io { path: path.display().to_string(), source };
    let temporary = path.with_extension("json.tmp");
    let mut file = std::fs::File::create(&temporary).map_err(io)?;
    std::io::Write::write_all(&mut file, text.as_bytes()).map_err(io)?;
    file.sync_all().map_err(io)?;
    std::fs::rename(&temporary, path).map_err(io)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn example() -> Value {
        json!({
            "schema": 2, "kind": "lever", "name": "x", "date": "2026-01-01", "commit": null, "version": "0.1.0",
            "binary_sha256": "ab", "machine": {}, "model": null, "steal_pct": 0.5, "commands": [], "samples": [],
            "tables": {"t": [{"a b": "1 \" {", "n": 1e-7}]}, "verdicts": [],
        })
    }

    #[test]
    fn a_seal_holds_and_breaks() {
        let text = seal(&example());
        let receipt = Receipt::parse("x", &text).unwrap();
        let Seal::Intact(found) = &receipt.seal else { panic!("{:?}", receipt.seal) };
        assert_eq!(receipt.short_hash(), &found[..12]);
        assert_eq!(receipt.value["tables"], example()["tables"]);
        // White space between tokens is no content; everything else is.
        let spaced = text.replace(": ", " :\n  ");
        assert_eq!(Receipt::parse("x", &spaced).unwrap().seal, receipt.seal);
        for (from, to) in [("0.5", "0.4"), ("1 \\\" {", "1 \\\"  {"), ("lever", "Lever")] {
            let changed = text.replace(from, to);
            assert_ne!(changed, text);
            assert!(matches!(Receipt::parse("x", &changed).unwrap().seal, Seal::Broken { .. }), "{from}");
        }
    }

    #[test]
    fn the_hash_is_what_the_document_says() {
        // printf '%s' '{"schema":1,..' | sha256sum
        let text = "{\"a\": 1,\n \"b\": \"c d\"}";
        assert_eq!(compact(text), "{\"a\":1,\"b\":\"c d\"}");
        let expected: String = Sha256::digest(b"{\"a\":1,\"b\":\"c d\"}").iter().map(|b| format!("{b:02x}")).collect();
        assert!(sealed(text).starts_with(&format!("{{\n  \"content_sha256\": \"{expected}\",\"a\": 1,")));
    }

    #[test]
    fn older_receipts_are_read_and_can_be_sealed_once() {
        let mut value = example();
        value["schema"] = json!(1);
        let text = serde_json::to_string_pretty(&value).unwrap();
        assert_eq!(Receipt::parse("x", &text).unwrap().seal, Seal::None);
        let sealed = seal_text("x", &text).unwrap();
        assert!(matches!(Receipt::parse("x", &sealed).unwrap().seal, Seal::Intact(_)));
        let error = seal_text("x", &sealed).unwrap_err().to_string();
        assert!(error.ends_with("expected none: a sealed receipt is not sealed again"), "{error}");
    }

    #[test]
    fn what_is_no_receipt_is_refused_by_name() {
        let error = |value: &Value| Receipt::parse("x", &value.to_string()).unwrap_err().to_string();
        let mut value = example();
        assert_eq!(error(&value), "x: content_sha256: found nothing, expected the first member");
        value["steal_pct"] = json!("much");
        assert_eq!(error(&value), "x: steal_pct: found \"much\", expected what docs/receipts.md says");
        value["schema"] = json!(3);
        assert_eq!(error(&value), "x: schema: found 3, expected 1 or 2");
    }

    #[test]
    fn differences_have_paths() {
        let (a, mut b) = (example(), example());
        assert_eq!(diff(&a, &b), []);
        b["tables"]["t"][0]["n"] = json!(2);
        b["samples"] = json!([1]);
        let paths: Vec<String> = diff(&a, &b).into_iter().map(|d| d.path).collect();
        assert_eq!(paths, ["samples[0]", "tables.t[0].n"]);
    }

    #[test]
    fn committed_receipts_hold() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../receipts");
        let mut count = 0;
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            let path = entry.path();
            if path.extension().is_some_and(|ending| ending == "json") {
                let receipt = Receipt::read(&path).unwrap();
                assert!(!matches!(receipt.seal, Seal::Broken { .. }), "{}: {:?}", receipt.name, receipt.seal);
                count += 1;
            }
        }
        assert!(count > 0);
    }
}
