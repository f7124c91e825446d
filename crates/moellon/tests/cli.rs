//! The `moellon` command as a person or a script uses it.
#![allow(clippy::print_stderr)] // A skipped test says so.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn moellon(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_moellon"));
    // Settings of the person who runs the tests must not reach the program.
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("MOELLON_")) {
        command.env_remove(name);
    }
    command.args(arguments).stdin(Stdio::null()).output().expect("the program starts")
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "status {}, stderr: {}", output.status, String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).expect("output is UTF-8")
}

fn json(arguments: &[&str]) -> Value {
    serde_json::from_str(&stdout(&moellon(arguments))).expect("output is JSON")
}

/// The message of a run that must fail: one line, no panic.
fn error(arguments: &[&str]) -> String {
    let output = moellon(arguments);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    assert_eq!(stderr.trim_end().lines().count(), 1, "{stderr}");
    stderr.trim_end().to_owned()
}

#[test]
fn bundled_model_writes_rust() {
    let answer = json(&["run", "--json", "--temp", "0", "-n", "120", "-p", "Write a function that reverses a string"]);
    let text = answer["text"].as_str().expect("text");
    assert!(text.contains("fn ") && text.contains("```rust"), "{text}");
    assert_eq!(answer["finish_reason"], "stop");
    assert!(!answer["thinking"].as_str().expect("thinking").is_empty());
    let unthinking = json(&[
        "run",
        "--json",
        "--temp",
        "0",
        "-n",
        "120",
        "--no-think",
        "-p",
        "Write a function that reverses a string",
    ]);
    assert_eq!(unthinking["thinking"], "");
}

#[test]
fn every_level_and_thread_count_writes_the_same_greedy_text() {
    let run = |more: &[&str]| {
        let base = [
            "run",
            "--json",
            "--temp",
            "0",
            "-n",
            "40",
            "--raw",
            "--activations",
            "exact",
            "-p",
            "pub struct Counter {",
        ];
        json(&[&base[..], more].concat())["token_ids"].clone()
    };
    let expected = run(&[]);
    assert_eq!(expected.as_array().expect("ids").len(), 40);
    assert_eq!(run(&["--threads", "1"]), expected);
    let doctor = json(&["doctor", "--json"]);
    for level in doctor["cpu_levels"].as_array().expect("levels") {
        assert_eq!(run(&["--cpu-level", level.as_str().expect("name")]), expected, "{level}");
    }
}

#[test]
fn sampling_is_reproducible_by_seed() {
    let run = |seed: &str| {
        json(&["run", "--json", "--temp", "1", "--seed", seed, "-n", "30", "--raw", "-p", "fn main() {"])["token_ids"]
            .clone()
    };
    assert_eq!(run("7"), run("7"));
    assert_ne!(run("7"), run("8"));
}

#[test]
fn stop_strings_and_limits_end_a_generation() {
    let run = |more: &[&str]| {
        let base = ["run", "--json", "--temp", "0", "--raw", "-p", "impl Iterator for Counter {"];
        json(&[&base[..], more].concat())
    };
    let whole = run(&["-n", "40"]);
    let text = whole["text"].as_str().expect("text");
    // A stop string from the middle of what the model says, across token boundaries.
    let middle = text.char_indices().map(|(i, _)| i).nth(text.chars().count() / 2).expect("there is a text");
    let stop: String = text[middle..].chars().take(7).collect();
    let stopped = run(&["-n", "40", "--stop", &stop]);
    assert_eq!(stopped["finish_reason"], "stop");
    assert_eq!(stopped["text"].as_str(), text.split(&stop).next(), "stopped at {stop:?}");
    let cut = run(&["-n", "5"]);
    assert_eq!((cut["finish_reason"].as_str(), cut["completion_tokens"].as_u64()), (Some("length"), Some(5)));
}

