//! The checkout: where it is and which files belong to it.

use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The root of the workspace.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask/ lies in the workspace root")
}

/// A file of the project, by its path from the root with forward slashes.
#[derive(Debug, Clone)]
pub(crate) struct TextFile {
    pub(crate) path: String,
    pub(crate) text: String,
}

/// Paths that git tracks or would add, sorted; files that `.gitignore` names and deleted files are left out.
pub(crate) fn paths() -> Result<Vec<String>> {
    let output = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output()
        .context("git ls-files (tidy looks at the files of a git checkout)")?;
    ensure!(output.status.success(), "git ls-files: {}", String::from_utf8_lossy(&output.stderr).trim());
    let listing = String::from_utf8(output.stdout).context("git ls-files: a path is not UTF-8")?;
    let mut paths: Vec<String> =
        listing.split('\0').filter(|p| !p.is_empty() && root().join(p).is_file()).map(str::to_owned).collect();
    paths.sort();
    paths.dedup();
    Ok(paths)
}

/// The files of `paths` that hold text somebody wrote: code, scripts, manifests and documents.
pub(crate) fn text_files(paths: &[String]) -> Result<Vec<TextFile>> {
    const EXTENSIONS: [&str; 12] = ["rs", "toml", "md", "py", "sh", "cu", "cuh", "wgsl", "jinja", "yml", "html", "js"];
    paths
        .iter()
        .filter(|path| {
            let name = path.rsplit('/').next().expect("rsplit yields at least one part");
            name == "run" || name.rsplit_once('.').is_some_and(|(_, extension)| EXTENSIONS.contains(&extension))
        })
        .map(|path| {
            let text = std::fs::read_to_string(root().join(path)).with_context(|| path.clone())?;
            Ok(TextFile { path: path.clone(), text })
        })
        .collect()
}

/// The folder of a crate under `crates/`, e.g. `tensor` for `crates/tensor/src/lib.rs`.
pub(crate) fn crate_of(path: &str) -> Option<&str> {
    path.strip_prefix("crates/")?.split_once('/').map(|(folder, _)| folder)
}

/// An empty directory under `target/` for tools and scratch files, created if missing.
pub(crate) fn scratch(name: &str) -> Result<PathBuf> {
    let folder = root().join("target").join("xtask").join(name);
    std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    Ok(folder)
}
