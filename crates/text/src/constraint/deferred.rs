//! A constraint that begins later: after a thought, for example.

use super::{Constraint, ConstraintError, TokenMask};

/// Leaves the output free until a given token, and constrains what follows it. The output may not end before.
pub struct Deferred {
    inner: Box<dyn Constraint>,
    start_token_id: u32,
    /// Tokens consumed, the start token included, until the constraint began; `None` while the output is free.
    started_after: Option<usize>,
    consumed: usize,
}

impl Deferred {
    /// `inner` for what follows the first `start_token_id` (`</think>`), which it does not see.
    pub fn new(inner: Box<dyn Constraint>, start_token_id: u32) -> Self {
        Deferred { inner, start_token_id, started_after: None, consumed: 0 }
    }
}

impl Constraint for Deferred {
    fn allow(&mut self, mask: &mut TokenMask) -> Result<(), ConstraintError> {
        if self.started_after.is_some() { self.inner.allow(mask) } else { Ok(()) }
    }

    fn consume(&mut self, token: u32) -> Result<(), ConstraintError> {
        if self.started_after.is_some() {
            self.inner.consume(token)?;
        } else if token == self.start_token_id {
            self.started_after = Some(self.consumed + 1);
        }
        self.consumed += 1;
        Ok(())
    }

    fn rollback(&mut self, num_tokens: usize) -> Result<(), ConstraintError> {
        let rest = self
            .consumed
            .checked_sub(num_tokens)
            .ok_or(ConstraintError::Rollback { found: num_tokens, consumed: self.consumed })?;
        if let Some(started) = self.started_after {
            self.inner.rollback(self.consumed - rest.max(started))?;
            self.started_after = (rest >= started).then_some(started);
        }
        self.consumed = rest;
        Ok(())
    }

    fn may_end(&mut self) -> bool {
        self.started_after.is_some() && self.inner.may_end()
    }

    fn is_complete(&mut self) -> bool {
        self.started_after.is_some() && self.inner.is_complete()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Allows token 1 three times.
    #[derive(Default)]
    struct ThreeOnes(usize);

    impl Constraint for ThreeOnes {
        fn allow(&mut self, mask: &mut TokenMask) -> Result<(), ConstraintError> {
            mask.intersect(&[if self.0 < 3 { 0b10 } else { 0 }]);
            Ok(())
        }
        fn consume(&mut self, token: u32) -> Result<(), ConstraintError> {
            if token != 1 || self.0 == 3 {
                return Err(ConstraintError::NotAllowed { token, consumed: self.0 });
            }
            self.0 += 1;
            Ok(())
        }
        fn rollback(&mut self, num_tokens: usize) -> Result<(), ConstraintError> {
            self.0 -= num_tokens;
            Ok(())
        }
        fn may_end(&mut self) -> bool {
            self.0 == 3
        }
        fn is_complete(&mut self) -> bool {
            self.0 == 3
        }
    }

    #[test]
    fn the_output_is_free_until_the_start_token_and_rollback_crosses_it() {
        let mut constraint = Deferred::new(Box::new(ThreeOnes::default()), 5);
        let allowed = |constraint: &mut Deferred| {
            let mut mask = TokenMask::all(8);
            constraint.allow(&mut mask).unwrap();
            mask.count()
        };
        for token in [7, 1, 5] {
            assert_eq!(allowed(&mut constraint), 8);
            assert!(!constraint.may_end());
            constraint.consume(token).unwrap();
        }
        assert_eq!(allowed(&mut constraint), 1);
        assert!(constraint.consume(5).is_err());
        for _ in 0..3 {
            constraint.consume(1).unwrap();
        }
        assert!(constraint.is_complete());
        constraint.rollback(4).unwrap();
        assert_eq!(allowed(&mut constraint), 8);
        constraint.consume(5).unwrap();
        assert_eq!(allowed(&mut constraint), 1);
        assert_eq!(constraint.rollback(9), Err(ConstraintError::Rollback { found: 9, consumed: 3 }));
    }
}
