//! The surgery commands as a person uses them: a whole operation on the bundled model, and kills at any point.

use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_moellon"));
    // Settings of the person who runs the tests must not reach the program.
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("MOELLON_")) {
        command.env_remove(name);
    }
    command.args(arguments).stdin(Stdio::null());
    command
}

fn run(arguments: &[&str]) -> String {
    let output = command(arguments).output().expect("the program starts");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("output is UTF-8")
}

fn error(arguments: &[&str]) -> String {
    let output = command(arguments).output().expect("the program starts");
    assert!(!output.status.success(), "{arguments:?} must fail");
    String::from_utf8_lossy(&output.stderr).trim_end().to_owned()
}

/// A text of this repository, which the bundled model has not seen.
fn text() -> String {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/main.rs").display().to_string()
}

fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).expect("a directory").map(|entry| entry.expect("an entry").path());
    entries
        .map(|path| {
            (
                path.display().to_string().rsplit('/').next().unwrap_or_default().to_owned(),
                std::fs::read(path).expect("a file"),
            )
        })
        .collect()
}

/// Starts the command again and again, killing it a little later each time, until it ends by itself. Returns the kills.
fn kill_until_done(arguments: &[&str], out: &Path) -> usize {
    let mut kills = 0;
    while !out.exists() {
        let mut child =
            command(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the program starts");
        // 12, 19, 26, .. ms: points all over the run, and an end.
        std::thread::sleep(Duration::from_millis(12 + 7 * kills));
        // SIGKILL on Unix: no handler, no unwinding, no flushing.
        child.kill().expect("the child can be killed");
        child.wait().expect("the child is gone");
        kills += 1;
        assert!(kills < 1000, "no progress in {kills} starts");
    }
    // A kill between the directory's last rename and the end of the journal leaves the journal: the next start removes it.
    let journal = out.with_extension("journal");
    if journal.exists() {
        run(arguments);
        assert!(!journal.exists());
    }
    kills as usize
}

#[test]
fn an_operation_from_calibration_to_comparison_survives_kills() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (text, stats, pruned, quantized) = (text(), path("stats"), path("pruned"), path("quantized"));
    run(&["calibrate", "--text", &text, "--max-tokens", "256", "--moments", "none", "--out", &stats]);
    let prune = ["prune", "--stats", &stats, "--ratio", "0.25", "--shard-gb", "0.0005", "--out", &pruned];
    let kills = kill_until_done(&prune, Path::new(&pruned));
    assert!(kills > 1, "pruning was killed {kills} times");
    let whole = path("pruned-whole");
    run(&[&prune[..7], &["--out", &whole]].concat());
    assert!(contents(Path::new(&whole)) == contents(Path::new(&pruned)), "a pruning that was killed differs");
    let quantize =
        ["quantize", "-m", &pruned, "--plan", "q3a4", "--method", "rtn", "--shard-gb", "0.0003", "--out", &quantized];
    let kills = kill_until_done(&quantize, Path::new(&quantized));
    assert!(kills > 1, "quantizing was killed {kills} times");
    let whole = path("quantized-whole");
    run(&[&quantize[..9], &["--out", &whole]].concat());
    assert!(contents(Path::new(&whole)) == contents(Path::new(&quantized)), "a quantization that was killed differs");
    let left: Vec<String> = contents_names(dir.path());
    assert!(!left.iter().any(|name| name.ends_with(".journal") || name.ends_with(".partial")), "{left:?}");
    let picture = path("picture.svg");
    let comparison =
        run(&["compare", "-m", &quantized, "--text", &text, "--max-tokens", "128", "--picture", &picture, "--json"]);
    let comparison: Value = serde_json::from_str(&comparison).expect("JSON");
    let number = |key: &str| comparison[key].as_f64().unwrap_or_else(|| panic!("{key}: {comparison}"));
    assert!(number("kl_mean") > 0.0 && number("kl_p999") >= number("kl_mean"));
    assert!((3.0..4.2).contains(&number("bits_per_weight")), "{comparison}");
    assert!(number("mtp_agreement") > 0.1, "{comparison}");
    assert!(std::fs::read_to_string(&picture).expect("a picture").starts_with("<svg"));
    // The card says both steps; the product runs with its own tokenizer.
    let card = std::fs::read_to_string(Path::new(&quantized).join("README.md")).expect("a card");
    assert!(card.contains("Before that: `moellon prune`") && card.contains("plan `q3a4`"), "{card}");
    let answer = run(&["run", "-m", &quantized, "--json", "--temp", "0", "-n", "8", "-p", "fn main() {"]);
    let answer: Value = serde_json::from_str(&answer).expect("JSON");
    assert_eq!(answer["token_ids"].as_array().map(Vec::len), Some(8), "{answer}");
}

fn contents_names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).expect("a directory");
    entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn wrong_input_is_one_line() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = |name: &str| dir.path().join(name).display().to_string();
    let out = path("out");
    let message = error(&["quantize", "--format", "q4_k", "--out", &out]);
    assert!(message.contains("--format: weight format is q4_k, expected affine-2"), "{message}");
    let message = error(&["quantize", "--plan", "q5", "--out", &out]);
    assert!(message.contains("preset plan is q5, expected q3a4, v59, keep"), "{message}");
    let message = error(&["quantize", "--format", "affine-4", "--method", "gptq", "--out", &out]);
    assert!(message.contains("--method gptq has no --stats"), "{message}");
    let message = error(&["prune", "--stats", &path("none"), "--keep", "8", "--out", &out]);
    assert!(message.contains("--stats"), "{message}");
    let message = error(&["plan", "--bpw", "4", "--out", &out]);
    assert!(message.contains("--text is missing"), "{message}");
    assert!(contents_names(dir.path()).is_empty());
}
