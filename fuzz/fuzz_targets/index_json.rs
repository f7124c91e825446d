//! Any bytes as `model.safetensors.index.json`. No accepted shard name may leave the directory.

#![no_main]

use libfuzzer_sys::fuzz_target;
use moellon_checkpoint::index;
use std::path::{Component, Path};

fuzz_target!(|data: &[u8]| {
    match index::parse(Path::new("model.safetensors.index.json"), data) {
        Ok(index) => {
            for shard in index.shards() {
                let components: Vec<Component<'_>> = Path::new(shard).components().collect();
                assert!(matches!(components[..], [Component::Normal(_)]), "{shard:?}");
            }
        }
        Err(error) => assert!(!error.to_string().contains('\n'), "a message is one line"),
    }
});
