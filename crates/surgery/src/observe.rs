//! A back end that runs everything on another one and looks at what weights are given: the second moments of every linear
//! layer's input, and what each expert adds to the residual stream. It knows no architecture: a module's name comes with
//! its weight, its input with the operation.

use crate::linear_algebra::{add_gram, mirror};
use crate::stats::MomentsMode;
use moellon_ops::*;
use rayon::prelude::*;
use std::collections::{BTreeMap, HashMap};

/// Sums over the rows that a module's matrices saw.
#[derive(Debug, Clone)]
pub(crate) struct InputSums {
    pub(crate) cols: usize,
    /// `[count]`
    pub(crate) tokens: Vec<u32>,
    /// `[count * cols]`
    sum_sq: Vec<f64>,
    /// `[1 or count][cols * cols]`, upper triangles; empty where moments are not wanted.
    moments: Vec<Vec<f32>>,
}

impl InputSums {
    fn new(count: usize, cols: usize, num_moments: usize) -> Self {
        InputSums {
            cols,
            tokens: vec![0; count],
            sum_sq: vec![0.0; count * cols],
            moments: vec![vec![0.0; cols * cols]; num_moments],
        }
    }

    /// Means of squares, `[count * cols]`.
    pub(crate) fn input_sq(&self) -> Vec<f32> {
        let rows = self.sum_sq.chunks_exact(self.cols).zip(&self.tokens);
        rows.flat_map(|(row, &tokens)| row.iter().map(move |sum| (sum / f64::from(tokens.max(1))) as f32)).collect()
    }

    /// Mean moments with both triangles; each is divided by the rows that went into it.
    pub(crate) fn into_moments(self, pooled_rows: u32) -> Vec<Vec<f32>> {
        let (cols, tokens) = (self.cols, self.tokens);
        let single = self.moments.len() == 1;
        let mut moments = self.moments;
        moments.par_iter_mut().enumerate().for_each(|(at, moments)| {
            mirror(moments, cols);
            let rows = if single { pooled_rows } else { tokens[at] };
            let factor = 1.0 / rows.max(1) as f32;
            moments.iter_mut().for_each(|m| *m *= factor);
        });
        moments
    }

    fn add_rows(&mut self, matrix: usize, rows: &[f32]) {
        let sums = &mut self.sum_sq[matrix * self.cols..(matrix + 1) * self.cols];
        for row in rows.chunks_exact(self.cols) {
            sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x) * f64::from(*x));
        }
        self.tokens[matrix] += (rows.len() / self.cols) as u32;
    }
}

/// Sums over the rows that were routed to each expert of a block.
#[derive(Debug, Clone)]
pub(crate) struct SaliencySums {
    /// `[5][num_experts]`: gate, gate x norm, norm, (gate x norm)², largest norm.
    pub(crate) sums: [Vec<f64>; 5],
}

/// What was seen.
#[derive(Debug, Default)]
pub(crate) struct Observations {
    pub(crate) inputs: BTreeMap<String, InputSums>,
    /// Module to the one whose input it shares.
    pub(crate) aliases: BTreeMap<String, String>,
    pub(crate) saliency: BTreeMap<String, SaliencySums>,
    /// Rows that went into pooled moments.
    pub(crate) rows: BTreeMap<String, u32>,
    /// By block.
    pub(crate) routed: BTreeMap<String, RoutedRows>,
}

/// What to look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Watch {
    /// Inputs of weights and saliency of experts.
    Calibration(MomentsMode),
    /// What goes into the routed experts and what comes out, row by row.
    Routing,
}

/// Rows that went through the routed experts of a block.
#[derive(Debug, Default)]
pub(crate) struct RoutedRows {
    /// `[tokens, hidden_size]`
    pub(crate) x: Vec<f32>,
    /// `[tokens, hidden_size]`: the weighted sum of the chosen experts' outputs, without the shared expert's.
    pub(crate) y: Vec<f32>,
}

