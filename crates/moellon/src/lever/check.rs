//! `moellon lever check`: the lab against itself. A slowdown that was planted must be found, and none where there is none.

use super::{Record, base, experiment};
use crate::cli::LeverTestOptions;
use anyhow::{Context, Result, ensure};
use moellon_lab::StealClock;
use moellon_lab::disturbance::SystemWitness;
use moellon_lab::lever::{Lever, Setting};
use moellon_lab::statistics::Outcome;
use serde_json::json;

/// Of twenty runs, how many must be right.
const RIGHT_OF_20: usize = 19;

/// Pairs and seconds that a planted slowdown has to show in, at most: on a machine that others share, the 15 s of a lever can end
/// before the interval is narrow enough for 3 %. What is not there needs no more time.
const PLANTED_LIMITS: (usize, f64) = (1280, 90.0);

/// The lever whose arms are the same, and that whose second arm waits.
fn lever(name: &str, slowdown: Option<f64>) -> Result<Lever> {
    let text = "title = 'The lab itself'\nhypothesis = 'What was planted is found.'\nunit = 'x'\nworkload = 'decode'\n\
                lossless = true\ntokens = 48\nprompt = 64\n[[b]]\n";
    let mut lever = Lever::parse(name, text)?;
    lever.b = vec![Setting { slowdown, ..Setting::default() }];
    if slowdown.is_some() {
        (lever.rule.max_pairs, lever.rule.max_seconds) = PLANTED_LIMITS;
    }
    Ok(lever)
}

/// Runs both kinds `runs` times in turn, every time with engines of their own.
pub fn run(test: &LeverTestOptions, runs: usize, slowdown_percent: f64) -> Result<()> {
    ensure!(runs > 0, "--runs is 0, expected 1 or more");
    ensure!((0.1..100.0).contains(&slowdown_percent), "--slowdown is {slowdown_percent}, expected 0.1 to 100 percent");
    let (base, provenance, model) = base(test)?;
    let levers = [lever("planted", Some(slowdown_percent / 100.0))?, lever("nothing", None)?];
    let mut witness = SystemWitness::new();
    let steal = StealClock::start();
    let mut right = [0, 0];
    let mut samples = Vec::new();
    for round in 0..runs {
        for (kind, lever) in levers.iter().enumerate() {
            let tested = experiment::run(&base, lever, &mut witness)?;
            let measured = tested.points[0].measured.as_ref().context("the engine runs here as it is")?;
            let expected: &[Outcome] =
                if kind == 0 { &[Outcome::Slower] } else { &[Outcome::Equal, Outcome::Undecided] };
            let is_right = expected.contains(&measured.outcome) && measured.same_output;
            right[kind] += usize::from(is_right);
            let speedup = measured.speedup.map_or(0.0, |s| s.mean);
            eprintln!(
                "{}/{runs} {}: {:?}, {speedup:.4}, {} pairs{}",
                round + 1,
                lever.name,
                measured.outcome,
                measured.windows.kept,
                if is_right { "" } else { " - wrong" }
            );
            samples.push(json!({
                "kind": lever.name, "outcome": measured.outcome, "right": is_right, "speedup": measured.speedup,
                "windows": measured.windows, "seconds": measured.seconds, "same_output": measured.same_output,
                "a_ms": measured.a.median_s * 1e3, "b_ms": measured.b.median_s * 1e3,
            }));
        }
    }
    println!("planted {slowdown_percent} % found as a loss     {} of {runs}", right[0]);
    println!("nothing found in nothing       {} of {runs}", right[1]);
    let passed = right.iter().all(|right| 20 * right >= RIGHT_OF_20 * runs);
    if !test.no_receipt {
        let name = test.name.clone().unwrap_or_else(|| "lever-check".to_owned());
        let row = json!({
            "planted": format!("{slowdown_percent} % slower"),
            "found as a loss": format!("{} of {runs}", right[0]),
            "same engine: equal or undecided": format!("{} of {runs}", right[1]),
        });
        let verdict = json!({ "lever": "check", "verdict": if passed { "keep" } else { "drop" } });
        let record = Record {
            kind: "lever-check",
            name: &name,
            provenance,
            model: Some(model),
            steal_pct: steal.steal_percent(),
            note: json!({ "runs": runs, "slowdown_percent": slowdown_percent, "rule": levers[1].rule, "rule_planted": levers[0].rule }),
            samples: json!(samples),
            verdicts: vec![verdict],
            tables: vec![(name.clone(), vec![row])],
        };
        println!("{}", record.write(&test.receipts)?.display());
    }
    ensure!(passed, "the lab was wrong more often than once in 20: {} and {} of {runs} right", right[0], right[1]);
    Ok(())
}
