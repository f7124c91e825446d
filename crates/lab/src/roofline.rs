//! What a step costs by its bytes, and what it would cost if something were otherwise. One model of cost for the roofline,
//! for every what-if and for the report, and it is held against measurements ([`CostModel::check`]).
//!
//! A step reads what all tokens share once, each *distinct* expert once and each sequence's cache. How many experts independent
//! tokens have together follows from how often each is chosen, which the profile of a prompt counts; before anything was counted
//! all are equally likely (`U(B) = E (1 - (1 - k/E)^B)`). The time of a step is those bytes over the bandwidth, longer by the share
//! that the engine loses at batch 1. That share is the only thing that is fitted.

use moellon_model::ModelConfig;
use moellon_model::account::{Account, Component, cache_bytes_read};
use moellon_ops::CacheDtype;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A step is bound by bandwidth if reading takes three quarters of its time, could memory do nothing else; below, something else
/// decides.
pub const BOUND_SHARE: f64 = 0.75;

/// Share of experts that neighbouring tokens have in common where nobody counted: what GLM-4.7-Flash's were seen to share.
pub const OVERLAP: f64 = 0.26;

/// Bytes of one component that a token at batch 1 reads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Part {
    /// Name of the component.
    pub component: String,
    /// Formats, the one with the most bytes first.
    pub formats: Vec<String>,
    /// Bytes.
    pub bytes_per_token: f64,
    /// Bits of a weight, scales included; 0 where nothing is read.
    pub bits_per_weight: f64,
}

/// What a model's steps cost on a machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CostModel {
    /// By component; routed experts are those of one token.
    pub parts: Vec<Part>,
    /// Bytes of cache that one sequence reads.
    pub cache_bytes: f64,
    /// Experts of a layer.
    pub num_experts: f64,
    /// Experts that a token uses.
    pub active_experts: f64,
    /// Measured read bandwidth, bytes a second.
    pub bandwidth: f64,
    /// Share of it that a step of one token reaches; 1 before anything was measured.
    pub efficiency: f64,
    /// Bytes that one draft of the MTP layer reads; 0 without one.
    pub draft_bytes: f64,
    /// Distinct experts by rows, increasing, as counted choices say; empty before anything was counted.
    #[serde(default)]
    pub unions: Vec<(f64, f64)>,
}

impl CostModel {
    /// From a model's account, at `context` cached positions.
    pub fn new(account: &Account, config: &ModelConfig, context: usize, bandwidth: f64) -> Self {
        let part = |component: Component| {
            let sum = account.component(component);
            let bits =
                if sum.active_parameters > 0.0 { 8.0 * sum.bytes_per_token / sum.active_parameters } else { 0.0 };
            Part {
                component: component.name().to_owned(),
                formats: account.formats(component),
                bytes_per_token: sum.bytes_per_token,
                bits_per_weight: bits,
            }
        };
        CostModel {
            parts: Component::ALL.into_iter().map(part).filter(|p| p.bytes_per_token > 0.0).collect(),
            cache_bytes: cache_bytes_read(config, CacheDtype::Bf16, context) as f64,
            num_experts: config.moe.num_experts as f64,
            active_experts: config.moe.num_experts_per_tok as f64,
            bandwidth,
            efficiency: 1.0,
            draft_bytes: account.mtp().bytes_per_token,
            unions: Vec::new(),
        }
    }

    /// The same, for an engine that takes `seconds` for a step of one token.
    #[must_use]
    pub fn calibrated(self, seconds: f64) -> Self {
        let efficiency = self.bytes(1.0) / self.bandwidth / seconds;
        CostModel { efficiency, ..self }
    }

    /// Distinct experts that `rows` independent tokens choose: as counted, or else with equal chances.
    pub fn distinct_experts(&self, rows: f64) -> f64 {
        if self.num_experts == 0.0 {
            return 0.0;
        }
        // Between two counts by their logarithms: the curve is nearly straight there.
        let after = self.unions.partition_point(|(n, _)| *n < rows);
        match (after.checked_sub(1).map(|before| self.unions[before]), self.unions.get(after)) {
            (_, Some(&(n, union))) if n == rows => return union,
            (Some((n0, u0)), Some(&(n1, u1))) => return u0 + (u1 - u0) * (rows / n0).ln() / (n1 / n0).ln(),
            _ => {}
        }
        self.num_experts * (1.0 - (1.0 - self.active_experts / self.num_experts).powf(rows))
    }

