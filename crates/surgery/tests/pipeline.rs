//! Calibration, pruning, planning and comparison over tiny models, on the CPU.

use moellon_backend_cpu::{ActivationMode, CpuBackend, CpuOptions};
use moellon_checkpoint::{Checkpoint, Projection};
use moellon_model::{ModelConfig, arch};
use moellon_ops::Backend;
use moellon_surgery::allocate::Budget;
use moellon_surgery::calibrate::{CalibrateOptions, calibrate};
use moellon_surgery::compare::{Comparison, compare};
use moellon_surgery::encoder::{EncoderOptions, Method};
use moellon_surgery::inventory::Inventory;
use moellon_surgery::prune::{MtpExperts, PruneOptions, Score, prune};
use moellon_surgery::quantize::{QuantizeOptions, quantize};
use moellon_surgery::recalibrate::{RecalibrateOptions, recalibrate};
use moellon_surgery::stats::MomentsMode;
use moellon_surgery::stream::Sequences;
use moellon_surgery::{Plan, Progress, Source, Stats, formats, sensitivity};
use moellon_tensor::ScaleDtype;
use moellon_tensor::rng::SplitMix64;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

struct Opened {
    checkpoint: Checkpoint,
    config: ModelConfig,
}

impl Opened {
    fn new(dir: &Path) -> Self {
        let checkpoint = Checkpoint::open(dir).expect("the model opens");
        let config = arch::parse(&checkpoint.config).expect("the config is known");
        Opened { checkpoint, config }
    }

    fn fixture(name: &str) -> Self {
        Self::new(&PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/golden").join(name))
    }

    fn source(&self) -> Source<'_> {
        Source { name: "test", checkpoint: &self.checkpoint, config: &self.config, files: &[] }
    }

    fn tokens(&self, count: usize, len: usize) -> Sequences {
        let mut rng = SplitMix64::new(7);
        let ids = (0..count).map(|_| (0..len).map(|_| rng.below(self.config.vocab_size) as u32).collect()).collect();
        Sequences { ids }
    }
}

fn backend() -> moellon_ops::Result<Box<dyn Backend>> {
    let options = CpuOptions { threads: Some(1), level: None, activation: ActivationMode::Exact, pin: false };
    Ok(Box::new(CpuBackend::new(options).expect("the CPU starts")))
}

fn stats(model: &Opened, sequences: &Sequences, moments: MomentsMode, dir: &Path) -> Stats {
    let options = CalibrateOptions { texts: Vec::new(), sequence_len: 48, moments };
    calibrate(model.source(), sequences, &options, dir, &mut backend, &mut |_| {}).expect("the model is calibrated");
    Stats::open(dir).expect("the calibration opens")
}

fn distance(model: &Opened, reference: &Opened, sequences: &Sequences) -> Comparison {
    compare(model.source(), reference.source(), sequences, &mut backend, &mut |_| {}).expect("the models compare")
}

/// The observer's sums against sums over the same products computed here.
#[test]
fn calibration_counts_what_flows() {
    let model = Opened::fixture("glm_moe_dsa");
    let dir = tempfile::tempdir().expect("temporary directory");
    let sequences = model.tokens(2, 40);
    let stats = stats(&model, &sequences, MomentsMode::Expert, &dir.path().join("stats"));
    stats.check_model(&model.checkpoint).expect("the calibration is of this model");
    let inventory = Inventory::take(&model.config, &model.checkpoint).expect("inventory");
    let top_k = model.config.moe.num_experts_per_tok as u32;
    let mut blocks = 0;
    for module in inventory.modules.iter().filter(|m| m.name != "model.embed_tokens" && !m.name.ends_with(".gate")) {
        let tokens = stats.tokens(&module.name).unwrap_or_else(|| panic!("{} was not seen", module.name));
        let input_sq = stats.input_sq(&module.name).expect("importances");
        assert_eq!(stats.num_moments(&module.name), module.count, "{}", module.name);
        assert_eq!((tokens.len(), input_sq.len(), input_sq[0].len()), (module.count, module.count, module.cols));
        for (index, own) in input_sq.iter().enumerate() {
            let moments = stats.moments(&module.name, index).expect("moments");
            for (c, x) in own.iter().enumerate() {
                let diagonal = moments[c * module.cols + c];
                assert!((x - diagonal).abs() <= 1e-4 * x.abs() + 1e-9, "{}: {x} {diagonal}", module.name);
            }
        }
        // A row fewer a sequence for the MTP layer: the last token has none after it.
        let rows = if module.mtp { 78 } else { 80 };
        if module.name.contains(".experts.") {
            assert_eq!(tokens.iter().sum::<u32>(), rows * top_k, "{}", module.name);
            blocks += 1;
        } else {
            assert!(tokens.iter().all(|t| *t == rows), "{}: {tokens:?}", module.name);
        }
    }
    assert!(blocks >= 6);
    let saliency = stats.saliency("model.layers.1.mlp").expect("saliency");
    // Combine weights of a token add up to the scaling factor.
    let gates: f32 = saliency.gate.iter().sum();
    assert!((gates / 80.0 - model.config.moe.routed_scaling_factor).abs() < 1e-3, "{gates}");
    for expert in 0..saliency.tokens.len() {
        let tokens = saliency.tokens[expert] as f32;
        assert!(saliency.norm[expert] <= saliency.norm_max[expert] * tokens * 1.0001);
        assert!(saliency.gate_norm[expert].powi(2) <= saliency.gate_norm_sq[expert] * tokens * 1.001);
    }
}

