//! The trait that a back end implements: memory, weights, and one method an operation.

use crate::buffer::{Buffer, Cache, CacheDtype, ElementType, Tensor};
use crate::ops::*;
use crate::weight::{Experts, ExpertsSource, Weight, WeightSource};
use crate::{Error, Result};
use moellon_tensor::WeightFormat;
use std::fmt;

/// How a back end multiplies activations with quantized weights. Conformance derives its tolerances from this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActivationPrecision {
    /// f32 activations, f32 accumulation.
    Exact,
    /// Activations as 8-bit integers with one f32 scale per 32 columns (the CPU: per 64, where the weights' own groups have as many or
    /// more), for quantized weights; f32 for plain ones.
    Int8,
    /// Activations rounded to bfloat16 or binary16 for quantized weights (tensor cores).
    Half,
}

/// The weight formats that a back end has kernels for, one bit a family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WeightFormatSet(u32);

impl WeightFormatSet {
    /// Every format that exists.
    pub const ALL: Self = WeightFormatSet(u32::MAX);

    /// None.
    pub const NONE: Self = WeightFormatSet(0);

    /// This set and the family of `format`.
    #[must_use]
    pub const fn with(self, format: WeightFormat) -> Self {
        WeightFormatSet(self.0 | 1 << Self::family(format))
    }

    /// Whether the family of `format` is in the set.
    pub const fn contains(self, format: WeightFormat) -> bool {
        self.0 & 1 << Self::family(format) != 0
    }

    const fn family(format: WeightFormat) -> u32 {
        match format {
            WeightFormat::F32 => 0,
            WeightFormat::F16 => 1,
            WeightFormat::Bf16 => 2,
            WeightFormat::Fp8Block { .. } => 3,
            WeightFormat::Mxfp4 => 4,
            WeightFormat::Mxfp8 => 5,
            WeightFormat::Nvfp4 => 6,
            WeightFormat::Affine { bits, .. } => 8 + bits as u32,
        }
    }
}

impl fmt::Display for WeightFormatSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names =
            ["f32", "f16", "bf16", "fp8", "mxfp4", "mxfp8", "nvfp4", "", "", "", "affine-2", "affine-3", "affine-4"]
                .into_iter()
                .chain(["affine-5", "affine-6", "", "affine-8"]);
        let names: Vec<&str> =
            names.enumerate().filter(|(i, n)| !n.is_empty() && self.0 & 1 << i != 0).map(|(_, n)| n).collect();
        f.write_str(&names.join(", "))
    }
}

/// What a back end is and can do.
#[derive(Debug, Clone)]
pub struct Caps {
    /// `cpu`, `cuda`, `wgpu`, `reference`.
    pub name: &'static str,
    /// The device in words, e.g. `AMD EPYC, 2 threads, avx512-vnni`.
    pub device: String,
    /// How activations meet quantized weights.
    pub activations: ActivationPrecision,
    /// Formats that loading accepts.
    pub formats: WeightFormatSet,
    /// Bytes that weights and caches may take in all, where the device says so.
    pub memory_bytes: Option<u64>,
    /// Whether tokens can be drawn where the logits are ([`Sample`]). Elsewhere whoever draws reads the logits: on the host they are near
    /// already.
    pub samples: bool,
}

/// A part of a step, for profilers: the same names in the same order everywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stage {
    /// Token ids to hidden states, rope tables.
    Embed,
    /// Norm and projections before attention, rope, cache store.
    AttentionInput,
    /// Index keys, scores and top-k of sparse attention.
    Indexer,
    /// Attention proper.
    Attention,
    /// Value un-absorption and output projection.
    AttentionOutput,
    /// Dense feed-forward.
    DenseFfn,
    /// Norm, router and top-k.
    Router,
    /// Routed experts.
    Experts,
    /// Shared expert.
    SharedExpert,
    /// Final norm and head.
    Head,
    /// The MTP layer's input projection (its layer counts under the stages above).
    Mtp,
}

