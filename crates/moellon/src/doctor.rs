//! `moellon doctor`: what this machine has and what would run where.

use crate::advice::{self, Findings};
use crate::cli::{BackendChoice, DeviceOptions, DoctorOptions};
use crate::lever::{self, Tested};
use crate::model_source::ModelSource;
use crate::{backend, provenance, table};
use anyhow::{Context, Result};
use moellon_backend_cpu::CpuLevel;
use moellon_backend_cpu::bandwidth::ReadProbe;
use moellon_backend_wgpu::{AdapterChoice, AdapterReport, SelfTest};
use moellon_lab::receipt::{Receipt, Seal};
use moellon_lab::roofline::CostModel;
use moellon_lab::{Machine, ReadBandwidth, StealClock};
use moellon_model::weights::Weights;
use moellon_tensor::pool::{Pool, PoolOptions};
use serde_json::{Value, json};
use std::sync::Arc;

/// Runs the command.
pub fn run(options: &DoctorOptions) -> Result<()> {
    let report = Report::new(options)?;
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report.json())?);
    } else {
        report.print();
    }
    Ok(())
}

/// Threads and memory to measure read bandwidth with, again and again.
pub struct BandwidthMeter {
    pool: Pool,
    probe: Arc<ReadProbe>,
}

impl BandwidthMeter {
    /// With that many threads, all cores without a number.
    pub fn new(threads: Option<usize>) -> Result<Self> {
        let size_bytes = probe_bytes(moellon_lab::last_level_cache_bytes(), Machine::this().free_bytes);
        let probe = ReadProbe::new(size_bytes as usize).context("memory for the bandwidth measurement")?;
        Ok(BandwidthMeter { pool: Pool::new(PoolOptions { threads, pin: false }), probe: Arc::new(probe) })
    }

    /// Another with the same memory and that many threads.
    #[must_use]
    pub fn with_threads(&self, threads: usize) -> Self {
        let pool = Pool::new(PoolOptions { threads: Some(threads), pin: false });
        BandwidthMeter { pool, probe: Arc::clone(&self.probe) }
    }

    /// The median of a few passes now.
    pub fn measure(&self) -> ReadBandwidth {
        const PASSES: usize = 5;
        let steal = StealClock::start();
        let measured = self.probe.measure(&self.pool, PASSES);
        ReadBandwidth { gb_per_s: measured.median_gb_per_s, steal_percent: steal.steal_percent() }
    }
}

/// Bytes to read: four times the largest cache, so that it holds little of them from one pass to the next; where a server's cache
/// is that large, no more than an eighth of the memory that is free.
fn probe_bytes(cache_bytes: Option<u64>, free_bytes: u64) -> u64 {
    /// Still a fraction of a second on any machine.
    const LEAST_BYTES: u64 = 512 << 20;
    (4 * cache_bytes.unwrap_or(0)).min(free_bytes / 8).max(LEAST_BYTES)
}

/// Read bandwidth with that many threads, all cores without a number.
pub fn measure_bandwidth(threads: Option<usize>) -> Result<ReadBandwidth> {
    Ok(BandwidthMeter::new(threads)?.measure())
}

struct Report {
    model: String,
    model_bytes: u64,
    cost: CostModel,
    tests: Vec<(Tested, String)>,
    /// Files of the folder that are no receipts, and why.
    unread: Vec<String>,
    machine: Machine,
    levels: Vec<CpuLevel>,
    one_thread: ReadBandwidth,
    all_threads: ReadBandwidth,
    /// What each adapter is, and what it does where it has a choice; or why it does not open.
    adapters: Vec<(AdapterReport, Result<SelfTest, String>)>,
    /// What `auto` runs on, and why.
    auto: (&'static str, String),
}

impl Report {
    fn new(options: &DoctorOptions) -> Result<Self> {
        let source = ModelSource::open(options.model.model.as_deref())?;
        let weights = Weights::describe(&source.config, &source.checkpoint)?;
        let machine = Machine::this();
        let meter = BandwidthMeter::new(None)?;
        let (one_thread, all_threads) = (meter.with_threads(1).measure(), meter.measure());
        let context = source.config.max_position_embeddings.min(1024);
        let cost = CostModel::new(&weights.account, &source.config, context, all_threads.gb_per_s * 1e9);
        let (receipts, unread) = lever::receipts_if_any(&options.receipts)?;
        let of_model: Vec<Receipt> = receipts
            .into_iter()
            .filter(|r| matches!(r.seal, Seal::Intact(_)) && r.value["model"]["name"] == source.name.as_str())
            .collect();
        let automatic =
            DeviceOptions { backend: BackendChoice::Auto, threads: None, cpu_level: None, gpu: 0, cuda_kernels: None };
        let (gpu, why) = backend::open_gpu(&automatic);
        let auto = (gpu.map_or("cpu", |gpu| gpu.caps().name), why);
        let tested = |(ordinal, adapter): (usize, AdapterReport)| {
            let choice = AdapterChoice { ordinal, allow_software: true };
            (adapter, moellon_backend_wgpu::self_test(choice).map_err(|error| error.to_string()))
        };
        Ok(Report {
            adapters: moellon_backend_wgpu::adapters().into_iter().enumerate().map(tested).collect(),
            auto,
            unread,
            tests: lever::last_tests(&of_model, &machine.cpu),
            model_bytes: source.checkpoint.size_bytes(),
            model: source.name,
            cost,
            machine,
            levels: CpuLevel::available().collect(),
            one_thread,
            all_threads,
        })
    }

