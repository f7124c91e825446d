//! One lever on one model: arms are built, run in turn, judged.

use super::arm::{self, Room};
use super::quality::quality;
use super::workload::{Answer, Decode, FirstToken, Prefix, Serve, Stepper, questions};
use super::{Applicable, Base};
use anyhow::{Result, anyhow};
use moellon_lab::disturbance::Witness;
use moellon_lab::in_turn::{Arm, Arms, InTurn, Side, in_turn, main_taint};
use moellon_lab::lever::{Lever, Setting, Verdict, Workload};
use moellon_lab::roofline::{CostModel, OVERLAP};
use moellon_lab::statistics::{Outcome, Rule};
use moellon_surgery::distance::Quality;
use serde::{Deserialize, Serialize};

/// Requests of a serving window that a setting does not say.
const REQUESTS: usize = 6;

/// What one lever said of one model.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Tested {
    /// The lever as it was tested.
    pub lever: Lever,
    /// One entry a B.
    pub points: Vec<Point>,
    /// Of the lever: keep if any of its points is to be kept.
    pub verdict: Verdict,
}

impl Tested {
    /// The verdict of this run by itself, whatever earlier ones said.
    pub fn verdict_alone(&self) -> Verdict {
        overall(self.points.iter().map(|point| point.alone.unwrap_or(point.verdict)))
    }
}

/// A against one B.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Point {
    /// Names of A and B.
    pub arms: [String; 2],
    /// What is to be done about it.
    pub verdict: Verdict,
    /// Why.
    pub reason: String,
    /// The result in the lever's own unit.
    pub in_unit: String,
    /// The comparison; none where the lever is not applicable.
    pub measured: Option<InTurn>,
    /// Bytes of a unit and share of the bandwidth of A and B, where units are tokens.
    pub bytes: Option<[ArmBytes; 2]>,
    /// Predictions of A and B against those of the model as it is, where they may differ.
    pub quality: Option<[Quality; 2]>,
    /// What this run says by itself, where the verdict of an earlier one stands instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alone: Option<Verdict>,
}

/// What an arm reads.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ArmBytes {
    /// Of one token, by formats and the union of experts.
    pub bytes_per_token: f64,
    /// Bytes over time.
    pub gb_s: f64,
    /// Of the bandwidth below.
    pub bandwidth_share: f64,
    /// Read bandwidth of the memory that the arm computes from, measured before it ran; 0 in receipts from before it stood here.
    #[serde(default)]
    pub read_gb_s: f64,
}

/// What an arm's steps read.
struct Reads {
    cost: CostModel,
    setting: Setting,
}

impl Reads {
    /// Bytes of a token, all of its step's sequences together; `None` where a drafter reads bytes that nobody counts.
    fn bytes_per_token(&self, side: &Side) -> Option<f64> {
        let batch = self.setting.batch.unwrap_or(1) as f64;
        let extra = |name: &str| side.extra.get(name).copied();
        let of_drafts = match self.setting.speculate.as_deref() {
            None | Some("off") if self.setting.identical_prompts == Some(true) => {
                return Some(self.cost.bytes_of_copies(batch) / batch);
            }
            None | Some("off") => return Some(self.cost.bytes(batch) / batch),
            Some("ngram") => 0.0,
            Some("mtp") => self.cost.draft_bytes,
            Some(_) => return None,
        };
        let (drafts, tokens) = (extra("drafts a step")?, extra("tokens a step")?);
        Some((self.cost.verify_bytes(drafts, OVERLAP) + drafts * of_drafts) / tokens.max(1.0))
    }

    fn bytes(&self, side: &Side) -> Option<ArmBytes> {
        let (bytes_per_token, read_gb_s) = (self.bytes_per_token(side)?, self.cost.bandwidth / 1e9);
        // Without a window that counts there is no rate; an infinite one could not be read back from the receipt.
        let gb_s = if side.median_s > 0.0 { bytes_per_token / side.median_s / 1e9 } else { 0.0 };
        Some(ArmBytes { bytes_per_token, gb_s, bandwidth_share: gb_s / read_gb_s, read_gb_s })
    }
}