/// The observing back end.
pub(crate) struct Observer {
    backend: Box<dyn Backend>,
    watch: Watch,
    mode: MomentsMode,
    weights: HashMap<u32, String>,
    experts: HashMap<u32, String>,
    pub(crate) seen: Observations,
}

impl Observer {
    pub(crate) fn new(backend: Box<dyn Backend>, watch: Watch) -> Self {
        let mode = match watch {
            Watch::Calibration(mode) => mode,
            Watch::Routing => MomentsMode::None,
        };
        let (weights, experts) = (HashMap::new(), HashMap::new());
        Observer { backend, watch, mode, weights, experts, seen: Observations::default() }
    }

    /// What was seen; the back end and its memory are given up.
    pub(crate) fn into_seen(self) -> Observations {
        self.seen
    }

    /// Notes what the routed experts alone give the rows of a step.
    fn note_routed(&mut self, block: String, op: &MoeDown) -> Result<()> {
        let (tokens, hidden) = (op.out.rows, op.out.cols);
        let out = self.backend.alloc("routed outputs", ElementType::F32, tokens * hidden)?.tensor(tokens, hidden);
        self.backend.moe_down(&MoeDown { plus: None, out, ..*op })?;
        let y = self.read(out)?;
        self.backend.free(out.buffer);
        self.seen.routed.entry(block).or_default().y.extend(y);
        Ok(())
    }

    fn read(&mut self, tensor: Tensor) -> Result<Vec<f32>> {
        let mut host = vec![0.0; tensor.rows * tensor.cols];
        self.backend.read_f32(tensor, &mut host)?;
        Ok(host)
    }

    fn name(&self, weight: &Weight) -> String {
        self.weights.get(&weight.id).cloned().expect("weights are loaded through the observer")
    }

    /// Notes rows that one matrix, or several with the same input, read.
    fn note_linear(&mut self, names: &[String], rows: &[f32], cols: usize) {
        let Some((first, others)) = names.split_first() else { return };
        for other in others {
            self.seen.aliases.insert(other.clone(), first.clone());
        }
        let num_moments = usize::from(self.mode != MomentsMode::None);
        let sums = self.seen.inputs.entry(first.clone()).or_insert_with(|| InputSums::new(1, cols, num_moments));
        sums.add_rows(0, rows);
        *self.seen.rows.entry(first.clone()).or_default() += (rows.len() / cols) as u32;
        if let Some(moments) = sums.moments.first_mut() {
            add_gram(rows, cols, moments);
        }
    }

