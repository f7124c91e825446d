//! Flags of the surgery commands.

use crate::cli::{DeviceOptions, ModelOptions};
use clap::{Args, ValueEnum};
use std::path::PathBuf;

/// How codes are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MethodChoice {
    /// To nearest, bit for bit as MLX.
    Rtn,
    /// Scales with the least error, weighted by the calibration if there is one.
    Search,
    /// The search, then error feedback; needs a calibration with moments.
    Gptq,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    On,
    Off,
}

#[derive(Debug, Args)]
pub struct QuantizeOptions {
    #[command(flatten)]
    pub model: ModelOptions,
    /// Where to write: a new directory.
    #[arg(short, long, value_name = "DIR")]
    pub out: PathBuf,
    /// One format for everything but routers and norms: affine-2..6 or -8 (with -g32, -g64, -g128), nvfp4, mxfp4, mxfp8,
    /// fp8, bf16.
    #[arg(long, value_name = "FORMAT", required_unless_present = "plan", conflicts_with = "plan")]
    pub format: Option<String>,
    /// A plan: a file that `moellon plan` wrote, or a preset: q3a4, v59, or keep (the same numbers in MLX's layout).
    #[arg(long, value_name = "FILE|PRESET")]
    pub plan: Option<String>,
    /// What `moellon calibrate` wrote for this model.
    #[arg(long, value_name = "DIR")]
    pub stats: Option<PathBuf>,
    /// How codes are chosen; by default gptq with a calibration that has moments, else search.
    #[arg(long, value_name = "METHOD")]
    pub method: Option<MethodChoice>,
    /// Whether NVFP4 matrices get a global scale.
    #[arg(long, default_value = "on", value_name = "SWITCH")]
    pub nvfp4_global_scale: Switch,
    /// Size of shards. A killed run loses the shard that was being written.
    #[arg(long, default_value_t = 1.0, value_name = "GB")]
    pub shard_gb: f64,
}

/// Which texts, and how they are cut.
#[derive(Debug, Args)]
pub struct TextOptions {
    /// Text files; several after one flag or several flags.
    #[arg(long, num_args = 1.., value_name = "FILE")]
    pub text: Vec<PathBuf>,
    /// Tokens of all texts together at most; texts take turns.
    #[arg(long, default_value_t = 131_072, value_name = "N")]
    pub max_tokens: usize,
    /// Tokens of a sequence at most; texts are cut.
    #[arg(long, default_value_t = 1024, value_name = "N")]
    pub sequence: usize,
}

/// How second moments of inputs are kept as matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MomentsChoice {
    /// Not at all: importance of channels only. Small files.
    None,
    /// For the hidden state one a layer, for experts' inner width one an expert.
    Layer,
    /// One an expert everywhere: for models with small hidden states.
    Expert,
}

#[derive(Debug, Args)]
pub struct CalibrateOptions {
    #[command(flatten)]
    pub model: ModelOptions,
    #[command(flatten)]
    pub device: DeviceOptions,
    #[command(flatten)]
    pub texts: TextOptions,
    /// Where to write: a new directory.
    #[arg(short, long, value_name = "DIR")]
    pub out: PathBuf,
    /// How second moments of inputs are kept as matrices; error feedback needs them.
    #[arg(long, default_value = "layer", value_name = "MODE")]
    pub moments: MomentsChoice,
}

#[derive(Debug, Args)]
pub struct CompareOptions {
    #[command(flatten)]
    pub model: ModelOptions,
    /// The model to compare with, e.g. the original; without it, the bundled model.
    #[arg(long = "ref", value_name = "DIR")]
    pub reference: Option<PathBuf>,
    #[command(flatten)]
    pub device: DeviceOptions,
    #[command(flatten)]
    pub texts: TextOptions,
    /// Also draw the distribution of the divergence and the layers' signal to noise, as SVG.
    #[arg(long, value_name = "FILE")]
    pub picture: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// What an expert is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum ScoreChoice {
    /// Mean over its tokens of combine weight times output norm.
    Reap,
    /// The sum of the same: also how often it is used.
    WeightedSum,
    /// Root of the mean square of the same.
    ReapRms,
    /// How often it is used.
    Frequency,
    /// Mean output norm.
    MeanNorm,
    /// Drawn with --seed, to compare with.
    Random,
}

