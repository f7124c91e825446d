//! [`moellon_ops::KvStore`].
//!
//! `unsafe`: threads write different cache rows.
#![allow(unsafe_code)]

use crate::backend::CpuBackend;
use moellon_ops::{CacheDtype, Error, KvStore, Result};

pub(crate) fn run(backend: &mut CpuBackend, op: &KvStore<'_>) -> Result<()> {
    let slots = backend.memory.integers(op.slots);
    // SAFETY: nobody writes the slots.
    let slots = unsafe { slots.row(0) };
    if let Some(slot) = slots.iter().find(|slot| **slot as usize >= op.cache.num_slots) {
        return Err(Error::Contract {
            op: "kv_store",
            what: "slot".to_owned(),
            found: slot.to_string(),
            expected: format!("below {}", op.cache.num_slots),
        });
    }
    let cache = backend.memory.cache(&op.cache);
    let memory = &backend.memory;
    backend.run_rows(slots.len(), op.cache.width, |rows| {
        for t in rows {
            let mut to = cache.pointer(slots[t] as usize);
            for part in op.parts {
                // SAFETY: nobody writes the parts, and slots are all different; the parts are as wide as the cache row.
                unsafe {
                    let part = memory.floats(*part);
                    let values = part.row(t);
                    match op.cache.dtype {
                        CacheDtype::F32 => std::ptr::copy_nonoverlapping(values.as_ptr().cast(), to, values.len() * 4),
                        CacheDtype::Bf16 => {
                            for (i, value) in values.iter().enumerate() {
                                to.cast::<u16>().add(i).write_unaligned(bf16_bits(*value));
                            }
                        }
                    }
                    to = to.add(values.len() * op.cache.dtype.size_bytes());
                }
            }
        }
    });
    Ok(())
}

/// Round to nearest even, NaN kept.
fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    // A NaN whose upper half is all it has stays one.
    (if x.is_nan() { bits >> 16 | 0x40 } else { rounded }) as u16
}
