//! `prune`: a model with fewer experts. Bytes are moved and never decoded, so the experts that stay are what they were, in
//! every format and layout: experts of their own are renumbered, stacked ones sliced, the router's rows with them.

use crate::inventory::{Inventory, Place};
use crate::product::{Begun, Product};
use crate::progress::{Meter, Progress};
use crate::quantize::Source;
use crate::report::{self, Receipt};
use crate::stats::{Saliency, Stats};
use crate::{Error, Result};
use moellon_checkpoint::checkpoint::TensorView;
use moellon_checkpoint::{Checkpoint, Projection, TensorSpec};
use moellon_tensor::rng::SplitMix64;
use serde_json::{Map, Value, json};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

/// What an expert is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Score {
    /// Mean over its tokens of combine weight times output norm (REAP, Lasby et al. 2025).
    Reap,
    /// The sum of the same: REAP weighted by how often the expert is used.
    WeightedSum,
    /// Root of the mean square of the same.
    ReapRms,
    /// How often it is used.
    Frequency,
    /// Mean output norm.
    MeanNorm,
    /// Nothing: experts are drawn. For comparisons.
    Random(u64),
}

impl Score {
    /// The name that flags and receipts use.
    pub const fn name(self) -> &'static str {
        match self {
            Score::Reap => "reap",
            Score::WeightedSum => "weighted_sum",
            Score::ReapRms => "reap_rms",
            Score::Frequency => "frequency",
            Score::MeanNorm => "mean_norm",
            Score::Random(_) => "random",
        }
    }

    /// The score of every expert of one block. An expert that no token used scores 0.
    pub fn of(self, saliency: &Saliency, layer: usize) -> Vec<f64> {
        let mean = |sums: &[f32]| -> Vec<f64> {
            let pairs = sums.iter().zip(&saliency.tokens);
            pairs.map(|(sum, tokens)| f64::from(*sum) / f64::from((*tokens).max(1))).collect()
        };
        match self {
            Score::Reap => mean(&saliency.gate_norm),
            Score::WeightedSum => saliency.gate_norm.iter().map(|sum| f64::from(*sum)).collect(),
            Score::ReapRms => mean(&saliency.gate_norm_sq).into_iter().map(f64::sqrt).collect(),
            Score::Frequency => saliency.tokens.iter().map(|tokens| f64::from(*tokens)).collect(),
            Score::MeanNorm => mean(&saliency.norm),
            Score::Random(seed) => {
                let mut rng = SplitMix64::new(seed ^ (layer as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
                saliency.tokens.iter().map(|_| rng.next_f64()).collect()
            }
        }
    }
}

/// What happens to MTP layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MtpExperts {
    /// They keep all experts: a layer of its own with a router of its own needs nothing of the trunk's.
    Whole,
    /// They are pruned like the trunk, by their own statistics.
    Pruned,
}

/// What to keep.
#[derive(Debug, Clone, Copy)]
pub struct PruneOptions {
    /// Experts that stay in each layer.
    pub keep: usize,
    /// What decides.
    pub score: Score,
    /// MTP layers.
    pub mtp: MtpExperts,
    /// A shard is closed before it would exceed this.
    pub max_shard_bytes: usize,
}

/// Experts that stay, by layer, as numbers of the source, ascending.
type Kept = BTreeMap<usize, Vec<usize>>;

/// The best `keep` experts by score, ascending by number. With `n_group` groups of consecutive experts each keeps its best
/// `keep / n_group`: the router limits choices by group, and groups of other sizes would mean something else.
///
/// # Errors
/// If the groups cannot keep equally many, or fewer would stay than a token uses.
pub fn select(scores: &[f64], keep: usize, n_group: usize, topk_group: usize, top_k: usize) -> Result<Vec<usize>> {
    let total = scores.len();
    if keep > total || keep < top_k {
        let expected = format!("{top_k} (what a token uses) to {total}");
        return Err(Error::mismatch("experts to keep in a layer", keep, expected));
    }
    if !keep.is_multiple_of(n_group) || !total.is_multiple_of(n_group) {
        let expected = format!("a multiple of n_group ({n_group}): routing is limited by group");
        return Err(Error::mismatch("experts to keep in a layer", keep, expected));
    }
    if keep / n_group * topk_group.min(n_group) < top_k {
        let expected = format!("enough for {top_k} choices in {topk_group} of {n_group} groups");
        return Err(Error::mismatch("experts to keep in a layer", keep, expected));
    }
    let group_len = total / n_group;
    let mut kept: Vec<usize> = (0..n_group)
        .flat_map(|group| {
            let mut members: Vec<usize> = (group * group_len..(group + 1) * group_len).collect();
            members.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
            members.truncate(keep / n_group);
            members
        })
        .collect();
    kept.sort_unstable();
    Ok(kept)
}

