//! Flags. Every flag can also be given in the environment as `MOELLON_<FLAG>`; the flag wins.

use crate::surgery::options as surgery;
use clap::{Args, Parser, Subcommand, ValueEnum};
use moellon_model::draft_precision::DraftVocabulary;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

/// Runs very large Mixture-of-Experts language models on one box, at memory speed.
#[derive(Debug, Parser)]
#[command(name = "moellon", version, max_term_width = 110)]
pub struct Arguments {
    #[command(subcommand)]
    pub command: Command,
    /// What is logged to standard error, e.g. `info` or `moellon=debug`; by default `info` for serve, else `warn`.
    #[arg(long, global = true, env = "MOELLON_LOG", value_name = "FILTER")]
    pub log: Option<String>,
    /// How it is logged.
    #[arg(long, global = true, env = "MOELLON_LOG_FORMAT", default_value = "human")]
    pub log_format: LogFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Human,
    /// One JSON object a line.
    Json,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Generate text: one prompt, standard input, or a chat.
    Run(RunOptions),
    /// Serve a model to OpenAI and Anthropic clients.
    Serve(Box<ServeOptions>),
    /// Say what a model is made of and how fast it can be: parameters, formats, bytes per token, ceilings.
    Inspect(InspectOptions),
    /// Compute logits for token ids, for conformance with other implementations.
    Logits(LogitsOptions),
    /// Measure decode and prefill speed against this machine's memory bandwidth.
    Bench(BenchOptions),
    /// Say what this machine has and what would run where.
    Doctor(DoctorOptions),
    /// Say what a token reads, what the machine's bandwidth allows, what is reached and what would be if.
    Roofline(RooflineOptions),
    /// Write one HTML file with everything that was measured on this machine.
    Report(ReportOptions),
    /// Test hypotheses about speed on this machine and model: each is switched on and off in turn until the difference is sure.
    Lever(LeverOptions),
    /// Check, compare or show the records of measurements.
    Receipt(ReceiptOptions),
    /// Measure what weights are given and what experts add, with texts, a layer at a time.
    Calibrate(surgery::CalibrateOptions),
    /// Write a model with fewer experts: those that the calibration says matter.
    Prune(surgery::PruneOptions),
    /// Write a pruned model with routers fitted to the experts that are left, with texts, a layer at a time.
    Recalibrate(surgery::RecalibrateOptions),
    /// Decide which module gets how many bits under a budget, by measured sensitivities or by depth.
    Plan(surgery::PlanOptions),
    /// Write a model in other weight formats. A killed run goes on where it was when it is started again.
    Quantize(surgery::QuantizeOptions),
    /// Say how far a model's predictions are from another's: KL divergence, agreement, perplexity, layer by layer.
    Compare(surgery::CompareOptions),
}

/// Which model.
#[derive(Debug, Args)]
pub struct ModelOptions {
    /// Directory of a checkpoint (config.json, *.safetensors, tokenizer.json). Without it, the bundled model.
    #[arg(short, long, env = "MOELLON_MODEL", value_name = "DIR")]
    pub model: Option<PathBuf>,
}

/// Where and how to compute.
#[derive(Debug, Clone, Args)]
pub struct DeviceOptions {
    /// Back end.
    #[arg(long, env = "MOELLON_BACKEND", default_value = "auto")]
    pub backend: BackendChoice,
    /// Threads; by default all cores that this process may use.
    #[arg(long, env = "MOELLON_THREADS", value_name = "N")]
    pub threads: Option<usize>,
    /// CPU instructions to use; by default the best that the machine has.
    #[arg(long, env = "MOELLON_CPU_LEVEL", value_name = "LEVEL")]
    pub cpu_level: Option<String>,
    /// Which GPU, where there are several.
    #[arg(long, env = "MOELLON_GPU", default_value_t = 0, value_name = "N")]
    pub gpu: usize,
    /// Folder of CUBINs to use instead of the built-in ones, or `compile` to compile them here; for work on kernels.
    #[arg(long, env = "MOELLON_CUDA_KERNELS", value_name = "DIR", hide = true)]
    pub cuda_kernels: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BackendChoice {
    /// The fastest that there is; `moellon doctor` says which and why.
    Auto,
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
    /// A GPU behind Metal, Vulkan or DX12.
    Wgpu,
    /// Plain loops in f64, to compare with: very slow.
    Reference,
}

/// How activations meet quantized weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ActivationsChoice {
    /// f32 activations: what references are made with.
    Exact,
    /// 8-bit activations for quantized weights: fast.
    Int8,
}

