//! Chains of turns: operations of the seam with weights, caches and inputs for them.

use super::{LadderPlan, Operation, Result};
use crate::bench::Error;
use moellon_model::config::{Attention, Gqa, Mla, ModelConfig};
use moellon_model::synthetic::FormatPlan;
use moellon_ops::conformance::Tolerance;
use moellon_ops::{
    AttendGqa, AttendMla, Backend, Buffer, Cache, CacheDtype, ElementType, Experts, ExpertsSource, Linear, LinearHeads,
    MoeDown, MoeGateUp, Paging, RmsNorm, Route, Tensor, Weight, WeightSource,
};
use moellon_tensor::rng::SplitMix64;
use moellon_tensor::{MatrixView, OwnedMatrix, WeightFormat};

/// Bytes that the turns of a chain read together at least, where weights can be copied that often: many times any cache.
const CHAIN_BYTES: u64 = 512 << 20;
/// Most turns.
const MOST_TURNS: usize = 32;
/// Matrices that are drawn; experts repeat them. A prime, so that a wrong expert seldom has the right weights.
const DRAWN: usize = 5;
/// Rows of a cache that are drawn; it repeats them. No multiple of a block.
const DRAWN_SLOTS: usize = 1009;
/// Slots of a block.
const BLOCK: usize = 64;

/// One operation with its arguments.
#[derive(Debug, Clone, Copy)]
pub(super) enum Step {
    Norm(RmsNorm),
    Route(Route),
    GateUp(MoeGateUp),
    Down(MoeDown),
    /// `out = x weightᵀ`: (x, weight, out).
    Product(Tensor, Weight, Tensor),
    Heads(LinearHeads),
    Latent(AttendMla),
    Grouped(AttendGqa),
}

impl Step {
    pub(super) fn run(&self, backend: &mut dyn Backend) -> moellon_ops::Result<()> {
        match self {
            Step::Norm(op) => backend.rms_norm(op),
            Step::Route(op) => backend.route(op),
            Step::GateUp(op) => backend.moe_gate_up(op),
            Step::Down(op) => backend.moe_down(op),
            Step::Product(x, weight, out) => backend.linear(&Linear { x: *x, parts: &[(*weight, *out)] }),
            Step::Heads(op) => backend.linear_heads(op),
            Step::Latent(op) => backend.attend_mla(op),
            Step::Grouped(op) => backend.attend_gqa(op),
        }
    }

