//! The kernels: which WGSL files make which, and the unrolled parts of those that read weights.
//!
//! Sources are files of `kernels/` behind `common.wgsl`; `{{NAME}}` in them is replaced. Products and embeddings take a weight format
//! apart: their loops over the words of a chunk (32 columns) are written out here, because shifts and masks are constants then and no
//! array is indexed by a variable.

use moellon_tensor::{ScaleDtype, WeightFormat};
use std::fmt::Write as _;

/// Rows of weights that an invocation of a product has at a time: one `vec4` of sums.
pub(crate) const ROWS: usize = 4;
/// Rows of activations that one kernel of products reads weights once for.
pub(crate) const TOKENS: [usize; 4] = [1, 2, 4, 8];
/// Value columns an invocation of attention may have (times 32 is the largest value head).
pub(crate) const VALUE_COLUMNS: [usize; 4] = [2, 4, 8, 16];

/// How the codes of a weight become numbers: a format as far as kernels tell formats apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Code {
    Affine { bits: u32, group: u32, scale: ScaleKind },
    Nvfp4,
    Mxfp4,
    Mxfp8,
    Fp8,
    F32,
    F16,
    Bf16,
}

/// What a scale and its offset are stored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum ScaleKind {
    Bf16,
    F16,
    F32,
}

impl Code {
    /// The kernels' view of a format; `None` where they have none.
    pub(crate) fn of(format: WeightFormat) -> Option<Code> {
        Some(match format {
            WeightFormat::F32 => Code::F32,
            WeightFormat::F16 => Code::F16,
            WeightFormat::Bf16 => Code::Bf16,
            WeightFormat::Fp8Block { block_cols, .. } if block_cols.is_multiple_of(32) => Code::Fp8,
            WeightFormat::Fp8Block { .. } => return None,
            WeightFormat::Mxfp4 => Code::Mxfp4,
            WeightFormat::Mxfp8 => Code::Mxfp8,
            WeightFormat::Nvfp4 => Code::Nvfp4,
            WeightFormat::Affine { bits, group, scale } => {
                let known = matches!(bits, 1..=6 | 8) && matches!(group, 32 | 64 | 128);
                let scale = match scale {
                    ScaleDtype::Bf16 => ScaleKind::Bf16,
                    ScaleDtype::F16 => ScaleKind::F16,
                    ScaleDtype::F32 => ScaleKind::F32,
                };
                return known.then_some(Code::Affine { bits: u32::from(bits), group, scale });
            }
        })
    }

    /// 32-bit words of a chunk.
    pub(crate) fn chunk_words(self) -> usize {
        match self {
            Code::Affine { bits, .. } => bits as usize,
            Code::Nvfp4 | Code::Mxfp4 => 4,
            Code::Mxfp8 | Code::Fp8 => 8,
            Code::F16 | Code::Bf16 => 16,
            Code::F32 => 32,
        }
    }

    /// Words that one load takes: 4, 2 or 1.
    fn load_words(self) -> usize {
        [4, 2, 1].into_iter().find(|n| self.chunk_words().is_multiple_of(*n)).unwrap_or(1)
    }

    /// Quads of columns that are multiplied between two loads, so that few words wait in registers.
    fn piece_quads(self) -> usize {
        match self.chunk_words() {
            32 => 1,
            16 => 2,
            8 => 4,
            _ => 8,
        }
    }

