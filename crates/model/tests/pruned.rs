//! Models that lost experts: what does not fit together is refused by name, and what does is loaded layer by layer.

use moellon_checkpoint::{Checkpoint, TensorSpec, Writer, WriterOptions};
use moellon_model::arch;
use moellon_model::weights::{FfnWeights, Weights};
use moellon_ops::reference::ReferenceBackend;
use std::path::PathBuf;

/// The golden GLM model, of eight experts in three layers and the MTP layer, after `keep` has said how many rows of each
/// tensor stay; the error of loading it, or how many experts its layers have, MTP last.
fn load(keep: impl Fn(&str, usize) -> usize) -> Result<Vec<usize>, String> {
    let golden = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/golden/glm_moe_dsa");
    let whole = Checkpoint::open(&golden).expect("fixture opens");
    let folder = tempfile::tempdir().expect("a folder");
    let kept: Vec<(TensorSpec, &[u8])> = whole
        .tensors()
        .filter_map(|tensor| {
            let rows = keep(tensor.name, tensor.shape[0]);
            let mut shape = tensor.shape.to_vec();
            let bytes = &tensor.bytes[..tensor.bytes.len() / shape[0] * rows];
            shape[0] = rows;
            let spec = TensorSpec { name: tensor.name.to_owned(), dtype: tensor.dtype, shape };
            (rows > 0).then_some((spec, bytes))
        })
        .collect();
    let specs = kept.iter().map(|(spec, _)| spec.clone()).collect();
    let mut writer = Writer::create(folder.path(), specs, &WriterOptions::default()).expect("a writer");
    for (spec, bytes) in &kept {
        writer.write(&spec.name, bytes).expect("writes");
    }
    writer.write_json("config.json", &whole.config).expect("writes");
    writer.finish().expect("finishes");
    let checkpoint = Checkpoint::open(folder.path()).expect("the parts are sound");
    let config = arch::parse(&checkpoint.config).expect("the config is sound");
    let mut backend = ReferenceBackend::new();
    let weights = Weights::load(&config, &checkpoint, &mut backend, &mut |_| {}).map_err(|error| error.to_string())?;
    let layers = weights.layers.iter().chain(weights.mtp.iter().map(|mtp| &mtp.layer));
    Ok(layers
        .filter_map(|layer| match &layer.ffn {
            FfnWeights::Moe(moe) => Some(moe.experts.num_experts),
            FfnWeights::Dense(_) => None,
        })
        .collect())
}

/// Which expert of which layer a tensor belongs to.
fn expert_of(name: &str) -> Option<(usize, usize)> {
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once(".mlp.experts.")?;
    Some((layer.parse().ok()?, rest.split_once('.')?.0.parse().ok()?))
}

/// What is left when `experts(layer)` of them stay, in experts, router and bias.
fn pruned(name: &str, rows: usize, experts: impl Fn(usize) -> usize) -> usize {
    let layer = |prefix: &str| name.strip_prefix("model.layers.")?.strip_suffix(prefix)?.parse().ok();
    match (expert_of(name), layer(".mlp.gate.weight").or(layer(".mlp.gate.e_score_correction_bias"))) {
        (Some((layer, expert)), _) => {
            if expert < experts(layer) {
                rows
            } else {
                0
            }
        }
        (None, Some(layer)) => experts(layer).min(rows),
        (None, None) => rows,
    }
}

#[test]
fn layers_and_the_mtp_head_may_keep_different_numbers_of_experts() {
    let of_layer = |layer| [8, 6, 3, 5, 8][layer];
    // The last is the head: unpruned, and still of its own router's size.
    assert_eq!(load(|name, rows| pruned(name, rows, of_layer)), Ok(vec![6, 3, 5, 8]));
}

#[test]
fn parts_of_a_layer_that_kept_different_numbers_are_named() {
    let refused = |keep: &dyn Fn(&str, usize) -> usize| load(keep).expect_err("it does not fit together");
    // Fewer experts than a token wants.
    let few = refused(&|name, rows| pruned(name, rows, |layer| if layer == 2 { 1 } else { 8 }));
    assert!(few.contains("model.layers.2") && few.contains('1') && few.contains("num_experts_per_tok (2)"), "{few}");
    // A router that was forgotten, in a layer and in the MTP head.
    for layer in [1, 4] {
        let error = refused(&|name, rows| match expert_of(name) {
            Some((of, 6..)) if of == layer => 0,
            _ => rows,
        });
        let expected = format!("model.layers.{layer}.mlp.gate.weight: shape: found [8, 64], expected [6, 64]");
        assert!(error.contains(&expected), "{error}");
    }
    // A router that was cut alone, and a bias.
    for part in ["weight", "e_score_correction_bias"] {
        let name = format!("model.layers.3.mlp.gate.{part}");
        let error = refused(&|found, rows| if found == name { 7 } else { rows });
        assert!(error.contains(&name) && error.contains("found [7"), "{error}");
    }
    // An expert in the middle.
    let hole = refused(&|name, rows| if expert_of(name) == Some((1, 3)) { 0 } else { rows });
    assert!(hole.contains("model.layers.1.mlp.experts.3 is missing"), "{hole}");
}