/// How to choose tokens, where a request does not say. What no flag says, the model's `generation_config.json` does.
#[derive(Debug, Args)]
pub struct SamplingOptions {
    /// Temperature; 0 is greedy. By default what the model's generation_config.json says.
    #[arg(long = "temp", alias = "temperature", value_name = "T", allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Keep the most likely tokens up to this probability.
    #[arg(long, value_name = "P")]
    pub top_p: Option<f32>,
    /// Keep this many most likely tokens; 0 keeps all.
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Keep tokens at least this many times as likely as the most likely.
    #[arg(long, value_name = "P")]
    pub min_p: Option<f32>,
    /// Penalty on tokens that were seen; 1 is none.
    #[arg(long = "repeat-penalty", alias = "repetition-penalty", value_name = "X")]
    pub repetition_penalty: Option<f32>,
    /// Penalty on tokens that were written, once each; 0 is none.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub presence_penalty: Option<f32>,
    /// Penalty on tokens that were written, once for each time; 0 is none.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub frequency_penalty: Option<f32>,
    /// Seed of the sampling; by default another one each time.
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CacheChoice {
    /// As computed.
    F32,
    /// Half the memory.
    Bf16,
}

/// What drafts tokens that one step then verifies. The output is the same, byte for byte.
#[derive(Debug, Args)]
pub struct SpeculateOptions {
    /// Who drafts: auto (text that was seen, and the model's MTP layer if it has one, where they pay), off, ngram, mtp, or
    /// draft=DIR for an EAGLE-3 head or a smaller model with the same tokenizer.
    #[arg(long, env = "MOELLON_SPECULATE", default_value = "auto", value_name = "WHO")]
    pub speculate: Speculate,
    /// Drafts of one step and sequence.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=32), value_name = "N")]
    pub draft_depth: u16,
    /// Draft as deep as that always, whether it pays or not: for experiments.
    #[arg(long)]
    pub draft_always: bool,
    /// Tokens that the MTP layer drafts: auto (32,768 of a vocabulary more than twice as large), all, or a number; the
    /// frequent ones and the special ones. The output is the same.
    #[arg(long, default_value = "auto", value_name = "N")]
    pub draft_vocab: DraftVocab,
}

/// The value of `--draft-vocab`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DraftVocab(pub DraftVocabulary);

impl FromStr for DraftVocab {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(DraftVocab(match text {
            "auto" => DraftVocabulary::Auto,
            "all" => DraftVocabulary::All,
            _ => {
                let count = text.parse().ok().filter(|count| *count > 0);
                DraftVocabulary::Tokens(count.ok_or("expected auto, all or a positive number")?)
            }
        }))
    }
}

/// The values of `--speculate`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Speculate {
    Auto,
    Off,
    Ngram,
    Mtp,
    Draft(PathBuf),
}

impl FromStr for Speculate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "auto" => Speculate::Auto,
            "off" => Speculate::Off,
            "ngram" => Speculate::Ngram,
            "mtp" => Speculate::Mtp,
            _ => match text.strip_prefix("draft=") {
                Some(dir) if !dir.is_empty() => Speculate::Draft(PathBuf::from(dir)),
                _ => return Err("expected auto, off, ngram, mtp or draft=DIR".to_owned()),
            },
        })
    }
}

#[derive(Debug, Args)]
pub struct RunOptions {
    #[command(flatten)]
    pub model: ModelOptions,
    #[command(flatten)]
    pub device: DeviceOptions,
    #[command(flatten)]
    pub speculation: SpeculateOptions,
    /// The prompt. Without it, standard input; on a terminal, a chat.
    #[arg(short, long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// System message.
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Give the prompt to the model as it is, without the chat template.
    #[arg(long)]
    pub raw: bool,
    /// Answer without thinking first.
    #[arg(long)]
    pub no_think: bool,
    /// Longest answer in tokens; by default to the end of the context.
    #[arg(short = 'n', long, value_name = "N")]
    pub max_tokens: Option<usize>,
    /// Positions to reserve memory for.
    #[arg(long, env = "MOELLON_CONTEXT", value_name = "N")]
    pub context: Option<usize>,
    #[command(flatten)]
    pub sampling: SamplingOptions,
    /// Stop before this text; may be given several times.
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// How activations meet quantized weights.
    #[arg(long, default_value = "int8")]
    pub activations: ActivationsChoice,
    /// Type of cached keys and values.
    #[arg(long, default_value = "bf16")]
    pub cache: CacheChoice,
    /// Print one JSON object with the answer and the measurements instead of streaming.
    #[arg(long)]
    pub json: bool,
}

