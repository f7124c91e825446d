//! What a step costs: seconds by rows, measured on this machine with this model, and corrected while it runs.

use super::head::{self, Head};
use moellon_model::batch::{Batch, LogitRows};
use moellon_model::session::greedy;
use moellon_model::{Decoder, Error as ModelError};
use moellon_ops::{Backend, Buffer, ElementType};
use moellon_tensor::rng::SplitMix64;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

/// Rows of the steps that are measured.
const ROWS: [usize; 15] = [1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64];

/// Times that each number of rows is measured, if there is time for it.
const ROUNDS: usize = 9;

/// Measuring ends after the round in which this is over.
const MAX_TIME: Duration = Duration::from_millis(1500);

/// Positions before the measured rows.
const CONTEXT: usize = 256;

/// First line of a saved curve.
const HEADER: &str = "moellon cost curve 1";

/// Seconds by rows of a step of the trunk and of a drafting step.
#[derive(Debug, Clone, PartialEq)]
pub struct CostCurve {
    /// Rows and seconds, rows ascending, seconds never descending.
    step: Vec<(usize, f64)>,
    /// The same of one run of the head or draft model with logits of every row; empty without one.
    draft: Vec<(usize, f64)>,
}

impl CostCurve {
    /// Measures a decoder and what drafts for it: random tokens of one sequence after some context, sizes in turn.
    ///
    /// As it will be: a plain step follows another one, a step that verifies follows a drafting step, and what either reads
    /// is as near as it then is. The first of each pair only brings it there.
    pub(crate) fn measure(
        decoder: &mut Decoder,
        mut head: Option<&mut Head>,
        backend: &mut dyn Backend,
    ) -> Result<Self, ModelError> {
        let sizes = *decoder.options();
        let most_rows = sizes.max_batch_tokens.min(sizes.max_logit_rows).min(sizes.max_context);
        let rows: Vec<usize> = ROWS.into_iter().filter(|rows| *rows <= most_rows).collect();
        let room = sizes.max_context.min(sizes.num_blocks * sizes.block_size);
        let context = CONTEXT.min(room.saturating_sub(*rows.last().unwrap_or(&1)));
        let mut runs = Runs {
            rng: SplitMix64::new(1),
            vocab_size: decoder.config().vocab_size,
            context,
            block_size: sizes.block_size,
            chosen: backend.alloc("chosen tokens", ElementType::U32, most_rows)?,
            decoder,
            backend,
        };
        let mut steps = vec![Vec::new(); rows.len()];
        let mut drafts = vec![Vec::new(); rows.len()];
        let started = Instant::now();
        for round in 0..=ROUNDS {
            for (index, rows) in rows.iter().enumerate() {
                if *rows == 1 || head.is_none() {
                    runs.step(*rows)?;
                    steps[index].push(runs.step(*rows)?);
                }
                let Some(head) = &mut head else { continue };
                runs.step(*rows)?;
                runs.draft(*rows, head)?;
                let verify = runs.step(*rows)?;
                if *rows > 1 {
                    steps[index].push(verify);
                }
                drafts[index].push(runs.draft(*rows, head)?);
            }
            // The first round warms up, unless steps are so long that it is all there is time for.
            let late = started.elapsed() > MAX_TIME;
            if round == 0 && !late {
                steps.iter_mut().chain(&mut drafts).for_each(Vec::clear);
            }
            if late {
                break;
            }
        }
        let Runs { chosen, backend, .. } = runs;
        backend.free(chosen);
        Ok(CostCurve { step: points(&rows, steps), draft: points(&rows, drafts) })
    }

    /// A curve from points, rows ascending: for tests and for curves that are computed.
    pub fn from_points(step: Vec<(usize, f64)>, draft: Vec<(usize, f64)>) -> Self {
        CostCurve { step, draft }
    }

    /// Seconds of a step with `rows` rows.
    pub fn step(&self, rows: usize) -> f64 {
        interpolate(&self.step, rows)
    }

    /// Seconds of a drafting step with `rows` rows; 0 without a head.
    pub fn draft(&self, rows: usize) -> f64 {
        interpolate(&self.draft, rows)
    }

    /// The measured points of a step: rows and seconds.
    pub fn steps(&self) -> &[(usize, f64)] {
        &self.step
    }

