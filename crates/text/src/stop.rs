//! Stop tokens and stop strings of a request.

use crate::error::Error;
use crate::marker_scan::MarkerScanner;

/// Token ids that end a sequence. They are not part of its text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StopTokens {
    ids: Vec<u32>,
}

impl StopTokens {
    /// The union of all given ids (the model's end-of-text tokens and the request's own).
    pub fn new(ids: impl IntoIterator<Item = u32>) -> StopTokens {
        let mut ids: Vec<u32> = ids.into_iter().collect();
        ids.sort_unstable();
        ids.dedup();
        StopTokens { ids }
    }

    /// Whether this token ends the sequence.
    pub fn contains(&self, id: u32) -> bool {
        self.ids.binary_search(&id).is_ok()
    }

    /// All ids, in rising order.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }
}

/// The result of giving text to [`StopStrings`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StopOutcome {
    /// Text that may be sent; never contains a stop string or the beginning of one that matched.
    pub text: String,
    /// The stop string that ended the sequence, as an index into the list given at the start.
    pub matched: Option<usize>,
}

/// Looks for stop strings in the text of one sequence, across chunk boundaries.
///
/// The text sent before the stop does not depend on how it was cut into chunks. Of several stop strings the one that
/// is complete first wins; of those complete at once, the longest.
#[derive(Debug, Clone)]
pub struct StopStrings {
    scanner: MarkerScanner,
    matched: Option<usize>,
}

impl StopStrings {
    /// A matcher for these strings; an empty list never stops.
    ///
    /// # Errors
    /// [`Error::Setting`] when a string is empty: it would stop before the first character.
    pub fn new<S: AsRef<str>>(strings: &[S]) -> Result<StopStrings, Error> {
        if let Some(index) = strings.iter().position(|string| string.as_ref().is_empty()) {
            return Err(Error::Setting {
                setting: "stop",
                reason: format!("string {index} is empty, expected at least one character"),
            });
        }
        Ok(StopStrings { scanner: MarkerScanner::new(strings), matched: None })
    }

    /// Takes a chunk. After a match everything further is dropped.
    pub fn push(&mut self, chunk: &str) -> StopOutcome {
        if self.matched.is_some() {
            return StopOutcome { text: String::new(), matched: self.matched };
        }
        let (text, matched, _) = self.scanner.push_until_marker(chunk);
        self.matched = matched;
        StopOutcome { text, matched }
    }

    /// Ends the sequence without a stop string: returns what was held back.
    pub fn finish(&mut self) -> String {
        if self.matched.is_some() { String::new() } else { self.scanner.finish() }
    }

    /// The text held back because it may become a stop string.
    pub fn held(&self) -> &str {
        self.scanner.held()
    }
}