/// Whether the model thinks where a request does not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ThinkingChoice {
    /// What the chat template does by itself.
    Template,
    /// Always.
    On,
    /// Never.
    Off,
    /// As the template does, but not on mechanical steps: after a tool's result that is no failure, for prescribed answers,
    /// for a few tokens.
    Auto,
}

#[derive(Debug, Args)]
pub struct ServeOptions {
    #[command(flatten)]
    pub model: ModelOptions,
    #[command(flatten)]
    pub device: DeviceOptions,
    #[command(flatten)]
    pub speculation: SpeculateOptions,
    /// Random weights of a published model's exact shapes instead of a checkpoint's, to measure scheduling and caches: as in
    /// `bench`, with the model's tokenizer and template.
    #[arg(long, value_name = "PRESET")]
    pub synthetic: Option<String>,
    /// Format of the random weights, as in `bench`.
    #[arg(long, default_value = "affine-4", value_name = "FORMAT")]
    pub format: String,
    /// Address to listen on. Others than loopback should have a key.
    #[arg(long, env = "MOELLON_HOST", default_value = "127.0.0.1", value_name = "IP")]
    pub host: IpAddr,
    /// Port; 0 lets the system choose.
    #[arg(long, env = "MOELLON_PORT", default_value_t = 8080, value_name = "N")]
    pub port: u16,
    /// Key that clients must show; may be given several times.
    #[arg(long, env = "MOELLON_API_KEY", hide_env_values = true, value_name = "KEY")]
    pub api_key: Vec<String>,
    /// File with a key a line.
    #[arg(long, env = "MOELLON_API_KEY_FILE", value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// Further name that a Host header may carry.
    #[arg(long, value_name = "NAME")]
    pub allowed_host: Vec<String>,
    /// Origin whose pages may use the server.
    #[arg(long, value_name = "URL")]
    pub allowed_origin: Vec<String>,
    /// Name of the model in the APIs.
    #[arg(long, alias = "served-model-name", value_name = "NAME")]
    pub name: Option<String>,
    /// Further name that clients may use; one that ends in * stands for all names that begin so.
    #[arg(long, value_name = "NAME")]
    pub alias: Vec<String>,
    /// Tokens of a prompt and its answer together; by default what the model was made for, at most 32768.
    #[arg(short, long, env = "MOELLON_CONTEXT", visible_aliases = ["ctx-size", "max-model-len"], value_name = "N")]
    pub context: Option<usize>,
    /// Sequences that run at once.
    #[arg(long, default_value_t = 16, visible_aliases = ["parallel", "max-num-seqs"], value_name = "N")]
    pub max_sequences: usize,
    /// Tokens of a step: the size of prefill chunks.
    #[arg(long, default_value_t = 512, visible_alias = "max-num-batched-tokens", value_name = "N")]
    pub max_batch_tokens: usize,
    /// Requests that may wait.
    #[arg(long, default_value_t = 256, value_name = "N")]
    pub max_waiting: usize,
    /// Memory for cached keys and values; by default room for four full contexts.
    #[arg(long, value_name = "GB")]
    pub cache_gb: Option<f64>,
    /// Folder where cached prefixes survive a restart.
    #[arg(long, env = "MOELLON_DISK_CACHE", value_name = "DIR")]
    pub disk_cache: Option<PathBuf>,
    /// Bytes that this folder may take.
    #[arg(long, default_value_t = 20, value_name = "GB")]
    pub disk_cache_gb: u64,
    /// Whether the model thinks where a request does not say.
    #[arg(long, default_value = "template")]
    pub thinking: ThinkingChoice,
    #[command(flatten)]
    pub sampling: SamplingOptions,
    /// Longest answer in tokens where a request does not say; by default to the end of the context.
    #[arg(short = 'n', long, value_name = "N")]
    pub max_tokens: Option<usize>,
    /// Chat template (Jinja) to use instead of the model's own.
    #[arg(long, env = "MOELLON_CHAT_TEMPLATE", value_name = "FILE")]
    pub chat_template: Option<PathBuf>,
    /// How many times as long a step that decodes may take when a prompt is computed beside it.
    #[arg(long, default_value_t = 2.0, value_name = "X")]
    pub max_decode_slowdown: f64,
    /// Give the model's memory back after so many seconds without requests; the next one loads it again. `POST
    /// /models/unload` does so at once.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..), value_name = "S")]
    pub idle_unload: Option<u64>,
    /// Seconds that running requests get after a stop signal.
    #[arg(long, default_value_t = 30, value_name = "S")]
    pub drain: u64,
    /// How activations meet quantized weights.
    #[arg(long, default_value = "int8")]
    pub activations: ActivationsChoice,
    /// Type of cached keys and values.
    #[arg(long, default_value = "bf16")]
    pub cache: CacheChoice,
}

