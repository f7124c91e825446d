//! Floats of 4 and 8 bits: decode tables and the encoders that quantizers need.
//!
//! Bit layouts: OCP 8-bit Floating Point Specification 1.0 (E4M3, E5M2), OCP Microscaling Formats 1.0 (E2M1, E8M0).
//! E4M3 has two tables because two meanings are in use: the specification reads `0x7F` and `0xFF` as NaN
//! ([`E4M3`], FP8 checkpoints), MLX has no special case and reads ±480 ([`E4M3_WITHOUT_NAN`]).

/// E4M3 codes as the OCP specification reads them: `0x7F` and `0xFF` are NaN, there are no infinities.
pub static E4M3: [f32; 256] = e4m3_table(true);

/// E4M3 codes as MLX reads them: `0x7F` is 480 and `0xFF` is -480; all other codes as in [`E4M3`].
pub static E4M3_WITHOUT_NAN: [f32; 256] = e4m3_table(false);

/// E5M2 codes: `0x7C` and `0xFC` are ±infinity, codes above these (sign aside) NaN.
pub static E5M2: [f32; 256] = e5m2_table();

/// E8M0 codes: `2^(code - 127)`, and NaN for 255.
pub static E8M0: [f32; 256] = e8m0_table();

/// E2M1 codes: bit 3 is the sign, code 8 is -0.
pub static E2M1: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// Largest magnitude of E4M3.
pub const E4M3_MAX: f32 = 448.0;

/// Largest magnitude of E2M1.
pub const E2M1_MAX: f32 = 6.0;

/// `2^exponent`, exact from the smallest subnormal (-149) to 127.
const fn power_of_two(exponent: i32) -> f32 {
    assert!(exponent >= -149 && exponent <= 127, "exponent is in the range of f32");
    if exponent >= -126 {
        f32::from_bits(((exponent + 127) as u32) << 23)
    } else {
        f32::from_bits(1 << (exponent + 149))
    }
}

const fn e4m3_table(with_nan: bool) -> [f32; 256] {
    let mut table = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        let (exponent, mantissa) = ((code >> 3) & 15, (code & 7) as f32);
        let magnitude = if with_nan && code & 0x7F == 0x7F {
            f32::NAN
        } else if exponent == 0 {
            mantissa * power_of_two(-9)
        } else {
            (8.0 + mantissa) * power_of_two(exponent as i32 - 10)
        };
        table[code] = if code & 0x80 == 0 { magnitude } else { -magnitude };
        code += 1;
    }
    table
}

const fn e5m2_table() -> [f32; 256] {
    let mut table = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        let (exponent, mantissa) = ((code >> 2) & 31, (code & 3) as f32);
        let magnitude = if exponent == 31 {
            if mantissa == 0.0 { f32::INFINITY } else { f32::NAN }
        } else if exponent == 0 {
            mantissa * power_of_two(-16)
        } else {
            (4.0 + mantissa) * power_of_two(exponent as i32 - 17)
        };
        table[code] = if code & 0x80 == 0 { magnitude } else { -magnitude };
        code += 1;
    }
    table
}

const fn e8m0_table() -> [f32; 256] {
    let mut table = [f32::NAN; 256];
    let mut code = 0;
    while code < 255 {
        table[code] = power_of_two(code as i32 - 127);
        code += 1;
    }
    table
}

/// The nearest E4M3 code, ties to the even mantissa. Magnitudes from 448 on, infinities and NaN saturate to `0x7E`
/// with their sign, as in MLX (`mlx/backend/cpu/fp8.h`): a quantizer must reject NaN before it calls this.
pub fn e4m3_from_f32(value: f32) -> u8 {
    let bits = value.to_bits();
    let sign = (bits >> 24) as u8 & 0x80;
    let magnitude = bits & 0x7FFF_FFFF;
    let code = if magnitude >= E4M3_MAX.to_bits() {
        0x7E
    } else if magnitude < power_of_two(-6).to_bits() {
        // Subnormal: adding 2^14 leaves multiples of 2^-9 in the mantissa, rounded to even by the addition itself.
        ((f32::from_bits(magnitude) + power_of_two(14)).to_bits() - power_of_two(14).to_bits()) as u8
    } else {
        // Normal: keep 3 mantissa bits (round half to even by the usual bias) and move the exponent bias 127 to 7.
        let rounded = magnitude + 0x7FFFF + ((magnitude >> 20) & 1);
        ((rounded >> 20) - (120 << 3)) as u8
    };
    code | sign
}

/// The nearest E2M1 code of a finite value; ties go to the smaller magnitude and zero is always code 0, as in the CPU
/// encoder of MLX (first minimum of `|value - table|`). Values beyond ±6 saturate.
pub fn e2m1_from_f32(value: f32) -> u8 {
    const MIDPOINTS: [f32; 7] = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0];
    let magnitude = value.abs();
    let code = MIDPOINTS.iter().map(|&midpoint| u8::from(magnitude > midpoint)).sum::<u8>();
    if code != 0 && value < 0.0 { code | 8 } else { code }
}

