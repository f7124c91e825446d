//! Speculation changes nothing but the time: on the bundled model, whose MTP layer was trained, every request's tokens are
//! those of plain decoding, byte for byte, for every source of drafts, greedy or sampled, alone or in a batch, under
//! penalties, grammars and thinking budgets.

mod support;

use moellon_checkpoint::Checkpoint;
use moellon_engine::{
    CostCurve, Drafter, Engine, EngineError, EngineOptions, Event, FinishReason, Policy, Request, SamplingParams,
    SpeculationOptions, SpeculationStats, ThinkingBudget,
};
use moellon_model::weights::Weights;
use moellon_model::{Decoder, DecoderOptions, arch};
use moellon_ops::{Backend, CacheDtype};
use moellon_text::Tokenizer;
use moellon_text::constraint::{Grammar, GrammarCompiler};
use serde_json::json;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use support::{drain, ids_of, request, run, tokens_of};

fn model_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/moellon-tiny")
}

fn decoder(backend: &mut dyn Backend, layers: Option<usize>) -> Decoder {
    let checkpoint = Checkpoint::open(model_dir()).expect("the bundled model opens");
    let mut config = arch::parse(&checkpoint.config).expect("its config is legal");
    if let Some(layers) = layers {
        // A smaller model with the same tokens: the first layers alone, and no MTP layer.
        config.layers.truncate(layers);
        config.num_mtp_layers = 0;
    }
    let weights = Weights::load(&config, &checkpoint, backend, &mut |_| {}).expect("its weights load");
    let options = DecoderOptions {
        max_batch_tokens: 64,
        max_sequences: 8,
        max_logit_rows: 64,
        max_context: 768,
        block_size: 16,
        num_blocks: 256,
        cache_dtype: CacheDtype::Bf16,
    };
    Decoder::new(config, weights, options, backend).expect("the decoder fits")
}

fn engine(speculation: Option<SpeculationOptions>) -> Engine {
    engine_on(support::cpu(), speculation)
}

fn engine_on(mut backend: Box<dyn Backend>, speculation: Option<SpeculationOptions>) -> Engine {
    let decoder = decoder(backend.as_mut(), None);
    Engine::new(decoder, backend, EngineOptions { speculation, ..EngineOptions::default() }).expect("the engine starts")
}

/// The first layers of the model draft for it; all of them are always right.
fn drafted_by_layers(mut backend: Box<dyn Backend>, layers: usize, speculation: SpeculationOptions) -> Engine {
    let model = decoder(backend.as_mut(), None);
    let draft = decoder(backend.as_mut(), Some(layers));
    let options = EngineOptions { speculation: Some(speculation), ..EngineOptions::default() };
    Engine::with_drafter(model, Some(Drafter::Model(Box::new(draft))), backend, options).expect("the engine starts")
}

fn always(suffix: bool, mtp: bool) -> SpeculationOptions {
    SpeculationOptions { suffix, mtp, policy: Policy::Always, max_depth: 4, ..SpeculationOptions::default() }
}

/// Rows beyond the first cost next to nothing: what a governor decides must not depend on how busy the machine is.
fn cheap_rows() -> CostCurve {
    CostCurve::from_points(vec![(1, 1e-3), (64, 2e-3)], vec![(1, 1e-4), (64, 2e-4)])
}

fn tokenizer() -> Tokenizer {
    Tokenizer::from_folder(&model_dir()).expect("the tokenizer loads")
}

const PROMPTS: [&str; 4] = [
    "fn main() {\n    let mut total = 0;\n    for value in [1, 2, 3] {\n        total += value;\n",
    "import os\nimport sys\n\n\ndef main(argv):\n    for name in argv:\n        print(name)\n\n\ndef ",
    "The mason takes a stone from the heap and looks at it from all sides. The mason takes a stone from the heap",
    "struct Point { x: f32, y: f32 }\nimpl Point {\n    fn x(&self) -> f32 { self.x }\n    fn y(",
];

