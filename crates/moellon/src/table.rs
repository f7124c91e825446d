//! Plain aligned tables and numbers for people.

/// Prints rows of cells, the first column left and the others right aligned.
pub fn print(header: &[&str], rows: &[Vec<String>]) {
    let columns = header.len();
    let width =
        |c: usize| rows.iter().map(|r| r[c].chars().count()).chain([header[c].chars().count()]).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |cells: Vec<&str>| {
        let mut text = String::new();
        for (c, cell) in cells.into_iter().enumerate() {
            let pad = " ".repeat(widths[c] - cell.chars().count());
            match c {
                0 => text.push_str(&format!("{cell}{pad}")),
                _ => text.push_str(&format!("  {pad}{cell}")),
            }
        }
        println!("{}", text.trim_end());
    };
    line(header.to_vec());
    rows.iter().for_each(|row| line(row.iter().map(String::as_str).collect()));
}

/// `12.3 GB`, decimal, as bandwidths are.
pub fn bytes(count: f64) -> String {
    let (value, unit) = match count {
        x if x >= 1e12 => (x / 1e12, "TB"),
        x if x >= 1e9 => (x / 1e9, "GB"),
        x if x >= 1e6 => (x / 1e6, "MB"),
        x if x >= 1e3 => (x / 1e3, "kB"),
        x => return format!("{x:.0} B"),
    };
    format!("{value:.2} {unit}")
}

/// `743.38 B` parameters.
pub fn count(parameters: f64) -> String {
    match parameters {
        x if x >= 1e9 => format!("{:.2} B", x / 1e9),
        x if x >= 1e6 => format!("{:.2} M", x / 1e6),
        x if x >= 1e3 => format!("{:.1} k", x / 1e3),
        x => format!("{x:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::{bytes, count};

    #[test]
    fn units_are_decimal() {
        assert_eq!([bytes(999.0), bytes(20.08e9), bytes(1.2e12)], ["999 B", "20.08 GB", "1.20 TB"]);
        assert_eq!([count(753_329_921_024.0), count(11.3e6), count(12.0)], ["753.33 B", "11.30 M", "12"]);
    }
}
