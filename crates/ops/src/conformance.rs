//! Every back end's whole operation test: the same cases against the reference, with tolerances derived from precision
//! and reduction length, and every row alone against the row in its batch, bit for bit.

use crate::backend::{ActivationPrecision, Backend};
use crate::buffer::{Cache, CacheDtype, ElementType, Paging, Tensor};
use crate::reference::ReferenceBackend;
use crate::{Experts, ExpertsSource, Result, Weight, WeightSource};
use moellon_tensor::encode::{EncodeOptions, GlobalScale, encode_matrix};
use moellon_tensor::rng::SplitMix64;
use moellon_tensor::{MatrixView, OwnedMatrix, ScaleDtype, WeightFormat};

/// How far a result may be from the reference.
#[derive(Debug, Clone, Copy)]
pub struct Tolerance {
    /// Terms of the longest sum.
    pub reduction: usize,
    /// Whether quantized weights are multiplied, so that a back end may round the activations first.
    pub quantized: bool,
    /// Products in a row whose errors add up (1 for a matrix product, 2 where an activation function follows).
    pub depth: usize,
}

impl Tolerance {
    /// For f32 arithmetic over `reduction` terms.
    pub const fn exact(reduction: usize) -> Self {
        Tolerance { reduction, quantized: false, depth: 1 }
    }

    /// For a product with a weight of `format`.
    pub const fn product(reduction: usize, format: WeightFormat, depth: usize) -> Self {
        Tolerance { reduction, quantized: format.is_quantized(), depth }
    }

    /// Largest difference allowed at an output of size `magnitude` (the larger of its row's root mean square and its own).
    ///
    /// f32: rounding errors of a sum grow with `sqrt(n)`; 32 times that covers any order of summation, FMA or not, and
    /// 24 eps the transcendental functions. Int8 activations: a group of 32 or 64 normals has its largest near 2.5 sigma, so
    /// the rounding step `amax / 127` has an error of 0.6 % of sigma; errors add as the terms do, so the output has the
    /// same relative error, and 8 sigma of it never happens by chance. Half: 2^-9 / sqrt(3) = 0.11 %, likewise.
    pub fn bound(&self, activations: ActivationPrecision, magnitude: f32) -> f32 {
        let rounding = f32::EPSILON * (24.0 + 32.0 * (self.reduction as f32).sqrt());
        let activation = match activations {
            _ if !self.quantized => 0.0,
            ActivationPrecision::Exact => 0.0,
            ActivationPrecision::Int8 => 8.0 * 0.006,
            ActivationPrecision::Half => 8.0 * 0.0011,
        };
        (rounding + activation) * self.depth as f32 * magnitude + f32::MIN_POSITIVE
    }

    /// The largest difference of rows of `cols` elements from what was expected, as a share of the bound there; infinite for NaN.
    pub fn share(&self, activations: ActivationPrecision, found: &[f32], expected: &[f32], cols: usize) -> f32 {
        let mut worst = 0.0f32;
        for (found, expected) in found.chunks(cols).zip(expected.chunks(cols)) {
            let rms = root_mean_square(expected);
            for (found, expected) in found.iter().zip(expected) {
                let share = (found - expected).abs() / self.bound(activations, rms.max(expected.abs()));
                worst = if share.is_nan() { f32::INFINITY } else { worst.max(share) };
            }
        }
        worst
    }
}

/// An output of a case: rows in the order asked for.
pub enum Output {
    /// Compared within the tolerance.
    Floats {
        /// What it is.
        name: &'static str,
        /// One vector a row.
        rows: Vec<Vec<f32>>,
    },
    /// Compared exactly.
    Ids {
        /// What it is.
        name: &'static str,
        /// One vector a row.
        rows: Vec<Vec<u32>>,
    },
}

type Run = Box<dyn Fn(&mut dyn Backend, &[usize]) -> Result<Vec<Output>>>;

/// One case of one operation.
pub struct Case {
    /// Name of the operation.
    pub op: &'static str,
    /// What is special about it.
    pub name: String,
    /// Rows of its batch.
    pub num_rows: usize,
    /// How far results may be from the reference.
    pub tolerance: Tolerance,
    run: Run,
}

impl Case {
    /// `run(backend, rows)` runs the operation on those rows of the case's batch and returns their outputs.
    pub fn new(
        op: &'static str,
        name: impl Into<String>,
        num_rows: usize,
        tolerance: Tolerance,
        run: impl Fn(&mut dyn Backend, &[usize]) -> Result<Vec<Output>> + 'static,
    ) -> Self {
        Case { op, name: name.into(), num_rows, tolerance, run: Box::new(run) }
    }
}

