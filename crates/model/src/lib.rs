//! One configurable Mixture-of-Experts decoder over the operations of moellon-ops.
