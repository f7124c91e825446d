//! Every weight format in every layout: written, opened again, and the same bits come back.

use moellon_checkpoint::testing::{Builder, Storage, random_values};
use moellon_checkpoint::{Checkpoint, Matrix, MlaShape, Projection};
use moellon_tensor::{Dtype, MatrixView, OwnedMatrix, ScaleDtype, WeightFormat};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Two or three shards for most of these checkpoints.
const SHARD_BYTES: usize = 40_000;

fn open(builder: &Builder, config: &Value) -> (TempDir, Checkpoint) {
    let dir = tempfile::tempdir().expect("a temporary directory can be made");
    builder.write(dir.path(), config, SHARD_BYTES).expect("the checkpoint can be written");
    let checkpoint = Checkpoint::open(dir.path()).expect("the checkpoint can be opened");
    (dir, checkpoint)
}

#[track_caller]
fn assert_same(found: MatrixView<'_>, expected: &OwnedMatrix) {
    assert_eq!(found.format, expected.format);
    assert_eq!([found.rows, found.cols], [expected.rows, expected.cols]);
    assert_eq!(found.global_scale, expected.global_scale);
    found.check_finite().expect("test weights are finite");
    assert_eq!(found.decode_all(), expected.view().decode_all());
}

fn fp8_config() -> Value {
    json!({ "quantization_config": { "quant_method": "fp8", "weight_block_size": [32, 48] } })
}

#[test]
fn a_linear_layer_in_every_format() {
    let shape = [80, 256];
    let mut builder = Builder::default();
    let mut expected = Vec::new();
    for (at, storage) in Storage::ALL.into_iter().chain([Storage::CompressedTensorsMxfp4]).enumerate() {
        let path = format!("model.layers.{at}.self_attn.q_a_proj");
        let matrix = builder.add_linear(&path, storage, shape, &random_values(80 * 256, at as u64));
        expected.push((path, matrix));
    }
    let (_dir, checkpoint) = open(&builder, &fp8_config());
    assert!(checkpoint.files().count() > 3, "the test is about shards");
    for (path, matrix) in &expected {
        assert_same(checkpoint.linear(path, shape).unwrap_or_else(|e| panic!("{e}")).view(), matrix);
    }
    assert!(checkpoint.linear_opt("model.layers.99.q_proj", shape).unwrap().is_none());
    let data: usize = builder.tensors.iter().map(|t| t.bytes.len()).sum();
    assert!(checkpoint.size_bytes() > data as u64);
    assert_eq!(checkpoint.tensors().count(), builder.tensors.len());
}

