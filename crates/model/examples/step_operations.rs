//! Where a decode step's time goes on the CPU, operation by operation, beside the whole step and what its parallel regions cost: for
//! work on the CPU back end, where the stages of `moellon bench` are too coarse. Prints JSON, from which `bench/receipts.py operations`
//! makes a receipt.
//!
//! ```text
//! cargo run --release -p moellon-model --example step_operations -- SHAPE FORMAT BATCH CONTEXT ROUNDS
//! ```
//!
//! Steps with and without a clock around every operation take turns, with a pass over memory between rounds. Random weights; every
//! step has random tokens of its own, so that no cache holds the experts of the one before.

#![allow(clippy::print_stdout, reason = "a program")]

use moellon_backend_cpu::bandwidth::ReadProbe;
use moellon_backend_cpu::{CpuBackend, CpuOptions};
use moellon_model::batch::{Batch, LogitRows};
use moellon_model::session::greedy;
use moellon_model::synthetic::{FormatPlan, Synthetic, preset};
use moellon_model::weights::Weights;
use moellon_model::{Decoder, DecoderOptions};
use moellon_ops::*;
use moellon_tensor::rng::SplitMix64;
use std::collections::BTreeMap;
use std::time::Instant;

/// Steps of a round, of each kind.
const STEPS: usize = 4;
/// Bytes of a pass over memory.
const PROBE_BYTES: usize = 1 << 30;
const BLOCK_SIZE: usize = 64;

/// Seconds of each operation, by its name and what tells it from others of the name.
struct Timed<'a> {
    inner: &'a mut dyn Backend,
    seconds: BTreeMap<String, Vec<f64>>,
}

impl Timed<'_> {
    fn timed(&mut self, name: String, run: impl FnOnce(&mut dyn Backend) -> Result<()>) -> Result<()> {
        let start = Instant::now();
        run(self.inner)?;
        self.seconds.entry(name).or_default().push(start.elapsed().as_secs_f64());
        Ok(())
    }
}

macro_rules! timed_operations {
    ($($method:ident: $op:ty, |$o:ident| $what:expr);* $(;)?) => {
        $(fn $method(&mut self, op: &$op) -> Result<()> {
            let $o = op;
            let what: Vec<usize> = $what;
            self.timed(format!("{} {what:?}", stringify!($method)), |inner| inner.$method(op))
        })*
    };
}

impl Backend for Timed<'_> {
    moellon_ops::forward_backend! {
        inner: caps alloc free write_f32 write_u32 read_f32 read_u32 synchronize measure_read
            alloc_cache read_cache write_cache load_weight load_experts stage
    }

    timed_operations! {
        embed: Embed, |op| vec![op.out.cols];
        rope_table: RopeTable, |op| vec![op.table.cols];
        rms_norm: RmsNorm, |op| vec![op.out.rows, op.out.cols];
        layer_norm: LayerNorm, |op| vec![op.out.rows, op.out.cols];
        linear: Linear<'_>, |op| std::iter::once(op.x.cols).chain(op.parts.iter().map(|part| part.0.rows)).collect();
        linear_heads: LinearHeads, |op| vec![op.x.cols, op.out.cols];
        rope: Rope, |op| vec![op.num_heads];
        kv_store: KvStore<'_>, |op| vec![op.cache.width];
        attend_gqa: AttendGqa, |op| vec![op.num_heads];
        attend_mla: AttendMla, |op| vec![op.num_heads];
        index_score: IndexScore, |_op| vec![];
        index_topk: IndexTopk, |_op| vec![];
        route: Route, |op| vec![op.logits.cols];
        moe_gate_up: MoeGateUp, |op| vec![op.ids.cols];
        moe_down: MoeDown, |op| vec![op.ids.cols];
        gate_up: GateUp, |op| vec![op.x.cols, op.gate.rows];
        add: Add, |op| vec![op.x.cols];
        gather_rows: GatherRows, |op| vec![op.x.cols];
        argmax: Argmax, |op| vec![op.logits.cols];
    }
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    // The main thread is not kept on a core; steps of an engine run on one that is.
    std::thread::spawn(|| run().map_err(|error| error.to_string())).join().expect("errors are returned")?;
    Ok(())
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The mean of `values`, which are sorted, without the slowest tenth: what took the processor away for a while.
fn kept_mean(values: &[f64]) -> f64 {
    let kept = &values[..(values.len() * 9).div_ceil(10)];
    kept.iter().sum::<f64>() / kept.len() as f64
}

