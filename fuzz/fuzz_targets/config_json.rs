//! Any bytes as `config.json`, held against a small checkpoint with weights of several formats.

#![no_main]

use libfuzzer_sys::fuzz_target;
use moellon_checkpoint::testing::{Builder, Storage, random_values};
use moellon_checkpoint::{Checkpoint, json_file};
use moellon_tensor::ScaleDtype;
use std::cell::RefCell;
use std::path::Path;

const STORAGES: [Storage; 4] = [
    Storage::Plain(ScaleDtype::Bf16),
    Storage::MlxAffine(4, 64, ScaleDtype::Bf16),
    Storage::MlxNvfp4,
    Storage::Fp8Block([128, 128]),
];
/// Names that the fuzzer can guess as keys.
const PATHS: [&str; 4] = ["a", "b", "c", "d"];

thread_local! {
    static CHECKPOINT: RefCell<Checkpoint> = RefCell::new(small_checkpoint());
}

fn small_checkpoint() -> Checkpoint {
    let mut builder = Builder::default();
    for (path, storage) in PATHS.into_iter().zip(STORAGES) {
        builder.add_linear(path, storage, [8, 64], &random_values(512, 1));
    }
    let dir = std::env::temp_dir().join(format!("moellon-fuzz-config-{}", std::process::id()));
    builder.write(&dir, &serde_json::json!({}), usize::MAX).expect("a temporary checkpoint can be written");
    let checkpoint = Checkpoint::open(&dir).expect("it can be opened");
    // The map stays valid without its name.
    std::fs::remove_dir_all(&dir).expect("it can be removed");
    checkpoint
}

fuzz_target!(|data: &[u8]| {
    let Ok(config) = json_file::parse_object(Path::new("config.json"), data) else { return };
    CHECKPOINT.with_borrow_mut(|checkpoint| {
        checkpoint.config = config;
        for path in PATHS {
            if let Err(error) = checkpoint.linear(path, [8, 64]) {
                assert!(!error.to_string().contains('\n'), "a message is one line");
            }
        }
    });
});
