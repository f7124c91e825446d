//! The written-out parts of kernels that read weights: products and embeddings.

use super::ROWS;
use super::code::Code;
use std::fmt::Write as _;

pub(super) fn code_name(code: Code) -> String {
    match code {
        Code::Affine { bits, group, scale } => format!("affine{bits}_{group}_{scale:?}").to_lowercase(),
        other => format!("{other:?}").to_lowercase(),
    }
}

pub(super) fn word_type(code: Code) -> String {
    match code.load_words() {
        1 => "u32".to_owned(),
        n => format!("vec{n}<u32>"),
    }
}

/// One weight, or two of one shape whose products meet in an activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Weights {
    One,
    Pair,
}

impl Weights {
    fn count(self) -> usize {
        match self {
            Weights::One => 1,
            Weights::Pair => 2,
        }
    }
}

/// Rows of each weight that a team has, for so many rows of x: what fits into registers.
pub(crate) fn team_rows(weights: Weights, tokens: usize) -> usize {
    match (weights, tokens) {
        (_, 1) | (Weights::One, _) => ROWS,
        _ => ROWS / 2,
    }
}

/// Most columns of a head that `join_heads.wgsl` joins: their words as floats, of which integers need fewer.
pub(crate) const JOINED_COLUMNS: usize = 512;

/// What a product is made for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) code: Code,
    pub(super) weights: Weights,
    pub(super) tokens: usize,
    /// x comes as integers, if codes are such.
    pub(super) integers: bool,
    /// Teams add up by shuffles.
    pub(super) subgroups: bool,
}

impl Shape {
    pub(super) fn team_rows(&self) -> usize {
        team_rows(self.weights, self.tokens)
    }

    /// Rows of all weights.
    fn rows(&self) -> usize {
        self.weights.count() * self.team_rows()
    }

    pub(super) fn integers(&self) -> bool {
        self.integers && self.code.per_byte().is_some()
    }

    /// Lines about row `row` read the second weight of a pair from its first row on.
    fn of_weight(&self, row: usize, text: String) -> String {
        match row < self.team_rows() {
            true => text,
            false => text.replace("codes[", "codes2[").replace("scales[", "scales2["),
        }
    }

    /// Lines before the loop over chunks: where rows start, sums.
    pub(super) fn start(&self) -> String {
        let elements = self.code.chunk_words() / self.code.load_words();
        let mut start = String::new();
        for row in 0..self.rows() {
            // The last rows again where the matrix ends inside a team's rows.
            let place = format!("team * ROWS + {}u", row % self.team_rows());
            let _ = writeln!(start, "  let r{row} = local_matrix * args.rows + min({place}, args.rows - 1u);");
            let _ = writeln!(start, "  let row{row} = r{row} * chunks * {elements}u;");
            let _ = writeln!(start, "  let scale_row{row} = r{row} * args.scale_words;");
        }
        start + &self.zeros()
    }

    /// Lines that declare sums.
    pub(super) fn zeros(&self) -> String {
        let mut lines = String::new();
        for row in 0..self.rows() {
            (0..self.tokens).for_each(|token| {
                let _ = writeln!(lines, "  var a{row}_{token} = 0.0;");
            });
        }
        lines
    }

    /// Lines that declare where the rows of `team` and its sums start, and lines that set it; `scale_words`: of a row.
    pub(super) fn places(&self, scale_words: &str) -> [String; 2] {
        let elements = self.code.chunk_words() / self.code.load_words();
        let [mut declare, mut place] = [const { String::new() }; 2];
        for row in 0..self.team_rows() {
            let _ = writeln!(declare, "  var row{row} = 0u;\n  var scale_row{row} = 0u;");
            let at = format!("local_matrix * args.rows + min(team * ROWS + {row}u, args.rows - 1u)");
            let _ = writeln!(place, "    let r{row} = {at};");
            let _ = writeln!(place, "    row{row} = r{row} * chunks * {elements}u;");
            let _ = writeln!(place, "    scale_row{row} = r{row} * {scale_words};");
        }
        [declare, place]
    }

