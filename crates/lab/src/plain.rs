//! A back end without its advantages, to measure what they bring: experts one by one, steps launched operation by operation.

use moellon_ops::{
    Backend, Buffer, ElementType, Experts, ExpertsSource, GateUp, Linear, MoeDown, MoeGateUp, Result, Tensor, Weight,
    WeightSource,
};

/// What is taken away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Without {
    /// Routed experts are ordinary linear layers: for each token and each of its experts one gate and up, one down, and the
    /// weighted sum on the host. A second token that chose the same expert reads it again.
    pub fused_experts: bool,
}

/// Wraps a back end and never records steps.
pub struct PlainBackend {
    inner: Box<dyn Backend>,
    without: Without,
    /// Gate, up and down of each expert, by the number that [`Experts::id`] has here.
    experts: Vec<Vec<[Weight; 3]>>,
    /// Room for one expert's output, `[1, hidden_size]` of the widest layer so far.
    row: Option<Buffer>,
}

impl PlainBackend {
    /// Takes what `without` says away from `inner`.
    pub fn new(inner: Box<dyn Backend>, without: Without) -> Self {
        PlainBackend { inner, without, experts: Vec::new(), row: None }
    }

    fn ids(&mut self, ids: Tensor) -> Result<Vec<u32>> {
        let mut chosen = vec![0; ids.rows * ids.cols];
        self.inner.read_u32(ids, &mut chosen)?;
        Ok(chosen)
    }

    fn row(&mut self, width: usize) -> Result<Tensor> {
        let buffer = match self.row {
            Some(buffer) if buffer.len >= width => buffer,
            old => {
                old.into_iter().for_each(|buffer| self.inner.free(buffer));
                *self.row.insert(self.inner.alloc("one expert's output", ElementType::F32, width)?)
            }
        };
        Ok(buffer.tensor(1, width))
    }
}

impl Backend for PlainBackend {
    moellon_ops::forward_backend! {
        inner: caps alloc free write_f32 write_u32 read_f32 read_u32 synchronize measure_read
            alloc_cache read_cache write_cache load_weight stage
            embed rope_table rms_norm layer_norm linear linear_heads rope kv_store attend_gqa attend_mla
            index_score index_topk route gate_up add gather_rows argmax sample
    }

    fn load_experts(&mut self, source: &ExpertsSource<'_>) -> Result<Experts> {
        if !self.without.fused_experts {
            return self.inner.load_experts(source);
        }
        let described = source.describe(self.experts.len() as u32)?;
        let mut experts = Vec::with_capacity(described.num_experts);
        for expert in 0..described.num_experts {
            let widths = [described.intermediate_size, described.intermediate_size, described.hidden_size];
            let lists = [source.gate, source.up, source.down];
            let mut weights = Vec::with_capacity(3);
            for (part, (list, width)) in lists.into_iter().zip(widths).enumerate() {
                let bias = source.biases.map(|biases| &biases[part][expert * width..][..width]);
                let matrices = &list[expert..=expert];
                weights.push(self.inner.load_weight(&WeightSource { name: source.name, matrices, bias })?);
            }
            experts.push([weights[0], weights[1], weights[2]]);
        }
        self.experts.push(experts);
        Ok(described)
    }

    fn moe_gate_up(&mut self, op: &MoeGateUp) -> Result<()> {
        if !self.without.fused_experts {
            return self.inner.moe_gate_up(op);
        }
        op.validate()?;
        let (chosen, width) = (self.ids(op.ids)?, op.experts.intermediate_size);
        for (at, expert) in chosen.into_iter().enumerate() {
            let (token, slot) = (at / op.ids.cols, at % op.ids.cols);
            let [gate, up, _] = self.experts[op.experts.id as usize][expert as usize];
            let out = op.out.row_range(token, 1).columns(slot * width, width);
            let x = op.x.row_range(token, 1);
            self.inner.gate_up(&GateUp { x, gate, up, activation: op.activation, out })?;
        }
        Ok(())
    }

    fn moe_down(&mut self, op: &MoeDown) -> Result<()> {
        if !self.without.fused_experts {
            return self.inner.moe_down(op);
        }
        op.validate()?;
        let (chosen, width, hidden) = (self.ids(op.ids)?, op.experts.intermediate_size, op.experts.hidden_size);
        let mut weights = vec![0.0; op.weights.rows * op.weights.cols];
        self.inner.read_f32(op.weights, &mut weights)?;
        let mut sums = vec![0.0; op.out.rows * hidden];
        if let Some(plus) = op.plus {
            self.inner.read_f32(plus, &mut sums)?;
        }
        let row = self.row(hidden)?;
        let mut host = vec![0.0; hidden];
        for (at, expert) in chosen.into_iter().enumerate() {
            let (token, slot) = (at / op.ids.cols, at % op.ids.cols);
            let [_, _, down] = self.experts[op.experts.id as usize][expert as usize];
            let x = op.h.row_range(token, 1).columns(slot * width, width);
            self.inner.linear(&Linear { x, parts: &[(down, row)] })?;
            self.inner.read_f32(row, &mut host)?;
            for (sum, y) in sums[token * hidden..][..hidden].iter_mut().zip(&host) {
                *sum += weights[at] * y;
            }
        }
        self.inner.write_f32(op.out, &sums)
    }
}