    /// Distinct experts of `rows` neighbouring tokens of one text, of which two share the fraction `overlap`.
    pub fn related_experts(&self, rows: usize, overlap: f64) -> f64 {
        let (all, each) = (self.num_experts, self.active_experts);
        (1..rows).fold(each, |u, _| u + each * (1.0 - overlap) * (1.0 - (u - each) / (all - each).max(1e-9)))
    }

    /// Bytes that a step of `batch` sequences reads.
    pub fn bytes(&self, batch: f64) -> f64 {
        self.bytes_of(self.distinct_experts(batch), batch)
    }

    /// Bytes that a step of `batch` copies of one text reads: they choose the experts of one token.
    pub fn bytes_of_copies(&self, batch: f64) -> f64 {
        self.bytes_of(self.active_experts, batch)
    }

    /// Bytes of a step that verifies `drafts` drafts of one sequence (a mean over steps, so it may be a fraction), which are made
    /// for nothing; neighbouring tokens share `overlap` of their experts.
    pub fn verify_bytes(&self, drafts: f64, overlap: f64) -> f64 {
        let of = |drafts: f64| self.bytes_of(self.related_experts(drafts as usize + 1, overlap), 1.0);
        let (low, high) = (of(drafts.floor()), of(drafts.ceil()));
        low + (high - low) * drafts.fract()
    }

    fn bytes_of(&self, distinct: f64, sequences: f64) -> f64 {
        let is_routed = |p: &&Part| p.component == Component::RoutedExperts.name();
        let routed: f64 = self.parts.iter().filter(is_routed).map(|p| p.bytes_per_token).sum();
        let shared: f64 = self.parts.iter().map(|p| p.bytes_per_token).sum::<f64>() - routed;
        let union = if self.active_experts > 0.0 { distinct / self.active_experts } else { 0.0 };
        shared + routed * union + sequences * self.cache_bytes
    }

    /// Seconds that a step of `batch` sequences cannot beat.
    pub fn ceiling_seconds(&self, batch: f64) -> f64 {
        self.bytes(batch) / self.bandwidth
    }

    /// Seconds that a step of `batch` sequences takes, as far as bytes decide.
    pub fn seconds(&self, batch: f64) -> f64 {
        self.ceiling_seconds(batch) / self.efficiency
    }

    /// How many times as fast one sequence decodes if `drafts` are verified in each step, each right with the chance
    /// `acceptance` given those before it, where neighbouring tokens share `overlap` of their experts.
    pub fn speculation(&self, drafts: usize, acceptance: f64, overlap: f64) -> f64 {
        let tokens: f64 = (0..=drafts).map(|i| acceptance.powi(i as i32)).sum();
        let plain = self.bytes(1.0);
        let verify = self.verify_bytes(drafts as f64, overlap) + drafts as f64 * self.draft_bytes;
        // What is no reading (launches, small operations) is paid once a step, drafted or not.
        let other = plain * (1.0 / self.efficiency - 1.0);
        tokens * (plain + other) / (verify + other)
    }

    /// Holds the prediction against measured steps: (batch, seconds, distinct experts that were counted).
    pub fn check(&self, measured: &[(usize, f64, f64)]) -> Vec<BatchPoint> {
        let point = |&(batch, seconds, distinct): &(usize, f64, f64)| {
            let predicted = self.seconds(batch as f64);
            let share = self.bytes_of(distinct, batch as f64) / self.bandwidth / seconds;
            BatchPoint {
                batch,
                measured_ms: seconds * 1e3,
                predicted_ms: predicted * 1e3,
                error: predicted / seconds - 1.0,
                bandwidth_share: share,
                bandwidth_bound: share >= BOUND_SHARE,
                distinct_experts: distinct,
                predicted_experts: self.distinct_experts(batch as f64),
            }
        };
        measured.iter().map(point).collect()
    }

    /// The same with what `what_if` says otherwise.
    ///
    /// # Errors
    /// A component that the model does not have, by name.
    pub fn with(&self, what_if: &WhatIf) -> Result<CostModel, String> {
        let mut model = self.clone();
        for (component, bits) in &what_if.bits {
            let known: Vec<&str> = self.parts.iter().map(|p| p.component.as_str()).collect();
            let named = |part: &&mut Part| match component.as_str() {
                "experts" => part.component == "routed_experts",
                "shared" => part.component == "shared_experts",
                "all" => !matches!(part.component.as_str(), "norms" | "router"),
                name => part.component == name,
            };
            let mut found = false;
            for part in model.parts.iter_mut().filter(named) {
                if part.bits_per_weight > 0.0 {
                    part.bytes_per_token *= bits / part.bits_per_weight;
                    part.bits_per_weight = *bits;
                    found = true;
                }
            }
            if !found {
                return Err(format!("what-if {component} is no part, expected experts, all, {}", known.join(", ")));
            }
        }
        if let Some(gb_s) = what_if.bandwidth_gb_s {
            model.bandwidth = gb_s * 1e9;
        }
        Ok(model)
    }

