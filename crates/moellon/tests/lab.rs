//! Levers, receipts, rooflines and reports as a person uses them. What is measured here is too short to mean anything; that it is
//! recorded, checked and shown is what is tested.

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn moellon(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_moellon"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("MOELLON_")) {
        command.env_remove(name);
    }
    command.args(arguments).stdin(Stdio::null()).output().expect("the program starts")
}

fn stdout(arguments: &[&str]) -> String {
    let output = moellon(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("output is UTF-8")
}

fn error(arguments: &[&str]) -> String {
    let output = moellon(arguments);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}");
    String::from_utf8_lossy(&output.stderr).trim_end().to_owned()
}

/// A lever that is over after five pairs, and one that this machine cannot try.
const QUICK: &str = "title = 'Two at once'\nhypothesis = 'h'\nnotes = '1.7x'\nunit = 'tok/s'\nworkload = 'decode'\nlossless = true\ntokens = 8\nprompt = 16\n\
                     [[b]]\nbatch = 2\n[rule]\nmin_pairs = 5\nmax_pairs = 5\nmax_seconds = 60.0\n";
const IMPOSSIBLE: &str = "title = 'Long'\nhypothesis = 'h'\nunit = 'x'\nworkload = 'decode'\nlossless = true\ntokens = 8\nprompt = 4000\n\
                          [[b]]\nbatch = 2\n";

#[test]
fn a_lever_leaves_a_receipt_that_holds_and_a_report_shows_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    std::fs::create_dir(folder.path().join("levers")).expect("a folder");
    for (name, text) in [("quick", QUICK), ("impossible", IMPOSSIBLE)] {
        std::fs::write(folder.path().join("levers").join(format!("{name}.toml")), text).expect("written");
    }
    let (levers, receipts) = (path("levers"), path("receipts"));
    let said =
        stdout(&["lever", "run", "quick", "impossible", "--levers", &levers, "--receipts", &receipts, "--name", "t"]);
    assert!(
        said.contains("not applicable") && said.contains("needs 4024 positions, the model was made for 2048"),
        "{said}"
    );
    let file = only_file(Path::new(&receipts));
    let receipt: Value = serde_json::from_str(&std::fs::read_to_string(&file).expect("written")).expect("JSON");
    let point = &receipt["samples"][0]["points"][0];
    assert_eq!((receipt["schema"].as_u64(), receipt["kind"].as_str()), (Some(2), Some("levers")));
    // Two sequences beside each other write what one writes alone.
    assert_eq!(point["measured"]["same_output"], true);
    // On a machine that others keep busy every window is discarded, and the receipt says so.
    let samples = point["measured"]["a"]["samples_s"].as_array().map(Vec::len);
    let kept = point["measured"]["windows"]["kept"].as_u64();
    assert!(
        samples.is_some_and(|samples| samples > 0) || (kept, &point["verdict"]) == (Some(0), &Value::from("undecided")),
        "{point}"
    );
    assert!(point["bytes"][1]["bytes_per_token"].as_f64() < point["bytes"][0]["bytes_per_token"].as_f64());
    assert_eq!(receipt["verdicts"][1]["verdict"], "not_applicable");
    // What was claimed before stands beside what was found, in the same unit.
    assert_eq!(receipt["tables"]["t-notes"][0]["the notes"], "1.7x");
    assert!(receipt["tables"]["t-notes"][0]["here"].as_str().is_some_and(|here| here.ends_with("tok/s")));

    assert!(stdout(&["receipt", "verify", &receipts]).contains("ok, schema 2, sha256 "));
    assert!(stdout(&["receipt", "show", &receipts]).contains("moellon-tiny (bundled)"));
    assert!(stdout(&["lever", "verdicts", "--receipts", &receipts]).contains("quick"));

    // Again: the same program, lever, model and machine. Whether the verdict is the same is up to how busy the machine is.
    let again = stdout(&["lever", "run", "quick", "--levers", &levers, "--receipts", &receipts, "--name", "u"]);
    assert!(again.contains("verdicts as before"), "{again}");
    let fresh = ["lever", "run", "quick", "--levers", &levers, "--receipts", &receipts, "--no-receipt", "--fresh"];
    assert!(!stdout(&fresh).contains("as before"));

    let measure = ["roofline", "--batch", "1,2", "--prompt", "16", "--windows", "1", "--steps", "2", "--json"];
    let roofline: Value = serde_json::from_str(&stdout(
        &[
            &measure[..],
            &["--what-if", "bandwidth=1000", "--what-if", "k=3,p=1", "--receipts", &receipts, "--name", "r"],
        ]
        .concat(),
    ))
    .expect("JSON");
    assert_eq!(roofline["batches"].as_array().map(Vec::len), Some(2));
    // Two drafts that are always right are worth more than one token a step and less than three.
    let factor = |i: usize| {
        roofline["what_if"][i][1].as_f64().expect("tok/s") / roofline["achieved_tok_s"].as_f64().expect("tok/s")
    };
    assert!(factor(1) > 1.0 && factor(1) <= 3.0, "{}", factor(1));

    let page = path("report.html");
    stdout(&["report", "--receipts", &receipts, "--out", &page]);
    let html = std::fs::read_to_string(&page).expect("written");
    for part in [
        "Roofline",
        "Where a step",
        "Sequences at once",
        "What drafts bring",
        "Quality against bits",
        "quick",
        "</html>",
    ] {
        assert!(html.contains(part), "{part}");
    }
    // One file: nothing is fetched, nothing runs.
    assert!(!html.contains("src=") && !html.contains("<script") && !html.contains("NaN") && !html.contains("{{"));
    let same: Value = serde_json::from_str(&stdout(&["report", "--receipts", &receipts, "--json"])).expect("JSON");
    assert_eq!(same["receipts"].as_array().map(Vec::len), Some(3));

    let broken = std::fs::read_to_string(&file).expect("written").replacen("\"steal_pct\": ", "\"steal_pct\": 1", 1);
    std::fs::write(&file, broken).expect("written");
    assert!(error(&["receipt", "verify", &receipts]).contains("1 of 3 receipts do not hold"));
    // What is no receipt at all is named, and hides nothing else.
    std::fs::write(folder.path().join("receipts/half.json"), "{\"schema\": 2, ").expect("written");
    let said = stdout(&["doctor", "--receipts", &receipts]);
    assert!(said.contains("not a receipt") && said.contains("half.json: EOF while parsing"), "{said}");
    assert!(!said.contains("No lever was tested"), "{said}");
    let report: Value = serde_json::from_str(&stdout(&["report", "--receipts", &receipts, "--json"])).expect("JSON");
    assert_eq!(report["unread_receipts"].as_array().map(Vec::len), Some(1));
}

fn only_file(folder: &Path) -> std::path::PathBuf {
    let files: Vec<_> = std::fs::read_dir(folder).expect("there").flatten().map(|entry| entry.path()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    files[0].clone()
}

#[test]
fn what_does_not_exist_is_named() {
    assert!(
        error(&["lever", "run", "wings", "--no-receipt"])
            .contains("lever wings: unknown, expected one of activations, ")
    );
    assert!(error(&["roofline", "--what-if", "wings=3"]).contains("wings"));
    assert!(error(&["roofline", "--what-if", "batch=0"]).contains("batch=0: expected 1 to 1024"));
    assert!(error(&["receipt", "verify", "Cargo.toml"]).contains("1 of 1 receipts do not hold"));
    assert!(stdout(&["lever", "list"]).contains("index-topk"));
    assert!(stdout(&["lever", "show", "mtp"]).contains("0 % accepted"));
}
