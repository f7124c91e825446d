//! `moellon doctor`: what this machine has and what would run where.

use crate::cli::DoctorOptions;
use crate::table;
use anyhow::{Context, Result};
use moellon_backend_cpu::CpuLevel;
use moellon_backend_cpu::bandwidth::ReadProbe;
use moellon_lab::{Machine, ReadBandwidth, StealClock};
use moellon_tensor::pool::{Pool, PoolOptions};
use serde_json::{Value, json};

/// Runs the command.
pub fn run(options: &DoctorOptions) -> Result<()> {
    let report = Report::new()?;
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
    probe: ReadProbe,
}

impl BandwidthMeter {
    /// With that many threads, all cores without a number.
    pub fn new(threads: Option<usize>) -> Result<Self> {
        /// Several times any last-level cache of a core, and still a fraction of a second.
        const SIZE_BYTES: usize = 512 << 20;
        let probe = ReadProbe::new(SIZE_BYTES).context("memory for the bandwidth measurement")?;
        Ok(BandwidthMeter { pool: Pool::new(PoolOptions { threads, pin: false }), probe })
    }

    /// The median of a few passes now.
    pub fn measure(&self) -> ReadBandwidth {
        const PASSES: usize = 5;
        let steal = StealClock::start();
        let measured = self.probe.measure(&self.pool, PASSES);
        ReadBandwidth { gb_per_s: measured.median_gb_per_s, steal_percent: steal.steal_percent() }
    }
}

/// Read bandwidth with that many threads, all cores without a number.
pub fn measure_bandwidth(threads: Option<usize>) -> Result<ReadBandwidth> {
    Ok(BandwidthMeter::new(threads)?.measure())
}

struct Report {
    machine: Machine,
    levels: Vec<CpuLevel>,
    one_thread: ReadBandwidth,
    all_threads: ReadBandwidth,
}

impl Report {
    fn new() -> Result<Self> {
        Ok(Report {
            machine: Machine::this(),
            levels: CpuLevel::available().collect(),
            one_thread: measure_bandwidth(Some(1))?,
            all_threads: measure_bandwidth(None)?,
        })
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
            gpus => println!("gpus           {} (no GPU back end in this build)", gpus.join("; ")),
        }
        println!("auto runs on   cpu, because {}", self.reason());
        println!("a model whose tokens read 1 GB decodes at most at {:.1} tok/s here", self.all_threads.gb_per_s);
    }

    fn reason(&self) -> &'static str {
        if self.machine.gpus.is_empty() { "there is no GPU" } else { "this build has no back end for the GPU" }
    }

    fn json(&self) -> Value {
        json!({
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
            "gpus": self.machine.gpus,
            "backends": ["cpu", "reference"],
            "auto": { "backend": "cpu", "reason": self.reason() },
        })
    }
}