#[test]
fn error_feedback_brings_predictions_nearer() {
    let model = Opened::fixture("glm4_moe");
    let dir = tempfile::tempdir().expect("temporary directory");
    let stats = stats(&model, &model.tokens(24, 48), MomentsMode::Expert, &dir.path().join("stats"));
    let plan = Plan::uniform(formats::parse("affine-3-g32").expect("known"));
    let mut found = Vec::new();
    for method in [Method::Rtn, Method::Search, Method::Gptq] {
        let out = dir.path().join(method.name());
        let encoder = EncoderOptions { method, nvfp4_global_scale: true };
        let options = QuantizeOptions { plan: &plan, stats: Some(&stats), encoder, max_shard_bytes: 1 << 30 };
        quantize(model.source(), options, &out, &mut |_| {}).expect("the model is quantized");
        let mut other = model.tokens(8, 40);
        other.ids.iter_mut().flatten().for_each(|id| *id = (*id * 5 + 3) % model.config.vocab_size as u32);
        let comparison = distance(&Opened::new(&out), &model, &other);
        assert!(comparison.bits_per_weight < 5.5, "{}", comparison.bits_per_weight);
        found.push(comparison.kl_mean);
    }
    // Random weights and random tokens leave less to win than a trained model does.
    assert!(found[1] < 0.9 * found[0] && found[2] < 0.95 * found[1], "{found:?}");
}

#[test]
fn a_model_is_at_no_distance_from_itself() {
    let model = Opened::fixture("glm_moe_dsa_pattern");
    let comparison = distance(&model, &model, &model.tokens(3, 40));
    assert_eq!((comparison.kl_mean, comparison.kl_max, comparison.top1_agreement), (0.0, 0.0, 1.0));
    assert_eq!(comparison.ppl, comparison.ref_ppl);
    assert_eq!(comparison.mtp_agreement, comparison.ref_mtp_agreement);
    assert!(comparison.layer_snr_db.iter().all(|db| *db == f64::INFINITY));
    assert_eq!(comparison.tokens, 3 * 39);
}

/// Every tensor arrives under the name that the reader looks for, biases and transposed halves included.
#[test]
fn a_model_written_without_loss_predicts_the_same_bits() {
    for name in ["glm_moe_dsa_pattern", "deepseek_v3_direct", "glm4_moe", "qwen3_moe", "gpt_oss", "mixtral"] {
        let model = Opened::fixture(name);
        let dir = tempfile::tempdir().expect("temporary directory");
        let out = dir.path().join("f32");
        let plan = Plan::uniform(formats::parse("f32").expect("known"));
        let encoder = EncoderOptions { method: Method::Search, nvfp4_global_scale: true };
        let options = QuantizeOptions { plan: &plan, stats: None, encoder, max_shard_bytes: 1 << 30 };
        quantize(model.source(), options, &out, &mut |_| {}).expect("the model is written");
        let comparison = distance(&Opened::new(&out), &model, &model.tokens(2, 30));
        assert_eq!(comparison.kl_max, 0.0, "{name}");
        assert!(comparison.layer_snr_db.iter().all(|db| *db == f64::INFINITY), "{name}: {comparison:?}");
    }
}

