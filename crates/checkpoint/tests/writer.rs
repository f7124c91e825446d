//! The writer: readable by the reference implementation, atomic, resumable.

use moellon_checkpoint::{Checkpoint, TensorSpec, Writer, WriterOptions};
use moellon_tensor::Dtype;
use serde_json::json;
use std::fs;
use std::path::Path;

fn spec(name: &str, dtype: Dtype, shape: &[usize]) -> TensorSpec {
    TensorSpec { name: name.to_owned(), dtype, shape: shape.to_vec() }
}

/// Three shards of at most 100 bytes: `a` and `b`, then `c`, which is larger than a shard, then `d`.
fn specs() -> Vec<TensorSpec> {
    vec![
        spec("a", Dtype::U8, &[3]),
        spec("b", Dtype::F32, &[2, 5]),
        spec("c", Dtype::Bf16, &[100]),
        spec("d", Dtype::U32, &[1]),
    ]
}

fn data(spec: &TensorSpec) -> Vec<u8> {
    (0..spec.size_bytes().unwrap()).map(|at| at as u8 ^ spec.name.as_bytes()[0]).collect()
}

fn options() -> WriterOptions {
    WriterOptions { max_shard_bytes: 100, ..WriterOptions::default() }
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn written_in_any_order_and_read_by_both_implementations() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = Writer::create(dir.path(), specs(), &options()).unwrap();
    for spec in specs().iter().rev() {
        assert!(!writer.is_done(&spec.name));
        writer.write(&spec.name, &data(spec)).unwrap();
    }
    writer.write_json("config.json", &json!({ "model_type": "tiny" })).unwrap();
    assert!(!names(dir.path()).contains(&"model.safetensors.index.json".to_owned()), "the index comes last");
    writer.finish().unwrap();
    assert_eq!(
        names(dir.path()),
        [
            "config.json",
            "model-00001-of-00003.safetensors",
            "model-00002-of-00003.safetensors",
            "model-00003-of-00003.safetensors",
            "model.safetensors.index.json"
        ]
    );
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.config["model_type"], "tiny");
    let first = fs::read(dir.path().join("model-00001-of-00003.safetensors")).unwrap();
    let reference = safetensors::SafeTensors::deserialize(&first).expect("the reference implementation reads it");
    assert_eq!(reference.len(), 2);
    for spec in specs() {
        let tensor = checkpoint.tensor(&spec.name).unwrap();
        assert_eq!((tensor.dtype, tensor.shape, tensor.bytes), (spec.dtype, &spec.shape[..], &data(&spec)[..]));
        if let Ok(tensor) = reference.tensor(&spec.name) {
            assert_eq!(tensor.data(), data(&spec));
        }
    }
    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(dir.path().join("model.safetensors.index.json")).unwrap()).unwrap();
    assert_eq!(index["metadata"]["total_size"], 3 + 40 + 200 + 4);
}

#[test]
fn an_interrupted_write_is_no_checkpoint_and_can_be_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = Writer::create(dir.path(), specs(), &options()).unwrap();
    writer.write("c", &data(&specs()[2])).unwrap();
    writer.write("a", &data(&specs()[0])).unwrap();
    writer.write_json("config.json", &json!({})).unwrap();
    drop(writer);
    assert_eq!(
        names(dir.path()),
        [".model-00001-of-00003.safetensors.partial", "config.json", "model-00002-of-00003.safetensors"]
    );

    let mut writer = Writer::create(dir.path(), specs(), &options()).unwrap();
    let done: Vec<bool> = ["a", "b", "c", "d"].iter().map(|name| writer.is_done(name)).collect();
    assert_eq!(done, [false, false, true, false]);
    for spec in specs() {
        writer.write(&spec.name, &data(&spec)).unwrap();
    }
    writer.finish().unwrap();
    assert_eq!(Checkpoint::open(dir.path()).unwrap().tensors().count(), 4);
}

#[test]
fn mistakes_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let create = |specs| Writer::create(dir.path(), specs, &options());
    let twice = create(vec![spec("x", Dtype::U8, &[1]), spec("x", Dtype::U8, &[1])]).unwrap_err().to_string();
    assert!(twice.contains("tensor x: declarations: found at least 2, expected 1"), "{twice}");
    let huge = create(vec![spec("x", Dtype::F32, &[usize::MAX, 2])]).unwrap_err().to_string();
    assert!(huge.contains("tensor x: shape"), "{huge}");
    assert!(create(Vec::new()).unwrap_err().to_string().contains("tensors to write: found 0, expected at least 1"));
    assert!(create(vec![spec("x\ny", Dtype::F32, &[1])]).is_err());

    let mut writer = create(specs()).unwrap();
    let short = writer.write("b", &[0; 39]).unwrap_err().to_string();
    assert!(short.contains("tensor b: bytes of data: found 39, expected 40 for F32 [2, 5]"), "{short}");
    assert!(writer.write("z", &[]).unwrap_err().to_string().contains("tensor z: declaration: found none"));
    writer.write("a", &[0; 3]).unwrap();
    assert!(writer.write("a", &[0; 3]).unwrap_err().to_string().contains("times written: found 2"));
    let early = writer.finish().unwrap_err().to_string();
    assert!(early.contains("tensor b: times written: found 0, expected 1"), "{early}");

    fs::write(dir.path().join("model-00001-of-00003.safetensors"), "something precious").unwrap();
    let other = create(specs()).unwrap_err().to_string();
    assert!(other.contains("model-00001-of-00003.safetensors: contents: found another checkpoint"), "{other}");
}

#[test]
fn one_shard_needs_no_index_and_empty_tensors_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let specs = vec![spec("a", Dtype::F32, &[2]), spec("empty", Dtype::U8, &[0, 4])];
    let mut writer = Writer::create(dir.path(), specs, &WriterOptions::default()).unwrap();
    writer.write("a", &[7; 8]).unwrap();
    writer.write("empty", &[]).unwrap();
    writer.write_json("config.json", &json!({})).unwrap();
    writer.finish().unwrap();
    assert_eq!(names(dir.path()), ["config.json", "model.safetensors"]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.tensor("empty").unwrap().shape, [0, 4]);
    assert!(checkpoint.vector("empty", 0).is_err());
}

/// Linux has a file on a disk that is always full.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_named_and_the_work_goes_on_when_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let partial = dir.path().join(".model-00002-of-00003.safetensors.partial");
    let mut writer = Writer::create(dir.path(), specs(), &options()).unwrap();
    writer.write("a", &data(&specs()[0])).unwrap();
    std::os::unix::fs::symlink("/dev/full", &partial).unwrap();
    let message = writer.write("c", &data(&specs()[2])).unwrap_err().to_string();
    assert!(message.contains("model-00002-of-00003.safetensors") && message.contains("No space left"), "{message}");
    drop(writer);
    assert!(Checkpoint::open(dir.path()).is_err(), "what is not whole is no checkpoint");
    fs::remove_file(&partial).unwrap();
    let mut writer = Writer::create(dir.path(), specs(), &options()).unwrap();
    for spec in specs() {
        writer.write(&spec.name, &data(&spec)).unwrap();
    }
    writer.write_json("config.json", &json!({})).unwrap();
    writer.finish().unwrap();
    assert_eq!(Checkpoint::open(dir.path()).unwrap().tensors().count(), 4);
}
