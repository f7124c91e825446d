//! Which module gets how many bits, so that the least is lost under a budget: losses of every module in every format, and
//! a multiplier that trades them against bytes (Shoham and Gersho 1988).

use crate::inventory::{Inventory, Role};
use crate::plan::{Plan, Rule, stays};
use crate::{Error, Result, formats};
use moellon_model::ModelConfig;
use moellon_tensor::WeightFormat;

/// A format that a module could have.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// The format.
    pub format: WeightFormat,
    /// What it costs, in the unit of the budget.
    pub cost: f64,
    /// What it loses: expected KL divergence in nats.
    pub loss: f64,
}

/// What an allocation may spend.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Budget {
    /// Mean bits of all weights that a plan decides on.
    BitsPerWeight(f64),
    /// Bytes of all weights that a plan decides on.
    Bytes(f64),
    /// Bytes that decoding one token reads of these weights.
    BytesPerToken(f64),
}

/// How much of a module one decoded token reads.
pub(crate) fn share_per_token(role: Role, mtp: bool, config: &ModelConfig, count: usize) -> f64 {
    match role {
        _ if mtp => 0.0,
        Role::Experts => config.moe.num_experts_per_tok as f64 / count as f64,
        Role::Embedding => 1.0 / config.vocab_size as f64,
        _ => 1.0,
    }
}

/// Picks one choice for every item: the least sum of losses whose sum of costs is at most `limit`, up to the gaps that the
/// convex hulls leave, which are then filled one step at a time. Returns indices into the choices.
///
/// # Errors
/// If the cheapest choices together cost more than `limit`.
pub fn allocate(items: &[Vec<Choice>], limit: f64) -> Result<Vec<usize>> {
    let pick = |multiplier: f64| -> Vec<usize> {
        items.iter().map(|choices| best(choices, |c| c.loss + multiplier * c.cost)).collect()
    };
    let cost = |picked: &[usize]| picked.iter().zip(items).map(|(&at, choices)| choices[at].cost).sum::<f64>();
    let cheapest: Vec<usize> = items.iter().map(|choices| best(choices, |c| c.cost)).collect();
    if cost(&cheapest) > limit * (1.0 + 1e-9) {
        let what = "budget of the allocation in the unit asked for";
        return Err(Error::mismatch(what, format!("{limit:.4e}"), format!("at least {:.4e}", cost(&cheapest))));
    }
    // The cost falls as the multiplier rises: bisect its logarithm.
    let (mut low, mut high) = (-80.0f64, 40.0f64);
    let mut picked = cheapest;
    for _ in 0..100 {
        let middle = 0.5 * (low + high);
        let candidate = pick(middle.exp());
        if cost(&candidate) <= limit {
            (picked, high) = (candidate, middle);
        } else {
            low = middle;
        }
    }
    let left = limit - cost(&picked);
    fill(items, &mut picked, left);
    Ok(picked)
}

fn best(choices: &[Choice], value: impl Fn(&Choice) -> f64) -> usize {
    (0..choices.len()).min_by(|&a, &b| value(&choices[a]).total_cmp(&value(&choices[b]))).unwrap_or(0)
}

/// Spends what is left on the steps that save most loss a cost.
fn fill(items: &[Vec<Choice>], picked: &mut [usize], mut left: f64) {
    loop {
        let mut step: Option<(f64, usize, usize)> = None;
        for (item, choices) in items.iter().enumerate() {
            let now = choices[picked[item]];
            for (at, choice) in choices.iter().enumerate() {
                let (cost, gain) = (choice.cost - now.cost, now.loss - choice.loss);
                if gain > 0.0 && cost <= left {
                    let rate = gain / cost.max(f64::MIN_POSITIVE);
                    if step.is_none_or(|(best, ..)| rate > best) {
                        step = Some((rate, item, at));
                    }
                }
            }
        }
        let Some((_, item, at)) = step else { return };
        left -= items[item][at].cost - items[item][picked[item]].cost;
        picked[item] = at;
    }
}

