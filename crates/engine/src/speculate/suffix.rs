//! Drafts from text that was seen: where did the last tokens stand before, and what followed?
//!
//! A [`SuffixIndex`] is a text with hash chains over its [`GRAM`]-grams: the newest place of each hash, and from each place
//! the one before. A lookup walks the chain a bounded number of places and takes the longest agreement. [`Follower`] keeps
//! the place while the text goes on agreeing, so that most tokens cost one comparison.

/// Tokens that must agree before a place is considered.
pub const GRAM: usize = 3;

/// Agreement longer than this is not told apart.
pub const MAX_AGREEMENT: usize = 64;

/// Places of a chain that a lookup looks at.
const MAX_PLACES: usize = 24;

/// Stands between texts that have nothing to do with each other.
const BREAK: u32 = u32::MAX;

const NOWHERE: u32 = u32::MAX;

/// A text that can be asked where its last tokens stood before. Bounded: the older half is forgotten when it is full.
#[derive(Debug, Clone)]
pub struct SuffixIndex {
    tokens: Vec<u32>,
    /// Newest place of each hash; a place is the index of a gram's last token.
    heads: Vec<u32>,
    /// `[tokens]`: the place before with the same hash.
    previous: Vec<u32>,
    max_tokens: usize,
    /// How often the older half was forgotten: places from before are void.
    generation: u32,
}

/// Where a continuation was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Index of the token that follows.
    pub next: usize,
    /// Tokens before it that agree, at most [`MAX_AGREEMENT`].
    pub agreement: usize,
    generation: u32,
}

impl SuffixIndex {
    /// An empty text that keeps at most `max_tokens` tokens (8 bytes each, and 4 for each hash).
    pub fn new(max_tokens: usize) -> Self {
        SuffixIndex {
            tokens: Vec::new(),
            heads: Vec::new(),
            previous: Vec::new(),
            max_tokens: max_tokens.max(4 * GRAM),
            generation: 0,
        }
    }

    /// Tokens kept.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there is no text.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Appends tokens that follow those before.
    pub fn extend(&mut self, tokens: &[u32]) {
        for token in tokens {
            if self.tokens.len() == self.max_tokens {
                let kept = self.tokens.split_off(self.max_tokens / 2);
                self.rebuild(kept, self.heads.len());
                self.generation += 1;
            }
            self.push(*token);
        }
    }

    /// Says that what is appended next does not follow what is there.
    pub fn separate(&mut self) {
        if self.tokens.last().is_some_and(|token| *token != BREAK) {
            self.extend(&[BREAK]);
        }
    }

    /// The place whose tokens before agree longest with the end of `suffix`; the newest of equals. A text does not find
    /// its own end.
    pub fn lookup(&self, suffix: &[u32]) -> Option<Place> {
        let gram = suffix.len().checked_sub(GRAM).map(|first| &suffix[first..])?;
        if self.heads.is_empty() {
            return None;
        }
        let mut place = self.heads[self.slot(gram)];
        let mut best: Option<Place> = None;
        for _ in 0..MAX_PLACES {
            if place == NOWHERE {
                break;
            }
            let next = place as usize + 1;
            let agreement = self.agreement(next, suffix);
            let has_next = self.tokens.get(next).is_some_and(|token| *token != BREAK);
            if has_next && agreement >= GRAM && best.is_none_or(|best| agreement > best.agreement) {
                best = Some(Place { next, agreement, generation: self.generation });
                if agreement == MAX_AGREEMENT {
                    break;
                }
            }
            place = self.previous[place as usize];
        }
        best
    }

    /// What follows at a place, at most `max_tokens` tokens; nothing if the place is forgotten.
    pub fn continuation(&self, place: Place, max_tokens: usize) -> &[u32] {
        if place.generation != self.generation {
            return &[];
        }
        let rest = self.tokens.get(place.next..).unwrap_or_default();
        let rest = &rest[..rest.len().min(max_tokens)];
        let end = rest.iter().position(|token| *token == BREAK).unwrap_or(rest.len());
        &rest[..end]
    }

    /// Tokens before `next` that agree with the end of `suffix`.
    fn agreement(&self, next: usize, suffix: &[u32]) -> usize {
        let before = self.tokens[..next].iter().rev();
        before.zip(suffix.iter().rev()).take(MAX_AGREEMENT).take_while(|(a, b)| a == b && **a != BREAK).count()
    }

    fn push(&mut self, token: u32) {
        // As many heads as tokens, by doubling, so that chains stay short and small texts small.
        if self.tokens.len() >= self.heads.len() {
            let tokens = std::mem::take(&mut self.tokens);
            self.rebuild(tokens, (2 * self.heads.len()).max(256));
        }
        self.append(token);
    }

    fn append(&mut self, token: u32) {
        let place = self.tokens.len() as u32;
        self.tokens.push(token);
        self.previous.push(NOWHERE);
        if let Some(first) = self.tokens.len().checked_sub(GRAM) {
            let slot = self.slot(&self.tokens[first..]);
            self.previous[place as usize] = std::mem::replace(&mut self.heads[slot], place);
        }
    }

