//! Relative links in documents lead somewhere.

use super::Finding;
use crate::workspace::TextFile;

/// Checks the targets of `[text](target)` in every Markdown file.
pub(super) fn check(files: &[TextFile], paths: &[String]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in files.iter().filter(|file| file.path.ends_with(".md")) {
        for (number, target) in link_targets(&file.text) {
            let target = target.split('#').next().unwrap_or_default();
            if target.is_empty() || target.contains(':') {
                continue; // A place in this file, or an address.
            }
            let folder = file.path.rsplit_once('/').map_or("", |(folder, _)| folder);
            let found = resolve(folder, target).is_some_and(|path| {
                let prefix = format!("{path}/");
                path.is_empty() || paths.iter().any(|known| *known == path || known.starts_with(&prefix))
            });
            if !found {
                findings.push(Finding::error(format!("{}:{number}", file.path), format!("broken link to {target}")));
            }
        }
    }
    findings
}

fn link_targets(text: &str) -> Vec<(usize, &str)> {
    let mut in_code = false;
    let mut targets = Vec::new();
    for (i, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        }
        if in_code {
            continue;
        }
        for (at, _) in line.match_indices("](") {
            if let Some(len) = line[at + 2..].find(')') {
                targets.push((i + 1, &line[at + 2..][..len]));
            }
        }
    }
    targets
}

/// `target` as seen from `folder`, from the root; `None` for a path out of the checkout.
fn resolve(folder: &str, target: &str) -> Option<String> {
    let mut parts: Vec<&str> = folder.split('/').filter(|part| !part.is_empty()).collect();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::{file, messages};

    #[test]
    fn broken_links_are_found() {
        let paths = ["README.md", "docs/names.md", "crates/ops/src/lib.rs"].map(str::to_owned);
        let check = |path: &str, text: &str| messages(check(&[file(path, text)], &paths));
        assert_eq!(check("README.md", "[a](docs/names.md#x) [b](docs) [c](https://example.org) [d](#here)"), [""; 0]);
        assert_eq!(check("docs/names.md", "[up](../crates/ops/src/lib.rs)\n```\n[code](nowhere)\n```"), [""; 0]);
        assert!(check("docs/names.md", "x\n[gone](formats.md)")[0].starts_with("docs/names.md:2: broken link"));
        assert!(check("README.md", "[out](../secret)")[0].contains("broken"));
    }
}