    /// Lines that declare a chunk's words of every row, ask for them, and take them.
    pub(super) fn ahead(&self) -> [String; 3] {
        let mut all = [const { String::new() }; 3];
        for row in 0..self.rows() {
            for (lines, more) in all.iter_mut().zip(self.code.ahead(row, row % self.team_rows())) {
                lines.push_str(&self.of_weight(row, more));
            }
        }
        all
    }

    /// Lines of one chunk of every row and token.
    pub(super) fn chunk(&self) -> String {
        if !self.integers() {
            return self.chunk_of_floats();
        }
        // Weights are on their way before anything waits for them.
        let loads = (0..self.rows()).map(|row| self.of_weight(row, self.code.bytes(row).0));
        loads.collect::<String>() + &self.multiply_integers()
    }

    /// Lines of one chunk whose words are there.
    pub(super) fn multiply_integers(&self) -> String {
        let mut body = String::new();
        let bytes: Vec<String> = (0..self.rows()).map(|row| self.code.bytes(row).1).collect();
        // Bytes of several rows of x are made once, of one row where they are multiplied: fewer wait in registers.
        if self.tokens > 1 {
            bytes.iter().for_each(|bytes| body.push_str(bytes));
        }
        for token in 0..self.tokens {
            // Items of a work list are often not full.
            let guard = if token == 0 { String::new() } else { format!("if (count > {token}u) ") };
            let _ = writeln!(body, "    {guard}{{\n    let at = x_row{token} + chunk;");
            for i in 0..7 {
                let _ = writeln!(body, "    let x{i} = x[at + {i}u * chunks];");
            }
            body.push_str("    let scale = bitcast<f32>(x6.x);\n    let sum = bitcast<f32>(x6.y);\n");
            for (row, bytes) in bytes.iter().enumerate() {
                if self.tokens == 1 {
                    body.push_str(bytes);
                }
                let digit = |d: usize| {
                    let dot = |m: usize| {
                        let word = format!("x{}.{}", 2 * d + m / 4, ["x", "y", "z", "w"][m % 4]);
                        format!("dot4I8Packed(c{row}_{m}, {word})")
                    };
                    (0..8).map(dot).collect::<Vec<_>>().join(" + ")
                };
                let (high, low) = (digit(0), format!("(({}) << 8u) + {}", digit(1), digit(2)));
                let _ = writeln!(body, "    let d{row} = fma(f32({high}), 65536.0, f32({low})) * scale;");
                let a = format!("a{row}_{token}");
                let _ = writeln!(body, "    {a} = fma(offset{row}, sum, fma(s{row}, d{row}, {a}));");
            }
            body.push_str("    }\n");
        }
        body
    }

    fn chunk_of_floats(&self) -> String {
        let (code, tokens) = (self.code, self.tokens);
        let mut body = String::new();
        let affine = matches!(code, Code::Affine { .. });
        for row in 0..self.rows() {
            body.push_str(&self.of_weight(row, code.scales(row)));
            for token in 0..tokens {
                let _ = writeln!(body, "    var d{row}_{token} = 0.0;");
            }
        }
        for token in (0..tokens).filter(|_| affine) {
            let _ = writeln!(body, "    var n{token} = 0.0;");
        }
        for first in (0..8).step_by(code.piece_quads()) {
            body.push_str("    {\n");
            for row in 0..self.rows() {
                body.push_str(&self.of_weight(row, code.loads(row, first)));
            }
            for quad in first..first + code.piece_quads() {
                self.quad_of_floats(first, quad, affine, &mut body);
                if quad == 3 || quad == 7 {
                    for row in 0..self.rows() {
                        (0..tokens).for_each(|token| body.push_str(&code.accumulate(row, token, quad / 4)));
                    }
                }
            }
            body.push_str("    }\n");
        }
        body
    }

