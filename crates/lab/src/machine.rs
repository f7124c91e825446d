//! The machine that a measurement ran on.

use serde::{Deserialize, Serialize};

/// What identifies a machine in a report.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Processor model.
    pub cpu: String,
    /// Cores that this process may use.
    pub cores: usize,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Bytes that are free now.
    pub free_bytes: u64,
    /// Operating system and architecture.
    pub os: String,
    /// GPUs that drivers list.
    pub gpus: Vec<String>,
}

/// Read bandwidth and what disturbed its measurement.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ReadBandwidth {
    /// Decimal gigabytes a second.
    pub gb_per_s: f64,
    /// CPU time that the hypervisor gave to others meanwhile, in percent.
    pub steal_percent: f64,
}

impl Machine {
    /// Looks at this machine.
    pub fn this() -> Self {
        let (memory_bytes, free_bytes) = memory();
        Machine {
            cpu: cpu_model(),
            cores: moellon_tensor::pool::available_cores().len(),
            memory_bytes,
            free_bytes,
            os: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            gpus: gpus(),
        }
    }
}

/// Bytes of the largest cache that a core has or shares; `None` where the system does not say.
pub fn last_level_cache_bytes() -> Option<u64> {
    let caches = std::fs::read_dir("/sys/devices/system/cpu/cpu0/cache").ok()?.flatten();
    caches.filter_map(|cache| cache_bytes(&std::fs::read_to_string(cache.path().join("size")).ok()?)).max()
}

/// Bytes of `491520K` or `32M`.
fn cache_bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let (digits, shift) = match text.strip_suffix('K') {
        Some(digits) => (digits, 10),
        None => (text.strip_suffix('M')?, 20),
    };
    digits.parse::<u64>().ok().map(|number| number << shift)
}

fn cpu_model() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|l| l.strip_prefix("model name").and_then(|l| l.split_once(':')));
    model.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

/// Total and available bytes; 0 where the system does not say.
fn memory() -> (u64, u64) {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    (kib_field(&info, "MemTotal").unwrap_or(0), kib_field(&info, "MemAvailable").unwrap_or(0))
}

/// Names of NVIDIA GPUs as the driver lists them, and the drivers of other render devices.
fn gpus() -> Vec<String> {
    let entries = std::fs::read_dir("/proc/driver/nvidia/gpus").into_iter().flatten().flatten();
    let nvidia = entries.filter_map(|e| {
        let text = std::fs::read_to_string(e.path().join("information")).ok()?;
        text.lines().find_map(|l| l.strip_prefix("Model:").map(|m| m.trim().to_owned()))
    });
    let nodes = std::fs::read_dir("/sys/class/drm").into_iter().flatten().flatten();
    let others = nodes.filter(|e| e.file_name().to_string_lossy().starts_with("renderD")).filter_map(|e| {
        let driver = std::fs::read_link(e.path().join("device/driver")).ok()?;
        Some(driver.file_name()?.to_string_lossy().into_owned())
    });
    nvidia.chain(others.filter(|driver| driver != "nvidia")).collect()
}

/// Memory of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResidentMemory {
    /// Bytes resident now.
    pub resident_bytes: u64,
    /// The most that ever were.
    pub peak_bytes: u64,
    /// Of the resident ones, anonymous memory in huge pages.
    pub huge_page_bytes: u64,
}

impl ResidentMemory {
    /// Now; `None` where the system does not say.
    pub fn now() -> Option<Self> {
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap_or_default();
        Some(ResidentMemory {
            resident_bytes: kib_field(&status, "VmRSS")?,
            peak_bytes: kib_field(&status, "VmHWM")?,
            huge_page_bytes: kib_field(&rollup, "AnonHugePages").unwrap_or(0),
        })
    }
}

/// Bytes of a line `name: number kB`.
fn kib_field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Reads the share of CPU time that a hypervisor gave to others between two moments.
#[derive(Debug, Clone, Copy)]
pub struct StealClock {
    stolen: u64,
    total: u64,
}

impl StealClock {
    /// Starts now.
    pub fn start() -> Self {
        let (stolen, total) = cpu_times();
        StealClock { stolen, total }
    }

    /// Percent stolen since the start; 0 where the system does not say.
    pub fn steal_percent(&self) -> f64 {
        let (stolen, total) = cpu_times();
        let total = total.saturating_sub(self.total);
        if total == 0 { 0.0 } else { 100.0 * stolen.saturating_sub(self.stolen) as f64 / total as f64 }
    }
}

/// Stolen and total CPU ticks since boot.
fn cpu_times() -> (u64, u64) {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let Some(line) = stat.lines().find(|l| l.starts_with("cpu ")) else { return (0, 0) };
    // user nice system idle iowait irq softirq steal; guest times are counted in user already.
    let ticks: Vec<u64> = line.split_whitespace().skip(1).take(8).filter_map(|t| t.parse().ok()).collect();
    (ticks.get(7).copied().unwrap_or(0), ticks.iter().sum())
}

#[cfg(test)]
mod tests {
    #[test]
    fn cache_sizes_are_read() {
        assert_eq!(["491520K\n", "32M", "7"].map(super::cache_bytes), [Some(480 << 20), Some(32 << 20), None]);
    }
}