    pub(super) fn name(&self) -> &'static str {
        match self {
            Step::Norm(_) => "rms_norm",
            Step::Route(_) => "route",
            Step::GateUp(_) => "moe_gate_up",
            Step::Down(_) => "moe_down",
            Step::Product(..) => "linear",
            Step::Heads(_) => "linear_heads",
            Step::Latent(_) => "attend_mla",
            Step::Grouped(_) => "attend_gqa",
        }
    }

    pub(super) fn outputs(&self) -> Vec<Tensor> {
        match self {
            Step::Norm(op) => vec![op.out],
            Step::Route(op) => vec![op.ids, op.weights],
            Step::GateUp(op) => vec![op.out],
            Step::Down(op) => vec![op.out],
            Step::Product(_, _, out) => vec![*out],
            Step::Heads(op) => vec![op.out],
            Step::Latent(op) => vec![op.out],
            Step::Grouped(op) => vec![op.out],
        }
    }

    /// Bytes that must be moved where the rows chose `distinct` experts together.
    pub(super) fn bytes(&self, distinct: usize) -> u64 {
        match self {
            Step::Norm(op) => op.bytes(),
            Step::Route(op) => op.bytes(),
            Step::GateUp(op) => op.bytes(distinct),
            Step::Down(op) => op.bytes(distinct),
            Step::Product(x, weight, out) => Linear { x: *x, parts: &[(*weight, *out)] }.bytes(),
            Step::Heads(op) => op.bytes(),
            Step::Latent(op) => op.bytes(),
            Step::Grouped(op) => op.bytes(),
        }
    }

    /// Products of two numbers.
    pub(super) fn macs(&self) -> u64 {
        let count = match self {
            Step::Norm(_) | Step::Route(_) => 0,
            Step::GateUp(op) => 2 * op.ids.rows * op.ids.cols * op.experts.hidden_size * op.experts.intermediate_size,
            Step::Down(op) => op.ids.rows * op.ids.cols * op.experts.hidden_size * op.experts.intermediate_size,
            Step::Product(x, weight, _) => x.rows * weight.rows * weight.cols,
            Step::Heads(op) => op.x.rows * op.weight.count * op.weight.rows * op.weight.cols,
            Step::Latent(op) => {
                op.out.rows * op.paging.max_context * op.num_heads * (2 * op.kv_lora_rank + op.qk_rope_head_dim)
            }
            Step::Grouped(op) => op.out.rows * op.paging.max_context * op.num_heads * 2 * op.head_dim,
        };
        count as u64
    }

    /// What the conformance suite allows it.
    pub(super) fn tolerance(&self) -> Tolerance {
        match self {
            Step::Norm(op) => Tolerance::exact(op.x.cols),
            Step::Route(op) => Tolerance::exact(op.logits.cols),
            Step::GateUp(op) => Tolerance::product(op.x.cols, op.experts.gate_format, 4),
            Step::Down(op) => Tolerance::product(op.experts.intermediate_size, op.experts.down_format, 2),
            Step::Product(_, weight, _) => Tolerance::product(weight.cols, weight.format, 1),
            Step::Heads(op) => Tolerance::product(op.weight.cols, op.weight.format, 1),
            Step::Latent(op) => Tolerance::exact(op.paging.max_context + op.kv_lora_rank),
            Step::Grouped(op) => Tolerance::exact(op.paging.max_context + op.head_dim),
        }
    }

    /// Columns of an output that are of one magnitude: heads attend more or less sharply.
    pub(super) fn alike(&self, out: Tensor) -> usize {
        match self {
            Step::Heads(op) => op.weight.rows,
            Step::Latent(op) => op.kv_lora_rank,
            Step::Grouped(op) => op.head_dim,
            Step::Norm(_) | Step::Route(_) | Step::GateUp(_) | Step::Down(_) | Step::Product(..) => out.cols,
        }
    }

    /// The same for the first `rows` rows.
    pub(super) fn first_rows(&self, rows: usize) -> Step {
        let first = |tensor: Tensor| tensor.row_range(0, rows);
        let paging = |paging: Paging| Paging {
            positions: paging.positions.columns(0, rows),
            sequences: paging.sequences.columns(0, rows),
            ..paging
        };
        match *self {
            Step::Norm(op) => Step::Norm(RmsNorm { x: first(op.x), out: first(op.out), ..op }),
            Step::Route(op) => {
                Step::Route(Route { logits: first(op.logits), ids: first(op.ids), weights: first(op.weights), ..op })
            }
            Step::GateUp(op) => {
                Step::GateUp(MoeGateUp { x: first(op.x), ids: first(op.ids), out: first(op.out), ..op })
            }
            Step::Down(op) => Step::Down(MoeDown {
                h: first(op.h),
                ids: first(op.ids),
                weights: first(op.weights),
                out: first(op.out),
                ..op
            }),
            Step::Product(x, weight, out) => Step::Product(first(x), weight, first(out)),
            Step::Heads(op) => Step::Heads(LinearHeads { x: first(op.x), out: first(op.out), ..op }),
            Step::Latent(op) => Step::Latent(AttendMla {
                q_latent: first(op.q_latent),
                q_rope: first(op.q_rope),
                out: first(op.out),
                paging: paging(op.paging),
                ..op
            }),
            Step::Grouped(op) => {
                Step::Grouped(AttendGqa { q: first(op.q), out: first(op.out), paging: paging(op.paging), ..op })
            }
        }
    }
}