    /// Lines of four columns.
    fn quad_of_floats(&self, first: usize, quad: usize, affine: bool, body: &mut String) {
        body.push_str("    {\n");
        for token in 0..self.tokens {
            let _ = writeln!(body, "    let x{token} = x[x_row{token} + {quad}u * chunks + chunk];");
            if affine {
                let sum = format!("((x{token}.x + x{token}.y) + (x{token}.z + x{token}.w))");
                let _ = writeln!(body, "    n{token} = n{token} + {sum};");
            }
        }
        for row in 0..self.rows() {
            let _ = writeln!(body, "    let q{row} = {};", self.code.quad(row, first, quad));
            for token in 0..self.tokens {
                let d = format!("d{row}_{token}");
                for part in ["x", "y", "z", "w"] {
                    let _ = writeln!(body, "    {d} = fma(q{row}.{part}, x{token}.{part}, {d});");
                }
            }
        }
        body.push_str("    }\n");
    }

    /// The vectors of sums that a team ends with: one a token and weight.
    fn sums(&self) -> Vec<(usize, usize)> {
        (0..self.tokens).flat_map(|token| (0..self.weights.count()).map(move |weight| (token, weight))).collect()
    }

    /// A vector of sums of one lane.
    pub(super) fn lane_sums(&self, (token, weight): (usize, usize)) -> String {
        let rows = self.team_rows();
        let sums: Vec<String> = (0..rows).map(|row| format!("a{}_{token}", weight * rows + row)).collect();
        format!("vec{rows}<f32>({})", sums.join(", "))
    }

    /// Lines that add up the sums of a team's lanes: `sum{token}_{weight}` in every lane, and the workgroup memory for it.
    pub(super) fn finish(&self) -> (String, String) {
        let (elements, lines) = if self.subgroups { self.finish_in_subgroups() } else { self.finish_in_memory() };
        (format!("var<workgroup> partial: array<vec{}<f32>, {elements}>;\n", self.team_rows()), lines)
    }

    /// A few vectors at a time go through workgroup memory, in the order of `finish_in_subgroups`.
    fn finish_in_memory(&self) -> (usize, String) {
        const TOGETHER: usize = 4;
        let mut lines = String::new();
        let all = self.sums();
        for sums in all.chunks(TOGETHER) {
            for (i, sum) in sums.iter().enumerate() {
                let _ = writeln!(lines, "  partial[{}u + local] = {};", 256 * i, self.lane_sums(*sum));
            }
            lines.push_str("  workgroupBarrier();\n");
            lines.push_str("  for (var step = 1u; step < min(lanes, 32u); step <<= 1u) {\n");
            lines.push_str("    if (lane % (2u * step) == 0u) {\n");
            for i in 0..sums.len() {
                let at = format!("partial[{}u + local", 256 * i);
                let _ = writeln!(lines, "      {at}] = {at}] + {at} + step];");
            }
            lines.push_str("    }\n    workgroupBarrier();\n  }\n");
            for (i, (token, weight)) in sums.iter().enumerate() {
                let _ = writeln!(lines, "  var sum{token}_{weight} = partial[{}u + local - lane];", 256 * i);
            }
            lines.push_str("  for (var i = 32u; i < lanes; i += 32u) {\n");
            for (i, (token, weight)) in sums.iter().enumerate() {
                let sum = format!("sum{token}_{weight}");
                let _ = writeln!(lines, "    {sum} = {sum} + partial[{}u + local - lane + i];", 256 * i);
            }
            lines.push_str("  }\n  workgroupBarrier();\n");
        }
        (256 * all.len().min(TOGETHER), lines)
    }