impl Stage {
    /// All stages in the order of a step.
    pub const ALL: [Stage; 11] = [
        Stage::Embed,
        Stage::AttentionInput,
        Stage::Indexer,
        Stage::Attention,
        Stage::AttentionOutput,
        Stage::DenseFfn,
        Stage::Router,
        Stage::SharedExpert,
        Stage::Experts,
        Stage::Head,
        Stage::Mtp,
    ];

    /// The name that tables print.
    pub const fn name(self) -> &'static str {
        match self {
            Stage::Embed => "embed",
            Stage::AttentionInput => "attention input",
            Stage::Indexer => "indexer",
            Stage::Attention => "attention",
            Stage::AttentionOutput => "attention output",
            Stage::DenseFfn => "dense ffn",
            Stage::Router => "router",
            Stage::Experts => "experts",
            Stage::SharedExpert => "shared expert",
            Stage::Head => "head",
            Stage::Mtp => "mtp",
        }
    }
}

/// Seconds of a recorded step by the device's own clock.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct StepTimes {
    /// The whole step, as it always runs.
    pub step: f64,
    /// Each stage, in the order of [`Stage::ALL`], in a run of its own: reading the clock in between costs a little.
    pub stages: [f64; Stage::ALL.len()],
}

/// One kernel of a recorded step.
#[derive(Debug, Clone, PartialEq)]
pub struct KernelTime {
    /// Its name.
    pub name: String,
    /// Seconds from the end of what was before it to its own end, by the device's clock.
    pub seconds: f64,
}

/// A device that runs operations. Operations append to one in-order stream: each sees the results of those before it;
/// `read_*` waits for the stream.
///
/// Every method validates its operation first ([`Linear::validate`] and so on) and returns the contract's error.
pub trait Backend: Send {
    /// What this back end is and can do.
    fn caps(&self) -> &Caps;

    /// Allocates `len` elements, zeroed. `what` names the purpose in errors.
    fn alloc(&mut self, what: &str, element: ElementType, len: usize) -> Result<Buffer>;

    /// Frees a buffer. Views of it must not be used again.
    fn free(&mut self, buffer: Buffer);

    /// Copies host floats `[rows * cols]` into `dst`.
    fn write_f32(&mut self, dst: Tensor, src: &[f32]) -> Result<()>;

    /// Copies host integers `[rows * cols]` into `dst`.
    fn write_u32(&mut self, dst: Tensor, src: &[u32]) -> Result<()>;

    /// Waits for the stream and copies `src` to the host, `[rows * cols]`.
    fn read_f32(&mut self, src: Tensor, dst: &mut [f32]) -> Result<()>;

    /// Waits for the stream and copies `src` to the host, `[rows * cols]`.
    fn read_u32(&mut self, src: Tensor, dst: &mut [u32]) -> Result<()>;

    /// Waits until everything appended so far has run.
    fn synchronize(&mut self) -> Result<()> {
        Ok(())
    }

    /// Read bandwidth of the device's memory, measured now, in bytes a second; `None` for a back end on the host's memory.
    fn measure_read(&mut self) -> Result<Option<f64>> {
        Ok(None)
    }

    /// Whether steps are recorded. A caller then rounds sizes that change from step to step (`max_context`), so that few
    /// different steps exist; see [`Backend::replay`].
    fn records_steps(&self) -> bool {
        false
    }

    /// Runs the step recorded under `key`, if there is one. Two steps have the same key only if they are the same operations
    /// with the same arguments: what differs is the contents of buffers.
    fn replay(&mut self, _key: u64) -> Result<bool> {
        Ok(false)
    }

    /// The operations up to [`Backend::end_recording`] are the step `key`. No host copies in between.
    fn begin_recording(&mut self, _key: u64) -> Result<()> {
        Ok(())
    }

    /// Ends the step; `complete` is false where an operation failed, and nothing is kept.
    fn end_recording(&mut self, _complete: bool) -> Result<()> {
        Ok(())
    }

