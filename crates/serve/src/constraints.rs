//! Constraints by llguidance, behind the server's own trait.

use crate::generator::{ConstraintCompiler, Grammar};
use moellon_text::Tokenizer;
use moellon_text::constraint::{Constraint, ConstraintError, Grammar as TextGrammar, GrammarCompiler};
use std::sync::Arc;

/// Compiles constraints with llguidance, tool calls among them.
pub struct GrammarConstraints {
    compiler: GrammarCompiler,
    tokenizer: Arc<Tokenizer>,
}

impl GrammarConstraints {
    /// A compiler for a model of `vocab_size` output rows.
    ///
    /// # Errors
    /// Why llguidance cannot use the tokenizer.
    pub fn new(tokenizer: Arc<Tokenizer>, vocab_size: usize) -> Result<GrammarConstraints, String> {
        let compiler = GrammarCompiler::new(&tokenizer, vocab_size).map_err(|error| error.to_string())?;
        Ok(GrammarConstraints { compiler, tokenizer })
    }
}

impl GrammarConstraints {
    fn grammar(&self, grammar: &Grammar) -> Result<TextGrammar, ConstraintError> {
        Ok(match grammar {
            Grammar::JsonObject => TextGrammar::JsonObject,
            Grammar::JsonSchema(schema) => TextGrammar::JsonSchema(schema.clone()),
            Grammar::Regex(regex) => TextGrammar::Regex(regex.clone()),
            Grammar::Choice(texts) => TextGrammar::Choice(texts.clone()),
            Grammar::Lark(text) => TextGrammar::Lark(text.clone()),
            Grammar::ToolCalls(calls) => {
                TextGrammar::tool_calls(&self.tokenizer, calls.format, &calls.tools, calls.required, calls.parallel)?
            }
            Grammar::InHarmony(answer) => self.grammar(answer)?.in_harmony(&self.tokenizer)?,
        })
    }
}

impl ConstraintCompiler for GrammarConstraints {
    fn compile(&self, grammar: &Grammar) -> Result<Box<dyn Constraint>, ConstraintError> {
        self.compiler.compile(self.grammar(grammar)?)
    }
}