/// What happens to the experts of MTP layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MtpChoice {
    /// All stay.
    Whole,
    /// Pruned by their own statistics.
    Pruned,
}

#[derive(Debug, Args)]
pub struct PruneOptions {
    #[command(flatten)]
    pub model: ModelOptions,
    /// What `moellon calibrate` wrote for this model.
    #[arg(long, value_name = "DIR")]
    pub stats: PathBuf,
    /// Where to write: a new directory.
    #[arg(short, long, value_name = "DIR")]
    pub out: PathBuf,
    /// Experts that stay in every layer.
    #[arg(long, value_name = "N", required_unless_present = "ratio", conflicts_with = "ratio")]
    pub keep: Option<usize>,
    /// Share of the experts that goes, 0 to 1.
    #[arg(long, value_name = "R")]
    pub ratio: Option<f64>,
    /// What an expert is worth.
    #[arg(long, default_value = "reap", value_name = "SCORE")]
    pub score: ScoreChoice,
    /// What happens to the experts of the MTP layer.
    #[arg(long, default_value = "whole", value_name = "MODE")]
    pub mtp: MtpChoice,
    /// Seed of the random score.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub seed: u64,
    /// Size of shards. A killed run loses the shard that was being written.
    #[arg(long, default_value_t = 1.0, value_name = "GB")]
    pub shard_gb: f64,
}

#[derive(Debug, Args)]
pub struct RecalibrateOptions {
    /// The pruned model.
    #[command(flatten)]
    pub model: ModelOptions,
    /// The model before pruning; without it, the bundled model.
    #[arg(long = "ref", value_name = "DIR")]
    pub reference: Option<PathBuf>,
    #[command(flatten)]
    pub device: DeviceOptions,
    #[command(flatten)]
    pub texts: TextOptions,
    /// Where to write: a new directory.
    #[arg(short, long, value_name = "DIR")]
    pub out: PathBuf,
    /// Size of shards. A killed run loses the shard that was being written.
    #[arg(long, default_value_t = 1.0, value_name = "GB")]
    pub shard_gb: f64,
}

#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("budget").required(true).args(["bpw", "size_gb", "token_gb"])))]
pub struct PlanOptions {
    #[command(flatten)]
    pub model: ModelOptions,
    #[command(flatten)]
    pub device: DeviceOptions,
    #[command(flatten)]
    pub texts: TextOptions,
    /// What `moellon calibrate` wrote for this model: importances for the errors of every format.
    #[arg(long, value_name = "DIR")]
    pub stats: Option<PathBuf>,
    /// Where to write the plan.
    #[arg(short, long, value_name = "FILE")]
    pub out: PathBuf,
    /// Budget: mean bits a weight, routers and norms not counted.
    #[arg(long, value_name = "BITS")]
    pub bpw: Option<f64>,
    /// Budget: bytes of the weights.
    #[arg(long, value_name = "GB")]
    pub size_gb: Option<f64>,
    /// Budget: bytes of weights that decoding one token reads.
    #[arg(long, value_name = "GB")]
    pub token_gb: Option<f64>,
    /// Formats to choose from.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "affine-2,affine-3-g128,affine-3,affine-4,affine-5,affine-6,affine-8",
        value_name = "FORMAT,.."
    )]
    pub formats: Vec<String>,
    /// File of measured sensitivities: read if it is there, else measured with --text and written.
    #[arg(long, value_name = "FILE")]
    pub sensitivities: Option<PathBuf>,
    /// No measurement: the first and last layers' experts get the first format, those in the middle the second.
    #[arg(long, num_args = 2, value_names = ["WIDE", "NARROW"], conflicts_with = "sensitivities")]
    pub depth_u: Option<Vec<String>>,
}
