//! What a template may use up, and the counters of one rendering.

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind, State};

use super::python;

/// Limits of one rendering. A template comes with a model from the internet: it may be hostile or merely wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TemplateLimits {
    /// Largest prompt, and largest single value on the way to it, in bytes.
    pub max_output_bytes: u64,
    /// Bytes of all values that are put together on the way, dropped ones included.
    pub max_work_bytes: u64,
    /// Template instructions executed.
    pub max_instructions: u64,
    /// Depth of macros calling macros; in minijinja's unit, of which a macro call takes about five.
    pub max_recursion: usize,
}

impl Default for TemplateLimits {
    /// 32 MiB of prompt (more than a million tokens of context hold), 1 GiB of work, 20 million instructions, 250
    /// levels.
    fn default() -> TemplateLimits {
        TemplateLimits {
            max_output_bytes: 32 << 20,
            max_work_bytes: 1 << 30,
            max_instructions: 20_000_000,
            max_recursion: 250,
        }
    }
}

/// Marks an error as a limit; travels as the source of a minijinja error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("exceeded the limit of {limit} {what}")]
pub(super) struct LimitReached {
    pub(super) what: &'static str,
    pub(super) limit: u64,
}

impl LimitReached {
    pub(super) fn into_error(self) -> Error {
        Error::new(ErrorKind::InvalidOperation, self.to_string()).with_source(self)
    }
}

/// Bytes used up by one rendering; lives in minijinja's state, which macros share.
#[derive(Debug, Default)]
struct Usage {
    work_bytes: u64,
}

/// What a slot of a list costs, in bytes.
pub(super) const LIST_ITEM_BYTES: u64 = 32;
/// What looking at a nested value costs, in the same currency.
const VISIT_BYTES: u64 = 4;

impl TemplateLimits {
    /// Counts bytes that are about to be, or were just, produced.
    ///
    /// # Errors
    /// [`LimitReached`] when one value or the sum of all is too large.
    pub(super) fn charge(&self, state: &mut State<'_, '_>, size_bytes: u64) -> Result<(), Error> {
        self.check_size(size_bytes)?;
        let usage = state.get_or_insert_extension_with(Usage::default);
        usage.work_bytes = usage.work_bytes.saturating_add(size_bytes);
        if usage.work_bytes > self.max_work_bytes {
            return Err(LimitReached { what: "bytes of work", limit: self.max_work_bytes }.into_error());
        }
        Ok(())
    }

    fn check_size(&self, size_bytes: u64) -> Result<(), Error> {
        if size_bytes > self.max_output_bytes {
            return Err(LimitReached { what: "bytes in one value", limit: self.max_output_bytes }.into_error());
        }
        Ok(())
    }

    /// Counts a value by what a copy of it costs.
    pub(super) fn charge_value(&self, state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
        let size_bytes = match value.as_str() {
            Some(text) => text.len() as u64,
            None => match value.kind() {
                ValueKind::Seq | ValueKind::Iterable => value.len().unwrap_or(0) as u64 * LIST_ITEM_BYTES,
                _ => 0,
            },
        };
        self.charge(state, size_bytes)
    }

    /// An operand of `~`: counted, and as the text that Python would make of it.
    pub(super) fn text_operand(&self, state: &mut State<'_, '_>, value: &Value) -> Result<Value, Error> {
        if value.as_str().is_some() {
            self.charge_value(state, value)?;
            return Ok(value.clone());
        }
        let text = python::to_str(value, self.max_output_bytes)?;
        self.charge(state, text.len() as u64)?;
        Ok(Value::from(text))
    }

    /// A sum: counted; a lazy list becomes a list, as Python's is.
    pub(super) fn sum(&self, state: &mut State<'_, '_>, value: &Value) -> Result<Value, Error> {
        self.charge_value(state, value)?;
        if value.kind() == ValueKind::Iterable && value.len().is_some() {
            return Ok(Value::from(value.try_iter()?.collect::<Vec<Value>>()));
        }
        Ok(value.clone())
    }

    /// An assigned value: its nesting is bounded, and a lazy list becomes a list, so that a loop cannot stack up lazy
    /// ones.
    pub(super) fn assigned(&self, state: &mut State<'_, '_>, value: &Value) -> Result<Value, Error> {
        let value = if value.kind() == ValueKind::Iterable {
            let mut items = Vec::new();
            for item in value.try_iter()? {
                self.charge(state, LIST_ITEM_BYTES)?;
                items.push(item);
            }
            Value::from(items)
        } else {
            value.clone()
        };
        if let Some(text) = value.as_str() {
            self.check_size(text.len() as u64)?; // an assignment copies no text
        }
        self.check_depth(state, &value, 0)?;
        Ok(value)
    }

    fn check_depth(&self, state: &mut State<'_, '_>, value: &Value, depth: usize) -> Result<(), Error> {
        if !matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::Iterable) {
            return Ok(());
        }
        if depth > python::MAX_DEPTH {
            let limit = python::MAX_DEPTH as u64;
            return Err(LimitReached { what: "levels of nested values", limit }.into_error());
        }
        let is_map = value.kind() == ValueKind::Map;
        for item in value.try_iter()? {
            self.charge(state, VISIT_BYTES)?;
            let inner = if is_map { value.get_item(&item)? } else { item };
            self.check_depth(state, &inner, depth + 1)?;
        }
        Ok(())
    }
}