    /// Notes rows by expert. `row_of(t, slot)` is the row that slot `slot` of token `t` read.
    fn note_experts<'r>(
        &mut self,
        key: &str,
        num_experts: usize,
        cols: usize,
        ids: &[u32],
        row_of: impl Fn(usize) -> &'r [f32],
        pooled: Option<&[f32]>,
    ) {
        let num_moments = match (self.mode, pooled) {
            (MomentsMode::None, _) => 0,
            (MomentsMode::Layer, Some(_)) => 1,
            (MomentsMode::Layer, None) | (MomentsMode::Expert, _) => num_experts,
        };
        let sums =
            self.seen.inputs.entry(key.to_owned()).or_insert_with(|| InputSums::new(num_experts, cols, num_moments));
        let mut by_expert: Vec<Vec<f32>> = vec![Vec::new(); num_experts];
        for (at, &id) in ids.iter().enumerate() {
            by_expert[id as usize].extend_from_slice(row_of(at));
        }
        for (expert, rows) in by_expert.iter().enumerate() {
            sums.add_rows(expert, rows);
        }
        match (num_moments, pooled) {
            (0, _) => {}
            (1, Some(rows)) => {
                add_gram(rows, cols, &mut sums.moments[0]);
                *self.seen.rows.entry(key.to_owned()).or_default() += (rows.len() / cols) as u32;
            }
            _ => {
                let with_rows = sums.moments.par_iter_mut().zip(&by_expert).filter(|(_, rows)| !rows.is_empty());
                with_rows.for_each(|(moments, rows)| add_gram(rows, cols, moments));
            }
        }
    }

    /// Norms of what every chosen expert gives a token, `[num_tokens * top_k]`: the down projection a slot at a time with
    /// weights of one.
    fn expert_norms(&mut self, op: &MoeDown) -> Result<Vec<f32>> {
        let (tokens, top_k) = (op.ids.rows, op.ids.cols);
        let (inner, hidden) = (op.experts.intermediate_size, op.experts.hidden_size);
        let ones = self.backend.alloc("unit weights", ElementType::F32, tokens)?.tensor(tokens, 1);
        let out = self.backend.alloc("one expert's outputs", ElementType::F32, tokens * hidden)?.tensor(tokens, hidden);
        let ids = self.backend.alloc("one slot's experts", ElementType::U32, tokens)?.tensor(tokens, 1);
        let h = self.backend.alloc("one slot's inputs", ElementType::F32, tokens * inner)?.tensor(tokens, inner);
        self.backend.write_f32(ones, &vec![1.0; tokens])?;
        let mut all_ids = vec![0; tokens * top_k];
        self.backend.read_u32(op.ids, &mut all_ids)?;
        let all_h = self.read(op.h)?;
        let mut norms = vec![0.0; tokens * top_k];
        for slot in 0..top_k {
            let slot_ids: Vec<u32> = all_ids.chunks_exact(top_k).map(|ids| ids[slot]).collect();
            let slot_h: Vec<f32> = all_h
                .chunks_exact(top_k * inner)
                .flat_map(|row| &row[slot * inner..(slot + 1) * inner])
                .copied()
                .collect();
            self.backend.write_u32(ids, &slot_ids)?;
            self.backend.write_f32(h, &slot_h)?;
            self.backend.moe_down(&MoeDown { h, experts: op.experts, ids, weights: ones, plus: None, out })?;
            let outputs = self.read(out)?;
            for (t, row) in outputs.chunks_exact(hidden).enumerate() {
                norms[t * top_k + slot] = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt() as f32;
            }
        }
        for tensor in [ones, out, ids, h] {
            self.backend.free(tensor.buffer);
        }
        Ok(norms)
    }
}

/// Modules whose inputs matter to nobody: routers stay as they are.
fn is_router(name: &str) -> bool {
    name.ends_with(".gate") || name.ends_with(".router")
}

/// The module name of a weight: the two halves of `kv_b_proj` are loaded under a name for messages.
fn module_name(name: &str) -> String {
    match name.split_once(".kv_b_proj (") {
        Some((attention, "queries)")) => format!("{attention}.embed_q"),
        Some((attention, _)) => format!("{attention}.unembed_out"),
        None => name.to_owned(),
    }
}

impl Backend for Observer {
    moellon_ops::forward_backend! {
        backend: caps alloc free write_f32 write_u32 read_f32 read_u32 synchronize alloc_cache read_cache write_cache stage
            embed rope_table rms_norm layer_norm rope kv_store attend_gqa attend_mla index_score index_topk route add
            gather_rows argmax sample
    }

    fn load_weight(&mut self, source: &WeightSource<'_>) -> Result<Weight> {
        let weight = self.backend.load_weight(source)?;
        self.weights.insert(weight.id, module_name(source.name));
        Ok(weight)
    }

    fn load_experts(&mut self, source: &ExpertsSource<'_>) -> Result<Experts> {
        let experts = self.backend.load_experts(source)?;
        let block = source.name.strip_suffix(".experts").unwrap_or(source.name);
        self.experts.insert(experts.id, block.to_owned());
        Ok(experts)
    }

