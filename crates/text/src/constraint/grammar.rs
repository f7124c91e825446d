//! Grammars as constraints: JSON schema, regular expressions and Lark, compiled by llguidance over our own table of token
//! bytes.
//!
//! A grammar comes from a stranger. Its size and nesting are checked before anything recurses over it, it is compiled on a
//! thread of its own with a deep stack, fuel and a limit of processor time, and the parser has fuel at every step. What runs
//! out fails the request; nothing is ever left open. What other requests take is not the grammar's fault: it waits its turn,
//! and where that takes too long the error says so.

mod slots;

use super::{Constraint, ConstraintError, TokenMask};
use crate::Tokenizer;
use llguidance::api::TopLevelGrammar;
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};
use slots::{Slots, ThreadClock};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};

/// Bytes of a grammar, a regular expression, or a schema written as JSON.
const MAX_GRAMMAR_BYTES: usize = 1 << 20;

/// Brackets inside brackets. Hand-written grammars stay below 20; parsers recurse on them.
const MAX_NESTING: usize = 128;

/// A compilation that takes more of a processor's time is given up. Usual schemas take 2 to 10 ms.
const MAX_COMPILE_TIME: Duration = Duration::from_millis(1200);

/// Compilations at once, those that were given up and still run among them.
const MAX_COMPILATIONS: usize = 4;

/// Longest that a grammar waits for the others and for a processor.
const MAX_WAIT: Duration = Duration::from_secs(8);

/// Time between looks at a compilation's clock.
const CLOCK_INTERVAL: Duration = Duration::from_millis(100);

/// Stack of a compilation: `MAX_NESTING` levels of any parser, many times over. Only what is touched becomes memory.
const COMPILE_STACK_BYTES: usize = 64 << 20;

/// Longer tokens are never allowed in constrained text: the trie counts lengths in a byte.
const MAX_TOKEN_BYTES: usize = 200;

/// Whitespace between the parts of JSON: enough for deep indentation, not for a model that is stuck in it.
pub(super) const JSON_WHITESPACE: &str = r"[ \n\r\t]{0,48}";

/// What an output must look like.
#[derive(Debug, Clone, PartialEq)]
pub enum Grammar {
    /// Any JSON object.
    JsonObject,
    /// JSON of this schema.
    JsonSchema(Value),
    /// Text that matches a regular expression as a whole.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A grammar in llguidance's Lark form. Special tokens are written as they are, `<|call|>`, or by id, `<[7]>`;
    /// `%json {..}` embeds a schema.
    Lark(String),
}

impl Grammar {
    /// The name that errors use.
    fn kind(&self) -> &'static str {
        match self {
            Grammar::JsonObject | Grammar::JsonSchema(_) => "json_schema",
            Grammar::Regex(_) => "regex",
            Grammar::Choice(_) => "choice",
            Grammar::Lark(_) => "grammar",
        }
    }

    /// Checks size and nesting.
    fn check(&self) -> Result<(), ConstraintError> {
        let kind = self.kind();
        let at_most = |what, found: usize, limit: usize| {
            if found <= limit { Ok(()) } else { Err(ConstraintError::TooComplex { kind, what, found, limit }) }
        };
        let text = match self {
            Grammar::JsonObject => return Ok(()),
            Grammar::JsonSchema(schema) => {
                at_most("nesting", depth_of(schema), MAX_NESTING)?;
                schema.to_string()
            }
            Grammar::Regex(text) | Grammar::Lark(text) => {
                at_most("nesting", nesting_of(text), MAX_NESTING)?;
                text.clone()
            }
            Grammar::Choice(texts) => {
                let usable = !texts.is_empty() && texts.iter().all(|text| !text.is_empty());
                if !usable {
                    let reason = "found an empty list or text, expected at least one text".to_owned();
                    return Err(ConstraintError::Grammar { kind, reason });
                }
                texts.concat()
            }
        };
        at_most("size in bytes", text.len(), MAX_GRAMMAR_BYTES)
    }

    fn compile(self) -> TopLevelGrammar {
        let with_options = |mut schema: Value| {
            if let Some(fields) = schema.as_object_mut() {
                // A request's own options would include leniency.
                fields.insert("x-guidance".to_owned(), json!({"whitespace_pattern": JSON_WHITESPACE}));
            }
            TopLevelGrammar::from_json_schema(schema)
        };
        match self {
            Grammar::JsonObject => with_options(json!({"type": "object"})),
            // `true` is the schema of anything.
            Grammar::JsonSchema(Value::Bool(true)) => with_options(json!({})),
            Grammar::JsonSchema(schema) => with_options(schema),
            Grammar::Regex(regex) => TopLevelGrammar::from_regex(&regex),
            Grammar::Choice(texts) => {
                let quoted: Vec<String> = texts.into_iter().map(|text| Value::String(text).to_string()).collect();
                TopLevelGrammar::from_lark(format!("start: {}", quoted.join(" | ")))
            }
            Grammar::Lark(text) => TopLevelGrammar::from_lark(text),
        }
    }
}

