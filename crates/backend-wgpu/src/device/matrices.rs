//! The self-test of cooperative matrices: a tile of integers, multiplied by the adapter and by the host.

use super::Device;
use crate::kernels::{Code, DIGITS, Kernel, Matrices, ScaleKind, TILE_MEMORY, Weights, block_quads};
use moellon_ops::Result;

/// A number that looks random, the same one for the same seed.
fn noise(seed: i32) -> i32 {
    let mixed = (seed as u32 ^ 0x5bd1_e995).wrapping_mul(0x2c1b_3c6d);
    ((mixed ^ (mixed >> 12)).wrapping_mul(0x297a_2d39) >> 8) as i32
}

/// Of four bits where there are two digits, of eight with a sign where there are three. Every fourth row has the largest ones.
fn code(digits: usize, row: usize, column: usize) -> i32 {
    let random = noise((32 * row + column) as i32);
    match (digits, row % 4) {
        (2, 0) => 15,
        (2, _) => random % 16,
        (_, 0) => -128,
        _ => random % 256 - 128,
    }
}

fn digit(digits: usize, number: usize, token: usize, column: usize) -> i32 {
    let random = noise((1000 + 512 * number + 32 * token + column) as i32);
    match (digits, token % 4) {
        (2, 0) => 2048,
        (2, _) => random % 4096 - 2048,
        (_, 0) => -128,
        _ => random % 256 - 128,
    }
}

/// The bits of an integer of at most 2048 as f16.
fn f16_bits(integer: i32) -> u32 {
    let single = (integer as f32).to_bits();
    match integer {
        0 => 0,
        _ => (single >> 16 & 0x8000) | (((single >> 13) & 0x3_ffff).wrapping_sub(112 << 10) & 0x7fff),
    }
}

/// The words of a tile: room for results, codes, a block of x.
fn words(digits: usize) -> Vec<u32> {
    let mut words = vec![0u32; 4 * (128 + block_quads(digits))];
    for row in 0..16 {
        for pair in 0..16 {
            let bits = |column| f16_bits(code(digits, row, column));
            words[256 + 16 * row + pair] = bits(2 * pair) | bits(2 * pair + 1) << 16;
            for number in 0..digits {
                let bits = |column| f16_bits(digit(digits, number, row, column));
                let place = 512 + 256 * number + 128 * (pair / 8) + 8 * row + pair % 8;
                words[place] = bits(2 * pair) | bits(2 * pair + 1) << 16;
            }
        }
    }
    words
}

/// What the tile holds, exactly as products of few rows have it: rounded once, or with three digits twice.
fn expected(digits: usize, row: usize, token: usize) -> f32 {
    let sum = |number| (0..32).map(|c| code(digits, row, c) * digit(digits, number, token, c)).sum::<i32>();
    match digits {
        2 => (sum(0) as f32).mul_add(2048.0, sum(1) as f32),
        _ => (sum(0) as f32).mul_add(65536.0, ((sum(1) << 8) + sum(2)) as f32),
    }
}

/// Whether the adapter says that it has what kernels with cooperative matrices need.
pub(super) fn are_there(device: &Device, adapter: &wgpu::Adapter) -> bool {
    let needed = wgpu::Features::SHADER_F16 | wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX;
    let fits = |p: &wgpu::CooperativeMatrixProperties| {
        [p.m_size, p.n_size, p.k_size] == [16; 3]
            && p.ab_type == wgpu::CooperativeScalarType::F16
            && p.cr_type == wgpu::CooperativeScalarType::F32
    };
    device.device.features().contains(needed)
        && adapter.cooperative_matrix_properties().iter().any(fits)
        && device.self_test.subgroups
        && device.self_test.subgroup_sizes == [32; 2]
        && device.self_test.integer_products
        && u64::from(adapter.limits().max_compute_workgroup_storage_size) >= TILE_MEMORY
}

/// Whether sums of integers in cooperative matrices are exact, and the kernel that lives on that compiles.
///
/// # Errors
/// What the driver says. The device may be lost then.
pub(super) fn are_exact(device: &mut Device) -> Result<bool> {
    device.matrices = Some(Matrices::Cooperative);
    let mut exact = true;
    for digits in DIGITS {
        let input = words(digits);
        let memory = device.alloc("the self-test", 4 * input.len() as u64)?;
        device.write(&memory, 0, bytemuck::cast_slice(&input));
        let mut found = [0u32; 256];
        device.run_alone(Kernel::MatrixTest(digits), &memory, &mut found)?;
        let holds = |place: usize| found[place] == expected(digits, place % 16, place / 16).to_bits();
        exact &= (0..256).all(holds);
        device.forget(&memory);
    }
    let code = Code::Affine { bits: 4, group: 64, scale: ScaleKind::Bf16 };
    device.pipeline(Kernel::Tiles(code, Weights::Pair))?;
    Ok(exact)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_are_f16_numbers() {
        let known = [(0, 0), (1, 0x3c00), (-1, 0xbc00), (3, 0x4200), (2048, 0x6800), (-2048, 0xe800), (2047, 0x67ff)];
        for (integer, bits) in known {
            assert_eq!(f16_bits(integer), bits, "{integer}");
        }
    }
}
