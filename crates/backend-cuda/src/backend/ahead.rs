//! Weights that are asked for ahead of time: kernels that wait for other things than memory bandwidth have the second-level cache filled with what
//! the next products read.

use super::CudaBackend;
use crate::args::Ahead;
use crate::program::Op;
use moellon_ops::Weight;

/// Most bytes asked for at a time: what stays in the cache until it is read (60 MB, of which each half serves one half of the device).
const MOST_BYTES: u64 = 20 << 20;

impl CudaBackend {
    /// The weights that `ops` read first, in their order, up to where it depends on a choice of experts; for the next kernel that reads ahead.
    pub(super) fn read_ahead_of(&mut self, ops: &[Op]) {
        let mut left = MOST_BYTES;
        let mut found = Vec::new();
        let mut add = |weight: &Weight| {
            let device = &self.weights[weight.id as usize];
            let bytes = device.packed_bytes(weight.count).min(left) / 16 * 16;
            if bytes > 0 {
                found.push(Ahead { p: device.packed.codes, bytes });
                left -= bytes;
            }
        };
        for op in ops {
            match op {
                Op::Linear { parts, .. } => parts.iter().for_each(|(weight, _)| add(weight)),
                Op::LinearHeads(op) => add(&op.weight),
                Op::GateUp(op) => [op.gate, op.up].iter().for_each(&mut add),
                Op::MoeGateUp(_) | Op::MoeDown(_) => break,
                _ => {}
            }
        }
        found.truncate(self.ahead.len());
        self.ahead = Default::default();
        self.ahead[..found.len()].copy_from_slice(&found);
    }
}