/// One turn of a chain.
pub(super) struct Turn {
    /// What makes the inputs, then what is timed.
    pub(super) steps: Vec<Step>,
    first_timed: usize,
    /// A norm of as many rows, with which a recorded chain begins.
    pub(super) lead: Step,
    /// Choices of experts.
    pub(super) ids: Option<Tensor>,
    /// To be freed.
    pub(super) buffers: Vec<Buffer>,
}

impl Turn {
    pub(super) fn timed(&self) -> &[Step] {
        &self.steps[self.first_timed..]
    }

    /// What the last step writes.
    pub(super) fn out(&self) -> Tensor {
        self.steps[self.steps.len() - 1].outputs()[0]
    }
}

/// Weights and caches on one back end.
pub(super) struct Bed {
    config: ModelConfig,
    format: FormatPlan,
    most_rows: usize,
    context: usize,
    seed: u64,
    /// Whether there are turns enough to read memory; else one, to compare with.
    many: bool,
    experts: Option<Experts>,
    dense: Vec<Weight>,
    /// Out of the latent space, a matrix a head.
    unembed: Vec<Weight>,
    head: Vec<Weight>,
    cache: Option<Cache>,
}

/// Buffers of a turn, filled with numbers that depend on the seed alone.
struct Inputs<'a> {
    backend: &'a mut dyn Backend,
    rng: SplitMix64,
    buffers: Vec<Buffer>,
}

impl Inputs<'_> {
    fn empty(&mut self, rows: usize, cols: usize) -> moellon_ops::Result<Tensor> {
        let buffer = self.backend.alloc("a rung of the ladder", ElementType::F32, rows * cols)?;
        self.buffers.push(buffer);
        Ok(buffer.tensor(rows, cols))
    }

    fn normal(&mut self, rows: usize, cols: usize) -> moellon_ops::Result<Tensor> {
        let tensor = self.empty(rows, cols)?;
        self.backend.write_f32(tensor, &self.rng.normals(rows * cols, 1.0))?;
        Ok(tensor)
    }

    fn ids(&mut self, rows: usize, cols: usize, values: &[u32]) -> moellon_ops::Result<Tensor> {
        let buffer = self.backend.alloc("a rung of the ladder", ElementType::U32, rows * cols)?;
        self.buffers.push(buffer);
        self.backend.write_u32(buffer.tensor(rows, cols), values)?;
        Ok(buffer.tensor(rows, cols))
    }
}

impl Bed {
    pub(super) fn new(config: &ModelConfig, format: FormatPlan, plan: &LadderPlan, many: bool) -> Self {
        Bed {
            config: config.clone(),
            format,
            most_rows: plan.rows.iter().copied().max().unwrap_or(1),
            context: plan.context.max(1),
            seed: plan.seed,
            many,
            experts: None,
            dense: Vec::new(),
            unembed: Vec::new(),
            head: Vec::new(),
            cache: None,
        }
    }

    /// The turns of an operation with so many rows.
    pub(super) fn turns(&mut self, operation: Operation, rows: usize, backend: &mut dyn Backend) -> Result<Vec<Turn>> {
        self.load(operation, backend)?;
        let count = if self.many { self.num_turns(operation, rows) } else { 1 };
        (0..count).map(|turn| self.turn(operation, rows, turn, backend)).collect()
    }

    fn num_turns(&self, operation: Operation, rows: usize) -> usize {
        let reach = |bytes: u64| CHAIN_BYTES.div_ceil(bytes.max(1)).clamp(2, MOST_TURNS as u64) as usize;
        match operation {
            Operation::GateUp | Operation::Down | Operation::Experts => {
                let experts = self.experts.expect("load() came before");
                let chosen = (rows * self.config.moe.num_experts_per_tok).min(experts.num_experts);
                reach(2 * chosen as u64 * experts.down_bytes())
            }
            Operation::Dense => self.dense.len().max(2),
            Operation::Head => self.head.len().max(2),
            Operation::Attention => {
                let cache = self.cache.expect("load() came before");
                reach((rows * self.context * cache.row_bytes()) as u64)
            }
        }
    }