    /// By shuffles of 32 invocations, neighbours first (`tiles.wgsl` adds in this order); larger teams add theirs in workgroup memory.
    fn finish_in_subgroups(&self) -> (usize, String) {
        let mut lines = String::new();
        let all = self.sums();
        let names: Vec<String> = all.iter().map(|(token, weight)| format!("sum{token}_{weight}")).collect();
        for (name, sum) in names.iter().zip(&all) {
            let _ = writeln!(lines, "  var {name} = {};", self.lane_sums(*sum));
        }
        lines.push_str("  for (var step = 1u; step < min(lanes, 32u); step <<= 1u) {\n");
        for name in &names {
            let _ = writeln!(lines, "    {name} = {name} + subgroupShuffleXor({name}, step);");
        }
        lines.push_str("  }\n  if (lanes > 32u) {\n    workgroupBarrier();\n    if (lane % 32u == 0u) {\n");
        for (i, name) in names.iter().enumerate() {
            let _ = writeln!(lines, "      partial[{}u + local / 32u] = {name};", 8 * i);
        }
        lines.push_str("    }\n    workgroupBarrier();\n    let first_group = (local - lane) / 32u;\n");
        for (i, name) in names.iter().enumerate() {
            let _ = writeln!(lines, "    {name} = partial[{}u + first_group];", 8 * i);
        }
        lines.push_str("    for (var i = 1u; i < lanes / 32u; i++) {\n");
        for (i, name) in names.iter().enumerate() {
            let _ = writeln!(lines, "      {name} = {name} + partial[{}u + first_group + i];", 8 * i);
        }
        lines.push_str("    }\n  }\n");
        (8 * all.len(), lines)
    }