fn run() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [shape, format, numbers @ ..] = &words[..] else {
        return Err("expected SHAPE FORMAT BATCH CONTEXT ROUNDS".into());
    };
    let numbers: Vec<usize> = numbers.iter().map(|n| n.parse()).collect::<std::result::Result<_, _>>()?;
    let [batch_size, context, rounds] = numbers[..] else { return Err("expected BATCH CONTEXT ROUNDS".into()) };
    let config = preset(shape)?;
    let plan = FormatPlan::parse(format).ok_or(FormatPlan::NAMES)?;
    let mut backend = CpuBackend::new(CpuOptions { pin: true, ..CpuOptions::default() })?;
    let weights = Weights::load(&config, &Synthetic::new(&config, plan, 1), &mut backend, &mut |_| {})?;
    let blocks = (context + 1).div_ceil(BLOCK_SIZE);
    let options = DecoderOptions {
        max_batch_tokens: batch_size,
        max_sequences: batch_size,
        max_logit_rows: batch_size,
        max_context: context + 1,
        block_size: BLOCK_SIZE,
        num_blocks: batch_size * blocks,
        cache_dtype: CacheDtype::Bf16,
    };
    let mut decoder = Decoder::new(config, weights, options, &mut backend)?;
    decoder.fill_caches(1, &mut backend)?;
    let probe = ReadProbe::new(PROBE_BYTES)?;
    let chosen = backend.alloc("chosen tokens", ElementType::U32, batch_size)?.tensor(batch_size, 1);
    let mut rng = SplitMix64::new(7);
    let (mut plain, mut reads, mut regions, mut barriers) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut seconds, mut meetings) = (BTreeMap::new(), [0; 2]);
    for _ in 0..rounds {
        reads.push(probe.pass(backend.pool()));
        regions.push(backend.pool().region_latency().as_secs_f64());
        barriers.push(backend.pool().barrier_latency().as_secs_f64());
        let batches = (0..2 * STEPS).map(|_| {
            let mut batch = Batch::default();
            for sequence in 0..batch_size {
                let token = rng.below(decoder.config().vocab_size) as u32;
                let table: Vec<u32> = (0..blocks).map(|b| (sequence * blocks + b) as u32).collect();
                batch.push_sequence(&[token], context, &table, BLOCK_SIZE, LogitRows::Last);
            }
            batch
        });
        let batches: Vec<Batch> = batches.collect();
        let (for_plain, for_timed) = batches.split_at(STEPS);
        for batch in for_plain {
            let before = backend.pool().num_meetings();
            let start = Instant::now();
            let logits = decoder.forward(batch, &mut backend)?;
            greedy(logits, chosen, &mut backend)?;
            plain.push(start.elapsed().as_secs_f64());
            // A look at the latency now and then is not a step's own.
            let after = backend.pool().num_meetings();
            let met = [after[0] - before[0], after[1] - before[1]];
            meetings = if meetings == [0; 2] { met } else { [met[0].min(meetings[0]), met[1].min(meetings[1])] };
        }
        let mut timed = Timed { inner: &mut backend, seconds: std::mem::take(&mut seconds) };
        for batch in for_timed {
            let logits = decoder.forward(batch, &mut timed)?;
            greedy(logits, chosen, &mut timed)?;
        }
        seconds = timed.seconds;
    }
    let steps = rounds * STEPS;
    let operations: Vec<serde_json::Value> = seconds
        .iter_mut()
        .map(|(name, seconds)| {
            let count = seconds.len() / steps;
            serde_json::json!({"operation": name, "count": count, "us": median(seconds) * 1e6, "of_step_us": kept_mean(seconds) * 1e6 * count as f64})
        })
        .collect();
    let step_ms = median(&mut plain) * 1e3;
    let quartiles = [plain[plain.len() / 4] * 1e3, plain[plain.len() * 3 / 4] * 1e3];
    let report = serde_json::json!({
        "shape": shape, "format": format, "batch": batch_size, "context": context, "steps": steps,
        "step_ms": step_ms, "step_ms_quartiles": quartiles, "read_gb_s": median(&mut reads),
        "region_us": median(&mut regions) * 1e6, "barrier_us": median(&mut barriers) * 1e6, "regions": meetings[0], "barriers": meetings[1],
        "operations": operations,
    });
    println!("{report}");
    Ok(())
}
