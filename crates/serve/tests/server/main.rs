//! The protocols, over loopback, with a scripted generator and the bundled model's tokenizer and template.

mod anthropic;
mod chat;
mod client;
mod completions;
mod constraints;
mod faults;
mod hardening;
mod resident;
mod responses;
mod status;
