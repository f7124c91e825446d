//! Speculation on back ends that record steps: the MTP layer's and an EAGLE-3 head's runs are recorded and replayed beside the
//! model's own, and the output is that of plain decoding on the same back end. On whatever devices there are (in CI lavapipe).

mod support;

use moellon_checkpoint::Checkpoint;
use moellon_engine::{Drafter, Engine, EngineOptions, Policy, Request, SamplingParams, SpeculationOptions};
use moellon_model::{Eagle, EagleConfig};
use moellon_ops::Backend;
use std::path::PathBuf;
use support::{Sizes, drain, ids_of, request, run};

fn sizes(fixture: &'static str) -> Sizes {
    Sizes { fixture, num_blocks: 64, max_context: 96, max_batch_tokens: 32, ..Sizes::default() }
}

fn always(suffix: bool) -> EngineOptions {
    let speculation =
        SpeculationOptions { suffix, policy: Policy::Always, max_depth: 3, ..SpeculationOptions::default() };
    EngineOptions { speculation: Some(speculation), ..EngineOptions::default() }
}

/// Tokens of some requests, `width` at a time.
fn answers(engine: &mut Engine, width: usize) -> Vec<Vec<u32>> {
    let requests: Vec<Request> = (0..4u32)
        .map(|seed| {
            let prompt = (0..6 + 7 * seed).map(|i| (i * 5 + seed * 29) % 120).collect();
            let temperature = if seed == 3 { 0.9 } else { 0.0 };
            let sampling = SamplingParams { temperature, seed: u64::from(seed), ..SamplingParams::default() };
            Request { sampling, ..request(prompt, 40) }
        })
        .collect();
    let mut found = Vec::new();
    let mut requests = requests.into_iter().peekable();
    while requests.peek().is_some() {
        let receivers: Vec<_> =
            requests.by_ref().take(width).map(|r| engine.submit(r).expect("the request is legal")).collect();
        run(engine);
        found.extend(receivers.into_iter().map(|mut receiver| ids_of(&drain(&mut receiver))));
    }
    found
}

#[test]
fn recorded_drafting_changes_no_output_on_wgpu() {
    recorded_drafting_changes_no_output(&|| support::wgpu("recorded drafting"));
}

#[test]
fn recorded_drafting_changes_no_output_on_cuda() {
    recorded_drafting_changes_no_output(&|| support::cuda("recorded drafting"));
}

fn recorded_drafting_changes_no_output(backend: &dyn Fn() -> Option<Box<dyn Backend>>) {
    // Few back ends, for each compiles its kernels.
    let (Some(first), Some(second)) = (backend(), backend()) else { return };
    // An MTP layer and lookups on a model with sparse attention, beyond its index_topk.
    let plain = answers(&mut sizes("glm_moe_dsa").engine_on(first), 1);
    let mut engine = Sizes { options: always(true), ..sizes("glm_moe_dsa") }.engine_on(second);
    for width in [1, 4] {
        assert_eq!(answers(&mut engine, width), plain, "MTP layer and lookups, {width} at a time");
    }
    let drafted = engine.stats().speculation.expect("it drafts");
    assert!(drafted.head.draft_tokens > 50, "{drafted:?}");
    let (Some(first), Some(mut second)) = (backend(), backend()) else { return };
    let plain = answers(&mut sizes("qwen3_moe").engine_on(first), 1);
    let mut decoder = sizes("qwen3_moe").decoder(second.as_mut());
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/eagle3");
    let checkpoint = Checkpoint::open(dir).expect("the head opens");
    let config = EagleConfig::parse(&checkpoint.config, decoder.config()).expect("its config fits the model");
    let head = Eagle::load(&config, &checkpoint, &mut decoder, second.as_mut()).expect("the head loads");
    let drafter = Some(Drafter::Eagle(Box::new(head)));
    let mut engine = Engine::with_drafter(decoder, drafter, second, always(false)).expect("the engine starts");
    for width in [1, 4] {
        assert_eq!(answers(&mut engine, width), plain, "EAGLE-3, {width} at a time");
    }
    assert!(engine.stats().speculation.expect("it drafts").head.draft_tokens > 200);
}
