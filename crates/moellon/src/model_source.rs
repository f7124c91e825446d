//! Where a model comes from: a directory, or the one that is part of the program.

use anyhow::{Context, Result};
use moellon_checkpoint::Checkpoint;
use moellon_model::{ModelConfig, arch};
use moellon_text::{ChatTemplate, Tokenizer};
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;

/// The bundled model's files, embedded so that an installed `moellon` runs anywhere.
mod bundled {
    macro_rules! file {
        ($name:literal) => {
            include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/moellon-tiny/", $name))
        };
    }
    pub(super) const CONFIG: &[u8] = file!("config.json");
    pub(super) const GENERATION_CONFIG: &[u8] = file!("generation_config.json");
    pub(super) const TOKENIZER: &[u8] = file!("tokenizer.json");
    pub(super) const TOKENIZER_CONFIG: &[u8] = file!("tokenizer_config.json");
    pub(super) const CHAT_TEMPLATE: &[u8] = file!("chat_template.jinja");
    pub(super) const WEIGHTS: &[u8] = file!("model.safetensors");
}

/// Name of the bundled model.
pub const BUNDLED_NAME: &str = "moellon-tiny (bundled)";

/// A model that is open but not loaded.
pub struct ModelSource {
    /// Directory or [`BUNDLED_NAME`].
    pub name: String,
    /// Its tensors.
    pub checkpoint: Checkpoint,
    /// Its numbers.
    pub config: ModelConfig,
    /// `generation_config.json`, or null.
    pub generation_config: Value,
}

impl ModelSource {
    /// Opens `directory`, or the bundled model without one.
    pub fn open(directory: Option<&Path>) -> Result<Self> {
        let (name, checkpoint, generation_config) = match directory {
            Some(directory) => {
                let checkpoint = Checkpoint::open(directory)?;
                let generation_config = checkpoint.generation_config.clone().unwrap_or(Value::Null);
                (directory.display().to_string(), checkpoint, generation_config)
            }
            None => {
                let checkpoint =
                    Checkpoint::embedded(BUNDLED_NAME, bundled::CONFIG, &[("model.safetensors", bundled::WEIGHTS)])?;
                let generation_config =
                    serde_json::from_slice(bundled::GENERATION_CONFIG).context("bundled generation_config.json")?;
                (BUNDLED_NAME.to_owned(), checkpoint, generation_config)
            }
        };
        let config = arch::parse(&checkpoint.config).with_context(|| name.clone())?;
        Ok(ModelSource { name, checkpoint, config, generation_config })
    }

    /// Files that go with a model that is made of this one: tokenizer, chat template, generation config, an earlier
    /// receipt. All files of the directory but weights, `config.json`, hidden ones and what is larger than 64 MiB.
    pub fn companion_files(&self, directory: Option<&Path>) -> Result<Vec<(String, Vec<u8>)>> {
        const LARGEST_BYTES: u64 = 64 << 20;
        let Some(directory) = directory else {
            let files = [
                ("generation_config.json", bundled::GENERATION_CONFIG),
                ("tokenizer.json", bundled::TOKENIZER),
                ("tokenizer_config.json", bundled::TOKENIZER_CONFIG),
                ("chat_template.jinja", bundled::CHAT_TEMPLATE),
            ];
            return Ok(files.map(|(name, bytes)| (name.to_owned(), bytes.to_vec())).into());
        };
        let mut files = Vec::new();
        for entry in std::fs::read_dir(directory).with_context(|| directory.display().to_string())? {
            let path = entry?.path();
            let Some(name) = path.file_name().and_then(|name| name.to_str()).map(str::to_owned) else { continue };
            let weights = name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json");
            if weights || name == "config.json" || name.starts_with('.') {
                continue;
            }
            let metadata = std::fs::metadata(&path).with_context(|| path.display().to_string())?;
            if metadata.is_file() && metadata.len() <= LARGEST_BYTES {
                files.push((name, std::fs::read(&path).with_context(|| path.display().to_string())?));
            }
        }
        files.sort();
        Ok(files)
    }

    /// Its tokenizer, checked against the model's vocabulary.
    pub fn tokenizer(&self, directory: Option<&Path>) -> Result<Arc<Tokenizer>> {
        let tokenizer = match directory {
            Some(directory) => Tokenizer::from_folder(directory)?,
            None => Tokenizer::from_bytes(bundled::TOKENIZER, Some(bundled::TOKENIZER_CONFIG))?,
        };
        tokenizer.check_vocab(self.config.vocab_size)?;
        Ok(Arc::new(tokenizer))
    }

    /// Its chat template and the template's source: `chat_template.jinja`, else the one in `tokenizer_config.json`.
    pub fn chat_template(
        &self,
        directory: Option<&Path>,
        tokenizer: &Tokenizer,
    ) -> Result<Option<(ChatTemplate, String)>> {
        let source = match directory {
            Some(directory) => match std::fs::read_to_string(directory.join("chat_template.jinja")) {
                Ok(source) => Some(source),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    tokenizer.config().chat_template("default").map(str::to_owned)
                }
                Err(error) => {
                    return Err(error).with_context(|| format!("{}/chat_template.jinja", directory.display()));
                }
            },
            None => {
                Some(std::str::from_utf8(bundled::CHAT_TEMPLATE).context("bundled chat_template.jinja")?.to_owned())
            }
        };
        let Some(source) = source else { return Ok(None) };
        Ok(Some((ChatTemplate::new(&source, tokenizer.config().special_tokens())?, source)))
    }

    /// Tokens that end a generation: what `generation_config.json`, `config.json` and the tokenizer say, together.
    pub fn stop_ids(&self, tokenizer: &Tokenizer) -> Vec<u32> {
        let configured = match self.generation_config.get("eos_token_id") {
            Some(Value::Array(ids)) => {
                ids.iter().filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()).collect()
            }
            Some(id) => id.as_u64().and_then(|id| u32::try_from(id).ok()).into_iter().collect(),
            None => Vec::new(),
        };
        let mut ids: Vec<u32> =
            configured.into_iter().chain(self.config.eos_token_ids.iter().copied()).chain(tokenizer.eos_id()).collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// The name that clients use: the directory's last part.
    pub fn api_name(&self) -> String {
        let last = Path::new(&self.name).file_name().map_or(self.name.clone(), |n| n.to_string_lossy().into_owned());
        last.split_whitespace().next().unwrap_or("model").to_owned()
    }

    /// A number of `generation_config.json`.
    pub fn generation_number(&self, key: &str) -> Option<f64> {
        self.generation_config.get(key).and_then(Value::as_f64)
    }
}
