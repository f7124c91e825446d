//! The seam between models and back ends: fused operations, their contracts, references and conformance cases.
