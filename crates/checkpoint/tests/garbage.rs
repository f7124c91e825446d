//! No input makes the parsers panic: random bytes, mutated headers, mutated whole checkpoints.

use moellon_checkpoint::testing::{Builder, Storage, random_values};
use moellon_checkpoint::{Checkpoint, MlaShape, Projection, header, index, json_file};
use moellon_tensor::ScaleDtype;
use proptest::prelude::*;
use serde_json::json;
use std::fs;
use std::path::Path;

/// A file with tensors of several layouts, so that mutations reach all readers.
fn checkpoint_bytes() -> Vec<u8> {
    let mut builder = Builder::default();
    builder.add_linear("w", Storage::MlxAffine(4, 32, ScaleDtype::Bf16), [8, 64], &random_values(512, 1));
    builder.add_linear("n", Storage::ModelOptNvfp4, [8, 64], &random_values(512, 1));
    builder.add_linear("f", Storage::Fp8Block([4, 32]), [8, 64], &random_values(512, 1));
    builder.add_experts("m", ["gate_proj", "up_proj", "down_proj"], Storage::MlxMxfp4, 2, [32, 32], 3);
    builder.add_gpt_oss_experts("g", 2, [32, 32], 3);
    builder.add_linear("a.kv_b_proj", Storage::Plain(ScaleDtype::Bf16), [24, 8], &random_values(192, 1));
    let dir = tempfile::tempdir().unwrap();
    builder.write(dir.path(), &json!({}), usize::MAX).unwrap();
    fs::read(dir.path().join("model.safetensors")).unwrap()
}

/// Reads everything that a model loader would; errors are fine, panics are not.
fn read_all(checkpoint: &Checkpoint) {
    for path in ["w", "n", "f", "m.experts.0.gate_proj"] {
        for shape in [[8, 64], [32, 32], [0, 0], [usize::MAX, 3]] {
            if let Ok(matrix) = checkpoint.linear(path, shape) {
                let view = matrix.view();
                let _ = Checkpoint::check_finite(path, &view);
                view.decode_all();
            }
        }
    }
    for block in ["m", "g"] {
        for projection in [Projection::Gate, Projection::Up, Projection::Down] {
            for matrix in checkpoint.experts(block, projection, None, [32, 32]).unwrap_or_default() {
                matrix.view().decode_all();
            }
            let _ = checkpoint.expert_biases(block, projection, 32);
        }
    }
    let shape = MlaShape { num_heads: 2, qk_nope_head_dim: 8, v_head_dim: 4, kv_lora_rank: 8 };
    let _ = checkpoint.mla_kv_b("a", shape);
    let _ = checkpoint.vector("w.scales", 16);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn random_bytes(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        let file = Path::new("random");
        prop_assert!(header::parse(file, &bytes).is_err() || bytes.len() >= 10);
        let _ = index::parse(file, &bytes);
        let _ = json_file::parse_object(file, &bytes);
        // The same bytes as the JSON of a file whose length field is right.
        let _ = header::parse(file, &[&(bytes.len() as u64).to_le_bytes(), bytes.as_slice()].concat());
    }

    #[test]
    fn mutated_checkpoints(edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 1..6), cut in any::<Option<prop::sample::Index>>()) {
        thread_local!(static GOOD: Vec<u8> = checkpoint_bytes());
        let mut bytes = GOOD.with(Vec::clone);
        let header_bytes = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        for (at, value, in_header) in edits {
            let at = at.index(if in_header { header_bytes } else { bytes.len() });
            // Digits stay digits in half of the edits, so that offsets and shapes change and the JSON still parses.
            bytes[at] = if bytes[at].is_ascii_digit() && value & 1 == 0 { b'0' + value % 10 } else { value };
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), "{}").unwrap();
        fs::write(dir.path().join("model.safetensors"), &bytes).unwrap();
        if let Ok(checkpoint) = Checkpoint::open(dir.path()) {
            read_all(&checkpoint);
        }
    }
}