/// Levels of a JSON value, found without recursion.
fn depth_of(value: &Value) -> usize {
    let (mut deepest, mut rest) = (0, vec![(value, 1)]);
    while let Some((value, depth)) = rest.pop() {
        deepest = deepest.max(depth);
        match value {
            Value::Array(items) => rest.extend(items.iter().map(|item| (item, depth + 1))),
            Value::Object(fields) => rest.extend(fields.values().map(|field| (field, depth + 1))),
            Value::String(text) => deepest = deepest.max(depth + nesting_of(text)),
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }
    deepest
}

/// Brackets inside brackets in a text, those after a backslash not counted.
fn nesting_of(text: &str) -> usize {
    let (mut depth, mut deepest, mut escaped) = (0usize, 0, false);
    for byte in text.bytes() {
        match byte {
            _ if escaped => {}
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        escaped = byte == b'\\' && !escaped;
        deepest = deepest.max(depth);
    }
    deepest
}

/// Makes constraints for one model's tokenizer. Made once; cheap to clone.
#[derive(Clone)]
pub struct GrammarCompiler {
    factory: Arc<ParserFactory>,
    /// Never allowed: ends are the engine's to allow.
    eos: u32,
    slots: Slots,
}

impl GrammarCompiler {
    /// Builds the trie of a tokenizer's tokens. `vocab_size` is the model's; its padding rows are never allowed.
    ///
    /// # Errors
    /// A tokenizer without any special token, or one that llguidance cannot use.
    pub fn new(tokenizer: &Tokenizer, vocab_size: usize) -> Result<Self, ConstraintError> {
        let fail = |reason: String| ConstraintError::Grammar { kind: "tokenizer", reason };
        let vocab_size = vocab_size.max(tokenizer.vocab_size());
        let eos = tokenizer.eos_id().or_else(|| tokenizer.special_ids().first().copied());
        // A padding row serves as well: it has no text.
        let padding = (vocab_size > tokenizer.vocab_size()).then(|| vocab_size as u32 - 1);
        let eos = eos.or(padding).ok_or_else(|| fail("found no special token, expected at least one".to_owned()))?;
        let mut words: Vec<Vec<u8>> = (0..vocab_size as u32).map(|id| word_of(tokenizer, id)).collect();
        if words[eos as usize].is_empty() {
            words[eos as usize] = [&[TokTrie::SPECIAL_TOKEN_MARKER], b"<end>".as_slice()].concat();
        }
        let trie = TokTrie::from(&TokRxInfo::new(vocab_size as u32, eos), &words);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&environment).map_err(|error| fail(error.to_string()))?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        Ok(GrammarCompiler { factory: Arc::new(factory), eos, slots: Slots::new(MAX_COMPILATIONS) })
    }

    /// Compiles a grammar, within 1.2 seconds of a processor's time. Waits for other compilations first, if need be, up to
    /// eight seconds in all.
    ///
    /// # Errors
    /// [`ConstraintError::Grammar`] if it is wrong or not supported, [`ConstraintError::TooComplex`] beyond the limits,
    /// [`ConstraintError::Busy`] if others left it no slot or no processor.
    pub fn compile(&self, grammar: Grammar) -> Result<Box<dyn Constraint>, ConstraintError> {
        self.compile_by(grammar, Instant::now() + MAX_WAIT)
    }

    fn compile_by(&self, grammar: Grammar, deadline: Instant) -> Result<Box<dyn Constraint>, ConstraintError> {
        grammar.check()?;
        let kind = grammar.kind();
        let fail = |reason: String| ConstraintError::Grammar { kind, reason };
        let slot = self.slots.take(deadline).ok_or(ConstraintError::Busy { kind })?;
        let (done, wait) = mpsc::channel();
        let (say_clock, clock) = mpsc::channel();
        let (factory, eos) = (Arc::clone(&self.factory), self.eos);
        let compile = move || {
            // The asker may have stopped waiting: neither it nor we mind.
            let _ = say_clock.send(ThreadClock::of_this_thread());
            let outcome = build(&factory, grammar, eos);
            drop(slot);
            let _ = done.send(outcome);
        };
        let thread = std::thread::Builder::new().name("grammar".to_owned()).stack_size(COMPILE_STACK_BYTES);
        // No thread to be had is the machine's trouble, not the grammar's.
        thread.spawn(compile).map_err(|_| ConstraintError::Busy { kind })?;
        let Ok(clock) = clock.recv() else { return Err(fail("the compiler failed on it".to_owned())) };
        loop {
            match wait.recv_timeout(CLOCK_INTERVAL) {
                Ok(outcome) => {
                    return outcome.map(|constraint| Box::new(constraint) as Box<dyn Constraint>).map_err(fail);
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => return Err(fail("the compiler failed on it".to_owned())),
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    let spent = clock.elapsed();
                    if spent > MAX_COMPILE_TIME {
                        let (found, limit) = (spent.as_millis() as usize, MAX_COMPILE_TIME.as_millis() as usize);
                        return Err(ConstraintError::TooComplex { kind, what: "compile time in ms", found, limit });
                    }
                    if Instant::now() >= deadline {
                        return Err(ConstraintError::Busy { kind });
                    }
                }
            }
        }
    }
}

impl std::fmt::Debug for GrammarCompiler {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("GrammarCompiler").field("eos", &self.eos).finish_non_exhaustive()
    }
}