    fn load(&mut self, operation: Operation, backend: &mut dyn Backend) -> Result<()> {
        let (hidden, dense, head) = (self.config.hidden_size, self.format.dense, self.format.head);
        match (operation, self.config.attention) {
            (Operation::GateUp | Operation::Down | Operation::Experts, _) if self.experts.is_none() => {
                self.experts = Some(self.load_experts(backend)?);
            }
            (Operation::Dense, attention) if self.dense.is_empty() => {
                let cols = match attention {
                    Attention::Mla(mla) => mla.num_heads * mla.v_head_dim,
                    Attention::Gqa(gqa) => gqa.num_heads * gqa.head_dim,
                };
                self.dense = self.copies(dense, 1, [hidden, cols], 11, backend)?;
            }
            (Operation::Head, _) if self.head.is_empty() => {
                self.head = self.copies(head, 1, [self.config.vocab_size, hidden], 12, backend)?;
            }
            (Operation::Attention, attention) if self.cache.is_none() => {
                if let Attention::Mla(mla) = attention {
                    let shape = [mla.v_head_dim, mla.kv_lora_rank];
                    self.unembed = self.copies(dense, mla.num_heads, shape, 13, backend)?;
                }
                self.cache = Some(self.filled_cache(backend)?);
            }
            _ => {}
        }
        Ok(())
    }

    /// As many copies of a weight as a chain needs.
    fn copies(
        &self,
        wanted: WeightFormat,
        count: usize,
        shape: [usize; 2],
        salt: u64,
        backend: &mut dyn Backend,
    ) -> Result<Vec<Weight>> {
        let drawn = draw(wanted, shape, count.min(DRAWN), self.seed + salt)?;
        let views: Vec<MatrixView<'_>> = (0..count).map(|i| drawn[i % drawn.len()].view()).collect();
        let source = WeightSource { name: "a rung of the ladder", matrices: &views, bias: None };
        let first = backend.load_weight(&source)?;
        let copies = if self.many { CHAIN_BYTES.div_ceil(first.size_bytes()).clamp(1, MOST_TURNS as u64) } else { 1 };
        let more = (1..copies).map(|_| backend.load_weight(&source));
        std::iter::once(Ok(first)).chain(more).collect::<moellon_ops::Result<_>>().map_err(Error::from)
    }

    fn load_experts(&self, backend: &mut dyn Backend) -> Result<Experts> {
        let (moe, hidden, wanted) = (self.config.moe, self.config.hidden_size, self.format.experts);
        let (count, width) = (moe.num_experts, moe.moe_intermediate_size);
        let drawn = [[width, hidden], [width, hidden], [hidden, width]]
            .into_iter()
            .zip(21..)
            .map(|(shape, salt)| draw(wanted, shape, count.min(DRAWN), self.seed + 100 * salt))
            .collect::<Result<Vec<_>>>()?;
        let views: Vec<Vec<MatrixView<'_>>> =
            drawn.iter().map(|drawn| (0..count).map(|i| drawn[i % drawn.len()].view()).collect()).collect();
        let zeros = moe.expert_bias.then(|| [width, width, hidden].map(|len| vec![0.0; count * len]));
        let biases = zeros.as_ref().map(|[gate, up, down]| [&gate[..], &up[..], &down[..]]);
        let source =
            ExpertsSource { name: "a rung of the ladder", gate: &views[0], up: &views[1], down: &views[2], biases };
        Ok(backend.load_experts(&source)?)
    }

