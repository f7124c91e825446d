//! Golden models: logits, greedy continuation and intermediate values of tiny random models computed by transformers in
//! f32. Every architecture, on every back end that this machine has.

mod golden_support;

use golden_support::{Golden, all_backends, fixtures};
use moellon_backend_cpu::{ActivationMode, CpuBackend, CpuLevel, CpuOptions};
use moellon_model::batch::LogitRows;
use moellon_model::mtp::MtpHidden;
use moellon_model::session::{Session, read_logits};
use moellon_model::{Result, Tap, TapPoint};
use moellon_ops::{Backend, Tensor};

/// Largest difference of a logit, in f32, over models with logits near 5: the gate. numpy reaches 2.1e-5.
const LOGIT_TOLERANCE: f32 = 1e-4;

#[test]
fn prefill_matches() {
    for_every(|golden, backend| {
        let mut decoder = golden.decoder(backend);
        let logits =
            Session::new().step(&golden.ids, LogitRows::All, &mut decoder, backend, None).expect("prefill runs");
        golden.assert_logits(
            "prefill",
            &read_logits(logits, backend).expect("logits come back"),
            "logits",
            LOGIT_TOLERANCE,
        );
    });
}

#[test]
fn token_by_token_decode_and_greedy_continuation_match() {
    for_every(|golden, backend| {
        let mut decoder = golden.decoder(backend);
        let mut session = Session::new();
        let mut decoded = Vec::new();
        for id in &golden.ids {
            let logits = session.extend(&[*id], &mut decoder, backend).expect("decode runs");
            decoded.extend(read_logits(logits, backend).expect("logits come back"));
        }
        golden.assert_logits("decode", &decoded, "logits", LOGIT_TOLERANCE);
        let vocab_size = decoder.config().vocab_size;
        let mut last = decoded[decoded.len() - vocab_size..].to_vec();
        let (mut greedy_ids, mut greedy_logits) = (Vec::new(), Vec::new());
        for _ in 0..golden.greedy_ids.len() {
            let best = (0..vocab_size).fold(0, |best, i| if last[i] > last[best] { i } else { best });
            greedy_ids.push(best as u32);
            greedy_logits.extend_from_slice(&last);
            let logits = session.extend(&[best as u32], &mut decoder, backend).expect("decode runs");
            last = read_logits(logits, backend).expect("logits come back");
        }
        assert_eq!(greedy_ids, golden.greedy_ids, "{}: greedy ids", golden.name);
        golden.assert_logits("greedy", &greedy_logits, "greedy_logits", LOGIT_TOLERANCE);
    });
}

#[test]
fn chunked_prefill_equals_one_step_bit_for_bit() {
    for_every(|golden, backend| {
        let mut decoder = golden.decoder(backend);
        let whole =
            Session::new().step(&golden.ids, LogitRows::All, &mut decoder, backend, None).expect("prefill runs");
        let whole = read_logits(whole, backend).expect("logits come back");
        let mut session = Session::new();
        let mut chunked = Vec::new();
        for chunk in golden.ids.chunks(7) {
            let logits = session.step(chunk, LogitRows::All, &mut decoder, backend, None).expect("prefill runs");
            chunked.extend(read_logits(logits, backend).expect("logits come back"));
        }
        let differs = whole.iter().zip(&chunked).position(|(a, b)| a.to_bits() != b.to_bits());
        assert_eq!(
            differs,
            None,
            "{} on {}: first logit that depends on the chunking",
            golden.name,
            backend.caps().device
        );
    });
}

#[test]
fn mtp_logits_match() {
    let mut tested = 0;
    for_every(|golden, backend| {
        let mut decoder = golden.decoder(backend);
        if !golden.has("mtp_logits") {
            return;
        }
        let mut session = Session::new();
        session.step(&golden.ids, LogitRows::None, &mut decoder, backend, None).expect("prefill runs");
        let logits = session.mtp(&golden.ids[1..], 0, MtpHidden::Trunk, &mut decoder, backend).expect("MTP runs");
        golden.assert_logits(
            "mtp",
            &read_logits(logits, backend).expect("logits come back"),
            "mtp_logits",
            LOGIT_TOLERANCE,
        );
        tested += 1;
    });
    assert!(tested > 0, "no fixture has MTP logits");
}

/// Compares residual streams, attention outputs and index sets layer by layer.
struct LayerValues<'a> {
    golden: &'a Golden,
    index_sets: usize,
}

impl Tap for LayerValues<'_> {
    fn at(&mut self, point: TapPoint, tensors: &[Tensor], backend: &mut dyn Backend) -> Result<()> {
        match point {
            TapPoint::Hidden(layer) if layer > 0 => {
                self.golden.assert_logits(
                    "layer",
                    &read_logits(tensors[0], backend)?,
                    &format!("layer_out.{}", layer - 1),
                    1e-3,
                );
            }
            TapPoint::AttentionOutput(layer) => {
                self.golden.assert_logits(
                    "attention",
                    &read_logits(tensors[0], backend)?,
                    &format!("attn_out.{layer}"),
                    1e-3,
                );
            }
            TapPoint::IndexSet(layer) => {
                let (mut ids, mut counts) = (vec![0; tensors[0].rows * tensors[0].cols], vec![0; tensors[1].cols]);
                backend.read_u32(tensors[0], &mut ids)?;
                backend.read_u32(tensors[1], &mut counts)?;
                self.golden.assert_index_sets(layer, &ids, tensors[0].cols, &counts);
                self.index_sets += 1;
            }
            TapPoint::Hidden(_) | TapPoint::Experts(_) | TapPoint::FinalHidden => {}
        }
        Ok(())
    }
}

#[test]
fn layers_and_index_sets_match() {
    let mut index_sets = 0;
    for_every(|golden, backend| {
        let mut decoder = golden.decoder(backend);
        let mut tap = LayerValues { golden, index_sets: 0 };
        Session::new().step(&golden.ids, LogitRows::Last, &mut decoder, backend, Some(&mut tap)).expect("prefill runs");
        index_sets += tap.index_sets;
    });
    assert!(index_sets > 0, "no fixture's index sets were compared");
}

fn for_every(mut check: impl FnMut(&Golden, &mut dyn Backend)) {
    for name in fixtures() {
        let golden = Golden::open(&name);
        for mut backend in all_backends() {
            check(&golden, backend.as_mut());
        }
    }
}

/// In every format with activations of 8 bits, which the other tests of this file do not use. One level: all of them give the same bits.
#[test]
fn rounded_activations_stay_within_what_rounding_explains() {
    let options =
        CpuOptions { threads: Some(1), level: Some(CpuLevel::detect()), activation: ActivationMode::Int8, pin: false };
    golden_support::quantized::assert_every_format(
        1,
        &mut CpuBackend::new(options).expect("the detected level starts"),
    );
}
