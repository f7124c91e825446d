//! The bundled model with its tokenizer: grammars bind what a real model says.

mod support;

use moellon_checkpoint::Checkpoint;
use moellon_engine::{Engine, EngineOptions, Event, FinishReason, Request, SamplingParams};
use moellon_model::weights::Weights;
use moellon_model::{Decoder, DecoderOptions, arch};
use moellon_ops::CacheDtype;
use moellon_text::Tokenizer;
use moellon_text::constraint::{Grammar, GrammarCompiler};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use support::{drain, ids_of, request, run};

fn model_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/moellon-tiny")
}

fn engine() -> Engine {
    let mut backend = support::cpu();
    let checkpoint = Checkpoint::open(model_dir()).expect("the bundled model opens");
    let config = arch::parse(&checkpoint.config).expect("its config is legal");
    let weights = Weights::load(&config, &checkpoint, backend.as_mut(), &mut |_| {}).expect("its weights load");
    let options = DecoderOptions {
        max_batch_tokens: 64,
        max_sequences: 8,
        max_logit_rows: 64,
        max_context: 512,
        block_size: 16,
        num_blocks: 128,
        cache_dtype: CacheDtype::Bf16,
    };
    let decoder = Decoder::new(config, weights, options, backend.as_mut()).expect("the decoder fits");
    Engine::new(decoder, backend, EngineOptions::default()).expect("the engine starts")
}

#[test]
fn eight_streams_with_a_schema_all_give_json_of_it() {
    let mut engine = engine();
    let tokenizer = Tokenizer::from_folder(&model_dir()).expect("the tokenizer loads");
    let compiler = GrammarCompiler::new(&tokenizer, engine.limits().vocab_size).expect("the trie is built");
    let schema = json!({"type": "object", "additionalProperties": false, "required": ["word", "count"], "properties": {
        "word": {"type": "string", "maxLength": 12}, "count": {"type": "integer", "minimum": 0, "maximum": 999}}});
    let prompt = tokenizer.encode("Write a word and how often it comes, as JSON.", false).expect("text is encoded");
    let mut receivers = Vec::new();
    for seed in 0..8 {
        let constraint = compiler.compile(Grammar::JsonSchema(schema.clone())).expect("the schema compiles");
        let constrained = Request {
            constraint: Some(constraint),
            sampling: SamplingParams { temperature: 1.0, seed, ..SamplingParams::default() },
            stop_token_ids: tokenizer.eos_id().into_iter().collect(),
            ..request(prompt.clone(), 400)
        };
        receivers.push(engine.submit(constrained).expect("the request is legal"));
    }
    run(&mut engine);
    for receiver in &mut receivers {
        let events = drain(receiver);
        let Some(Event::Finished(finished)) = events.last() else { panic!("{events:?}") };
        let text = tokenizer.decode(&ids_of(&events), true);
        assert_eq!(finished.reason, FinishReason::Stop, "{text}");
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{text}: {error}"));
        assert!(value["word"].is_string() && value["count"].is_u64(), "{text}");
    }
}

#[test]
fn the_second_turn_of_a_conversation_computes_only_what_is_new() {
    let mut engine = engine();
    let tokenizer = Tokenizer::from_folder(&model_dir()).expect("the tokenizer loads");
    let text = "The mason takes a stone from the heap and looks at it from all sides. ".repeat(12);
    let mut prompt = tokenizer.encode(&text, false).expect("text is encoded");
    prompt.truncate(300);
    let mut receiver = engine.submit(request(prompt.clone(), 20)).expect("the request is legal");
    run(&mut engine);
    prompt.extend(ids_of(&drain(&mut receiver)));
    let known = prompt.len();
    prompt.extend(tokenizer.encode(" And then?", false).expect("text is encoded"));
    let mut receiver = engine.submit(request(prompt, 5)).expect("the request is legal");
    run(&mut engine);
    let events = drain(&mut receiver);
    let [Event::Started(started), ..] = events.as_slice() else { panic!("{events:?}") };
    // All but the first turn's last token, which was never computed.
    assert_eq!(started.cached_tokens, known - 1);
    assert!(started.cached_tokens * 100 >= known * 99);
}
