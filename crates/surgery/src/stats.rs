//! What a calibration measured, as a directory of safetensors with a `config.json`.
//!
//! | tensor | shape | what |
//! |---|---|---|
//! | `INPUT.tokens` | `[count]` u32 | rows that each matrix saw |
//! | `INPUT.input_sq` | `[count, cols]` f32 | `E[x²]` of every input channel |
//! | `INPUT.moments` | `[1 or count, cols, cols]` f32 | `E[x xᵀ]`, for all matrices together or each |
//! | `BLOCK.saliency` | `[5, num_experts]` f32 | sums over routed rows: gate, gate x norm, norm, (gate x norm)², and the largest norm |
//!
//! `INPUT` is the name of a module; modules that read the same values are listed under `aliases` in `config.json`.
//! `BLOCK` is a MoE block such as `model.layers.3.mlp`.

use crate::{Error, Result};
use moellon_checkpoint::Checkpoint;
use moellon_tensor::{Dtype, ScaleDtype};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// Key of `config.json` that says what this directory is.
pub(crate) const KEY: &str = "moellon_stats";

/// How second moments are kept as matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MomentsMode {
    /// Not at all: importance of channels only.
    None,
    /// One a layer for the experts' gate and up, one an expert for down: what large models can afford.
    Layer,
    /// One an expert.
    Expert,
}

/// What was calibrated.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StatsInfo {
    /// Version of this layout: 1.
    pub schema: u32,
    /// Name of the model.
    pub model: String,
    /// Its [`Checkpoint::identity`].
    pub identity: String,
    /// Names and SHA-256 of the texts.
    pub texts: Vec<[String; 2]>,
    /// Tokens that went through.
    pub tokens: u64,
    /// Tokens of a sequence at most.
    pub sequence_len: usize,
    /// How moments are kept.
    pub moments: MomentsMode,
    /// Module to the name that its input's statistics have, where that is another module's.
    pub aliases: BTreeMap<String, String>,
}

/// An open calibration.
#[derive(Debug)]
pub struct Stats {
    /// What was calibrated.
    pub info: StatsInfo,
    tensors: Checkpoint,
}

/// Saliency sums of the experts of one block.
#[derive(Debug, Clone, PartialEq)]
pub struct Saliency {
    /// Rows routed to each expert.
    pub tokens: Vec<u32>,
    /// Sum of combine weights.
    pub gate: Vec<f32>,
    /// Sum of combine weight times output norm.
    pub gate_norm: Vec<f32>,
    /// Sum of output norms.
    pub norm: Vec<f32>,
    /// Sum of squares of combine weight times output norm.
    pub gate_norm_sq: Vec<f32>,
    /// Largest output norm.
    pub norm_max: Vec<f32>,
}

impl Stats {
    /// Opens a directory that `calibrate` made.
    ///
    /// # Errors
    /// If it is none.
    pub fn open(dir: &Path) -> Result<Self> {
        let tensors = Checkpoint::open(dir)?;
        let path = dir.join("config.json");
        let info = tensors.config.get(KEY).cloned().unwrap_or(Value::Null);
        if info.is_null() {
            return Err(Error::mismatch(
                format!("{}: {KEY}", path.display()),
                "missing",
                "what `moellon calibrate` writes",
            ));
        }
        let info: StatsInfo = serde_json::from_value(info).map_err(|e| Error::json(&path, e))?;
        if info.schema != 1 {
            return Err(Error::mismatch(format!("{}: schema", path.display()), info.schema, 1));
        }
        Ok(Stats { info, tensors })
    }

    /// Checks that the calibration is of this checkpoint.
    ///
    /// # Errors
    /// If it is of another.
    pub fn check_model(&self, checkpoint: &Checkpoint) -> Result<()> {
        let identity = checkpoint.identity();
        if self.info.identity != identity {
            let found = format!("{} ({})", self.info.identity, self.info.model);
            return Err(Error::mismatch("identity of the calibrated model", found, identity));
        }
        Ok(())
    }

    /// A hash of everything in it.
    pub(crate) fn identity(&self) -> String {
        self.tensors.content_hash()
    }

    /// The name under which a module's input is found.
    pub(crate) fn key<'a>(&'a self, module: &'a str) -> &'a str {
        self.info.aliases.get(module).map_or(module, String::as_str)
    }

    /// Rows that each matrix of a module saw; `None` if the calibration has nothing on it.
    pub fn tokens(&self, module: &str) -> Option<Vec<u32>> {
        let tensor = self.tensors.tensor(&format!("{}.tokens", self.key(module)))?;
        Some(tensor.bytes.as_chunks().0.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect())
    }

    /// `E[x²]`, one row a matrix (or one for all).
    pub fn input_sq(&self, module: &str) -> Option<Vec<Vec<f32>>> {
        self.matrix(&format!("{}.input_sq", self.key(module)))
    }

    /// How many matrices `E[x xᵀ]` there are: none, one for all matrices of the module, or one each.
    pub fn num_moments(&self, module: &str) -> usize {
        self.tensors.tensor(&format!("{}.moments", self.key(module))).map_or(0, |tensor| tensor.shape[0])
    }

    /// `E[x xᵀ]` number `index`, read from the file now.
    pub fn moments(&self, module: &str, index: usize) -> Option<Vec<f32>> {
        let tensor = self.tensors.tensor(&format!("{}.moments", self.key(module)))?;
        if tensor.dtype != Dtype::F32 {
            return None;
        }
        let size_bytes = tensor.bytes.len().checked_div(*tensor.shape.first()?)?;
        let bytes = tensor.bytes.get(index * size_bytes..(index + 1) * size_bytes)?;
        let mut values = vec![0.0; size_bytes / 4];
        ScaleDtype::F32.read_slice(bytes, 0, &mut values);
        self.tensors.release(bytes);
        Some(values)
    }

    /// The saliency sums of a block's experts.
    ///
    /// # Errors
    /// If the calibration has none.
    pub fn saliency(&self, block: &str) -> Result<Saliency> {
        let missing = || Error::mismatch(format!("calibration of the experts of {block}"), "missing", "sums for each");
        let rows = self.matrix(&format!("{block}.saliency")).ok_or_else(missing)?;
        let tokens = self.tokens(&format!("{block}.experts.gate_proj")).ok_or_else(missing)?;
        let [gate, gate_norm, norm, gate_norm_sq, norm_max] = <[Vec<f32>; 5]>::try_from(rows).map_err(|_| missing())?;
        Ok(Saliency { tokens, gate, gate_norm, norm, gate_norm_sq, norm_max })
    }

    /// A float tensor, cut along its first dimension.
    fn matrix(&self, name: &str) -> Option<Vec<Vec<f32>>> {
        let tensor = self.tensors.tensor(name).filter(|tensor| tensor.dtype == Dtype::F32)?;
        let count = *tensor.shape.first()?;
        let mut values = vec![0.0; tensor.bytes.len() / 4];
        ScaleDtype::F32.read_slice(tensor.bytes, 0, &mut values);
        self.tensors.release(tensor.bytes);
        let len = values.len().checked_div(count)?;
        (len > 0).then(|| values.chunks_exact(len).map(<[f32]>::to_vec).collect())
    }
}
