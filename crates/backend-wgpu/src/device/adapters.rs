//! Which adapters there are, and what they lack.

use super::IMMEDIATES_BYTES;

/// Bindings of the kernel that has most, those apart that only some adapters run.
const STORAGE_BUFFERS: u32 = 10;

/// What an adapter is, the best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum AdapterKind {
    /// A GPU with memory of its own.
    Discrete,
    /// A GPU that shares the memory of the CPU.
    Integrated,
    /// A part of a GPU, or one that the driver does not say more about.
    Virtual,
    /// A CPU that plays a GPU, such as lavapipe: for tests.
    Software,
}

impl std::fmt::Display for AdapterKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            AdapterKind::Discrete => "discrete GPU",
            AdapterKind::Integrated => "integrated GPU",
            AdapterKind::Virtual => "virtual GPU",
            AdapterKind::Software => "a CPU that plays a GPU",
        })
    }
}

/// An adapter that this machine has.
#[derive(Debug, Clone)]
pub struct AdapterReport {
    /// Its name, as the driver says it.
    pub name: String,
    /// What it is.
    pub kind: AdapterKind,
    /// `vulkan`, `metal` or `dx12`.
    pub api: String,
    /// Driver and its version.
    pub driver: String,
    /// Most bytes that a kernel can see at a time.
    pub max_binding_bytes: u64,
    /// What it lacks to run this back end; empty if nothing.
    pub lacks: Vec<String>,
}

/// Which adapter to open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AdapterChoice {
    /// Position in the list of [`adapters`].
    pub ordinal: usize,
    /// Whether an adapter that is a CPU may be taken.
    pub allow_software: bool,
}

fn instance() -> wgpu::Instance {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12;
    // Neither validation layers nor debug names: errors come from wgpu's own checks.
    descriptor.flags = wgpu::InstanceFlags::empty();
    wgpu::Instance::new(descriptor)
}

pub(super) fn kind_of(info: &wgpu::AdapterInfo) -> AdapterKind {
    match info.device_type {
        wgpu::DeviceType::DiscreteGpu => AdapterKind::Discrete,
        wgpu::DeviceType::IntegratedGpu => AdapterKind::Integrated,
        wgpu::DeviceType::VirtualGpu | wgpu::DeviceType::Other => AdapterKind::Virtual,
        wgpu::DeviceType::Cpu => AdapterKind::Software,
    }
}

/// All adapters, the best kind first.
pub(super) fn enumerate() -> Vec<wgpu::Adapter> {
    let mut all = pollster::block_on(instance().enumerate_adapters(wgpu::Backends::all()));
    all.sort_by_key(|adapter| kind_of(&adapter.get_info()));
    all
}

pub(super) fn report(adapter: &wgpu::Adapter) -> AdapterReport {
    let (info, limits, features) = (adapter.get_info(), adapter.limits(), adapter.features());
    let mut lacks = Vec::new();
    if !features.contains(wgpu::Features::IMMEDIATES) {
        lacks.push("immediates (push constants)".to_owned());
    }
    let mut at_least = |what: &str, found: u64, needed: u64| {
        if found < needed {
            lacks.push(format!("{what}: {found}, needed {needed}"));
        }
    };
    at_least("bytes of immediates", limits.max_immediate_size.into(), IMMEDIATES_BYTES.into());
    at_least("storage buffers", limits.max_storage_buffers_per_shader_stage.into(), STORAGE_BUFFERS.into());
    at_least("bytes of workgroup memory", limits.max_compute_workgroup_storage_size.into(), 27 << 10);
    at_least("invocations of a workgroup", limits.max_compute_invocations_per_workgroup.into(), 256);
    AdapterReport {
        name: info.name.clone(),
        kind: kind_of(&info),
        api: info.backend.to_string(),
        driver: [info.driver.as_str(), info.driver_info.as_str()].join(" ").trim().to_owned(),
        max_binding_bytes: binding_limit(&limits),
        lacks,
    }
}

/// The adapters that this machine has, in the order of [`AdapterChoice::ordinal`].
pub fn adapters() -> Vec<AdapterReport> {
    enumerate().iter().map(report).collect()
}

/// Most bytes of a buffer that can be bound whole: multiples of 16.
fn binding_limit(limits: &wgpu::Limits) -> u64 {
    limits.max_storage_buffer_binding_size.min(limits.max_buffer_size) / 16 * 16
}