/// Runs a lever.
pub fn run(base: &Base, lever: &Lever, witness: &mut dyn Witness) -> Result<Tested> {
    let mut points = Vec::new();
    let a = lever.common.with(&lever.a);
    let mut quality_of_a = None;
    for b in &lever.b {
        let b = lever.common.with(b);
        let arms = [label(&lever.a), label_of_b(lever, &b)];
        points.push(match point(base, lever, [&a, &b], &arms, &mut quality_of_a, witness)? {
            Ok(point) => point,
            Err(reason) => Point {
                arms,
                verdict: Verdict::NotApplicable,
                reason,
                in_unit: String::new(),
                measured: None,
                bytes: None,
                quality: None,
                alone: None,
            },
        });
    }
    let verdict = overall(points.iter().map(|point| point.verdict));
    Ok(Tested { lever: lever.clone(), points, verdict })
}

fn label(setting: &Setting) -> String {
    setting.label()
}

fn label_of_b(lever: &Lever, merged: &Setting) -> String {
    // The label is B's own; what both have in common is the lever's matter.
    lever.b.iter().find(|b| lever.common.with(b) == *merged).map_or_else(|| merged.label(), Setting::label)
}

/// A lever with several points is kept if one of them is; it is undecided before it is dropped.
fn overall(verdicts: impl Iterator<Item = Verdict> + Clone) -> Verdict {
    [Verdict::Keep, Verdict::Undecided, Verdict::Drop]
        .into_iter()
        .find(|wanted| verdicts.clone().any(|verdict| verdict == *wanted))
        .unwrap_or(Verdict::NotApplicable)
}

fn point(
    base: &Base,
    lever: &Lever,
    settings: [&Setting; 2],
    arms: &[String; 2],
    quality_of_a: &mut Option<Quality>,
    witness: &mut dyn Witness,
) -> Result<Applicable<Point>> {
    if let Some(reason) = settings.into_iter().find_map(|setting| arm::refusal(base, setting)) {
        return Ok(Err(reason));
    }
    let quality = if lever.lossless || lever.workload != Workload::Decode {
        None
    } else {
        let of_a = match *quality_of_a {
            Some(known) => known,
            None => match quality(base, settings[0])? {
                Ok(quality) => *quality_of_a.insert(quality),
                Err(reason) => return Ok(Err(reason)),
            },
        };
        match quality(base, settings[1])? {
            Ok(of_b) => Some([of_a, of_b]),
            Err(reason) => return Ok(Err(reason)),
        }
    };
    // What costs too much is dropped whatever time it saves: a short look at its time is enough.
    let rule = match &quality {
        Some([a, b]) if too_far(lever, a, b).is_some() => {
            Rule { max_pairs: lever.rule.max_pairs.min(2 * lever.rule.min_pairs), ..lever.rule }
        }
        _ => lever.rule,
    };
    let folder = tempfile::tempdir()?;
    let mut builds = 0;
    let mut both = || -> Result<Applicable<(Arms, [Reads; 2])>> {
        let side = |i: usize| build(base, lever, settings[i], &folder.path().join(format!("{i}")));
        builds += 1;
        // Whichever is built first gets the memory that is there: an engine and its twin differed by 4 % for minutes on end.
        let (a, b) = if builds % 2 == 1 {
            let a = side(0)?;
            (a, side(1)?)
        } else {
            let b = side(1)?;
            (side(0)?, b)
        };
        Ok(match (a, b) {
            (Ok(a), Ok(b)) => Ok(([a.0, b.0], [a.1, b.1])),
            (Err(reason), _) | (_, Err(reason)) => Err(reason),
        })
    };
    let (built, [a, b]) = match both()? {
        Ok(built) => built,
        Err(reason) => return Ok(Err(reason)),
    };
    let mut first = Some(built);
    let mut fresh = || match first.take() {
        Some(arms) => Ok(arms),
        None => match both() {
            Ok(built) => built.map(|(arms, _)| arms),
            Err(error) => Err(format!("{error:#}")),
        },
    };
    let measured = in_turn(&mut fresh, &rule, witness).map_err(|error| anyhow!(error))?;
    let thought = |side: &Side| side.extra.get("of them thought").copied().unwrap_or(0.0);
    if lever.workload == Workload::Answer && thought(&measured.a) == 0.0 {
        return Ok(Err("the model does not think: there is no thought to skip".to_owned()));
    }
    let bytes = match lever.workload {
        Workload::Decode => a.bytes(&measured.a).zip(b.bytes(&measured.b)).map(|(a, b)| [a, b]),
        Workload::FirstToken | Workload::Answer | Workload::Serve => None,
    };
    let (verdict, reason) = judge(lever, &measured, quality.as_ref());
    Ok(Ok(Point {
        arms: arms.clone(),
        verdict,
        reason,
        in_unit: in_unit(lever, &measured),
        measured: Some(measured),
        bytes,
        quality,
        alone: None,
    }))
}