#[test]
fn prompt_comes_from_standard_input() {
    use std::io::Write;
    let mut child = Command::new(env!("CARGO_BIN_EXE_moellon"))
        .args(["run", "--json", "--temp", "0", "-n", "4"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program starts");
    child.stdin.take().expect("stdin is piped").write_all(b"Hello").expect("stdin is open");
    let answer: Value =
        serde_json::from_str(&stdout(&child.wait_with_output().expect("it ends"))).expect("output is JSON");
    assert_eq!(answer["completion_tokens"], 4);
}

#[test]
fn output_that_nobody_reads_is_no_error() {
    let mut receipts = std::fs::read_dir(repository().join("receipts")).expect("there are receipts").flatten();
    let receipt =
        receipts.find(|entry| entry.path().extension().is_some_and(|e| e == "json")).expect("one at least").path();
    let receipt = receipt.to_str().expect("the path is UTF-8");
    for arguments in [&["inspect"][..], &["receipt", "diff", receipt, receipt], &["run", "-p", "Hello", "-n", "4"]] {
        let (reader, writer) = std::io::pipe().expect("there are pipes");
        drop(reader);
        let output = Command::new(env!("CARGO_BIN_EXE_moellon"))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(writer)
            .stderr(Stdio::piped())
            .spawn()
            .and_then(std::process::Child::wait_with_output)
            .expect("the program starts");
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() && !errors.contains("panicked"), "{arguments:?}: {errors}");
    }
}

#[test]
fn inspect_counts_the_bundled_model() {
    let report = json(&["inspect", "--json", "--bandwidth", "614"]);
    assert_eq!(report["architecture"], "glm_moe_dsa");
    let parameters: u64 = report["components"]
        .as_object()
        .expect("components")
        .values()
        .map(|c| c["parameters"].as_u64().expect("count"))
        .sum();
    assert_eq!(
        parameters + report["mtp"]["parameters"].as_u64().expect("count"),
        report["parameters"].as_u64().expect("count")
    );
    let (bytes, ceiling) =
        (report["bytes_per_token"].as_f64().expect("bytes"), report["ceiling_tok_s"].as_f64().expect("ceiling"));
    assert!((bytes * ceiling / 614e9 - 1.0).abs() < 1e-3, "{bytes} bytes at {ceiling} tok/s");
    assert_eq!(report["experts_per_layer"][0], 0);
    assert!(stdout(&moellon(&["inspect", "--bandwidth", "614"])).contains("routed experts"));
}

#[test]
fn logits_agree_with_transformers() {
    for name in ["glm_moe_dsa", "gpt_oss", "qwen3_moe"] {
        let fixture = repository().join("fixtures/golden").join(name);
        let golden = std::fs::read(fixture.join("golden.safetensors")).expect("fixture");
        let golden = safetensors::SafeTensors::deserialize(&golden).expect("fixture is sound");
        let ids: Vec<String> = words(&golden, "input_ids").into_iter().map(|id| id.to_string()).collect();
        let folder = tempfile::tempdir().expect("temporary folder");
        let out = folder.path().join("out.safetensors");
        let (fixture, out_name, ids) = (fixture.display().to_string(), out.display().to_string(), ids.join(","));
        let mtp = golden.tensor("mtp_logits").is_ok();
        let mut arguments = vec!["logits", "-m", &fixture, "--ids", &ids, "--greedy", "16", "--out", &out_name];
        arguments.extend(mtp.then_some("--mtp"));
        stdout(&moellon(&arguments));
        let file = std::fs::read(&out).expect("it was written");
        let file = safetensors::SafeTensors::deserialize(&file).expect("it is sound");
        assert_eq!(words(&file, "greedy_ids"), words(&golden, "greedy_ids"), "{name}");
        let pairs = [
            ("logits", "logits"),
            ("decode_logits", "logits"),
            ("greedy_logits", "greedy_logits"),
            ("mtp_logits", "mtp_logits"),
        ];
        for (key, expected) in pairs.into_iter().filter(|(key, _)| mtp || *key != "mtp_logits") {
            let (found, expected) = (floats(&file, key), floats(&golden, expected));
            assert_eq!(found.len(), expected.len(), "{name} {key}");
            let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            // The issue's gate; numpy reaches 2.1e-5 on logits near 5.
            assert!(worst <= 1e-4, "{name} {key}: {worst:e}");
        }
    }
}

fn words(file: &safetensors::SafeTensors<'_>, key: &str) -> Vec<i32> {
    let data = file.tensor(key).expect("key").data().to_vec();
    data.chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().expect("four bytes"))).collect()
}