    fn rebuild(&mut self, tokens: Vec<u32>, num_heads: usize) {
        self.heads.clear();
        self.heads.resize(num_heads, NOWHERE);
        self.previous.clear();
        self.tokens.clear();
        tokens.into_iter().for_each(|token| self.append(token));
    }

    fn slot(&self, gram: &[u32]) -> usize {
        // FNV-1a over whole tokens, finished by a multiplication that mixes the high bits down.
        let hash =
            gram.iter().fold(0xcbf2_9ce4_8422_2325_u64, |h, t| (h ^ u64::from(*t)).wrapping_mul(0x100_0000_01b3));
        ((hash.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize) & (self.heads.len() - 1)
    }
}

/// Follows a text through an index: at every token it knows what the index would say next.
#[derive(Debug, Clone, Copy, Default)]
pub struct Follower {
    place: Option<Place>,
}

/// A place that agrees this long is followed without looking for a better one.
const LONG: usize = 16;

impl Follower {
    /// Where the text's next token is expected.
    pub fn place(&self) -> Option<Place> {
        self.place
    }

    /// Moves on by the newest token of `text`, which the index does not need to hold yet.
    pub fn follow(&mut self, index: &SuffixIndex, text: &[u32]) {
        let Some(newest) = text.last() else { return };
        let moved = self.place.and_then(|place| {
            let agrees = index.continuation(place, 1) == [*newest];
            let next = Place { next: place.next + 1, agreement: (place.agreement + 1).min(MAX_AGREEMENT), ..place };
            (agrees && !index.continuation(next, 1).is_empty()).then_some(next)
        });
        self.place = match moved {
            Some(place) if place.agreement >= LONG => Some(place),
            Some(place) => Some(index.lookup(text).filter(|found| found.agreement > place.agreement).unwrap_or(place)),
            None => index.lookup(text),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn index(tokens: &[u32]) -> SuffixIndex {
        let mut index = SuffixIndex::new(1 << 16);
        index.extend(tokens);
        index
    }

    #[test]
    fn the_longest_agreement_wins_and_the_newest_of_equals() {
        let text = [1, 2, 3, 10, 9, 1, 2, 3, 11, 5, 9, 1, 2, 3, 12, 7, 2, 3];
        let index = index(&text);
        let follow = |suffix: &[u32]| index.lookup(suffix).map(|p| (index.continuation(p, 2).to_vec(), p.agreement));
        assert_eq!(follow(&[0, 1, 2, 3]), Some((vec![12, 7], 3)));
        assert_eq!(follow(&[10, 9, 1, 2, 3]), Some((vec![11, 5], 5)));
        assert_eq!(follow(&[5, 9, 1, 2, 3]), Some((vec![12, 7], 5)));
        assert_eq!(follow(&[4, 4, 4]), None);
        // The end of the text itself has nothing after it.
        assert_eq!(follow(&[12, 7, 2, 3]), None);
    }

    #[test]
    fn separate_texts_do_not_continue_each_other() {
        let mut index = index(&[1, 2, 3]);
        index.separate();
        index.extend(&[7, 8, 1, 2, 3, 4]);
        let place = index.lookup(&[1, 2, 3]).unwrap();
        assert_eq!((index.continuation(place, 9), place.agreement), ([4].as_slice(), 3));
        assert_eq!(index.lookup(&[2, 3, BREAK]), None);
    }

    #[test]
    fn a_full_index_forgets_its_older_half() {
        let mut index = SuffixIndex::new(64);
        index.extend(&(0..40).collect::<Vec<u32>>());
        let place = index.lookup(&[3, 4, 5]).unwrap();
        index.extend(&(100..140).collect::<Vec<u32>>());
        assert!(index.len() <= 64);
        assert_eq!(index.continuation(place, 3), [0u32; 0]);
        assert_eq!(index.lookup(&[3, 4, 5]), None);
        let place = index.lookup(&[103, 104, 105]).unwrap();
        assert_eq!(index.continuation(place, 2), [106, 107]);
    }

    proptest! {
        #[test]
        fn a_follower_finds_what_a_lookup_finds_or_agrees_longer(
            tokens in proptest::collection::vec(0u32..4, 1..300),
        ) {
            let mut index = SuffixIndex::new(1 << 12);
            let mut follower = Follower::default();
            for end in 1..=tokens.len() {
                let text = &tokens[..end];
                follower.follow(&index, text);
                index.extend(&text[end - 1..]);
                // By brute force: the longest suffix of the text that stands somewhere before.
                let longest = (1..end)
                    .map(|next| text[..next].iter().rev().zip(text.iter().rev()).take_while(|(a, b)| a == b).count())
                    .max()
                    .unwrap_or(0);
                if let Some(place) = follower.place() {
                    let agreement = place.agreement.min(MAX_AGREEMENT);
                    prop_assert!(agreement <= longest && agreement >= GRAM);
                    prop_assert_eq!(&text[place.next - agreement..place.next], &text[end - agreement..]);
                }
            }
        }
    }
}