/// Words are packed here a bit at a time by the formulas of the two projects, and the numbers are those that they mean.
#[test]
fn awq_and_gptq_are_affine_and_exact() {
    let [rows, cols, group] = [16, 128, 32];
    let number = |at: usize, below: usize| ((at * 2_654_435_761) >> 7) % below;
    for (name, bits, dtype) in [
        ("awq", 4, ScaleDtype::F16),
        ("gptq", 4, ScaleDtype::F16),
        ("gptq", 8, ScaleDtype::Bf16),
        ("gptq_v2", 2, ScaleDtype::F16),
    ] {
        let codes: Vec<usize> = (0..rows * cols).map(|at| number(at, 1 << bits)).collect();
        let zeros: Vec<usize> = (0..cols / group * rows).map(|at| number(at + 77, (1 << bits) - 1)).collect();
        let scales: Vec<f32> =
            (0..zeros.len()).map(|at| dtype.round(0.001 + number(at + 5, 997) as f32 * 1.3e-5)).collect();
        // Output n of a line is at bit `place(n)` of word `n / per_word`.
        let per_word = 32 / bits;
        let place = |n: usize| if name == "awq" { [0, 4, 1, 5, 2, 6, 3, 7][n % 8] * 4 } else { n % per_word * bits };
        let pack_line = |values: &mut dyn Iterator<Item = usize>| {
            let mut words = vec![0u32; rows / per_word];
            values.enumerate().for_each(|(n, value)| words[n / per_word] |= (value as u32) << place(n));
            words
        };
        let stored_zeros = zeros.chunks(rows).flat_map(|line| {
            pack_line(
                &mut line
                    .iter()
                    .map(|zero| if name == "gptq" { (zero + (1 << bits) - 1) % (1 << bits) } else { *zero }),
            )
        });
        let bytes = |words: Vec<u32>| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
        let words: Vec<u32> = if name == "awq" {
            (0..cols).flat_map(|k| pack_line(&mut (0..rows).map(|n| codes[n * cols + k]))).collect()
        } else {
            let word = |w: usize, n: usize| {
                (0..per_word).map(|i| (codes[n * cols + w * per_word + i] as u32) << (i * bits)).sum::<u32>()
            };
            (0..cols / per_word).flat_map(|w| (0..rows).map(move |n| (w, n))).map(|(w, n)| word(w, n)).collect()
        };
        let mut builder = Builder::default();
        let lines = words.len() / if name == "awq" { rows / per_word } else { rows };
        builder.add("a.qweight", Dtype::I32, &[lines, words.len() / lines], bytes(words));
        builder.add("a.qzeros", Dtype::I32, &[cols / group, rows / per_word], bytes(stored_zeros.collect()));
        builder.add_floats("a.scales", dtype, &[cols / group, rows], &scales);
        if name != "awq" {
            let order = (0..cols).flat_map(|k| ((k / group) as i32).to_le_bytes()).collect();
            builder.add("a.g_idx", Dtype::I32, &[cols], order);
        }
        let config = json!({ "quantization_config": {
            "quant_method": &name[..name.len().min(4)], "bits": bits, "group_size": group, "version": "gemm", "checkpoint_format": name } });
        let (_dir, checkpoint) = open(&builder, &config);
        let found = checkpoint.linear("a", [rows, cols]).unwrap_or_else(|e| panic!("{name} {bits}: {e}"));
        let format = WeightFormat::Affine { bits: bits as u8, group: group as u32, scale: ScaleDtype::F32 };
        assert_eq!(found.view().format, format);
        for (at, value) in found.view().decode_all().into_iter().enumerate() {
            let (n, k) = (at / cols, at % cols);
            let in_group = k / group * rows + n;
            // GPTQ's zero point 0 cannot be stored; it wraps to 2^bits.
            let zero = if name == "gptq" && zeros[in_group] == 0 { 1 << bits } else { zeros[in_group] };
            let expected = (codes[at] as f32 - zero as f32) * scales[in_group];
            assert_eq!(value, expected, "{name} {bits}: output {n}, input {k}");
        }
    }
}

