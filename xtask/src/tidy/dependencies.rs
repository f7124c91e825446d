//! Every dependency has a comment in the root manifest that says what it spares us, and versions stand there only.

use super::Finding;
use crate::workspace::TextFile;

/// Checks the root manifest and those of the crates.
pub(super) fn check(files: &[TextFile]) -> Vec<Finding> {
    files
        .iter()
        .filter_map(|file| match file.path.as_str() {
            "Cargo.toml" => Some(check_root(&file.text)),
            path if path.ends_with("/Cargo.toml") && !path.starts_with("fuzz/") => Some(check_member(path, &file.text)),
            _ => None,
        })
        .flatten()
        .collect()
}

/// Lines of the sections whose name ends in `dependencies`: number, previous line, line.
fn dependency_lines(text: &str) -> Vec<(usize, &str, &str)> {
    let mut inside = false;
    let mut previous = "";
    let mut found = Vec::new();
    for (number, line) in text.lines().enumerate().map(|(i, line)| (i + 1, line.trim())) {
        if line.starts_with('[') {
            inside = line.trim_matches(['[', ']']).ends_with("dependencies");
        } else if inside && !line.is_empty() && !line.starts_with('#') && line.contains('=') {
            found.push((number, previous, line));
        }
        previous = line;
    }
    found
}

fn check_root(text: &str) -> Vec<Finding> {
    dependency_lines(text)
        .into_iter()
        .filter(|(_, previous, line)| {
            !line.starts_with("moellon-") && !previous.starts_with('#') && !line.contains(" # ")
        })
        .map(|(number, _, line)| {
            Finding::error(format!("Cargo.toml:{number}"), format!("no comment says what this spares us: {line}"))
        })
        .collect()
}

fn check_member(path: &str, text: &str) -> Vec<Finding> {
    dependency_lines(text)
        .into_iter()
        // A crate may need itself, with features for tests.
        .filter(|(_, _, line)| !line.contains("workspace = true") && !line.contains("path = \".\""))
        .map(|(number, _, line)| {
            Finding::error(format!("{path}:{number}"), format!("versions stand in the root manifest: {line}"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::{file, messages};

    #[test]
    fn dependencies_without_a_comment_are_found() {
        let text = "[workspace.dependencies]\nmoellon-x = { path = \"x\" }\n# JSON.\nserde_json = \"1\"\nserde = \"1\"\n\
                    half = \"2\" # f16 types\n\n[profile.dev]\nopt-level = 1\n";
        let found = messages(check(&[file("Cargo.toml", text)]));
        assert!(found.len() == 1 && found[0].starts_with("Cargo.toml:5"), "{found:?}");
    }

    #[test]
    fn versions_in_member_manifests_are_found() {
        let text = "[package]\nname = \"x\"\n[dependencies]\nserde.workspace = true\nhalf = { workspace = true, features = [] }\n\
                    [target.'cfg(unix)'.dev-dependencies]\nlibc = \"0.2\"\n\
                    x = { path = \".\", features = [\"testing\"] }\n";
        let found = messages(check(&[file("crates/x/Cargo.toml", text)]));
        assert!(found.len() == 1 && found[0].starts_with("crates/x/Cargo.toml:7"), "{found:?}");
    }
}