fn floats(file: &safetensors::SafeTensors<'_>, key: &str) -> Vec<f32> {
    words(file, key).into_iter().map(|bits| f32::from_bits(bits as u32)).collect()
}

/// A copy of a golden model that a test may damage.
fn damaged(name: &str, damage: impl FnOnce(&Path)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("temporary folder");
    let fixture = repository().join("fixtures/golden").join(name);
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(fixture.join(file), folder.path().join(file)).expect("fixture copies");
    }
    damage(folder.path());
    folder
}

fn edit_config(folder: &Path, edit: impl FnOnce(&mut Value)) {
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).expect("config")).expect("config is JSON");
    edit(&mut config);
    std::fs::write(&path, config.to_string()).expect("config writes");
}

fn edit_weights(folder: &Path, edit: impl FnOnce(&mut Vec<u8>)) {
    let path = folder.join("model.safetensors");
    let mut bytes = std::fs::read(&path).expect("weights");
    edit(&mut bytes);
    std::fs::write(&path, bytes).expect("weights write");
}

#[test]
fn bad_models_are_one_clear_line() {
    type Damage = Box<dyn FnOnce(&Path)>;
    let config =
        |key: &'static str, value: Value| -> Damage { Box::new(move |folder| edit_config(folder, |c| c[key] = value)) };
    let cases: Vec<(Damage, &[&str])> = vec![
        (Box::new(|f| std::fs::remove_file(f.join("config.json")).expect("removes")), &["config.json", "missing"]),
        (Box::new(|f| std::fs::write(f.join("config.json"), "{").expect("writes")), &["config.json"]),
        (Box::new(|f| edit_weights(f, |b| b.truncate(b.len() / 2))), &["model.safetensors"]),
        (Box::new(|f| edit_weights(f, |b| b.truncate(4))), &["model.safetensors"]),
        (
            Box::new(|f| edit_weights(f, |b| b[..8].copy_from_slice(&u64::MAX.to_le_bytes()))),
            &["model.safetensors", "header"],
        ),
        (config("model_type", "gpt5".into()), &["model_type", "gpt5", "glm_moe_dsa"]),
        (config("num_hidden_layers", 1_000_000_000.into()), &["num_hidden_layers", "1000000000"]),
        (config("hidden_size", (-1).into()), &["hidden_size", "-1"]),
        (config("hidden_size", 128.into()), &["64", "128"]),
        (config("num_experts_per_tok", 0.into()), &["num_experts_per_tok", "0"]),
        (config("num_experts_per_tok", 77.into()), &["num_experts_per_tok", "77"]),
        (config("rope_parameters", Value::Null), &["rope_theta", "missing"]),
        (config("n_group", 3.into()), &["n_group", "3"]),
        (config("num_hidden_layers", 40.into()), &["indexer_types", "a list of 40 strings"]),
        (config("hidden_act", "gelu".into()), &["hidden_act", "gelu", "silu"]),
        // The last bytes of the file are a bf16 tensor: an infinity.
        (
            Box::new(|f| {
                edit_weights(f, |b| {
                    let n = b.len();
                    b[n - 2..].copy_from_slice(&[0x80, 0x7f]);
                })
            }),
            &["inf"],
        ),
    ];
    for (damage, expected) in cases {
        let folder = damaged("glm_moe_dsa", damage);
        let directory = folder.path().display().to_string();
        let message = error(&["logits", "-m", &directory, "--ids", "1,2", "--out", "unused"]);
        for part in expected {
            assert!(message.contains(part), "{message:?} does not name {part:?}");
        }
    }
    assert!(!Path::new("unused").exists(), "a failed run wrote its output");
}