#[test]
fn fp8_scales_per_tensor_and_per_row_are_blocks_too() {
    let codes: Vec<u8> = (0..6 * 32).map(|i| (i % 120) as u8).collect();
    let mut builder = Builder::default();
    builder.add("a.weight", Dtype::F8E4m3, &[6, 32], codes.clone());
    builder.add_floats("a.weight_scale", ScaleDtype::F32, &[], &[0.25]);
    builder.add("b.weight", Dtype::F8E4m3, &[6, 32], codes);
    builder.add_floats("b.weight_scale", ScaleDtype::F32, &[6, 1], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let (_dir, checkpoint) = open(&builder, &json!({}));
    let a = checkpoint.linear("a", [6, 32]).unwrap();
    let b = checkpoint.linear("b", [6, 32]).unwrap();
    let (a, b) = (a.view(), b.view());
    assert_eq!(a.format, WeightFormat::Fp8Block { block_rows: 6, block_cols: 32 });
    assert_eq!(b.format, WeightFormat::Fp8Block { block_rows: 1, block_cols: 32 });
    let (a, b) = (a.decode_all(), b.decode_all());
    for (at, (a, b)) in a.iter().zip(&b).enumerate() {
        assert_eq!(a * 4.0 * (at / 32 + 1) as f32, *b);
    }
}

#[test]
fn the_config_is_held_against_the_tensors() {
    let affine = Storage::MlxAffine(4, 64, ScaleDtype::Bf16);
    let mut builder = Builder::default();
    builder.add_linear("a", affine, [8, 128], &random_values(8 * 128, 1));
    builder.add_linear("b", Storage::MlxNvfp4, [8, 128], &random_values(8 * 128, 2));
    builder.add_linear("c", Storage::Plain(ScaleDtype::Bf16), [8, 128], &random_values(8 * 128, 3));
    let message = |config: Value, path: &str| {
        let (_dir, checkpoint) = open(&builder, &config);
        checkpoint.linear(path, [8, 128]).map(|_| ()).map_err(|e| e.to_string())
    };
    let good = json!({ "quantization": {
        "group_size": 64, "bits": 4, "b": { "group_size": 16, "bits": 4, "mode": "nvfp4" }, "c": false } });
    for path in ["a", "b", "c"] {
        assert_eq!(message(good.clone(), path), Ok(()));
    }
    // mlx-lm writes the same dictionary as `quantization_config`; a plain weight needs no entry.
    assert_eq!(message(json!({ "quantization_config": { "group_size": 64, "bits": 4 } }), "c"), Ok(()));
    assert_eq!(
        message(json!({ "quantization": { "group_size": 64, "bits": 3 } }), "a").unwrap_err(),
        "a: format of its tensors: found affine with 4 bits and group size 64, expected affine with 3 bits and group \
         size 64, as config.json says"
    );
    let entry =
        json!({ "quantization": { "group_size": 64, "bits": 4, "c": { "group_size": 32, "bits": 8 }, "a": false } });
    assert!(message(entry.clone(), "c").unwrap_err().contains("found plain bf16, expected affine with 8 bits"));
    assert!(message(entry, "a").unwrap_err().contains("expected plain floats (quantization: false)"));
    assert!(
        message(json!({ "quantization": { "a": 3 } }), "a")
            .unwrap_err()
            .contains("found 3, expected an object or false")
    );
    assert!(
        message(json!({ "quantization": { "a": { "bits": -1, "group_size": 64 } } }), "a")
            .unwrap_err()
            .contains("found -1")
    );
}

const BLOCK: &str = "model.layers.3.mlp";
const INNER: usize = 64;
const HIDDEN: usize = 128;
const PROJECTIONS: [(Projection, [usize; 2]); 3] =
    [(Projection::Gate, [INNER, HIDDEN]), (Projection::Up, [INNER, HIDDEN]), (Projection::Down, [HIDDEN, INNER])];

fn assert_experts(checkpoint: &Checkpoint, block: &str, expected: &[[OwnedMatrix; 3]]) {
    assert_eq!(checkpoint.num_experts(block).unwrap(), expected.len());
    for (at, (projection, shape)) in PROJECTIONS.into_iter().enumerate() {
        let found =
            checkpoint.experts(block, projection, Some(expected.len()), shape).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert_same(found.view(), &expected[at]);
        }
    }
}

/// Formats whose groups fit the 64 columns of `down_proj`.
fn expert_storages() -> impl Iterator<Item = Storage> {
    Storage::ALL.into_iter().filter(|s| !matches!(s, Storage::MlxAffine(_, 128, _)))
}

#[test]
fn experts_one_by_one_in_every_format() {
    for storage in expert_storages().chain([Storage::CompressedTensorsMxfp4]) {
        let mut builder = Builder::default();
        let names = ["gate_proj", "up_proj", "down_proj"];
        let expected = builder.add_experts(BLOCK, names, storage, 11, [INNER, HIDDEN], 7);
        // Shared experts and the router stand beside them and are no routed experts.
        builder.add_linear(
            &format!("{BLOCK}.shared_experts.gate_proj"),
            storage,
            [INNER, HIDDEN],
            &random_values(INNER * HIDDEN, 5),
        );
        let (_dir, checkpoint) = open(&builder, &fp8_config());
        assert_experts(&checkpoint, BLOCK, &expected);
    }
}

