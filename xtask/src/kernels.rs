//! Device code is compiled in CI, where there is no device: every `.cu` by NVRTC (a Python wheel, no toolkit), every
//! `.wgsl` by naga. A kernel without a checker is an error, not a skip.

use crate::workspace;
use anyhow::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Pinned: another compiler is a change of its own.
const WHEELS: [&str; 3] = ["nvidia-cuda-nvrtc==13.5.37", "nvidia-cuda-runtime==13.5.37", "nvidia-cuda-crt==13.5.37"];

/// Checks every kernel of the checkout.
pub(crate) fn run() -> Result<()> {
    let kernels = Kernels::among(&workspace::paths()?);
    if !kernels.cuda.is_empty() {
        check_cuda(&kernels.cuda)?;
    }
    if !kernels.wgsl.is_empty() {
        check_wgsl(&kernels.wgsl)?;
    }
    println!("kernels: {} kernels", kernels.cuda.len() + kernels.wgsl.len());
    Ok(())
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Kernels {
    cuda: Vec<String>,
    wgsl: Vec<String>,
}

/// Where measurements are: CUDA there has a host's part, which needs nvcc, and includes the kernels that are checked.
const PROGRAMS: &str = "bench/";

impl Kernels {
    fn among(paths: &[String]) -> Self {
        let is_kernel = |p: &&String, suffix: &str| p.ends_with(suffix) && !p.starts_with(PROGRAMS);
        let ending = |suffix: &str| paths.iter().filter(|p| is_kernel(p, suffix)).cloned().collect();
        Kernels { cuda: ending(".cu"), wgsl: ending(".wgsl") }
    }
}

/// The folder whose kernels the back end's test checks: all of them, it says itself.
const WGSL_FOLDER: &str = "crates/backend-wgpu/kernels/";

/// Validates every kernel with naga and keeps its translation for Metal in `target/xtask/metal`.
fn check_wgsl(files: &[String]) -> Result<()> {
    let stray: Vec<&String> = files.iter().filter(|file| !file.starts_with(WGSL_FOLDER)).collect();
    ensure!(stray.is_empty(), "WGSL outside {WGSL_FOLDER}, where nothing checks it: {stray:?}");
    let metal = workspace::scratch("metal")?;
    // All packages, so that nothing is compiled with other features than in the stages that follow.
    let status = Command::new("cargo")
        .args(["test", "--workspace", "--quiet", "--test", "wgsl"])
        .env("MOELLON_METAL_OUT", &metal)
        .current_dir(workspace::root())
        .status()
        .context("cargo test --test wgsl")?;
    ensure!(status.success(), "WGSL kernels are not valid");
    let num_translated = std::fs::read_dir(&metal).context("translations for Metal")?.count();
    ensure!(num_translated > files.len(), "{num_translated} translations of {} files", files.len());
    println!("kernels: {num_translated} translations for Metal in {}", metal.display());
    Ok(())
}

fn check_cuda(files: &[String]) -> Result<()> {
    let python = nvrtc_python()?;
    let status = Command::new(python)
        .arg("xtask/kernels/nvrtc_check.py")
        .args(files)
        .current_dir(workspace::root())
        .status()
        .context("nvrtc_check.py")?;
    ensure!(status.success(), "CUDA kernels do not compile");
    Ok(())
}

/// A Python with the NVRTC wheels, in a virtual environment under `target/`.
fn nvrtc_python() -> Result<PathBuf> {
    let environment = workspace::scratch("nvrtc")?;
    let python = environment.join("bin").join("python");
    let ready = environment.join(WHEELS.join(" ").replace("==", "-"));
    if !ready.is_file() {
        run_quietly(Path::new("python3"), &["-m", "venv", &environment.to_string_lossy()])?;
        let mut arguments = vec!["-m", "pip", "install", "--quiet", "--disable-pip-version-check"];
        arguments.extend(WHEELS);
        run_quietly(&python, &arguments)?;
        std::fs::write(&ready, "")?;
    }
    Ok(python)
}

fn run_quietly(program: &Path, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program).args(arguments).output().with_context(|| program.display().to_string())?;
    if !output.status.success() {
        bail!("{} {}: {}", program.display(), arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_found_by_their_ending() {
        let paths = [
            "crates/backend-cuda/src/moe_down.cu",
            "crates/backend-wgpu/src/add.wgsl",
            "docs/cuda.md",
            "bench/layer.cu",
        ];
        let kernels = Kernels::among(&paths.map(str::to_owned));
        assert_eq!(kernels.cuda, [paths[0]]);
        assert_eq!(kernels.wgsl, [paths[1]]);
        assert_eq!(Kernels::among(&[]), Kernels::default());
    }
}
