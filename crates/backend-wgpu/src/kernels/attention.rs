//! The written-out parts of attention: loops over columns, so that they stay in registers.

use std::fmt::Write as _;

/// Heads of a workgroup (`attend_pairs.wgsl`).
const HEADS: usize = 4;

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

pub(super) fn attend_pairs_holes(pairs: Pairs) -> Vec<(&'static str, String)> {
    const LANES: [&str; HEADS] = ["x", "y", "z", "w"];
    let (mut queries, mut keys, mut scores) = (String::new(), String::new(), String::new());
    for head in 0..HEADS {
        for i in 0..pairs.keys {
            let place = format!("token, first_head + min({head}u, last), 2u * lane + {}u", 64 * i);
            let _ = writeln!(queries, "  let q{head}_{i} = query({place});");
        }
    }
    for i in 0..pairs.keys {
        let _ = writeln!(keys, "    let k{i} = pair(slot, key_first + min(2u * lane + {}u, end));", 64 * i);
        for (head, lane) in LANES.iter().enumerate() {
            for part in ["x", "y"] {
                let _ = writeln!(scores, "    score.{lane} = fma(q{head}_{i}.{part}, k{i}.{part}, score.{lane});");
            }
        }
    }
    let (mut values, mut join) = (String::new(), String::new());
    for i in 0..pairs.values {
        if !pairs.shared {
            let column = format!("min(2u * lane + {}u, args.value_dim - 2u)", 64 * i);
            let _ = writeln!(keys, "    let v{i} = pair(slot, value_first + {column});");
        }
        let value = if pairs.shared { format!("k{i}") } else { format!("v{i}") };
        for (head, lane) in LANES.iter().enumerate() {
            let _ = writeln!(queries, "  var a{head}_{i} = vec2<f32>();");
            let kept = format!("a{head}_{i} * kept.{lane}");
            let _ = writeln!(values, "    a{head}_{i} = fma(vec2<f32>(share.{lane}), {value}, {kept});");
        }
    }
    for head in 0..HEADS {
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
        ("JOIN", join),
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