/// The depth-U rule of the original notes: experts of the first and last layers in a wider format than those in the
/// middle, everything else in the wider one too, the head in affine-6. As many layers as `budget` allows are wide.
///
/// # Errors
/// If nothing fits the budget.
pub fn depth_u(
    config: &ModelConfig,
    inventory: &Inventory,
    wide: WeightFormat,
    narrow: WeightFormat,
    budget: Budget,
) -> Result<Plan> {
    let layers: Vec<usize> = {
        let experts = inventory.modules.iter().filter(|m| m.role == Role::Experts && !m.mtp);
        let mut layers: Vec<usize> = experts.filter_map(|m| m.layer).collect();
        layers.dedup();
        layers
    };
    let plan = |num_wide: usize| {
        let rule =
            |modules: &str, layers, format| Rule { modules: modules.to_owned(), layers, format: formats::name(format) };
        let experts = "model.layers.*.experts.*";
        let mut rules = vec![rule("*", None, wide)];
        rules.push(rule("lm_head", None, formats::parse("affine-6").expect("affine-6 is a format")));
        let (first, last) = (num_wide.div_ceil(2), num_wide / 2);
        // The two arms of the U leave this in the middle.
        if let [begin, .., end] | [begin @ end] = &layers[first..layers.len() - last] {
            rules.push(rule(experts, Some([*begin, *end]), narrow));
        }
        Plan { schema: 1, name: format!("depth-u-{num_wide}-of-{}", layers.len()), rules }
    };
    for num_wide in (0..=layers.len()).rev() {
        let plan = plan(num_wide);
        let (cost, limit) = plan_cost(&plan, config, inventory, budget)?;
        if cost <= limit * (1.0 + 1e-9) {
            return Ok(plan);
        }
        if num_wide == 0 {
            let what = "budget of the depth-U plan in bytes";
            return Err(Error::mismatch(what, format!("{limit:.4e}"), format!("at least {cost:.4e}")));
        }
    }
    unreachable!("the loop returns at 0 wide layers")
}

/// Bytes that a plan costs in the unit of `budget`, and the limit in the same unit.
fn plan_cost(plan: &Plan, config: &ModelConfig, inventory: &Inventory, budget: Budget) -> Result<(f64, f64)> {
    let formats = plan.formats(inventory)?;
    let mut cost = 0.0;
    for (module, format) in inventory.modules.iter().zip(formats).filter(|(module, _)| !stays(module)) {
        let bytes = module.count as f64 * format.matrix_bytes(module.rows, module.cols) as f64;
        cost += bytes * unit_share(budget, module.role, module.mtp, config, module.count);
    }
    Ok((cost, limit(budget, inventory)))
}

/// What a byte of a module counts in the unit of `budget`.
pub(crate) fn unit_share(budget: Budget, role: Role, mtp: bool, config: &ModelConfig, count: usize) -> f64 {
    match budget {
        Budget::BitsPerWeight(_) | Budget::Bytes(_) => 1.0,
        Budget::BytesPerToken(_) => share_per_token(role, mtp, config, count),
    }
}

/// The budget in bytes.
pub(crate) fn limit(budget: Budget, inventory: &Inventory) -> f64 {
    match budget {
        Budget::BitsPerWeight(bits) => {
            let decided = inventory.modules.iter().filter(|module| !stays(module));
            decided.map(|module| module.num_weights() as f64).sum::<f64>() * bits / 8.0
        }
        Budget::Bytes(bytes) | Budget::BytesPerToken(bytes) => bytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moellon_tensor::rng::SplitMix64;

    fn choice(cost: f64, loss: f64) -> Choice {
        Choice { format: WeightFormat::Bf16, cost, loss }
    }

    /// Against all combinations: the multiplier finds the hull, the filling the rest.
    #[test]
    fn little_is_lost_to_the_best_of_all_combinations() {
        let mut rng = SplitMix64::new(11);
        for _ in 0..20 {
            let items: Vec<Vec<Choice>> = (0..5)
                .map(|_| {
                    let (size, slope) = (1.0 + rng.next_f64() * 9.0, rng.next_f64() * 10.0);
                    // Six dB a bit.
                    [2.0, 3.0, 4.0, 6.0].map(|bits| choice(size * bits, slope * 0.25f64.powf(bits))).to_vec()
                })
                .collect();
            let all: f64 = items.iter().map(|choices| choices[3].cost).sum();
            let limit = all * 0.6;
            let picked = allocate(&items, limit).expect("the budget suffices");
            let sum = |picked: &[usize], of: fn(&Choice) -> f64| -> f64 {
                picked.iter().zip(&items).map(|(&at, choices)| of(&choices[at])).sum()
            };
            assert!(sum(&picked, |c| c.cost) <= limit);
            let exhaustive = (0..4usize.pow(5))
                .map(|code| (0..5).map(|i| code / 4usize.pow(i) % 4).collect::<Vec<usize>>())
                .filter(|picked| sum(picked, |c| c.cost) <= limit)
                .map(|picked| sum(&picked, |c| c.loss))
                .fold(f64::INFINITY, f64::min);
            let found = sum(&picked, |c| c.loss);
            assert!(found <= exhaustive * 1.35 + 1e-12, "{found} against {exhaustive}");
        }
    }

    #[test]
    fn a_budget_that_nothing_fits_is_refused() {
        let items = vec![vec![choice(3.0, 1.0), choice(5.0, 0.5)]];
        assert!(allocate(&items, 2.9).unwrap_err().to_string().contains("expected at least 3.0000e0"));
        assert_eq!(allocate(&items, 3.0).expect("fits"), [0]);
        assert_eq!(allocate(&items, 5.0).expect("fits"), [1]);
    }
}
