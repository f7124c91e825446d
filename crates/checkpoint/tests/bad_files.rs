//! Broken checkpoints: every one is refused, with one line that names the file, the tensor, the value found and the
//! value expected.

use moellon_checkpoint::testing::{Builder, Storage, random_values};
use moellon_checkpoint::{Checkpoint, MlaShape, Projection};
use moellon_tensor::{Dtype, ScaleDtype};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use tempfile::TempDir;

/// A safetensors file with this header and this many zero bytes of data.
fn raw_file(header: &str, data_bytes: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![0; data_bytes]].concat()
}

/// The message of opening a directory with `config.json` and these files; it must be one line.
#[track_caller]
fn open_error(files: &[(&str, &[u8])]) -> String {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    let message = Checkpoint::open(dir.path()).expect_err("the checkpoint is broken").to_string();
    assert!(!message.contains('\n'), "more than one line: {message}");
    message
}

/// The message about one file with this header and data, which must name the file.
#[track_caller]
fn header_error(header: &str, data_bytes: usize) -> String {
    let message = open_error(&[("model.safetensors", &raw_file(header, data_bytes))]);
    assert!(message.contains("model.safetensors: "), "does not name the file: {message}");
    message
}

#[track_caller]
fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{message:?} does not say {part:?}");
    }
}

#[test]
fn file_shorter_than_its_length_field() {
    assert_says(
        &open_error(&[("model.safetensors", &[1, 2, 3])]),
        &["model.safetensors: file size in bytes: found 3, expected at least 8"],
    );
    assert_says(&open_error(&[("model.safetensors", &[])]), &["found 0, expected at least 8"]);
}

#[test]
fn header_length_beyond_the_file_or_the_limit() {
    let file = |length: u64| [&length.to_le_bytes()[..], b"{}"].concat();
    assert_says(
        &open_error(&[("model.safetensors", &file(1000))]),
        &["header length in bytes: found 1000, expected at most 2"],
    );
    assert_says(
        &open_error(&[("model.safetensors", &file(100_000_001))]),
        &["found 100000001, expected at most 100000000"],
    );
    assert_says(
        &open_error(&[("model.safetensors", &file(u64::MAX))]),
        &["found 18446744073709551615, expected at most 100000000"],
    );
}

#[test]
fn truncated_shard() {
    let mut builder = Builder::default();
    builder.add_floats("model.norm.weight", ScaleDtype::F32, &[64], &[1.0; 64]);
    let dir = tempfile::tempdir().unwrap();
    builder.write(dir.path(), &json!({}), usize::MAX).unwrap();
    let path = dir.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 10]).unwrap();
    let message = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert_says(
        &message,
        &[
            "model.safetensors: tensor model.norm.weight: end of its data (is the file truncated?): found 256, expected at most 246",
        ],
    );
}

