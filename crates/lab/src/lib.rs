//! Floor 5 of Moellon: what is measured, and how it is made comparable. Every figure comes with the bytes that it moved
//! and the share of the read bandwidth that the machine had in the same minute; windows in which a neighbour took CPU
//! time are discarded and counted.

pub mod bench;
pub mod machine;
pub mod speculation;
pub mod statistics;

pub use bench::{BenchPlan, BenchReport};
pub use machine::{Machine, ReadBandwidth, StealClock};
