//! Tables of measurements in documents are generated from receipts; nobody edits them by hand.
//!
//! A document marks a table with `<!-- table:NAME -->` and `<!-- /table -->`, each on a line of its own. A receipt
//! (`receipts/*.json`) gives rows to tables in its member `tables`: `{"NAME": [{"column": value, ..}, ..]}`. Rows stand
//! in the order of the receipts' file names; columns in the order in which rows first name them; the last column names
//! the receipt. `<!-- table:NAME | column=value | .. -->` shows the rows with those values alone; `receipt` is a column too.
//!
//! README.md makes no claim of its own: outside of such tables and of code no number may stand there with a unit that is
//! measured ([`MEASURED_UNITS`]).

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
        if path == "README.md" {
            check_claims(&updated)?;
        }
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

/// Units of numbers that only a receipt can state.
const MEASURED_UNITS: [&str; 8] = ["tok/s", "GB/s", "MB/s", "%", "ms", "us", "µs", "x"];

/// Refuses numbers with a measured unit outside of generated tables and code.
fn check_claims(text: &str) -> Result<()> {
    let (mut in_code, mut in_table) = (false, false);
    for (number, line) in text.lines().enumerate() {
        let mark = line.trim();
        match mark {
            _ if mark.starts_with("```") => in_code = !in_code,
            _ if mark.starts_with("<!-- table:") => in_table = true,
            "<!-- /table -->" => in_table = false,
            _ if in_code || in_table => {}
            _ => {
                if let Some(claim) = claim(line) {
                    bail!("line {}: {claim:?} is a measured number outside of a generated table", number + 1);
                }
            }
        }
    }
    Ok(())
}

/// The first number of a line that has a measured unit, in the same word or the next.
fn claim(line: &str) -> Option<String> {
    let words: Vec<&str> = line.split_whitespace().map(|w| w.trim_matches(|c: char| ",.;:()*".contains(c))).collect();
    let is_number = |word: &str| !word.is_empty() && word.chars().all(|c| c.is_ascii_digit() || c == '.' || c == ',');
    words.iter().enumerate().find_map(|(i, word)| {
        let split = word.find(|c: char| !(c.is_ascii_digit() || c == '.' || c == ',')).unwrap_or(word.len());
        let (number, unit) = word.split_at(split);
        let next = words.get(i + 1).copied().unwrap_or_default();
        let joined = is_number(number) && MEASURED_UNITS.contains(&unit);
        let apart = is_number(word) && next != "x" && MEASURED_UNITS.contains(&next);
        (joined || apart).then(|| if joined { (*word).to_owned() } else { format!("{word} {next}") })
    })
}

fn cell(value: &Value) -> String {
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    text.replace('|', "\\|").replace('\n', " ")
}

/// The rows of a mark's table: all, or those with the values that it names.
fn select<'a>(mark: &str, tables: &'a Tables) -> Result<Vec<&'a Row>> {
    let mut parts = mark.split(" | ").map(str::trim);
    let name = parts.next().unwrap_or_default();
    let rows = tables.get(name).with_context(|| format!("no receipt has a row for table {name}"))?;
    let wanted = parts
        .map(|part| part.split_once('=').with_context(|| format!("table {name}: {part:?} is not column=value")))
        .collect::<Result<Vec<_>>>()?;
    let has = |row: &&Row, (column, value): &(&str, &str)| match *column {
        "receipt" => row.receipt == *value,
        _ => row.cells.iter().any(|(c, v)| c == column && v == value),
    };
    let rows: Vec<&Row> = rows.iter().filter(|row| wanted.iter().all(|w| has(row, w))).collect();
    ensure!(!rows.is_empty(), "no row of table {mark}");
    Ok(rows)
}

fn render(rows: &[&Row]) -> String {
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
                let rows = select(name, tables)?;
                out.push_str(line);
                out.push_str(&render(&rows));
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

    #[test]
    fn a_mark_can_choose_rows() {
        let (text, _) = fill_tables("<!-- table:decode | model=tiny -->\n<!-- /table -->\n", &tables()).unwrap();
        assert_eq!(text.lines().count(), 5, "{text}");
        assert!(text.contains("| tiny | 41.5 | 2026-01-a |"));
        let error = fill_tables("<!-- table:decode | model=none -->\n<!-- /table -->\n", &tables()).unwrap_err();
        assert_eq!(error.to_string(), "no row of table decode | model=none");
    }

    #[test]
    fn claims_stand_in_tables() {
        assert_eq!(claim("decodes at 62 tok/s, and more"), Some("62 tok/s".to_owned()));
        assert_eq!(claim("is 1.6x as fast"), Some("1.6x".to_owned()));
        assert_eq!(claim("**28 %** of the bandwidth"), Some("28 %".to_owned()));
        for fine in ["OpenAI-python 2 and 3", "affine with 1 to 6 and 8 bits", "a model of 106 GB", "MLX 0.32.4 x 3"] {
            assert_eq!(claim(fine), None, "{fine}");
        }
        let text = "a\n```\n5 ms\n```\n<!-- table:t -->\n| 5 ms |\n<!-- /table -->\n";
        assert!(check_claims(text).is_ok());
        let error = check_claims("one\ntakes 5 ms\n").unwrap_err().to_string();
        assert_eq!(error, "line 2: \"5 ms\" is a measured number outside of a generated table");
    }
}
