//! Hashes that say which model this is, whatever its shards are called and however it is split.

use crate::{Checkpoint, TensorView};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

/// Tensors that [`Checkpoint::identity`] samples, and the bytes it reads of each. A page each: opening stays quick on a
/// cold disk, and two fine-tunes of one model still differ.
const SAMPLED_TENSORS: usize = 64;
const SAMPLED_BYTES: usize = 4096;

impl Checkpoint {
    /// A quick hash: names, dtypes and shapes of all tensors, and the first 4 KiB of 64 of them. For cache keys.
    /// Lower-case hexadecimal SHA-256.
    pub fn identity(&self) -> String {
        let mut hash = Sha256::new();
        let tensors: Vec<TensorView<'_>> = self.tensors().collect();
        let step = tensors.len().div_ceil(SAMPLED_TENSORS).max(1);
        for (at, tensor) in tensors.iter().enumerate() {
            describe(&mut hash, tensor);
            if at % step == 0 {
                hash.update(&tensor.bytes[..tensor.bytes.len().min(SAMPLED_BYTES)]);
            }
        }
        hexadecimal(&hash.finalize())
    }

    /// The hash of everything: names, dtypes, shapes and the SHA-256 of the data of every tensor, in the order of
    /// names. Reads the whole checkpoint, in parallel over tensors, and releases its pages again. For receipts.
    pub fn content_hash(&self) -> String {
        let tensors: Vec<TensorView<'_>> = self.tensors().collect();
        let digests: Vec<_> = tensors
            .par_iter()
            .map(|tensor| {
                let digest = Sha256::digest(tensor.bytes);
                self.release(tensor.bytes);
                digest
            })
            .collect();
        let mut hash = Sha256::new();
        for (tensor, digest) in tensors.iter().zip(&digests) {
            describe(&mut hash, tensor);
            hash.update(digest);
        }
        hexadecimal(&hash.finalize())
    }
}

/// Name, dtype and shape, each with an end mark, so that no two lists of tensors give the same bytes.
fn describe(hash: &mut Sha256, tensor: &TensorView<'_>) {
    hash.update(format!("{}\n{} {:?}\n", tensor.name, tensor.dtype, tensor.shape));
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