/// The verdict and why.
fn judge(lever: &Lever, measured: &InTurn, quality: Option<&[Quality; 2]>) -> (Verdict, String) {
    if lever.lossless && !measured.same_output {
        return (Verdict::Drop, "outputs differ, and the lever must not change them".to_owned());
    }
    // What costs too much is dropped whatever time it saves.
    let too_far = quality.and_then(|[a, b]| too_far(lever, a, b));
    let at_most = measured.speedup.map_or(f64::INFINITY, |speedup| speedup.high - 1.0);
    match measured.outcome {
        Outcome::Undecided | Outcome::Equal if too_far.is_some() => {
            (Verdict::Drop, format!("hardly faster, and {}", too_far.unwrap_or_default()))
        }
        Outcome::Undecided if at_most < lever.rule.minimum_effect => {
            (Verdict::Drop, format!("at most {:.1} % faster", 100.0 * at_most.max(0.0)))
        }
        Outcome::Undecided => {
            let taint = main_taint(&measured.windows).filter(|_| measured.windows.discarded > measured.windows.kept);
            let why = taint.map_or_else(|| "the interval is wide".to_owned(), |taint| format!("too often {taint}"));
            (Verdict::Undecided, why)
        }
        Outcome::Equal => {
            (Verdict::Drop, format!("no difference of {:.0} % or more", 100.0 * lever.rule.minimum_effect))
        }
        Outcome::Slower => (Verdict::Drop, "slower".to_owned()),
        Outcome::Faster if lever.lossless => (Verdict::Keep, "faster, the same output".to_owned()),
        Outcome::Faster => match quality {
            None => (Verdict::Undecided, "faster; what the other output is worth is not measured here".to_owned()),
            Some(_) => match too_far {
                Some(why) => (Verdict::Drop, format!("faster, but {why}")),
                None => (Verdict::Keep, "faster, and near enough".to_owned()),
            },
        },
    }
}

/// Lets the verdicts of an earlier run of the same program, lever, model and machine stand where this run does not contradict
/// them: what lies near a rule's edge would otherwise be kept one day and dropped the next.
pub fn stand(tested: &mut Tested, before: &Tested, receipt: &str) {
    for point in &mut tested.points {
        let Some(earlier) = before.points.iter().find(|earlier| earlier.arms == point.arms) else { continue };
        let Some(measured) = &point.measured else { continue };
        // What time has not decided, this run knows as well as any other.
        let by_time = earlier.measured.is_some()
            && (!tested.lever.lossless || measured.same_output)
            && point.quality.as_ref().is_none_or(|[a, b]| too_far(&tested.lever, a, b).is_none());
        if by_time && earlier.verdict != point.verdict && !contradicts(measured, &tested.lever, earlier.verdict) {
            let own = format!("{} by itself ({})", point.verdict.name(), point.reason);
            point.reason = format!("as in {receipt}, which this run does not contradict; {own}");
            point.alone = Some(std::mem::replace(&mut point.verdict, earlier.verdict));
        }
    }
    tested.verdict = overall(tested.points.iter().map(|point| point.verdict));
}