/// The E8M0 code of the smallest power of two that is at least `value` (finite, not negative); 0 gives code 127 (1.0).
/// Powers below 2^-127 are clamped there; the CPU encoder of MLX 0.32.4 wraps around instead.
pub fn e8m0_at_least(value: f32) -> u8 {
    if value == 0.0 {
        return 127;
    }
    // Zero-based search would be enough; the exponent bits give it directly.
    let bits = value.to_bits();
    let (exponent, mantissa) = (bits >> 23, bits & 0x7F_FFFF);
    match (exponent, mantissa) {
        // Subnormals: up to 2^-127 is code 0, above it 2^-126.
        (0, mantissa) => u8::from(mantissa > 1 << 22),
        (exponent, mantissa) => (exponent + u32::from(mantissa != 0)).min(254) as u8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Value of a minifloat straight from its definition, in f64.
    fn definition(code: u32, exponent_bits: u32, mantissa_bits: u32) -> f64 {
        let bias = (1i32 << (exponent_bits - 1)) - 1;
        let mantissa = f64::from(code & ((1 << mantissa_bits) - 1)) / f64::from(1 << mantissa_bits);
        let exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1);
        let sign = if code >> (exponent_bits + mantissa_bits) & 1 == 1 { -1.0 } else { 1.0 };
        match exponent {
            0 => sign * mantissa * f64::from(1 - bias).exp2(),
            e => sign * (1.0 + mantissa) * f64::from(e as i32 - bias).exp2(),
        }
    }

    #[test]
    fn tables_match_the_definition_for_every_code() {
        for code in 0..256u32 {
            let at = code as usize;
            let plain = definition(code, 4, 3);
            assert_eq!(f64::from(E4M3_WITHOUT_NAN[at]), plain, "e4m3 {code:#x}");
            if code & 0x7F == 0x7F {
                assert!(E4M3[at].is_nan());
                assert_eq!(plain.abs(), 480.0);
            } else {
                assert_eq!(f64::from(E4M3[at]), plain);
            }
            match code & 0x7F {
                0x7C => assert_eq!(E5M2[at].abs(), f32::INFINITY),
                c if c > 0x7C => assert!(E5M2[at].is_nan()),
                _ => assert_eq!(f64::from(E5M2[at]), definition(code, 5, 2), "e5m2 {code:#x}"),
            }
            match code {
                255 => assert!(E8M0[at].is_nan()),
                _ => assert_eq!(f64::from(E8M0[at]), f64::from(code as i32 - 127).exp2()),
            }
        }
        for code in 0..16u32 {
            assert_eq!(f64::from(E2M1[code as usize]), definition(code, 2, 1), "e2m1 {code:#x}");
        }
    }

    /// Nearest code by exhaustive search, ties to the even code.
    fn nearest_e4m3(value: f32) -> u8 {
        let magnitude = f64::from(value.abs());
        let best = (0..0x7Fu8)
            .min_by(|&a, &b| {
                let distance = |c: u8| (f64::from(E4M3[c as usize]) - magnitude).abs();
                distance(a).total_cmp(&distance(b)).then((a & 1).cmp(&(b & 1)))
            })
            .expect("the range is not empty");
        best | if value.is_sign_negative() { 0x80 } else { 0 }
    }

    #[test]
    fn e4m3_encoder_is_the_nearest_code() {
        for (code, &value) in E4M3.iter().enumerate().filter(|(_, value)| !value.is_nan()) {
            assert_eq!(e4m3_from_f32(value) as usize, code);
        }
        for code in 0..0x7E {
            let midpoint = (E4M3[code] + E4M3[code + 1]) / 2.0;
            for value in [midpoint, midpoint.next_down(), midpoint.next_up(), -midpoint] {
                assert_eq!(e4m3_from_f32(value), nearest_e4m3(value), "{value}");
            }
        }
        for value in [448.0, 448.1, 465.0, 1e9, f32::INFINITY] {
            assert_eq!(e4m3_from_f32(value), 0x7E);
            assert_eq!(e4m3_from_f32(-value), 0xFE);
        }
        assert_eq!(e4m3_from_f32(f32::from_bits(1)), 0);
    }

    #[test]
    fn e2m1_encoder_is_the_first_minimum() {
        let mut value = -13.0f32;
        while value <= 13.0 {
            let first_minimum = (0..16u8)
                .min_by(|&a, &b| {
                    let distance = |c: u8| (value - E2M1[c as usize]).abs();
                    distance(a).total_cmp(&distance(b))
                })
                .expect("the range is not empty");
            assert_eq!(e2m1_from_f32(value), first_minimum, "{value}");
            value += 1.0 / 64.0;
        }
    }

    #[test]
    fn e8m0_is_the_smallest_power_that_is_large_enough() {
        for code in 0..255u8 {
            let power = E8M0[code as usize];
            assert_eq!(e8m0_at_least(power), code);
            assert_eq!(e8m0_at_least(power.next_up()), (code + 1).min(254));
        }
        assert_eq!(e8m0_at_least(0.0), 127);
        assert_eq!(e8m0_at_least(1e-40), 0);
    }
}
