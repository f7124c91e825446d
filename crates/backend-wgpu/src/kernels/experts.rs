//! The written-out parts of kernels that multiply with the matrices that rows chose (`kernels/chosen.wgsl`, `kernels/experts_down.wgsl`).
//! Where codes are integers, `chosen.wgsl` asks for the words of the next round of chunks before it multiplies those at hand.

use super::product::{Shape, Weights, second_side, weight_bindings, word_type};

/// Most lanes of a team for the shared expert's second product that have invocations of their own beside those of the chosen experts.
pub(crate) const SHARED_LANES: usize = 64;

/// Most experts whose results `experts_down.wgsl` keeps.
pub(crate) const MOST_RESULTS: usize = 64;

/// Invocations of a workgroup of `chosen.wgsl`. Pairs need many registers, and a workgroup needs whole chunks of their output: small ones
/// with much to do are all on the adapter at once, where 256 invocations leave a third, nearly empty round.
fn workers(integers: bool, weights: Weights) -> usize {
    if integers && weights == Weights::Pair { 64 } else { 256 }
}

/// How often a workgroup of `chosen.wgsl` takes new rows of a weight, and how many rows it has then.
pub(crate) fn chosen_passes(
    integers: bool,
    weights: Weights,
    team_rows: usize,
    lanes: usize,
    rows: usize,
) -> (usize, usize) {
    let at_once = workers(integers, weights) / lanes * team_rows;
    let passes = match (integers, weights) {
        (false, _) => 1,
        // Whole chunks.
        (true, Weights::Pair) => 32usize.div_ceil(at_once),
        (true, Weights::One) => (rows / at_once / 48).clamp(1, 4),
    };
    (passes, passes * at_once)
}

impl Shape {
    /// `with_shared`: the shared expert's weights too.
    pub(super) fn chosen_holes(&self, with_shared: bool) -> Vec<(&'static str, String)> {
        let is_pair = self.weights == Weights::Pair;
        let word = word_type(self.code);
        let ends = match (is_pair, with_shared) {
            (false, false) => &[""][..],
            (false, true) => &["", "_b"],
            (true, false) => &["", "2"],
            (true, true) => &["", "2", "_b", "2_b"],
        };
        let either = |text: &str| if with_shared { either(text) } else { text.to_owned() };
        let (mut partial, finish) = self.finish();
        let (store, end) = match self.weights {
            Weights::One => (include_str!("../../kernels/chosen_one.wgsl"), ""),
            Weights::Pair => {
                partial.push_str(&format!("var<workgroup> finals: array<f32, {}>;\n", 256 * self.tokens));
                (include_str!("../../kernels/chosen_pair.wgsl"), include_str!("../../kernels/chosen_pair_end.wgsl"))
            }
        };
        let keep = self.keep(store);
        let x_rows: String = (0..self.tokens).map(|token| format!("  let x_row{token} = x_rows[{token}];\n")).collect();
        let (mut rounds, start, body);
        if self.integers() {
            let [places, place] = self.places("args.scale_words");
            let [words, ask, take] = self.ahead();
            rounds = include_str!("../../kernels/rounds_ahead.wgsl").replace("{{DECLARE}}", &(places + &words));
            rounds = rounds.replace("{{PLACE}}", &place).replace("{{ASK}}", &either(&ask)).replace("{{TAKE}}", &take);
            (start, body) = (self.zeros(), self.multiply_integers());
        } else {
            rounds = include_str!("../../kernels/rounds_plain.wgsl").to_owned();
            (start, body) = (self.start(), either(&self.chunk()));
        }
        for (hole, filling) in [("START", &start), ("BODY", &body), ("FINISH", &finish), ("KEEP", &keep)] {
            rounds = rounds.replace(&format!("{{{{{hole}}}}}"), filling);
        }
        let mut holes = vec![
            ("WITH_SHARED", with_shared.to_string()),
            ("WORKERS", workers(self.integers(), self.weights).to_string()),
            ("WEIGHTS", weight_bindings(4, ends, &word)),
            ("PARTIAL", partial),
            ("X_ROWS", x_rows),
            ("ROUNDS", rounds),
            ("END", end.to_owned()),
            ("FINISHED", finished(with_shared, "")),
            ("FINISHED_SECOND", if is_pair { second_finished(with_shared) } else { String::new() }),
        ];
        holes.extend(shard_holes(self.weights, with_shared).map(|(hole, text)| (hole, text.to_owned())));
        holes.extend(self.holes());
        holes
    }

