//! The written-out parts of products of many rows (`kernels/tiles.wgsl`).

use super::code::{Code, ScaleKind};
use super::product::{Weights, weight_bindings, word_type};
use std::fmt::Write as _;

/// Rows of x of a workgroup.
pub(crate) const TILE_TOKENS: usize = 32;
/// Chunks of weights that are unpacked at a time: what workgroup memory of 48 KiB has room for.
const STAGE: usize = 3;
/// Bytes of workgroup memory that the kernel has: weights, their scales and offsets, results.
pub(crate) const TILE_MEMORY: u64 = (STAGE * (64 * 80 + 2 * 64 * 8 + 8 * 1024)) as u64;

/// In how many digits x is multiplied.
pub(crate) const DIGITS: [usize; 2] = [2, 3];

/// Who multiplies tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Matrices {
    /// Subgroups, as cooperative matrices of f16 that are summed in f32.
    Cooperative,
    /// Invocations, a number at a time: to test the rest of the kernel where there are no such matrices.
    Plain,
}

/// How many f16 digits the integers of x have, so that f32 holds their sums with codes exactly; `None` where codes are no integers.
pub(crate) fn digits(code: Code) -> Option<usize> {
    code.per_byte().map(|per_byte| if per_byte == 1 { 3 } else { 2 })
}

/// Elements of 16 bytes of a block: 16 rows of x and a chunk.
pub(crate) fn block_quads(digits: usize) -> usize {
    64 * digits + 8
}

/// Codes in half a word: two columns that far apart are one word of f16 numbers.
pub(crate) fn half_word_codes(code: Code) -> usize {
    2 * code.per_byte().expect("codes are integers")
}

/// Lines that load the words of a chunk, its scale and offset, into variables that were declared before.
fn load(code: Code, weights: Weights) -> String {
    let Code::Affine { group, scale, .. } = code else { unreachable!("codes are integers") };
    let loads = code.chunk_words() / code.load_words();
    let mut lines = String::new();
    for i in 0..loads {
        let _ = writeln!(lines, "    p{i} = codes[(row0 * args.chunks + chunk) * {loads}u + {i}u];");
    }
    let words = if scale == ScaleKind::F32 { 2 } else { 1 };
    for i in 0..words {
        let at = format!("row0 * args.scale_words + {words}u * (chunk >> {}u) + {i}u", (group / 32).ilog2());
        let _ = writeln!(lines, "    q{i} = scales[{at}];");
    }
    match weights {
        Weights::One => lines,
        Weights::Pair => {
            let second = lines.replace("codes[", "codes2[").replace("scales[", "scales2[");
            format!("    if (is_second) {{\n{second}    }} else {{\n{lines}    }}\n")
        }
    }
}

/// Lines that write the words of a chunk as f16 numbers from element `at` of `a` on, and `row_scale` and `row_offset`.
fn unpack(code: Code) -> String {
    let Code::Affine { bits, scale, .. } = code else { unreachable!("codes are integers") };
    let load_words = code.load_words();
    let word = |i: usize| format!("p{}.{}", i / load_words, ["x", "y", "z", "w"][i % load_words]);
    // Words of two numbers that a word of codes has.
    let each = 16 / bits as usize;
    let mask = 0x0001_0001u32 * ((1 << bits) - 1);
    let mut lines = String::new();
    for quad in 0..8 {
        let part = |i: usize| {
            let (from, shift) = ((2 * quad + i) / each, (2 * quad + i) % each * bits as usize);
            format!("({} >> {shift}u) & {mask:#x}u", word(from))
        };
        let _ = writeln!(lines, "      a[at + {quad}u] = halves({}, {});", part(0), part(1));
    }
    lines.push_str(match scale {
        ScaleKind::Bf16 => {
            "      let row_scale = bitcast<f32>(q0 << 16u);\n      let o = bitcast<f32>(q0 & 0xffff0000u);\n"
        }
        ScaleKind::F16 => "      let row_scale = unpack2x16float(q0).x;\n      let o = unpack2x16float(q0).y;\n",
        ScaleKind::F32 => "      let row_scale = bitcast<f32>(q0);\n      let o = bitcast<f32>(q1);\n",
    });
    // Codes of eight bits are read 128 less than they are.
    lines.push_str(match bits {
        8 => "      let row_offset = fma(128.0, row_scale, o);\n",
        _ => "      let row_offset = o;\n",
    });
    lines
}

