//! Where a receipt comes from: program, source, machine, model.

use crate::doctor::BandwidthMeter;
use crate::model_source::ModelSource;
use anyhow::{Context, Result};
use moellon_backend_cpu::CpuLevel;
use moellon_lab::Machine;
use moellon_lab::receipt::{MeasuredMachine, MeasuredModel, Provenance};
use moellon_model::account::{Account, Component};
use moellon_ops::Backend;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

/// Of this program on this machine, whose bandwidth is measured now: that of the host, and that of `backend`'s device where it is
/// another.
pub fn provenance(backend: &mut dyn Backend) -> Result<Provenance> {
    let executable = std::env::current_exe().context("the program's own path")?;
    let bytes = std::fs::read(&executable).with_context(|| executable.display().to_string())?;
    let machine = Machine::this();
    let meter = BandwidthMeter::new(None)?;
    Ok(Provenance {
        commit: commit(&executable),
        binary_sha256: hex(&Sha256::digest(&bytes)),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        machine: MeasuredMachine {
            cpu: machine.cpu,
            cores: machine.cores,
            cpu_level: CpuLevel::detect().name().to_owned(),
            memory_bytes: machine.memory_bytes,
            os: machine.os,
            gpus: machine.gpus,
            driver: driver(),
            read_gb_s: meter.measure().gb_per_s,
            read_gb_s_1_thread: meter.with_threads(1).measure().gb_per_s,
            device: (backend.caps().name != "cpu").then(|| {
                let caps = backend.caps();
                format!("{}: {}", caps.name, caps.device)
            }),
            device_read_gb_s: backend.measure_read()?.map(|bytes_per_s| bytes_per_s / 1e9),
        },
    })
}

/// A model on disk or the bundled one.
pub fn model(source: &ModelSource, account: &Account) -> MeasuredModel {
    MeasuredModel {
        name: source.name.clone(),
        sha256: Some(source.checkpoint.identity()),
        format: formats(account),
        bytes_per_token: account.trunk().bytes_per_token,
    }
}

/// `routed_experts affine-3, attention affine-4, ..`; one name where all parts have the same.
pub fn formats(account: &Account) -> String {
    let parts: Vec<(Component, Vec<String>)> = Component::ALL
        .into_iter()
        .filter(|c| !matches!(c, Component::Norms | Component::Router) && account.component(*c).size_bytes > 0)
        .map(|c| (c, account.formats(c)))
        .collect();
    match parts.first() {
        Some((_, first)) if first.len() == 1 && parts.iter().all(|(_, formats)| formats == first) => first[0].clone(),
        _ => parts.iter().map(|(c, f)| format!("{} {}", c.name(), f.join("+"))).collect::<Vec<_>>().join(", "),
    }
}

/// `HEAD` of the checkout that the program lies in, with `-dirty` where files differ; `None` outside a checkout. A machine
/// that has the program alone can be told by `MOELLON_COMMIT`.
fn commit(executable: &Path) -> Option<String> {
    if let Ok(commit) = std::env::var("MOELLON_COMMIT") {
        return Some(commit);
    }
    let folder = executable.parent()?;
    let git = |words: &[&str]| {
        let output = Command::new("git").arg("-C").arg(folder).args(words).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let head = git(&["rev-parse", "HEAD"])?;
    // Receipts that were just written do not change the program.
    let changed =
        git(&["status", "--porcelain", "--untracked-files=no", "--", ":/crates", ":/Cargo.lock", ":/levers"])?;
    Some(if changed.is_empty() { head } else { format!("{head}-dirty") })
}

/// Version of the NVIDIA driver, as the kernel module says it.
pub fn driver() -> Option<String> {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    let words = text.lines().next()?.split_whitespace();
    words.map(str::to_owned).find(|word| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.'))
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Today in UTC, `2026-01-31`.
#[expect(clippy::disallowed_methods, reason = "receipts are dated")]
pub fn today() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs());
    date((seconds / 86_400) as i64)
}

/// The civil date of a day since 1970-01-01 (Howard Hinnant's days_from_civil, the other way round).
fn date(day: i64) -> String {
    let shifted = day + 719_468;
    let (era, of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    // Years that begin in March: leap days come last.
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    format!("{:04}-{month:02}-{day:02}", year_of_era + era * 400 + carry)
}

/// Where a new receipt of today goes: `DIR/DATE-NAME.json`, with a number behind the name where there is one already.
pub fn new_path(folder: &Path, name: &str) -> Result<PathBuf> {
    std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let today = today();
    let numbered = |n: usize| match n {
        1 => folder.join(format!("{today}-{name}.json")),
        n => folder.join(format!("{today}-{name}-{n}.json")),
    };
    Ok((1..).map(numbered).find(|path| !path.exists()).expect("there are more numbers than files"))
}

/// The user's folder for what can be made again.
pub fn cache_folder() -> Option<PathBuf> {
    let root = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))?;
    Some(root.join("moellon"))
}

/// The command line, without the folders before the program's name.
pub fn command_line() -> String {
    std::iter::once("moellon".to_owned()).chain(std::env::args().skip(1)).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    #[test]
    fn days_are_dates() {
        for (day, expected) in [
            (0, "1970-01-01"),
            (11_016, "2000-02-29"),
            (20_778, "2026-11-21"),
            (47_540, "2100-02-28"),
            (47_541, "2100-03-01"),
        ] {
            assert_eq!(super::date(day), expected);
        }
    }
}