    /// What limits and what would pay, in words.
    fn words(&self) -> [Vec<String>; 2] {
        let kept = lever::kept(&self.tests);
        let findings = Findings {
            cores: self.machine.cores,
            one_thread: self.one_thread.gb_per_s,
            all_threads: self.all_threads.gb_per_s,
            steal_percent: self.all_threads.steal_percent.max(self.one_thread.steal_percent),
            free_bytes: self.machine.free_bytes,
            gpus: &self.machine.gpus,
            cost: &self.cost,
            model: &self.model,
            model_bytes: self.model_bytes,
            kept: &kept,
            tested: !self.tests.is_empty(),
        };
        [advice::limits(&findings), advice::levers(&findings)]
    }

    fn print(&self) {
        let levels: Vec<&str> = self.levels.iter().map(|l| l.name()).collect();
        println!("cpu            {}", self.machine.cpu);
        println!("cores          {} that this process may use", self.machine.cores);
        println!("kernels        {} (best: {})", levels.join(", "), CpuLevel::detect().name());
        println!(
            "memory         {}, {} free",
            table::bytes(self.machine.memory_bytes as f64),
            table::bytes(self.machine.free_bytes as f64)
        );
        println!(
            "read bandwidth {:.1} GB/s on 1 thread, {:.1} GB/s on {}",
            self.one_thread.gb_per_s, self.all_threads.gb_per_s, self.machine.cores
        );
        match self.all_threads.steal_percent {
            steal if steal > 2.0 => println!(
                "steal          {steal:.1} %: a neighbour takes CPU time; measurements here are not to be trusted now"
            ),
            steal => println!("steal          {steal:.1} %"),
        }
        match self.machine.gpus.as_slice() {
            [] => println!("gpus           none found"),
            gpus => println!("gpus           {}", gpus.join("; ")),
        }
        for (ordinal, (adapter, self_test)) in self.adapters.iter().enumerate() {
            println!(
                "adapter {ordinal}      {} ({}), {} {}, {} a binding",
                adapter.name,
                adapter.kind,
                adapter.api,
                adapter.driver,
                table::bytes(adapter.max_binding_bytes as f64)
            );
            println!("               {}", self_test.as_ref().map_or_else(Clone::clone, |test| self_test_text(*test)));
        }
        println!("auto runs on   {}, because {}", self.auto.0, self.auto.1);
        for line in &self.unread {
            println!("not a receipt  {line}");
        }
        let [limits, levers] = self.words();
        println!("\nwhat limits");
        limits.iter().for_each(|line| println!("- {line}"));
        println!("\nwhat would pay");
        levers.iter().for_each(|line| println!("- {line}"));
    }

    fn json(&self) -> Value {
        let [limits, levers] = self.words();
        json!({
            "model": self.model,
            "limits": limits,
            "levers": levers,
            "unread_receipts": self.unread,
            "version": env!("CARGO_PKG_VERSION"),
            "cpu": self.machine.cpu,
            "cores": self.machine.cores,
            "cpu_levels": self.levels.iter().map(|l| l.name()).collect::<Vec<_>>(),
            "cpu_level": CpuLevel::detect().name(),
            "memory_bytes": self.machine.memory_bytes,
            "free_bytes": self.machine.free_bytes,
            "read_gb_s_1_thread": self.one_thread.gb_per_s,
            "read_gb_s": self.all_threads.gb_per_s,
            "steal_pct": self.all_threads.steal_percent,
            "os": self.machine.os,
            "gpus": self.machine.gpus,
            "driver": provenance::driver(),
            "adapters": self.adapters.iter().map(adapter_json).collect::<Vec<_>>(),
            "backends": ["cpu", "cuda", "wgpu", "reference"],
            "auto": { "backend": self.auto.0, "reason": self.auto.1 },
        })
    }
}

fn self_test_text(test: SelfTest) -> String {
    let has = |what: &'static str, yes: bool| format!("{what}: {}", if yes { "yes" } else { "no" });
    let [smallest, largest] = test.subgroup_sizes;
    [
        has("self-test passed; keeps subnormals of f16", test.half_subnormals),
        has("of f32", test.single_subnormals),
        has("fused multiply-add", test.fused),
        format!("subgroups of {smallest} to {largest}"),
        has("sums in registers", test.subgroups),
        has("integer products", test.integer_products),
        has("f16", test.shader_f16),
        has("cooperative matrices", test.cooperative_matrix),
        has("those of 16 x 16 f16 sum exactly and multiply heads of prompts", test.exact_matrices),
    ]
    .join(", ")
}

fn adapter_json((adapter, self_test): &(AdapterReport, Result<SelfTest, String>)) -> Value {
    let self_test = match self_test {
        Ok(test) => json!({
            "half_subnormals": test.half_subnormals,
            "single_subnormals": test.single_subnormals,
            "fused": test.fused,
            "subgroup_sizes": test.subgroup_sizes,
            "sums_in_registers": test.subgroups,
            "integer_products": test.integer_products,
            "shader_f16": test.shader_f16,
            "cooperative_matrix": test.cooperative_matrix,
            "exact_matrices": test.exact_matrices,
        }),
        Err(error) => json!({ "error": error }),
    };
    json!({
        "name": adapter.name,
        "kind": adapter.kind.to_string(),
        "api": adapter.api,
        "driver": adapter.driver,
        "max_binding_bytes": adapter.max_binding_bytes,
        "self_test": self_test,
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_probe_is_larger_than_caches_and_fits_memory() {
        let bytes = |cache: Option<u64>, free: u64| super::probe_bytes(cache, free) >> 20;
        assert_eq!(bytes(None, 16 << 30), 512);
        assert_eq!(bytes(Some(32 << 20), 16 << 30), 512);
        assert_eq!(bytes(Some(480 << 20), 64 << 30), 1920);
        assert_eq!(bytes(Some(480 << 20), 8 << 30), 1024);
    }
}