/// Lines that add a finished lane's sums to the neighbours that wait for it, as far as they are complete.
fn meet() -> String {
    let mut lines = String::new();
    for level in 0..5 {
        let _ = writeln!(lines, "if ((done & {}u) != 0u) {{ waiting{level} = sums; }} else {{", 1 << level);
        let _ = writeln!(lines, "sums[0] = waiting{level}[0] + sums[0];\nsums[1] = waiting{level}[1] + sums[1];");
    }
    lines + "}}}}}\n"
}

/// Sums of digits times what they stand for: products with powers of two are exact.
fn combined(digits: usize, name: impl Fn(usize) -> String) -> String {
    match digits {
        2 => format!("{} * 2048.0 + {}", name(0), name(1)),
        _ => format!("{} * 65536.0 + ({} * 256.0 + {})", name(0), name(1), name(2)),
    }
}

fn multiply(digits: usize, matrices: Matrices) -> String {
    match matrices {
        Matrices::Plain => include_str!("../../kernels/multiply_plain.wgsl")
            .replace("{{COMBINED_PLAIN}}", &combined(digits, |digit| format!("digit_sums[{digit}]"))),
        Matrices::Cooperative => {
            let mut sums = String::new();
            for digit in 0..digits {
                let b = |half: usize| {
                    format!("coopLoad<coop_mat16x16<f16, B>>(&x[of_x + {}u], 4u)", 128 * digit + 64 * half)
                };
                let _ = writeln!(sums, "  let first{digit} = coopMultiplyAdd(a0, {}, coop_mat16x16<f32, C>());", b(0));
                let _ = writeln!(sums, "  let sum{digit} = coopMultiplyAdd(a1, {}, first{digit});", b(1));
            }
            include_str!("../../kernels/multiply_cooperative.wgsl")
                .replace("{{DIGIT_SUMS}}\n", &sums)
                .replace("{{COMBINED}}", &combined(digits, |digit| format!("sum{digit}")))
        }
    }
}

/// Fillings of `tiles.wgsl`.
pub(super) fn tiles_holes(code: Code, weights: Weights, matrices: Matrices) -> Vec<(&'static str, String)> {
    let digits = digits(code).expect("codes are integers");
    let word = word_type(code);
    let pair = weights == Weights::Pair;
    let second = weight_bindings(7, &["2"], &word);
    let mut waiting = String::new();
    for level in 0..5 {
        let _ = writeln!(waiting, "  var waiting{level} = array<vec4<f32>, 2>();");
    }
    for i in 0..code.chunk_words() / code.load_words() {
        let _ = writeln!(waiting, "  var p{i} = {word}();");
    }
    waiting.push_str("  var q0 = 0u;\n  var q1 = 0u;\n");
    let store = match weights {
        Weights::One => include_str!("../../kernels/tiles_one.wgsl"),
        Weights::Pair => include_str!("../../kernels/tiles_pair.wgsl"),
    };
    vec![
        ("WORD", word),
        ("SECOND", if pair { second } else { String::new() }),
        ("PAIR", pair.to_string()),
        ("STAGE", STAGE.to_string()),
        ("DIGITS", digits.to_string()),
        // Codes of eight bits are read 128 less than they are.
        ("ZERO", if code.per_byte() == Some(1) { "1152.0" } else { "1024.0" }.to_owned()),
        ("WAITING", waiting),
        ("LOAD", load(code, weights)),
        ("UNPACK", unpack(code)),
        ("MEET", meet()),
        ("STORE", store.to_owned()),
        ("MULTIPLY", multiply(digits, matrices)),
    ]
}

/// Fillings of `matrix_test.wgsl`.
pub(super) fn matrix_test_holes(digits: usize, matrices: Matrices) -> Vec<(&'static str, String)> {
    vec![("DIGITS", digits.to_string()), ("MULTIPLY", multiply(digits, matrices))]
}