    /// Four columns of a chunk as a `vec4<f32>` out of the words `w{row}_{word}` of a piece that starts at quad `first`.
    /// Affine codes `c` come as `1 + c / 2^bits`: the code put into the upper bits of a mantissa, one instruction a weight.
    fn quad(self, row: usize, first: usize, quad: usize) -> String {
        let word = |k: usize| format!("w{row}_{k}");
        let here = quad - first;
        match self {
            Code::Affine { bits, .. } => {
                let bits = bits as usize;
                let place = |i: usize| {
                    let at = (4 * here + i) * bits;
                    let (index, offset) = (at / 32, at % 32);
                    // The code's lowest bit goes to bit `to` of the mantissa.
                    let to = 23 - bits;
                    let shifted = |word: String, from: i64| match from {
                        0 => word,
                        from if from > 0 => format!("({word} >> {from}u)"),
                        from => format!("({word} << {}u)", -from),
                    };
                    let low = shifted(word(index), offset as i64 - to as i64);
                    if offset + bits <= 32 {
                        return low;
                    }
                    // The rest of the code is in the next word.
                    let high = shifted(word(index + 1), offset as i64 - 32 - to as i64);
                    format!("({low} & {:#x}u) | {high}", ((1u32 << (32 - offset)) - 1) << to)
                };
                let places: Vec<String> = (0..4).map(place).collect();
                let mask = ((1u32 << bits) - 1) << (23 - bits);
                format!(
                    "bitcast<vec4<f32>>((vec4<u32>({}) & vec4<u32>({mask:#x}u)) | vec4<u32>(0x3f800000u))",
                    places.join(", ")
                )
            }
            Code::Nvfp4 | Code::Mxfp4 => match here % 2 {
                0 => format!("e2m1_quad({})", word(here / 2)),
                _ => format!("e2m1_quad({} >> 16u)", word(here / 2)),
            },
            Code::Mxfp8 | Code::Fp8 => format!("e4m3_quad({})", word(here)),
            Code::F16 => {
                format!("vec4<f32>(unpack2x16float({}), unpack2x16float({}))", word(2 * here), word(2 * here + 1))
            }
            Code::Bf16 => {
                let (a, b) = (word(2 * here), word(2 * here + 1));
                format!("bitcast<vec4<f32>>(vec4<u32>({a} << 16u, {a} & 0xffff0000u, {b} << 16u, {b} & 0xffff0000u))")
            }
            Code::F32 => {
                let words: Vec<String> = (0..4).map(|i| word(4 * here + i)).collect();
                format!("bitcast<vec4<f32>>(vec4<u32>({}))", words.join(", "))
            }
        }
    }

    /// Lines that load the words `w{row}_{word}` of the piece from quad `first` on; rows start at element `row{row}`.
    fn loads(self, row: usize, first: usize) -> String {
        let (words, load) = (self.chunk_words(), self.load_words());
        let piece_words = words * self.piece_quads() / 8;
        let mut lines = String::new();
        for j in 0..piece_words / load {
            let at = first * words / 8 / load + j;
            let element = format!("codes[row{row} + chunk * {}u + {at}u]", words / load);
            if load == 1 {
                let _ = writeln!(lines, "    let w{row}_{j} = {element};");
                continue;
            }
            let _ = writeln!(lines, "    let v{row}_{first}_{j} = {element};");
            for (i, part) in ["x", "y", "z", "w"].iter().take(load).enumerate() {
                let _ = writeln!(lines, "    let w{row}_{} = v{row}_{first}_{j}.{part};", j * load + i);
            }
        }
        lines
    }

    /// Lines that load the scales `s{row}` (and `o{row}`, or `s{row}_1` of the second half) of a chunk; those of the row start at
    /// `scale_row{row}`.
    fn scales(self, row: usize) -> String {
        match self {
            Code::Affine { bits, group, scale } => {
                let factor = format!("{}.0", 1u32 << bits);
                let at = format!("scale_row{row} + (chunk >> {}u)", (group / 32).ilog2());
                match scale {
                    ScaleKind::Bf16 => format!(
                        "    let p{row} = scales[{at}];\n    let s{row} = bitcast<f32>(p{row} << 16u) * {factor};\n    \
                         let o{row} = bitcast<f32>(p{row} & 0xffff0000u);\n"
                    ),
                    ScaleKind::F16 => format!(
                        "    let p{row} = unpack2x16float(scales[{at}]);\n    let s{row} = p{row}.x * {factor};\n    \
                         let o{row} = p{row}.y;\n"
                    ),
                    ScaleKind::F32 => format!(
                        "    let p{row} = scale_row{row} + 2u * (chunk >> {}u);\n    \
                         let s{row} = bitcast<f32>(scales[p{row}]) * {factor};\n    \
                         let o{row} = bitcast<f32>(scales[p{row} + 1u]);\n",
                        (group / 32).ilog2()
                    ),
                }
            }
            Code::Nvfp4 => format!(
                "    let p{row} = scales[scale_row{row} + (chunk >> 1u)] >> ((chunk & 1u) * 16u);\n    \
                 let s{row} = e4m3(p{row} & 0xffu) * E2M1_FACTOR;\n    \
                 let s{row}_1 = e4m3((p{row} >> 8u) & 0xffu) * E2M1_FACTOR;\n"
            ),
            Code::Mxfp4 | Code::Mxfp8 => {
                let factor = if self == Code::Mxfp4 { "E2M1_FACTOR" } else { "E4M3_FACTOR" };
                format!(
                    "    let p{row} = scales[scale_row{row} + (chunk >> 2u)] >> ((chunk & 3u) * 8u);\n    \
                     let s{row} = e8m0(p{row} & 0xffu) * {factor};\n"
                )
            }
            Code::Fp8 => format!(
                "    let s{row} = bitcast<f32>(scales[scale_row{row} + 32u * chunk / args.block_columns]) * E4M3_FACTOR;\n"
            ),
            Code::F32 | Code::F16 | Code::Bf16 => String::new(),
        }
    }

