//! One concept, one file, one name: an op of `crates/ops/src/ops/` has a file of its name in every back end, or a row
//! in that crate's OPS.md (`| op | where it lives, or why it is not here |`).

use super::Finding;
use crate::workspace::{TextFile, crate_of};
use std::collections::BTreeSet;

const OPS_FOLDER: &str = "crates/ops/src/ops/";

/// Checks every back end.
pub(super) fn check(files: &[TextFile]) -> Vec<Finding> {
    let ops = operations(files);
    let backends: BTreeSet<&str> =
        files.iter().filter_map(|f| crate_of(&f.path)).filter(|folder| folder.starts_with("backend-")).collect();
    backends.into_iter().flat_map(|backend| check_backend(backend, &ops, files)).collect()
}

/// Modules of the ops folder that hold an operation: those with conformance cases.
fn operations(files: &[TextFile]) -> BTreeSet<&str> {
    files
        .iter()
        .filter(|file| file.text.contains("fn cases()"))
        .filter_map(|file| file.path.strip_prefix(OPS_FOLDER)?.strip_suffix(".rs"))
        .filter(|name| *name != "mod" && !name.contains('/'))
        .collect()
}

fn check_backend(backend: &str, ops: &BTreeSet<&str>, files: &[TextFile]) -> Vec<Finding> {
    let source = format!("crates/{backend}/src/");
    // `src/<op>.rs` at any depth, or `src/**/<op>/..`.
    let has_file = |op: &str| {
        let inside = files.iter().filter_map(|file| file.path.strip_prefix(&source));
        inside.flat_map(|path| path.split('/')).any(|part| part.strip_suffix(".rs").unwrap_or(part) == op)
    };
    let declaration = format!("crates/{backend}/OPS.md");
    let rows =
        files.iter().find(|file| file.path == declaration).map(|file| table_rows(&file.text)).unwrap_or_default();
    let mut findings = Vec::new();
    for op in ops {
        let row = rows.iter().find(|(name, _)| name == op);
        match (has_file(op), row) {
            (true, None) => {}
            (true, Some(_)) => {
                findings.push(Finding::error(&declaration, format!("{op} has a file, the row is stale")))
            }
            (false, Some((_, reason))) if !reason.is_empty() => {}
            (false, Some(_)) => findings.push(Finding::error(&declaration, format!("the row of {op} says nothing"))),
            (false, None) => {
                findings
                    .push(Finding::error(&source, format!("no file {op}.rs, and no row for {op} in {declaration}")));
            }
        }
    }
    for (name, _) in rows.iter().filter(|(name, _)| !ops.contains(name.as_str())) {
        findings.push(Finding::error(&declaration, format!("{name} is not an operation")));
    }
    findings
}

/// The first two cells of every table row after its header.
fn table_rows(text: &str) -> Vec<(String, String)> {
    let mut rows = Vec::new();
    let mut in_body = false;
    for line in text.lines() {
        let Some(inner) = line.trim().strip_prefix('|') else {
            in_body = false;
            continue;
        };
        let mut cells = inner.split('|').map(|cell| cell.trim().trim_matches('`').to_owned());
        let (name, reason) = (cells.next().unwrap_or_default(), cells.next().unwrap_or_default());
        if name.starts_with("--") || name.starts_with(":-") {
            in_body = true;
        } else if in_body {
            rows.push((name, reason));
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::{file, messages};

    fn ops() -> Vec<TextFile> {
        vec![
            file("crates/ops/src/ops/mod.rs", "mod add; mod activation; fn cases() {}"),
            file("crates/ops/src/ops/add.rs", "pub(crate) fn cases() {}"),
            file("crates/ops/src/ops/route.rs", "pub(crate) fn cases() {}"),
            file("crates/ops/src/ops/activation.rs", "pub enum Activation {}"),
        ]
    }

    #[test]
    fn a_missing_operation_is_found() {
        let mut files = ops();
        files.push(file("crates/backend-x/src/add.rs", ""));
        let found = messages(check(&files));
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].contains("no file route.rs"));
        files.push(file("crates/backend-x/src/simd/route/tests.rs", ""));
        assert_eq!(messages(check(&files)), [""; 0]);
    }

    #[test]
    fn a_row_with_a_reason_stands_for_a_file() {
        let with_row = |row: &str| {
            let mut files = ops();
            files.push(file("crates/backend-x/src/add.rs", ""));
            files.push(file("crates/backend-x/OPS.md", &format!("| op | where |\n|---|---|\n{row}\n")));
            messages(check(&files))
        };
        assert_eq!(with_row("| `route` | in `small.rs` |"), [""; 0]);
        assert!(with_row("| `route` | |")[0].contains("says nothing"));
        assert!(with_row("| `route` | x |\n| add | y |")[0].contains("stale"));
        assert!(with_row("| `route` | x |\n| fly | y |")[0].contains("not an operation"));
    }
}