#[test]
fn pruned_experts_are_the_same_bytes_and_the_rest_is_untouched() {
    for name in ["glm_moe_dsa", "qwen3_moe", "gpt_oss", "mixtral", "glm4_moe_group"] {
        let model = Opened::fixture(name);
        let dir = tempfile::tempdir().expect("temporary directory");
        let stats = stats(&model, &model.tokens(4, 32), MomentsMode::None, &dir.path().join("stats"));
        let moe = model.config.moe;
        let keep = moe.num_experts - moe.n_group.max(1) * if moe.n_group > 1 { 1 } else { 2 };
        let out = dir.path().join("pruned");
        let options = PruneOptions { keep, score: Score::Reap, mtp: MtpExperts::Whole, max_shard_bytes: 1 << 30 };
        prune(model.source(), &stats, options, &out, &mut |_| {}).unwrap_or_else(|e| panic!("{name}: {e}"));
        let product = Opened::new(&out);
        let expert_keep = product.checkpoint.config["expert_keep"].as_object().expect("provenance").clone();
        let inventory = Inventory::take(&product.config, &product.checkpoint).expect("the product is whole");
        let mut compared = 0;
        for module in &inventory.modules {
            let original = Inventory::take(&model.config, &model.checkpoint).expect("inventory");
            let original = original.module(&module.name).expect("the same modules").clone();
            let (found, expected) = (
                module.matrices(&product.checkpoint).expect("matrices"),
                original.matrices(&model.checkpoint).expect("matrices"),
            );
            let kept: Vec<usize> = match expert_keep.get(&module.layer.unwrap_or(usize::MAX).to_string()) {
                Some(kept) if module.name.contains(".experts.") => {
                    kept.as_array().expect("a list").iter().map(|id| id.as_u64().expect("a number") as usize).collect()
                }
                Some(kept) if module.rows == keep => {
                    // The router: rows instead of matrices.
                    let rows = original.cols;
                    let (found, expected) = (found[0].view().decode_all(), expected[0].view().decode_all());
                    for (at, id) in kept.as_array().expect("a list").iter().enumerate() {
                        let id = id.as_u64().expect("a number") as usize;
                        assert_eq!(
                            found[at * rows..][..rows],
                            expected[id * rows..][..rows],
                            "{name}: {}",
                            module.name
                        );
                    }
                    compared += 1;
                    continue;
                }
                _ => (0..module.count).collect(),
            };
            assert_eq!(found.len(), kept.len(), "{name}: {}", module.name);
            for (found, &id) in found.iter().zip(&kept) {
                assert_eq!(found.view().decode_all(), expected[id].view().decode_all(), "{name}: {}", module.name);
            }
            compared += 1;
        }
        assert_eq!(compared, inventory.modules.len());
        // It runs, and MTP layers draft on.
        let comparison = distance(&product, &model, &model.tokens(2, 24));
        assert!(comparison.kl_mean > 0.0 && comparison.kl_mean.is_finite(), "{name}");
    }
}

#[test]
fn pruning_twice_keeps_the_first_numbers() {
    let model = Opened::fixture("glm_moe_dsa");
    let dir = tempfile::tempdir().expect("temporary directory");
    let keep = model.config.moe.num_experts - 1;
    let step = |model: &Opened, keep, name: &str| {
        let stats = stats(model, &model.tokens(4, 32), MomentsMode::None, &dir.path().join(format!("stats-{name}")));
        let out = dir.path().join(name);
        let options = PruneOptions { keep, score: Score::Frequency, mtp: MtpExperts::Pruned, max_shard_bytes: 1 << 30 };
        prune(model.source(), &stats, options, &out, &mut |_| {}).expect("pruned");
        Opened::new(&out)
    };
    let once = step(&model, keep, "once");
    let twice = step(&once, keep - 1, "twice");
    let layers = model.config.layers.len();
    for layer in [1, layers] {
        let path = format!("model.layers.{layer}.mlp");
        let moe = model.config.moe;
        let shape = [moe.moe_intermediate_size, model.config.hidden_size];
        let experts = |model: &Opened| -> Vec<Vec<f32>> {
            let found = model.checkpoint.experts(&path, Projection::Up, None, shape).expect("experts");
            found.iter().map(|matrix| matrix.view().decode_all()).collect()
        };
        let (first, last) = (experts(&model), experts(&twice));
        let numbers = twice.checkpoint.config["expert_keep"][layer.to_string()].as_array().expect("provenance").clone();
        assert_eq!(last.len(), keep - 1);
        for (found, number) in last.iter().zip(&numbers) {
            assert_eq!(*found, first[number.as_u64().expect("a number") as usize]);
        }
    }
}