    fn linear(&mut self, op: &Linear<'_>) -> Result<()> {
        if self.watch == Watch::Routing {
            return self.backend.linear(op);
        }
        let names: Vec<String> =
            op.parts.iter().map(|(weight, _)| self.name(weight)).filter(|name| !is_router(name)).collect();
        if !names.is_empty() {
            let rows = self.read(op.x)?;
            self.note_linear(&names, &rows, op.x.cols);
        }
        self.backend.linear(op)
    }

    fn gate_up(&mut self, op: &GateUp) -> Result<()> {
        if self.watch == Watch::Routing {
            return self.backend.gate_up(op);
        }
        let names = [self.name(&op.gate), self.name(&op.up)];
        let rows = self.read(op.x)?;
        self.note_linear(&names, &rows, op.x.cols);
        self.backend.gate_up(op)
    }

    fn linear_heads(&mut self, op: &LinearHeads) -> Result<()> {
        if self.watch == Watch::Routing {
            return self.backend.linear_heads(op);
        }
        let name = self.name(&op.weight);
        let rows = self.read(op.x)?;
        let Weight { count, cols, .. } = op.weight;
        let num_moments = if self.mode == MomentsMode::None { 0 } else { count };
        let sums = self.seen.inputs.entry(name).or_insert_with(|| InputSums::new(count, cols, num_moments));
        for head in 0..count {
            let first = head * op.x_head_stride;
            let part: Vec<f32> =
                rows.chunks_exact(op.x.cols).flat_map(|row| &row[first..first + cols]).copied().collect();
            sums.add_rows(head, &part);
            if num_moments > 0 {
                add_gram(&part, cols, &mut sums.moments[head]);
            }
        }
        self.backend.linear_heads(op)
    }

    fn moe_gate_up(&mut self, op: &MoeGateUp) -> Result<()> {
        let block = self.experts.get(&op.experts.id).cloned().expect("experts are loaded through the observer");
        let (x, top_k, hidden) = (self.read(op.x)?, op.ids.cols, op.experts.hidden_size);
        if self.watch == Watch::Routing {
            self.seen.routed.entry(block).or_default().x.extend(x);
            return self.backend.moe_gate_up(op);
        }
        let mut ids = vec![0; op.ids.rows * top_k];
        self.backend.read_u32(op.ids, &mut ids)?;
        let key = format!("{block}.experts.gate_proj");
        self.seen.aliases.insert(format!("{block}.experts.up_proj"), key.clone());
        let row = |at: usize| &x[at / top_k * hidden..][..hidden];
        self.note_experts(&key, op.experts.num_experts, hidden, &ids, row, Some(&x));
        self.backend.moe_gate_up(op)
    }

    fn moe_down(&mut self, op: &MoeDown) -> Result<()> {
        let block = self.experts.get(&op.experts.id).cloned().expect("experts are loaded through the observer");
        if self.watch == Watch::Routing {
            self.note_routed(block, op)?;
            return self.backend.moe_down(op);
        }
        let (h, gates, inner) = (self.read(op.h)?, self.read(op.weights)?, op.experts.intermediate_size);
        let mut ids = vec![0; op.ids.rows * op.ids.cols];
        self.backend.read_u32(op.ids, &mut ids)?;
        let num_experts = op.experts.num_experts;
        let key = format!("{block}.experts.down_proj");
        self.note_experts(&key, num_experts, inner, &ids, |at| &h[at * inner..][..inner], None);
        let norms = self.expert_norms(op)?;
        let empty = || SaliencySums { sums: std::array::from_fn(|_| vec![0.0; num_experts]) };
        let sums = &mut self.seen.saliency.entry(block).or_insert_with(empty).sums;
        for ((&id, &gate), &norm) in ids.iter().zip(&gates).zip(&norms) {
            let (expert, gate, norm) = (id as usize, f64::from(gate), f64::from(norm));
            sums[0][expert] += gate;
            sums[1][expert] += gate * norm;
            sums[2][expert] += norm;
            sums[3][expert] += (gate * norm).powi(2);
            sums[4][expert] = sums[4][expert].max(norm);
        }
        self.backend.moe_down(op)
    }
}
