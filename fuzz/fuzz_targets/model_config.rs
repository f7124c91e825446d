//! Any bytes as a model's `config.json`, parsed and held against the tensors of a golden model.

#![no_main]

use libfuzzer_sys::fuzz_target;
use moellon_checkpoint::{Checkpoint, json_file};
use moellon_model::arch;
use moellon_model::weights::Weights;
use std::path::Path;

thread_local! {
    static CHECKPOINT: Checkpoint = Checkpoint::open(concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/golden/glm_moe_dsa"))
        .expect("the golden model opens");
}

fuzz_target!(|data: &[u8]| {
    let Ok(config) = json_file::parse_object(Path::new("config.json"), data) else { return };
    let Err(error) = arch::parse(&config) else {
        let parsed = arch::parse(&config).expect("parsing is a function");
        CHECKPOINT.with(|checkpoint| drop(Weights::describe(&parsed, checkpoint)));
        return;
    };
    assert!(!error.to_string().contains('\n'), "a message is one line");
});
