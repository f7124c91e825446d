//! Golden models in every weight format: a back end that rounds activations against the reference that does not, on the same codes.
#![allow(clippy::print_stderr)] // Says how much was compared.

use super::{Golden, fixtures};
use moellon_checkpoint::{Checkpoint, Matrix, MlaShape, Projection};
use moellon_model::batch::LogitRows;
use moellon_model::provider::{KvB, WeightProvider};
use moellon_model::session::{Session, read_logits};
use moellon_model::weights::Weights;
use moellon_model::{Decoder, DecoderOptions, Result, Tap, TapPoint};
use moellon_ops::conformance::Tolerance;
use moellon_ops::reference::ReferenceBackend;
use moellon_ops::{ActivationPrecision, Backend, CacheDtype, Tensor};
use moellon_tensor::encode::{EncodeOptions, encode_matrix};
use moellon_tensor::{MatrixView, ScaleDtype, WeightFormat};

/// Every format, with groups that fit these models' rows.
fn formats() -> Vec<WeightFormat> {
    let affine = |bits, group| WeightFormat::Affine { bits, group, scale: ScaleDtype::Bf16 };
    let mut formats = vec![
        WeightFormat::F16,
        WeightFormat::Bf16,
        WeightFormat::Fp8Block { block_rows: 128, block_cols: 128 },
        WeightFormat::Mxfp4,
        WeightFormat::Mxfp8,
        WeightFormat::Nvfp4,
    ];
    formats.extend([2, 3, 4, 5, 6, 8].map(|bits| affine(bits, 32)));
    formats.extend([affine(3, 64), affine(4, 64)]);
    formats
}

/// A checkpoint whose matrices are encoded as they are loaded, all but routers, and rows that are no whole number of groups.
struct Encoded<'a> {
    checkpoint: &'a Checkpoint,
    format: WeightFormat,
}