/// What [`run_all`] found.
#[derive(Debug, Default)]
pub struct Report {
    /// Cases that agreed.
    pub passed: usize,
    /// One line a case that did not.
    pub failures: Vec<String>,
}

impl Report {
    /// Panics with all failures, for tests.
    ///
    /// # Panics
    /// If a case failed or none ran.
    pub fn assert_passed(&self) {
        assert!(
            self.failures.is_empty(),
            "{} of {} cases failed:\n{}",
            self.failures.len(),
            self.passed + self.failures.len(),
            self.failures.join("\n")
        );
        assert!(self.passed > 0, "no case ran");
    }
}

/// Runs every case of every operation on `backend`, but draws of tokens where it makes none.
pub fn run_all(backend: &mut dyn Backend) -> Report {
    run_cases(backend, crate::ops::all_cases())
}

/// Runs `cases` on `backend`: against the reference, then rows alone and in other company, bit for bit.
pub fn run_cases(backend: &mut dyn Backend, cases: Vec<Case>) -> Report {
    let mut report = Report::default();
    let samples = backend.caps().samples;
    for case in cases.into_iter().filter(|case| samples || case.op != "sample") {
        match run_case(backend, &case) {
            Ok(()) => report.passed += 1,
            Err(message) => report.failures.push(format!("{} [{}]: {message}", case.op, case.name)),
        }
    }
    report
}

fn run_case(backend: &mut dyn Backend, case: &Case) -> std::result::Result<(), String> {
    let all: Vec<usize> = (0..case.num_rows).collect();
    let expected = (case.run)(&mut ReferenceBackend::new(), &all).map_err(|e| format!("reference: {e}"))?;
    let actual = (case.run)(backend, &all).map_err(|e| e.to_string())?;
    let precision = backend.caps().activations;
    for (actual, expected) in actual.iter().zip(&expected) {
        compare(actual, expected, |magnitude| case.tolerance.bound(precision, magnitude))?;
    }
    // Each row alone, and every second row: other batch sizes, other neighbours.
    let mut subsets: Vec<Vec<usize>> = all.iter().map(|row| vec![*row]).collect();
    subsets.push(all.iter().copied().step_by(2).collect());
    for subset in subsets {
        let alone = (case.run)(backend, &subset).map_err(|e| format!("rows {subset:?}: {e}"))?;
        for (alone, batch) in alone.iter().zip(&actual) {
            same_bits(alone, batch, &subset)?;
        }
    }
    Ok(())
}

fn compare(actual: &Output, expected: &Output, bound: impl Fn(f32) -> f32) -> std::result::Result<(), String> {
    match (actual, expected) {
        (Output::Ids { name, rows: actual }, Output::Ids { rows: expected, .. }) => {
            for (row, (actual, expected)) in actual.iter().zip(expected).enumerate() {
                if actual != expected {
                    return Err(format!("{name} of row {row} are {actual:?}, expected {expected:?}"));
                }
            }
            Ok(())
        }
        (Output::Floats { name, rows: actual }, Output::Floats { rows: expected, .. }) => {
            let mut worst: Option<(f32, String)> = None;
            for (row, (actual, expected)) in actual.iter().zip(expected).enumerate() {
                let rms = root_mean_square(expected);
                for (col, (a, e)) in actual.iter().zip(expected).enumerate() {
                    let allowed = bound(rms.max(e.abs()));
                    let excess = (a - e).abs() / allowed;
                    let too_far = excess.is_nan() || excess > 1.0;
                    if too_far && worst.as_ref().is_none_or(|(w, _)| excess.is_nan() || excess > *w) {
                        worst = Some((
                            excess,
                            format!(
                                "{name} [{row}, {col}] is {a}, expected {e} within {allowed:e} ({excess:.1} times that)"
                            ),
                        ));
                    }
                }
            }
            worst.map_or(Ok(()), |(_, message)| Err(message))
        }
        _ => Err("outputs of different kinds".to_owned()),
    }
}

fn root_mean_square(row: &[f32]) -> f32 {
    (row.iter().map(|x| x * x).sum::<f32>() / row.len().max(1) as f32).sqrt()
}

fn same_bits(alone: &Output, batch: &Output, subset: &[usize]) -> std::result::Result<(), String> {
    for (index, row) in subset.iter().enumerate() {
        let (name, difference) = match (alone, batch) {
            (Output::Ids { name, rows: a }, Output::Ids { rows: b, .. }) => {
                (name, (a[index] != b[*row]).then(String::new))
            }
            (Output::Floats { name, rows: a }, Output::Floats { rows: b, .. }) => {
                let differs = a[index].iter().zip(&b[*row]).position(|(a, b)| a.to_bits() != b.to_bits());
                (name, differs.map(|col| format!(" at column {col}: {} and {}", a[index][col], b[*row][col])))
            }
            _ => return Err("outputs of different kinds".to_owned()),
        };
        if let Some(difference) = difference {
            return Err(format!(
                "{name} of row {row} changes with its batch (rows {subset:?} against all){difference}"
            ));
        }
    }
    Ok(())
}

