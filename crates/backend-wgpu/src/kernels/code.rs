//! Weight formats as kernels tell them apart, and the WGSL that makes numbers out of the words of a chunk (32 columns).

use moellon_tensor::{ScaleDtype, WeightFormat};
use std::fmt::Write as _;

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

    /// Codes of a byte, where products with integers read them as they lie: those whose bits divide a byte.
    pub(crate) fn per_byte(self) -> Option<usize> {
        match self {
            Code::Affine { bits: bits @ (2 | 4 | 8), .. } => Some(8 / bits as usize),
            _ => None,
        }
    }

    /// Words that one load takes: 4, 2 or 1.
    pub(super) fn load_words(self) -> usize {
        [4, 2, 1].into_iter().find(|n| self.chunk_words().is_multiple_of(*n)).unwrap_or(1)
    }

    /// Quads of columns that are multiplied between two loads, so that few words wait in registers.
    pub(super) fn piece_quads(self) -> usize {
        match self.chunk_words() {
            32 => 1,
            16 => 2,
            8 => 4,
            _ => 8,
        }
    }

    /// Four columns of a chunk as a `vec4<f32>` out of the words `w{row}_{word}` of a piece that starts at quad `first`.
    /// Affine codes `c` come as `1 + c / 2^bits`: the code put into the upper bits of a mantissa, one instruction a weight.
    pub(super) fn quad(self, row: usize, first: usize, quad: usize) -> String {
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
    pub(super) fn loads(self, row: usize, first: usize) -> String {
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
    pub(super) fn scales(self, row: usize) -> String {
        match self {
            Code::Affine { bits, .. } => self.affine_scales(row, 1 << bits),
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

    /// The same of an affine format, the scale times `factor`.
    fn affine_scales(self, row: usize, factor: u32) -> String {
        let Code::Affine { group, scale, .. } = self else { return String::new() };
        let factor = format!("{factor}.0");
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

    /// Lines that load the words of a whole chunk of a row with its scale and offset, and lines that make its codes bytes
    /// `c{row}_{word}` with a sign in the order of `digits.wgsl`, `s{row}` and `offset{row}` such that `s c + offset` are the weights.
    pub(super) fn bytes(self, row: usize) -> (String, String) {
        let Code::Affine { bits, .. } = self else { return (String::new(), String::new()) };
        let (words, load) = (self.chunk_words(), self.load_words());
        let (mut loads, mut lines) = (String::new(), String::new());
        for j in 0..words / load {
            let _ = writeln!(loads, "    let v{row}_{j} = codes[row{row} + chunk * {}u + {j}u];", words / load);
        }
        loads.push_str(&self.affine_scales(row, 1));
        let word = |k: usize| match load {
            1 => format!("v{row}_{k}"),
            _ => format!("v{row}_{}.{}", k / load, ["x", "y", "z", "w"][k % load]),
        };
        for m in 0..8 {
            let byte = match (bits, m) {
                (8, _) => format!("{} ^ 0x80808080u", word(m)),
                (4, _) if m % 2 == 0 => format!("{} & 0x0f0f0f0fu", word(m / 2)),
                (4, _) => format!("({} >> 4u) & 0x0f0f0f0fu", word(m / 2)),
                (_, _) => format!("({} >> {}u) & 0x03030303u", word(m / 4), 2 * (m % 4)),
            };
            let _ = writeln!(lines, "    let c{row}_{m} = {byte};");
        }
        // Codes of eight bits are read 128 less than they are.
        let offset = if bits == 8 { format!("fma(128.0, s{row}, o{row})") } else { format!("o{row}") };
        let _ = writeln!(lines, "    let offset{row} = {offset};");
        (loads, lines)
    }

    /// What [`Code::bytes`] loads, asked for before it is needed: lines that declare variables for it, that ask for `chunk` of the row
    /// whose words start at `row{place}`, and that take what came.
    pub(super) fn ahead(self, row: usize, place: usize) -> [String; 3] {
        let Code::Affine { group, scale, .. } = self else { return Default::default() };
        let loads = self.chunk_words() / self.load_words();
        let word = match self.load_words() {
            1 => "u32".to_owned(),
            n => format!("vec{n}<u32>"),
        };
        let [mut declare, mut ask, mut take] = [const { String::new() }; 3];
        for j in 0..loads {
            let _ = writeln!(declare, "  var next{row}_{j} = {word}();");
            let _ = writeln!(ask, "    next{row}_{j} = codes[row{place} + chunk * {loads}u + {j}u];");
            let _ = writeln!(take, "    let v{row}_{j} = next{row}_{j};");
        }
        let shift = (group / 32).ilog2();
        let words = if scale == ScaleKind::F32 { 2 } else { 1 };
        for j in 0..words {
            let _ = writeln!(declare, "  var next_scale{row}_{j} = 0u;");
            let at = format!("scale_row{place} + {words}u * (chunk >> {shift}u) + {j}u");
            let _ = writeln!(ask, "    next_scale{row}_{j} = scales[{at}];");
        }
        let first = format!("next_scale{row}_0");
        let (s, o) = match scale {
            ScaleKind::Bf16 => {
                (format!("bitcast<f32>({first} << 16u)"), format!("bitcast<f32>({first} & 0xffff0000u)"))
            }
            ScaleKind::F16 => (format!("unpack2x16float({first}).x"), format!("unpack2x16float({first}).y")),
            ScaleKind::F32 => (format!("bitcast<f32>({first})"), format!("bitcast<f32>(next_scale{row}_1)")),
        };
        let _ = writeln!(take, "    let s{row} = {s};\n    let o{row} = {o};");
        [declare, ask, take]
    }

    /// Lines that add a chunk's sum `d{row}_{token}` to `a{row}_{token}`. `half` is the half of the chunk that was just finished.
    pub(super) fn accumulate(self, row: usize, token: usize, half: usize) -> String {
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