/// Whether what was measured is clear of the doubtful zone, between half the minimum effect and the whole, on the other side of
/// `verdict`.
fn contradicts(measured: &InTurn, lever: &Lever, verdict: Verdict) -> bool {
    let effect = lever.rule.minimum_effect;
    let Some(gain) = measured.speedup.map(|s| [s.low - 1.0, s.high - 1.0]) else { return false };
    let (is_gain, is_none) = (gain[0] >= effect, gain[1] < effect / 2.0);
    match verdict {
        Verdict::Keep => is_none,
        Verdict::Drop => is_gain,
        Verdict::Undecided => is_none || is_gain,
        Verdict::NotApplicable => true,
    }
}

/// What B loses beyond the lever's rule and beyond A; `None` if it is near enough.
fn too_far(lever: &Lever, a: &Quality, b: &Quality) -> Option<String> {
    let rule = lever.quality;
    // No worse than what it is compared with is good enough, up to the error of both.
    let noise = 2.0 * (a.kl_standard_error + b.kl_standard_error);
    if b.kl > rule.max_kl && b.kl > a.kl + noise.min(0.1 * a.kl) {
        return Some(format!("KL {:.3} is over {}", b.kl, rule.max_kl));
    }
    if b.top1 < rule.min_top1 && b.top1 < a.top1 {
        let [found, least] = [b.top1, rule.min_top1].map(|share| format!("{:.1} %", 100.0 * share));
        return Some(format!("{found} of next tokens agree, not {least}"));
    }
    None
}

/// A and B in the lever's unit.
fn in_unit(lever: &Lever, measured: &InTurn) -> String {
    let (a, b) = (&measured.a, &measured.b);
    let extra = |side: &Side, name: &str| side.extra.get(name).copied();
    match lever.unit.as_str() {
        unit if unit.starts_with("tok/s") => format!("{:.0} to {:.0} {unit}", 1.0 / a.median_s, 1.0 / b.median_s),
        unit if unit.starts_with("ms") => format!("{:.2} to {:.2} {unit}", a.median_s * 1e3, b.median_s * 1e3),
        "x" => format!("{:.2}x", measured.speedup.map_or(a.median_s / b.median_s, |s| s.mean)),
        "accepted %" => match extra(b, "accepted %") {
            Some(share) => {
                format!("{share:.0} % accepted, {:.2} tokens a step", extra(b, "tokens a step").unwrap_or(1.0))
            }
            None => "nothing drafted".to_owned(),
        },
        name => match (extra(a, name), extra(b, name)) {
            (Some(a), Some(b)) => format!("{a:.2} to {b:.2} {name}"),
            (None, Some(b)) => format!("{b:.2} {name}"),
            (_, None) => String::new(),
        },
    }
}

/// Prompts of `tokens` tokens from different places of the text.
fn prompts(text: &[u32], count: usize, tokens: usize, identical: bool) -> Vec<Vec<u32>> {
    // A stride that is no multiple of a line, so that no two begin alike.
    let stride = (text.len() - tokens) / count.max(1);
    (0..count).map(|i| if identical { 0 } else { i * stride }).map(|at| text[at..at + tokens].to_vec()).collect()
}

