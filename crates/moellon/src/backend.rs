//! Chooses a back end. The only place that names concrete ones.

use crate::cli::{ActivationsChoice, BackendChoice, DeviceOptions};
use anyhow::{Context, Result, bail};
use moellon_backend_cpu::{ActivationMode, CpuBackend, CpuLevel, CpuOptions};
use moellon_backend_cuda::{CudaBackend, CudaOptions};
use moellon_ops::Backend;
use moellon_ops::reference::ReferenceBackend;

/// Makes the back end that the flags ask for.
pub fn create(options: &DeviceOptions, activations: ActivationsChoice) -> Result<Box<dyn Backend>> {
    match options.backend {
        BackendChoice::Reference => Ok(Box::new(ReferenceBackend::new())),
        BackendChoice::Cuda => Ok(Box::new(CudaBackend::new(&CudaOptions {
            ordinal: options.gpu,
            kernels: options.cuda_kernels.clone(),
        })?)),
        // This build has one device back end.
        BackendChoice::Auto | BackendChoice::Cpu => {
            let level = options.cpu_level.as_deref().map(parse_level).transpose()?;
            let activation = match activations {
                ActivationsChoice::Exact => ActivationMode::Exact,
                ActivationsChoice::Int8 => ActivationMode::Int8,
            };
            let options = CpuOptions { threads: options.threads, pin: true, level, activation };
            Ok(Box::new(CpuBackend::new(options).context("the CPU back end does not start")?))
        }
    }
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
