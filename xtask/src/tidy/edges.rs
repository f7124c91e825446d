//! Arrows between crates point down only. The floors are those of ARCHITECTURE.md.

use super::Finding;
use crate::workspace;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::process::Command;

/// Crate (without the prefix `moellon-`) and floor. Every `backend-*` stands on [`BACKEND_FLOOR`].
const FLOORS: [(&str, u32); 10] = [
    ("tensor", 1),
    ("checkpoint", 2),
    ("text", 2),
    ("ops", 2),
    ("model", 3),
    ("engine", 4),
    ("serve", 5),
    ("lab", 5),
    ("surgery", 5),
    ("moellon", 6),
];
const BACKEND_FLOOR: u32 = 3;

/// A package of the workspace and what it needs of the workspace.
#[derive(Debug, Clone)]
pub(super) struct Package {
    name: String,
    /// Name, and whether it is needed for tests only.
    needs: Vec<(String, bool)>,
}

/// Asks cargo.
pub(super) fn workspace_packages() -> Result<Vec<Package>> {
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["metadata", "--format-version", "1", "--no-deps"])
        .current_dir(workspace::root())
        .output()
        .context("cargo metadata")?;
    ensure!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr).trim());
    packages(&serde_json::from_slice(&output.stdout).context("cargo metadata")?)
}

fn packages(metadata: &Value) -> Result<Vec<Package>> {
    let list = |value: &Value, key: &str| value[key].as_array().cloned().with_context(|| format!("no list {key}"));
    let name = |value: &Value| value["name"].as_str().map(str::to_owned).context("no name");
    list(metadata, "packages")?
        .iter()
        .map(|package| {
            let needs = list(package, "dependencies")?
                .iter()
                // Crates of the workspace are those with a path.
                .filter(|dependency| dependency["path"].is_string())
                .map(|dependency| Ok((name(dependency)?, dependency["kind"] == "dev")))
                .collect::<Result<_>>()?;
            Ok(Package { name: name(package)?, needs })
        })
        .collect()
}

fn folder(package: &str) -> &str {
    package.strip_prefix("moellon-").unwrap_or(package)
}

fn floor(package: &str) -> Option<u32> {
    let folder = folder(package);
    if folder.starts_with("backend-") {
        return Some(BACKEND_FLOOR);
    }
    FLOORS.iter().find(|(name, _)| *name == folder).map(|(_, floor)| *floor)
}

/// Checks every edge.
pub(super) fn check(packages: &[Package]) -> Vec<Finding> {
    packages
        .iter()
        .flat_map(|package| package.needs.iter().filter_map(|need| check_edge(&package.name, need)))
        .collect()
}

fn check_edge(package: &str, (need, for_tests): &(String, bool)) -> Option<Finding> {
    let fault = |message: &str| Some(Finding::error(format!("{package} -> {need}"), message));
    if package == "xtask" {
        return fault("xtask checks the crates and may not depend on them");
    }
    let Some(own) = floor(package) else { return fault("the first crate has no floor (xtask/src/tidy/edges.rs)") };
    let Some(other) = floor(need) else { return fault("the second crate has no floor (xtask/src/tidy/edges.rs)") };
    if *for_tests {
        // Tests may use a neighbour (a model's test runs on a back end), except on floor 5, and nothing above.
        return match own.cmp(&other) {
            std::cmp::Ordering::Less => fault(&format!("floor {own} tests with floor {other}: arrows point down")),
            std::cmp::Ordering::Equal if own == 5 => fault("serve, lab and surgery never import one another"),
            _ => None,
        };
    }
    if own <= other {
        return fault(&format!("floor {own} depends on floor {other}: arrows point down"));
    }
    let is_backend = |name: &str| folder(name).starts_with("backend-");
    if is_backend(need) && folder(package) != "moellon" {
        return fault("only the binary names a back end");
    }
    if is_backend(package) && !matches!(folder(need), "tensor" | "ops") {
        return fault("a back end knows ops and tensor only");
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::messages;
    use serde_json::json;

    fn edge(from: &str, to: &str, for_tests: bool) -> Vec<String> {
        messages(check(&[Package { name: from.to_owned(), needs: vec![(to.to_owned(), for_tests)] }]))
    }

    #[test]
    fn arrows_that_do_not_point_down_are_found() {
        assert!(edge("moellon-tensor", "moellon-ops", false)[0].contains("floor 1 depends on floor 2"));
        assert!(edge("moellon-model", "moellon-backend-cpu", false)[0].contains("floor 3 depends on floor 3"));
        assert!(edge("moellon-text", "moellon-checkpoint", false)[0].contains("arrows point down"));
        assert!(edge("moellon-serve", "moellon-lab", false)[0].contains("arrows point down"));
        assert!(edge("moellon-engine", "moellon-backend-cpu", false)[0].contains("only the binary"));
        assert!(edge("moellon-backend-cuda", "moellon-checkpoint", false)[0].contains("ops and tensor only"));
        assert!(edge("moellon-new", "moellon-tensor", false)[0].contains("no floor"));
        assert!(edge("moellon-model", "moellon-new", false)[0].contains("no floor"));
        assert!(edge("xtask", "moellon-tensor", false)[0].contains("may not depend"));
        assert_eq!(edge("moellon-model", "moellon-ops", false), [""; 0]);
        assert_eq!(edge("moellon", "moellon-backend-cpu", false), [""; 0]);
    }

    #[test]
    fn tests_may_use_neighbours_but_nothing_above() {
        assert_eq!(edge("moellon-model", "moellon-backend-cpu", true), [""; 0]);
        assert!(edge("moellon-model", "moellon-engine", true)[0].contains("floor 3 tests with floor 4"));
        assert!(edge("moellon-serve", "moellon-surgery", true)[0].contains("never import"));
    }

    #[test]
    fn cargo_s_answer_is_understood() {
        let metadata = json!({"packages": [{"name": "moellon-ops", "dependencies": [
            {"name": "moellon-tensor", "path": "/x/crates/tensor", "kind": null},
            {"name": "moellon-backend-cpu", "path": "/x/crates/backend-cpu", "kind": "dev"},
            {"name": "thiserror", "kind": null},
        ]}]});
        let packages = packages(&metadata).unwrap();
        assert_eq!(packages.len(), 1);
        let needs = [("moellon-tensor".to_owned(), false), ("moellon-backend-cpu".to_owned(), true)];
        assert_eq!(packages[0].needs, needs);
        assert!(super::packages(&json!({})).is_err());
    }
}
