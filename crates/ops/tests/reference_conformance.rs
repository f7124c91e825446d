//! The reference passes its own cases: contracts hold, outputs are finite, rows are independent.

use moellon_ops::conformance::run_all;
use moellon_ops::reference::ReferenceBackend;

#[test]
fn reference_passes_its_own_cases() {
    run_all(&mut ReferenceBackend::new()).assert_passed();
}
