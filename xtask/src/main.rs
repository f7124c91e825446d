//! Chores of the workspace, run as `cargo xtask <command>`. `check` is what CI runs.
#![allow(clippy::print_stdout, clippy::print_stderr)] // A command-line tool prints.

mod check;
mod clients;
mod docs;
mod fixtures;
mod kernels;
mod readme;
mod tidy;
mod workspace;

use std::process::ExitCode;

const USAGE: &str = "\
usage: cargo xtask <command>

  check [--fast]       everything that CI runs, stage by stage; --fast: formatting, clippy and tidy only
  agents               coding agents from npm completing a tool loop against our server; writes a receipt
  tidy                 the rules that compilers and clippy do not know
  fixtures [--update]  compare fixtures and bundled models with SHA256SUMS; --update rewrites the lists
  kernels              compile every .cu for every supported GPU, check every .wgsl
  docs [--write]       compare the tables in README.md and docs/ with receipts/; --write updates them";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match args[..] {
        ["check"] => check::run(check::Scope::All),
        ["check", "--fast"] => check::run(check::Scope::Fast),
        ["agents"] => clients::agents(),
        ["tidy"] => tidy::run(),
        ["fixtures"] => fixtures::run(fixtures::Mode::Verify),
        ["fixtures", "--update"] => fixtures::run(fixtures::Mode::Update),
        ["kernels"] => kernels::run(),
        ["docs"] => docs::run(docs::Mode::Verify),
        ["docs", "--write"] => docs::run(docs::Mode::Write),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