/// Requests of many kinds.
fn requests(tokenizer: &Tokenizer, tokens: usize) -> Vec<Request> {
    let kinds: [SamplingParams; 4] = [
        SamplingParams::default(),
        SamplingParams { temperature: 0.8, top_p: 0.95, seed: 5, ..SamplingParams::default() },
        SamplingParams { repetition_penalty: 1.2, frequency_penalty: 0.3, ..SamplingParams::default() },
        SamplingParams { temperature: 1.2, top_k: 40, presence_penalty: 0.5, seed: 9, ..SamplingParams::default() },
    ];
    let mut requests = Vec::new();
    for (index, prompt) in PROMPTS.iter().enumerate() {
        for (kind, sampling) in kinds.iter().enumerate() {
            let ids = tokenizer.encode(prompt, false).expect("text is encoded");
            requests.push(Request {
                sampling: sampling.clone(),
                logprobs: (kind == 3).then_some(2),
                min_tokens: if index == 1 { 20 } else { 0 },
                stop_token_ids: tokenizer.eos_id().into_iter().collect(),
                ..request(ids, tokens)
            });
        }
    }
    requests
}

/// Runs requests, `width` at a time, and gives each one's events.
fn answers(engine: &mut Engine, requests: Vec<Request>, width: usize) -> Vec<Vec<Event>> {
    let mut events = Vec::new();
    let mut requests = requests.into_iter().peekable();
    while requests.peek().is_some() {
        let mut receivers: Vec<_> =
            requests.by_ref().take(width).map(|r| engine.submit(r).expect("the request is legal")).collect();
        run(engine);
        events.extend(receivers.iter_mut().map(drain));
    }
    events
}

fn stats(engine: &mut Engine) -> SpeculationStats {
    engine.stats().speculation.expect("speculation is on")
}

/// Every source of drafts and several batch sizes on one kind of back end against plain decoding on it.
fn assert_same_with_every_source(open: &dyn Fn() -> Box<dyn Backend>) {
    let tokenizer = tokenizer();
    let plain = answers(&mut engine_on(open(), None), requests(&tokenizer, 110), 1);
    let plain: Vec<_> = plain.iter().map(|events| tokens_of(events)).collect();
    assert!(plain.iter().map(Vec::len).sum::<usize>() > 1200);
    let governed = || SpeculationOptions { cost: Some(cheap_rows()), ..SpeculationOptions::default() };
    let sources: [(&str, &dyn Fn() -> Engine); 5] = [
        ("suffix", &|| engine_on(open(), Some(always(true, false)))),
        ("mtp", &|| engine_on(open(), Some(always(false, true)))),
        ("both", &|| engine_on(open(), Some(always(true, true)))),
        ("governed", &|| engine_on(open(), Some(governed()))),
        ("draft model", &|| drafted_by_layers(open(), 3, always(false, false))),
    ];
    for (name, make) in sources {
        for width in [1, 3, 8] {
            let mut engine = make();
            let found = answers(&mut engine, requests(&tokenizer, 110), width);
            for (index, (found, plain)) in found.iter().zip(&plain).enumerate() {
                assert_eq!(&tokens_of(found), plain, "{name}, {width} at a time, request {index}");
            }
            let stats = stats(&mut engine);
            let all = stats.all();
            assert!(all.accepted_tokens > 100, "{name}, {width} at a time: {stats:?}");
            let reported: usize = found
                .iter()
                .map(|events| match events.last() {
                    Some(Event::Finished(finished)) => finished.accepted_draft_tokens,
                    other => panic!("{other:?}"),
                })
                .sum();
            assert_eq!(reported as u64, all.accepted_tokens, "{name}");
        }
    }
}

#[test]
fn every_source_and_batch_size_gives_what_plain_decoding_gives() {
    assert_same_with_every_source(&support::cpu);
}

#[test]
fn every_source_and_batch_size_gives_what_plain_decoding_gives_on_cuda() {
    if support::cuda("speculation").is_some() {
        assert_same_with_every_source(&|| support::cuda("speculation").expect("the device is still there"));
    }
}

