//! The protocols, over loopback, with a scripted generator and the bundled model's tokenizer and template.

mod chat;
mod client;
mod hardening;