    /// Lines that add a chunk's sum `d{row}_{token}` to `a{row}_{token}`. `half` is the half of the chunk that was just finished.
    fn accumulate(self, row: usize, token: usize, half: usize) -> String {
        let (a, d) = (format!("a{row}_{token}"), format!("d{row}_{token}"));
        match (self, half) {
            (Code::Nvfp4, 0) => format!("    {a} = fma(s{row}, {d}, {a});\n    {d} = 0.0;\n"),
            (Code::Nvfp4, _) => format!("    {a} = fma(s{row}_1, {d}, {a});\n"),
            (_, 0) => String::new(),
            (Code::Affine { .. }, _) => {
                format!("    {a} = fma(o{row}, n{token}, fma(s{row}, {d} - n{token}, {a}));\n")
            }
            (Code::Mxfp4 | Code::Mxfp8 | Code::Fp8, _) => format!("    {a} = fma(s{row}, {d}, {a});\n"),
            (Code::F32 | Code::F16 | Code::Bf16, _) => format!("    {a} = {a} + {d};\n"),
        }
    }
}

/// One kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Kernel {
    Activate,
    Add,
    Argmax,
    /// With so many value columns an invocation.
    Attend(usize),
    AttendJoin,
    Combine,
    Embed(Code),
    GatherRows,
    IndexScore,
    IndexTopk,
    KvStore,
    LayerNorm,
    /// For so many rows of activations.
    Product(Code, usize),
    ReadAll,
    RmsNorm,
    Rope,
    RopeTable,
    Route,
    SelfTest,
    Spread,
    WorkList,
}

/// A kernel's text and bindings.
#[derive(Debug)]
pub(crate) struct Source {
    /// For messages and labels.
    pub(crate) name: String,
    /// WGSL, entry point `main`.
    pub(crate) wgsl: String,
    /// Bindings that are read and written: the first ones.
    pub(crate) read_write: u32,
    /// Bindings that are read: those after them.
    pub(crate) read: u32,
}

macro_rules! file {
    ($name:literal) => {
        ($name, include_str!(concat!("../kernels/", $name, ".wgsl")))
    };
}

impl Kernel {
    /// Every kernel that does not depend on a weight format.
    pub(crate) fn fixed() -> Vec<Kernel> {
        use Kernel::*;
        let mut all = vec![
            Activate, Add, Argmax, AttendJoin, Combine, GatherRows, IndexScore, IndexTopk, KvStore, LayerNorm, ReadAll,
            RmsNorm, Rope, RopeTable, Route, Spread, WorkList,
        ];
        all.extend(VALUE_COLUMNS.map(Attend));
        all
    }

    /// The kernels of one weight format, for so many rows of activations.
    pub(crate) fn of_code(code: Code, tokens: &[usize]) -> Vec<Kernel> {
        tokens.iter().map(|tokens| Kernel::Product(code, *tokens)).chain([Kernel::Embed(code)]).collect()
    }