#[test]
fn the_trained_head_is_right_about_as_often_as_its_training_says() {
    let tokenizer = tokenizer();
    let mut engine = engine(Some(always(false, true)));
    let greedy: Vec<Request> = requests(&tokenizer, 300).into_iter().step_by(4).collect();
    answers(&mut engine, greedy, 1);
    let depths = stats(&mut engine).head_by_depth;
    let (trials, hits) = depths[0];
    // 0.91 on held-out code when it was trained.
    assert!(trials > 200 && hits * 100 > trials * 75, "{depths:?}");
    // Chained drafts see the head's own states: worse, but far from chance.
    let (trials, hits) = depths[1];
    assert!(trials > 100 && hits * 100 > trials * 50, "{depths:?}");
}

#[test]
fn grammars_and_thinking_budgets_bind_as_without_drafts() {
    let tokenizer = tokenizer();
    let compiler = GrammarCompiler::new(&tokenizer, 4096).expect("the trie is built");
    let schema = json!({"type": "object", "additionalProperties": false, "required": ["name", "tags"], "properties": {
        "name": {"type": "string", "maxLength": 16},
        "tags": {"type": "array", "minItems": 3, "maxItems": 3, "items": {"enum": ["stone", "mortar", "timber"]}}}});
    let (open, close) = (tokenizer.id_of("<think>"), tokenizer.id_of("</think>"));
    let (open, close) = (open.expect("the model thinks"), close.expect("the model thinks"));
    let requests = || {
        let mut requests = Vec::new();
        for (seed, prompt) in (0..).zip(PROMPTS) {
            let ids = tokenizer.encode(prompt, false).expect("text is encoded");
            let sampling = SamplingParams { temperature: 0.7, seed, ..SamplingParams::default() };
            let stop_token_ids: Vec<u32> = tokenizer.eos_id().into_iter().collect();
            requests.push(Request {
                constraint: Some(compiler.compile(Grammar::JsonSchema(schema.clone())).expect("the schema compiles")),
                stop_token_ids: stop_token_ids.clone(),
                sampling: sampling.clone(),
                ..request(ids.clone(), 200)
            });
            requests.push(Request {
                thinking_budget: Some(ThinkingBudget {
                    max_tokens: 12,
                    starts_inside: true,
                    open_token_id: open,
                    close_token_id: close,
                    end_token_ids: vec![ids[0], ids[1], close],
                }),
                sampling: SamplingParams::default(),
                ..request(ids, 60)
            });
        }
        requests
    };
    let plain = answers(&mut engine(None), requests(), 1);
    for speculation in [always(true, false), always(false, true), always(true, true)] {
        let mut engine = engine(Some(speculation));
        let found = answers(&mut engine, requests(), 4);
        for (found, plain) in found.iter().zip(&plain) {
            assert_eq!(tokens_of(found), tokens_of(plain));
            let (Some(Event::Finished(found)), Some(Event::Finished(plain))) = (found.last(), plain.last()) else {
                panic!("{found:?}")
            };
            assert_eq!(found.reason, plain.reason);
        }
        // Not every JSON text is complete within its tokens, but some are.
        let complete = found.iter().step_by(2).filter(
            |events| matches!(events.last(), Some(Event::Finished(finished)) if finished.reason == FinishReason::Stop),
        );
        assert!(complete.count() >= 2);
        assert!(stats(&mut engine).all().accepted_tokens > 30);
    }
}

#[test]
fn sampled_tokens_follow_the_models_distribution() {
    // Tokens after the first, over many seeds, where drafts are verified: among the draws that share what came before, each
    // token's share must be its probability. (That probabilities are those of plain decoding is tested above.)
    let tokenizer = tokenizer();
    let prompt = tokenizer.encode("let mut total = 0;\nlet mut total = 0;\nlet mut", false).expect("text is encoded");
    let mut engine = engine(Some(always(true, true)));
    let mut contexts = HashMap::<Vec<u32>, HashMap<u32, (u32, f64)>>::new();
    for seed in 0..1000 {
        let sampling = SamplingParams { temperature: 1.0, seed, ..SamplingParams::default() };
        let sampled = Request { sampling, logprobs: Some(0), ..request(prompt.clone(), 4) };
        let mut receiver = engine.submit(sampled).expect("the request is legal");
        run(&mut engine);
        let tokens = tokens_of(&drain(&mut receiver));
        let ids: Vec<u32> = tokens.iter().map(|token| token.id).collect();
        for (index, token) in tokens.iter().enumerate().skip(1) {
            let probability = f64::from(token.logprob.expect("it was asked for")).exp();
            let draws = contexts.entry(ids[..index].to_vec()).or_default().entry(token.id).or_insert((0, probability));
            draws.0 += 1;
        }
    }
    let drafted = stats(&mut engine).all();
    assert!(drafted.accepted_tokens > 200 && drafted.draft_tokens > drafted.accepted_tokens, "{drafted:?}");
    let mut checked = 0;
    for tokens in contexts.values() {
        let draws = f64::from(tokens.values().map(|(count, _)| count).sum::<u32>());
        for (count, probability) in tokens.values().filter(|(_, p)| draws * p >= 10.0) {
            let found = f64::from(*count) / draws;
            // Five standard deviations of a binomial; the seeds are fixed.
            let deviation = 5.0 * (probability * (1.0 - probability) / draws).sqrt();
            assert!(
                (found - probability).abs() < deviation,
                "found {found}, expected {probability} within {deviation}"
            );
            checked += 1;
        }
    }
    assert!(checked >= 10, "{checked}");
}