/// Writes `source` with fewer experts into the new directory `destination`, or goes on where a killed run with the same
/// options was.
///
/// # Errors
/// A calibration of another model, counts that routing does not allow, or a failing file system.
pub fn prune(
    source: Source<'_>,
    stats: &Stats,
    options: PruneOptions,
    destination: &Path,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<()> {
    stats.check_model(source.checkpoint)?;
    let inventory = Inventory::take(source.config, source.checkpoint)?;
    let (kept, saliency_share) = choose(source, &inventory, stats, options)?;
    let blocks = blocks(source, &inventory, &kept);
    let plan: Vec<Move<'_>> = source
        .checkpoint
        .tensors()
        .map(|tensor| plan_tensor(tensor, &blocks))
        .collect::<Result<Vec<_>>>()?
        .into_iter()
        .flatten()
        .collect();
    let job = json!({
        "command": "prune",
        "version": env!("CARGO_PKG_VERSION"),
        "source": source.checkpoint.identity(),
        "kept": kept,
        "score": options.score.name(),
        "max_shard_bytes": options.max_shard_bytes,
    });
    let specs = plan.iter().map(|step| step.spec.clone()).collect();
    let mut product = match Product::begin(destination, &job, specs, options.max_shard_bytes)? {
        Begun::Open(product) => product,
        Begun::Complete => return Ok(()),
    };
    let bytes = |step: &Move<'_>| step.spec.size_bytes().unwrap_or(0) as u64;
    let mut meter = Meter::new(plan.iter().map(bytes).sum(), progress);
    for step in &plan {
        if product.is_done(&step.spec.name) {
            meter.skip(&step.spec.name, bytes(step), None);
            continue;
        }
        product.write(&step.spec.name, &step.data())?;
        source.checkpoint.release(step.tensor.bytes);
        meter.add(&step.spec.name, bytes(step), None);
    }
    let config = config(source, &kept, options);
    let mut receipt = Receipt::new("prune", source);
    let counts: Vec<usize> = kept.values().map(Vec::len).collect();
    receipt.details.extend([
        ("score".to_owned(), json!(options.score.name())),
        ("kept_experts".to_owned(), json!(counts.first())),
        ("mtp".to_owned(), json!(if options.mtp == MtpExperts::Whole { "whole" } else { "pruned" })),
        ("saliency_share_kept".to_owned(), json!(saliency_share)),
        ("calibration".to_owned(), json!(stats.info)),
        ("expert_keep".to_owned(), config["expert_keep"].clone()),
    ]);
    for module in &inventory.modules {
        let mut module = module.clone();
        if let (Place::Experts { .. }, Some(layer)) = (&module.place, module.layer) {
            module.count = kept.get(&layer).map_or(module.count, Vec::len);
        }
        let bytes = module.count as u64 * module.source_format.matrix_bytes(module.rows, module.cols);
        receipt.add_module(&module, module.source_format, &json!({ "bytes": bytes, "lossless": true }));
    }
    let files = report::files(source, &receipt);
    product.finish(&config, &files)
}

/// The experts that stay, and which share of the combine-weighted output norms they had, by layer.
fn choose(
    source: Source<'_>,
    inventory: &Inventory,
    stats: &Stats,
    options: PruneOptions,
) -> Result<(Kept, BTreeMap<usize, f64>)> {
    let moe = &source.config.moe;
    let mut kept = Kept::new();
    let mut shares = BTreeMap::new();
    for module in &inventory.modules {
        let (Place::Experts { block, projection: Projection::Gate }, Some(layer)) = (&module.place, module.layer)
        else {
            continue;
        };
        if module.mtp && options.mtp == MtpExperts::Whole {
            continue;
        }
        let saliency = stats.saliency(block)?;
        if saliency.tokens.len() != module.count {
            let what = format!("calibrated experts of {block}");
            return Err(Error::mismatch(what, saliency.tokens.len(), module.count));
        }
        let scores = options.score.of(&saliency, layer);
        let chosen = select(&scores, options.keep, moe.n_group, moe.topk_group, moe.num_experts_per_tok)?;
        let sum = |experts: &mut dyn Iterator<Item = usize>| -> f64 {
            experts.map(|expert| f64::from(saliency.gate_norm[expert])).sum()
        };
        shares.insert(layer, sum(&mut chosen.iter().copied()) / sum(&mut (0..module.count)).max(f64::MIN_POSITIVE));
        kept.insert(layer, chosen);
    }
    if kept.is_empty() {
        return Err(Error::mismatch("layers with experts", 0, "at least 1"));
    }
    Ok((kept, shares))
}

/// A block whose experts are pruned.
struct Block<'a> {
    /// `model.layers.3.mlp.`
    prefix: String,
    /// `model.layers.3.mlp.gate.`
    router: String,
    count: usize,
    kept: &'a [usize],
}

