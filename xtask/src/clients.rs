//! Real clients against our server: Python SDKs and a browser (`clients/`, a stage of `check`), and coding agents
//! (`bench/agents.py`, its own command: they are large and their versions change daily).

use crate::workspace;
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What came of it: what there is to say, or why it could not run here.
pub(crate) enum Verdict {
    Passed(String),
    Skipped(String),
}

/// Where virtual environments go: with everything else that is built.
fn environments() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace::root().join("target"), PathBuf::from);
    target.join("clients")
}

/// Runs `clients/` with pytest: all of it with the pinned clients, and the SDK's tests with its newest major version.
pub(crate) fn run() -> Result<Verdict> {
    let mut lines = Vec::new();
    for (name, requirements, tests) in [
        ("venv", "requirements.txt", "clients"),
        ("venv-openai3", "requirements-openai3.txt", "clients/test_openai.py"),
    ] {
        let folder = environments().join(name);
        if let Err(reason) = install(&folder, &workspace::root().join("clients").join(requirements))? {
            return Ok(Verdict::Skipped(reason));
        }
        let mut command = Command::new(folder.join("bin").join("python"));
        command.args(["-m", "pytest", "-q", "-rs", "--no-header", "-p", "no:cacheprovider", "--durations=5", tests]);
        let output = crate::check::tee(command.current_dir(workspace::root()).stdin(Stdio::null()))?;
        lines.push(last_line(&output)?);
    }
    Ok(Verdict::Passed(lines.join("; ")))
}

/// pytest's closing line, without its frame.
fn last_line(output: &str) -> Result<String> {
    let line = output.lines().rfind(|line| line.contains(" passed")).context("pytest ran no test")?;
    Ok(line.trim_matches(['=', ' ']).to_owned())
}

/// A virtual environment with `requirements`, made once; `Err` inside if Python or the package index is not there.
fn install(folder: &Path, requirements: &Path) -> Result<std::result::Result<(), String>> {
    let wanted = std::fs::read_to_string(requirements).with_context(|| requirements.display().to_string())?;
    let stamp = folder.join("requirements.txt");
    if std::fs::read_to_string(&stamp).is_ok_and(|found| found == wanted) {
        return Ok(Ok(()));
    }
    let python = Command::new("python3").args(["-m", "venv", "--clear"]).arg(folder).stdin(Stdio::null()).output();
    match python {
        Err(_) => return Ok(Err("there is no python3".to_owned())),
        Ok(output) if !output.status.success() => {
            return Ok(Err("python3 -m venv does not work (apt install python3-venv)".to_owned()));
        }
        Ok(_) => {}
    }
    let mut pip = Command::new(folder.join("bin").join("python"));
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"]).arg(requirements);
    let output = pip.stdin(Stdio::null()).output().context("pip")?;
    if output.status.success() {
        std::fs::write(&stamp, wanted).with_context(|| stamp.display().to_string())?;
        return Ok(Ok(()));
    }
    let text = String::from_utf8_lossy(&output.stderr);
    // A missing network is no fault of the repository; a version that does not exist or does not fit is.
    let unreachable =
        ["NewConnectionError", "Temporary failure in name resolution", "ConnectTimeoutError", "ProxyError"];
    if unreachable.iter().any(|word| text.contains(word)) {
        return Ok(Err("the Python package index cannot be reached from here".to_owned()));
    }
    bail!("pip install -r {}:\n{text}", requirements.display())
}

/// Runs the coding agents (`bench/agents.py`), which installs them and writes a receipt.
pub(crate) fn agents() -> Result<()> {
    let mut command = Command::new("python3");
    command.arg("bench/agents.py").current_dir(workspace::root());
    let status = command.status().context("python3 bench/agents.py")?;
    anyhow::ensure!(status.success(), "python3 bench/agents.py: {status}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closing_line_says_how_many_passed() {
        let output =
            "....s\nSKIPPED [1] clients/test_page.py: there is no chromium\n==== 40 passed, 1 skipped in 9.2s ====\n";
        assert_eq!(last_line(output).unwrap(), "40 passed, 1 skipped in 9.2s");
        assert!(last_line("no tests ran in 0.01s\n").is_err());
    }
}