#[test]
fn verbatim_repetition_takes_few_steps() {
    let tokenizer = tokenizer();
    let text = "let total = values.iter().sum::<usize>();\nlet mean = total / values.len();\n".repeat(6);
    let prompt = tokenizer.encode(&text, false).expect("text is encoded");
    let steps = |speculation| {
        let mut engine = engine(speculation);
        let events = answers(&mut engine, vec![request(prompt.clone(), 120)], 1);
        (ids_of(&events[0]), engine.stats().steps)
    };
    let (plain, many) = steps(None);
    let (drafted, few) = steps(Some(SpeculationOptions { max_depth: 16, ..always(true, false) }));
    assert_eq!(drafted, plain);
    assert!(few * 3 < many, "{few} steps of {many}");
}

#[test]
fn a_cost_curve_that_says_no_means_no_drafts_and_no_head() {
    // Every row costs as much as a whole step.
    let dear = CostCurve::from_points((1..=64).map(|rows| (rows, rows as f64)).collect(), vec![(1, 1.0)]);
    let options = SpeculationOptions { cost: Some(dear), ..SpeculationOptions::default() };
    let tokenizer = tokenizer();
    let mut engine = engine(Some(options));
    answers(&mut engine, requests(&tokenizer, 80), 2);
    let stats = stats(&mut engine);
    assert_eq!(stats.all().draft_tokens, 0, "{stats:?}");
}

#[test]
fn a_draft_model_of_other_tokens_is_refused() {
    let mut backend = support::cpu();
    let model = decoder(backend.as_mut(), None);
    let other = support::Sizes::default().decoder(backend.as_mut());
    let options = EngineOptions { speculation: Some(always(false, false)), ..EngineOptions::default() };
    let Err(error) = Engine::with_drafter(model, Some(Drafter::Model(Box::new(other))), backend, options) else {
        panic!("it was accepted")
    };
    assert!(matches!(error, EngineError::DraftModel { what: "vocab_size", .. }), "{error}");
    assert!(error.to_string().contains("expected 4096"), "{error}");
}

#[test]
fn a_draft_model_computes_nothing_where_it_cannot_pay() {
    let ids = tokenizer().encode(PROMPTS[0], false).expect("text is encoded");
    let plain = ids_of(&answers(&mut engine(None), vec![request(ids.clone(), 100)], 1)[0]);
    let run = |layers: usize, draft: f64| {
        let cost = CostCurve::from_points(vec![(1, 1e-3), (64, 2e-3)], vec![(1, draft), (64, 2.0 * draft)]);
        let options = SpeculationOptions { suffix: false, cost: Some(cost), ..SpeculationOptions::default() };
        let mut engine = drafted_by_layers(support::cpu(), layers, options);
        // A second request starts with what the first one taught.
        for _ in 0..2 {
            let events = answers(&mut engine, vec![request(ids.clone(), 100)], 1);
            assert_eq!(ids_of(&events[0]), plain);
        }
        stats(&mut engine)
    };
    // Every draft would be right, and still it takes longer to make one than to do without.
    let dear = run(usize::MAX, 1.1e-3);
    assert_eq!((dear.head_rows, dear.head_by_depth.len()), (0, 0), "{dear:?}");
    // It reads the prompt and drafts, until its real time says otherwise: here it takes as long as the model.
    let good = run(usize::MAX, 1e-4);
    assert!(good.head.accepted_tokens > 10 && good.head_rows as usize > ids.len(), "{good:?}");
    // One layer says other things than the model: it is let go, rows and all.
    let bad = run(1, 0.5e-3);
    assert!(bad.head_rows < 250, "{bad:?}");
}

