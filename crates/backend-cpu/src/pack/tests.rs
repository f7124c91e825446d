use super::*;
use moellon_ops::conformance::{all_formats, random_matrices, views};
use moellon_tensor::pool::PoolOptions;

pub(crate) fn test_pool(threads: usize) -> Pool {
    Pool::new(PoolOptions { threads: Some(threads), pin: false })
}

/// Shapes with partial tiles, partial records and padded columns, where the format allows them.
pub(crate) fn shapes(format: WeightFormat) -> Vec<[usize; 2]> {
    let unit = match format {
        WeightFormat::Fp8Block { .. } => 1,
        other => other.group().unwrap_or(1),
    };
    [[1, 1], [16, 64], [17, 96], [33, 160], [48, 384], [5, 1000]]
        .map(|[rows, cols]: [usize; 2]| [rows, cols.next_multiple_of(unit)])
        .to_vec()
}

#[test]
fn unpacked_rows_are_the_decoded_rows_bit_for_bit() {
    let pool = test_pool(2);
    for format in all_formats() {
        for [rows, cols] in shapes(format) {
            let matrices = random_matrices(7, format, 2, rows, cols);
            let packed = PackedMatrices::pack(&pool, &views(&matrices)).unwrap();
            for (index, matrix) in matrices.iter().enumerate() {
                let (mut actual, mut expected) = (vec![0.0; cols], vec![0.0; cols]);
                for row in 0..rows {
                    packed.unpack_columns(index, row, 0..cols, &mut actual);
                    matrix.view().decode_row(row, &mut expected);
                    assert_eq!(actual, expected, "{format} [{rows}, {cols}] row {row}");
                }
            }
        }
    }
}

#[test]
fn packed_weights_take_the_space_of_the_file() {
    let pool = test_pool(1);
    for format in all_formats() {
        let matrices = random_matrices(1, format, 1, 128, 2048);
        let packed = PackedMatrices::pack(&pool, &views(&matrices)).unwrap();
        let file = format.matrix_bytes(128, 2048);
        // FP8 has one scale a tile instead of one a block of 128 rows, in whole lines.
        let allowed = if matches!(format, WeightFormat::Fp8Block { .. }) { file + file / 200 } else { file };
        assert!(packed.bytes.len() as u64 <= allowed, "{format}: {} bytes, the file has {file}", packed.bytes.len());
    }
}

#[test]
fn pairs_alternate_and_hold_different_formats() {
    let pool = test_pool(3);
    let affine = WeightFormat::Affine { bits: 3, group: 64, scale: ScaleDtype::Bf16 };
    let (gate, up) = (random_matrices(1, affine, 3, 40, 128), random_matrices(2, WeightFormat::Nvfp4, 3, 40, 128));
    let packed = PackedPairs::pack(&pool, &views(&gate), &views(&up)).unwrap();
    assert_eq!(packed.up.tile_offset(0, 0), packed.gate.layout.tile_bytes);
    assert_eq!(packed.gate.tile_offset(0, 1), packed.gate.layout.tile_bytes + packed.up.layout.tile_bytes);
    for (list, map) in [(&gate, &packed.gate), (&up, &packed.up)] {
        for (index, matrix) in list.iter().enumerate() {
            let (mut actual, mut expected) = (vec![0.0; 128], vec![0.0; 128]);
            for row in 0..40 {
                unpack_columns(&packed.bytes, map, index, row, 0..128, &mut actual);
                matrix.view().decode_row(row, &mut expected);
                assert_eq!(actual, expected, "matrix {index} row {row}");
            }
        }
    }
}

#[test]
fn fp8_tiles_across_block_rows_keep_a_scale_a_row() {
    let pool = test_pool(1);
    for block_rows in [8, 24, 128] {
        let format = WeightFormat::Fp8Block { block_rows, block_cols: 64 };
        let matrices = random_matrices(5, format, 1, 50, 150);
        let packed = PackedMatrices::pack(&pool, &views(&matrices)).unwrap();
        assert_eq!(packed.map.layout.fp8_scale_lanes, if block_rows == 128 { 1 } else { 16 });
        let (mut actual, mut expected) = (vec![0.0; 150], vec![0.0; 150]);
        for row in 0..50 {
            packed.unpack_columns(0, row, 0..150, &mut actual);
            matrices[0].view().decode_row(row, &mut expected);
            assert_eq!(actual, expected, "block_rows {block_rows} row {row}");
        }
    }
}

#[test]
fn nvfp4_scales_may_be_negative_zero_and_subnormal() {
    // Every scale but the two NaN, sixteen codes each.
    let scales: Vec<u8> = (0..=255).filter(|code| code & 0x7f != 0x7f).chain([0, 0x80]).collect();
    let cols = scales.len() * 16;
    let codes: Vec<u8> = (0..cols / 2).map(|i| (i * 37 % 256) as u8).collect();
    let matrix = MatrixView::new("test", WeightFormat::Nvfp4, [1, cols], &codes, &scales, &[]).unwrap();
    let packed = PackedMatrices::pack(&test_pool(1), &[matrix]).unwrap();
    let (mut actual, mut expected) = (vec![0.0f32; cols], vec![0.0f32; cols]);
    packed.unpack_columns(0, 0, 0..cols, &mut actual);
    matrix.decode_row(0, &mut expected);
    // As bits: zeros have signs.
    let bits = |row: &[f32]| row.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&actual), bits(&expected));
}