#[test]
fn mixtral_experts() {
    let block = "model.layers.0.block_sparse_moe";
    let mut builder = Builder::default();
    let expected =
        builder.add_experts(block, ["w1", "w3", "w2"], Storage::Plain(ScaleDtype::Bf16), 4, [INNER, HIDDEN], 7);
    let (_dir, checkpoint) = open(&builder, &json!({}));
    assert_experts(&checkpoint, block, &expected);
    assert_eq!(checkpoint.expert_biases(block, Projection::Gate, INNER).unwrap(), None);
}

#[test]
fn mlx_stacked_experts_in_every_format() {
    for below in ["switch_mlp", "experts"] {
        for storage in expert_storages() {
            let mut builder = Builder::default();
            let stacks: Vec<Vec<OwnedMatrix>> = PROJECTIONS
                .into_iter()
                .map(|(projection, shape)| {
                    let path = format!("{BLOCK}.{below}.{}", projection.name());
                    builder.add_stacked(
                        &path,
                        storage,
                        shape,
                        &random_values(5 * INNER * HIDDEN, projection.name().len() as u64),
                    )
                })
                .collect();
            let expected: Vec<[OwnedMatrix; 3]> =
                (0..5).map(|e| [stacks[0][e].clone(), stacks[1][e].clone(), stacks[2][e].clone()]).collect();
            builder.add_floats(
                &format!("{BLOCK}.{below}.up_proj.bias"),
                ScaleDtype::Bf16,
                &[5, INNER],
                &[0.5; 5 * INNER],
            );
            let (_dir, checkpoint) = open(&builder, &fp8_config());
            assert_experts(&checkpoint, BLOCK, &expected);
            let bias = |projection| checkpoint.expert_biases(BLOCK, projection, INNER).unwrap();
            assert_eq!(bias(Projection::Up), Some(vec![0.5; 5 * INNER]));
            assert_eq!(bias(Projection::Gate), None);
        }
    }
}

#[test]
fn fused_experts_have_gate_rows_first() {
    for dtype in [ScaleDtype::F32, ScaleDtype::F16, ScaleDtype::Bf16] {
        let (gate_up, down) = (random_values(3 * 2 * INNER * HIDDEN, 1), random_values(3 * HIDDEN * INNER, 2));
        let mut builder = Builder::default();
        builder.add_floats(&format!("{BLOCK}.experts.gate_up_proj"), dtype, &[3, 2 * INNER, HIDDEN], &gate_up);
        builder.add_floats(&format!("{BLOCK}.experts.down_proj"), dtype, &[3, HIDDEN, INNER], &down);
        let (_dir, checkpoint) = open(&builder, &json!({}));
        let plain = |shape: [usize; 2], values: &[f32]| OwnedMatrix::plain(dtype, shape, values);
        let expected: Vec<[OwnedMatrix; 3]> = (0..3)
            .map(|expert| {
                let half = |at: usize| &gate_up[(2 * expert + at) * INNER * HIDDEN..][..INNER * HIDDEN];
                let down = &down[expert * INNER * HIDDEN..][..INNER * HIDDEN];
                [plain([INNER, HIDDEN], half(0)), plain([INNER, HIDDEN], half(1)), plain([HIDDEN, INNER], down)]
            })
            .collect();
        assert_experts(&checkpoint, BLOCK, &expected);
        assert_eq!(checkpoint.expert_biases(BLOCK, Projection::Down, HIDDEN).unwrap(), None);
    }
}