fn blocks<'a>(source: Source<'_>, inventory: &Inventory, kept: &'a Kept) -> Vec<Block<'a>> {
    let gates = inventory.modules.iter().filter_map(|module| match (&module.place, module.layer) {
        (Place::Experts { block, projection: Projection::Gate }, Some(layer)) => Some((block, layer, module.count)),
        _ => None,
    });
    gates
        .filter_map(|(block, layer, count)| {
            let kept = kept.get(&layer)?;
            let router = format!("{block}.{}.", source.config.moe.router_name);
            Some(Block { prefix: format!("{block}."), router, count, kept })
        })
        .collect()
}

/// A tensor of the product and where its bytes come from.
struct Move<'a> {
    spec: TensorSpec,
    tensor: TensorView<'a>,
    /// Slices along the first dimension; `None` for all of it.
    slices: Option<(usize, &'a [usize])>,
}

impl Move<'_> {
    fn data(&self) -> Cow<'_, [u8]> {
        match self.slices {
            None => Cow::Borrowed(self.tensor.bytes),
            Some((count, kept)) => {
                let size_bytes = self.tensor.bytes.len() / count;
                Cow::Owned(
                    kept.iter().flat_map(|&at| &self.tensor.bytes[at * size_bytes..][..size_bytes]).copied().collect(),
                )
            }
        }
    }
}

/// What becomes of a tensor; `None` if it goes with its expert.
fn plan_tensor<'a>(tensor: TensorView<'a>, blocks: &'a [Block<'_>]) -> Result<Option<Move<'a>>> {
    let spec = |name: String, shape: Vec<usize>| TensorSpec { name, dtype: tensor.dtype, shape };
    let whole = || Move { spec: spec(tensor.name.to_owned(), tensor.shape.to_vec()), tensor, slices: None };
    // Layer 1's prefix ends in a dot, so that it is none of layer 11's.
    let Some(block) = blocks.iter().find(|block| tensor.name.starts_with(&block.prefix)) else {
        return Ok(Some(whole()));
    };
    let sliced = || {
        let mut shape = tensor.shape.to_vec();
        shape[0] = block.kept.len();
        Move { spec: spec(tensor.name.to_owned(), shape), tensor, slices: Some((block.count, block.kept)) }
    };
    let leads_with_experts = tensor.shape.first() == Some(&block.count);
    let rest = &tensor.name[block.prefix.len()..];
    if tensor.name.starts_with(&block.router) {
        if !leads_with_experts {
            return Err(Error::mismatch(
                format!("{}: shape", tensor.name),
                format!("{:?}", tensor.shape),
                format!("a row for each of {} experts, to slice", block.count),
            ));
        }
        return Ok(Some(sliced()));
    }
    if let Some((number, part)) = rest.strip_prefix("experts.").and_then(|rest| rest.split_once('.'))
        && let Ok(number) = number.parse::<usize>()
    {
        let place = block.kept.iter().position(|&expert| expert == number);
        return Ok(place.map(|place| {
            let name = format!("{}experts.{place}.{part}", block.prefix);
            Move { spec: spec(name, tensor.shape.to_vec()), tensor, slices: None }
        }));
    }
    let stacked = rest.starts_with("switch_mlp.") || rest.starts_with("experts.");
    // A global scale that all experts share has one element.
    if stacked && leads_with_experts { Ok(Some(sliced())) } else { Ok(Some(whole())) }
}

