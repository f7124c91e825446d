//! From a lever's setting to a loaded model, or the reason why not here.

use super::variant;
use super::{Applicable, Base};
use crate::cli::{ActivationsChoice, BackendChoice, DeviceOptions, DraftVocab, Speculate, SpeculateOptions};
use crate::load::{self, Mtp};
use crate::model_source::ModelSource;
use crate::{backend, speculation};
use anyhow::Result;
use clap::ValueEnum;
use moellon_backend_wgpu::AdapterKind;
use moellon_engine::{DiskCacheOptions, Engine, EngineOptions};
use moellon_lab::Machine;
use moellon_lab::lever::Setting;
use moellon_lab::plain::{PlainBackend, Without};
use moellon_lab::roofline::CostModel;
use moellon_model::draft_precision::DraftVocabulary;
use moellon_model::{Decoder, DecoderOptions};
use moellon_ops::{Backend, CacheDtype};
use std::path::Path;

/// Slots of a cache block.
const BLOCK_SIZE: usize = 64;

/// Rows of a prefill step.
const CHUNK: usize = 512;

/// Room for drafts of every sequence.
const DRAFTS: usize = 16;

/// A model on a back end as a setting says.
pub struct Loaded {
    pub source: ModelSource,
    pub decoder: Decoder,
    pub backend: Box<dyn Backend>,
}

/// What an engine must have room for.
#[derive(Debug, Clone, Copy)]
pub struct Room {
    /// Sequences that run at once.
    pub sequences: usize,
    /// Positions of each.
    pub positions: usize,
    /// Sequences whose prefixes stay cached.
    pub cached: usize,
}

/// Why the setting cannot be tried here, as far as that is known before anything is loaded.
pub fn refusal(base: &Base, setting: &Setting) -> Option<String> {
    if setting.threads.is_some_and(|threads| threads > base.machine.cores) {
        return Some(format!("this machine has {} cores", base.machine.cores));
    }
    if setting.steps.as_deref() == Some("persistent") {
        return Some(
            "this build runs a step as a graph: the persistent kernel was slower and was taken out".to_owned(),
        );
    }
    match setting.backend.as_deref() {
        Some("cuda") if !has_nvidia(&base.machine) => Some("needs an NVIDIA GPU".to_owned()),
        // A CPU that plays a GPU would make every comparison with a GPU a matter of course.
        Some("wgpu") => match moellon_backend_wgpu::adapters().get(base.device.gpu) {
            None => Some("there is no adapter behind Vulkan, Metal or DX12".to_owned()),
            Some(adapter) if adapter.kind == AdapterKind::Software => {
                Some(format!("behind {} there is only {}, a CPU that plays a GPU", adapter.api, adapter.name))
            }
            Some(_) => None,
        },
        _ => None,
    }
}

/// The back end that the setting asks for.
fn back_end(base: &Base, setting: &Setting) -> Result<Applicable<Box<dyn Backend>>> {
    let mut device = DeviceOptions { threads: setting.threads.or(base.device.threads), ..base.device.clone() };
    if let Some(name) = &setting.backend {
        let Ok(choice) = BackendChoice::from_str(name, true) else {
            return Ok(Err(format!("this build has no {name} back end")));
        };
        device.backend = choice;
    }
    let activations = match setting.activations.as_deref() {
        Some("exact") => ActivationsChoice::Exact,
        _ => ActivationsChoice::Int8,
    };
    let backend = match backend::create(&device, activations) {
        Ok(backend) => backend,
        // What was asked for by name may be missing here; what the machine runs on by itself may not.
        Err(error) if setting.backend.is_some() => return Ok(Err(format!("{error:#}"))),
        Err(error) => return Err(error),
    };
    let fused_experts = setting.fused_experts == Some(false);
    Ok(Ok(if fused_experts || setting.steps.as_deref() == Some("launched") {
        Box::new(PlainBackend::new(backend, Without { fused_experts }))
    } else {
        backend
    }))
}

/// Whether the driver lists an NVIDIA GPU.
fn has_nvidia(machine: &Machine) -> bool {
    machine.gpus.iter().any(|gpu| gpu.contains("NVIDIA"))
}

/// The model that the setting asks for, with its numbers changed, not loaded.
fn source(base: &Base, setting: &Setting) -> Result<Applicable<ModelSource>> {
    let directory = match variant::directory(base, setting.weights.as_deref(), setting.prune)? {
        Ok(directory) => directory,
        Err(reason) => return Ok(Err(reason)),
    };
    let mut source = ModelSource::open(directory.as_deref())?;
    if let Some(fewer) = setting.fewer_active_experts {
        let active = source.config.moe.num_experts_per_tok;
        if fewer >= active {
            return Ok(Err(format!("a token uses {active} experts")));
        }
        source.config.moe.num_experts_per_tok = active - fewer;
    }
    if let Some(factor) = setting.index_topk_factor {
        let Some(indexer) = &mut source.config.indexer else {
            return Ok(Err("the model's attention is not sparse".to_owned()));
        };
        indexer.topk = ((indexer.topk as f64 * factor).round() as usize).max(1);
    }
    if setting.speculate.as_deref() == Some("mtp") && source.config.num_mtp_layers == 0 {
        return Ok(Err("the model has no MTP layer".to_owned()));
    }
    Ok(Ok(source))
}

