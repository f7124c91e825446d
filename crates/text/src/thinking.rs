//! Splits a model's output into what it thought and what it answers, as it streams.

use crate::error::Error;
use crate::marker_scan::{Found, MarkerScanner};

/// Where the output begins, which the template decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThinkingStart {
    /// The prompt ended inside a thought (GLM-5.2 and DeepSeek prompts end in `<think>`).
    Inside,
    /// The prompt ended before the answer; the model may open a thought itself (Qwen3).
    Outside,
}

/// The markers of a thought and what to do with the newlines around it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThinkingFormat {
    /// Begins a thought, usually `<think>`.
    pub open: String,
    /// Ends a thought, usually `</think>`.
    pub close: String,
    /// Remove newlines at both ends of the thought and at the beginning of an answer after it. The templates write
    /// them again when they render the history.
    pub trim_newlines: bool,
}

impl Default for ThinkingFormat {
    fn default() -> ThinkingFormat {
        ThinkingFormat { open: "<think>".to_owned(), close: "</think>".to_owned(), trim_newlines: true }
    }
}

/// A part of the output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ThinkingPiece {
    /// A part of the thought.
    Thinking(String),
    /// A part of the answer.
    Answer(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Before the first character that is not white space: a thought may still open.
    Before,
    Thinking,
    Answer,
}

/// The splitter of one sequence.
///
/// A thought opens only at the beginning of the output and closes once: a marker inside the answer is the answer's
/// own text. The pieces of one kind, joined, do not depend on how the output was cut into chunks.
#[derive(Debug, Clone)]
pub struct ThinkingSplitter {
    scanner: MarkerScanner,
    format: ThinkingFormat,
    place: Place,
    /// White space (in `Before`) or trailing newlines (in `Thinking`) whose fate is open.
    held: String,
    /// Newlines are being dropped, until another character comes.
    skip_newlines: bool,
    /// The thought has a character that is not white space.
    thought_began: bool,
}

const OPEN: usize = 0;

impl ThinkingSplitter {
    /// A splitter for one sequence.
    ///
    /// # Errors
    /// [`Error::Setting`] when a marker is empty or both are the same.
    pub fn new(format: ThinkingFormat, start: ThinkingStart) -> Result<ThinkingSplitter, Error> {
        if format.open.is_empty() || format.close.is_empty() || format.open == format.close {
            return Err(Error::Setting {
                setting: "thinking markers",
                reason: format!("found {:?} and {:?}, expected two different texts", format.open, format.close),
            });
        }
        Ok(ThinkingSplitter {
            scanner: MarkerScanner::new(&[&format.open, &format.close]),
            skip_newlines: format.trim_newlines && start == ThinkingStart::Inside,
            format,
            place: match start {
                ThinkingStart::Inside => Place::Thinking,
                ThinkingStart::Outside => Place::Before,
            },
            held: String::new(),
            thought_began: false,
        })
    }

    /// Takes a chunk and returns the pieces that are final.
    pub fn push(&mut self, chunk: &str) -> Vec<ThinkingPiece> {
        let mut pieces = Vec::new();
        for found in self.scanner.push(chunk) {
            match found {
                Found::Text(text) => self.text(&text, &mut pieces),
                Found::Marker(marker) => self.marker(marker, &mut pieces),
            }
        }
        pieces
    }

    /// Ends the output. An unclosed thought stays a thought.
    pub fn finish(&mut self) -> Vec<ThinkingPiece> {
        let mut pieces = Vec::new();
        let rest = self.scanner.finish();
        self.text(&rest, &mut pieces);
        if self.place == Place::Before {
            let held = std::mem::take(&mut self.held);
            push_piece(&mut pieces, ThinkingPiece::Answer(held));
        }
        self.held.clear();
        pieces
    }

    /// Whether the output is inside of a thought now.
    pub fn is_thinking(&self) -> bool {
        self.place == Place::Thinking
    }

    fn marker(&mut self, marker: usize, pieces: &mut Vec<ThinkingPiece>) {
        match (self.place, marker == OPEN) {
            (Place::Before, true) => {
                self.held.clear();
                self.place = Place::Thinking;
                self.skip_newlines = self.format.trim_newlines;
            }
            // A model that was prompted with the opening marker may still repeat it.
            (Place::Thinking, true) if !self.thought_began => {}
            (Place::Thinking, true) => self.text(&self.format.open.clone(), pieces),
            (Place::Thinking, false) => {
                self.held.clear();
                self.place = Place::Answer;
                self.skip_newlines = self.format.trim_newlines;
            }
            (Place::Before | Place::Answer, _) => {
                let text = if marker == OPEN { self.format.open.clone() } else { self.format.close.clone() };
                self.text(&text, pieces);
            }
        }
    }

    fn text(&mut self, text: &str, pieces: &mut Vec<ThinkingPiece>) {
        let mut text = text;
        if self.place == Place::Before {
            if text.trim_start().is_empty() {
                self.held.push_str(text);
                return;
            }
            let held = std::mem::take(&mut self.held);
            push_piece(pieces, ThinkingPiece::Answer(held));
            self.place = Place::Answer;
        }
        if self.skip_newlines {
            text = text.trim_start_matches('\n');
            if text.is_empty() {
                return;
            }
            self.skip_newlines = false;
        }
        match self.place {
            Place::Thinking => {
                self.thought_began |= !text.trim_start().is_empty();
                self.held.push_str(text);
                let kept =
                    if self.format.trim_newlines { self.held.trim_end_matches('\n').len() } else { self.held.len() };
                let newlines = self.held.split_off(kept);
                let ready = std::mem::replace(&mut self.held, newlines);
                push_piece(pieces, ThinkingPiece::Thinking(ready));
            }
            Place::Before | Place::Answer => push_piece(pieces, ThinkingPiece::Answer(text.to_owned())),
        }
    }
}

/// Appends a piece, joined with the one before when both are of one kind.
fn push_piece(pieces: &mut Vec<ThinkingPiece>, piece: ThinkingPiece) {
    match (pieces.last_mut(), piece) {
        (_, ThinkingPiece::Thinking(text) | ThinkingPiece::Answer(text)) if text.is_empty() => {}
        (Some(ThinkingPiece::Thinking(last)), ThinkingPiece::Thinking(text)) => last.push_str(&text),
        (Some(ThinkingPiece::Answer(last)), ThinkingPiece::Answer(text)) => last.push_str(&text),
        (_, piece) => pieces.push(piece),
    }
}