/// The source's config with the new count, and `expert_keep`: the original number of every expert, by layer. A model that
/// was pruned before has its numbers carried through.
fn config(source: Source<'_>, kept: &Kept, options: PruneOptions) -> Value {
    let checkpoint: &Checkpoint = source.checkpoint;
    let mut config = checkpoint.config.as_object().cloned().unwrap_or_default();
    for key in ["n_routed_experts", "num_experts", "num_local_experts"] {
        if config.contains_key(key) {
            config.insert(key.to_owned(), json!(options.keep));
        }
    }
    let mut provenance = config.get("expert_keep").and_then(Value::as_object).cloned().unwrap_or_else(Map::new);
    for (layer, kept) in kept {
        let earlier: Option<Vec<u64>> = provenance
            .get(&layer.to_string())
            .and_then(Value::as_array)
            .map(|ids| ids.iter().filter_map(Value::as_u64).collect());
        let original = kept
            .iter()
            .map(|&expert| earlier.as_ref().and_then(|ids| ids.get(expert).copied()).unwrap_or(expert as u64));
        provenance.insert(layer.to_string(), original.collect());
    }
    config.insert("expert_keep".to_owned(), Value::Object(provenance));
    Value::Object(config)
}

/// Experts of the layers of a model, for turning a ratio into a count.
///
/// # Errors
/// As [`Inventory::take`]; also if layers have different numbers.
pub fn experts_per_layer(source: Source<'_>) -> Result<usize> {
    let inventory = Inventory::take(source.config, source.checkpoint)?;
    let mut counts: Vec<usize> = inventory
        .modules
        .iter()
        .filter(|module| matches!(module.place, Place::Experts { .. }) && !module.mtp)
        .map(|module| module.count)
        .collect();
    counts.dedup();
    match counts.as_slice() {
        [count] => Ok(*count),
        _ => {
            Err(Error::mismatch("experts of the layers", format!("{counts:?}"), "the same number in all (give --keep)"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_stay_in_their_order() {
        let scores = [0.3, 0.9, 0.1, 0.9, 0.5, 0.2];
        assert_eq!(select(&scores, 3, 1, 1, 2).expect("legal"), [1, 3, 4]);
        // Of every group of three its best.
        assert_eq!(select(&scores, 2, 2, 2, 2).expect("legal"), [1, 3]);
        assert_eq!(select(&scores, 4, 2, 1, 2).expect("legal"), [0, 1, 3, 4]);
        let error =
            |keep, groups, topk_group, top_k| select(&scores, keep, groups, topk_group, top_k).unwrap_err().to_string();
        assert!(error(3, 2, 2, 2).contains("is 3, expected a multiple of n_group (2)"));
        assert!(error(1, 1, 1, 2).contains("is 1, expected 2 (what a token uses) to 6"));
        assert!(error(7, 1, 1, 2).contains("to 6"));
        assert!(error(2, 2, 1, 2).contains("enough for 2 choices in 1 of 2 groups"));
    }

    #[test]
    fn scores_by_hand() {
        let saliency = Saliency {
            tokens: vec![2, 4, 0],
            gate: vec![1.0, 2.0, 0.0],
            gate_norm: vec![6.0, 8.0, 0.0],
            norm: vec![10.0, 12.0, 0.0],
            gate_norm_sq: vec![18.0, 16.0, 0.0],
            norm_max: vec![7.0, 5.0, 0.0],
        };
        assert_eq!(Score::Reap.of(&saliency, 0), [3.0, 2.0, 0.0]);
        assert_eq!(Score::WeightedSum.of(&saliency, 0), [6.0, 8.0, 0.0]);
        assert_eq!(Score::ReapRms.of(&saliency, 0), [3.0, 2.0, 0.0]);
        assert_eq!(Score::Frequency.of(&saliency, 0), [2.0, 4.0, 0.0]);
        assert_eq!(Score::MeanNorm.of(&saliency, 0), [5.0, 3.0, 0.0]);
        let random = |layer| Score::Random(1).of(&saliency, layer);
        assert!(random(0) == random(0) && random(0) != random(1));
    }
}
