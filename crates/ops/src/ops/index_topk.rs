//! The k best positions of each row.

use crate::Result;
use crate::buffer::Tensor;
use crate::conformance::{Case, Output, Tolerance, ids, normal_rows, upload, upload_ids, zero_ids};
use crate::error::expect;
use crate::reference::Memory;

/// `ids[t]` = the `min(k, p + 1)` positions in `0..=p` with the largest scores, ascending; `counts[t]` = how many.
/// Of equal scores the earlier position wins (ReLU makes exact zeros, so ties are real). Later entries of `ids` are undefined.
#[derive(Debug, Clone, Copy)]
pub struct IndexTopk {
    /// `[num_tokens, >= max(positions) + 1]`, no NaN in the first `p + 1` columns of a row.
    pub scores: Tensor,
    /// `[1, num_tokens]` u32.
    pub positions: Tensor,
    /// `[num_tokens, k]` u32.
    pub ids: Tensor,
    /// `[1, num_tokens]` u32.
    pub counts: Tensor,
}

impl IndexTopk {
    /// Checks the contract.
    ///
    /// # Errors
    /// [`crate::Error::Contract`], naming the argument.
    pub fn validate(&self) -> Result<()> {
        let op = "index_topk";
        let num_tokens = self.scores.rows;
        self.scores.check_f32(op, "scores", [num_tokens, self.scores.cols])?;
        self.positions.check_u32(op, "positions", [1, num_tokens])?;
        self.ids.check_u32(op, "ids", [num_tokens, self.ids.cols])?;
        expect(op, self.ids.cols > 0, "columns of ids", self.ids.cols, "at least 1")?;
        self.counts.check_u32(op, "counts", [1, num_tokens])
    }

    /// Bytes that must be moved.
    pub fn bytes(&self) -> u64 {
        (self.scores.rows * (self.scores.cols + self.ids.cols) * 4) as u64
    }

    pub(crate) fn reference(&self, memory: &mut Memory) {
        let (scores, positions) = (memory.rows(self.scores), memory.ids(self.positions).remove(0));
        let (mut ids, mut counts) = (memory.ids(self.ids), Vec::new());
        for (t, position) in positions.into_iter().enumerate() {
            let mut order: Vec<u32> = (0..=position).collect();
            order.sort_by(|a, b| scores[t][*b as usize].total_cmp(&scores[t][*a as usize]).then(a.cmp(b)));
            order.truncate(self.ids.cols);
            order.sort_unstable();
            counts.push(order.len() as u32);
            ids[t][..order.len()].copy_from_slice(&order);
        }
        memory.set_ids(self.ids, &ids);
        memory.set_ids(self.counts, &[counts]);
    }
}

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &'static str, positions: Vec<u32>, k: usize, scores: Vec<Vec<f32>>| {
        Case::new("index_topk", name, positions.len(), Tolerance::exact(1), move |backend, picked| {
            let scores = upload(backend, &scores, picked)?;
            let pos = upload_ids(backend, &[picked.iter().map(|r| positions[*r]).collect()])?;
            let (chosen, counts) = (zero_ids(backend, picked.len(), k)?, zero_ids(backend, 1, picked.len())?);
            backend.index_topk(&IndexTopk { scores, positions: pos, ids: chosen, counts })?;
            let Output::Ids { rows: counts, .. } = ids(backend, "counts", counts)? else {
                unreachable!("ids() makes ids")
            };
            let Output::Ids { name, rows: mut chosen } = ids(backend, "ids", chosen)? else {
                unreachable!("ids() makes ids")
            };
            for (row, count) in chosen.iter_mut().zip(&counts[0]) {
                row.truncate(*count as usize);
            }
            Ok(vec![
                Output::Ids { name, rows: chosen },
                Output::Ids { name: "counts", rows: counts[0].iter().map(|c| vec![*c]).collect() },
            ])
        })
    };
    let zeros_and_negatives = vec![
        (0..90).map(|j| if j % 7 == 3 { 1.0 + j as f32 } else { 0.0 }).collect(),
        (0..90).map(|j| if j % 3 == 0 { -0.0 } else { 0.0 }).collect(),
        (0..90).map(|j| -(j as f32)).collect(),
    ];
    // Negative zero equals zero in every comparison a kernel makes, but not in total order: normalise it in the case.
    let normalise =
        |rows: Vec<Vec<f32>>| rows.into_iter().map(|r: Vec<f32>| r.into_iter().map(|x| x + 0.0).collect()).collect();
    vec![
        case("shorter than k, equal to k, longer", vec![0, 14, 15, 16, 63], 16, normal_rows(27, 5, 64)),
        case("ties at the boundary, negatives", vec![89, 89, 89], 24, normalise(zeros_and_negatives)),
        case("long", vec![4999, 2500], 2048, normal_rows(28, 2, 5000)),
        // Back ends that keep a row's scores in registers read longer ones again.
        case("longest row in registers, longer", vec![16383, 16384, 20000], 2048, normal_rows(29, 3, 20001)),
    ]
}