    /// The source for an adapter that keeps binary16 subnormals, or one that does not.
    pub(crate) fn source(self, half_subnormals: bool) -> Source {
        let (name, text, read_write, read) = match self {
            Kernel::Activate => with(file!("activate"), 3, 0),
            Kernel::Add => with(file!("add"), 2, 0),
            Kernel::Argmax => with(file!("argmax"), 2, 0),
            Kernel::Attend(_) => with(file!("attend"), 9, 0),
            Kernel::AttendJoin => with(file!("attend_join"), 5, 0),
            Kernel::Combine => with(file!("combine"), 4, 0),
            Kernel::Embed(_) => with(file!("embed"), 2, 3),
            Kernel::GatherRows => with(file!("gather_rows"), 3, 0),
            Kernel::IndexScore => with(file!("index_score"), 7, 0),
            Kernel::IndexTopk => with(file!("index_topk"), 4, 0),
            Kernel::KvStore => with(file!("kv_store"), 6, 0),
            Kernel::LayerNorm => with(file!("layer_norm"), 4, 0),
            Kernel::Product(..) => with(file!("product"), 1, 5),
            Kernel::ReadAll => with(file!("read_all"), 1, 1),
            Kernel::RmsNorm => with(file!("rms_norm"), 4, 0),
            Kernel::Rope => with(file!("rope"), 2, 0),
            Kernel::RopeTable => with(file!("rope_table"), 3, 0),
            Kernel::Route => with(file!("route"), 4, 0),
            Kernel::SelfTest => with(file!("self_test"), 1, 0),
            Kernel::Spread => with(file!("spread"), 2, 0),
            Kernel::WorkList => with(file!("work_list"), 2, 0),
        };
        let mut wgsl = String::from(include_str!("../kernels/common.wgsl"));
        if matches!(self, Kernel::Attend(_) | Kernel::IndexScore) {
            wgsl.push_str(include_str!("../kernels/paging.wgsl"));
        }
        let (mut label, mut holes) = (name.to_owned(), Vec::new());
        match self {
            Kernel::Product(code, tokens) => {
                label = format!("{name}_{}_{tokens}", code_name(code));
                holes = product_holes(code, tokens);
            }
            Kernel::Embed(code) => {
                label = format!("{name}_{}", code_name(code));
                holes = embed_holes(code);
            }
            Kernel::Attend(columns) => {
                label = format!("{name}_{columns}");
                holes = attend_holes(columns);
            }
            _ => {}
        }
        if matches!(self, Kernel::Product(..) | Kernel::Embed(_)) {
            wgsl.push_str(include_str!("../kernels/decode.wgsl"));
            holes.push(("HALF_SUBNORMALS", half_subnormals.to_string()));
            holes.push(("E4M3_FACTOR", if half_subnormals { "256.0" } else { "1.0" }.to_owned()));
            holes.push(("E2M1_FACTOR", if half_subnormals { "16384.0" } else { "1.0" }.to_owned()));
        }
        wgsl.push_str(text);
        for (hole, filling) in holes {
            wgsl = wgsl.replace(&format!("{{{{{hole}}}}}"), &filling);
        }
        Source { name: label, wgsl, read_write, read }
    }
}

fn with((name, text): (&'static str, &'static str), rw: u32, ro: u32) -> (&'static str, &'static str, u32, u32) {
    (name, text, rw, ro)
}

fn code_name(code: Code) -> String {
    match code {
        Code::Affine { bits, group, scale } => format!("affine{bits}_{group}_{scale:?}").to_lowercase(),
        other => format!("{other:?}").to_lowercase(),
    }
}

fn word_type(code: Code) -> String {
    match code.load_words() {
        1 => "u32".to_owned(),
        n => format!("vec{n}<u32>"),
    }
}

