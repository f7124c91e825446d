//! Tests that documents name exist: a document that says what is tested is worth as much as that is true.

use super::Finding;
use crate::workspace::TextFile;
use std::collections::HashSet;

/// Underscores from which on a word in backticks is the name of a test. Fields and flags have fewer.
const MIN_UNDERSCORES: usize = 4;

/// Checks that `long_names_in_backticks` of the documents stand in some Rust or Python file: as a function, or as a field of the same length.
pub(super) fn check(files: &[TextFile]) -> Vec<Finding> {
    let mut known = HashSet::new();
    for file in files.iter().filter(|file| file.path.ends_with(".rs") || file.path.ends_with(".py")) {
        known.extend(file.text.split(|c: char| !is_of_name(c)).filter(|word| is_test_name(word)));
    }
    let documents = files.iter().filter(|file| file.path.starts_with("docs/") && file.path.ends_with(".md"));
    let mut findings = Vec::new();
    for file in documents {
        for (number, line) in (1..).zip(file.text.lines()) {
            let quoted = line.split('`').skip(1).step_by(2);
            let missing = quoted.filter(|word| is_test_name(word) && !known.contains(word));
            findings.extend(missing.map(|word| {
                Finding::error(format!("{}:{number}", file.path), format!("no source has the name {word}"))
            }));
        }
    }
    findings
}

fn is_of_name(character: char) -> bool {
    character.is_ascii_lowercase() || character.is_ascii_digit() || character == '_'
}

fn is_test_name(word: &str) -> bool {
    word.chars().all(is_of_name) && word.matches('_').count() >= MIN_UNDERSCORES
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::{file, messages};

    #[test]
    fn names_of_tests_that_do_not_exist_are_found() {
        let files = [
            file(
                "crates/x/tests/x.rs",
                "#[test]\nfn a_test_that_is_there() {}\nasync fn another_one_of_the_tests() {}",
            ),
            file("clients/test_x.py", "def test_a_client_of_ours(server):\n    pass"),
            file(
                "docs/x.md",
                "`a_test_that_is_there`, `another_one_of_the_tests`, `test_a_client_of_ours`, `max_tokens`",
            ),
            file("docs/y.md", "fine\n| x | `a_test_that_was_renamed_away` |"),
        ];
        assert_eq!(messages(check(&files)), ["docs/y.md:2: no source has the name a_test_that_was_renamed_away"]);
    }
}