    /// The measured points of a drafting step: rows and seconds.
    pub fn drafts(&self) -> &[(usize, f64)] {
        &self.draft
    }

    /// As text that people can read, one line a point: `step ROWS MICROSECONDS`.
    pub fn to_text(&self) -> String {
        let mut text = format!("{HEADER}\n");
        for (kind, points) in [("step", &self.step), ("draft", &self.draft)] {
            for (rows, seconds) in points {
                // A String takes all text.
                let _ = writeln!(text, "{kind} {rows} {:.3}", seconds * 1e6);
            }
        }
        text
    }

    /// Reads what [`CostCurve::to_text`] wrote; `None` for anything else.
    pub fn from_text(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        let mut curve = CostCurve { step: Vec::new(), draft: Vec::new() };
        if lines.next() != Some(HEADER) {
            return None;
        }
        for line in lines {
            let [kind, rows, microseconds] = line.split(' ').collect::<Vec<_>>().try_into().ok()?;
            let points = match kind {
                "step" => &mut curve.step,
                "draft" => &mut curve.draft,
                _ => return None,
            };
            let (rows, seconds) = (rows.parse().ok()?, microseconds.parse::<f64>().ok()? / 1e6);
            if !(seconds > 0.0 && seconds.is_finite()) || points.last().is_some_and(|(last, _)| *last >= rows) {
                return None;
            }
            points.push((rows, seconds));
        }
        (!curve.step.is_empty()).then_some(curve)
    }
}

/// One point for each number of rows with samples.
fn points(rows: &[usize], samples: Vec<Vec<f64>>) -> Vec<(usize, f64)> {
    let measured = rows.iter().zip(samples).filter(|(_, samples)| !samples.is_empty());
    // What else the machine does makes steps longer, never shorter: the lower quartile, and no size longer than a larger one.
    let mut points: Vec<(usize, f64)> = measured
        .map(|(rows, mut samples)| {
            samples.sort_unstable_by(f64::total_cmp);
            (*rows, samples[samples.len() / 4])
        })
        .collect();
    let mut shortest = f64::INFINITY;
    for (_, seconds) in points.iter_mut().rev() {
        shortest = shortest.min(*seconds);
        *seconds = shortest;
    }
    points
}

/// Steps to be timed.
struct Runs<'a> {
    decoder: &'a mut Decoder,
    backend: &'a mut dyn Backend,
    rng: SplitMix64,
    vocab_size: usize,
    context: usize,
    block_size: usize,
    chosen: Buffer,
}

impl Runs<'_> {
    fn tokens(&mut self, rows: usize) -> Vec<u32> {
        (0..rows).map(|_| self.rng.below(self.vocab_size) as u32).collect()
    }

    fn blocks(&self, rows: usize) -> Vec<u32> {
        (0..(self.context + rows).div_ceil(self.block_size) as u32).collect()
    }

    /// Seconds of a step of the model with the choice of its tokens.
    fn step(&mut self, rows: usize) -> Result<f64, ModelError> {
        let mut batch = Batch::default();
        let tokens = self.tokens(rows);
        batch.push_sequence(&tokens, self.context, &self.blocks(rows), self.block_size, LogitRows::All);
        let begun = Instant::now();
        let logits = self.decoder.forward(&batch, self.backend)?;
        greedy(logits, self.chosen.tensor(logits.rows, 1), self.backend)?;
        Ok(begun.elapsed().as_secs_f64())
    }

    /// Seconds until the head has taken the rows of the last step and made a draft.
    fn draft(&mut self, rows: usize, head: &mut Head) -> Result<f64, ModelError> {
        const SEQUENCE: u64 = 0;
        let (tokens, blocks) = (self.tokens(rows), self.blocks(rows));
        let begun = Instant::now();
        head.wait_for(SEQUENCE, self.context, &tokens, 0..rows as u32, self.decoder, self.backend)?;
        let tables = head::table_of(SEQUENCE, &blocks);
        head.catch_up(&[SEQUENCE], &tables, self.decoder, self.backend)?;
        Ok(begun.elapsed().as_secs_f64())
    }
}

