//! How likely a draft is accepted: counts whose memory fades, read through a prior, with a margin for what is not known.

/// Hits and trials, the older ones counting less.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Counts {
    hits: f64,
    trials: f64,
}

/// A probability and how sure we are of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Estimate {
    /// The mean of the posterior.
    pub(crate) mean: f64,
    /// Trials behind it, the prior's included.
    pub(crate) weight: f64,
}

impl Counts {
    /// Counts one trial; all before it fade by `memory` (1 forgets nothing).
    pub(crate) fn record(&mut self, hit: bool, memory: f64) {
        self.hits = self.hits * memory + f64::from(u8::from(hit));
        self.trials = self.trials * memory + 1.0;
    }

    /// Trials that still count.
    pub(crate) fn trials(&self) -> f64 {
        self.trials
    }

    /// The posterior under a prior of mean `prior` that counts as `weight` trials.
    pub(crate) fn estimate(&self, prior: f64, weight: f64) -> Estimate {
        Estimate { mean: (self.hits + prior * weight) / (self.trials + weight), weight: self.trials + weight }
    }
}

impl Estimate {
    /// One standard deviation of the Beta posterior below its mean.
    pub(crate) fn lower(self) -> f64 {
        (self.mean - self.deviation()).max(0.0)
    }

    /// One and a half standard deviations above.
    pub(crate) fn upper(self) -> f64 {
        (self.mean + 1.5 * self.deviation()).min(1.0)
    }

    fn deviation(self) -> f64 {
        (self.mean * (1.0 - self.mean) / (self.weight + 1.0)).sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::Counts;

    #[test]
    fn evidence_narrows_and_old_evidence_fades() {
        let mut counts = Counts::default();
        let prior = counts.estimate(0.7, 6.0);
        assert!((prior.mean - 0.7).abs() < 1e-12 && prior.lower() < 0.6);
        (0..40).for_each(|_| counts.record(true, 0.98));
        let sure = counts.estimate(0.7, 6.0);
        assert!(sure.lower() > 0.9, "{sure:?}");
        (0..40).for_each(|_| counts.record(false, 0.98));
        assert!(counts.estimate(0.7, 6.0).upper() < 0.6);
        assert!(counts.trials() < 50.0);
    }
}
