//! The written-out parts of attention: loops over columns, so that they stay in registers.

use std::fmt::Write as _;

/// Pairs of columns that each of 32 lanes has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Pairs {
    /// Of queries and keys.
    pub(crate) keys: usize,
    /// Of values.
    pub(crate) values: usize,
    /// Values are the first columns of keys.
    pub(crate) shared: bool,
    /// Rows of the cache are bfloat16, else f32.
    pub(crate) bf16: bool,
}

const fn pairs(keys: usize, values: usize, shared: bool, bf16: bool) -> Pairs {
    Pairs { keys, values, shared, bf16 }
}

/// What there are kernels for, the smallest first.
pub(crate) const PAIRS: [Pairs; 8] = [
    pairs(1, 1, false, false),
    pairs(1, 1, false, true),
    pairs(2, 2, false, false),
    pairs(2, 2, false, true),
    pairs(4, 4, false, false),
    pairs(4, 4, false, true),
    pairs(9, 8, true, false),
    pairs(9, 8, true, true),
];

/// The heads that a workgroup may have: several read keys once for all of them, one has more workgroups where there are few keys.
pub(crate) const PAIRS_HEADS: [usize; 2] = [1, 4];

pub(super) fn attend_pairs_holes(pairs: Pairs, heads: usize) -> Vec<(&'static str, String)> {
    // One head's scores are a number, those of four a vector.
    let lanes = if heads == 1 { &[""][..] } else { &[".x", ".y", ".z", ".w"] };
    let (mut queries, mut keys, mut scores) = (String::new(), String::new(), String::new());
    for head in 0..heads {
        for i in 0..pairs.keys {
            let place = format!("token, first_head + min({head}u, last), 2u * lane + {}u", 64 * i);
            let _ = writeln!(queries, "  let q{head}_{i} = query({place});");
        }
    }
    // Two keys at a time: `k`, `v`, then `k1`, `v1`.
    for (key, slot) in ["", "1"].into_iter().zip(["slot", "slot1"]) {
        for i in 0..pairs.keys {
            let _ = writeln!(keys, "    let k{key}_{i} = pair({slot}, key_first + min(2u * lane + {}u, end));", 64 * i);
            for (head, lane) in lanes.iter().enumerate() {
                let score = format!("score{key}{lane}");
                for part in ["x", "y"] {
                    let _ = writeln!(scores, "    {score} = fma(q{head}_{i}.{part}, k{key}_{i}.{part}, {score});");
                }
            }
        }
        for i in (0..pairs.values).filter(|_| !pairs.shared) {
            let column = format!("min(2u * lane + {}u, args.value_dim - 2u)", 64 * i);
            let _ = writeln!(keys, "    let v{key}_{i} = pair({slot}, value_first + {column});");
        }
    }
    let (mut values, mut values1, mut join) = (String::new(), String::new(), String::new());
    for i in 0..pairs.values {
        let name = if pairs.shared { "k" } else { "v" };
        for (head, lane) in lanes.iter().enumerate() {
            let _ = writeln!(queries, "  var a{head}_{i} = vec2<f32>();");
            for (key, lines) in [("", &mut values), ("1", &mut values1)] {
                let kept = format!("a{head}_{i} * kept{lane}");
                let _ = writeln!(lines, "      a{head}_{i} = fma(vec2<f32>(share{lane}), {name}{key}_{i}, {kept});");
            }
        }
    }
    for head in 0..heads {
        for i in 0..pairs.values {
            let at = format!("sums[subgroup * COLUMNS + 2u * lane + {}u", 64 * i);
            let _ = writeln!(join, "  {at}] = a{head}_{i}.x;\n  {at} + 1u] = a{head}_{i}.y;");
        }
        let _ = writeln!(join, "  join({head}u, token, group.x, first_head, local);");
    }
    let pair = match pairs.bf16 {
        true => {
            "  let word = cache[slot * args.row_words + (column >> 1u)];\n  \
             return vec2<f32>(bitcast<f32>(word << 16u), bitcast<f32>(word & 0xffff0000u));"
        }
        false => {
            "  let at = slot * args.row_words + column;\n  \
             return vec2<f32>(bitcast<f32>(cache[at]), bitcast<f32>(cache[at + 1u]));"
        }
    };
    vec![
        ("PAIR", pair.to_owned()),
        ("COLUMNS", (64 * pairs.values).to_string()),
        ("SUMS", (8 * 64 * pairs.values).to_string()),
        ("QUERIES", queries),
        ("KEYS", keys),
        ("SCORES", scores),
        ("VALUES", values),
        ("VALUES1", values1),
        ("JOIN", join),
        ("HEADS", heads.to_string()),
        ("SCORE", if heads == 1 { "f32" } else { "vec4<f32>" }.to_owned()),
        ("STATE", if heads == 1 { "largest, sum" } else { "largest[lane], sum[lane]" }.to_owned()),
    ]
}

pub(super) fn attend_holes(columns: usize) -> Vec<(&'static str, String)> {
    let (mut values, mut stores) = (String::new(), String::new());
    for i in 0..columns {
        let guard = format!("if (lane + {}u < args.value_dim)", 32 * i);
        let _ = writeln!(
            values,
            "    {guard} {{ values[{i}] = fma(share, cached(slot, column + {}u), values[{i}]); }}",
            32 * i
        );
        let _ = writeln!(stores, "  {guard} {{ parts[at + 2u + lane + {}u] = values[{i}]; }}", 32 * i);
    }
    vec![("COLUMNS", columns.to_string()), ("VALUES", values), ("STORES", stores)]
}
