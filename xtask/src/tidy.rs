//! The rules that compilers and clippy do not know. Each is a function from files to findings, with a test that shows
//! it fire.

mod cited_tests;
mod dependencies;
mod edges;
mod links;
mod op_files;
mod sizes;
mod unsafe_code;
mod words;

use crate::workspace;
use anyhow::{Result, ensure};

/// What a rule found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Finding {
    /// Fails the check.
    Error(String),
    /// Is printed.
    Warning(String),
}

impl Finding {
    fn error(place: impl AsRef<str>, message: impl AsRef<str>) -> Self {
        Finding::Error(format!("{}: {}", place.as_ref(), message.as_ref()))
    }
}

/// Runs every rule.
pub(crate) fn run() -> Result<()> {
    let paths = workspace::paths()?;
    let files = workspace::text_files(&paths)?;
    let mut findings = Vec::new();
    findings.extend(edges::check(&edges::workspace_packages()?));
    findings.extend(op_files::check(&files));
    findings.extend(sizes::check(&files));
    findings.extend(words::check(&files));
    findings.extend(unsafe_code::check(&files));
    findings.extend(dependencies::check(&files));
    findings.extend(links::check(&files, &paths));
    findings.extend(cited_tests::check(&files));
    let mut num_errors = 0;
    for finding in &findings {
        match finding {
            Finding::Error(message) => {
                num_errors += 1;
                println!("error: {message}");
            }
            Finding::Warning(message) => println!("warning: {message}"),
        }
    }
    ensure!(num_errors == 0, "tidy: {num_errors} errors");
    println!("tidy: {} files, {} warnings", files.len(), findings.len());
    Ok(())
}

/// The part of a Rust file before its unit tests: what ships.
fn shipped_code(text: &str) -> &str {
    text.find("\n#[cfg(test)]").map_or(text, |end| &text[..end])
}

/// Lines with their numbers (from 1), without comment lines.
fn code_lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().map(|(i, line)| (i + 1, line)).filter(|(_, line)| !line.trim_start().starts_with("//"))
}

#[cfg(test)]
fn file(path: &str, text: &str) -> workspace::TextFile {
    workspace::TextFile { path: path.to_owned(), text: text.to_owned() }
}

#[cfg(test)]
fn messages(findings: Vec<Finding>) -> Vec<String> {
    findings
        .into_iter()
        .map(|finding| match finding {
            Finding::Error(message) | Finding::Warning(message) => message,
        })
        .collect()
}
