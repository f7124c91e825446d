//! Packed codes: one little-endian bit stream per row. Element `i` of a `bits`-bit row is bits `[i*bits, (i+1)*bits)`
//! of the row's bytes, least significant first, for every width; 3-, 5- and 6-bit codes straddle bytes.
//! (MLX calls the same bytes `u32` words; compressed-tensors' `pack_to_int32` has this order as well.)

/// Codes that fill a whole number of bytes at every width: 8 codes of `bits` bits are `bits` bytes.
const CODES_PER_STEP: usize = 8;

/// Packs codes (each below `2^bits`) into a row of `ceil(codes.len() * bits / 8)` bytes; spare bits of the last byte
/// are zero.
///
/// # Panics
/// If `bits` is not in `1..=8` or `packed` has another length.
pub fn pack_row(codes: &[u8], bits: usize, packed: &mut [u8]) {
    assert!((1..=8).contains(&bits), "codes have 1 to 8 bits, not {bits}");
    assert_eq!(packed.len(), (codes.len() * bits).div_ceil(8), "bytes of {} codes of {bits} bits", codes.len());
    for (codes, bytes) in codes.chunks(CODES_PER_STEP).zip(packed.chunks_mut(bits)) {
        let mut stream = 0u64;
        for (i, &code) in codes.iter().enumerate() {
            debug_assert!(u32::from(code) >> bits == 0, "code {code} has more than {bits} bits");
            stream |= u64::from(code) << (i * bits);
        }
        bytes.copy_from_slice(&stream.to_le_bytes()[..bytes.len()]);
    }
}

/// Unpacks `codes.len()` codes of `bits` bits, starting with element `first` of the row.
///
/// # Panics
/// If `bits` is not in `1..=8` or the row is too short.
pub fn unpack_codes(packed: &[u8], bits: usize, first: usize, codes: &mut [u8]) {
    match bits {
        1 => unpack::<1>(packed, first, codes),
        2 => unpack::<2>(packed, first, codes),
        3 => unpack::<3>(packed, first, codes),
        4 => unpack::<4>(packed, first, codes),
        5 => unpack::<5>(packed, first, codes),
        6 => unpack::<6>(packed, first, codes),
        7 => unpack::<7>(packed, first, codes),
        8 => codes.copy_from_slice(&packed[first..][..codes.len()]),
        _ => panic!("codes have 1 to 8 bits, not {bits}"),
    }
}

/// One code, `bits` bits from element `at` of the row.
fn code_at(packed: &[u8], bits: usize, at: usize) -> u8 {
    let (byte, shift) = (at * bits / 8, at * bits % 8);
    let low = u16::from(packed[byte]);
    let high = if shift + bits > 8 { u16::from(packed[byte + 1]) } else { 0 };
    (((high << 8 | low) >> shift) & ((1 << bits) - 1)) as u8
}

/// Whole steps of eight codes with a constant width (so that shifts are constants), single codes at the edges.
fn unpack<const BITS: usize>(packed: &[u8], first: usize, codes: &mut [u8]) {
    let lead = (first.next_multiple_of(CODES_PER_STEP) - first).min(codes.len());
    let (head, rest) = codes.split_at_mut(lead);
    for (i, code) in head.iter_mut().enumerate() {
        *code = code_at(packed, BITS, first + i);
    }
    let mut at = first + lead;
    let mut steps = rest.chunks_exact_mut(CODES_PER_STEP);
    for step in &mut steps {
        let mut stream = [0; 8];
        stream[..BITS].copy_from_slice(&packed[at / CODES_PER_STEP * BITS..][..BITS]);
        let stream = u64::from_le_bytes(stream);
        for (i, code) in step.iter_mut().enumerate() {
            *code = (stream >> (i * BITS)) as u8 & ((1 << BITS) - 1);
        }
        at += CODES_PER_STEP;
    }
    for (i, code) in steps.into_remainder().iter_mut().enumerate() {
        *code = code_at(packed, BITS, at + i);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn three_bit_codes_straddle_bytes() {
        let mut packed = [0; 3];
        pack_row(&[1, 2, 3, 4, 5, 6, 7, 0], 3, &mut packed);
        // 000 111 110 101 100 011 010 001, most significant first.
        assert_eq!(packed, [0b1101_0001, 0b0101_1000, 0b0001_1111]);
    }

    proptest! {
        #[test]
        fn unpacking_inverts_packing(bits in 1usize..=8, values in prop::collection::vec(any::<u8>(), 0..200), first in 0usize..50) {
            let codes: Vec<u8> = values.iter().map(|v| (u16::from(*v) & ((1 << bits) - 1)) as u8).collect();
            let mut packed = vec![0xAA; (codes.len() * bits).div_ceil(8)];
            pack_row(&codes, bits, &mut packed);
            let first = first.min(codes.len());
            let mut back = vec![0; codes.len() - first];
            unpack_codes(&packed, bits, first, &mut back);
            prop_assert_eq!(&back, &codes[first..]);
        }
    }
}