    fn filled_cache(&self, backend: &mut dyn Backend) -> Result<Cache> {
        let (width, _) = self.config.cache_widths();
        let row_bytes = CacheDtype::Bf16.size_bytes() * width;
        let needed = self.most_rows * self.context.next_multiple_of(BLOCK);
        let enough = if self.many { (CHAIN_BYTES as usize).div_ceil(row_bytes) } else { 0 };
        let slots = needed.max(enough).next_multiple_of(BLOCK);
        let cache = backend.alloc_cache("a rung of the ladder", CacheDtype::Bf16, slots, width)?;
        let mut rng = SplitMix64::new(self.seed + 14);
        let drawn: Vec<u8> = rng
            .normals(DRAWN_SLOTS * width, 1.0)
            .into_iter()
            .flat_map(|x| ((x.to_bits() >> 16) as u16).to_le_bytes())
            .collect();
        for first in (0..slots).step_by(DRAWN_SLOTS) {
            let rows = DRAWN_SLOTS.min(slots - first);
            backend.write_cache(cache, first, &drawn[..rows * row_bytes])?;
        }
        Ok(cache)
    }

    fn turn(&self, operation: Operation, rows: usize, turn: usize, backend: &mut dyn Backend) -> Result<Turn> {
        let seed = SplitMix64::new(self.seed + 1000 * turn as u64 + rows as u64).next_u64() ^ operation as u64;
        let mut inputs = Inputs { backend, rng: SplitMix64::new(seed), buffers: Vec::new() };
        let lead = {
            let (x, weight, out) = (inputs.normal(rows, 64)?, inputs.normal(1, 64)?, inputs.empty(rows, 64)?);
            Step::Norm(RmsNorm { x, delta: None, weight, eps: 1e-5, out })
        };
        let mut ids = None;
        let (steps, first_timed) = match operation {
            Operation::GateUp | Operation::Down | Operation::Experts => {
                let (steps, chosen) = self.experts_steps(rows, &mut inputs)?;
                ids = Some(chosen);
                match operation {
                    Operation::GateUp => (steps[..2].to_vec(), 1),
                    Operation::Down => (steps.to_vec(), 2),
                    _ => (steps.to_vec(), 0),
                }
            }
            Operation::Dense => (vec![product(self.dense[turn % self.dense.len()], rows, &mut inputs)?], 0),
            Operation::Head => (vec![product(self.head[turn % self.head.len()], rows, &mut inputs)?], 0),
            Operation::Attention => (self.attention_steps(rows, turn, &mut inputs)?, 0),
        };
        Ok(Turn { steps, first_timed, lead, ids, buffers: inputs.buffers })
    }

    /// Choice, gate and up, down; and where the choices are.
    fn experts_steps(&self, rows: usize, inputs: &mut Inputs<'_>) -> Result<([Step; 3], Tensor)> {
        let (moe, experts) = (self.config.moe, self.experts.expect("load() came before"));
        let (top_k, width) = (moe.num_experts_per_tok, experts.intermediate_size);
        let logits = inputs.normal(rows, experts.num_experts)?;
        // Zeros: one of the logits' size would have all rows choose the same experts.
        let correction_bias = if moe.correction_bias { Some(inputs.empty(1, experts.num_experts)?) } else { None };
        let ids = inputs.ids(rows, top_k, &vec![0; rows * top_k])?;
        let weights = inputs.empty(rows, top_k)?;
        let route = moe.route(logits, correction_bias, ids, weights);
        let (x, h) = (inputs.normal(rows, experts.hidden_size)?, inputs.empty(rows, top_k * width)?);
        let gate_up = MoeGateUp { x, experts, ids, activation: moe.activation, out: h };
        let out = inputs.empty(rows, experts.hidden_size)?;
        let down = MoeDown { h, experts, ids, weights, plus: None, out };
        Ok(([Step::Route(route), Step::GateUp(gate_up), Step::Down(down)], ids))
    }