    /// Runs the step recorded under `key` and says how long it took by the device's own clock; `None` where there is no such clock or no
    /// such step.
    fn time_replay(&mut self, _key: u64) -> Result<Option<StepTimes>> {
        Ok(None)
    }

    /// Runs the step recorded under `key` kernel by kernel and says how long each took, in their order; nothing where there is no such step
    /// or no clock for kernels.
    fn time_kernels(&mut self, _key: u64) -> Result<Vec<KernelTime>> {
        Ok(Vec::new())
    }

    /// Allocates a cache of `num_slots` rows of `width` elements.
    fn alloc_cache(&mut self, what: &str, dtype: CacheDtype, num_slots: usize, width: usize) -> Result<Cache>;

    /// Waits for the stream and copies rows `first_slot ..` of a cache to the host, as many as `dst` holds: row after row in
    /// the cache's type, little-endian, whatever the back end's own layout.
    fn read_cache(&mut self, cache: Cache, first_slot: usize, dst: &mut [u8]) -> Result<()>;

    /// Copies rows that [`Backend::read_cache`] gave into a cache of the same type and width, from `first_slot` on.
    fn write_cache(&mut self, cache: Cache, first_slot: usize, src: &[u8]) -> Result<()>;

    /// Repacks a linear layer into the back end's layout.
    fn load_weight(&mut self, source: &WeightSource<'_>) -> Result<Weight>;

    /// Repacks the experts of a layer into the back end's layout.
    fn load_experts(&mut self, source: &ExpertsSource<'_>) -> Result<Experts>;

    /// Says which part of the step the next operations belong to. Profilers listen; others ignore it.
    fn stage(&mut self, _stage: Stage) {}

    /// [`Embed`]
    fn embed(&mut self, op: &Embed) -> Result<()>;
    /// [`RopeTable`]
    fn rope_table(&mut self, op: &RopeTable) -> Result<()>;
    /// [`RmsNorm`]
    fn rms_norm(&mut self, op: &RmsNorm) -> Result<()>;
    /// [`LayerNorm`]
    fn layer_norm(&mut self, op: &LayerNorm) -> Result<()>;
    /// [`Linear`]
    fn linear(&mut self, op: &Linear<'_>) -> Result<()>;
    /// [`LinearHeads`]
    fn linear_heads(&mut self, op: &LinearHeads) -> Result<()>;
    /// [`Rope`]
    fn rope(&mut self, op: &Rope) -> Result<()>;
    /// [`KvStore`]
    fn kv_store(&mut self, op: &KvStore<'_>) -> Result<()>;
    /// [`AttendGqa`]
    fn attend_gqa(&mut self, op: &AttendGqa) -> Result<()>;
    /// [`AttendMla`]
    fn attend_mla(&mut self, op: &AttendMla) -> Result<()>;
    /// [`IndexScore`]
    fn index_score(&mut self, op: &IndexScore) -> Result<()>;
    /// [`IndexTopk`]
    fn index_topk(&mut self, op: &IndexTopk) -> Result<()>;
    /// [`Route`]
    fn route(&mut self, op: &Route) -> Result<()>;
    /// [`MoeGateUp`]
    fn moe_gate_up(&mut self, op: &MoeGateUp) -> Result<()>;
    /// [`MoeDown`]
    fn moe_down(&mut self, op: &MoeDown) -> Result<()>;
    /// [`GateUp`]
    fn gate_up(&mut self, op: &GateUp) -> Result<()>;
    /// [`Add`]
    fn add(&mut self, op: &Add) -> Result<()>;
    /// [`GatherRows`]
    fn gather_rows(&mut self, op: &GatherRows) -> Result<()>;
    /// [`Argmax`]
    fn argmax(&mut self, op: &Argmax) -> Result<()>;
    /// [`Sample`], where [`Caps::samples`] says so.
    fn sample(&mut self, op: &Sample) -> Result<()> {
        op.validate()?;
        let message = "does not draw tokens: Caps::samples says so".to_owned();
        Err(Error::Device { backend: self.caps().name, message })
    }
}
