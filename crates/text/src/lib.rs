//! Tokenizer, chat templates, streaming detokenization, thinking and tool-call parsing of Moellon.

pub mod constraint;
