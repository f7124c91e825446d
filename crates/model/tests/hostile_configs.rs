//! No `config.json` makes the loader panic: whatever a field says, it is an error with the field's name or a model whose
//! shapes are then held against the tensors.

use moellon_checkpoint::Checkpoint;
use moellon_model::arch;
use moellon_model::weights::Weights;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::path::PathBuf;

fn checkpoints() -> Vec<Checkpoint> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/golden");
    let folders = std::fs::read_dir(root).expect("fixtures exist").map(|e| e.expect("readable").path());
    folders.filter(|p| p.is_dir()).map(|p| Checkpoint::open(p).expect("fixture opens")).collect()
}

fn hostile_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (0u64..200).prop_map(Value::from),
        Just(json!(1_000_000_000)),
        Just(json!(u64::MAX)),
        any::<f64>().prop_map(Value::from),
        Just(json!("full")),
        Just(json!("SSSS")),
        Just(json!([])),
        Just(json!(["full", "shared"])),
        Just(json!({"rope_type": "yarn"})),
        Just(json!({"rope_type": "yarn", "rope_theta": 1.0, "factor": 1e308, "original_max_position_embeddings": 1})),
        Just(
            json!({"rope_type": "yarn", "rope_theta": 1e-300, "factor": 1e-300, "original_max_position_embeddings": 1e300})
        ),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn damaged_configs_are_errors_not_panics(
        which in any::<prop::sample::Index>(),
        damage in proptest::collection::vec((any::<prop::sample::Index>(), hostile_value()), 1..4),
    ) {
        thread_local! {
            static CHECKPOINTS: Vec<Checkpoint> = checkpoints();
        }
        CHECKPOINTS.with(|checkpoints| {
            let checkpoint = which.get(checkpoints);
            let mut config = checkpoint.config.clone();
            let keys: Vec<String> = config.as_object().expect("an object").keys().cloned().collect();
            for (key, value) in damage {
                config[key.get(&keys)] = value;
            }
            let message = match arch::parse(&config) {
                Err(error) => error.to_string(),
                Ok(parsed) => match Weights::describe(&parsed, checkpoint) {
                    Err(error) => error.to_string(),
                    Ok(_) => return,
                },
            };
            assert!(!message.is_empty() && !message.contains('\n'), "{message:?}");
        });
    }
}
