//! Greedy choice on the device.

use crate::Result;
use crate::buffer::Tensor;
use crate::conformance::{Case, Tolerance, ids, normal_rows, upload, zero_ids};
use crate::reference::Memory;

/// The column of the largest value of each row; the lowest such column where several are equal. A row with a NaN gives the
/// column of its first NaN, so that whoever looks at the chosen value sees that the row went wrong.
#[derive(Debug, Clone, Copy)]
pub struct Argmax {
    /// `[num_rows, vocab_size]`.
    pub logits: Tensor,
    /// `[num_rows, 1]` u32.
    pub out: Tensor,
}

impl Argmax {
    /// Checks the contract.
    ///
    /// # Errors
    /// [`crate::Error::Contract`], naming the argument.
    pub fn validate(&self) -> Result<()> {
        self.logits.check_f32("argmax", "logits", [self.logits.rows, self.logits.cols])?;
        self.out.check_u32("argmax", "out", [self.logits.rows, 1])
    }

    /// Bytes that must be moved.
    pub fn bytes(&self) -> u64 {
        (self.logits.rows * self.logits.cols * 4) as u64
    }

    pub(crate) fn reference(&self, memory: &mut Memory) {
        let pick = |row: Vec<f32>| {
            if let Some(column) = row.iter().position(|x| x.is_nan()) {
                return vec![column as u32];
            }
            let best = row.iter().enumerate().fold(0, |best, (i, x)| if *x > row[best] { i } else { best });
            vec![best as u32]
        };
        let chosen: Vec<Vec<u32>> = memory.rows(self.logits).into_iter().map(pick).collect();
        memory.set_ids(self.out, &chosen);
    }
}

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &'static str, logits: Vec<Vec<f32>>| {
        Case::new("argmax", name, logits.len(), Tolerance::exact(1), move |backend, picked| {
            let logits = upload(backend, &logits, picked)?;
            let out = zero_ids(backend, picked.len(), 1)?;
            backend.argmax(&Argmax { logits, out })?;
            Ok(vec![ids(backend, "out", out)?])
        })
    };
    let mut tie = vec![-1.0; 70];
    tie[69] = 2.0;
    tie[33] = 2.0;
    let with_nan = |columns: &[usize]| {
        let mut row = normal_rows(5, 1, 70).remove(0);
        columns.iter().for_each(|column| row[*column] = f32::NAN);
        row
    };
    vec![
        case("random", normal_rows(3, 4, 1000)),
        case("one column", normal_rows(4, 2, 1)),
        // Devices share out a row's columns.
        case("columns of a vocabulary", normal_rows(6, 3, 6001)),
        case(
            "a NaN is chosen, the first one",
            vec![with_nan(&[37]), with_nan(&[3, 69]), with_nan(&[69]), with_nan(&[])],
        ),
        case(
            "tie takes the lowest, all negative infinity but one",
            vec![tie, {
                let mut masked = vec![f32::NEG_INFINITY; 70];
                masked[64] = -3.0;
                masked
            }],
        ),
    ]
}
