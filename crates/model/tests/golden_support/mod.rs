//! Reads the golden fixtures.
#![allow(dead_code, reason = "every test file uses a part of it")]

pub(crate) mod quantized;

use moellon_backend_cpu::{ActivationMode, CpuBackend, CpuLevel, CpuOptions};
use moellon_checkpoint::Checkpoint;
use moellon_model::batch::LogitRows;
use moellon_model::session::{Session, read_logits};
use moellon_model::weights::Weights;
use moellon_model::{Decoder, DecoderOptions, ModelConfig, arch};
use moellon_ops::reference::ReferenceBackend;
use moellon_ops::{Backend, CacheDtype};
use safetensors::SafeTensors;
use std::path::PathBuf;

/// One fixture: a tiny model and what transformers computed with it.
pub(crate) struct Golden {
    pub(crate) name: String,
    pub(crate) ids: Vec<u32>,
    pub(crate) greedy_ids: Vec<u32>,
    config: ModelConfig,
    checkpoint: Checkpoint,
    golden: Vec<u8>,
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/golden")
}

/// Names of all fixtures.
pub(crate) fn fixtures() -> Vec<String> {
    let entries = std::fs::read_dir(root()).expect("fixtures/golden is part of the repository");
    let mut names: Vec<String> =
        entries.map(|e| e.expect("readable entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    assert!(names.len() >= 6, "fixtures/golden has {names:?}");
    names
}

/// Every back end of this machine, exact.
pub(crate) fn all_backends() -> Vec<Box<dyn Backend>> {
    let cpu = CpuLevel::available().map(|level| {
        // Teams of two only once: tests run side by side, and spinning teams would fight for the cores.
        let threads = if level == CpuLevel::detect() { 2 } else { 1 };
        let options =
            CpuOptions { threads: Some(threads), level: Some(level), activation: ActivationMode::Exact, pin: false };
        Box::new(CpuBackend::new(options).expect("an available level starts")) as Box<dyn Backend>
    });
    std::iter::once(Box::new(ReferenceBackend::new()) as Box<dyn Backend>).chain(cpu).collect()
}

impl Golden {
    pub(crate) fn open(name: &str) -> Self {
        let dir = root().join(name);
        let checkpoint = Checkpoint::open(&dir).expect("fixture opens");
        let config = arch::parse(&checkpoint.config).expect("fixture's config is legal");
        let golden = std::fs::read(dir.join("golden.safetensors")).expect("fixture has golden values");
        let ids = |key: &str| -> Vec<u32> {
            let file = SafeTensors::deserialize(&golden).expect("golden file is sound");
            let data = file.tensor(key).expect("golden key").data().to_vec();
            data.chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().expect("four bytes")) as u32).collect()
        };
        let (input, greedy) = (ids("input_ids"), ids("greedy_ids"));
        Golden { name: name.to_owned(), ids: input, greedy_ids: greedy, config, checkpoint, golden }
    }

    /// Loads the model for one sequence, with f32 caches.
    pub(crate) fn decoder(&self, backend: &mut dyn Backend) -> Decoder {
        let options = DecoderOptions::single_sequence(128, 64, CacheDtype::F32);
        self.decoder_for(DecoderOptions { block_size: 8, num_blocks: 16, ..options }, backend)
    }

    /// Loads the model for `options`.
    pub(crate) fn decoder_for(&self, options: DecoderOptions, backend: &mut dyn Backend) -> Decoder {
        let weights =
            Weights::load(&self.config, &self.checkpoint, backend, &mut |_| {}).expect("fixture's weights load");
        Decoder::new(self.config.clone(), weights, options, backend).expect("decoder fits")
    }

    pub(crate) fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub(crate) fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    pub(crate) fn has(&self, key: &str) -> bool {
        SafeTensors::deserialize(&self.golden).expect("golden file is sound").tensor(key).is_ok()
    }

    /// Compares with a golden tensor; a fixture that lacks the key has nothing to compare.
    pub(crate) fn assert_logits(&self, what: &str, actual: &[f32], key: &str, tolerance: f32) {
        let file = SafeTensors::deserialize(&self.golden).expect("golden file is sound");
        let Ok(tensor) = file.tensor(key) else {
            assert!(key.contains('.'), "{}: fixture lacks {key}", self.name);
            return;
        };
        let expected: Vec<f32> =
            tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("four bytes"))).collect();
        assert_eq!(actual.len(), expected.len(), "{}: {what}: elements of {key}", self.name);
        let worst = actual.iter().zip(&expected).enumerate().fold((0, 0.0f32), |worst, (i, (a, e))| {
            let difference = (a - e).abs();
            if difference > worst.1 || difference.is_nan() { (i, difference) } else { worst }
        });
        let (i, difference) = worst;
        assert!(
            difference <= tolerance,
            "{}: {what}: {key}[{i}] is {}, expected {}, difference {difference:e}",
            self.name,
            actual[i],
            expected[i]
        );
    }

    /// Compares index sets where a row has more positions than the set.
    pub(crate) fn assert_index_sets(&self, layer: usize, ids: &[u32], topk: usize, counts: &[u32]) {
        let file = SafeTensors::deserialize(&self.golden).expect("golden file is sound");
        let Ok(tensor) = file.tensor(&format!("topk.{layer}")) else { return };
        let expected: Vec<u32> = tensor
            .data()
            .chunks_exact(4)
            .map(|b| i32::from_le_bytes(b.try_into().expect("four bytes")) as u32)
            .collect();
        for (row, count) in counts.iter().enumerate().filter(|(row, _)| row + 1 >= topk) {
            let mut expected = expected[row * topk..][..topk].to_vec();
            expected.sort_unstable();
            assert_eq!(
                ids[row * topk..][..*count as usize],
                expected,
                "{}: index set of layer {layer}, row {row}",
                self.name
            );
        }
    }
}

/// As in golden.rs: f32 throughout.
const LOGIT_TOLERANCE: f32 = 1e-4;

/// Every golden model on a back end that records steps: a prompt, then tokens one at a time, with the prompt's bits, then greedy.
pub(crate) fn assert_prefill_and_recorded_decoding(backend: &mut dyn Backend) {
    for name in fixtures() {
        let golden = Golden::open(&name);
        let mut decoder = golden.decoder(backend);
        let logits =
            Session::new().step(&golden.ids, LogitRows::All, &mut decoder, backend, None).expect("prefill runs");
        let whole = read_logits(logits, backend).expect("logits come back");
        golden.assert_logits("prefill", &whole, "logits", LOGIT_TOLERANCE);

        // The last tokens one at a time: recorded once, then replayed. Same bits, then greedy.
        let split = golden.ids.len() - 6;
        let mut session = Session::new();
        session.step(&golden.ids[..split], LogitRows::None, &mut decoder, backend, None).expect("prefill runs");
        let mut decoded = Vec::new();
        for id in &golden.ids[split..] {
            let logits = session.extend(&[*id], &mut decoder, backend).expect("decode runs");
            decoded.extend(read_logits(logits, backend).expect("logits come back"));
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
            let logits = session.extend(&[best as u32], &mut decoder, backend).expect("decode runs");
            last = read_logits(logits, backend).expect("logits come back");
        }
        assert_eq!(greedy_ids, golden.greedy_ids, "{name}: greedy ids");
    }
}