    /// Tokens a second under `what_if`, all sequences together.
    ///
    /// # Errors
    /// As [`CostModel::with`].
    pub fn tok_per_s(&self, what_if: &WhatIf) -> Result<f64, String> {
        let model = self.with(what_if)?;
        let batch = what_if.batch.unwrap_or(1) as f64;
        let plain = batch / model.seconds(batch);
        Ok(match what_if.rows {
            Some(rows) => {
                plain * model.speculation(rows.saturating_sub(1), what_if.acceptance.unwrap_or(0.8), what_if.overlap)
            }
            None => plain,
        })
    }
}

/// A predicted and a measured step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BatchPoint {
    /// Sequences.
    pub batch: usize,
    /// Median step.
    pub measured_ms: f64,
    /// By bytes, fitted at batch 1 alone.
    pub predicted_ms: f64,
    /// Predicted over measured, less 1.
    pub error: f64,
    /// Bytes over time, of the measured bandwidth.
    pub bandwidth_share: f64,
    /// Whether bandwidth decides: a share of [`BOUND_SHARE`] or more.
    pub bandwidth_bound: bool,
    /// Counted.
    pub distinct_experts: f64,
    /// By [`CostModel::distinct_experts`].
    pub predicted_experts: f64,
}

/// Something that is otherwise.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct WhatIf {
    /// Bits of a weight, scales included, by component (`experts`, `attention`, `head`, `all`, ..).
    pub bits: BTreeMap<String, f64>,
    /// Sequences at once.
    pub batch: Option<usize>,
    /// Rows of one sequence that each step verifies: one is sure, the others are drafts.
    pub rows: Option<usize>,
    /// Chance that a draft is right given those before it.
    pub acceptance: Option<f64>,
    /// Share of experts that neighbouring tokens have in common.
    pub overlap: f64,
    /// Another machine.
    pub bandwidth_gb_s: Option<f64>,
}

impl std::str::FromStr for WhatIf {
    type Err = String;

    /// `experts=3,attention=3.5,batch=8,k=3,p=0.8,overlap=0.26,bandwidth=819`, any of them.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut what_if = WhatIf { overlap: OVERLAP, ..WhatIf::default() };
        for field in text.split(',').map(str::trim) {
            let form = || format!("{field}: expected NAME=NUMBER, e.g. experts=3, batch=8, k=3, p=0.8, bandwidth=819");
            let (name, value) = field.split_once('=').ok_or_else(form)?;
            let number: f64 = value.trim().trim_end_matches(" bit").parse().map_err(|_| form())?;
            let whole = || ((1.0..=1024.0).contains(&number) && number.fract() == 0.0).then_some(number as usize);
            let share = || (0.0..=1.0).contains(&number).then_some(number);
            let positive = || (number.is_finite() && number > 0.0).then_some(number);
            let range = |expected: &str| format!("{field}: expected {expected}");
            match name.trim() {
                "batch" => what_if.batch = Some(whole().ok_or_else(|| range("1 to 1024"))?),
                "k" => what_if.rows = Some(whole().ok_or_else(|| range("1 to 1024"))?),
                "p" => what_if.acceptance = Some(share().ok_or_else(|| range("0 to 1"))?),
                "overlap" => what_if.overlap = share().ok_or_else(|| range("0 to 1"))?,
                "bandwidth" => what_if.bandwidth_gb_s = Some(positive().ok_or_else(|| range("GB/s above 0"))?),
                component => {
                    let bits =
                        positive().filter(|bits| *bits <= 32.0).ok_or_else(|| range("bits above 0, at most 32"))?;
                    what_if.bits.insert(component.to_owned(), bits);
                }
            }
        }
        Ok(what_if)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// GLM-5.2 with 77 experts: routed experts affine-3, the rest affine-4.
    fn glm() -> CostModel {
        let part = |component: &str, bytes_per_token: f64, bits_per_weight: f64| Part {
            component: component.to_owned(),
            formats: Vec::new(),
            bytes_per_token,
            bits_per_weight,
        };
        CostModel {
            parts: vec![part("attention", 10.17e9, 4.5), part("routed_experts", 9.91e9, 3.5)],
            cache_bytes: 0.0,
            num_experts: 77.0,
            active_experts: 8.0,
            bandwidth: 614e9,
            efficiency: 1.0,
            draft_bytes: 0.0,
            unions: Vec::new(),
        }
    }

