//! Words that may not stand in the files: unfinished work, paths of one machine, and, below the binary, printing and
//! the environment.
//!
//! The words are written in two halves here, or this file would find itself.

use super::{Finding, code_lines, shipped_code};
use crate::workspace::{TextFile, crate_of};

/// Text and why it is not allowed, in every file.
const NOWHERE: [(&str, &str); 4] = [
    (concat!("todo", "!("), "unfinished work"),
    (concat!("unimplemented", "!("), "unfinished work"),
    (concat!("FIX", "ME"), "unfinished work"),
    (concat!("XX", "X"), "unfinished work"),
];

/// Paths outside of the checkout.
const FOREIGN_PATHS: [&str; 2] = [concat!("/wo", "rk/"), concat!("../sha", "red/")];

/// Text that may not stand in a library (any crate but the binary), outside of tests.
const NOT_IN_LIBRARIES: [(&str, &str); 8] = [
    ("println!", "libraries use tracing"),
    ("eprintln!", "libraries use tracing"),
    ("print!", "libraries use tracing"),
    ("eprint!", "libraries use tracing"),
    ("dbg!", "libraries use tracing"),
    ("env::var", "only the binary reads the environment; settings arrive as values"),
    ("env::var_os", "only the binary reads the environment; settings arrive as values"),
    ("env::vars", "only the binary reads the environment; settings arrive as values"),
];

/// Checks every file.
pub(super) fn check(files: &[TextFile]) -> Vec<Finding> {
    files.iter().flat_map(check_file).collect()
}

fn check_file(file: &TextFile) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut fault = |line: usize, word: &str, why: &str| {
        findings.push(Finding::error(format!("{}:{line}", file.path), format!("{word:?}: {why}")));
    };
    for (number, line) in file.text.lines().enumerate().map(|(i, line)| (i + 1, line)) {
        for (word, why) in NOWHERE {
            if contains_word(line, word) {
                fault(number, word, why);
            }
        }
        for path in FOREIGN_PATHS {
            if contains_word(line, path) {
                fault(number, path, "a path outside of the checkout");
            }
        }
        let unowned = concat!("TO", "DO");
        if contains_word(line, unowned) && !line.contains(concat!("TO", "DO(")) {
            fault(number, unowned, "say who and why, and open an issue");
        }
    }
    let is_library_source = crate_of(&file.path).is_some_and(|folder| folder != "moellon")
        && file.path.contains("/src/")
        && file.path.ends_with(".rs")
        && !file.path.ends_with("/tests.rs")
        && !file.path.contains("/tests/");
    if is_library_source {
        for (number, line) in code_lines(shipped_code(&file.text)) {
            for (word, why) in NOT_IN_LIBRARIES {
                if contains_word(line, word) {
                    fault(number, word, why);
                }
            }
        }
    }
    findings
}

/// Whether `word` stands in `line` and is not a part of a longer word.
fn contains_word(line: &str, word: &str) -> bool {
    let part_of_word = |c: char| c.is_alphanumeric() || c == '_';
    let open_start = !word.starts_with(part_of_word) && !word.starts_with('/');
    let open_end = !word.ends_with(part_of_word);
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back().is_some_and(part_of_word);
        let after = line[at + word.len()..].chars().next().is_some_and(part_of_word);
        (open_start || !before) && (open_end || !after)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::{file, messages};

    #[test]
    fn every_word_is_found_and_only_as_a_word() {
        for (word, _) in NOWHERE {
            let found = messages(check(&[file("docs/a.md", &format!("fine\nbefore {word}) after"))]));
            assert!(found.len() == 1 && found[0].starts_with("docs/a.md:2"), "{word}: {found:?}");
        }
        let inside = format!("mktemp {}X and my{}", concat!("XX", "X"), concat!("FIX", "MEUP"));
        assert_eq!(check(&[file("a.sh", &inside)]), []);
        assert_eq!(check(&[file("a.rs", &format!("// {}(ada): reason (issue 12)", concat!("TO", "DO")))]), []);
        assert!(messages(check(&[file("a.rs", &format!("// {} later", concat!("TO", "DO")))]))[0].contains("who"));
    }

    #[test]
    fn foreign_paths_are_found() {
        for path in FOREIGN_PATHS {
            assert_eq!(check(&[file("a.toml", &format!("path = \"{path}x\""))]).len(), 1, "{path}");
        }
        assert_eq!(check(&[file("a.md", &format!("home{}x is another path", FOREIGN_PATHS[0]))]), []);
    }

    #[test]
    fn libraries_neither_print_nor_read_the_environment() {
        for (word, _) in NOT_IN_LIBRARIES {
            let code = format!("fn f() {{ std::{word}(\"x\") }}\n");
            assert_eq!(check(&[file("crates/ops/src/x.rs", &code)]).len(), 1, "{word}");
            assert_eq!(check(&[file("crates/moellon/src/x.rs", &code)]), [], "{word}");
            assert_eq!(check(&[file("crates/ops/tests/x.rs", &code)]), [], "{word}");
            let in_comment = format!("/// see {word}(\n\n#[cfg(test)]\nmod tests {{ fn f() {{ {word}() }} }}");
            assert_eq!(check(&[file("crates/ops/src/x.rs", &in_comment)]), [], "{word}");
        }
    }
}
