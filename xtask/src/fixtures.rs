//! Golden data and bundled models are compared with the hashes that were committed with them. A fixture that changes
//! by accident would make a wrong result look right.

use crate::workspace;
use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Folders with a `SHA256SUMS` that names every other file below them.
const FOLDERS: [&str; 2] = ["fixtures", "models"];
const LIST: &str = "SHA256SUMS";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Verify,
    Update,
}

/// Verifies (or rewrites) the list of every folder.
pub(crate) fn run(mode: Mode) -> Result<()> {
    let paths = workspace::paths()?;
    let mut problems = Vec::new();
    let mut num_files = 0;
    for folder in FOLDERS {
        let prefix = format!("{folder}/");
        let mut found = BTreeMap::new();
        for path in &paths {
            let Some(name) = path.strip_prefix(&prefix).filter(|name| *name != LIST) else { continue };
            let bytes = std::fs::read(workspace::root().join(path)).with_context(|| path.clone())?;
            found.insert(name.to_owned(), hex_digest(&bytes));
        }
        num_files += found.len();
        let list = workspace::root().join(folder).join(LIST);
        match mode {
            Mode::Update if found.is_empty() => {}
            Mode::Update => std::fs::write(&list, format_list(&found)).with_context(|| list.display().to_string())?,
            Mode::Verify => {
                let text = if list.is_file() { std::fs::read_to_string(&list)? } else { String::new() };
                problems.extend(compare(&text, &found).into_iter().map(|problem| format!("{folder}/{problem}")));
            }
        }
    }
    if !problems.is_empty() {
        bail!("{}\n(if the change is meant: cargo xtask fixtures --update)", problems.join("\n"));
    }
    println!("fixtures: {num_files} files, all hashes agree");
    Ok(())
}

fn hex_digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The format of `sha256sum`, which can check it too.
fn format_list(files: &BTreeMap<String, String>) -> String {
    files.iter().fold(String::new(), |mut text, (name, digest)| {
        writeln!(text, "{digest}  {name}").expect("a String takes all text");
        text
    })
}

/// One line a file that is missing, unlisted or changed.
fn compare(list: &str, found: &BTreeMap<String, String>) -> Vec<String> {
    let mut problems = Vec::new();
    let mut listed = BTreeMap::new();
    for line in list.lines() {
        match line.split_once("  ") {
            Some((digest, name)) => {
                listed.insert(name, digest);
            }
            None => problems.push(format!("{LIST}: line {line:?} is not `digest  name`")),
        }
    }
    for (name, digest) in found {
        match listed.remove(name.as_str()) {
            None => problems.push(format!("{name}: not in {LIST}")),
            Some(expected) if expected != digest => {
                problems.push(format!("{name}: SHA-256 is {digest}, expected {expected}"));
            }
            Some(_) => {}
        }
    }
    problems.extend(listed.keys().map(|name| format!("{name}: in {LIST}, but there is no such file")));
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_missing_and_unlisted_files_are_found() {
        let files = |names: &[&str]| names.iter().map(|n| ((*n).to_owned(), hex_digest(n.as_bytes()))).collect();
        let list = format_list(&files(&["a", "b"]));
        assert_eq!(compare(&list, &files(&["a", "b"])), Vec::<String>::new());
        let mut found: BTreeMap<String, String> = files(&["a", "c"]);
        found.insert("a".to_owned(), hex_digest(b"other bytes"));
        let problems = compare(&list, &found);
        assert_eq!(problems.len(), 3, "{problems:?}");
        assert!(problems[0].starts_with("a: SHA-256 is "));
        assert_eq!(problems[1], "c: not in SHA256SUMS");
        assert_eq!(problems[2], "b: in SHA256SUMS, but there is no such file");
        assert!(compare("nonsense", &BTreeMap::new())[0].contains("nonsense"));
    }
}
