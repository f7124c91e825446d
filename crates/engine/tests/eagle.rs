//! An EAGLE-3 head drafts as the others do: whatever it says, the output is that of plain decoding.

mod support;

use moellon_checkpoint::Checkpoint;
use moellon_engine::{Drafter, Engine, EngineOptions, Policy, Request, SamplingParams, SpeculationOptions};
use moellon_model::{Decoder, Eagle, EagleConfig};
use std::path::PathBuf;
use support::{Sizes, drain, request, run, tokens_of};

fn sizes() -> Sizes {
    Sizes { fixture: "qwen3_moe", num_blocks: 64, max_context: 128, max_batch_tokens: 32, ..Sizes::default() }
}

fn engine(policy: Option<Policy>) -> Engine {
    let mut backend = support::cpu();
    let mut decoder: Decoder = sizes().decoder(backend.as_mut());
    let Some(policy) = policy else {
        return Engine::new(decoder, backend, EngineOptions::default()).expect("the engine starts");
    };
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/eagle3");
    let checkpoint = Checkpoint::open(dir).expect("the head opens");
    let config = EagleConfig::parse(&checkpoint.config, decoder.config()).expect("its config fits the model");
    let head = Eagle::load(&config, &checkpoint, &mut decoder, backend.as_mut()).expect("the head loads");
    let speculation = SpeculationOptions { suffix: false, policy, max_depth: 4, ..SpeculationOptions::default() };
    let options = EngineOptions { speculation: Some(speculation), ..EngineOptions::default() };
    Engine::with_drafter(decoder, Some(Drafter::Eagle(Box::new(head))), backend, options).expect("the engine starts")
}

fn requests() -> Vec<Request> {
    let prompt = |seed: u32, len: u32| (0..len).map(|i| (i * 7 + seed * 31) % 126).collect::<Vec<u32>>();
    (0..6)
        .map(|seed| {
            let temperature = if seed % 2 == 0 { 0.0 } else { 0.9 };
            let sampling = SamplingParams { temperature, seed: u64::from(seed), ..SamplingParams::default() };
            Request { sampling, ..request(prompt(seed, 5 + 9 * seed), 60) }
        })
        .collect()
}

#[test]
fn a_head_changes_nothing_but_the_steps() {
    let answers = |engine: &mut Engine, width: usize| {
        let mut found = Vec::new();
        let mut waiting = requests().into_iter().peekable();
        while waiting.peek().is_some() {
            let receivers: Vec<_> =
                waiting.by_ref().take(width).map(|r| engine.submit(r).expect("the request is legal")).collect();
            run(engine);
            found.extend(receivers.into_iter().map(|mut receiver| tokens_of(&drain(&mut receiver))));
        }
        found
    };
    let plain = answers(&mut engine(None), 1);
    for policy in [Policy::Always, Policy::Governed] {
        for width in [1, 4] {
            let mut engine = engine(Some(policy));
            assert_eq!(answers(&mut engine, width), plain, "{policy:?}, {width} at a time");
            let stats = engine.stats().speculation.expect("it drafts");
            if policy == Policy::Always {
                // A random head is right by chance alone, and that now and then.
                assert!(stats.head.draft_tokens > 500, "{stats:?}");
                assert!(stats.head.accepted_tokens > 0, "{stats:?}");
            }
            engine.check().expect("no block leaks");
        }
    }
}
