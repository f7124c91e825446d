//! The thinking budget: counts tokens inside thoughts and says what to write when they are spent.

use crate::request::ThinkingBudget;
use moellon_text::constraint::TokenMask;

/// Where a sequence stands.
#[derive(Debug, Clone)]
pub(crate) struct ThinkingState {
    budget: ThinkingBudget,
    inside: bool,
    /// Tokens thought so far, all thoughts together.
    spent_tokens: usize,
    /// Tokens of `end_token_ids` still to write.
    ending: usize,
}

impl ThinkingState {
    pub(crate) fn new(budget: ThinkingBudget) -> Self {
        let inside = budget.starts_inside;
        let mut state = ThinkingState { budget, inside, spent_tokens: 0, ending: 0 };
        state.end_if_spent();
        state
    }

    /// The token that must come next, if the budget says so.
    pub(crate) fn forced(&self) -> Option<u32> {
        let ids = &self.budget.end_token_ids;
        (self.ending > 0).then(|| ids[ids.len() - self.ending])
    }

    /// Whether the next token is restricted: a spent budget opens no more thoughts.
    pub(crate) fn restricts(&self) -> bool {
        self.forced().is_some() || self.is_spent()
    }

    /// Clears what may not come next.
    pub(crate) fn restrict(&self, mask: &mut TokenMask) {
        if self.is_spent() && !self.inside {
            mask.clear(self.budget.open_token_id);
        }
    }

    /// Takes a token.
    pub(crate) fn consume(&mut self, token: u32) {
        if self.ending > 0 {
            self.ending -= 1;
            self.inside = self.ending > 0;
        } else if token == self.budget.close_token_id {
            self.inside = false;
        } else if token == self.budget.open_token_id {
            self.inside = true;
        } else if self.inside {
            self.spent_tokens += 1;
        }
        if self.ending == 0 {
            self.end_if_spent();
        }
    }

    fn is_spent(&self) -> bool {
        self.spent_tokens >= self.budget.max_tokens
    }

    fn end_if_spent(&mut self) {
        if self.inside && self.is_spent() {
            self.ending = self.budget.end_token_ids.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(max_tokens: usize, starts_inside: bool) -> ThinkingState {
        ThinkingState::new(ThinkingBudget {
            max_tokens,
            starts_inside,
            open_token_id: 1,
            close_token_id: 2,
            end_token_ids: vec![8, 2],
        })
    }

    #[test]
    fn a_thought_ends_after_its_budget_and_no_other_begins() {
        let mut state = budget(3, true);
        for token in [5, 6] {
            state.consume(token);
            assert_eq!(state.forced(), None);
        }
        state.consume(7);
        assert_eq!(state.forced(), Some(8));
        state.consume(8);
        assert_eq!(state.forced(), Some(2));
        state.consume(2);
        assert_eq!(state.forced(), None);
        let mut mask = TokenMask::all(10);
        state.restrict(&mut mask);
        assert!(state.restricts() && !mask.contains(1) && mask.count() == 9);
    }

    #[test]
    fn thoughts_share_the_budget_and_text_outside_is_free() {
        let mut state = budget(2, false);
        for token in [5, 5, 5, 1, 5, 2, 5, 5, 1] {
            state.consume(token);
            assert_eq!(state.forced(), None);
        }
        state.consume(5);
        assert_eq!(state.forced(), Some(8));
    }

    #[test]
    fn a_budget_of_nothing_ends_at_once() {
        assert_eq!(budget(0, true).forced(), Some(8));
        assert_eq!(budget(0, false).forced(), None);
    }
}
