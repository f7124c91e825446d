//! From a calibration to what the encoder wants: importances a matrix each, and factored moments. Experts that saw few
//! tokens lean on what all experts of the layer saw.

use crate::Result;
use crate::encoder::Importance;
use crate::feedback::Feedback;
use crate::inventory::{Module, Place};
use crate::stats::Stats;
use moellon_checkpoint::Projection;
use rayon::prelude::*;
use std::sync::Arc;

/// Rows that the layer's mean counts for in an expert's `E[x²]`.
const MEAN_ROWS: f32 = 32.0;
/// Share of the mean diagonal that is added to the diagonal of moments: GPTQ's one percent.
const DAMPING: f32 = 0.01;

/// What is known of the inputs of a module's matrices.
#[derive(Debug, Clone, Default)]
pub(crate) struct ModuleImportance {
    /// `[count or 1][cols]`; empty without a calibration.
    input_sq: Vec<Vec<f32>>,
    feedback: Vec<Option<Arc<Feedback>>>,
    /// Where all share one feedback: how much stronger each one's inputs are.
    column_scales: Vec<Vec<f32>>,
}

impl ModuleImportance {
    /// What the encoder gets for matrix `index`.
    pub(crate) fn of(&self, index: usize) -> Importance<'_> {
        let pick = |len: usize| if len == 1 { 0 } else { index };
        Importance {
            input_sq: self.input_sq.get(pick(self.input_sq.len())).map(Vec::as_slice),
            feedback: self.feedback.get(pick(self.feedback.len())).and_then(|f| f.as_deref()),
            column_scales: self.column_scales.get(index).map(Vec::as_slice),
        }
    }
}

/// Reads importances and keeps the last factored moments, which gate and up share.
pub(crate) struct ImportanceReader<'a> {
    stats: Option<&'a Stats>,
    with_feedback: bool,
    last: Option<(String, ModuleImportance)>,
}

impl<'a> ImportanceReader<'a> {
    pub(crate) fn new(stats: Option<&'a Stats>, with_feedback: bool) -> Self {
        ImportanceReader { stats, with_feedback, last: None }
    }

    /// What is known of `module`.
    ///
    /// # Errors
    /// If the calibration has tensors of other shapes.
    pub(crate) fn read(&mut self, module: &Module) -> Result<ModuleImportance> {
        let Some(stats) = self.stats else { return Ok(ModuleImportance::default()) };
        let key = stats.key(&module.name).to_owned();
        if let Some((last, importance)) = &self.last
            && *last == key
        {
            return Ok(importance.clone());
        }
        let Some(mut input_sq) = stats.input_sq(&module.name) else { return Ok(ModuleImportance::default()) };
        let tokens = stats.tokens(&module.name).unwrap_or_default();
        let expected = [module.count, module.cols];
        let found = [input_sq.len(), input_sq[0].len()];
        if found != expected || tokens.len() != module.count {
            return Err(crate::Error::mismatch(
                format!("calibration of {}: shape of input_sq", module.name),
                format!("{found:?}"),
                format!("{expected:?}"),
            ));
        }
        // The channels of an expert's inner width are its own; those of the hidden state are everyone's.
        let shares_channels = match &module.place {
            Place::Experts { projection, .. } => *projection != Projection::Down,
            Place::Linear | Place::Heads { .. } => false,
        };
        lean_on_mean(&mut input_sq, &tokens, shares_channels);
        let mut importance = ModuleImportance { input_sq, ..ModuleImportance::default() };
        if self.with_feedback
            && let Some(moments) = stats.moments(&module.name)
        {
            importance.add_feedback(moments, &tokens, shares_channels);
        }
        self.last = Some((key, importance.clone()));
        Ok(importance)
    }
}

/// Mixes every row with a mean that counts as [`MEAN_ROWS`] rows: the mean of all matrices, or a flat one.
fn lean_on_mean(input_sq: &mut [Vec<f32>], tokens: &[u32], shares_channels: bool) {
    let cols = input_sq[0].len();
    let total: f64 = tokens.iter().map(|t| f64::from(*t)).sum();
    let mut mean = vec![0.0f64; cols];
    for (row, &count) in input_sq.iter().zip(tokens) {
        mean.iter_mut().zip(row).for_each(|(mean, x)| *mean += f64::from(*x) * f64::from(count) / total.max(1.0));
    }
    let flat = mean.iter().sum::<f64>() / cols as f64;
    for (row, &count) in input_sq.iter_mut().zip(tokens) {
        let own = count as f32 / (count as f32 + MEAN_ROWS);
        for (x, &mean) in row.iter_mut().zip(&mean) {
            let prior = if shares_channels { mean } else { flat };
            *x = own * *x + (1.0 - own) * prior as f32;
        }
    }
}

impl ModuleImportance {
    fn add_feedback(&mut self, moments: Vec<Vec<f32>>, tokens: &[u32], shares_channels: bool) {
        let cols = self.input_sq[0].len();
        if moments.len() == 1 {
            // One for all: correlations of the layer, strengths of each matrix.
            let shared: Vec<f32> = (0..cols).map(|c| moments[0][c * cols + c]).collect();
            if self.input_sq.len() > 1 {
                self.column_scales = self
                    .input_sq
                    .iter()
                    .map(|own| own.iter().zip(&shared).map(|(own, shared)| ratio(*own, *shared).sqrt()).collect())
                    .collect();
            }
            self.feedback = vec![Feedback::new(&moments[0], cols, DAMPING).map(Arc::new)];
            return;
        }
        let pooled = shares_channels.then(|| pool(&moments, tokens));
        let input_sq = &self.input_sq;
        self.feedback = moments
            .into_par_iter()
            .enumerate()
            .map(|(index, mut own)| {
                // As many rows as columns make an estimate of full rank: trust it half.
                let share = tokens[index] as f32 / (tokens[index] as f32 + cols as f32);
                for row in 0..cols {
                    for col in 0..cols {
                        let prior = match &pooled {
                            Some(pooled) => pooled[row * cols + col],
                            None if row == col => input_sq[index][row],
                            None => 0.0,
                        };
                        let value = &mut own[row * cols + col];
                        *value = share * *value + (1.0 - share) * prior;
                    }
                }
                Feedback::new(&own, cols, DAMPING).map(Arc::new)
            })
            .collect();
    }
}

fn ratio(own: f32, shared: f32) -> f32 {
    if shared > 0.0 { own / shared } else { 0.0 }
}

/// The mean of moments, weighted by tokens.
fn pool(moments: &[Vec<f32>], tokens: &[u32]) -> Vec<f32> {
    let total: f64 = tokens.iter().map(|t| f64::from(*t)).sum();
    let mut pooled = vec![0.0f32; moments[0].len()];
    for (own, &count) in moments.iter().zip(tokens) {
        let share = (f64::from(count) / total.max(1.0)) as f32;
        pooled.iter_mut().zip(own).for_each(|(pooled, own)| *pooled += share * own);
    }
    pooled
}
