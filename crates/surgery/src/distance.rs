//! How far logits are from a reference's on the same tokens: what [`compare`](crate::compare) sums, for models that run in
//! another way than a layer at a time (other caches, activations, settings).

use crate::compare::compare_row;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Sums over rows of logits.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LogitDistance {
    rows: usize,
    kl: f64,
    kl_squared: f64,
    agreed: usize,
    nats: [f64; 2],
    judged: usize,
}

/// What the sums say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Quality {
    /// Predictions that were compared.
    pub tokens: usize,
    /// Mean of `KL(reference || model)` in nats, over the whole vocabulary.
    pub kl: f64,
    /// Its standard error, taking tokens as independent.
    pub kl_standard_error: f64,
    /// Share of tokens with the same most likely next token.
    pub top1: f64,
    /// Mean negative log-likelihood of the text, nats a token.
    pub nll: f64,
    /// The reference's.
    pub reference_nll: f64,
}

impl LogitDistance {
    /// Adds rows of logits, `[rows * vocab_size]` each, and the token that follows each of them in the text, if any.
    ///
    /// # Panics
    /// If the three do not have as many rows.
    pub fn add(&mut self, model: &[f32], reference: &[f32], vocab_size: usize, next: &[Option<u32>]) {
        assert_eq!(
            [model.len(), reference.len()],
            [next.len() * vocab_size; 2],
            "both models give a row of logits for each token"
        );
        let rows: Vec<_> = model
            .par_chunks_exact(vocab_size)
            .zip(reference.par_chunks_exact(vocab_size))
            .zip(next)
            .map(|((model, reference), next)| compare_row(model, reference, *next))
            .collect();
        for (row, next) in rows.iter().zip(next) {
            self.rows += 1;
            self.kl += row.kl;
            self.kl_squared += row.kl * row.kl;
            self.agreed += usize::from(row.argmax[0] == row.argmax[1]);
            self.judged += usize::from(next.is_some());
            self.nats[0] += row.nats[0];
            self.nats[1] += row.nats[1];
        }
    }

    /// Means over all rows so far.
    pub fn quality(&self) -> Quality {
        let (rows, judged) = (self.rows.max(1) as f64, self.judged.max(1) as f64);
        let mean = self.kl / rows;
        let variance = (self.kl_squared / rows - mean * mean).max(0.0);
        Quality {
            tokens: self.rows,
            kl: mean,
            kl_standard_error: (variance / rows).sqrt(),
            top1: self.agreed as f64 / rows,
            nll: self.nats[0] / judged,
            reference_nll: self.nats[1] / judged,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_rows_by_hand() {
        // p = (1/2, 1/4, 1/4) against q = (1/4, 1/2, 1/4), and p against itself.
        let (p, q) = ([2.0f32.ln(), 0.0, 0.0], [0.0, 2.0f32.ln(), 0.0]);
        let mut distance = LogitDistance::default();
        distance.add(&[q, p].concat(), &[p, p].concat(), 3, &[Some(0), None]);
        let quality = distance.quality();
        let kl = 0.25 * 2.0f64.ln();
        assert!((quality.kl - kl / 2.0).abs() < 1e-7 && (quality.kl_standard_error - kl / 8f64.sqrt()).abs() < 1e-7);
        assert_eq!((quality.tokens, quality.top1), (2, 0.5));
        assert!((quality.nll - 4.0f64.ln()).abs() < 1e-7 && (quality.reference_nll - 2.0f64.ln()).abs() < 1e-7);
    }
}
