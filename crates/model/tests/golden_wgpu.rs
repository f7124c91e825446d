//! Golden models on the portable GPU back end, on whatever adapter there is (in CI lavapipe). One test, because compiling kernels
//! takes longer than all of the models.
#![allow(clippy::print_stderr)] // A skipped test says so.

mod golden_support;

use golden_support::{Golden, fixtures};
use moellon_backend_wgpu::{WgpuBackend, WgpuOptions};
use moellon_model::batch::LogitRows;
use moellon_model::session::{Session, read_logits};

/// As in golden.rs: f32 throughout.
const LOGIT_TOLERANCE: f32 = 1e-4;

#[test]
fn prefill_and_recorded_decoding_match() {
    let mut backend = match WgpuBackend::new(&WgpuOptions::default()) {
        Ok(backend) => backend,
        Err(error) => {
            eprintln!("SKIP golden models on the wgpu back end: {error}");
            return;
        }
    };
    for name in fixtures() {
        let golden = Golden::open(&name);
        let mut decoder = golden.decoder(&mut backend);
        let logits =
            Session::new().step(&golden.ids, LogitRows::All, &mut decoder, &mut backend, None).expect("prefill runs");
        let whole = read_logits(logits, &mut backend).expect("logits come back");
        golden.assert_logits("prefill", &whole, "logits", LOGIT_TOLERANCE);

        // The last tokens one at a time: recorded once, then replayed. Same bits, then greedy.
        let split = golden.ids.len() - 6;
        let mut session = Session::new();
        session.step(&golden.ids[..split], LogitRows::None, &mut decoder, &mut backend, None).expect("prefill runs");
        let mut decoded = Vec::new();
        for id in &golden.ids[split..] {
            let logits = session.extend(&[*id], &mut decoder, &mut backend).expect("decode runs");
            decoded.extend(read_logits(logits, &mut backend).expect("logits come back"));
        }
        let tail = &whole[whole.len() - decoded.len()..];
        let differs = tail.iter().zip(&decoded).position(|(a, b)| a.to_bits() != b.to_bits());
        assert_eq!(differs, None, "{name}: first logit that depends on the batch, or on replaying a step");
        let vocab_size = decoder.config().vocab_size;
        let mut last = decoded[decoded.len() - vocab_size..].to_vec();
        let mut greedy_ids = Vec::new();
        for _ in 0..golden.greedy_ids.len() {
            let best = (0..vocab_size).fold(0, |best, i| if last[i] > last[best] { i } else { best });
            greedy_ids.push(best as u32);
            let logits = session.extend(&[best as u32], &mut decoder, &mut backend).expect("decode runs");
            last = read_logits(logits, &mut backend).expect("logits come back");
        }
        assert_eq!(greedy_ids, golden.greedy_ids, "{name}: greedy ids");
    }
}