#[derive(Debug, Args)]
pub struct InspectOptions {
    #[command(flatten)]
    pub model: ModelOptions,
    /// Memory bandwidth in GB/s to compute ceilings with; by default measured on this machine.
    #[arg(long, value_name = "GB/S")]
    pub bandwidth: Option<f64>,
    /// Positions in the cache when a token is decoded; by default 8192, or what the model was made for.
    #[arg(long, value_name = "N")]
    pub context: Option<usize>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct LogitsOptions {
    #[command(flatten)]
    pub model: ModelOptions,
    #[command(flatten)]
    pub device: DeviceOptions,
    /// Token ids, separated by commas.
    #[arg(long, value_delimiter = ',', required = true, value_name = "1,2,3")]
    pub ids: Vec<u32>,
    /// Continue greedily for this many tokens.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub greedy: usize,
    /// Also run the MTP layer.
    #[arg(long)]
    pub mtp: bool,
    /// Where to write: a safetensors file with `logits`, `decode_logits`, `greedy_ids`, `greedy_logits`, `mtp_logits`.
    #[arg(short, long, value_name = "FILE")]
    pub out: PathBuf,
    /// How activations meet quantized weights.
    #[arg(long, default_value = "exact")]
    pub activations: ActivationsChoice,
    /// Type of cached keys and values.
    #[arg(long, default_value = "f32")]
    pub cache: CacheChoice,
}

#[derive(Debug, Args)]
pub struct BenchOptions {
    #[command(flatten)]
    pub model: ModelOptions,
    #[command(flatten)]
    pub device: DeviceOptions,
    /// Random weights of a published model's exact shapes: PRESET:layers=N,vocab=N (both optional), with PRESET one of
    /// qwen3-30b-a3b, glm-5.2-77, glm-5.2-59, deepseek-v3, gpt-oss-120b, gpt-oss-20b.
    #[arg(long, value_name = "PRESET", conflicts_with = "model")]
    pub synthetic: Option<String>,
    /// Format of the random weights: affine-2..8, nvfp4, mxfp4, mxfp8, fp8, bf16, or q3a4 (experts affine-3, the rest 4).
    #[arg(long, default_value = "affine-4", value_name = "FORMAT")]
    pub format: String,
    /// Measure speculation instead, on random weights, with outcomes by a coin: replay:p=P,overlap=O,depth=N, with P the
    /// chance that a draft is right given those before it, O the share of experts that neighbouring tokens have in common
    /// (chance if left out) and N drafts a step (what the governor says if left out). P and O may be several, as in
    /// p=0.6/0.8. A preset with `mtp=1` drafts with its MTP layer, one without drafts for nothing.
    #[arg(long, value_name = "replay:..", requires = "synthetic")]
    pub speculate: Option<ReplaySpec>,
    /// Measure the hot operations of a layer one by one instead, with as many rows as `--batch` says: the reference (the CPU in exact
    /// mode), the back end operation by operation, and what steps run, each checked and timed.
    #[arg(long, requires = "synthetic", conflicts_with = "speculate")]
    pub kernels: bool,
    /// Tokens that the MTP layer drafts, as for `run`.
    #[arg(long, default_value = "auto", value_name = "N")]
    pub draft_vocab: DraftVocab,
    /// Sequences of a decode step.
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8", value_name = "N,..")]
    pub batch: Vec<usize>,
    /// Positions cached for each sequence; decoding is measured at each of them, with one load.
    #[arg(long, value_delimiter = ',', default_value = "128", value_name = "N,..")]
    pub context: Vec<usize>,
    /// Positions of a block of the cache.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096), value_name = "N")]
    pub block_size: u32,
    /// Lengths of prompts to prefill.
    #[arg(long, value_delimiter = ',', default_value = "512", value_name = "N,..")]
    pub prompt: Vec<usize>,
    /// Rows of a prompt that are computed in one step.
    #[arg(long, default_value_t = 512, value_name = "N")]
    pub chunk: usize,
    /// Steps of a window.
    #[arg(long, default_value_t = 8, value_name = "N")]
    pub steps: usize,
    /// Windows that count, each with its own bandwidth measurement.
    #[arg(long, default_value_t = 7, value_name = "N")]
    pub windows: usize,
    /// Give all sequences of a step the same token: how a batch of one prompt looks, whose experts are read once.
    #[arg(long)]
    pub identical: bool,
    /// Seed of weights and tokens.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub seed: u64,
    /// How activations meet quantized weights.
    #[arg(long, default_value = "int8")]
    pub activations: ActivationsChoice,
    /// Type of cached keys and values.
    #[arg(long, default_value = "bf16")]
    pub cache: CacheChoice,
    /// Also print where the time of a step goes.
    #[arg(long)]
    pub stages: bool,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// The value of `bench --speculate`.
#[derive(Debug, Clone, PartialEq)]
pub struct ReplaySpec {
    pub acceptances: Vec<f64>,
    /// None for chance.
    pub overlaps: Vec<f64>,
    pub depth: Option<usize>,
}

impl FromStr for ReplaySpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let form = "expected replay:p=P,overlap=O,depth=N";
        let fields = text.strip_prefix("replay:").ok_or(form)?;
        let (mut acceptances, mut overlaps, mut depth) = (Vec::new(), Vec::new(), None);
        let shares = |text: &str| -> Result<Vec<f64>, String> {
            let share = |text: &str| text.parse().ok().filter(|x| (0.0..=1.0).contains(x));
            text.split('/').map(|text| share(text).ok_or_else(|| "expected shares from 0 to 1".to_owned())).collect()
        };
        for field in fields.split(',') {
            match field.split_once('=') {
                Some(("p", value)) => acceptances = shares(value)?,
                Some(("overlap", value)) => overlaps = shares(value)?,
                Some(("depth", value)) => {
                    let number = value.parse().ok().filter(|n| (1..=32).contains(n));
                    depth = Some(number.ok_or("expected a depth from 1 to 32")?);
                }
                _ => return Err(form.to_owned()),
            }
        }
        if acceptances.is_empty() {
            return Err(form.to_owned());
        }
        Ok(ReplaySpec { acceptances, overlaps, depth })
    }
}