    fn attention_steps(&self, rows: usize, turn: usize, inputs: &mut Inputs<'_>) -> Result<Vec<Step>> {
        let cache = self.cache.expect("load() came before");
        let blocks = self.context.div_ceil(BLOCK);
        // Rows and turns have blocks of their own as far as the cache has them.
        let in_all = cache.num_slots / BLOCK;
        let table: Vec<u32> = (0..rows * blocks).map(|i| ((turn * rows * blocks + i) % in_all) as u32).collect();
        let numbers: Vec<u32> = (0..rows as u32).collect();
        let paging = Paging {
            positions: inputs.ids(1, rows, &vec![self.context as u32 - 1; rows])?,
            sequences: inputs.ids(1, rows, &numbers)?,
            block_table: inputs.ids(rows, blocks, &table)?,
            block_size: BLOCK,
            max_context: self.context,
        };
        Ok(match self.config.attention {
            Attention::Mla(mla) => {
                latent_steps(&mla, rows, cache, paging, self.unembed[turn % self.unembed.len()], inputs)?
            }
            Attention::Gqa(gqa) => vec![grouped_step(&gqa, rows, cache, paging, inputs)?],
        })
    }
}

fn latent_steps(
    mla: &Mla,
    rows: usize,
    cache: Cache,
    paging: Paging,
    unembed: Weight,
    inputs: &mut Inputs<'_>,
) -> Result<Vec<Step>> {
    let head_dim = mla.qk_nope_head_dim + mla.qk_rope_head_dim;
    let q = inputs.normal(rows, mla.num_heads * head_dim)?;
    let latents = inputs.empty(rows, mla.num_heads * mla.kv_lora_rank)?;
    let attend = AttendMla {
        q_latent: inputs.normal(rows, mla.num_heads * mla.kv_lora_rank)?,
        q_rope: q.columns(mla.qk_nope_head_dim, q.cols - mla.qk_nope_head_dim),
        q_rope_head_stride: head_dim,
        cache,
        num_heads: mla.num_heads,
        kv_lora_rank: mla.kv_lora_rank,
        qk_rope_head_dim: mla.qk_rope_head_dim,
        scale: mla.scale,
        index: None,
        paging,
        out: latents,
    };
    let out = inputs.empty(rows, mla.num_heads * mla.v_head_dim)?;
    let heads = LinearHeads { x: latents, x_head_stride: mla.kv_lora_rank, weight: unembed, out };
    Ok(vec![Step::Latent(attend), Step::Heads(heads)])
}

fn grouped_step(gqa: &Gqa, rows: usize, cache: Cache, paging: Paging, inputs: &mut Inputs<'_>) -> Result<Step> {
    let width = gqa.num_heads * gqa.head_dim;
    Ok(Step::Grouped(AttendGqa {
        q: inputs.normal(rows, width)?,
        cache,
        num_heads: gqa.num_heads,
        num_kv_heads: gqa.num_kv_heads,
        head_dim: gqa.head_dim,
        scale: gqa.scale,
        window: None,
        sinks: if gqa.sinks { Some(inputs.normal(1, gqa.num_heads)?) } else { None },
        paging,
        out: inputs.empty(rows, width)?,
    }))
}

fn product(weight: Weight, rows: usize, inputs: &mut Inputs<'_>) -> Result<Step> {
    Ok(Step::Product(inputs.normal(rows, weight.cols)?, weight, inputs.empty(rows, weight.rows)?))
}

/// Random matrices; bf16 where a row is no whole number of the format's groups, as quantizers leave it.
fn draw(wanted: WeightFormat, shape: [usize; 2], count: usize, seed: u64) -> Result<Vec<OwnedMatrix>> {
    let format = if wanted.validate(shape[1]).is_ok() { wanted } else { WeightFormat::Bf16 };
    let std = 1.0 / (shape[1] as f32).sqrt();
    let matrix = |i: u64| OwnedMatrix::random(format, shape, std, seed + i).map_err(moellon_ops::Error::from);
    Ok((0..count as u64).map(matrix).collect::<moellon_ops::Result<_>>()?)
}