    #[test]
    fn counted_choices_say_what_a_batch_reads() {
        let counted = CostModel { unions: vec![(1.0, 8.0), (4.0, 20.0), (8.0, 30.0)], ..glm() };
        assert_eq!([1.0, 4.0, 8.0].map(|rows| counted.distinct_experts(rows)), [8.0, 20.0, 30.0]);
        assert!((counted.distinct_experts(2.0) - 14.0).abs() < 1e-12);
        // Beyond what was counted all are equally likely.
        assert_eq!(counted.distinct_experts(16.0), glm().distinct_experts(16.0));
        assert!((counted.bytes_of_copies(8.0) - counted.bytes(1.0)).abs() < 1.0);
        assert!(counted.verify_bytes(1.5, 0.26) > counted.verify_bytes(1.0, 0.26));
    }

    #[test]
    fn the_batch_curve_is_that_of_the_formula() {
        // docs/performance.md: cost of a step, by rows.
        let model = glm();
        for (rows, cost) in [(1.0, 1.0), (2.0, 1.44), (4.0, 2.19), (8.0, 3.28), (32.0, 5.11)] {
            let found = model.bytes(rows) / model.bytes(1.0);
            assert!((found - cost).abs() < 0.02, "{rows}: {found}");
        }
        assert!((1.0 / model.seconds(1.0) - 30.6).abs() < 0.1);
        // Half the bandwidth reached: every step takes twice as long.
        let slow = model.clone().calibrated(2.0 * model.seconds(1.0));
        assert!((slow.efficiency - 0.5).abs() < 1e-12);
        assert!((slow.seconds(8.0) / model.seconds(8.0) - 2.0).abs() < 1e-12);
    }

    #[test]
    fn speculation_is_priced_by_the_union() {
        // The table for free drafts at overlap 0.26 (draft cost 0.024 of a step there): 1.40 for two drafts at 0.8.
        let model = CostModel { draft_bytes: 0.024 * glm().bytes(1.0), ..glm() };
        let gain = model.speculation(2, 0.8, 0.26);
        assert!((gain - 1.40).abs() < 0.03, "{gain}");
        assert!((model.speculation(0, 0.8, 0.26) - 1.0).abs() < 1e-9);
        // Time that is not reading makes drafts cheaper.
        let slow = CostModel { efficiency: 0.7, ..model };
        assert!(slow.speculation(2, 0.8, 0.26) > gain);
    }

    #[test]
    fn what_if_changes_what_it_names() {
        let model = glm();
        let speed = |text: &str| model.tok_per_s(&text.parse().unwrap()).unwrap();
        assert!((speed("bandwidth=819") - 819e9 / 20.08e9).abs() < 1e-9);
        // 3 bits of 3.5: a seventh of the experts' bytes is gone.
        assert!((speed("experts=3") - 614e9 / (10.17e9 + 9.91e9 * 3.0 / 3.5)).abs() < 1e-9);
        assert!((speed("batch=8") / speed("batch=1") - 2.44).abs() < 0.02);
        assert!(speed("k=3,p=0.8") > 1.3 * speed("batch=1"));
        let error = |text: &str| text.parse::<WhatIf>().unwrap_err();
        assert_eq!(error("batch=0"), "batch=0: expected 1 to 1024");
        assert!(error("batch").starts_with("batch: expected NAME=NUMBER"));
        assert!(model.tok_per_s(&"wings=3".parse().unwrap()).unwrap_err().contains("wings is no part"));
    }

    #[test]
    fn a_step_below_the_bound_is_said_to_be() {
        let model = glm().calibrated(1.2 * glm().seconds(1.0));
        let measured = [(1, model.seconds(1.0), 8.0), (8, 2.0 * model.seconds(8.0), 45.0)];
        let points = model.check(&measured);
        assert!(points[0].bandwidth_bound && points[0].error.abs() < 1e-9);
        assert!(!points[1].bandwidth_bound && (points[1].error + 0.5).abs() < 1e-9);
    }
}
