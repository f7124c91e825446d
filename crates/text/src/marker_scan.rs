//! Finds fixed strings in a stream, however it is cut into chunks, and holds back what may become one.
//!
//! An Aho-Corasick automaton over bytes: its state's depth is exactly the number of trailing bytes that are the
//! beginning of a marker, so nothing is held that need not be.

use std::collections::BTreeMap;

/// What a scan found, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Found {
    /// Text that is no part of a marker.
    Text(String),
    /// The marker with this index.
    Marker(usize),
}

#[derive(Debug, Clone, Default)]
struct Node {
    next: BTreeMap<u8, usize>,
    /// The state of the longest proper suffix of this one.
    fallback: usize,
    depth: usize,
    /// The longest marker that ends here.
    marker: Option<usize>,
}

/// A scanner for a set of markers. Of two markers the one that ends first wins; of two that end together, the longer.
#[derive(Debug, Clone)]
pub(crate) struct MarkerScanner {
    nodes: Vec<Node>,
    lengths: Vec<usize>,
    state: usize,
    /// Text that may yet turn out to be the beginning of a marker; as long as `nodes[state].depth`.
    held: String,
}

impl MarkerScanner {
    /// A scanner for these markers; empty ones are never found.
    pub(crate) fn new<S: AsRef<str>>(markers: &[S]) -> MarkerScanner {
        let mut nodes = vec![Node::default()];
        for (index, marker) in markers.iter().enumerate() {
            let mut state = 0;
            for byte in marker.as_ref().bytes() {
                let depth = nodes[state].depth + 1;
                state = match nodes[state].next.get(&byte) {
                    Some(next) => *next,
                    None => {
                        nodes.push(Node { depth, ..Node::default() });
                        let next = nodes.len() - 1;
                        nodes[state].next.insert(byte, next);
                        next
                    }
                };
            }
            if state != 0 && nodes[state].marker.is_none() {
                nodes[state].marker = Some(index);
            }
        }
        // Breadth first, so that every fallback is complete before it is used.
        let mut queue = std::collections::VecDeque::from([0]);
        while let Some(state) = queue.pop_front() {
            let children: Vec<(u8, usize)> = nodes[state].next.iter().map(|(byte, next)| (*byte, *next)).collect();
            for (byte, child) in children {
                if state != 0 {
                    nodes[child].fallback = step(&nodes, nodes[state].fallback, byte);
                }
                if nodes[child].marker.is_none() {
                    nodes[child].marker = nodes[nodes[child].fallback].marker;
                }
                queue.push_back(child);
            }
        }
        let lengths = markers.iter().map(|marker| marker.as_ref().len()).collect();
        MarkerScanner { nodes, lengths, state: 0, held: String::new() }
    }

    /// Takes text up to and including the first marker in it. Returns the text that is final, the marker if one was
    /// completed, and how many bytes of `text` were taken (all of them when there is no marker).
    pub(crate) fn push_until_marker(&mut self, text: &str) -> (String, Option<usize>, usize) {
        for (start, character) in text.char_indices() {
            let mut encoded = [0; 4];
            for byte in character.encode_utf8(&mut encoded).bytes() {
                self.state = step(&self.nodes, self.state, byte);
            }
            if let Some(marker) = self.nodes[self.state].marker {
                let taken = start + character.len_utf8();
                let mut before = std::mem::take(&mut self.held);
                before.push_str(&text[..taken]);
                before.truncate(before.len() - self.lengths[marker]);
                self.state = 0;
                return (before, Some(marker), taken);
            }
        }
        let mut ready = std::mem::take(&mut self.held);
        ready.push_str(text);
        // A marker begins with a whole character, so the held part does as well.
        self.held = ready.split_off(ready.len() - self.nodes[self.state].depth);
        (ready, None, text.len())
    }

    /// Takes text and returns everything found in it that is final.
    pub(crate) fn push(&mut self, text: &str) -> Vec<Found> {
        let mut found = Vec::new();
        let mut rest = text;
        loop {
            let (ready, marker, taken) = self.push_until_marker(rest);
            if !ready.is_empty() {
                found.push(Found::Text(ready));
            }
            rest = &rest[taken..];
            match marker {
                Some(marker) => found.push(Found::Marker(marker)),
                None => return found,
            }
        }
    }

    /// Ends the stream: what was held back is text after all.
    pub(crate) fn finish(&mut self) -> String {
        self.state = 0;
        std::mem::take(&mut self.held)
    }

    /// Text held back because it may become a marker.
    pub(crate) fn held(&self) -> &str {
        &self.held
    }
}

fn step(nodes: &[Node], mut state: usize, byte: u8) -> usize {
    loop {
        match nodes[state].next.get(&byte) {
            Some(next) => return *next,
            None if state == 0 => return 0,
            None => state = nodes[state].fallback,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scan(markers: &[&str], chunks: &[&str]) -> Vec<Found> {
        let mut scanner = MarkerScanner::new(markers);
        let mut found: Vec<Found> = chunks.iter().flat_map(|chunk| scanner.push(chunk)).collect();
        let rest = scanner.finish();
        if !rest.is_empty() {
            found.push(Found::Text(rest));
        }
        found
    }

    fn text(text: &str) -> Found {
        Found::Text(text.to_owned())
    }

    #[test]
    fn finds_markers_across_chunks() {
        assert_eq!(scan(&["</think>"], &["a<", "/thi", "nk>b"]), [text("a"), Found::Marker(0), text("b")]);
        assert_eq!(scan(&["aab"], &["a", "a", "a", "b"]), [text("a"), Found::Marker(0)]);
    }

    #[test]
    fn first_to_end_wins_then_longest() {
        assert_eq!(scan(&["xabc", "ab"], &["xabc"]), [text("x"), Found::Marker(1), text("c")]);
        assert_eq!(scan(&["b", "ab"], &["ab"]), [Found::Marker(1)]);
        assert_eq!(scan(&["ab", "ab"], &["ab"]), [Found::Marker(0)]);
    }

    #[test]
    fn holds_no_more_than_needed() {
        let mut scanner = MarkerScanner::new(&["｜end｜"]);
        assert_eq!(scanner.push("a｜en"), [text("a")]);
        assert_eq!(scanner.held(), "｜en");
        assert_eq!(scanner.push("x｜"), [text("｜enx")]);
        assert_eq!(scanner.finish(), "｜");
    }
}