    /// Elements of x.
    pub(super) fn x_type(&self) -> &'static str {
        if self.integers() { "vec4<u32>" } else { "vec4<f32>" }
    }

    /// Fillings that all products share.
    pub(super) fn holes(&self) -> Vec<(&'static str, String)> {
        vec![
            ("X", self.x_type().to_owned()),
            ("TOKENS", self.tokens.to_string()),
            ("ROWS", self.team_rows().to_string()),
            ("WORD", word_type(self.code)),
            ("BODY", self.chunk()),
        ]
    }

    /// Lines that put away the sums of a team's rows: `put` is what happens to row `row` of token `t`, whose sum is `sums0[r]`, and with a
    /// second weight `sums1[r]`.
    pub(super) fn keep(&self, put: &str) -> String {
        let mut pick = String::new();
        for weight in 0..self.weights.count() {
            let _ = writeln!(pick, "      var picked{weight} = sum0_{weight};");
            for token in 1..self.tokens {
                let _ = writeln!(pick, "      if (t == {token}u) {{ picked{weight} = sum{token}_{weight}; }}");
            }
            // A value: an element of a variable by its index would be a load from memory.
            let _ = writeln!(pick, "      let sums{weight} = picked{weight};");
        }
        include_str!("../../kernels/keep.wgsl").replace("{{PICK}}", &pick).replace("{{PUT}}", put)
    }

    /// `ahead`: a chunk's words are asked for while those of the one before are multiplied, for one row of integers.
    pub(super) fn product_holes(&self, ahead: bool) -> Vec<(&'static str, String)> {
        let (second, value) = match self.weights {
            Weights::One => (String::new(), "finished(sums0[r], row, matrix)"),
            Weights::Pair => {
                let value = "activated(finished(sums0[r], row, matrix), finished_second(sums1[r], row, matrix))";
                (weight_bindings(6, &["2"], &word_type(self.code)), value)
            }
        };
        let (partial, finish) = self.finish();
        let mut start = self.start();
        for token in 0..self.tokens {
            let _ = writeln!(start, "  let x_row{token} = x_rows[{token}];");
        }
        let mut body = self.chunk();
        if ahead && self.integers() {
            let [declare, ask, take] = self.ahead();
            let _ = write!(start, "{declare}  if (lane < chunks) {{\n    let chunk = lane;\n{ask}  }}\n");
            let next = "    let next = chunk + lanes;\n    if (next < chunks) {\n    let chunk = next;\n";
            body = format!("{take}{next}{ask}    }}\n{}", self.multiply_integers());
        }
        let put = include_str!("../../kernels/product_put.wgsl").replace("{{VALUE}}", value);
        let mut holes = vec![("BODY", body)];
        holes.extend(self.holes());
        holes.extend([
            ("SECOND", second + &partial),
            ("START", start),
            ("FINISH", finish),
            ("KEEP", self.keep(&put)),
            ("FINALS", (256 * self.tokens).to_string()),
        ]);
        holes
    }

    /// A weight's part of a kernel, and its workgroup memory. `x_row`: where the one row of x starts; else rows lie side by side.
    fn side(&self, x_row: Option<&str>) -> (String, String) {
        let (partial, finish) = self.finish();
        let keep = self.keep(include_str!("../../kernels/side_put.wgsl"));
        let row_of = |token: usize| match x_row {
            Some(x_row) => format!("  let x_row0 = {x_row};\n"),
            // A row too many repeats the first.
            None => {
                format!("  let x_row{token} = (first + select(0u, {token}u, {token}u < count)) * args.x_token_step;\n")
            }
        };
        let x_rows: String = (0..self.tokens).map(row_of).collect();
        let [out_row, part_row] = match x_row {
            Some(_) => ["", ""],
            None => ["row * args.out_stride + ", "row * args.part_count + "],
        };
        let mut side = include_str!("../../kernels/beside_side.wgsl").to_owned();
        for (hole, filling) in [
            ("OUT_ROW", out_row),
            ("PART_ROW", part_row),
            ("X_ROWS", &x_rows),
            ("START", &self.start()),
            ("BODY", &self.chunk()),
            ("FINISH", &finish),
            ("KEEP", &keep),
        ] {
            side = side.replace(&format!("{{{{{hole}}}}}"), filling);
        }
        (partial, side)
    }

    pub(super) fn latent_heads_holes(&self) -> Vec<(&'static str, String)> {
        let (partial, side) = self.side(Some("matrix * args.x_part_step"));
        let latent = include_str!("../../kernels/store_latent.wgsl").to_owned();
        let mut holes = self.holes();
        holes.extend([("LATENT", latent), ("PARTIAL", partial), ("SIDE", side)]);
        holes
    }

    pub(super) fn join_heads_holes(&self) -> Vec<(&'static str, String)> {
        let (partial, side) = self.side(Some("0u"));
        // x is in workgroup memory.
        let here = |line: &str| match line.contains("= x[") {
            true => line.replacen("= x[", "= x_at(", 1).replacen("];", ");", 1) + "\n",
            false => line.to_owned() + "\n",
        };
        let keep = if self.integers() {
            "    let word = digits(value, args.x_per_byte, local);\n    \
             if (column - local % 32u < args.value_dim && local % 32u < 26u) {\n      \
             joined[digit_place(0u, column / 32u, args.chunks, local % 32u)] = word;\n    }"
        } else {
            "    if (column < args.value_dim) {\n      \
             joined[4u * ((column % 32u) / 4u * args.chunks + column / 32u) + column % 4u] = bitcast<u32>(value);\n    }"
        };
        let mut holes = self.holes();
        holes.extend([
            ("JOIN", include_str!("../../kernels/join_parts.wgsl").to_owned()),
            ("PARTIAL", partial),
            ("SIDE", side.lines().map(here).collect()),
            ("KEEP", keep.to_owned()),
            ("WORDS", JOINED_COLUMNS.to_string()),
        ]);
        holes
    }

    pub(super) fn router_holes(&self) -> Vec<(&'static str, String)> {
        let (partial, finish) = self.finish();
        let put = "        logits[args.logits_offset + row] = finished(sums0[r], row);\n";
        let mut holes = self.holes();
        holes.extend([
            ("PARTIAL", partial),
            ("START", self.start()),
            ("FINISH", finish),
            ("KEEP", self.keep(put)),
            ("ROUTE", include_str!("../../kernels/route_row.wgsl").to_owned()),
        ]);
        holes
    }

    pub(super) fn beside_holes(&self) -> Vec<(&'static str, String)> {
        let word = word_type(self.code);
        let weights = weight_bindings(5, &["", "_b"], &word);
        let (partial, side) = self.side(None);
        let bindings = ["codes[", "scales[", "extra[", " out[", " form["];
        let functions = [" put(", " put_integers(", " finished(", " side("];
        let fields = ["rows", "lanes", "groups", "out_offset", "out_stride", "has", "bias_offset", "forms"];
        let form_fields = ["part_count", "part_stride", "part_cols", "part_chunks", "per_byte"];
        let fields =
            [&fields[..], &form_fields].concat().into_iter().map(|field| format!("args.{field}")).collect::<Vec<_>>();
        let fields = fields.iter().map(String::as_str);
        let names: Vec<&str> = bindings.into_iter().chain(functions).chain(fields).collect();
        let second_side = second_side(&side, &names);
        let mut holes = self.holes();
        holes.extend([("WEIGHTS", weights), ("PARTIAL", partial), ("FIRST", side), ("SECOND", second_side)]);
        holes.push(("FINALS", (256 * self.tokens).to_string()));
        holes
    }
}