#[test]
fn gpt_oss_experts_are_transposed_and_alternate() {
    // Twice the inner size equals the hidden size, so that only the biases tell this layout from the fused one.
    let (gate_up, down) = (random_values(2 * HIDDEN * 2 * INNER, 1), random_values(2 * INNER * HIDDEN, 2));
    let bias: Vec<f32> = (0..2 * 2 * INNER).map(|i| i as f32).collect();
    let mut builder = Builder::default();
    let name = |name: &str| format!("{BLOCK}.experts.{name}");
    builder.add_floats(&name("gate_up_proj"), ScaleDtype::Bf16, &[2, HIDDEN, 2 * INNER], &gate_up);
    builder.add_floats(&name("gate_up_proj_bias"), ScaleDtype::F32, &[2, 2 * INNER], &bias);
    builder.add_floats(&name("down_proj"), ScaleDtype::Bf16, &[2, INNER, HIDDEN], &down);
    builder.add_floats(&name("down_proj_bias"), ScaleDtype::F32, &[2, HIDDEN], &[0.25; 2 * HIDDEN]);
    let (_dir, checkpoint) = open(&builder, &json!({}));
    let expected: Vec<[OwnedMatrix; 3]> = (0..2)
        .map(|expert| {
            let gate_up = &gate_up[expert * HIDDEN * 2 * INNER..];
            let part = |odd: usize| -> Vec<f32> {
                (0..INNER * HIDDEN).map(|at| gate_up[at % HIDDEN * 2 * INNER + 2 * (at / HIDDEN) + odd]).collect()
            };
            let down: Vec<f32> = (0..HIDDEN * INNER)
                .map(|at| down[expert * INNER * HIDDEN + at % INNER * HIDDEN + at / INNER])
                .collect();
            let plain = |shape, values: &[f32]| OwnedMatrix::plain(ScaleDtype::Bf16, shape, values);
            [plain([INNER, HIDDEN], &part(0)), plain([INNER, HIDDEN], &part(1)), plain([HIDDEN, INNER], &down)]
        })
        .collect();
    assert_experts(&checkpoint, BLOCK, &expected);
    let biases = |projection, rows| checkpoint.expert_biases(BLOCK, projection, rows).unwrap().unwrap();
    assert_eq!(biases(Projection::Gate, INNER)[..3], [0.0, 2.0, 4.0]);
    assert_eq!(biases(Projection::Up, INNER)[..3], [1.0, 3.0, 5.0]);
    assert_eq!(biases(Projection::Down, HIDDEN), vec![0.25; 2 * HIDDEN]);
}

#[test]
fn gpt_oss_mxfp4_experts_alternate() {
    let mut builder = Builder::default();
    let expected = builder.add_gpt_oss_experts(BLOCK, 3, [INNER, HIDDEN], 1);
    let (_dir, checkpoint) = open(&builder, &json!({ "quantization_config": { "quant_method": "mxfp4" } }));
    assert_experts(&checkpoint, BLOCK, &expected);
    let views = checkpoint.experts(BLOCK, Projection::Up, None, [INNER, HIDDEN]).unwrap();
    assert!(matches!(views[0], Matrix::Borrowed(view) if view.codes.stride_bytes() == 2 * view.codes.row_bytes()));
}

const MLA: MlaShape = MlaShape { num_heads: 3, qk_nope_head_dim: 64, v_head_dim: 96, kv_lora_rank: 128 };

