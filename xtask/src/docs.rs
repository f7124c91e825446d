//! Tables of measurements in documents are generated from receipts; nobody edits them by hand.
//!
//! A document marks a table with `<!-- table:NAME -->` and `<!-- /table -->`, each on a line of its own. A receipt
//! (`receipts/*.json`) gives rows to tables in its member `tables`: `{"NAME": [{"column": value, ..}, ..]}`. Rows stand
//! in the order of the receipts' file names; columns in the order in which rows first name them; the last column names
//! the receipt.

use crate::workspace;
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Write as _;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Verify,
    Write,
}

/// One row: column and text, then the receipt's name.
#[derive(Debug, Clone)]
struct Row {
    cells: Vec<(String, String)>,
    receipt: String,
}

type Tables = BTreeMap<String, Vec<Row>>;

/// Compares (or rewrites) the tables of README.md, CHANGELOG.md and docs/.
pub(crate) fn run(mode: Mode) -> Result<()> {
    let paths = workspace::paths()?;
    let mut receipts = Vec::new();
    for path in paths.iter().filter(|p| p.starts_with("receipts/") && p.ends_with(".json")) {
        let text = std::fs::read_to_string(workspace::root().join(path)).with_context(|| path.clone())?;
        let stem = path.trim_start_matches("receipts/").trim_end_matches(".json");
        receipts.push((stem.to_owned(), serde_json::from_str(&text).with_context(|| path.clone())?));
    }
    let tables = collect_tables(&receipts)?;
    let mut num_tables = 0;
    let mut stale = Vec::new();
    for path in paths.iter().filter(|p| p.ends_with(".md") && !p.starts_with("models/")) {
        let file = workspace::root().join(path);
        let text = std::fs::read_to_string(&file).with_context(|| path.clone())?;
        let (updated, count) = fill_tables(&text, &tables).with_context(|| path.clone())?;
        num_tables += count;
        if updated != text {
            match mode {
                Mode::Verify => stale.push(path.clone()),
                Mode::Write => std::fs::write(&file, updated).with_context(|| path.clone())?,
            }
        }
    }
    if !stale.is_empty() {
        bail!("tables are not what the receipts say in {} (cargo xtask docs --write)", stale.join(", "));
    }
    println!("docs: {num_tables} tables from {} receipts", receipts.len());
    Ok(())
}

fn collect_tables(receipts: &[(String, Value)]) -> Result<Tables> {
    let mut tables = Tables::new();
    for (receipt, value) in receipts {
        let Some(given) = value.get("tables") else { continue };
        let given = given.as_object().with_context(|| format!("{receipt}: tables is not an object"))?;
        for (name, rows) in given {
            let rows = rows.as_array().with_context(|| format!("{receipt}: tables.{name} is not an array"))?;
            for row in rows {
                let row =
                    row.as_object().with_context(|| format!("{receipt}: tables.{name} has a row that is no object"))?;
                let cells = row.iter().map(|(column, value)| (column.clone(), cell(value))).collect();
                tables.entry(name.clone()).or_default().push(Row { cells, receipt: receipt.clone() });
            }
        }
    }
    Ok(tables)
}

fn cell(value: &Value) -> String {
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    text.replace('|', "\\|").replace('\n', " ")
}

fn render(rows: &[Row]) -> String {
    let mut columns: Vec<&str> = Vec::new();
    for (column, _) in rows.iter().flat_map(|row| &row.cells) {
        if !columns.contains(&column.as_str()) {
            columns.push(column);
        }
    }
    let mut text = format!("| {} | receipt |\n|{}\n", columns.join(" | "), "---|".repeat(columns.len() + 1));
    for row in rows {
        let value = |column: &str| row.cells.iter().find(|(name, _)| name == column).map_or("", |(_, text)| text);
        let values: Vec<&str> = columns.iter().map(|column| value(column)).collect();
        writeln!(text, "| {} | {} |", values.join(" | "), row.receipt).expect("a String takes all text");
    }
    text
}

/// The document with every table replaced, and how many there are. Marks inside code blocks are text.
fn fill_tables(text: &str, tables: &Tables) -> Result<(String, usize)> {
    let mut out = String::with_capacity(text.len());
    let mut open: Option<&str> = None;
    let mut in_code = false;
    let mut count = 0;
    for line in text.split_inclusive('\n') {
        let mark = line.trim();
        if mark.starts_with("```") && open.is_none() {
            in_code = !in_code;
        }
        let name = mark.strip_prefix("<!-- table:").and_then(|rest| rest.strip_suffix("-->")).map(str::trim);
        match (open, name) {
            _ if in_code => out.push_str(line),
            (None, Some(name)) => {
                let rows = tables.get(name).with_context(|| format!("no receipt has a row for table {name}"))?;
                out.push_str(line);
                out.push_str(&render(rows));
                (open, count) = (Some(name), count + 1);
            }
            (Some(name), Some(inner)) => bail!("table {inner} begins inside table {name}"),
            (Some(_), None) if mark == "<!-- /table -->" => {
                out.push_str(line);
                open = None;
            }
            // What stood between the marks.
            (Some(_), None) => {}
            (None, None) => {
                ensure!(mark != "<!-- /table -->", "a table ends that did not begin");
                out.push_str(line);
            }
        }
    }
    ensure!(open.is_none(), "table {} does not end", open.unwrap_or_default());
    Ok((out, count))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn tables() -> Tables {
        collect_tables(&[
            ("2026-01-a".to_owned(), json!({"tables": {"decode": [{"model": "tiny", "tok/s": 41.5}]}})),
            ("2026-01-b".to_owned(), json!({"tables": {"decode": [{"model": "a|b", "GB/s": 12}], "other": []}})),
            ("2026-01-c".to_owned(), json!({"no": "tables"})),
        ])
        .unwrap()
    }

    #[test]
    fn a_stale_table_is_replaced_and_a_current_one_stays() {
        let stale = "before\n<!-- table:decode -->\n| hand | made |\n<!-- /table -->\nafter\n";
        let (updated, count) = fill_tables(stale, &tables()).unwrap();
        assert_eq!(count, 1);
        assert_eq!(
            updated,
            "before\n<!-- table:decode -->\n| model | tok/s | GB/s | receipt |\n|---|---|---|---|\n\
             | tiny | 41.5 |  | 2026-01-a |\n| a\\|b |  | 12 | 2026-01-b |\n<!-- /table -->\nafter\n"
        );
        assert_eq!(fill_tables(&updated, &tables()).unwrap().0, updated);
    }

    #[test]
    fn wrong_marks_are_errors() {
        let error = |text: &str| fill_tables(text, &tables()).unwrap_err().to_string();
        assert_eq!(error("<!-- table:nothing -->\n<!-- /table -->\n"), "no receipt has a row for table nothing");
        assert_eq!(error("<!-- table:decode -->\n"), "table decode does not end");
        assert_eq!(error("<!-- /table -->\n"), "a table ends that did not begin");
        assert_eq!(
            error("<!-- table:decode -->\n<!-- table:decode -->\n<!-- /table -->\n"),
            "table decode begins inside table decode"
        );
        assert!(collect_tables(&[("r".to_owned(), json!({"tables": {"t": 1}}))]).is_err());
    }

    #[test]
    fn text_without_tables_is_untouched() {
        let text = "# Title\n\n```\n<!-- table:example -->\n<!-- /table -->\n```\nno newline at the end";
        assert_eq!(fill_tables(text, &Tables::new()).unwrap(), (text.to_owned(), 0));
    }
}