/// The bytes by which a grammar can name a token; empty for one that it cannot.
fn word_of(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    let bytes = tokenizer.token_bytes(id);
    // No text contains the byte 0xff, so a token that begins with it would pass for a special one.
    if bytes.len() > MAX_TOKEN_BYTES || bytes.contains(&TokTrie::SPECIAL_TOKEN_MARKER) {
        Vec::new()
    } else if tokenizer.is_special(id) {
        [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat()
    } else {
        bytes.to_vec()
    }
}

fn build(factory: &ParserFactory, grammar: Grammar, eos: u32) -> Result<GrammarConstraint, String> {
    let parser = factory.create_parser(grammar.compile());
    let mut matcher = Matcher::new(parser);
    if let Some(error) = matcher.get_error() {
        return Err(first_line(&error));
    }
    // The first mask costs the most: here it is inside of the deadline, and a grammar that allows nothing is refused.
    let mask = matcher.compute_mask_or_eos().map_err(|error| first_line(&error.to_string()))?;
    if mask.num_set() == 0 {
        return Err("it allows no token, expected at least one".to_owned());
    }
    Ok(GrammarConstraint { matcher, consumed: 0, eos })
}

fn first_line(error: &str) -> String {
    error.lines().next().unwrap_or("unknown").to_owned()
}

/// A parser on its way through an output.
struct GrammarConstraint {
    matcher: Matcher,
    consumed: usize,
    eos: u32,
}

impl GrammarConstraint {
    fn failed(&self, reason: impl std::fmt::Display) -> ConstraintError {
        ConstraintError::Failed { consumed: self.consumed, reason: first_line(&reason.to_string()) }
    }

    fn check(&self) -> Result<(), ConstraintError> {
        self.matcher.get_error().map_or(Ok(()), |error| Err(self.failed(error)))
    }
}

impl Constraint for GrammarConstraint {
    fn allow(&mut self, mask: &mut TokenMask) -> Result<(), ConstraintError> {
        self.check()?;
        if self.matcher.is_stopped() {
            mask.intersect(&[]);
            return Ok(());
        }
        let allowed = self.matcher.compute_mask().map_err(|error| self.failed(error))?;
        mask.intersect(allowed.as_slice());
        mask.clear(self.eos);
        Ok(())
    }

    fn consume(&mut self, token: u32) -> Result<(), ConstraintError> {
        self.check()?;
        let not_allowed = ConstraintError::NotAllowed { token, consumed: self.consumed };
        if token == self.eos || self.matcher.is_stopped() {
            return Err(not_allowed);
        }
        match self.matcher.try_consume_tokens(&[token]) {
            Ok(1) => {
                self.consumed += 1;
                Ok(())
            }
            Ok(_) => Err(not_allowed),
            Err(error) => Err(self.failed(error)),
        }
    }

    fn rollback(&mut self, num_tokens: usize) -> Result<(), ConstraintError> {
        self.check()?;
        if num_tokens > self.consumed {
            return Err(ConstraintError::Rollback { found: num_tokens, consumed: self.consumed });
        }
        self.matcher.rollback(num_tokens).map_err(|error| self.failed(error))?;
        self.consumed -= num_tokens;
        Ok(())
    }

    fn may_end(&mut self) -> bool {
        self.is_complete() || self.matcher.is_accepting().unwrap_or(false)
    }

    fn is_complete(&mut self) -> bool {
        !self.matcher.is_error() && self.matcher.is_stopped()
    }
}

#[cfg(test)]
mod tests;
