//! Files over 800 lines say at their top why they are one piece; crates over 8,000 lines are worth a look.

use super::Finding;
use crate::workspace::{TextFile, crate_of};
use std::collections::BTreeMap;

const MAX_FILE_LINES: usize = 800;
const MAX_CRATE_LINES: usize = 8_000;
/// The words that the module doc of a long file must contain, with the reason after them.
const EXCUSE: &str = "one piece";

/// Checks Rust files and crates.
pub(super) fn check(files: &[TextFile]) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut crates: BTreeMap<&str, usize> = BTreeMap::new();
    for file in files.iter().filter(|f| f.path.ends_with(".rs")) {
        let num_lines = file.text.lines().count();
        if let Some(folder) = crate_of(&file.path) {
            *crates.entry(folder).or_default() += num_lines;
        }
        let header = file.text.lines().take_while(|l| l.starts_with("//!") || l.is_empty());
        if num_lines > MAX_FILE_LINES && !header.into_iter().any(|l| l.to_lowercase().contains(EXCUSE)) {
            findings.push(Finding::error(
                &file.path,
                format!("{num_lines} lines, and its module doc does not say why it is \"{EXCUSE}\""),
            ));
        }
    }
    for (folder, num_lines) in crates.into_iter().filter(|(_, n)| *n > MAX_CRATE_LINES) {
        findings.push(Finding::Warning(format!("crates/{folder}: {num_lines} lines, more than {MAX_CRATE_LINES}")));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::{file, messages};

    #[test]
    fn long_files_and_large_crates_are_found() {
        let long = "fn f() {}\n".repeat(801);
        assert!(messages(check(&[file("crates/a/src/x.rs", &long)]))[0].contains("801 lines"));
        let excused = format!("//! Tables. One piece: rows are compared with each other.\n{long}");
        assert_eq!(check(&[file("crates/a/src/x.rs", &excused)]), []);
        assert_eq!(check(&[file("crates/a/src/x.rs", &"\n".repeat(800))]), []);
        let crate_files: Vec<TextFile> =
            (0..11).map(|i| file(&format!("crates/a/src/{i}.rs"), &"//\n".repeat(750))).collect();
        let found = check(&crate_files);
        assert!(matches!(&found[..], [Finding::Warning(message)] if message.contains("8250 lines")), "{found:?}");
    }
}