impl Encoded<'_> {
    fn encode(&self, matrix: &Matrix<'_>) -> Result<Matrix<'static>> {
        let view = matrix.view();
        let fits = self.format.validate(view.cols).is_ok();
        let format = if fits { self.format } else { WeightFormat::Bf16 };
        let encoded = encode_matrix(format, [view.rows, view.cols], &view.decode_all(), EncodeOptions::default())
            .map_err(moellon_ops::Error::from)?;
        Ok(Matrix::Owned(encoded))
    }

    fn encode_all(&self, matrices: &[Matrix<'_>]) -> Result<Vec<Matrix<'static>>> {
        matrices.iter().map(|matrix| self.encode(matrix)).collect()
    }
}

impl WeightProvider for Encoded<'_> {
    moellon_model::forward_weights!(checkpoint: vector num_experts expert_biases has);

    fn linear(&self, path: &str, shape: [usize; 2]) -> Result<Matrix<'_>> {
        let matrix = WeightProvider::linear(self.checkpoint, path, shape)?;
        if path.ends_with(".gate") || path.ends_with(".router") { Ok(matrix) } else { self.encode(&matrix) }
    }

    fn experts(
        &self,
        path: &str,
        projection: Projection,
        num_experts: usize,
        shape: [usize; 2],
    ) -> Result<Vec<Matrix<'_>>> {
        self.encode_all(&WeightProvider::experts(self.checkpoint, path, projection, num_experts, shape)?)
    }

    fn mla_kv_b(&self, path: &str, shape: MlaShape) -> Result<KvB<'_>> {
        let KvB { embed_q, unembed_out } = WeightProvider::mla_kv_b(self.checkpoint, path, shape)?;
        Ok(KvB { embed_q: self.encode_all(&embed_q)?, unembed_out: self.encode_all(&unembed_out)? })
    }

    fn fused_kv_b_format(&self, _path: &str, _shape: MlaShape) -> Result<Option<WeightFormat>> {
        Ok(None)
    }

    fn release(&self, _matrices: &[MatrixView<'_>]) {}
}

/// What a step showed of itself, in its order.
enum Seen {
    /// Residual stream `[positions, hidden_size]` that this many layers made.
    Hidden(usize, Vec<f32>),
    /// What was chosen for each position, sorted: experts, or positions to attend to.
    Chosen(Vec<Vec<u32>>),
}

fn read_ids(tensor: Tensor, backend: &mut dyn Backend) -> Result<Vec<u32>> {
    let mut ids = vec![0; tensor.rows * tensor.cols];
    backend.read_u32(tensor, &mut ids)?;
    Ok(ids)
}

#[derive(Default)]
struct Steps(Vec<Seen>);

impl Tap for Steps {
    fn at(&mut self, point: TapPoint, tensors: &[Tensor], backend: &mut dyn Backend) -> Result<()> {
        let sorted = |ids: &[u32]| {
            let mut ids = ids.to_vec();
            ids.sort_unstable();
            ids
        };
        match point {
            TapPoint::Hidden(layer) => self.0.push(Seen::Hidden(layer, read_logits(tensors[0], backend)?)),
            TapPoint::Experts(_) => {
                let ids = read_ids(tensors[1], backend)?;
                self.0.push(Seen::Chosen(ids.chunks(tensors[1].cols).map(sorted).collect()));
            }
            TapPoint::IndexSet(_) => {
                let (ids, counts) = (read_ids(tensors[0], backend)?, read_ids(tensors[1], backend)?);
                let sets = ids.chunks(tensors[0].cols).zip(&counts);
                self.0.push(Seen::Chosen(sets.map(|(ids, count)| sorted(&ids[..*count as usize])).collect()));
            }
            TapPoint::AttentionOutput(_) | TapPoint::FinalHidden => {}
        }
        Ok(())
    }
}

/// A prompt's logits, untapped, and what a tapped step showed, which must have the same bits.
fn prompt(golden: &Golden, format: WeightFormat, backend: &mut dyn Backend) -> (Vec<Seen>, Vec<f32>) {
    let encoded = Encoded { checkpoint: golden.checkpoint(), format };
    let config = golden.config();
    let weights = Weights::load(config, &encoded, backend, &mut |_| {}).expect("encoded weights load");
    let options = DecoderOptions::single_sequence(128, 64, CacheDtype::F32);
    let mut decoder = Decoder::new(config.clone(), weights, options, backend).expect("decoder fits");
    let mut step = |tap: Option<&mut dyn Tap>| {
        let logits = Session::new().step(&golden.ids, LogitRows::All, &mut decoder, backend, tap);
        read_logits(logits.expect("a prompt runs"), backend).expect("logits come back")
    };
    let logits = step(None);
    let mut steps = Steps::default();
    let tapped = step(Some(&mut steps));
    assert!(
        logits.iter().map(|x| x.to_bits()).eq(tapped.iter().map(|x| x.to_bits())),
        "{} in {format:?}: looking on changes the logits",
        golden.name
    );
    (steps.0, logits)
}

/// Products with rounded activations between two residual streams, at most: five of latent attention (down, up, keys or
/// values of the heads, output; the indexer's stand beside them) and two of the experts.
const PRODUCTS_A_LAYER: usize = 7;

/// How far a back end is from a reference, over all that was compared.
#[derive(Default)]
struct Comparison {
    /// Largest difference as a share of the tolerance, and where.
    worst: f32,
    worst_at: String,
    /// Positions times layers, those before another choice, and choices that differ.
    positions: usize,
    compared: usize,
    other_choices: usize,
}

impl Comparison {
    /// Relative errors of products that follow each other are independent, so they add like a random walk: `n` products have the
    /// bound of one times the root of `n`. A position where something else was chosen (scores nearer to each other than these
    /// errors) computes other numbers, and so do those behind it, which attend to it; they are left out, and counted.
    fn of(
        name: &str,
        found: &(Vec<Seen>, Vec<f32>),
        expected: &(Vec<Seen>, Vec<f32>),
        precision: ActivationPrecision,
    ) -> Self {
        let mut all = Comparison::default();
        let mut same = usize::MAX;
        let mut others = 0;
        let rows = golden_rows(&expected.0);
        for (found, expected) in found.0.iter().zip(&expected.0) {
            match (found, expected) {
                (Seen::Hidden(layer, found), Seen::Hidden(_, expected)) => {
                    let what = format!("{name}: residual stream of {layer} layers");
                    all.rows(&what, PRODUCTS_A_LAYER * layer.max(&1), same, [found, expected], rows, precision);
                }
                (Seen::Chosen(found), Seen::Chosen(expected)) => {
                    let first = found.iter().zip(expected).position(|(found, expected)| found != expected);
                    if let Some(first) = first.filter(|first| *first < same) {
                        others += 1;
                        same = first;
                    }
                }
                _ => panic!("{name}: steps differ in kind"),
            }
        }
        let layers = expected.0.iter().filter(|seen| matches!(seen, Seen::Hidden(..))).count();
        let what = format!("{name}: logits");
        all.rows(&what, PRODUCTS_A_LAYER * layers + 1, same, [&found.1, &expected.1], rows, precision);
        all.other_choices = others;
        all
    }

    /// Compares the rows before position `same` of what `products` products in a row made.
    fn rows(
        &mut self,
        what: &str,
        products: usize,
        same: usize,
        [found, expected]: [&[f32]; 2],
        rows: usize,
        precision: ActivationPrecision,
    ) {
        let cols = expected.len() / rows;
        let tolerance = Tolerance { reduction: cols, quantized: true, depth: 2 };
        for (row, (found, expected)) in found.chunks(cols).zip(expected.chunks(cols)).enumerate() {
            self.positions += 1;
            if row >= same {
                continue;
            }
            self.compared += 1;
            let share = tolerance.share(precision, found, expected, cols) / (products as f32).sqrt();
            if share > self.worst {
                (self.worst, self.worst_at) = (share, format!("{what}, position {row}"));
            }
        }
    }

    fn add(&mut self, other: Comparison) {
        assert!(other.worst <= 1.0, "{}: {} of the tolerance", other.worst_at, other.worst);
        self.worst = self.worst.max(other.worst);
        self.positions += other.positions;
        self.compared += other.compared;
        self.other_choices += other.other_choices;
    }
}

/// Positions of a step.
fn golden_rows(steps: &[Seen]) -> usize {
    let chosen = steps.iter().find_map(|seen| if let Seen::Chosen(chosen) = seen { Some(chosen.len()) } else { None });
    chosen.expect("every fixture has experts")
}

/// Every golden model in every format: residual streams after each layer and logits are the reference's within what rounding
/// activations explains, up to the first position where something else is chosen. Of all pairs of a model and a format every `stride`th is taken.
///
/// A back end whose activations may be bfloat16 is compared with a reference that rounds them so as well, and with one of the two it
/// has to agree: some of these models make more of such a rounding than independent errors would (deepseek_v3 in FP8 1.65 times
/// the tolerance at position 16, in sums of f64), and which formats such a back end rounds for is its own affair.
pub(crate) fn assert_every_format(stride: usize, backend: &mut dyn Backend) {
    let precision = backend.caps().activations;
    for (first, format) in formats().into_iter().enumerate() {
        let mut comparison = Comparison::default();
        for name in fixtures().into_iter().skip(first % stride).step_by(stride) {
            let golden = Golden::open(&name);
            let found = prompt(&golden, format, backend);
            let mut references = vec![ReferenceBackend::new()];
            if precision == ActivationPrecision::Half {
                references.push(ReferenceBackend::with_bf16_activations());
            }
            let name = format!("{name} in {format:?}");
            let against = |mut reference: ReferenceBackend| {
                Comparison::of(&name, &found, &prompt(&golden, format, &mut reference), precision)
            };
            // The one that chooses alike for longer.
            let nearest = references
                .into_iter()
                .map(against)
                .max_by(|a, b| a.compared.cmp(&b.compared).then(b.worst.total_cmp(&a.worst)));
            comparison.add(nearest.expect("there is a reference"));
        }
        let Comparison { worst, positions, compared, other_choices, .. } = comparison;
        eprintln!(
            "{format:?}: {worst:.2} of the tolerance; {compared} of {positions} positions and layers compared, {other_choices} other choices"
        );
        assert!(2 * compared >= positions, "{format:?}: only {compared} of {positions} positions and layers are alike");
    }
}
