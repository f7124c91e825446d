//! A recorded step reads what the host wrote before it, whichever way that goes, and the host reads what the step wrote. Without an adapter the
//! tests say that they did not run.
#![allow(clippy::print_stderr)] // A skipped test says so.

use moellon_backend_wgpu::{WgpuBackend, WgpuOptions};
use moellon_ops::{Add, Argmax, Backend, ElementType, GatherRows, Tensor};

const COLS: usize = 8;
const ROWS: usize = 4;

struct Step {
    /// `ROWS` rows that the host writes.
    x: Tensor,
    /// Of which the step takes these, written by the host too.
    rows: Tensor,
    /// Which of them is largest, written by the step.
    best: Tensor,
    out: Tensor,
    sums: Tensor,
}

impl Step {
    fn new(backend: &mut dyn Backend) -> Step {
        let mut alloc = |what: &str, element, rows: usize, cols: usize| {
            backend.alloc(what, element, rows * cols).expect("fits").tensor(rows, cols)
        };
        Step {
            x: alloc("x", ElementType::F32, ROWS, COLS),
            rows: alloc("rows", ElementType::U32, 1, 2),
            best: alloc("best", ElementType::U32, 2, 1),
            out: alloc("out", ElementType::F32, 2, COLS),
            sums: alloc("sums", ElementType::F32, 2, COLS),
        }
    }

    fn run(&self, backend: &mut dyn Backend) {
        backend.gather_rows(&GatherRows { x: self.x, rows: self.rows, out: self.out }).expect("runs");
        backend.add(&Add { x: self.sums, y: self.out }).expect("runs");
        backend.argmax(&Argmax { logits: self.out, out: self.best }).expect("runs");
    }

    fn replay(&self, key: u64, backend: &mut dyn Backend) {
        if backend.replay(key).expect("replays") {
            return;
        }
        backend.begin_recording(key).expect("records");
        self.run(backend);
        backend.end_recording(true).expect("runs");
    }
}

fn number(row: usize, col: usize, round: usize) -> f32 {
    (((row + 3 * round) * 7 + (col + round) * 5) % 23) as f32
}

fn read(tensor: Tensor, backend: &mut dyn Backend) -> Vec<f32> {
    let mut values = vec![0.0; tensor.rows * tensor.cols];
    backend.read_f32(tensor, &mut values).expect("comes back");
    values
}

fn assert_steps_read_what_was_written(options: &WgpuOptions) {
    let opened = WgpuBackend::new(options);
    let mut backend = match opened {
        Ok(backend) => backend,
        Err(error) => {
            eprintln!("SKIP replayed steps of the wgpu back end: {error}");
            return;
        }
    };
    let step = Step::new(&mut backend);
    let mut sums = vec![0.0; 2 * COLS];
    let mut rows = [0u32, 0];
    let mut x = vec![0.0; ROWS * COLS];
    let mut more = None;
    for round in 0..24 {
        // Some rounds write one of both, some neither.
        if round == 0 || round % 3 != 1 {
            rows = [(round % ROWS) as u32, ((round * 3 + 1) % ROWS) as u32];
            backend.write_u32(step.rows, &rows).expect("is written");
        }
        if round % 4 == 0 {
            x = (0..ROWS * COLS).map(|i| number(i / COLS, i % COLS, round)).collect();
            backend.write_f32(step.x, &x).expect("is written");
        }
        if round == 9 {
            // What a step writes is written by the host as well.
            backend.write_u32(step.best, &[77, 77]).expect("is written");
        }
        if round == 13 {
            // More numbers come and go.
            let buffer = backend.alloc("more", ElementType::U32, 5).expect("fits");
            backend.write_u32(buffer.tensor(1, 5), &[1, 2, 3, 4, 5]).expect("is written");
            more = Some(buffer);
        }
        if let Some(buffer) = more.take_if(|_| round == 17) {
            backend.free(buffer);
        }
        if round % 8 == 6 {
            sums.fill(0.0);
            backend.write_f32(step.sums, &sums).expect("is written");
        }
        step.replay(round as u64 / 6 % 2, &mut backend);
        let expected: Vec<f32> = rows.iter().flat_map(|row| &x[*row as usize * COLS..][..COLS]).copied().collect();
        sums.iter_mut().zip(&expected).for_each(|(sum, x)| *sum += x);
        // In changing orders, at times nothing.
        if round % 5 != 2 {
            assert_eq!(read(step.out, &mut backend), expected, "round {round}");
        }
        if round % 5 == 3 {
            let again = backend.alloc("again", ElementType::F32, COLS).expect("fits").tensor(1, COLS);
            let row = Tensor { rows: 1, ..step.out };
            backend.write_f32(again, &[1.0; COLS]).expect("is written");
            backend.add(&Add { x: again, y: row }).expect("runs");
            let with_one: Vec<f32> = expected[..COLS].iter().map(|x| x + 1.0).collect();
            assert_eq!(read(again, &mut backend), with_one, "round {round}, behind the step");
        }
        if round % 5 != 4 {
            let mut best = [0u32; 2];
            backend.read_u32(step.best, &mut best).expect("comes back");
            for (row, best) in expected.chunks(COLS).zip(best) {
                assert!(row.iter().all(|x| *x <= row[best as usize]), "round {round}: {best} of {row:?}");
            }
            assert_eq!(read(step.sums, &mut backend), sums, "round {round}");
        }
    }
}

/// A step that is timed reads what was written before it too; adapters without a clock time nothing.
fn assert_timed_steps_run(options: &WgpuOptions) {
    let Ok(mut backend) = WgpuBackend::new(options) else { return };
    let step = Step::new(&mut backend);
    let x: Vec<f32> = (0..ROWS * COLS).map(|i| number(i / COLS, i % COLS, 1)).collect();
    backend.write_f32(step.x, &x).expect("is written");
    backend.write_u32(step.rows, &[0, 1]).expect("is written");
    step.replay(0, &mut backend);
    let expected = |rows: [usize; 2]| rows.map(|row| x[row * COLS..][..COLS].to_vec()).concat();
    assert_eq!(read(step.out, &mut backend), expected([0, 1]));
    backend.write_u32(step.rows, &[3, 2]).expect("is written");
    if backend.time_replay(0).expect("runs").is_none() {
        eprintln!("SKIP timed steps of the wgpu back end: no clock");
        return;
    }
    assert_eq!(read(step.out, &mut backend), expected([3, 2]));
    backend.write_u32(step.rows, &[2, 0]).expect("is written");
    let kernels = backend.time_kernels().expect("runs");
    let names: Vec<&str> = kernels.iter().map(|(name, ..)| &**name).collect();
    assert!(names.contains(&"gather_rows") && names.contains(&"add"), "{names:?}");
    assert_eq!(read(step.out, &mut backend), expected([2, 0]));
    assert!(!backend.replay(7).expect("runs"), "a step that was never recorded");
}

#[test]
fn timed_steps_run() {
    assert_timed_steps_run(&WgpuOptions::default());
    assert_timed_steps_run(&WgpuOptions { without_vulkan: true, ..WgpuOptions::default() });
}

#[test]
fn steps_read_what_the_host_wrote() {
    assert_steps_read_what_was_written(&WgpuOptions::default());
}

/// Metal and DX12 have wgpu's own commands.
#[test]
fn steps_read_what_the_host_wrote_by_wgpus_commands() {
    assert_steps_read_what_was_written(&WgpuOptions { without_vulkan: true, ..WgpuOptions::default() });
}