#[test]
fn headers_that_are_no_headers() {
    assert_says(&header_error("{", 0), &["not valid: EOF"]);
    assert_says(&header_error("[]", 0), &["not valid: invalid type: sequence, expected an object of tensors by name"]);
    assert_says(&header_error("{} x", 0), &["not valid: trailing characters"]);
    assert_says(&header_error(r#"{"a":{"dtype":"F32","shape":[1]}}"#, 4), &["tensor a: missing field `data_offsets`"]);
    assert_says(
        &header_error(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}}"#, 4),
        &["tensor a: unknown field `x`"],
    );
    assert_says(
        &header_error(r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#, 4),
        &["tensor a: invalid value: integer `-1`"],
    );
    assert_says(
        &header_error(r#"{"a":{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}}"#, 4),
        &["tensor a: invalid type: floating point `1.5`"],
    );
    assert_says(
        &header_error(r#"{"a":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]}}"#, 4),
        &["tensor a: shape has more than 8 dimensions"],
    );
    assert_says(
        &header_error(r#"{"a\nb":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, 4),
        &[r#"tensor name "a\nb": expected printable characters"#],
    );
    // Text from the file in a message stays on one line (`open_error` checks).
    assert_says(&header_error(r#"{"a":{"d\n":1}}"#, 0), &[r"tensor a: unknown field `d\n`"]);
    let bomb = format!("{{\"a\":{}", "[".repeat(100_000));
    assert_says(&header_error(&bomb, 0), &["tensor a: "]);
}

#[test]
fn offsets_that_do_not_cover_the_data() {
    let two = |first: [u64; 2], second: [u64; 2], data: usize| {
        header_error(
            &format!(
                r#"{{"a":{{"dtype":"U8","shape":[{}],"data_offsets":[{},{}]}},"b":{{"dtype":"U8","shape":[{}],"data_offsets":[{},{}]}}}}"#,
                first[1] - first[0],
                first[0],
                first[1],
                second[1] - second[0],
                second[0],
                second[1]
            ),
            data,
        )
    };
    assert_says(
        &two([0, 8], [4, 12], 12),
        &["tensor b: data overlaps the tensor before it: found offset 4, expected offset 8"],
    );
    assert_says(&two([0, 8], [10, 12], 12), &["tensor b: gap before its data: found offset 10, expected offset 8"]);
    assert_says(&two([2, 8], [8, 12], 12), &["tensor a: gap before its data: found offset 2, expected offset 0"]);
    assert_says(&two([0, 8], [8, 12], 20), &["bytes after the last tensor: found 8, expected 0"]);
    assert_says(
        &header_error(r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[8,4]}}"#, 8),
        &["tensor a: data_offsets: found [8, 4], expected begin before end"],
    );
}

#[test]
fn sizes_that_overflow_or_disagree() {
    let one = |dtype: &str, shape: &str, offsets: &str| {
        header_error(&format!(r#"{{"t":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#), 16)
    };
    assert_says(
        &one("F32", "[4294967296,4294967296]", "[0,16]"),
        &["tensor t: shape: found [4294967296, 4294967296], expected a size that fits memory"],
    );
    assert_says(&one("F32", "[18446744073709551615]", "[0,16]"), &["tensor t: shape"]);
    assert_says(&one("F32", "[4]", "[0,18446744073709551615]"), &["tensor t: end of its data"]);
    assert_says(&one("F32", "[5]", "[0,16]"), &["tensor t: bytes of data: found 16, expected 20 for F32 [5]"]);
    assert_says(&one("F32", "[99999999999999999999]", "[0,16]"), &["tensor t: "]);
    assert_says(&one("F4", "[4]", "[0,16]"), &["tensor t: dtype: found F4, expected one of F64"]);
}

#[test]
fn duplicate_names() {
    let header =
        r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}"#;
    assert_says(&header_error(header, 8), &["tensor a: entries in the header: found at least 2, expected 1"]);
    let shard = raw_file(r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#, 4);
    let message = open_error(&[("one.safetensors", &shard), ("two.safetensors", &shard)]);
    assert_says(
        &message,
        &["two.safetensors: tensor a: files that hold it: found also ", "one.safetensors, expected one"],
    );
}

#[test]
fn index_and_shards_that_disagree() {
    let shard = |name: &str| raw_file(&format!(r#"{{"{name}":{{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}}}"#), 4);
    let with_index = |map: Value| {
        let index = json!({ "weight_map": map }).to_string();
        open_error(&[
            ("model.safetensors.index.json", index.as_bytes()),
            ("one.safetensors", &shard("a")),
            ("two.safetensors", &shard("b")),
        ])
    };
    assert_says(
        &with_index(json!({ "a": "one.safetensors", "c": "three.safetensors" })),
        &["shard three.safetensors is missing"],
    );
    for path in [
        "../two.safetensors",
        "/etc/passwd",
        "sub/two.safetensors",
        "C:two.safetensors",
        "two\\x.safetensors",
        "two.bin",
        "",
        ".safetensors",
    ] {
        assert_says(
            &with_index(json!({ "a": "one.safetensors", "b": path })),
            &["model.safetensors.index.json: tensor b: shard named by the index: found ", "expected a plain file name"],
        );
    }
    assert_says(
        &with_index(json!({ "a": "two.safetensors", "b": "one.safetensors" })),
        &[
            "model.safetensors.index.json: tensor a: shard that holds it: found one.safetensors, expected two.safetensors",
        ],
    );
    assert_says(
        &with_index(json!({ "a": "one.safetensors", "c": "two.safetensors" })),
        &["two.safetensors: tensor c: entries: found 0, expected 1"],
    );
    let revision = open_error(&[
        ("model.safetensors.index.json", br#"{"weight_map":{"a":"one.safetensors"}}"#),
        (
            "one.safetensors",
            &raw_file(
                r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"z":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}"#,
                8,
            ),
        ),
    ]);
    assert_says(
        &revision,
        &["one.safetensors: tensor z: entry in model.safetensors.index.json: found none", "another revision"],
    );
    assert_says(&with_index(json!({ "a": 1 })), &["tensor a", "found 1"]);
    assert_says(&with_index(json!({})), &["entries of weight_map: found 0"]);
    assert_says(&with_index(json!("x")), &["weight_map: found none"]);
}

#[test]
fn directories_without_a_model() {
    let dir = tempfile::tempdir().unwrap();
    let message = || Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert_says(&message(), &["config.json is missing"]);
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    assert_says(&message(), &["every *.safetensors file is missing, expected at least one"]);
    fs::create_dir(dir.path().join("model.safetensors")).unwrap();
    assert_says(&message(), &["model.safetensors"]);
    assert_says(&Checkpoint::open(dir.path().join("none")).unwrap_err().to_string(), &["config.json is missing"]);
}

#[test]
fn config_bombs() {
    let shard = raw_file("{}", 0);
    let message = |config: &str| open_error(&[("config.json", config.as_bytes()), ("model.safetensors", &shard)]);
    assert_says(&message(&"[".repeat(100_000)), &["config.json: not valid: recursion limit exceeded"]);
    assert_says(&message(&"{\"a\":".repeat(100_000)), &["config.json: not valid: recursion limit exceeded"]);
    assert_says(&message(r#"{"num_hidden_layers":1e999}"#), &["config.json: not valid: number out of range"]);
    assert_says(&message("[1]"), &["config.json: kind of JSON value: found an array, expected an object"]);
    assert_says(&message("{\"a\":\u{0}}"), &["config.json: not valid"]);
    assert_says(&message("{} {}"), &["config.json: not valid: trailing characters"]);
}

/// A good checkpoint of one tensor list, opened.
fn open(builder: &Builder, config: Value) -> (TempDir, Checkpoint) {
    let dir = tempfile::tempdir().unwrap();
    builder.write(dir.path(), &config, usize::MAX).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    (dir, checkpoint)
}

/// The message of reading `w` as `[8, 128]` when one of its tensors was changed.
fn linear_error(storage: Storage, change: impl Fn(&mut Builder)) -> String {
    let mut builder = Builder::default();
    builder.add_linear("w", storage, [8, 128], &random_values(8 * 128, 1));
    change(&mut builder);
    let (_dir, checkpoint) =
        open(&builder, json!({ "quantization_config": { "quant_method": "fp8", "weight_block_size": [32, 48] } }));
    checkpoint.linear("w", [8, 128]).expect_err("the weight is broken").to_string()
}

/// Replaces a tensor by one of zeros.
fn replace(builder: &mut Builder, name: &str, dtype: Dtype, shape: &[usize]) {
    builder.tensors.retain(|tensor| tensor.spec.name != name);
    builder.add(name, dtype, shape, vec![0; dtype.size_bytes() * shape.iter().product::<usize>()]);
}

#[test]
fn weights_of_the_wrong_dtype_or_shape() {
    let affine = Storage::MlxAffine(4, 64, ScaleDtype::Bf16);
    let bf16 = Storage::Plain(ScaleDtype::Bf16);
    let changed = |storage, name: &'static str, dtype, shape: &'static [usize]| {
        linear_error(storage, |b| replace(b, name, dtype, shape))
    };

    assert_says(
        &changed(bf16, "w.weight", Dtype::Bf16, &[8, 127]),
        &["model.safetensors: tensor w.weight: shape: found [8, 127], expected [8, 128]"],
    );
    assert_says(&changed(bf16, "w.weight", Dtype::Bf16, &[0, 128]), &["found [0, 128], expected [8, 128]"]);
    assert_says(
        &changed(bf16, "w.weight", Dtype::F64, &[8, 128]),
        &["w: a weight of dtype F64 with tensors weight", "is not supported yet"],
    );
    assert_says(
        &changed(bf16, "w.scales", Dtype::F32, &[8, 2]),
        &["tensor w.scales: place of scales: found beside a BF16 weight"],
    );

    assert_says(
        &changed(affine, "w.weight", Dtype::U32, &[8, 17]),
        &["tensor w.weight: words in a row: found 17, expected 128 * bits / 32"],
    );
    assert_says(&changed(affine, "w.weight", Dtype::U32, &[8, 0]), &["words in a row: found 0"]);
    assert_says(
        &changed(affine, "w.weight", Dtype::U32, &[8, 28]),
        &["w: affine bits: found 7, expected 1, 2, 3, 4, 5, 6 or 8"],
    );
    assert_says(&changed(affine, "w.weight", Dtype::U32, &[7, 16]), &["found [7, 16], expected [8, 16]"]);
    assert_says(&changed(affine, "w.weight", Dtype::U32, &[16]), &["shape: found [16], expected 2 dimensions"]);
    assert_says(
        &changed(affine, "w.scales", Dtype::Bf16, &[8, 3]),
        &["tensor w.scales: scales in a row: found 3, expected a divisor of the 128"],
    );
    assert_says(&changed(affine, "w.scales", Dtype::Bf16, &[8, 0]), &["scales in a row: found 0"]);
    assert_says(
        &changed(affine, "w.scales", Dtype::Bf16, &[8, 8]),
        &["tensor w.biases: shape: found [8, 2], expected [8, 8]"],
    );
    assert_says(
        &changed(affine, "w.scales", Dtype::I32, &[8, 2]),
        &["tensor w.scales: dtype: found I32, expected F32, F16 or BF16"],
    );
    assert_says(
        &changed(affine, "w.biases", Dtype::F32, &[8, 2]),
        &["tensor w.biases: dtype: found F32, expected BF16"],
    );
    assert_says(
        &linear_error(affine, |b| b.tensors.retain(|t| t.spec.name != "w.biases")),
        &["tensor w.biases is missing"],
    );
    assert_says(
        &changed(Storage::MlxNvfp4, "w.scales", Dtype::U8, &[8, 2]),
        &["bits and group size: found 4 and 64, expected 4 and 16 (nvfp4)"],
    );

    let fp8 = Storage::Fp8Block([32, 48]);
    assert_says(
        &changed(fp8, "w.weight_scale_inv", Dtype::F32, &[1, 2]),
        &["tensor w.weight_scale_inv: shape: found [1, 2], expected [1, 3] for blocks of 32 x 48"],
    );
    assert_says(&changed(fp8, "w.weight_scale_inv", Dtype::Bf16, &[1, 3]), &["w: an FP8 weight with BF16 scales"]);
    assert_says(
        &linear_error(fp8, |b| b.tensors.retain(|t| t.spec.name != "w.weight_scale_inv")),
        &["tensor w.weight_scale is missing"],
    );

    let modelopt = Storage::ModelOptNvfp4;
    assert_says(&changed(modelopt, "w.weight", Dtype::U8, &[8, 60]), &["found [8, 60], expected [8, 64]"]);
    assert_says(
        &changed(modelopt, "w.weight_scale", Dtype::Bf16, &[8, 8]),
        &["w.weight_scale: dtype: found BF16, expected F8_E4M3"],
    );
    assert_says(
        &changed(modelopt, "w.weight_scale_2", Dtype::F32, &[2]),
        &["w.weight_scale_2: shape: found [2], expected 1 value"],
    );
    let packed = Storage::CompressedTensorsNvfp4;
    assert_says(
        &changed(packed, "w.weight_global_scale", Dtype::F32, &[1]),
        &["w.weight_global_scale: value 0: found 0, expected a scale that is finite"],
    );
    assert_says(
        &changed(packed, "w.weight_packed", Dtype::I32, &[8, 16]),
        &["a compressed-tensors weight packed in I32 is not supported"],
    );
}

#[test]
fn formats_that_are_not_supported_are_named() {
    let message = |name: &str, dtype, shape: &[usize]| {
        let mut builder = Builder::default();
        replace(&mut builder, name, dtype, shape);
        let (_dir, checkpoint) = open(&builder, json!({ "quantization_config": { "quant_method": "bitsandbytes" } }));
        checkpoint.linear("w", [64, 128]).unwrap_err().to_string()
    };
    assert_says(&message("w.weight", Dtype::U8, &[4096, 1]), &["w: a weight of dtype U8", "bitsandbytes"]);
    assert_says(&message("w.other", Dtype::U8, &[1]), &["w.weight is missing, expected a weight [64, 128]"]);
}

#[test]
fn packed_integers_that_are_not_affine_are_named() {
    let message = |change: &[(&str, Dtype, &[usize])], config: Value| {
        let mut builder = Builder::default();
        for (name, dtype, shape) in [
            ("w.qweight", Dtype::I32, &[16, 64][..]),
            ("w.qzeros", Dtype::I32, &[2, 8]),
            ("w.scales", Dtype::F16, &[2, 64]),
            ("w.g_idx", Dtype::I32, &[128]),
        ] {
            replace(&mut builder, name, dtype, shape);
        }
        for (name, dtype, shape) in change {
            replace(&mut builder, name, *dtype, shape);
        }
        let (_dir, checkpoint) = open(&builder, json!({ "quantization_config": config }));
        checkpoint.linear("w", [64, 128]).unwrap_err().to_string()
    };
    let gptq = || json!({ "quant_method": "gptq", "bits": 4 });
    // All inputs in group 0.
    assert_says(&message(&[], gptq()), &["w.g_idx: group of input 64: found 0, expected 1", "no act-order"]);
    assert_says(
        &message(&[("w.scales", Dtype::F32, &[2, 64])], gptq()),
        &["w.scales: dtype: found F32, expected F16 or BF16"],
    );
    assert_says(&message(&[("w.scales", Dtype::F16, &[3, 64])], gptq()), &["w.scales: shape: found [3, 64]"]);
    assert_says(
        &message(&[("w.qzeros", Dtype::I32, &[2, 9])], gptq()),
        &["w.qzeros: shape: found [2, 9], expected [2, 8]"],
    );
    assert_says(&message(&[("w.qzeros", Dtype::U32, &[2, 8])], gptq()), &["w.qzeros: dtype: found U32, expected I32"]);
    assert_says(
        &message(&[("w.qweight", Dtype::I32, &[12, 64])], gptq()),
        &["a GPTQ weight of 3 bits", "not supported"],
    );
    assert_says(
        &message(&[], json!({ "quant_method": "gptq", "bits": 8 })),
        &["bits of its qweight: found 4, expected 8"],
    );
    let awq: &[(&str, Dtype, &[usize])] = &[("w.qweight", Dtype::I32, &[128, 8])];
    assert_says(
        &message(awq, json!({ "quant_method": "awq", "version": "gemv" })),
        &["an AWQ weight of version gemv is not supported"],
    );
    assert_says(
        &message(&[("w.qweight", Dtype::I32, &[5, 5])], json!({})),
        &["a qweight of shape [5, 5] for [64, 128]"],
    );
}

#[test]
fn shapes_that_the_config_cannot_mean() {
    let mut builder = Builder::default();
    builder.add_linear("w", Storage::MlxMxfp4, [8, 128], &random_values(8 * 128, 1));
    builder.add_linear("m.experts.0.gate_proj", Storage::MlxMxfp4, [8, 128], &random_values(8 * 128, 1));
    let (_dir, checkpoint) = open(&builder, json!({}));
    for shape in [[0, 128], [8, 0], [usize::MAX, usize::MAX], [8, usize::MAX], [1 << 40, 128]] {
        assert_says(&checkpoint.linear("w", shape).unwrap_err().to_string(), &["w", "found"]);
        assert_says(&checkpoint.experts("m", Projection::Gate, None, shape).unwrap_err().to_string(), &["m", "found"]);
        let mla = MlaShape { num_heads: shape[0], qk_nope_head_dim: shape[1], v_head_dim: 8, kv_lora_rank: 4 };
        assert!(checkpoint.mla_kv_b("w", mla).is_err());
    }
    assert!(checkpoint.vector("w.scales", usize::MAX).is_err());
}

#[test]
fn numbers_that_are_not_finite() {
    let message = |storage, name: &str, at: usize, bytes: &[u8]| {
        let mut builder = Builder::default();
        builder.add_linear("w", storage, [8, 128], &random_values(8 * 128, 1));
        let tensor = builder.tensors.iter_mut().find(|t| t.spec.name == name).unwrap();
        tensor.bytes[at * bytes.len()..][..bytes.len()].copy_from_slice(bytes);
        let (_dir, checkpoint) = open(&builder, json!({}));
        checkpoint
            .linear("w", [8, 128])
            .and_then(|matrix| Checkpoint::check_finite("w", &matrix.view()))
            .unwrap_err()
            .to_string()
    };
    let affine = Storage::MlxAffine(4, 64, ScaleDtype::Bf16);
    assert_eq!(message(affine, "w.scales", 5, &[0x80, 0x7F]), "w: scales has inf at row 2, column group 1");
    assert_eq!(message(affine, "w.biases", 0, &[0xC0, 0xFF]), "w: offsets has NaN at row 0, column group 0");
    assert_eq!(
        message(Storage::MlxMxfp4, "w.scales", 31, &[0xFF]),
        "w: scales has E8M0 NaN 0xff at row 7, column group 3"
    );
    assert_eq!(
        message(Storage::MlxNvfp4, "w.scales", 9, &[0xFF]),
        "w: scales has E4M3 NaN 0xff at row 1, column group 1"
    );
    assert_eq!(
        message(Storage::Fp8Block([128, 128]), "w.weight", 130, &[0x7F]),
        "w: codes has E4M3 NaN 0x7f at row 1, column group 2"
    );
    assert_eq!(
        message(Storage::Plain(ScaleDtype::F16), "w.weight", 3, &[0, 0x7C]),
        "w: weight has inf at row 0, column group 3"
    );
    let nan = f32::NAN.to_le_bytes();
    assert_says(
        &message(Storage::MlxNvfp4Global, "w.global_scale", 0, &nan),
        &["w.global_scale: value 0: found NaN, expected a scale that is finite"],
    );

    let mut builder = Builder::default();
    builder.add_floats("n", ScaleDtype::F32, &[3], &[1.0, f32::INFINITY, 2.0]);
    let (_dir, checkpoint) = open(&builder, json!({}));
    assert_says(
        &checkpoint.vector("n", 3).unwrap_err().to_string(),
        &["tensor n: value 1: found inf, expected a finite number"],
    );
    assert_says(&checkpoint.vector("n", 4).unwrap_err().to_string(), &["tensor n: shape: found [3], expected [4]"]);
    assert_says(&checkpoint.vector("absent", 4).unwrap_err().to_string(), &["tensor absent is missing"]);
}

#[test]
fn experts_that_are_not_all_there() {
    let names = ["gate_proj", "up_proj", "down_proj"];
    let bf16 = Storage::Plain(ScaleDtype::Bf16);
    let message = |num_experts, change: &dyn Fn(&mut Builder)| {
        let mut builder = Builder::default();
        builder.add_experts("m", names, bf16, 12, [32, 64], 1);
        builder.add_floats("model.norm.weight", ScaleDtype::F32, &[1], &[1.0]);
        change(&mut builder);
        let (_dir, checkpoint) = open(&builder, json!({}));
        checkpoint.experts("m", Projection::Gate, num_experts, [32, 64]).unwrap_err().to_string()
    };
    let without = |prefix: &'static str| move |b: &mut Builder| b.tensors.retain(|t| !t.spec.name.starts_with(prefix));
    assert_says(
        &message(Some(12), &without("m.experts.5.")),
        &["m.experts.5 is missing, expected experts 0 to 11 without a gap"],
    );
    assert_says(&message(Some(12), &without("m.experts.5.gate_proj")), &["m.experts.5.gate_proj.weight is missing"]);
    assert_says(&message(Some(256), &|_| ()), &["m: experts in the checkpoint: found 12, expected 256"]);
    assert_says(&message(None, &without("m.")), &["m: every expert is missing"]);
    assert_says(
        &message(None, &|b| {
            b.add_linear("m.switch_mlp.gate_proj", bf16, [32, 64], &[0.0; 32 * 64]);
        }),
        &["m: layouts of its experts: found experts.E.gate_proj and switch_mlp.gate_proj, expected one"],
    );
    assert_says(
        &message(None, &|b| {
            replace(b, "m.experts.3.gate_proj.weight", Dtype::Bf16, &[32, 63]);
        }),
        &["tensor m.experts.3.gate_proj.weight: shape: found [32, 63], expected [32, 64]"],
    );
}

#[test]
fn stacks_that_disagree() {
    let mut builder = Builder::default();
    let storage = Storage::MlxNvfp4Global;
    builder.add_stacked("m.switch_mlp.gate_proj", storage, [32, 64], &random_values(4 * 32 * 64, 1));
    builder.add_stacked("m.switch_mlp.up_proj", storage, [32, 64], &random_values(3 * 32 * 64, 1));
    let expect = |builder: &Builder, projection| {
        let (_dir, checkpoint) = open(builder, json!({}));
        checkpoint.experts("m", projection, None, [32, 64]).unwrap_err().to_string()
    };
    assert_says(
        &expect(&builder, Projection::Up),
        &["m.switch_mlp.up_proj.weight: shape: found [3, 32, 8], expected [4, 32, 8]"],
    );
    assert_says(&expect(&builder, Projection::Down), &["m.switch_mlp.down_proj.weight is missing"]);
    replace(&mut builder, "m.switch_mlp.gate_proj.global_scale", Dtype::F32, &[2]);
    assert_says(&expect(&builder, Projection::Gate), &["global_scale: shape: found [2], expected 1 or 4 values"]);
    replace(&mut builder, "m.switch_mlp.gate_proj.weight", Dtype::U32, &[0, 32, 8]);
    assert_says(
        &expect(&builder, Projection::Gate),
        &["found [0, 32, 8], expected a leading dimension of at least 1 expert"],
    );
}

#[test]
fn files_that_change_while_they_are_open() {
    let mut builder = Builder::default();
    builder.add_floats("n", ScaleDtype::F32, &[3], &[1.0, 2.0, 3.0]);
    let (dir, checkpoint) = open(&builder, json!({}));
    checkpoint.check_unchanged().unwrap();
    let path = dir.path().join("model.safetensors");
    // Replaced: the map still holds the old file.
    let longer = [fs::read(&path).unwrap(), vec![0; 8]].concat();
    let other = dir.path().join("other");
    fs::write(&other, longer).unwrap();
    fs::rename(&other, &path).unwrap();
    assert_says(
        &checkpoint.check_unchanged().unwrap_err().to_string(),
        &["model.safetensors: size in bytes since it was opened"],
    );
    assert_eq!(checkpoint.vector("n", 3).unwrap(), [1.0, 2.0, 3.0], "the map still holds the old file");
}

#[test]
fn files_that_are_cut_while_they_are_open_are_named_before_they_are_read() {
    let mut builder = Builder::default();
    builder.add_floats("n", ScaleDtype::F32, &[3], &[1.0, 2.0, 3.0]);
    builder.add_linear("w", Storage::Plain(ScaleDtype::Bf16), [8, 128], &random_values(8 * 128, 1));
    let (dir, checkpoint) = open(&builder, json!({}));
    let path = dir.path().join("model.safetensors");
    // Reading would be a SIGBUS: nothing is left of the file.
    fs::File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
    for error in [checkpoint.vector("n", 3).unwrap_err(), checkpoint.linear("w", [8, 128]).map(drop).unwrap_err()] {
        assert_says(&error.to_string(), &["model.safetensors: size in bytes since it was opened: found 0, expected "]);
    }
}

#[test]
fn opening_touches_headers_only() {
    // A sparse file: 4 GB by its header and the file system, no data on disk.
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    let data_bytes: u64 = 4 << 30;
    let header = format!(r#"{{"a":{{"dtype":"U8","shape":[{data_bytes}],"data_offsets":[0,{data_bytes}]}}}}"#);
    write_sparse(&dir.path().join("model.safetensors"), &header, data_bytes);
    let start = std::time::Instant::now();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert!(start.elapsed().as_secs() < 2);
    assert_eq!(checkpoint.tensor("a").unwrap().bytes.len() as u64, data_bytes);
}

fn write_sparse(path: &Path, header: &str, data_bytes: u64) {
    fs::write(path, raw_file(header, 0)).unwrap();
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(8 + header.len() as u64 + data_bytes).unwrap();
}
