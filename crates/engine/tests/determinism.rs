//! A request's tokens and log-probabilities are its own: whatever runs beside it, is cached, is preempted or cancelled.

mod support;

use moellon_engine::{EngineOptions, Event, EventReceiver, Policy, Request, SamplingParams, SpeculationOptions};
use proptest::prelude::*;
use support::{Sizes, drain, ids_of, prompt, request, run, run_one, tokens_of};

/// One request of a random mix.
#[derive(Debug, Clone)]
struct Wish {
    /// Which family of prompts: those of one family share a prefix.
    family: u32,
    shared: usize,
    own: usize,
    max_tokens: usize,
    temperature: f32,
    logprobs: bool,
    /// Steps before it is submitted, and after which it is cancelled.
    delay: usize,
    cancel: Option<usize>,
}

impl Wish {
    fn request(&self, index: u64) -> Request {
        let mut ids = prompt(self.family, self.shared);
        ids.extend(prompt(self.family * 100 + self.own as u32, self.own));
        Request {
            sampling: SamplingParams { temperature: self.temperature, seed: index, ..SamplingParams::default() },
            logprobs: self.logprobs.then_some(2),
            ..request(ids, self.max_tokens)
        }
    }
}

fn wishes() -> impl Strategy<Value = Vec<Wish>> {
    let wish = (
        0u32..2,
        0usize..40,
        1usize..12,
        1usize..20,
        prop_oneof![Just(0.0f32), Just(1.0)],
        any::<bool>(),
        0usize..12,
        proptest::option::weighted(0.25, 1usize..8),
    )
        .prop_map(|(family, shared, own, max_tokens, temperature, logprobs, delay, cancel)| Wish {
            family,
            shared,
            own,
            max_tokens,
            temperature,
            logprobs,
            delay,
            cancel,
        });
    proptest::collection::vec(wish, 1..7)
}

/// No speculation, or one that drafts whatever it can.
fn speculations() -> impl Strategy<Value = Option<SpeculationOptions>> {
    let options =
        (any::<bool>(), any::<bool>(), 1usize..6, any::<bool>()).prop_map(|(suffix, mtp, max_depth, governed)| {
            let policy = if governed { Policy::Governed } else { Policy::Always };
            SpeculationOptions { suffix, mtp, policy, max_depth, ..SpeculationOptions::default() }
        });
    proptest::option::weighted(0.8, options)
}

/// What a request gives when it has an engine to itself, without speculation.
fn alone(sizes: &Sizes, request: Request) -> Vec<Event> {
    let options = EngineOptions { speculation: None, ..sizes.options.clone() };
    let quiet = Sizes { num_blocks: 12, max_batch_tokens: 96, max_sequences: 1, options, ..sizes.clone() };
    run_one(&mut quiet.engine(), request)
}

fn check_mix(sizes: &Sizes, wishes: &[Wish]) -> Result<u64, TestCaseError> {
    let mut engine = sizes.engine();
    let mut receivers: Vec<Option<EventReceiver>> = wishes.iter().map(|_| None).collect();
    for step in 0..40 {
        for (index, wish) in wishes.iter().enumerate() {
            if wish.delay == step {
                receivers[index] = Some(engine.submit(wish.request(index as u64)).expect("legal"));
            }
            if wish.cancel.is_some_and(|after| wish.delay + after == step) {
                receivers[index] = None;
            }
        }
        engine.step().expect("steps work");
        engine.check().expect("no block leaks");
    }
    run(&mut engine);
    for (index, wish) in wishes.iter().enumerate() {
        let Some(receiver) = &mut receivers[index] else { continue };
        let mixed = tokens_of(&drain(receiver));
        let expected = tokens_of(&alone(sizes, wish.request(index as u64)));
        prop_assert_eq!(mixed, expected, "request {} on {}", index, sizes.fixture);
    }
    Ok(engine.stats().preemptions)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn any_mix_gives_every_request_what_it_gets_alone(
        wishes in wishes(),
        fixture in prop_oneof![Just("glm_moe_dsa"), Just("gpt_oss_window"), Just("qwen3_moe"), Just("deepseek_v3")],
        num_blocks in 12usize..30, max_batch_tokens in 4usize..24, max_sequences in 1usize..5,
        cached in prop_oneof![Just(None), Just(Some(0)), Just(Some(40_000))], speculation in speculations(),
    ) {
        let options = EngineOptions { max_prefix_cache_bytes: cached, speculation, ..EngineOptions::default() };
        check_mix(&Sizes { fixture, num_blocks, max_batch_tokens, max_sequences, options, max_context: 96 }, &wishes)?;
    }
}

#[test]
fn preempted_requests_end_as_if_nothing_had_happened() {
    // Four requests of up to 80 tokens in room for 96.
    let wish = |family| Wish {
        family,
        shared: 16,
        own: 4,
        max_tokens: 60,
        temperature: 0.0,
        logprobs: false,
        delay: 0,
        cancel: None,
    };
    let sizes = Sizes { num_blocks: 12, ..Sizes::default() };
    let preemptions = check_mix(&sizes, &[wish(1), wish(2), wish(3), wish(4)]).unwrap();
    assert!(preemptions > 0, "the cache was to run out of blocks");
}

#[test]
fn a_cached_prefix_gives_the_same_tokens_as_a_computed_one() {
    let sizes = Sizes::default();
    let mut engine = sizes.engine();
    let first = ids_of(&run_one(&mut engine, request(prompt(3, 37), 10)));
    let mut turn = prompt(3, 37);
    turn.extend(&first);
    turn.extend(prompt(4, 5));
    let events = run_one(&mut engine, request(turn.clone(), 10));
    let Event::Started(started) = &events[0] else { panic!("{events:?}") };
    // The last token of the first turn was never computed.
    assert_eq!((started.prompt_tokens, started.cached_tokens), (52, 46));
    assert_eq!(ids_of(&events), ids_of(&alone(&sizes, request(turn, 10))));
}

#[test]
fn sampling_depends_on_the_seed_only() {
    let sampled = |seed| {
        let sampling = SamplingParams { temperature: 1.5, seed, ..SamplingParams::default() };
        Request { sampling, ..request(prompt(1, 9), 16) }
    };
    let sizes = Sizes::default();
    let mut engine = sizes.engine();
    let first = ids_of(&run_one(&mut engine, sampled(1)));
    assert_eq!(ids_of(&run_one(&mut engine, sampled(1))), first);
    assert_ne!(ids_of(&run_one(&mut engine, sampled(2))), first);
}
