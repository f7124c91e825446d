//! What limits this machine and which levers would pay, in plain words. `doctor` prints it, the report begins with it.

use crate::lever::{Point, Tested};
use crate::table;
use moellon_lab::STEAL_LIMIT_PERCENT;
use moellon_lab::roofline::{CostModel, WhatIf};

/// What is known of the machine.
pub struct Findings<'a> {
    /// Cores that the program may use.
    pub cores: usize,
    /// GB/s that one thread reads.
    pub one_thread: f64,
    /// GB/s that all threads read.
    pub all_threads: f64,
    /// CPU time stolen meanwhile, in percent.
    pub steal_percent: f64,
    /// Bytes that are free.
    pub free_bytes: u64,
    /// GPUs by name.
    pub gpus: &'a [String],
    /// The model, with its bytes of a token; its efficiency is 1 before anything was measured.
    pub cost: &'a CostModel,
    /// Its name.
    pub model: &'a str,
    /// Bytes of its weights.
    pub model_bytes: u64,
    /// Levers to be kept that were tested here, best first.
    pub kept: &'a [(&'a Tested, &'a Point)],
    /// Whether any lever was tested here.
    pub tested: bool,
}

/// Sentences about what limits.
pub fn limits(f: &Findings<'_>) -> Vec<String> {
    let mut lines = Vec::new();
    let bytes = f.cost.bytes(1.0);
    lines.push(format!(
        "Decoding is reading: a token of {} reads {}, and this memory gives {:.1} GB/s, so {:.1} tok/s is the ceiling for one sequence.",
        f.model,
        table::bytes(bytes),
        f.all_threads,
        f.all_threads * 1e9 / bytes
    ));
    let gain = f.all_threads / f.one_thread.max(1e-9);
    lines.push(match f.cores {
        1 => "There is one core: it reads as fast as it can ask.".to_owned(),
        cores if gain < 1.15 => format!(
            "One thread reads {:.1} GB/s already, {cores} read {:.1}: memory is the limit, not cores.",
            f.one_thread, f.all_threads
        ),
        cores if gain > 0.8 * cores as f64 => format!(
            "{cores} threads read {gain:.1} times as much as one: cores are the limit, and more of them would read more."
        ),
        cores => format!("{cores} threads read {gain:.1} times as much as one: memory is nearly saturated."),
    });
    if f.model_bytes > f.free_bytes {
        lines.push(format!(
            "The model's {} do not fit the {} of memory that are free: it would run from disk, at disk speed.",
            table::bytes(f.model_bytes as f64),
            table::bytes(f.free_bytes as f64)
        ));
    }
    if f.model_bytes < 64 << 20 {
        lines.push(
            "The model is so small that caches hold part of it: it can pass the ceiling of memory, and launches weigh more than bytes."
                .to_owned(),
        );
    }
    if f.steal_percent > STEAL_LIMIT_PERCENT {
        lines.push(format!(
            "A neighbour takes {:.1} % of the CPU time: measure again when it is quiet.",
            f.steal_percent
        ));
    }
    if f.gpus.is_empty() {
        lines.push("There is no GPU. One that reads 1000 GB/s would raise every ceiling here by its share.".to_owned());
    }
    lines
}

/// Sentences about what would pay: what was measured here first, then what bytes promise.
pub fn levers(f: &Findings<'_>) -> Vec<String> {
    let mut lines = Vec::new();
    let mut named: Vec<&str> = Vec::new();
    for (tested, point) in f.kept {
        // The best point of each of a few levers.
        if named.len() == 6 || named.contains(&tested.lever.name.as_str()) {
            continue;
        }
        named.push(&tested.lever.name);
        let speedup = point.measured.as_ref().and_then(|m| m.speedup);
        let Some(speedup) = speedup else { continue };
        lines.push(format!(
            "Measured here: {} ({}) is {:.2} times as fast; {}.",
            tested.lever.title.to_lowercase(),
            point.arms[1],
            speedup.mean,
            point.in_unit
        ));
    }
    if !f.tested {
        lines.push("No lever was tested on this machine yet: moellon lever all, some minutes.".to_owned());
    }
    let now = f.cost.bytes(1.0);
    let mut promise = |what_if: &str, what: &str| {
        let Ok(parsed) = what_if.parse::<WhatIf>() else { return };
        let (Ok(then), before) = (f.cost.tok_per_s(&parsed), f.cost.bandwidth * f.cost.efficiency / now) else {
            return;
        };
        if then / before > 1.05 {
            lines.push(format!("By bytes: {what} could bring up to {:.2} times the tokens a second.", then / before));
        }
    };
    if let Some(experts) = f.cost.parts.iter().find(|p| p.component == "routed_experts")
        && experts.bits_per_weight > 4.0
    {
        promise("experts=3.5", "experts at 3.5 bits a weight (affine-3)");
    }
    if f.cost.parts.iter().any(|p| p.component == "attention" && p.bits_per_weight > 5.0) {
        promise("attention=4.5", "attention at 4.5 bits a weight (affine-4)");
    }
    promise("batch=8", "eight requests at once, together,");
    if f.cost.draft_bytes > 0.0 {
        promise("k=3,p=0.8", "two drafts a step of the MTP layer, right 8 times of 10,");
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use moellon_lab::roofline::Part;

    fn cost(bits: f64) -> CostModel {
        let part = |component: &str, bytes: f64| Part {
            component: component.to_owned(),
            formats: Vec::new(),
            bytes_per_token: bytes,
            bits_per_weight: bits,
        };
        CostModel {
            parts: vec![part("attention", 1e9), part("routed_experts", 1e9)],
            cache_bytes: 0.0,
            num_experts: 64.0,
            active_experts: 8.0,
            bandwidth: 20e9,
            efficiency: 1.0,
            draft_bytes: 0.0,
            unions: Vec::new(),
        }
    }

    fn findings<'a>(cost: &'a CostModel, one_thread: f64, free_bytes: u64) -> Findings<'a> {
        Findings {
            cores: 4,
            one_thread,
            all_threads: 20.0,
            steal_percent: 0.0,
            free_bytes,
            gpus: &[],
            cost,
            model: "m",
            model_bytes: 40 << 30,
            kept: &[],
            tested: false,
        }
    }

    #[test]
    fn limits_name_what_limits() {
        let cost = cost(16.0);
        let text = |one, free| limits(&findings(&cost, one, free)).join("\n");
        assert!(text(19.0, 64 << 30).contains("memory is the limit, not cores"));
        assert!(text(5.0, 64 << 30).contains("cores are the limit"));
        assert!(text(10.0, 64 << 30).contains("10.0 tok/s is the ceiling"));
        assert!(text(10.0, 8 << 30).contains("at disk speed") && !text(10.0, 64 << 30).contains("at disk speed"));
    }

    #[test]
    fn what_is_done_already_is_not_advised() {
        let (wide, narrow) = (cost(16.0), cost(3.5));
        let text = |cost: &CostModel| levers(&findings(cost, 10.0, 64 << 30)).join("\n");
        // 2 GB become 1 + 3.5 / 16.
        assert!(text(&wide).contains("experts at 3.5 bits a weight (affine-3) could bring up to 1.64 times"));
        assert!(!text(&narrow).contains("experts at 3.5") && !text(&narrow).contains("attention at"));
        assert!(text(&narrow).contains("eight requests at once") && !text(&narrow).contains("MTP"));
        assert!(text(&narrow).contains("moellon lever all"));
    }
}