#[test]
fn bad_flags_are_one_clear_line() {
    assert!(error(&["run", "-m", "/no/such/model", "-p", "x"]).contains("/no/such/model"));
    assert!(error(&["run", "-p", "x", "--temp", "-1"]).contains("temperature is -1"));
    assert!(error(&["run", "-p", "x", "--top-p", "2"]).contains("top_p is 2"));
    assert!(error(&["run", "-p", "x", "--context", "1000000"]).contains("--context is 1000000, expected 2 to"));
    assert!(error(&["run", "-p", "x", "--cpu-level", "sse9"]).contains("--cpu-level is sse9"));
    assert!(error(&["run", "-p", "x", "--threads", "0"]).contains("threads is 0"));
    assert!(error(&["run", "-p", "x", "--stop", ""]).contains("stop"));
    assert!(error(&["logits", "--ids", "99999", "--out", "x"]).contains("--ids has 99999"));
    assert!(error(&["bench", "--synthetic", "gpt-5"]).contains("--synthetic is gpt-5"));
    let folder = damaged("glm_moe_dsa", |_| {});
    assert!(error(&["run", "-m", &folder.path().display().to_string(), "-p", "x"]).contains("tokenizer.json"));
    // A tokenizer with more tokens than the model has rows.
    for file in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        std::fs::copy(repository().join("models/moellon-tiny").join(file), folder.path().join(file)).expect("copies");
    }
    assert!(error(&["run", "-m", &folder.path().display().to_string(), "-p", "x"]).contains("vocab_size 128"));
}

/// The portable GPU back end sums in another order than the CPU's exact mode and rounds nothing else: the text is the same.
#[test]
fn wgpu_writes_what_the_cpu_writes() {
    let on = |device: &[&str]| {
        let prompt =
            ["run", "--json", "--temp", "0", "-n", "48", "--no-think", "-p", "Write a function that adds two numbers"];
        moellon(&[&prompt[..], device].concat())
    };
    let wgpu = on(&["--backend", "wgpu"]);
    let stderr = String::from_utf8_lossy(&wgpu.stderr);
    if !wgpu.status.success() && stderr.contains("no adapter") {
        eprintln!("SKIP text on the wgpu back end: {stderr}");
        return;
    }
    let text = |output: &Output| {
        let answer: Value = serde_json::from_str(&stdout(output)).expect("output is JSON");
        answer["text"].as_str().expect("text").to_owned()
    };
    let expected = text(&on(&["--backend", "cpu", "--activations", "exact"]));
    assert!(expected.contains("fn "), "{expected}");
    assert_eq!(text(&wgpu), expected);
}

#[test]
fn doctor_says_what_would_run_where() {
    let report = json(&["doctor", "--json"]);
    assert_eq!(report["auto"]["backend"], "cpu");
    assert!(report["read_gb_s"].as_f64().expect("bandwidth") > 0.1);
    assert!(stdout(&moellon(&["doctor"])).contains("read bandwidth"));
}

#[test]
fn bench_counts_bytes_and_experts() {
    let report = json(&[
        "bench",
        "--synthetic",
        "qwen3-30b-a3b:layers=1,vocab=256",
        "--batch",
        "1,3",
        "--prompt",
        "16",
        "--steps",
        "1",
        "--windows",
        "1",
        "--json",
    ]);
    let results = report["results"].as_array().expect("results");
    assert_eq!(results.len(), 2);
    assert_eq!(results[0]["distinct_experts"], 8.0);
    assert!(results[1]["bytes_per_step"].as_u64() > results[0]["bytes_per_step"].as_u64());
    assert!(report["prefill"][0]["tok_s"].as_f64().expect("speed") > 0.0);
}