/// Every weight format with each of its variants that kernels treat differently.
pub fn all_formats() -> Vec<WeightFormat> {
    let affine = |bits, group, scale| WeightFormat::Affine { bits, group, scale };
    let mut formats = vec![
        WeightFormat::F32,
        WeightFormat::F16,
        WeightFormat::Bf16,
        WeightFormat::Fp8Block { block_rows: 128, block_cols: 128 },
        WeightFormat::Mxfp4,
        WeightFormat::Mxfp8,
        WeightFormat::Nvfp4,
    ];
    formats.extend([2, 3, 4, 5, 6, 8].map(|bits| affine(bits, 64, ScaleDtype::Bf16)));
    formats.extend([affine(4, 32, ScaleDtype::F16), affine(3, 128, ScaleDtype::F32), affine(8, 32, ScaleDtype::Bf16)]);
    formats
}

/// Random matrices `[count]` of `[rows, cols]`, encoded; normal with a standard deviation of `1 / sqrt(cols)` so that
/// outputs are near 1. NVFP4 gets a global scale.
pub fn random_matrices(seed: u64, format: WeightFormat, count: usize, rows: usize, cols: usize) -> Vec<OwnedMatrix> {
    let mut rng = SplitMix64::new(seed);
    let std = 1.0 / (cols as f32).sqrt();
    let options = EncodeOptions { arithmetic: ScaleDtype::F32, global_scale: GlobalScale::FromValues };
    (0..count)
        .map(|_| {
            encode_matrix(format, [rows, cols], &rng.normals(rows * cols, std), options)
                .expect("conformance shapes are legal in their formats")
        })
        .collect()
}

/// Views of [`random_matrices`].
pub fn views(matrices: &[OwnedMatrix]) -> Vec<MatrixView<'_>> {
    matrices.iter().map(OwnedMatrix::view).collect()
}

/// Uploads `rows` of a host matrix `[_][cols]`.
pub(crate) fn upload(backend: &mut dyn Backend, data: &[Vec<f32>], rows: &[usize]) -> Result<Tensor> {
    let cols = data[0].len();
    let tensor = backend.alloc("case input", ElementType::F32, rows.len() * cols)?.tensor(rows.len(), cols);
    let flat: Vec<f32> = rows.iter().flat_map(|r| data[*r].iter().copied()).collect();
    backend.write_f32(tensor, &flat)?;
    Ok(tensor)
}

/// Uploads one row of floats.
pub(crate) fn upload_row(backend: &mut dyn Backend, data: &[f32]) -> Result<Tensor> {
    upload(backend, &[data.to_vec()], &[0])
}

/// Uploads a matrix of integers.
pub(crate) fn upload_ids(backend: &mut dyn Backend, data: &[Vec<u32>]) -> Result<Tensor> {
    let cols = data[0].len();
    let tensor = backend.alloc("case input", ElementType::U32, data.len() * cols)?.tensor(data.len(), cols);
    backend.write_u32(tensor, &data.concat())?;
    Ok(tensor)
}

/// A zeroed f32 tensor.
pub(crate) fn zeros(backend: &mut dyn Backend, rows: usize, cols: usize) -> Result<Tensor> {
    Ok(backend.alloc("case output", ElementType::F32, rows * cols)?.tensor(rows, cols))
}

/// A zeroed u32 tensor.
pub(crate) fn zero_ids(backend: &mut dyn Backend, rows: usize, cols: usize) -> Result<Tensor> {
    Ok(backend.alloc("case output", ElementType::U32, rows * cols)?.tensor(rows, cols))
}

/// Downloads a tensor as an output.
pub(crate) fn floats(backend: &mut dyn Backend, name: &'static str, tensor: Tensor) -> Result<Output> {
    let mut flat = vec![0.0; tensor.rows * tensor.cols];
    backend.read_f32(tensor, &mut flat)?;
    Ok(Output::Floats { name, rows: flat.chunks(tensor.cols).map(<[f32]>::to_vec).collect() })
}

/// Downloads a tensor as an output of integers.
pub(crate) fn ids(backend: &mut dyn Backend, name: &'static str, tensor: Tensor) -> Result<Output> {
    let mut flat = vec![0; tensor.rows * tensor.cols];
    backend.read_u32(tensor, &mut flat)?;
    Ok(Output::Ids { name, rows: flat.chunks(tensor.cols).map(<[u32]>::to_vec).collect() })
}