#[test]
fn mla_from_a_fused_projection_of_any_format() {
    let rows = MLA.num_heads * (MLA.qk_nope_head_dim + MLA.v_head_dim);
    let rank = MLA.kv_lora_rank;
    for storage in Storage::ALL {
        let mut builder = Builder::default();
        let fused = builder
            .add_linear("a.kv_b_proj", storage, [rows, rank], &random_values(rows * rank, 1))
            .view()
            .decode_all();
        let (_dir, checkpoint) = open(&builder, &fp8_config());
        let split = checkpoint.mla_kv_b("a", MLA).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!([split.embed_q.len(), split.unembed_out.len()], [3, 3]);
        for head in 0..3 {
            let first = head * 160;
            let (embed, unembed) = (split.embed_q[head].view(), split.unembed_out[head].view());
            assert_eq!([embed.rows, embed.cols, unembed.rows, unembed.cols], [128, 64, 96, 128]);
            let plain = matches!(storage, Storage::Plain(_));
            assert_eq!(embed.format, if plain { storage.format() } else { WeightFormat::F32 });
            let transposed: Vec<f32> = (0..128 * 64).map(|at| fused[(first + at % 64) * rank + at / 64]).collect();
            assert_eq!(embed.decode_all(), transposed, "{storage:?}");
            assert_eq!(unembed.decode_all(), fused[(first + 64) * rank..(first + 160) * rank], "{storage:?}");
        }
    }
}

#[test]
fn mla_from_mlx_heads() {
    for storage in expert_storages() {
        let mut builder = Builder::default();
        let embed = builder.add_stacked("a.embed_q", storage, [128, 64], &random_values(3 * 128 * 64, 1));
        let unembed = builder.add_stacked("a.unembed_out", storage, [96, 128], &random_values(3 * 96 * 128, 2));
        let (_dir, checkpoint) = open(&builder, &fp8_config());
        let split = checkpoint.mla_kv_b("a", MLA).unwrap_or_else(|e| panic!("{e}"));
        for head in 0..3 {
            assert_same(split.embed_q[head].view(), &embed[head]);
            assert_same(split.unembed_out[head].view(), &unembed[head]);
        }
    }
}

#[test]
fn vectors_are_widened_exactly() {
    let values = [1.0, -2.5, 0.375, 1e-3];
    for dtype in [ScaleDtype::F32, ScaleDtype::F16, ScaleDtype::Bf16] {
        let mut builder = Builder::default();
        builder.add_floats("model.norm.weight", dtype, &[4], &values);
        let (_dir, checkpoint) = open(&builder, &json!({}));
        assert_eq!(checkpoint.vector("model.norm.weight", 4).unwrap(), values.map(|v| dtype.round(v)));
        assert_eq!(checkpoint.vector_opt("model.norm.bias", 4).unwrap(), None);
    }
}

#[test]
fn releasing_pages_changes_no_value() {
    let mut builder = Builder::default();
    let matrix =
        builder.add_linear("a", Storage::MlxAffine(4, 64, ScaleDtype::Bf16), [1024, 1024], &random_values(1 << 20, 1));
    let dir = tempfile::tempdir().unwrap();
    builder.write(dir.path(), &json!({}), usize::MAX).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let found = checkpoint.linear("a", [1024, 1024]).unwrap();
    let view = found.view();
    assert_same(view, &matrix);
    checkpoint.release_matrices(&[view]);
    assert_same(view, &matrix);
    checkpoint.release(&[1, 2, 3]);
    checkpoint.check_unchanged().unwrap();
}

#[test]
fn hashes_say_which_model_it_is() {
    let mut builder = Builder::default();
    for layer in 0..100 {
        builder.add_linear(&format!("l{layer}"), Storage::MlxMxfp4, [8, 64], &random_values(512, layer));
    }
    let hashes = |builder: &Builder, shard_bytes| {
        let dir = tempfile::tempdir().unwrap();
        builder.write(dir.path(), &json!({}), shard_bytes).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        (checkpoint.identity(), checkpoint.content_hash())
    };
    let (identity, content) = hashes(&builder, usize::MAX);
    assert_eq!(content.len(), 64);
    assert_eq!(hashes(&builder, 5_000), (identity.clone(), content.clone()), "sharding is no part of a model");
    for tensor in &mut builder.tensors {
        tensor.bytes[0] ^= 1;
    }
    let changed = hashes(&builder, usize::MAX);
    assert_ne!(changed.0, identity);
    assert_ne!(changed.1, content);
}
