//! An EAGLE-3 head in the published format gives what a numpy implementation computes with it (`fixtures/make_eagle.py`), on
//! every back end: rows of a prompt at once or one by one, and a chain of drafts.

mod golden_support;

use golden_support::{Golden, all_backends};
use moellon_checkpoint::Checkpoint;
use moellon_model::batch::{Batch, LogitRows};
use moellon_model::mtp::{MtpHidden, MtpStep};
use moellon_model::session::read_logits;
use moellon_model::{Decoder, Eagle, EagleConfig};
use moellon_ops::Backend;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::path::PathBuf;

const DRAFT_VOCAB: usize = 80;

fn dir() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/eagle3")
}

fn checkpoint() -> Checkpoint {
    Checkpoint::open(dir()).expect("the head opens")
}

fn target() -> Golden {
    Golden::open("qwen3_moe")
}

/// Values of `golden.safetensors`, each four bytes.
fn expected<T>(key: &str, value: impl Fn([u8; 4]) -> T) -> Vec<T> {
    let file = std::fs::read(dir().join("golden.safetensors")).expect("the head has golden values");
    let file = SafeTensors::deserialize(&file).expect("they are sound");
    file.tensor(key).expect("golden key").data().as_chunks::<4>().0.iter().map(|b| value(*b)).collect()
}

fn assert_close(actual: &[f32], expected: &[f32], what: &str) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    let worst = actual.iter().zip(expected).map(|(a, e)| (a - e).abs()).fold(0.0, f32::max);
    // f32 sums of up to 192 products of logits near 10, as for the golden models.
    assert!(worst <= 2e-4, "{what}: worst difference {worst:e}");
}

/// Runs the target over its prompt in steps of `chunk` rows, and the head behind it. Returns logits of all rows.
fn drafts(chunk: usize, decoder: &mut Decoder, eagle: &mut Eagle, backend: &mut dyn Backend, ids: &[u32]) -> Vec<f32> {
    let blocks: Vec<u32> = (0..16).collect();
    let batch = |tokens: &[u32], first: usize, rows| {
        let mut batch = Batch::default();
        batch.push_sequence(tokens, first, &blocks, 8, rows);
        batch
    };
    let mut logits = Vec::new();
    for first in (0..ids.len() - 1).step_by(chunk) {
        let end = (first + chunk).min(ids.len() - 1);
        decoder.forward(&batch(&ids[first..end], first, LogitRows::None), backend).expect("the target runs");
        let rows: Vec<u32> = (0..(end - first) as u32).collect();
        // The last chunk is read where it is, the others after they were kept.
        let hidden = if end == ids.len() - 1 { MtpHidden::Trunk } else { MtpHidden::Saved };
        if hidden == MtpHidden::Saved {
            eagle.save_hidden(&rows, 0, decoder, backend).expect("rows are kept");
        }
        let batch = batch(&ids[first + 1..end + 1], first, LogitRows::All);
        let step = MtpStep { batch: &batch, hidden_rows: &rows, hidden, share_index_of: None };
        let found = eagle.forward(&step, decoder, backend).expect("the head runs");
        logits.extend(read_logits(found, backend).expect("logits are read"));
    }
    logits
}

#[test]
fn a_head_drafts_what_numpy_says() {
    let target = target();
    let checkpoint = checkpoint();
    let config = EagleConfig::parse(&checkpoint.config, target.config()).expect("the config is legal");
    assert_eq!(config.taps, [1, 2, 3]);
    let logits = expected("logits", f32::from_le_bytes);
    let chain_logits = expected("chain_logits", f32::from_le_bytes);
    let chain_tokens = expected("chain_tokens", u32::from_le_bytes);
    for mut backend in all_backends() {
        let backend = backend.as_mut();
        let name = backend.caps().name;
        let mut decoder = target.decoder(backend);
        let mut eagle = Eagle::load(&config, &checkpoint, &mut decoder, backend).expect("the head loads");
        for chunk in [1, 7, 47] {
            let found = drafts(chunk, &mut decoder, &mut eagle, backend, &target.ids);
            assert_close(&found, &logits, &format!("{name}, {chunk} rows at a time"));
        }
        let mut row: Vec<f32> = logits[logits.len() - DRAFT_VOCAB..].to_vec();
        let mut hidden_row = target.ids.len() as u32 - 2;
        for (depth, expected_token) in chain_tokens.iter().enumerate() {
            assert_close(&row, &chain_logits[depth * DRAFT_VOCAB..][..DRAFT_VOCAB], &format!("{name}, depth {depth}"));
            let best = (0..DRAFT_VOCAB).max_by(|a, b| row[*a].total_cmp(&row[*b])).expect("there are logits");
            let token = eagle.draft_tokens().expect("the vocabulary is reduced")[best];
            assert_eq!(token, *expected_token, "{name}, depth {depth}");
            let blocks: Vec<u32> = (0..16).collect();
            let mut batch = Batch::default();
            batch.push_sequence(&[token], target.ids.len() - 1 + depth, &blocks, 8, LogitRows::All);
            let (hidden_rows, hidden) = ([hidden_row], MtpHidden::Mtp);
            let step = MtpStep { batch: &batch, hidden_rows: &hidden_rows, hidden, share_index_of: None };
            let found = eagle.forward(&step, &decoder, backend).expect("the head runs");
            row = read_logits(found, backend).expect("logits are read");
            hidden_row = 0;
        }
    }
}

#[test]
fn which_streams_a_head_reads_is_said_in_three_ways() {
    let target = target();
    let parse = |change: fn(&mut Value)| {
        let mut config = checkpoint().config.clone();
        change(&mut config);
        EagleConfig::parse(&config, target.config())
    };
    let taps = |change: fn(&mut Value)| parse(change).expect("legal").taps;
    let top = |config: &mut Value| {
        config["eagle_config"] = json!({"use_aux_hidden_state": true});
        config["eagle_aux_hidden_state_layer_ids"] = json!([0, 1, 3]);
    };
    assert_eq!(taps(top), [0, 1, 3]);
    let error = |change: fn(&mut Value)| parse(change).expect_err("it was accepted").to_string();
    assert!(
        error(|config| config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = json!([0, 1, 3]))
            .contains("[1, 2, 4] (as inputs of layers), expected 3 layers in ascending order of the model's 3")
    );
    // The layers that both engines read where nothing is said: 2, 3 / 2 and 3 - 3.
    assert!(error(|config| config["eagle_config"] = json!(null)).contains("[2, 1, 0] (as inputs of layers)"));
    assert!(
        error(|config| config["hidden_size"] = json!(32)).contains("target_hidden_size is 32, expected the model's")
    );
    assert!(error(|config| config["vocab_size"] = json!(64)).contains("vocab_size is 64, expected the model's (128)"));
    assert!(error(|config| config["num_hidden_layers"] = json!(2)).contains("num_hidden_layers is 2, expected 1"));
}

#[test]
fn the_published_layouts_are_told_from_models() {
    assert!(EagleConfig::is_eagle(&checkpoint().config));
    assert!(EagleConfig::is_eagle(&json!({"speculators_model_type": "eagle3"})));
    assert!(!EagleConfig::is_eagle(&target().checkpoint().config));
}
