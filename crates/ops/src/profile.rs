//! Measures a step: a wrapper around any back end that adds up operations, bytes and seconds by [`Stage`].
//!
//! Routed experts count once per *distinct* expert of the batch, so the profiler reads the chosen ids back, and it waits
//! for the stream after every operation: use it for tables of stages, not for the speed of a step.

use crate::Result;
use crate::backend::{Backend, Caps, Stage};
use crate::buffer::{Buffer, Cache, CacheDtype, ElementType, Tensor};
use crate::ops::*;
use crate::weight::{Experts, ExpertsSource, Weight, WeightSource};
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

    fn count_distinct(&mut self, ids: Tensor) -> Result<usize> {
        let mut chosen = vec![0; ids.rows * ids.cols];
        self.backend.read_u32(ids, &mut chosen)?;
        chosen.sort_unstable();
        chosen.dedup();
        Ok(chosen.len())
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
    fn caps(&self) -> &Caps {
        self.backend.caps()
    }

    fn alloc(&mut self, what: &str, element: ElementType, len: usize) -> Result<Buffer> {
        self.backend.alloc(what, element, len)
    }

    fn free(&mut self, buffer: Buffer) {
        self.backend.free(buffer);
    }

    fn write_f32(&mut self, dst: Tensor, src: &[f32]) -> Result<()> {
        self.backend.write_f32(dst, src)
    }

    fn write_u32(&mut self, dst: Tensor, src: &[u32]) -> Result<()> {
        self.backend.write_u32(dst, src)
    }

    fn read_f32(&mut self, src: Tensor, dst: &mut [f32]) -> Result<()> {
        self.backend.read_f32(src, dst)
    }

    fn read_u32(&mut self, src: Tensor, dst: &mut [u32]) -> Result<()> {
        self.backend.read_u32(src, dst)
    }

    fn synchronize(&mut self) -> Result<()> {
        self.backend.synchronize()
    }

    fn alloc_cache(&mut self, what: &str, dtype: CacheDtype, num_slots: usize, width: usize) -> Result<Cache> {
        self.backend.alloc_cache(what, dtype, num_slots, width)
    }

    fn read_cache(&mut self, cache: Cache, first_slot: usize, dst: &mut [u8]) -> Result<()> {
        self.backend.read_cache(cache, first_slot, dst)
    }

    fn write_cache(&mut self, cache: Cache, first_slot: usize, src: &[u8]) -> Result<()> {
        self.backend.write_cache(cache, first_slot, src)
    }

    fn load_weight(&mut self, source: &WeightSource<'_>) -> Result<Weight> {
        self.backend.load_weight(source)
    }

    fn load_experts(&mut self, source: &ExpertsSource<'_>) -> Result<Experts> {
        self.backend.load_experts(source)
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
    }

    fn moe_gate_up(&mut self, op: &MoeGateUp) -> Result<()> {
        let distinct = self.count_distinct(op.ids)?;
        self.profile.distinct_experts += distinct as u64;
        self.profile.moe_layers += 1;
        self.timed(op.bytes(distinct), |backend| backend.moe_gate_up(op))
    }

    fn moe_down(&mut self, op: &MoeDown) -> Result<()> {
        let distinct = self.count_distinct(op.ids)?;
        self.timed(op.bytes(distinct), |backend| backend.moe_down(op))
    }
}
