//! Floor 5 of Moellon: what is measured, and how it is made comparable. Every figure comes with the bytes that it moved
//! and the share of the read bandwidth that the machine had in the same minute; windows in which a neighbour took CPU
//! time are discarded and counted.
//!
//! | file | concept |
//! |---|---|
//! | `machine.rs`, `bench.rs`, `speculation.rs` | a machine, a model's steps and prompts, drafts at a given acceptance |
//! | `ladder.rs` | hot operations in each implementation, checked and timed |
//! | `lever.rs` | hypotheses as data: `levers/*.toml` |
//! | `in_turn.rs`, `disturbance.rs`, `statistics.rs` | two arms in turn, what disturbed them, when it is decided |
//! | `plain.rs` | a back end without fused experts or recorded steps, to compare with |
//! | `roofline.rs` | what a step costs by its bytes; what-ifs |
//! | `receipt.rs` | records and their hashes |

pub mod bench;
pub mod disturbance;
pub mod in_turn;
pub mod ladder;
pub mod lever;
pub mod machine;
pub mod plain;
pub mod receipt;
pub mod roofline;
pub mod speculation;
pub mod statistics;

pub use bench::{BenchPlan, BenchReport};
pub use disturbance::STEAL_LIMIT_PERCENT;
pub use machine::{Machine, ReadBandwidth, StealClock, last_level_cache_bytes};