/// A draft and the row that verifies it cost half a step and more.
fn dear_rows() -> CostCurve {
    CostCurve::from_points(vec![(1, 1e-3), (2, 1.5e-3), (64, 32e-3)], vec![(1, 1e-5), (64, 64e-5)])
}

#[test]
fn text_that_is_drawn_almost_at_random_is_never_drafted() {
    let tokenizer = tokenizer();
    let drafted = |temperature: f32| {
        let options = SpeculationOptions { suffix: false, cost: Some(dear_rows()), ..SpeculationOptions::default() };
        let mut engine = engine(Some(options));
        let sampling = SamplingParams { temperature, seed: 3, ..SamplingParams::default() };
        let ids = tokenizer.encode(PROMPTS[0], false).expect("text is encoded");
        answers(&mut engine, vec![Request { sampling, ..request(ids, 200) }], 1);
        let stats = stats(&mut engine);
        (stats.head.draft_tokens, stats.head_by_depth.first().map_or(0, |(trials, _)| *trials))
    };
    // No draft is right more often than the likeliest token is drawn: not even to see is anything drafted.
    assert_eq!(drafted(8.0), (0, 0));
    let (tokens, trials) = drafted(0.0);
    assert!(tokens > 20 && trials > 20, "{tokens} {trials}");
}

#[test]
fn a_head_begins_with_the_last_rows_of_a_long_prompt() {
    let tokenizer = tokenizer();
    let ids = tokenizer.encode(&PROMPTS[0].repeat(12), false).expect("text is encoded");
    assert!(ids.len() > 300);
    let run = |policy: Policy, max_depth: usize| {
        let options = SpeculationOptions {
            suffix: false,
            policy,
            max_depth,
            cost: Some(cheap_rows()),
            ..SpeculationOptions::default()
        };
        let mut engine = engine(Some(options));
        let events = answers(&mut engine, vec![request(ids.clone(), 60)], 1);
        (ids_of(&events[0]), stats(&mut engine))
    };
    let plain = ids_of(&answers(&mut engine(None), vec![request(ids.clone(), 60)], 1)[0]);
    let (always, all) = run(Policy::Always, 1);
    let (governed, window) = run(Policy::Governed, 1);
    assert_eq!((&always, &governed), (&plain, &plain));
    assert!(all.head_rows as usize >= ids.len(), "{all:?}");
    // At most 64 rows of the prompt, then what is generated and drafted.
    assert!(window.head.accepted_tokens > 10, "{window:?}");
    assert!((window.head_rows as usize) < 64 + 2 * 60, "{window:?}");
}

#[test]
fn the_same_prompt_many_times_at_once_shares_blocks_and_changes_nothing() {
    // Sequences that exchange their full blocks for each other's while a head follows them from different rows on.
    let tokenizer = tokenizer();
    let make = || -> Vec<Request> {
        let ids = tokenizer.encode(&PROMPTS[0].repeat(4), false).expect("text is encoded");
        (0..8).map(|index| request(ids[..ids.len() - index % 3].to_vec(), 70)).collect()
    };
    let plain = answers(&mut engine(None), make(), 1);
    for policy in [Policy::Governed, Policy::Always] {
        let options =
            SpeculationOptions { policy, max_depth: 4, cost: Some(cheap_rows()), ..SpeculationOptions::default() };
        let mut engine = engine(Some(options));
        let found = answers(&mut engine, make(), 8);
        for (found, plain) in found.iter().zip(&plain) {
            assert_eq!(ids_of(found), ids_of(plain), "{policy:?}");
        }
        assert!(stats(&mut engine).all().accepted_tokens > 50);
    }
}
