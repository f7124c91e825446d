//! The README's promise: its first code block holds two commands, one that runs the bundled model and one that runs
//! all tests. CI executes both as they stand there.

use crate::workspace;
use anyhow::{Context, Result, ensure};

/// The two commands at the top of README.md.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Commands {
    pub(crate) run: Vec<String>,
    pub(crate) test: Vec<String>,
}

/// Reads them.
pub(crate) fn commands() -> Result<Commands> {
    let text = std::fs::read_to_string(workspace::root().join("README.md")).context("README.md")?;
    parse(&text).context("README.md")
}

fn parse(text: &str) -> Result<Commands> {
    let block = text.split("```").nth(1).context("there is no code block")?;
    // The first line is the language of the block.
    let lines: Vec<&str> =
        block.lines().skip(1).map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')).collect();
    ensure!(lines.len() == 2, "the first code block has {} commands, expected 2", lines.len());
    let [run, test] = [split_words(lines[0])?, split_words(lines[1])?];
    ensure!(run.starts_with(&["cargo".into(), "run".into()]), "the first command is {:?}, not cargo run", lines[0]);
    ensure!(test.starts_with(&["cargo".into(), "test".into()]), "the second command is {:?}, not cargo test", lines[1]);
    Ok(Commands { run, test })
}

/// Splits at spaces outside of double quotes: all the shell that the two commands need.
fn split_words(line: &str) -> Result<Vec<String>> {
    let mut words = Vec::new();
    for (i, part) in line.split('"').enumerate() {
        match i % 2 {
            0 => words.extend(part.split_whitespace().map(str::to_owned)),
            _ => words.push(part.to_owned()),
        }
    }
    ensure!(line.matches('"').count().is_multiple_of(2), "unbalanced quotes in {line:?}");
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_two_commands_are_found() {
        let text =
            "# X\n\n```sh\ncargo run --release -- run -p \"Write a function\"   # comment? no: kept out of blocks\n```";
        assert!(parse(text).is_err(), "one command is not two");
        let text =
            "# X\n\n```sh\n# model\ncargo run -- run -p \"Write a function\"\n\ncargo test --workspace\n```\nmore";
        let commands = parse(text).unwrap();
        assert_eq!(commands.run, ["cargo", "run", "--", "run", "-p", "Write a function"]);
        assert_eq!(commands.test, ["cargo", "test", "--workspace"]);
        assert!(parse("```sh\ncargo test\ncargo run\n```").is_err(), "the order is part of the promise");
        assert!(parse("no block").is_err());
        assert!(split_words("a \"b").is_err());
    }
}
