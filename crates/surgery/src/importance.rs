//! From a calibration to what the encoder wants: importances a matrix each, and factored moments. Experts that saw few
//! tokens lean on what all experts of the layer saw.

use crate::Result;
use crate::encoder::Importance;
use crate::feedback::{self, Feedback};
use crate::inventory::{Module, Place};
use crate::stats::Stats;
use moellon_checkpoint::Projection;
use std::sync::Arc;

/// Rows that the layer's mean counts for in an expert's `E[x²]`.
const MEAN_ROWS: f32 = 32.0;
/// Share of the mean diagonal that is added to the diagonal of moments: GPTQ's one percent.
const DAMPING: f32 = 0.01;

/// What is known of the inputs of a module's matrices.
#[derive(Debug, Clone, Default)]
pub(crate) struct ModuleImportance<'a> {
    /// `[count or 1][cols]`; empty without a calibration.
    input_sq: Vec<Vec<f32>>,
    moments: Moments<'a>,
}

/// Second moments as matrices.
#[derive(Debug, Clone, Default)]
enum Moments<'a> {
    #[default]
    None,
    /// One matrix for all, factored.
    Shared {
        feedback: Option<Arc<Feedback>>,
        /// How much stronger each one's inputs are; empty for a single matrix.
        column_scales: Vec<Vec<f32>>,
    },
    /// One each: read and factored when its turn comes, so that one is in memory and not all experts'.
    Own {
        stats: &'a Stats,
        module: String,
        tokens: Vec<u32>,
        /// What the others' moments say of one that saw few tokens.
        pooled: Option<Arc<Vec<f32>>>,
    },
}

/// What is known of the inputs of one matrix.
#[derive(Debug, Clone)]
pub(crate) struct MatrixImportance<'m> {
    input_sq: Option<&'m [f32]>,
    feedback: Option<Arc<Feedback>>,
    column_scales: Option<&'m [f32]>,
}

impl MatrixImportance<'_> {
    /// What the encoder takes.
    pub(crate) fn view(&self) -> Importance<'_> {
        Importance { input_sq: self.input_sq, feedback: self.feedback.as_deref(), column_scales: self.column_scales }
    }
}

impl ModuleImportance<'_> {
    /// What the encoder gets for matrix `index`.
    pub(crate) fn of(&self, index: usize) -> MatrixImportance<'_> {
        let input_sq = self.input_sq.get(if self.input_sq.len() == 1 { 0 } else { index }).map(Vec::as_slice);
        let (feedback, column_scales) = match &self.moments {
            Moments::None => (None, None),
            Moments::Shared { feedback, column_scales } => {
                (feedback.clone(), column_scales.get(index).map(Vec::as_slice))
            }
            Moments::Own { stats, module, tokens, pooled } => {
                let own = stats.moments(module, index).zip(input_sq);
                let factored = own.and_then(|(mut moments, diagonal)| {
                    match pooled {
                        Some(pooled) => feedback::mix(&mut moments, pooled, diagonal.len(), tokens[index]),
                        None => feedback::shrink(&mut moments, diagonal, tokens[index]),
                    }
                    Feedback::new(&moments, diagonal.len(), DAMPING)
                });
                (factored.map(Arc::new), None)
            }
        };
        MatrixImportance { input_sq, feedback, column_scales }
    }
}

/// Reads importances and keeps the last factored moments, which gate and up share.
pub(crate) struct ImportanceReader<'a> {
    stats: Option<&'a Stats>,
    with_feedback: bool,
    last: Option<(String, ModuleImportance<'a>)>,
}

impl<'a> ImportanceReader<'a> {
    pub(crate) fn new(stats: Option<&'a Stats>, with_feedback: bool) -> Self {
        ImportanceReader { stats, with_feedback, last: None }
    }

    /// What is known of `module`.
    ///
    /// # Errors
    /// If the calibration has tensors of other shapes.
    pub(crate) fn read(&mut self, module: &Module) -> Result<ModuleImportance<'a>> {
        let Some(stats) = self.stats else { return Ok(ModuleImportance::default()) };
        let key = stats.key(&module.name).to_owned();
        if let Some((last, importance)) = &self.last
            && *last == key
        {
            return Ok(importance.clone());
        }
        self.last = None;
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
        let moments = match (self.with_feedback, stats.num_moments(&module.name)) {
            (false, _) | (true, 0) => Moments::None,
            (true, 1) => shared(stats, module, &input_sq),
            (true, _) => {
                let pooled = shares_channels.then(|| pool(stats, &module.name, &tokens)).flatten().map(Arc::new);
                Moments::Own { stats, module: module.name.clone(), tokens, pooled }
            }
        };
        let importance = ModuleImportance { input_sq, moments };
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

/// One matrix of moments for all: correlations of the layer, strengths of each matrix.
fn shared<'a>(stats: &Stats, module: &Module, input_sq: &[Vec<f32>]) -> Moments<'a> {
    let Some(mut moments) = stats.moments(&module.name, 0) else { return Moments::None };
    let cols = module.cols;
    let diagonal: Vec<f32> = (0..cols).map(|c| moments[c * cols + c]).collect();
    // Every token of the texts went into them.
    feedback::shrink(&mut moments, &diagonal, u32::try_from(stats.info.tokens).unwrap_or(u32::MAX));
    let strengths = |own: &Vec<f32>| own.iter().zip(&diagonal).map(|(own, all)| ratio(*own, *all).sqrt()).collect();
    let column_scales = if input_sq.len() > 1 { input_sq.iter().map(strengths).collect() } else { Vec::new() };
    let feedback = Feedback::new(&moments, cols, DAMPING).map(Arc::new);
    Moments::Shared { feedback, column_scales }
}

fn ratio(own: f32, shared: f32) -> f32 {
    if shared > 0.0 { own / shared } else { 0.0 }
}

/// The mean of a module's moments, weighted by tokens, one matrix in memory at a time.
fn pool(stats: &Stats, module: &str, tokens: &[u32]) -> Option<Vec<f32>> {
    let total: f64 = tokens.iter().map(|t| f64::from(*t)).sum();
    let mut pooled = Vec::new();
    for (index, &count) in tokens.iter().enumerate() {
        let own = stats.moments(module, index)?;
        pooled.resize(own.len(), 0.0f32);
        let share = (f64::from(count) / total.max(1.0)) as f32;
        pooled.iter_mut().zip(&own).for_each(|(pooled, own)| *pooled += share * own);
    }
    Some(pooled)
}
