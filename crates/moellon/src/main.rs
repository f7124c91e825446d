//! The `moellon` command. The only crate that names a concrete back end, reads the environment and prints.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command-line program prints")]
#![allow(unreachable_pub, reason = "a binary has no outside")]

mod advice;
mod backend;
mod bench;
mod chat;
mod cli;
mod doctor;
mod generate;
mod inspect;
mod ladder;
mod lever;
mod load;
mod logits;
mod model_source;
mod provenance;
mod receipt;
mod report;
mod roofline;
mod run;
mod serve;
mod speculation;
mod surgery;
mod table;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    end_quietly_without_a_reader();
    let arguments = cli::Arguments::parse();
    cli::init_logging(&arguments);
    let result = match arguments.command {
        cli::Command::Run(options) => run::run(&options),
        cli::Command::Serve(options) => serve::run(*options),
        cli::Command::Inspect(options) => inspect::run(&options),
        cli::Command::Logits(options) => logits::run(&options),
        cli::Command::Bench(options) => bench::run(&options),
        cli::Command::Doctor(options) => doctor::run(&options),
        cli::Command::Lever(options) => lever::run(&options),
        cli::Command::Receipt(options) => receipt::run(&options),
        cli::Command::Roofline(options) => roofline::run(&options),
        cli::Command::Report(options) => report::run(&options),
        cli::Command::Calibrate(options) => surgery::calibrate(&options),
        cli::Command::Prune(options) => surgery::prune(&options),
        cli::Command::Recalibrate(options) => surgery::recalibrate(&options),
        cli::Command::Plan(options) => surgery::plan(&options),
        cli::Command::Quantize(options) => surgery::quantize(&options),
        cli::Command::Compare(options) => surgery::compare(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", one_line(&error));
            ExitCode::FAILURE
        }
    }
}

/// `println!` panics where the reader of our output went away (`moellon receipt diff A B | head`): that ends the program, and is
/// no error of ours.
fn end_quietly_without_a_reader() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let message = panic.payload_as_str().unwrap_or_default();
        if message.starts_with("failed printing to stdout") && message.contains("Broken pipe") {
            std::process::exit(0);
        }
        default(panic);
    }));
}

/// Whether the reader of our output went away (`moellon run | head`), which is no error of ours.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .any(|cause| cause.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe))
}

/// The chain of causes, outermost first; a cause that its parent already quotes is not said twice.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if line.is_empty() {
            line = cause;
        } else if !line.contains(&cause) {
            line.push_str(": ");
            line.push_str(&cause);
        }
    }
    line.replace('\n', " ")
}