/// Makes every router's weights up to three quarters larger or smaller: between random experts there is nothing to learn
/// but what the router was.
fn blur_routers(path: &Path, suffix: &str) {
    let mut file = std::fs::read(path).expect("one shard");
    let header_len = u64::from_le_bytes(file[..8].try_into().expect("eight bytes")) as usize;
    let header: serde_json::Value = serde_json::from_slice(&file[8..8 + header_len]).expect("a header");
    let mut rng = SplitMix64::new(21);
    for (_, entry) in header.as_object().expect("tensors by name").iter().filter(|(name, _)| name.ends_with(suffix)) {
        let dtype = if entry["dtype"] == "F32" { ScaleDtype::F32 } else { ScaleDtype::Bf16 };
        let [begin, end] = [0, 1].map(|at| entry["data_offsets"][at].as_u64().expect("an offset") as usize);
        let data = &mut file[8 + header_len..][begin..end];
        let mut values = vec![0.0; data.len() / dtype.size_bytes()];
        dtype.read_slice(data, 0, &mut values);
        for (at, value) in values.iter().enumerate() {
            dtype.write(value * (0.25 + 1.5 * rng.next_f64() as f32), data, at);
        }
    }
    std::fs::write(path, file).expect("written");
}

/// Nothing but routers changes, those of MTP layers too; a block's output comes nearer; twice the same bytes.
#[test]
fn recalibrated_routers_come_nearer_and_nothing_else_changes() {
    for name in ["glm_moe_dsa", "qwen3_moe", "gpt_oss", "glm4_moe_group"] {
        let model = Opened::fixture(name);
        let dir = tempfile::tempdir().expect("temporary directory");
        let sequences = model.tokens(24, 48);
        let stats = stats(&model, &sequences, MomentsMode::None, &dir.path().join("stats"));
        let moe = model.config.moe;
        let keep = moe.num_experts - moe.n_group.max(1);
        let pruned_dir = dir.path().join("pruned");
        let options = PruneOptions { keep, score: Score::Random(3), mtp: MtpExperts::Pruned, max_shard_bytes: 1 << 30 };
        prune(model.source(), &stats, options, &pruned_dir, &mut |_| {}).unwrap_or_else(|e| panic!("{name}: {e}"));
        blur_routers(&pruned_dir.join("model.safetensors"), &format!(".{}.weight", moe.router_name));
        let pruned = Opened::new(&pruned_dir);
        let options = RecalibrateOptions { texts: Vec::new(), max_shard_bytes: 1 << 30 };
        let run = |out: &Path, progress: &mut dyn FnMut(Progress<'_>)| {
            let (model, pruned) = (model.source(), pruned.source());
            recalibrate(pruned, model, &sequences, &options, out, &mut backend, progress).map_err(|e| e.to_string())
        };
        let out = dir.path().join("out");
        run(&out, &mut |_| {}).unwrap_or_else(|e| panic!("{name}: {e}"));
        let product = Opened::new(&out);
        let mut changed = 0;
        for tensor in pruned.checkpoint.tensors() {
            let found = product.checkpoint.require(tensor.name).expect("every tensor is there");
            assert_eq!((found.dtype, found.shape), (tensor.dtype, tensor.shape), "{name}: {}", tensor.name);
            let router = tensor.name.ends_with(&format!(".{}.weight", moe.router_name));
            assert!(router || found.bytes == tensor.bytes, "{name}: {}", tensor.name);
            changed += usize::from(found.bytes != tensor.bytes);
        }
        let receipt: serde_json::Value =
            serde_json::from_slice(&std::fs::read(out.join("surgery.json")).expect("a receipt")).expect("JSON");
        let routers = receipt["routers"].as_array().expect("a row for each router");
        let inventory = Inventory::take(&pruned.config, &pruned.checkpoint).expect("inventory");
        let blocks = inventory.modules.iter().filter(|module| module.name.ends_with(".experts.gate_proj")).count();
        assert_eq!(routers.len(), blocks, "{name}");
        let error = |key: &str| -> f64 {
            routers.iter().map(|r| r[key].as_str().and_then(|text| text.parse::<f64>().ok()).expect("a number")).sum()
        };
        // A router that got no better stays as it was.
        let better = routers.iter().filter(|r| r["relative_error"] != r["relative_error_before"]).count();
        assert_eq!(changed, better, "{name}");
        assert!(error("relative_error") < 0.97 * error("relative_error_before"), "{name}: {routers:?}");
        // A run that is cut off after its second layer: what was fitted is in the journal.
        let again = dir.path().join("again");
        let cut = catch_unwind(AssertUnwindSafe(|| {
            let mut layers = 0;
            run(&again, &mut |_| {
                layers += 1;
                if layers == 2 {
                    std::panic::resume_unwind(Box::new("cut off"));
                }
            })
        }));
        assert!(cut.is_err() && !again.exists(), "{name}");
        run(&again, &mut |_| {}).expect("goes on");
        let bytes = |dir: &Path, file: &str| std::fs::read(dir.join(file)).expect("a file of the product");
        for file in ["model.safetensors", "surgery.json", "README.md", "config.json"] {
            assert!(bytes(&out, file) == bytes(&again, file), "{name}: {file}");
        }
        let message = recalibrate(
            model.source(),
            model.source(),
            &sequences,
            &options,
            &dir.path().join("none"),
            &mut backend,
            &mut |_| {},
        );
        let message = message.expect_err("nothing was pruned").to_string();
        assert!(message.contains("blocks with fewer experts than in the reference is 0"), "{message}");
    }
}

