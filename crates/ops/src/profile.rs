//! Measures a step: a wrapper around any back end that adds up operations, bytes and seconds by [`Stage`].
//!
//! Routed experts count once per *distinct* expert of the batch, so the profiler reads the chosen ids back, and it waits
//! for the stream after every operation: use it for tables of stages, not for the speed of a step.

use crate::Result;
use crate::backend::{Backend, Stage};
use crate::buffer::Tensor;
use crate::ops::*;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

/// Operations, bytes and time of one stage.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct StageCount {
    /// Operations issued.
    pub operations: u64,
    /// Bytes that they must move.
    pub bytes: u64,
    /// Seconds from issue to completion.
    pub seconds: f64,
}

/// Counts of every stage since the last reset.
#[derive(Debug, Clone, Default)]
pub struct Profile {
    counts: [StageCount; Stage::ALL.len()],
    /// Distinct experts of the batch, added up over the MoE layers.
    pub distinct_experts: u64,
    /// MoE layers run.
    pub moe_layers: u64,
    /// How often each expert was chosen, by the layer's [`Experts::id`].
    choices: BTreeMap<u32, Vec<u64>>,
    /// Experts that a row chooses.
    active_experts: usize,
}

impl Profile {
    /// Counts of one stage.
    pub fn stage(&self, stage: Stage) -> StageCount {
        self.counts[Self::index(stage)]
    }

    /// Bytes of all stages.
    pub fn total_bytes(&self) -> u64 {
        self.counts.iter().map(|c| c.bytes).sum()
    }

    /// Seconds of all stages.
    pub fn total_seconds(&self) -> f64 {
        self.counts.iter().map(|c| c.seconds).sum()
    }

    /// Distinct experts that a layer reads for `rows` of the rows so far, any of them, a mean over layers: the sum over experts of
    /// the chance that one of `rows` rows, drawn from all without putting any back, chose it. `None` if none chose any.
    pub fn union_of_experts(&self, rows: usize) -> Option<f64> {
        let of_layer = |counts: &Vec<u64>| -> f64 {
            let seen = counts.iter().sum::<u64>() as f64 / self.active_experts.max(1) as f64;
            let nobody = |count: f64| -> f64 {
                (0..rows)
                    .map(|drawn| drawn as f64)
                    .map(|drawn| ((seen - count - drawn) / (seen - drawn).max(1.0)).max(0.0))
                    .product()
            };
            counts.iter().map(|count| 1.0 - nobody(*count as f64)).sum()
        };
        let layers: Vec<f64> = self.choices.values().map(of_layer).collect();
        (!layers.is_empty()).then(|| layers.iter().sum::<f64>() / layers.len() as f64)
    }

    fn index(stage: Stage) -> usize {
        Stage::ALL.iter().position(|s| *s == stage).expect("Stage::ALL names every stage")
    }
}

/// A back end that runs everything on another one and keeps a [`Profile`].
pub struct Profiler<'a> {
    backend: &'a mut dyn Backend,
    stage: Stage,
    profile: Profile,
}

impl<'a> Profiler<'a> {
    /// Starts counting on `backend`.
    pub fn new(backend: &'a mut dyn Backend) -> Self {
        Profiler { backend, stage: Stage::Embed, profile: Profile::default() }
    }

    /// The counts so far.
    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    fn timed(&mut self, bytes: u64, run: impl FnOnce(&mut dyn Backend) -> Result<()>) -> Result<()> {
        let start = Instant::now();
        run(self.backend)?;
        self.backend.synchronize()?;
        let count = &mut self.profile.counts[Profile::index(self.stage)];
        count.operations += 1;
        count.bytes += bytes;
        count.seconds += start.elapsed().as_secs_f64();
        Ok(())
    }

    fn chosen(&mut self, ids: Tensor) -> Result<Vec<u32>> {
        let mut chosen = vec![0; ids.rows * ids.cols];
        self.backend.read_u32(ids, &mut chosen)?;
        Ok(chosen)
    }
}

macro_rules! timed_operations {
    ($($method:ident: $op:ty),* $(,)?) => {
        $(fn $method(&mut self, op: &$op) -> Result<()> {
            self.timed(op.bytes(), |backend| backend.$method(op))
        })*
    };
}

impl Backend for Profiler<'_> {
    crate::forward_backend! {
        backend: caps alloc free write_f32 write_u32 read_f32 read_u32 synchronize
            alloc_cache read_cache write_cache load_weight load_experts
    }

    fn stage(&mut self, stage: Stage) {
        self.stage = stage;
        self.backend.stage(stage);
    }

    timed_operations! {
        embed: Embed,
        rope_table: RopeTable,
        rms_norm: RmsNorm,
        layer_norm: LayerNorm,
        linear: Linear<'_>,
        linear_heads: LinearHeads,
        rope: Rope,
        kv_store: KvStore<'_>,
        attend_gqa: AttendGqa,
        attend_mla: AttendMla,
        index_score: IndexScore,
        index_topk: IndexTopk,
        route: Route,
        gate_up: GateUp,
        add: Add,
        gather_rows: GatherRows,
        argmax: Argmax,
        sample: Sample,
    }

    fn moe_gate_up(&mut self, op: &MoeGateUp) -> Result<()> {
        let chosen = self.chosen(op.ids)?;
        let distinct = distinct(&chosen);
        let counts = self.profile.choices.entry(op.experts.id).or_default();
        counts.resize(op.experts.num_experts, 0);
        chosen.iter().for_each(|expert| counts[*expert as usize] += 1);
        self.profile.active_experts = op.ids.cols;
        self.profile.distinct_experts += distinct as u64;
        self.profile.moe_layers += 1;
        self.timed(op.bytes(distinct), |backend| backend.moe_gate_up(op))
    }

    fn moe_down(&mut self, op: &MoeDown) -> Result<()> {
        let distinct = distinct(&self.chosen(op.ids)?);
        self.timed(op.bytes(distinct), |backend| backend.moe_down(op))
    }
}

fn distinct(chosen: &[u32]) -> usize {
    chosen.iter().collect::<BTreeSet<_>>().len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_union_is_that_of_the_choices() {
        let of = |choices: &[&[u64]]| Profile {
            choices: choices.iter().enumerate().map(|(i, counts)| (i as u32, counts.to_vec())).collect(),
            active_experts: 2,
            ..Profile::default()
        };
        let even = of(&[&[10; 8]]);
        // Of 40 rows 30 did not choose an expert: 8 (1 - 30/40 29/39 28/38).
        assert!((even.union_of_experts(1).unwrap() - 2.0).abs() < 1e-12);
        assert!(
            (even.union_of_experts(3).unwrap() - 8.0 * (1.0 - 30.0 * 29.0 * 28.0 / (40.0 * 39.0 * 38.0))).abs() < 1e-12
        );
        // All rows together read every expert that any of them chose.
        assert_eq!(even.union_of_experts(40), Some(8.0));
        // A layer whose rows all choose the same two reads these alone; layers are a mean.
        let fixed = of(&[&[40, 0, 40, 0]]);
        assert!((fixed.union_of_experts(5).unwrap() - 2.0).abs() < 1e-12);
        let both = of(&[&[10; 8], &[40, 0, 40, 0]]);
        let mean = 0.5 * (2.0 + even.union_of_experts(5).unwrap());
        assert!((both.union_of_experts(5).unwrap() - mean).abs() < 1e-12);
        assert_eq!(Profile::default().union_of_experts(1), None);
    }
}