fn product_holes(code: Code, tokens: usize) -> Vec<(&'static str, String)> {
    let (mut start, mut body, mut finish) = (String::new(), String::new(), String::new());
    let elements = code.chunk_words() / code.load_words();
    for row in 0..ROWS {
        // The last rows again where the matrix ends inside a team's rows.
        let _ = writeln!(start, "  let r{row} = local_matrix * args.rows + min(team * ROWS + {row}u, args.rows - 1u);");
        let _ = writeln!(start, "  let row{row} = r{row} * args.chunks * {elements}u;");
        let _ = writeln!(start, "  let scale_row{row} = r{row} * args.scale_words;");
        for token in 0..tokens {
            let _ = writeln!(start, "  var a{row}_{token} = 0.0;");
        }
    }
    for token in 0..tokens {
        let _ = writeln!(start, "  let x_row{token} = x_rows[{token}];");
    }
    let affine = matches!(code, Code::Affine { .. });
    for row in 0..ROWS {
        body.push_str(&code.scales(row));
        for token in 0..tokens {
            let _ = writeln!(body, "    var d{row}_{token} = 0.0;");
        }
    }
    for token in (0..tokens).filter(|_| affine) {
        let _ = writeln!(body, "    var n{token} = 0.0;");
    }
    for first in (0..8).step_by(code.piece_quads()) {
        body.push_str("    {\n");
        for row in 0..ROWS {
            body.push_str(&code.loads(row, first));
        }
        for quad in first..first + code.piece_quads() {
            body.push_str("    {\n");
            for token in 0..tokens {
                let _ = writeln!(body, "    let x{token} = x[x_row{token} + {quad}u * args.chunks + chunk];");
                if affine {
                    let _ = writeln!(
                        body,
                        "    n{token} = n{token} + ((x{token}.x + x{token}.y) + (x{token}.z + x{token}.w));"
                    );
                }
            }
            for row in 0..ROWS {
                let _ = writeln!(body, "    let q{row} = {};", code.quad(row, first, quad));
                for token in 0..tokens {
                    let d = format!("d{row}_{token}");
                    for part in ["x", "y", "z", "w"] {
                        let _ = writeln!(body, "    {d} = fma(q{row}.{part}, x{token}.{part}, {d});");
                    }
                }
            }
            body.push_str("    }\n");
            if quad == 3 || quad == 7 {
                for row in 0..ROWS {
                    (0..tokens).for_each(|token| body.push_str(&code.accumulate(row, token, quad / 4)));
                }
            }
        }
        body.push_str("    }\n");
    }
    // Four rows of x at a time go through workgroup memory.
    let together = tokens.min(4);
    for base in (0..tokens).step_by(together) {
        if base > 0 {
            finish.push_str("  workgroupBarrier();\n");
        }
        for t in 0..together {
            let sums: Vec<String> = (0..ROWS).map(|row| format!("a{row}_{}", base + t)).collect();
            let _ = writeln!(finish, "  partial[{}u + local] = vec4<f32>({});", 256 * t, sums.join(", "));
        }
        finish.push_str("  workgroupBarrier();\n");
        finish.push_str("  for (var step = args.lanes >> 1u; step > 0u; step >>= 1u) {\n    if (lane < step) {\n");
        for t in 0..together {
            let at = format!("partial[{}u + local", 256 * t);
            let _ = writeln!(finish, "      {at}] = {at}] + {at} + step];");
        }
        finish.push_str("    }\n    workgroupBarrier();\n  }\n");
        for t in 0..together {
            let _ = writeln!(
                finish,
                "  store(partial[{}u + local - lane], {}u, out_rows[{}], team, lane, count, matrix);",
                256 * t,
                base + t,
                base + t
            );
        }
    }
    vec![
        ("TOKENS", tokens.to_string()),
        ("ROWS", ROWS.to_string()),
        ("WORD", word_type(code)),
        ("PARTIAL", (256 * together).to_string()),
        ("START", start),
        ("BODY", body),
        ("FINISH", finish),
    ]
}

fn embed_holes(code: Code) -> Vec<(&'static str, String)> {
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

fn attend_holes(columns: usize) -> Vec<(&'static str, String)> {
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

/// Names and WGSL of all kernels, both with and without binary16 subnormals where they differ: for checks and translations.
pub fn kernel_sources() -> Vec<(String, String)> {
    let mut kernels = Kernel::fixed();
    kernels.push(Kernel::SelfTest);
    let mut codes = vec![Code::Nvfp4, Code::Mxfp4, Code::Mxfp8, Code::Fp8, Code::F32, Code::F16, Code::Bf16];
    for bits in [2, 3, 4, 5, 6, 8] {
        codes.push(Code::Affine { bits, group: 64, scale: ScaleKind::Bf16 });
    }
    for scale in [ScaleKind::F16, ScaleKind::F32] {
        codes.push(Code::Affine { bits: 4, group: 32, scale });
    }
    for code in &codes {
        kernels.extend(Kernel::of_code(*code, &TOKENS));
    }
    let mut sources: Vec<(String, String)> = Vec::new();
    for kernel in kernels {
        let (with, without) = (kernel.source(true), kernel.source(false));
        if with.wgsl != without.wgsl && matches!(kernel, Kernel::Product(_, 1) | Kernel::Embed(_)) {
            sources.push((format!("{}_no_subnormals", without.name), without.wgsl));
        }
        sources.push((with.name, with.wgsl));
    }
    sources
}