#[test]
fn a_measured_plan_beats_a_uniform_one_of_the_same_size() {
    let model = Opened::fixture("glm_moe_dsa");
    let dir = tempfile::tempdir().expect("temporary directory");
    let stats = stats(&model, &model.tokens(8, 48), MomentsMode::None, &dir.path().join("stats"));
    let candidates: Vec<_> = ["affine-2-g32", "affine-3-g32", "affine-4-g32", "affine-6-g32", "affine-8-g32"]
        .iter()
        .map(|name| formats::parse(name).expect("known"))
        .collect();
    let sequences = model.tokens(2, 40);
    let measured =
        sensitivity::measure(model.source(), Some(&stats), &sequences, &candidates, &mut backend, &mut |_| {})
            .expect("measured");
    // The queries' half of kv_b_proj has rows too short for groups here: it stays bf16 and loses nothing.
    for s in &measured {
        assert_eq!(s.probe_error > 0.0, !s.module.ends_with(".embed_q"), "{s:?}");
        assert_eq!(s.probe_kl > 0.0, s.probe_error > 0.0, "{s:?}");
        assert!(s.errors.len() == candidates.len() && s.errors.is_sorted_by(|a, b| a.1 >= b.1), "{s:?}");
    }
    let uniform = Plan::uniform(formats::parse("affine-4-g32").expect("known"));
    let (planned, _) =
        sensitivity::plan(model.source(), &measured, &candidates, Budget::BitsPerWeight(5.0)).expect("planned");
    let other = model.tokens(6, 44);
    let kl = |plan: &Plan, name: &str| {
        let out = dir.path().join(name);
        let encoder = EncoderOptions { method: Method::Search, nvfp4_global_scale: true };
        let options = QuantizeOptions { plan, stats: Some(&stats), encoder, max_shard_bytes: 1 << 30 };
        quantize(model.source(), options, &out, &mut |_| {}).expect("the model is quantized");
        let comparison = distance(&Opened::new(&out), &model, &other);
        (comparison.kl_mean, comparison.bits_per_weight)
    };
    let ((uniform_kl, uniform_bits), (planned_kl, planned_bits)) = (kl(&uniform, "uniform"), kl(&planned, "planned"));
    assert!(planned_bits <= uniform_bits + 1e-6, "{planned_bits} {uniform_bits}");
    assert!(planned_kl < uniform_kl, "{planned_kl} at {planned_bits} bits, uniform {uniform_kl} at {uniform_bits}");
    let message = sensitivity::plan(model.source(), &measured, &candidates, Budget::BitsPerWeight(1.0)).unwrap_err();
    assert!(message.to_string().contains("budget of the allocation"), "{message}");
}