    /// `with_shared`: the product that makes `plus` is part of the kernel, by invocations of its own.
    pub(super) fn experts_down_holes(&self, with_shared: bool) -> Vec<(&'static str, String)> {
        let (mut second, finish) = self.finish();
        let (mut before, mut shared, mut workers) = ("{", "  }\n".to_owned(), 256);
        if with_shared {
            second.push_str(&weight_bindings(8, &["_b"], &word_type(self.code)));
            (before, workers) = ("if (local < 256u) {", 256 + SHARED_LANES);
            include_str!("../../kernels/experts_down_beside.wgsl").clone_into(&mut shared);
            let of_shared = |text: &str| second_side(text, &["codes[", "scales[", "args.scale_words"]);
            for (hole, filling) in [("START", self.start()), ("BODY", self.chunk()), ("SUMS", self.lane_sums((0, 0)))] {
                shared = shared.replace(&format!("{{{{{hole}}}}}"), &of_shared(&filling));
            }
        }
        let mut holes = self.holes();
        holes.extend([
            ("WORKERS", workers.to_string()),
            ("MOST", MOST_RESULTS.to_string()),
            ("SECOND", second),
            ("BEFORE", before.to_owned()),
            ("SHARED", shared),
            ("START", self.start()),
            ("FINISH", finish),
        ]);
        holes
    }
}

/// Lines that read weights, of the shared expert or of a chosen one.
fn either(text: &str) -> String {
    let names = ["codes[", "scales[", "codes2[", "scales2["];
    let of_shared = second_side(text, &names);
    format!("      if (is_shared) {{\n{of_shared}      }} else {{\n{text}      }}\n")
}

/// Lines that set `global` and `bias` of a row where its weight has them; `second`: of a pair, and how its names end.
fn finished(with_shared: bool, second: &str) -> String {
    let of = |end: &str, matrix: &str, row: &str| {
        let (bias, global) = if second.is_empty() { (1, 2) } else { (4, 8) };
        format!(
            "    if ((args.has{end} & {global}u) != 0u) {{ global = extra{second}{end}[{matrix}]; }}\n    \
             if ((args.has{end} & {bias}u) != 0u) {{ bias = extra{second}{end}[args.bias_offset{second}{end} + {row}]; }}\n"
        )
    };
    let chosen = of("", "matrix", "matrix * {{MATRIX_ROWS}} + {{SHARD_ROW}}row");
    match with_shared {
        true => format!("  if (is_shared) {{\n{}  }} else {{\n{chosen}  }}\n", of("_b", "0u", "row")),
        false => chosen,
    }
}

/// `finished` of a pair's second weight.
fn second_finished(with_shared: bool) -> String {
    let lines = finished(with_shared, "2");
    format!(
        "fn finished_second(sum: f32, row: u32, matrix: u32, is_shared: bool) -> f32 {{\n  var global = 1.0;\n  \
         var bias = 0.0;\n{lines}  return fma(sum, global, bias);\n}}\n"
    )
}

/// What differs between weights in shards, which are too many arguments beside a shared expert, and those in one piece.
fn shard_holes(weights: Weights, with_shared: bool) -> [(&'static str, &'static str); 7] {
    let shared_args = match weights {
        Weights::One => "  first_shared: u32, bias_offset_b: u32, lanes_b: u32, has_b: u32,",
        Weights::Pair => "  first_shared: u32, bias_offset_b: u32, bias_offset2_b: u32, has_b: u32,",
    };
    match with_shared {
        true => [
            ("MORE_ARGS", shared_args),
            ("IS_SHARED", "group.y >= args.first_shared"),
            ("FIRST_SHARED_ROW", "(group.y - min(group.y, args.first_shared)) * TOKENS"),
            ("SHARD", "  let local_matrix = matrix;"),
            ("SHARD_ROW", ""),
            ("MATRIX_ROWS", "args.rows"),
            (
                "LANES_HERE",
                if weights == Weights::One { "select(args.lanes, args.lanes_b, is_shared)" } else { "args.lanes" },
            ),
        ],
        false => [
            ("MORE_ARGS", "  first_row: u32, first_matrix: u32, num_matrices: u32, matrix_rows: u32,"),
            ("IS_SHARED", "false"),
            ("FIRST_SHARED_ROW", "0u"),
            (
                "SHARD",
                "  if (matrix < args.first_matrix || matrix >= args.first_matrix + args.num_matrices) { return; }\n  \
                 let local_matrix = matrix - args.first_matrix;",
            ),
            ("SHARD_ROW", "args.first_row + "),
            ("MATRIX_ROWS", "args.matrix_rows"),
            ("LANES_HERE", "args.lanes"),
        ],
    }
}
