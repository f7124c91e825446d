//! Everything that CI runs, in stages with names and times. All stages run even when one fails; a stage that cannot run
//! here is skipped in words and counted.

use crate::{clients, docs, fixtures, kernels, readme, tidy, workspace};
use anyhow::{Context, Result, bail, ensure};
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    /// What CI runs.
    All,
    /// What an edit needs: formatting, clippy, tidy.
    Fast,
}

#[derive(Debug)]
enum Outcome {
    /// Passed, with what there is to say.
    Passed(String),
    /// Could not run here.
    Skipped(String),
}

type Stage = (&'static str, fn() -> Result<Outcome>);

const STAGES: [Stage; 16] = [
    ("fmt", || cargo(&["fmt", "--all", "--check"])),
    ("tidy", || passed(tidy::run())),
    ("fixtures", || passed(fixtures::run(fixtures::Mode::Verify))),
    ("docs tables", || passed(docs::run(docs::Mode::Verify))),
    ("kernels", || passed(kernels::run())),
    ("test", readme_test),
    // After the tests: they have built the programs that the clients talk to.
    ("clients", || {
        Ok(match clients::run()? {
            clients::Verdict::Passed(detail) => Outcome::Passed(detail),
            clients::Verdict::Skipped(reason) => Outcome::Skipped(reason),
        })
    }),
    ("clippy", || cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"])),
    ("fuzz targets", fuzz_targets),
    ("doc", || run_command(cargo_command(&["doc", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings"))),
    ("deny", deny),
    ("advisories", advisories),
    ("apple", apple),
    // A core without dot products: run-time detection, and all cases once at the level that it finds.
    ("neon, cortex-a72", || {
        let one_pass = ["--skip", "exact_activations", "--skip", "int8_activations", "--skip", "more_threads"];
        neon("cortex-a72", &["--lib", "--test", "conformance"], &one_pass)
    }),
    // One with everything: every level in both activation modes. Numbers of threads are varied natively; the emulator
    // takes a minute of CPU for each pass over the cases.
    ("neon, max", || neon("max", &[], &["--skip", "one_thread", "--skip", "more_threads"])),
    ("run", readme_run),
];

/// What `--fast` keeps.
const FAST: [&str; 3] = ["fmt", "tidy", "clippy"];

/// Runs the stages and prints a table of them.
fn run_stages(stages: &[Stage]) -> Result<()> {
    let mut lines = Vec::new();
    let (mut num_failed, mut num_skipped) = (0, 0);
    let started = Instant::now();
    for (name, stage) in stages {
        println!("\n=== {name}");
        let start = Instant::now();
        let (verdict, detail) = match stage() {
            Ok(Outcome::Passed(detail)) => ("ok", detail),
            Ok(Outcome::Skipped(reason)) => {
                num_skipped += 1;
                println!("SKIP {name}: {reason}");
                ("SKIP", reason)
            }
            Err(error) => {
                num_failed += 1;
                println!("FAILED {name}: {error:#}");
                ("FAILED", format!("{error:#}").lines().next().unwrap_or_default().to_owned())
            }
        };
        lines.push(format!("{name:20} {verdict:7} {:>6.1} s  {detail}", seconds(start.elapsed())));
    }
    println!("\n=== summary\n{}", lines.join("\n"));
    println!(
        "check: {} stages passed, {num_failed} failed, {num_skipped} skipped in {:.0} s",
        stages.len() - num_failed - num_skipped,
        seconds(started.elapsed())
    );
    ensure!(num_failed == 0, "{num_failed} stages failed");
    Ok(())
}

/// Runs the stages of `scope`.
pub(crate) fn run(scope: Scope) -> Result<()> {
    let wanted = |(name, _): &&Stage| scope == Scope::All || FAST.contains(name);
    run_stages(&STAGES.iter().filter(wanted).copied().collect::<Vec<_>>())
}

fn seconds(duration: Duration) -> f64 {
    duration.as_secs_f64()
}

fn passed(result: Result<()>) -> Result<Outcome> {
    result.map(|()| Outcome::Passed(String::new()))
}

fn cargo_program() -> PathBuf {
    std::env::var_os("CARGO").map_or_else(|| "cargo".into(), PathBuf::from)
}

fn cargo_command(arguments: &[&str]) -> Command {
    let mut command = Command::new(cargo_program());
    command.args(arguments).current_dir(workspace::root()).stdin(Stdio::null());
    command
}

fn cargo(arguments: &[&str]) -> Result<Outcome> {
    run_command(&mut cargo_command(arguments))
}

fn run_command(command: &mut Command) -> Result<Outcome> {
    let status = command.status().with_context(|| format!("{command:?}"))?;
    ensure!(status.success(), "{}: {status}", in_words(command));
    Ok(Outcome::Passed(String::new()))
}

/// The command as somebody would type it.
fn in_words(command: &Command) -> String {
    let program = PathBuf::from(command.get_program());
    let program = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let arguments = command.get_args().map(|argument| argument.to_string_lossy().into_owned());
    std::iter::once(program).chain(arguments).collect::<Vec<_>>().join(" ")
}

/// Runs a command, shows its standard output while it comes, and returns it.
pub(crate) fn tee(command: &mut Command) -> Result<String> {
    let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| in_words(command))?;
    let mut output = BufReader::new(child.stdout.take().expect("stdout is piped"));
    let mut all = Vec::new();
    let mut shown = std::io::stdout();
    loop {
        // What is there now, whole lines or not: a streamed answer should be seen streaming.
        let piece = output.fill_buf()?;
        if piece.is_empty() {
            break;
        }
        all.extend_from_slice(piece);
        shown.write_all(piece)?;
        shown.flush()?;
        let len = piece.len();
        output.consume(len);
    }
    let status = child.wait()?;
    ensure!(status.success(), "{}: {status}", in_words(command));
    Ok(String::from_utf8_lossy(&all).into_owned())
}

/// The README's command for all tests, as it stands there.
fn readme_test() -> Result<Outcome> {
    let words = readme::commands()?.test;
    run_tests(cargo_command(&words[1..].iter().map(String::as_str).collect::<Vec<_>>()))
}

fn run_tests(mut command: Command) -> Result<Outcome> {
    let totals = TestTotals::read(&tee(&mut command)?);
    ensure!(totals.passed > 0, "no test ran");
    Ok(Outcome::Passed(format!("{} tests passed, {} ignored", totals.passed, totals.ignored)))
}

/// Sums over the closing lines of test programs.
#[derive(Debug, Default, PartialEq, Eq)]
struct TestTotals {
    passed: u64,
    ignored: u64,
}

impl TestTotals {
    fn read(output: &str) -> Self {
        let mut totals = TestTotals::default();
        for line in output.lines().filter_map(|line| line.strip_prefix("test result: ")) {
            for part in line.split(['.', ';']).map(str::trim) {
                match part.split_once(' ') {
                    Some((number, "passed")) => totals.passed += number.parse::<u64>().unwrap_or(0),
                    Some((number, "ignored")) => totals.ignored += number.parse::<u64>().unwrap_or(0),
                    _ => {}
                }
            }
        }
        totals
    }
}

/// The README's first command: the bundled model must write something.
fn readme_run() -> Result<Outcome> {
    let words = readme::commands()?.run;
    let mut command = cargo_command(&words[1..].iter().map(String::as_str).collect::<Vec<_>>());
    let text = tee(&mut command)?;
    let num_words = text.split_whitespace().count();
    ensure!(num_words >= 5, "the bundled model wrote {num_words} words: {text:?}");
    Ok(Outcome::Passed(format!("{num_words} words")))
}

/// The fuzz targets are a workspace of their own; without this they would rot between two runs of the fuzzer.
fn fuzz_targets() -> Result<Outcome> {
    if Command::new("c++").arg("--version").output().is_err() {
        return Ok(Outcome::Skipped("libFuzzer is C++ and there is no c++".to_owned()));
    }
    cargo(&["check", "--locked", "--manifest-path", "fuzz/Cargo.toml", "--target-dir", "target"])
}

fn is_deny_installed() -> bool {
    let mut version = cargo_command(&["deny", "--version"]);
    version.output().is_ok_and(|output| output.status.success())
}

fn deny() -> Result<Outcome> {
    if !is_deny_installed() {
        return Ok(Outcome::Skipped("cargo-deny is not installed (cargo install cargo-deny --locked)".to_owned()));
    }
    cargo(&["deny", "--locked", "check", "--hide-inclusion-graph", "licenses", "bans", "sources"])
}

/// Known vulnerabilities. The database is fetched from the network, which not every machine has.
fn advisories() -> Result<Outcome> {
    if !is_deny_installed() {
        return Ok(Outcome::Skipped("cargo-deny is not installed (cargo install cargo-deny --locked)".to_owned()));
    }
    let output = cargo_command(&["deny", "--locked", "check", "--hide-inclusion-graph", "advisories"]).output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        return Ok(Outcome::Passed(String::new()));
    }
    if text.contains("failed to fetch advisory database") {
        return Ok(Outcome::Skipped("the advisory database cannot be fetched from here".to_owned()));
    }
    bail!("cargo deny check advisories:\n{text}")
}

/// The target of NEON tests: links without a C toolchain for it, runs in an emulator. `.cargo/config.toml` has the rest.
const NEON_TARGET: &str = "aarch64-unknown-linux-musl";
const NEON_EMULATOR: &str = "qemu-aarch64-static";
/// The crates below which code depends on the architecture. `moellon-ops` is not among them: its own test runs the
/// portable reference against itself, which takes minutes in the emulator, and the back end's test uses it anyway.
const NEON_PACKAGES: [&str; 2] = ["moellon-tensor", "moellon-backend-cpu"];

/// A skip where the standard library for `target` is not installed.
fn missing_target(target: &str) -> Result<Option<Outcome>> {
    let rustc = Command::new("rustc").args(["--print", "target-libdir", "--target", target]).output()?;
    let libraries = PathBuf::from(String::from_utf8_lossy(&rustc.stdout).trim());
    let missing = || Outcome::Skipped(format!("no standard library for {target} (rustup target add {target})"));
    Ok((!libraries.is_dir()).then(missing))
}

/// M-series Macs. Type-checking needs neither a Mac nor its frameworks.
const APPLE_TARGET: &str = "aarch64-apple-darwin";

/// Type-checks the whole workspace as a Mac would, the Metal back end of wgpu included.
fn apple() -> Result<Outcome> {
    match missing_target(APPLE_TARGET)? {
        Some(missing) => Ok(missing),
        None => cargo(&["check", "--workspace", "--all-targets", "--target", APPLE_TARGET]),
    }
}

/// Runs tests on an emulated `cpu`; `which` selects test programs, `filter` tests.
fn neon(cpu: &str, which: &[&str], filter: &[&str]) -> Result<Outcome> {
    if Command::new(NEON_EMULATOR).arg("--version").output().is_err() {
        return Ok(Outcome::Skipped(format!("{NEON_EMULATOR} is not installed (apt install qemu-user-static)")));
    }
    if let Some(missing) = missing_target(NEON_TARGET)? {
        return Ok(missing);
    }
    let mut command = cargo_command(&["test", "--target", NEON_TARGET]);
    command.args(NEON_PACKAGES.iter().flat_map(|package| ["-p", package])).args(which).arg("--").args(filter);
    command.env("QEMU_CPU", cpu);
    run_tests(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_stage_fails_the_check_and_a_skipped_one_does_not() {
        let fine: Stage = ("fine", || Ok(Outcome::Passed(String::new())));
        let skipped: Stage = ("skipped", || Ok(Outcome::Skipped("no device".to_owned())));
        let failed: Stage = ("failed", || bail!("on purpose"));
        assert!(run_stages(&[fine, skipped]).is_ok());
        assert_eq!(run_stages(&[fine, failed, skipped]).unwrap_err().to_string(), "1 stages failed");
    }

    #[test]
    fn closing_lines_of_tests_are_added_up() {
        let output = "running 2 tests\ntest result: ok. 12 passed; 0 failed; 3 ignored; 0 measured; 0 filtered out; \
                      finished in 0.01s\n\ntest result: ok. 5 passed; 0 failed; 0 ignored; 0 measured\n";
        assert_eq!(TestTotals::read(output), TestTotals { passed: 17, ignored: 3 });
    }

    #[test]
    fn commands_are_shown_and_their_output_is_kept() {
        let mut echo = Command::new("sh");
        echo.args(["-c", "echo one; echo two"]);
        assert_eq!(tee(&mut echo).unwrap(), "one\ntwo\n");
        let mut fail = Command::new("sh");
        fail.args(["-c", "exit 3"]);
        assert!(tee(&mut fail).unwrap_err().to_string().starts_with("sh -c exit 3: "));
    }
}
