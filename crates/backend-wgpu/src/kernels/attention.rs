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
}

/// What there are kernels for, the smallest first.
pub(crate) const PAIRS: [Pairs; 4] = [
    Pairs { keys: 1, values: 1, shared: false },
    Pairs { keys: 2, values: 2, shared: false },
    Pairs { keys: 4, values: 4, shared: false },
    Pairs { keys: 9, values: 8, shared: true },
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
    vec![
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