/// Random rows `[rows][cols]` of standard normals.
pub(crate) fn normal_rows(seed: u64, rows: usize, cols: usize) -> Vec<Vec<f32>> {
    let mut rng = SplitMix64::new(seed);
    (0..rows).map(|_| rng.normals(cols, 1.0)).collect()
}

/// Loads random matrices as one weight.
pub(crate) fn load_random(
    backend: &mut dyn Backend,
    seed: u64,
    format: WeightFormat,
    shape: [usize; 3],
    bias: Option<&[f32]>,
) -> Result<Weight> {
    let matrices = random_matrices(seed, format, shape[0], shape[1], shape[2]);
    backend.load_weight(&WeightSource { name: "case weight", matrices: &views(&matrices), bias })
}

/// Loads random experts `[num_experts]` of `[intermediate, hidden]`.
pub(crate) fn load_random_experts(
    backend: &mut dyn Backend,
    seed: u64,
    format: WeightFormat,
    [num_experts, intermediate, hidden]: [usize; 3],
    biased: bool,
) -> Result<Experts> {
    let gate = random_matrices(seed, format, num_experts, intermediate, hidden);
    let up = random_matrices(seed + 1, format, num_experts, intermediate, hidden);
    let down = random_matrices(seed + 2, format, num_experts, hidden, intermediate);
    let mut rng = SplitMix64::new(seed + 3);
    let biases = [intermediate, intermediate, hidden].map(|n| rng.normals(num_experts * n, 0.5));
    backend.load_experts(&ExpertsSource {
        name: "case experts",
        gate: &views(&gate),
        up: &views(&up),
        down: &views(&down),
        biases: biased.then(|| [&biases[0][..], &biases[1][..], &biases[2][..]]),
    })
}

/// A batch over two sequences of a paged cache with scattered blocks: rows at `positions` of alternating sequences.
pub(crate) struct PagedCase {
    pub(crate) positions: Vec<u32>,
    pub(crate) sequences: Vec<u32>,
    pub(crate) block_table: Vec<Vec<u32>>,
    pub(crate) block_size: usize,
}

impl PagedCase {
    /// `num_rows` rows at growing positions up to `max_context`.
    pub(crate) fn new(num_rows: usize, max_context: usize, block_size: usize) -> Self {
        let blocks = max_context.div_ceil(block_size);
        let positions = (0..num_rows).map(|t| ((t + 1) * max_context / num_rows - 1) as u32).collect();
        let sequences = (0..num_rows).map(|t| (t % 2) as u32).collect();
        // Sequence 0 takes the odd blocks backwards, sequence 1 the even ones forwards.
        let block_table = vec![
            (0..blocks).map(|b| (2 * (blocks - 1 - b) + 1) as u32).collect(),
            (0..blocks).map(|b| (2 * b) as u32).collect(),
        ];
        PagedCase { positions, sequences, block_table, block_size }
    }

    pub(crate) fn max_context(&self) -> usize {
        self.positions.iter().max().map_or(0, |p| *p as usize + 1)
    }

    pub(crate) fn num_slots(&self) -> usize {
        self.block_table.concat().len() * self.block_size
    }

    /// The paging of the chosen rows.
    pub(crate) fn upload(&self, backend: &mut dyn Backend, rows: &[usize]) -> Result<Paging> {
        let pick = |all: &[u32]| vec![rows.iter().map(|r| all[*r]).collect::<Vec<u32>>()];
        Ok(Paging {
            positions: upload_ids(backend, &pick(&self.positions))?,
            sequences: upload_ids(backend, &pick(&self.sequences))?,
            block_table: upload_ids(backend, &self.block_table)?,
            block_size: self.block_size,
            max_context: self.max_context(),
        })
    }

    /// A cache with random rows in every slot.
    pub(crate) fn random_cache(
        &self,
        backend: &mut dyn Backend,
        seed: u64,
        dtype: CacheDtype,
        width: usize,
    ) -> Result<Cache> {
        let cache = backend.alloc_cache("case cache", dtype, self.num_slots(), width)?;
        let rows = normal_rows(seed, self.num_slots(), width);
        let all: Vec<usize> = (0..rows.len()).collect();
        let values = upload(backend, &rows, &all)?;
        let slots = upload_ids(backend, &[(0..rows.len() as u32).collect()])?;
        backend.kv_store(&crate::KvStore { parts: &[values], slots, cache })?;
        Ok(cache)
    }
}