/// Bindings of codes, scales and the rest of weights whose names end so, from `first` on.
pub(super) fn weight_bindings(first: usize, ends: &[&str], word: &str) -> String {
    let names = ends.iter().flat_map(|end| [("codes", end, word), ("scales", end, "u32"), ("extra", end, "f32")]);
    let line = |(binding, (name, end, element)): (usize, (&str, &&str, &str))| {
        format!("@group(0) @binding({binding}) var<storage, read> {name}{end}: array<{element}>;\n")
    };
    (first..).zip(names).map(line).collect()
}

/// Text with `_b` behind each of `names`, of which none is part of another; punctuation at their ends stays outside.
pub(super) fn second_side(text: &str, names: &[&str]) -> String {
    let mut text = text.to_owned();
    for name in names {
        let stem = name.trim_end_matches(['[', '(', ')', ' ', ';']);
        text = text.replace(name, &format!("{stem}_b{}", &name[stem.len()..]));
    }
    text
}

pub(super) fn embed_holes(code: Code) -> Vec<(&'static str, String)> {
    let elements = code.chunk_words() / code.load_words();
    let mut body = format!("  let row_words = args.chunks * {elements}u;\n");
    body.push_str("  let scale_row0 = row0 * args.scale_words;\n  let table_row = row0 * row_words;\n");
    body.push_str(&code.scales(0));
    for first in (0..8).step_by(code.piece_quads()) {
        body.push_str("    {\n");
        body.push_str(&code.loads(0, first).replace("codes[row0 ", "codes[table_row "));
        for quad in first..first + code.piece_quads() {
            let _ = writeln!(body, "    let q{quad} = {};", code.quad(0, first, quad));
            for (i, part) in ["x", "y", "z", "w"].iter().enumerate() {
                let value = format!("q{quad}.{part}");
                let value = match code {
                    Code::Affine { .. } => format!("fma({value} - 1.0, s0, o0)"),
                    Code::Nvfp4 if quad >= 4 => format!("{value} * s0_1"),
                    Code::Nvfp4 | Code::Mxfp4 | Code::Mxfp8 | Code::Fp8 => format!("{value} * s0"),
                    Code::F32 | Code::F16 | Code::Bf16 => value,
                };
                let _ = writeln!(body, "    values[{}] = {value};", 4 * quad + i);
            }
        }
        body.push_str("    }\n");
    }
    vec![("WORD", word_type(code)), ("BODY", body)]
}