fn build(
    base: &Base,
    lever: &Lever,
    setting: &Setting,
    disk: &std::path::Path,
) -> Result<Applicable<(Box<dyn Arm>, Reads)>> {
    let sequences = setting.batch.unwrap_or(1);
    let concurrent = setting.concurrent.unwrap_or(1);
    let own = 16;
    let positions = lever.prompt + lever.tokens + own;
    if base.text.len() < 2 * positions {
        return Ok(Err(format!("the texts have {} tokens, needed are {}", base.text.len(), 2 * positions)));
    }
    let disk = (setting.prefix.as_deref() == Some("disk")).then_some(disk);
    let room = match lever.workload {
        Workload::Decode => Room { sequences, positions, cached: sequences },
        Workload::FirstToken => Room { sequences: sequences.max(concurrent), positions, cached: 8 },
        Workload::Serve => Room { sequences, positions, cached: setting.concurrent.unwrap_or(REQUESTS) },
        // Questions in a template are not as long as a prompt of text.
        Workload::Answer => Room { sequences: 1, positions: 512.min(base.max_position), cached: 4 },
    };
    let (engine, cost) = match arm::engine(base, setting, room, disk)? {
        Ok(found) => found,
        Err(reason) => return Ok(Err(reason)),
    };
    let stepper = Stepper { engine, slowdown: setting.slowdown.unwrap_or(0.0) };
    let tokens = lever.tokens;
    let arm: Box<dyn Arm> = match lever.workload {
        Workload::Decode => {
            let prompts = prompts(&base.text, sequences, lever.prompt, setting.identical_prompts == Some(true));
            Box::new(Decode { stepper, prompts, tokens })
        }
        Workload::FirstToken => {
            let prefix = match setting.prefix.as_deref() {
                Some("warm") => Prefix::Warm,
                Some("disk") => Prefix::Disk,
                _ => Prefix::Cold,
            };
            let prefix_tokens = lever.prompt;
            Box::new(FirstToken { stepper, text: base.text.clone(), prefix_tokens, concurrent, prefix, round: 0 })
        }
        Workload::Serve => {
            let prompts = prompts(&base.text, setting.concurrent.unwrap_or(REQUESTS), lever.prompt, false);
            Box::new(Serve { stepper, prompts, tokens, round: 0 })
        }
        Workload::Answer => {
            let source = crate::model_source::ModelSource::open(base.directory.as_deref())?;
            let no_chat = || "the model has no chat template with thoughts".to_owned();
            let Some(questions) = questions(&source, base, setting.thinking != Some(false))? else {
                return Ok(Err(no_chat()));
            };
            let stop_ids = source.stop_ids(&base.tokenizer);
            let budget = setting.thinking_budget;
            match Answer::new(stepper, questions, stop_ids, &base.tokenizer, tokens, budget) {
                Some(arm) => Box::new(arm),
                None => return Ok(Err(no_chat())),
            }
        }
    };
    Ok(Ok((arm, Reads { cost, setting: setting.clone() })))
}

#[cfg(test)]
mod tests {
    use super::*;
    use moellon_lab::disturbance::Windows;
    use moellon_lab::statistics::Estimate;

    fn lever(lossless: bool) -> Lever {
        let text = format!(
            "title = 't'\nhypothesis = 'h'\nunit = 'x'\nworkload = 'decode'\nlossless = {lossless}\ntokens = 8\nprompt = 8\n[[b]]\n"
        );
        Lever::parse("test", &text).unwrap()
    }

    fn measured(outcome: Outcome, same_output: bool) -> InTurn {
        let (a, b) = (Side::default(), Side::default());
        InTurn { a, b, speedup: None, outcome, same_output, windows: Windows::default(), builds: 1, seconds: 0.0 }
    }

    #[test]
    fn verdicts_follow_the_rule() {
        let verdict = |lossless, outcome, same, kl: Option<(f64, f64)>| {
            let quality = kl.map(|(kl, top1)| {
                [Quality { top1: 1.0, ..Quality::default() }, Quality { kl, top1, ..Quality::default() }]
            });
            judge(&lever(lossless), &measured(outcome, same), quality.as_ref()).0
        };
        assert_eq!(verdict(true, Outcome::Faster, true, None), Verdict::Keep);
        // Losslessness that is claimed is checked, however fast it is.
        assert_eq!(verdict(true, Outcome::Faster, false, None), Verdict::Drop);
        assert_eq!(verdict(true, Outcome::Equal, true, None), Verdict::Drop);
        assert_eq!(verdict(true, Outcome::Slower, true, None), Verdict::Drop);
        assert_eq!(verdict(true, Outcome::Undecided, true, None), Verdict::Undecided);
        // An interval that reaches no gain worth having decides, even where it cannot tell equal from slower.
        let mut futile = measured(Outcome::Undecided, true);
        futile.speedup = Some(Estimate { mean: 0.99, low: 0.96, high: 1.015, confidence: 0.99 });
        assert_eq!(judge(&lever(true), &futile, None), (Verdict::Drop, "at most 1.5 % faster".to_owned()));
        assert_eq!(verdict(false, Outcome::Undecided, false, Some((0.06, 0.95))), Verdict::Drop);
        // 0.05 nats and 90 % are the defaults.
        assert_eq!(verdict(false, Outcome::Faster, false, Some((0.04, 0.95))), Verdict::Keep);
        assert_eq!(verdict(false, Outcome::Faster, false, Some((0.06, 0.95))), Verdict::Drop);
        assert_eq!(verdict(false, Outcome::Faster, false, Some((0.04, 0.85))), Verdict::Drop);
        // Quality that nobody measured is no reason to keep.
        assert_eq!(verdict(false, Outcome::Faster, false, None), Verdict::Undecided);
    }

