//! A model that runs part by part, hidden states and index sets waiting on the host, gives the bits of the whole one.

mod golden_support;

use golden_support::{Golden, fixtures};
use moellon_backend_cpu::{ActivationMode, CpuBackend, CpuOptions};
use moellon_model::batch::{Batch, LogitRows};
use moellon_model::layer_pass::{HostIndexSet, Part};
use moellon_model::mtp::MtpHidden;
use moellon_model::session::read_logits;
use moellon_model::{DecoderOptions, LayerPass, Session};
use moellon_ops::{Backend, CacheDtype};

/// Tokens of a step: chunks make layers read what they cached for earlier ones.
const CHUNK: usize = 13;

fn backend() -> CpuBackend {
    let options = CpuOptions { threads: Some(1), level: None, activation: ActivationMode::Exact, pin: false };
    CpuBackend::new(options).expect("the CPU starts")
}

fn sizes() -> DecoderOptions {
    DecoderOptions { block_size: 8, num_blocks: 16, ..DecoderOptions::single_sequence(128, 64, CacheDtype::F32) }
}

fn batches(ids: &[u32]) -> Vec<Batch> {
    let chunks = ids.chunks(CHUNK).enumerate();
    chunks
        .map(|(at, chunk)| {
            let mut batch = Batch::default();
            let blocks: Vec<u32> = (0..16).collect();
            batch.push_sequence(chunk, at * CHUNK, &blocks, 8, LogitRows::All);
            batch
        })
        .collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn parts_in_turn_give_the_bits_of_the_whole() {
    let mut with_mtp = 0;
    for name in fixtures() {
        let golden = Golden::open(&name);
        let mut whole_backend = backend();
        let mut decoder = golden.decoder_for(sizes(), &mut whole_backend);
        let config = golden.config().clone();
        let load = |part, backend: &mut dyn Backend| {
            LayerPass::load(&config, golden.checkpoint(), part, sizes(), backend, &mut |_| {}).expect("the part loads")
        };
        let batches = batches(&golden.ids);
        let mut on = backend();
        let mut pass = load(Part::Embedding, &mut on);
        let mut hidden: Vec<Vec<f32>> =
            batches.iter().map(|batch| pass.embed(batch, &mut on).expect("embedding runs")).collect();
        let mut index_sets: Vec<Option<HostIndexSet>> = vec![None; batches.len()];
        for layer in 0..config.layers.len() {
            let mut on = backend();
            let mut pass = load(Part::Layer(layer), &mut on);
            for ((batch, hidden), set) in batches.iter().zip(&mut hidden).zip(&mut index_sets) {
                pass.layer(batch, hidden, set, &mut on, None).expect("the layer runs");
            }
        }
        let mut on = backend();
        let mut pass = load(Part::Head, &mut on);
        let mut logits = Vec::new();
        for (batch, hidden) in batches.iter().zip(&mut hidden) {
            let tensor = pass.head(batch, hidden, &mut on).expect("the head runs");
            logits.extend(read_logits(tensor, &mut on).expect("logits come back"));
        }
        let mut session = Session::new();
        let whole = session.step(&golden.ids, LogitRows::All, &mut decoder, &mut whole_backend, None).expect("runs");
        let whole = read_logits(whole, &mut whole_backend).expect("logits come back");
        assert!(bits(&whole) == bits(&logits), "{name}: logits");
        if !decoder.has_mtp() {
            continue;
        }
        with_mtp += 1;
        let next = &golden.ids[1..];
        let whole = session.mtp(next, 0, MtpHidden::Trunk, &mut decoder, &mut whole_backend).expect("MTP runs");
        let whole = read_logits(whole, &mut whole_backend).expect("logits come back");
        let mut on = backend();
        let mut pass = load(Part::Mtp(0), &mut on);
        let hidden: Vec<f32> = hidden.concat();
        let mut logits = Vec::new();
        for (at, mut batch) in self::batches(next).into_iter().enumerate() {
            batch.logit_rows = (0..batch.num_tokens() as u32).collect();
            let first = at * CHUNK * config.hidden_size;
            let rows = &hidden[first..first + batch.num_tokens() * config.hidden_size];
            let tensor = pass.mtp(&batch, rows, &mut on).expect("MTP runs");
            logits.extend(read_logits(tensor, &mut on).expect("logits come back"));
        }
        assert!(bits(&whole) == bits(&logits), "{name}: MTP logits");
    }
    assert!(with_mtp > 0, "no fixture has an MTP layer");
}

#[test]
fn a_part_does_only_its_own_work() {
    let golden = Golden::open("qwen3_moe");
    let mut on = backend();
    let load = |part, on: &mut CpuBackend| {
        LayerPass::load(golden.config(), golden.checkpoint(), part, sizes(), on, &mut |_| {}).map_err(|e| e.to_string())
    };
    let mut pass = load(Part::Layer(0), &mut on).expect("layer 0 loads");
    let batch = &batches(&golden.ids)[0];
    let error = pass.embed(batch, &mut on).unwrap_err().to_string();
    assert_eq!(error, "batch: loaded part is Layer(0), expected Embedding");
    let layers = golden.config().layers.len();
    let error = load(Part::Layer(layers), &mut on).err().expect("there is no such layer");
    assert_eq!(error, format!("batch: layer to load is {layers}, expected below {layers}"));
}
