//! Chooses a back end. The only place that names concrete ones.

use crate::cli::{ActivationsChoice, BackendChoice, DeviceOptions};
use crate::load;
use anyhow::{Context, Result, bail};
use moellon_backend_cpu::{ActivationMode, CpuBackend, CpuLevel, CpuOptions};
use moellon_backend_cuda::{CudaBackend, CudaOptions};
use moellon_backend_wgpu::{AdapterChoice, WgpuBackend, WgpuOptions};
use moellon_ops::Backend;
use moellon_ops::reference::ReferenceBackend;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Makes the back end that the flags ask for.
pub fn create(options: &DeviceOptions, activations: ActivationsChoice) -> Result<Box<dyn Backend>> {
    match options.backend {
        BackendChoice::Reference => Ok(Box::new(ReferenceBackend::new())),
        BackendChoice::Cuda => Ok(Box::new(CudaBackend::new(&cuda_options(options))?)),
        // Who asks for it by name may have a CPU that plays a GPU.
        BackendChoice::Wgpu => Ok(Box::new(open_wgpu(options.gpu, true)?)),
        BackendChoice::Cpu => create_cpu(options, activations),
        BackendChoice::Auto => {
            let (gpu, why) = open_gpu(options);
            let name = gpu.as_ref().map_or("cpu", |gpu| gpu.caps().name);
            tracing::info!(backend = name, why = %why, "chosen automatically");
            gpu.map_or_else(|| create_cpu(options, activations), Ok)
        }
    }
}

/// Opens the best GPU: CUDA, then a discrete or integrated one behind another API. The text says why this one, or why none.
pub fn open_gpu(options: &DeviceOptions) -> (Option<Box<dyn Backend>>, String) {
    let cuda = match CudaBackend::new(&cuda_options(options)) {
        Ok(cuda) => {
            let why = format!("there is {}", cuda.caps().device);
            return (Some(Box::new(cuda)), why);
        }
        Err(error) => error,
    };
    if !may_have_gpu() {
        return (None, format!("there is no GPU ({cuda})"));
    }
    match open_wgpu(options.gpu, false) {
        Ok(wgpu) => {
            let why = format!("there is {}, and not CUDA ({cuda})", wgpu.caps().device);
            (Some(Box::new(wgpu)), why)
        }
        Err(wgpu) => (None, format!("there is no GPU that works ({cuda}; {wgpu})")),
    }
}

fn cuda_options(options: &DeviceOptions) -> CudaOptions {
    let compile = options.cuda_kernels.as_deref() == Some(Path::new("compile"));
    let kernels = options.cuda_kernels.clone().filter(|_| !compile);
    CudaOptions { ordinal: options.gpu, kernels, compile, cache_folder: cache_folder() }
}

fn open_wgpu(ordinal: usize, allow_software: bool) -> moellon_ops::Result<WgpuBackend> {
    let bar = load::progress_bar(0);
    let progress = bar.clone();
    let opened = WgpuBackend::new(&WgpuOptions {
        adapter: AdapterChoice { ordinal, allow_software },
        cache_folder: cache_folder(),
        progress: Some(Arc::new(move |num_kernels: usize| {
            progress.set_message(format!("compiling kernels: {num_kernels}"));
            progress.tick();
        })),
        ..WgpuOptions::default()
    });
    bar.finish_and_clear();
    opened
}

/// Whether the system knows of any GPU. Asking Vulkan loads every driver that is installed, which takes a second, so it is not asked
/// for nothing.
fn may_have_gpu() -> bool {
    let nodes = ["/dev/nvidiactl", "/dev/dxg", "/dev/kfd"];
    let has_render_node = || {
        let nodes = std::fs::read_dir("/dev/dri").into_iter().flatten().flatten();
        nodes.into_iter().any(|node| node.file_name().to_string_lossy().starts_with("renderD"))
    };
    !cfg!(target_os = "linux") || nodes.iter().any(|node| Path::new(node).exists()) || has_render_node()
}

/// Where compiled kernels are kept.
fn cache_folder() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = variable("XDG_CACHE_HOME")
        .or_else(|| variable("LOCALAPPDATA"))
        .or_else(|| variable("HOME").map(|home| home.join(".cache")))?;
    Some(base.join("moellon").join("kernels"))
}

fn create_cpu(options: &DeviceOptions, activations: ActivationsChoice) -> Result<Box<dyn Backend>> {
    let level = options.cpu_level.as_deref().map(parse_level).transpose()?;
    let activation = match activations {
        ActivationsChoice::Exact => ActivationMode::Exact,
        ActivationsChoice::Int8 => ActivationMode::Int8,
    };
    let options = CpuOptions { threads: options.threads, pin: true, level, activation };
    Ok(Box::new(CpuBackend::new(options).context("the CPU back end does not start")?))
}

fn parse_level(name: &str) -> Result<CpuLevel> {
    let available: Vec<CpuLevel> = CpuLevel::available().collect();
    match available.iter().find(|level| level.name() == name) {
        Some(level) => Ok(*level),
        None => {
            let names: Vec<&str> = available.iter().map(|l| l.name()).collect();
            bail!("--cpu-level is {name}, expected one that this machine has: {}", names.join(", "))
        }
    }
}