    #[test]
    fn a_lever_is_kept_for_one_of_its_points() {
        use Verdict::{Drop, Keep, NotApplicable, Undecided};
        assert_eq!(overall([Drop, Keep, Undecided].into_iter()), Keep);
        assert_eq!(overall([Drop, NotApplicable, Undecided].into_iter()), Undecided);
        assert_eq!(overall([NotApplicable, Drop].into_iter()), Drop);
        assert_eq!(overall([NotApplicable].into_iter()), NotApplicable);
    }

    /// A test of a lever with one point, whose gain lies between `low` and `high`.
    fn tested(lossless: bool, verdict: Verdict, low: f64, high: f64) -> Tested {
        let speedup = Estimate { mean: 1.0 + 0.5 * (low + high), low: 1.0 + low, high: 1.0 + high, confidence: 0.95 };
        let measured = InTurn { speedup: Some(speedup), ..measured(Outcome::Undecided, true) };
        let point = Point {
            arms: ["a".to_owned(), "b".to_owned()],
            verdict,
            reason: "r".to_owned(),
            in_unit: String::new(),
            measured: Some(measured),
            bytes: None,
            quality: None,
            alone: None,
        };
        Tested { lever: lever(lossless), points: vec![point], verdict }
    }

    #[test]
    fn a_verdict_stands_until_it_is_contradicted() {
        use Verdict::{Drop, Keep, Undecided};
        let after = |before: Verdict, (own, low, high): (Verdict, f64, f64)| {
            let mut now = tested(true, own, low, high);
            stand(&mut now, &tested(true, before, 0.0, 0.0), "receipt");
            assert_eq!(now.verdict, now.points[0].verdict);
            (now.verdict, now.points[0].alone)
        };
        // The minimum effect is 2 %: what reaches into 1 to 2 % contradicts nothing.
        assert_eq!(after(Keep, (Drop, 0.004, 0.016)), (Keep, Some(Drop)));
        assert_eq!(after(Keep, (Drop, 0.001, 0.009)), (Drop, None));
        assert_eq!(after(Drop, (Keep, 0.012, 0.03)), (Drop, Some(Keep)));
        assert_eq!(after(Drop, (Keep, 0.021, 0.03)), (Keep, None));
        assert_eq!(after(Undecided, (Keep, 0.012, 0.03)), (Undecided, Some(Keep)));
        assert_eq!(after(Undecided, (Drop, -0.01, 0.002)), (Drop, None));
        assert_eq!(after(Keep, (Keep, 0.012, 0.03)), (Keep, None));
    }

    #[test]
    fn another_output_is_no_matter_of_time() {
        let mut now = tested(true, Verdict::Drop, 0.012, 0.03);
        now.points[0].measured.as_mut().unwrap().same_output = false;
        stand(&mut now, &tested(true, Verdict::Keep, 0.0, 0.0), "receipt");
        assert_eq!((now.verdict, now.points[0].alone), (Verdict::Drop, None));
    }

    #[test]
    fn prompts_are_different_unless_asked() {
        let text: Vec<u32> = (0..1000).collect();
        let distinct = prompts(&text, 8, 64, false);
        assert_eq!(distinct.iter().map(|p| p[0]).collect::<std::collections::BTreeSet<_>>().len(), 8);
        assert!(prompts(&text, 8, 64, true).iter().all(|p| *p == distinct[0]));
    }
}