/// Loads what the setting asks for.
pub fn load(base: &Base, setting: &Setting, room: Room) -> Result<Applicable<Loaded>> {
    let source = match source(base, setting)? {
        Ok(source) => source,
        Err(reason) => return Ok(Err(reason)),
    };
    let longest = source.config.max_position_embeddings;
    if room.positions > longest {
        return Ok(Err(format!("needs {} positions, the model was made for {longest}", room.positions)));
    }
    // Two arms are loaded at once.
    let needed = 2 * source.checkpoint.size_bytes();
    if let Some(free) = moellon_tensor::arena::free_memory_bytes().filter(|free| *free < needed) {
        let (needed, free) = (crate::table::bytes(needed as f64), crate::table::bytes(free as f64));
        return Ok(Err(format!("both arms together need {needed} of memory, {free} are free")));
    }
    let mut backend = match back_end(base, setting)? {
        Ok(backend) => backend,
        Err(reason) => return Ok(Err(reason)),
    };
    let max_context = room.positions.next_multiple_of(BLOCK_SIZE).min(longest);
    let drafts = if setting.speculate.as_deref().is_none_or(|who| who == "off") { 0 } else { DRAFTS };
    let rows = (room.sequences * (1 + drafts)).max(CHUNK.min(max_context));
    let sizes = DecoderOptions {
        max_batch_tokens: rows,
        max_sequences: room.sequences,
        max_logit_rows: rows,
        max_context,
        block_size: BLOCK_SIZE,
        num_blocks: (room.sequences + room.cached) * max_context.div_ceil(BLOCK_SIZE),
        cache_dtype: match setting.cache.as_deref() {
            Some("f32") => CacheDtype::F32,
            _ => CacheDtype::Bf16,
        },
    };
    moellon_tensor::arena::set_huge_pages(setting.huge_pages != Some(false));
    let loaded = load::load_sized(&source, sizes, Mtp::ForDrafts(DraftVocabulary::Auto), backend.as_mut());
    moellon_tensor::arena::set_huge_pages(true);
    let (decoder, _) = loaded?;
    if setting.speculate.as_deref() == Some("mtp") && !decoder.has_mtp() {
        return Ok(Err("the model's files have no MTP layer".to_owned()));
    }
    Ok(Ok(Loaded { source, decoder, backend }))
}

/// An engine over what the setting asks for, and what its steps cost by bytes.
pub fn engine(
    base: &Base,
    setting: &Setting,
    room: Room,
    disk: Option<&Path>,
) -> Result<Applicable<(Engine, CostModel)>> {
    let Loaded { source, decoder, backend } = match load(base, setting, room)? {
        Ok(loaded) => loaded,
        Err(reason) => return Ok(Err(reason)),
    };
    let mut backend = backend;
    let account = &decoder.weights().account;
    // A GPU's own memory, where the arm runs on one.
    let read = backend.measure_read()?.unwrap_or(base.read_gb_s * 1e9);
    let cost = CostModel::new(account, &source.config, room.positions / 2, read);
    let identity = source.checkpoint.identity();
    let speculate = match setting.speculate.as_deref() {
        None | Some("off") => Speculate::Off,
        Some("ngram") => Speculate::Ngram,
        Some("mtp") => Speculate::Mtp,
        Some("draft") => match variant::directory(base, setting.draft_weights.as_deref(), None)? {
            Ok(Some(directory)) => Speculate::Draft(directory),
            Ok(None) => return Ok(Err("a draft model needs draft-weights".to_owned())),
            Err(reason) => return Ok(Err(reason)),
        },
        Some(_) => Speculate::Auto,
    };
    let flags = SpeculateOptions {
        speculate,
        draft_depth: setting.draft_depth.unwrap_or(DRAFTS).min(32) as u16,
        draft_always: setting.draft_always == Some(true),
        draft_vocab: DraftVocab(DraftVocabulary::Auto),
    };
    let disk_cache =
        disk.map(|dir| DiskCacheOptions { dir: dir.to_owned(), max_bytes: 1 << 30, model_identity: identity.clone() });
    let options = EngineOptions { disk_cache, ..EngineOptions::default() };
    let engine = speculation::engine(decoder, backend, &flags, &identity, &base.tokenizer, options)?;
    Ok(Ok((engine, cost)))
}