/// Linear between points and, with the last slope, beyond them.
fn interpolate(points: &[(usize, f64)], rows: usize) -> f64 {
    let (Some(first), Some(last)) = (points.first(), points.last()) else { return 0.0 };
    if points.len() == 1 || rows <= first.0 {
        return first.1;
    }
    let upper = points.iter().position(|(r, _)| *r >= rows).unwrap_or(points.len() - 1).max(1);
    let ((r0, s0), (r1, s1)) = (points[upper - 1], points[upper]);
    let seconds = s0 + (s1 - s0) * (rows as f64 - r0 as f64) / (r1 - r0) as f64;
    if rows > last.0 { seconds.max(last.1) } else { seconds }
}

/// A curve as the engine's own steps correct it: contexts are longer or shorter than when it was measured, neighbouring
/// tokens share more experts than random ones.
#[derive(Debug, Clone)]
pub(crate) struct RunningCost {
    curve: CostCurve,
    /// Of all steps, from those without drafts.
    scale: f64,
    /// Of steps with drafts, beyond `scale`, by their number of rows.
    verify_scale: Vec<f64>,
    draft_scale: f64,
}

/// Weight of a new step in a correction.
const LEARNING: f64 = 0.05;

impl RunningCost {
    pub(crate) fn new(curve: CostCurve) -> Self {
        let verify_scale = vec![1.0; curve.step.len()];
        RunningCost { curve, scale: 1.0, verify_scale, draft_scale: 1.0 }
    }

    pub(crate) fn curve(&self) -> &CostCurve {
        &self.curve
    }

    /// Seconds of a step without drafts.
    pub(crate) fn plain(&self, rows: usize) -> f64 {
        self.scale * self.curve.step(rows)
    }

    /// Seconds of a step of `rows` rows, drafts among them.
    pub(crate) fn verify(&self, rows: usize) -> f64 {
        self.plain(rows) * self.verify_scale.get(self.place(rows)).copied().unwrap_or(1.0)
    }

    /// Seconds of a drafting step.
    pub(crate) fn draft(&self, rows: usize) -> f64 {
        self.draft_scale * self.curve.draft(rows)
    }

    pub(crate) fn observe_plain(&mut self, rows: usize, seconds: f64) {
        learn(&mut self.scale, seconds / self.curve.step(rows));
    }

    pub(crate) fn observe_verify(&mut self, rows: usize, seconds: f64) {
        let (expected, place) = (self.plain(rows), self.place(rows));
        if let Some(scale) = self.verify_scale.get_mut(place) {
            learn(scale, seconds / expected);
        }
    }

    pub(crate) fn observe_draft(&mut self, rows: usize, seconds: f64) {
        let expected = self.curve.draft(rows);
        if expected > 0.0 {
            learn(&mut self.draft_scale, seconds / expected);
        }
    }

    fn place(&self, rows: usize) -> usize {
        let place = self.curve.step.iter().position(|(r, _)| *r >= rows);
        place.unwrap_or(self.curve.step.len().saturating_sub(1))
    }
}

fn learn(scale: &mut f64, found: f64) {
    // One step that the machine was busy with something else says little.
    let found = found.clamp(*scale * 0.5, *scale * 2.0);
    *scale += LEARNING * (found - *scale);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_interpolate_and_survive_as_text() {
        let curve = CostCurve::from_points(vec![(1, 0.001), (2, 0.0015), (4, 0.0019)], vec![(1, 0.0003)]);
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} {b}");
        close(curve.step(1), 0.001);
        close(curve.step(3), 0.0017);
        close(curve.step(6), 0.0023);
        close(curve.draft(5), 0.0003);
        assert_eq!(CostCurve::from_text(&curve.to_text()), Some(curve));
        for broken in ["", "moellon cost curve 1\n", "moellon cost curve 1\nstep 2 5\nstep 1 6\n", "step 1 1\n"] {
            assert_eq!(CostCurve::from_text(broken), None, "{broken}");
        }
    }

    #[test]
    fn one_slow_step_moves_a_correction_little() {
        let mut cost = RunningCost::new(CostCurve::from_points(vec![(1, 1.0), (4, 2.0)], Vec::new()));
        cost.observe_plain(1, 100.0);
        assert!(cost.plain(1) < 1.06);
        (0..200).for_each(|_| cost.observe_verify(4, 1.6));
        assert!((cost.verify(4) - 1.6).abs() < 0.01 && cost.verify(1) < 1.06);
    }
}