#[derive(Debug, Args)]
pub struct RooflineOptions {
    #[command(flatten)]
    pub bench: BenchOptions,
    /// Predict the speed if something were otherwise; may be given several times. NAME=NUMBER, joined by commas: bits of a
    /// weight with scales by part (experts, attention, head, all, ..), batch, k (rows that a step verifies) with p (chance
    /// that a draft is right) and overlap (share of experts that neighbours have in common), bandwidth (GB/s).
    #[arg(long, value_name = "experts=3,..")]
    pub what_if: Vec<String>,
    /// Folder to write a receipt to.
    #[arg(long, value_name = "DIR")]
    pub receipts: Option<PathBuf>,
    /// Name of the receipt.
    #[arg(long, requires = "receipts", value_name = "NAME")]
    pub name: Option<String>,
}

#[derive(Debug, Args)]
pub struct ReportOptions {
    #[command(flatten)]
    pub model: ModelOptions,
    #[command(flatten)]
    pub device: DeviceOptions,
    /// Folder of receipts: levers, rooflines, surgery. What the folder lacks of the roofline is measured now.
    #[arg(long, default_value = "receipts", value_name = "DIR")]
    pub receipts: PathBuf,
    /// Where to write the page.
    #[arg(short, long, default_value = "moellon-report.html", value_name = "FILE")]
    pub out: PathBuf,
    /// Print the same as JSON instead.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct LeverOptions {
    #[command(subcommand)]
    pub command: LeverCommand,
    /// Folder of levers (*.toml) besides those of the program, or instead of those with the same name.
    #[arg(long, global = true, value_name = "DIR")]
    pub levers: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum LeverCommand {
    /// Name all levers.
    List,
    /// Say what a lever believes and how it is tested.
    Show {
        /// Which.
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
    /// Test some levers.
    Run {
        /// Which.
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
        #[command(flatten)]
        test: LeverTestOptions,
    },
    /// Test all levers.
    All {
        #[command(flatten)]
        test: LeverTestOptions,
    },
    /// Say what was found, from the receipts: the last verdict of each lever, model and machine.
    Verdicts {
        /// Folder of receipts.
        #[arg(long, default_value = "receipts", value_name = "DIR")]
        receipts: PathBuf,
    },
    /// Test the lab itself: a planted slowdown must be found, and nothing must be found in nothing.
    Check {
        #[command(flatten)]
        test: LeverTestOptions,
        /// Comparisons of each kind.
        #[arg(long, default_value_t = 20, value_name = "N")]
        runs: usize,
        /// The planted slowdown in percent.
        #[arg(long, default_value_t = 3.0, value_name = "PERCENT")]
        slowdown: f64,
    },
}

#[derive(Debug, Args)]
pub struct LeverTestOptions {
    #[command(flatten)]
    pub model: ModelOptions,
    #[command(flatten)]
    pub device: DeviceOptions,
    /// Text that is continued and calibrated with; by default Rust sources that are part of the program.
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// Text that predictions are compared on.
    #[arg(long, value_name = "FILE")]
    pub held_text: Option<PathBuf>,
    /// Folder that the receipt is written to.
    #[arg(long, default_value = "receipts", value_name = "DIR")]
    pub receipts: PathBuf,
    /// Name of the receipt; by default that of the command and model.
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Write no receipt.
    #[arg(long, conflicts_with = "name")]
    pub no_receipt: bool,
    /// Judge by this run alone. Otherwise a verdict of an earlier receipt in the folder, of the same program, model and machine,
    /// stands where this run does not contradict it.
    #[arg(long)]
    pub fresh: bool,
}

#[derive(Debug, Args)]
pub struct ReceiptOptions {
    #[command(subcommand)]
    pub command: ReceiptCommand,
}

#[derive(Debug, Subcommand)]
pub enum ReceiptCommand {
    /// Check layout and hash; fails if a hash is broken.
    Verify {
        /// Receipts, or folders of them.
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
    /// Say where two receipts differ.
    Diff {
        before: PathBuf,
        after: PathBuf,
        /// Also list samples, one by one.
        #[arg(long)]
        samples: bool,
    },
    /// Print what a receipt says.
    Show {
        /// Receipts, or folders of them.
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
    /// Put the hash into receipts that scripts wrote without one. Nothing else of them changes.
    Seal {
        /// Receipts of schema 1.
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
}

#[derive(Debug, Args)]
pub struct DoctorOptions {
    #[command(flatten)]
    pub model: ModelOptions,
    /// Folder of receipts: levers that were tested here are named.
    #[arg(long, default_value = "receipts", value_name = "DIR")]
    pub receipts: PathBuf,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Sends logs of the libraries to standard error.
pub fn init_logging(arguments: &Arguments) {
    use tracing_subscriber::EnvFilter;
    // A server's one line a request is at `info`.
    let default = if matches!(arguments.command, Command::Serve(_)) { "info" } else { "warn" };
    let wanted = arguments.log.as_deref().unwrap_or(default);
    let filter = EnvFilter::try_new(wanted).unwrap_or_else(|_| EnvFilter::new(default));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match arguments.log_format {
        LogFormat::Human => builder.with_target(false).init(),
        LogFormat::Json => builder.json().init(),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn flags_are_consistent() {
        super::Arguments::command().debug_assert();
    }
}
