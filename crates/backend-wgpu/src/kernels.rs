//! The kernels: which WGSL files make which, and the unrolled parts of those that read weights.
//!
//! Sources are files of `kernels/` behind `common.wgsl`; `{{NAME}}` in them is replaced. Products and embeddings take a weight format
//! apart: their loops over the words of a chunk (32 columns) are written out here, because shifts and masks are constants then and no
//! array is indexed by a variable.

mod attention;
mod code;
mod experts;
mod product;
mod tiles;

pub(crate) use self::attention::{PAIRS, PAIRS_HEADS, Pairs};
use self::attention::{attend_holes, attend_pairs_holes};
pub(crate) use self::code::{Code, ScaleKind};
pub(crate) use self::experts::{MOST_RESULTS, SHARED_LANES, chosen_passes};
pub(crate) use self::product::{JOINED_COLUMNS, Weights, team_rows};
use self::product::{Shape, code_name, embed_holes};
pub(crate) use self::tiles::{DIGITS, Matrices, TILE_MEMORY, TILE_TOKENS, block_quads, digits, half_word_codes};
use self::tiles::{matrix_test_holes, tiles_holes};

/// Rows of weights that an invocation of a product has at a time: one `vec4` of sums.
pub(crate) const ROWS: usize = 4;
/// Rows of activations that one kernel of products reads weights once for.
pub(crate) const TOKENS: [usize; 4] = [1, 2, 4, 8];
/// Value columns an invocation of attention may have (times 32 is the largest value head).
pub(crate) const VALUE_COLUMNS: [usize; 4] = [2, 4, 8, 16];

/// What runs side by side with a weight: how many rows at a time, and in which kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Company {
    /// One matrix at a time, or two that meet in an activation.
    Alone,
    /// All matrices of the weight.
    Heads,
    /// A few matrices of the weight, gate and up together.
    Experts,
}

/// What kernels may expect of an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Target {
    /// It keeps binary16 subnormals.
    pub(crate) half_subnormals: bool,
    /// Any 32 invocations in a row from a multiple of 32 can exchange values.
    pub(crate) subgroups: bool,
    /// It multiplies four bytes in an instruction: activations become integers where codes are.
    pub(crate) integers: bool,
    /// Who multiplies tiles, if anybody does.
    pub(crate) matrices: Option<Matrices>,
}

impl Target {
    fn shape(self, code: Code, weights: Weights, tokens: usize) -> Shape {
        Shape { code, weights, tokens, integers: self.integers, subgroups: self.subgroups }
    }
}

/// One kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Kernel {
    Activate,
    Add,
    Argmax,
    ArgmaxAtOnce,
    ArgmaxPart,
    /// With so many value columns an invocation.
    Attend(usize),
    AttendJoin,
    /// Where subgroups are as they should be, with so many heads a workgroup.
    AttendPairs(Pairs, usize),
    /// Two weights side by side, for so many rows of activations.
    Beside(Code, usize),
    /// With the matrices that rows chose, for so many rows of activations at a time; whether with the shared expert's too.
    Chosen(Code, Weights, usize, bool),
    Combine,
    Embed(Code),
    /// Whether the shared expert's product is part of it.
    ExpertsDown(Code, bool),
    GatherRows,
    IndexScore,
    IndexTopk,
    /// The join of attention's parts with the product of the heads' values.
    JoinHeads(Code),
    KvStore,
    Latent,
    /// With the product of the heads' queries.
    LatentHeads(Code),
    LayerNorm,
    /// Of matrices whose codes are multiplied with so many digits.
    MatrixTest(usize),
    /// For so many rows of activations.
    Product(Code, Weights, usize),
    /// For one row of many chunks a lane, whose words are asked for ahead.
    ProductAhead(Code),
    ReadAll,
    RmsNorm,
    Rope,
    RopeTable,
    Route,
    /// One row's router with its choice.
    Router(Code),
    SelfTest,
    Spread,
    SubgroupTest,
    /// For many rows of activations.
    Tiles(Code, Weights),
    WorkList,
    WriteDigits,
    /// With so many digits.
    WriteTiles(usize),
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
    /// Every kernel that does not depend on a weight format and runs anywhere.
    pub(crate) fn fixed() -> Vec<Kernel> {
        use Kernel::*;
        let mut all = vec![
            Activate,
            Add,
            Argmax,
            ArgmaxPart,
            AttendJoin,
            Combine,
            GatherRows,
            IndexScore,
            IndexTopk,
            KvStore,
            Latent,
            LayerNorm,
            ReadAll,
            RmsNorm,
            Rope,
            RopeTable,
            Route,
            Spread,
            WorkList,
            WriteDigits,
        ];
        all.extend(VALUE_COLUMNS.map(Attend));
        all
    }

    /// Every kernel that does not depend on a weight format and wants subgroups.
    pub(crate) fn of_subgroups() -> Vec<Kernel> {
        PAIRS_HEADS.into_iter().flat_map(|heads| PAIRS.map(|pairs| Kernel::AttendPairs(pairs, heads))).collect()
    }

    /// Every kernel that does not depend on a weight format and makes activations ready for tiles.
    pub(crate) fn of_tiles() -> [Kernel; 2] {
        DIGITS.map(Kernel::WriteTiles)
    }

    /// The kernels of one weight format that multiply tiles, where it has any.
    pub(crate) fn tiles_of(code: Code, company: Company) -> Vec<Kernel> {
        let mut kernels = Vec::new();
        if digits(code).is_some() {
            kernels.push(Kernel::Tiles(code, Weights::One));
            if company != Company::Heads {
                kernels.push(Kernel::Tiles(code, Weights::Pair));
            }
        }
        kernels
    }

    /// The kernels of one weight format, for so many rows of activations: those that `company` may meet.
    pub(crate) fn of_code(code: Code, company: Company, tokens: &[usize]) -> Vec<Kernel> {
        let product = |weights| tokens.iter().map(move |tokens| Kernel::Product(code, weights, *tokens));
        match company {
            Company::Heads => {
                product(Weights::One).chain([Kernel::LatentHeads(code), Kernel::JoinHeads(code)]).collect()
            }
            Company::Alone => {
                let beside = tokens.iter().map(|tokens| Kernel::Beside(code, *tokens));
                let ahead = code.per_byte().map(|_| Kernel::ProductAhead(code));
                let more = [Kernel::Embed(code), Kernel::Router(code)].into_iter().chain(ahead);
                product(Weights::One).chain(product(Weights::Pair)).chain(beside).chain(more).collect()
            }
            Company::Experts => {
                let mut kernels = Vec::new();
                for shared in [false, true] {
                    for weights in [Weights::One, Weights::Pair] {
                        kernels.extend(tokens.iter().map(|tokens| Kernel::Chosen(code, weights, *tokens, shared)));
                    }
                    kernels.push(Kernel::ExpertsDown(code, shared));
                }
                kernels
            }
        }
    }

    /// Whether it has more bindings than every adapter allows.
    pub(crate) fn binds_many(self) -> bool {
        matches!(
            self,
            Kernel::Beside(..) | Kernel::Chosen(.., true) | Kernel::LatentHeads(_) | Kernel::ExpertsDown(_, true)
        )
    }

    /// Whether workgroups of one dispatch read what others of it wrote.
    pub(crate) fn meets_itself(self) -> bool {
        matches!(self, Kernel::ArgmaxAtOnce | Kernel::Router(_))
    }

    fn reads_weights(self) -> bool {
        use Kernel::*;
        matches!(self, Product(..) | ProductAhead(_) | Chosen(..) | Router(_) | Embed(_) | ExpertsDown(..))
            || self.has_side()
    }

    /// Whether `beside_side.wgsl` is part of it.
    fn has_side(self) -> bool {
        matches!(self, Kernel::Beside(..) | Kernel::LatentHeads(_) | Kernel::JoinHeads(_))
    }

    /// Whether cooperative matrices multiply in it where there are any.
    fn has_matrices(self) -> bool {
        matches!(self, Kernel::Tiles(..) | Kernel::MatrixTest(_))
    }

    /// What stands before a kernel's own file.
    fn prelude(self, target: Target) -> String {
        let sum = match target.subgroups {
            true => include_str!("../kernels/sum_in_subgroups.wgsl"),
            false => include_str!("../kernels/sum_in_memory.wgsl"),
        };
        let mut wgsl = include_str!("../kernels/common.wgsl").replace("{{SUM_OF_32}}", sum);
        if matches!(self, Kernel::Attend(_) | Kernel::AttendPairs(..) | Kernel::IndexScore) {
            wgsl.push_str(include_str!("../kernels/paging.wgsl"));
        }
        if matches!(self, Kernel::Argmax | Kernel::ArgmaxAtOnce | Kernel::ArgmaxPart) {
            wgsl.push_str(include_str!("../kernels/best.wgsl"));
        }
        if self.meets_itself() {
            wgsl.push_str(include_str!("../kernels/last.wgsl"));
        }
        if self.has_matrices() {
            let cooperative = target.matrices == Some(Matrices::Cooperative);
            let more = if cooperative { "enable wgpu_cooperative_matrix;\n" } else { "" };
            wgsl = format!("enable f16;\n{more}{wgsl}");
        }
        let writes_forms = matches!(
            self,
            Kernel::Product(..)
                | Kernel::ProductAhead(_)
                | Kernel::Chosen(_, Weights::Pair, ..)
                | Kernel::RmsNorm
                | Kernel::AttendJoin
        );
        if writes_forms || self.has_side() || matches!(self, Kernel::WriteDigits | Kernel::WriteTiles(_)) {
            let lanes = match target.subgroups {
                true => include_str!("../kernels/lanes_in_subgroups.wgsl"),
                false => include_str!("../kernels/lanes_in_memory.wgsl"),
            };
            wgsl.push_str(&include_str!("../kernels/digits.wgsl").replace("{{LANES}}", lanes));
        }
        if writes_forms {
            let forms = include_str!("../kernels/forms.wgsl");
            // Where only one of both forms is written they share a binding.
            let both = self == Kernel::RmsNorm;
            wgsl.push_str(&if both { forms.to_owned() } else { forms.replace("floats[", "form[") });
        }
        let meets = matches!(
            self,
            Kernel::Product(_, Weights::Pair, _)
                | Kernel::Chosen(_, Weights::Pair, ..)
                | Kernel::Tiles(_, Weights::Pair)
        );
        if meets || self == Kernel::Activate {
            wgsl.push_str(include_str!("../kernels/activation.wgsl"));
        }
        if matches!(self, Kernel::Product(..) | Kernel::ProductAhead(_) | Kernel::Tiles(..)) {
            wgsl.push_str(include_str!("../kernels/finished.wgsl"));
        }
        if matches!(self, Kernel::Product(_, Weights::Pair, _) | Kernel::Tiles(_, Weights::Pair)) {
            wgsl.push_str(&finished_of_second(include_str!("../kernels/finished.wgsl")));
        }
        if self == Kernel::AttendJoin {
            wgsl.push_str(include_str!("../kernels/join_parts.wgsl"));
        }
        if self == Kernel::Latent {
            wgsl.push_str(include_str!("../kernels/store_latent.wgsl"));
        }
        wgsl
    }

    /// Its label, and what stands for the holes of its file.
    fn fillings(self, name: &str, target: Target) -> (String, Vec<(&'static str, String)>) {
        let (mut label, mut holes) = (name.to_owned(), Vec::new());
        match self {
            Kernel::Product(code, weights, tokens) => {
                let pair = if weights == Weights::Pair { "pair_" } else { "" };
                label = format!("{name}_{pair}{}_{tokens}", code_name(code));
                holes = target.shape(code, weights, tokens).product_holes(false);
            }
            Kernel::ProductAhead(code) => {
                label = format!("{name}_ahead_{}", code_name(code));
                holes = target.shape(code, Weights::One, 1).product_holes(true);
            }
            Kernel::Beside(code, tokens) => {
                label = format!("{name}_{}_{tokens}", code_name(code));
                holes = target.shape(code, Weights::One, tokens).beside_holes();
            }
            Kernel::Chosen(code, weights, tokens, with_shared) => {
                let pair = if weights == Weights::Pair { "pair_" } else { "" };
                let shared = if with_shared { "shared_" } else { "" };
                label = format!("{name}_{shared}{pair}{}_{tokens}", code_name(code));
                holes = target.shape(code, weights, tokens).chosen_holes(with_shared);
            }
            Kernel::JoinHeads(code) => {
                label = format!("{name}_{}", code_name(code));
                holes = target.shape(code, Weights::One, 1).join_heads_holes();
            }
            Kernel::LatentHeads(code) => {
                label = format!("{name}_{}", code_name(code));
                holes = target.shape(code, Weights::One, 1).latent_heads_holes();
            }
            Kernel::ExpertsDown(code, with_shared) => {
                let shared = if with_shared { "shared_" } else { "" };
                label = format!("{name}_{shared}{}", code_name(code));
                holes = target.shape(code, Weights::One, 1).experts_down_holes(with_shared);
            }
            Kernel::Argmax | Kernel::ArgmaxAtOnce | Kernel::ArgmaxPart => {
                holes = vec![
                    ("PART", include_str!("../kernels/best_of_part.wgsl").to_owned()),
                    ("PARTS", include_str!("../kernels/best_of_parts.wgsl").to_owned()),
                ];
            }
            Kernel::Route => holes = vec![("ROUTE", include_str!("../kernels/route_row.wgsl").to_owned())],
            Kernel::Router(code) => {
                label = format!("{name}_{}", code_name(code));
                holes = target.shape(code, Weights::One, 1).router_holes();
            }
            Kernel::Embed(code) => {
                label = format!("{name}_{}", code_name(code));
                holes = embed_holes(code);
            }
            Kernel::AttendPairs(pairs, heads) => {
                let row = if pairs.bf16 { "bf16" } else { "f32" };
                label = format!("{name}_{}_{}_{row}_{heads}", pairs.keys, pairs.values);
                holes = attend_pairs_holes(pairs, heads);
            }
            Kernel::Tiles(code, weights) => {
                let pair = if weights == Weights::Pair { "pair_" } else { "" };
                label = format!("{name}_{pair}{}", code_name(code));
                holes = tiles_holes(code, weights, target.matrices.unwrap_or(Matrices::Cooperative));
            }
            Kernel::MatrixTest(digits) => {
                label = format!("{name}_{digits}");
                holes = matrix_test_holes(digits, target.matrices.unwrap_or(Matrices::Cooperative));
            }
            Kernel::WriteTiles(digits) => {
                label = format!("{name}_{digits}");
                holes = vec![("DIGITS", digits.to_string())];
            }
            Kernel::Attend(columns) => {
                label = format!("{name}_{columns}");
                holes = attend_holes(columns);
            }
            _ => {}
        }
        (label, holes)
    }

    /// The source for an adapter.
    pub(crate) fn source(self, target: Target) -> Source {
        let (name, text, read_write, read) = match self {
            Kernel::Activate => with(file!("activate"), 3, 0),
            Kernel::Add => with(file!("add"), 2, 0),
            Kernel::Argmax => with(file!("argmax"), 1, 1),
            Kernel::ArgmaxAtOnce => with(file!("argmax_at_once"), 3, 1),
            Kernel::ArgmaxPart => with(file!("argmax_part"), 1, 1),
            Kernel::Attend(_) => with(file!("attend"), 9, 0),
            Kernel::AttendPairs(..) => with(file!("attend_pairs"), 9, 0),
            Kernel::AttendJoin => with(file!("attend_join"), 6, 0),
            Kernel::Beside(..) => with(file!("beside"), 4, 7),
            Kernel::Chosen(_, weights, _, with_shared) => {
                let sides = if with_shared { 2 } else { 1 } * if weights == Weights::Pair { 2 } else { 1 };
                with(file!("chosen"), 2, 2 + 3 * sides)
            }
            Kernel::Combine => with(file!("combine"), 4, 0),
            Kernel::Embed(_) => with(file!("embed"), 2, 3),
            Kernel::ExpertsDown(_, false) => with(file!("experts_down"), 2, 6),
            Kernel::ExpertsDown(_, true) => with(file!("experts_down"), 2, 9),
            Kernel::GatherRows => with(file!("gather_rows"), 3, 0),
            Kernel::IndexScore => with(file!("index_score"), 7, 0),
            Kernel::IndexTopk => with(file!("index_topk"), 4, 0),
            Kernel::JoinHeads(_) => with(file!("join_heads"), 6, 3),
            Kernel::KvStore => with(file!("kv_store"), 6, 0),
            Kernel::Latent => with(file!("latent"), 4, 3),
            Kernel::LatentHeads(_) => with(file!("latent_heads"), 6, 7),
            Kernel::MatrixTest(_) => with(file!("matrix_test"), 2, 0),
            Kernel::LayerNorm => with(file!("layer_norm"), 4, 0),
            Kernel::Product(_, Weights::One, _) | Kernel::ProductAhead(_) => with(file!("product"), 2, 4),
            Kernel::Product(_, Weights::Pair, _) => with(file!("product"), 2, 7),
            Kernel::ReadAll => with(file!("read_all"), 1, 1),
            Kernel::RmsNorm => with(file!("rms_norm"), 5, 1),
            Kernel::Rope => with(file!("rope"), 2, 0),
            Kernel::RopeTable => with(file!("rope_table"), 3, 0),
            Kernel::Route => with(file!("route"), 4, 0),
            Kernel::Router(_) => with(file!("router"), 5, 4),
            Kernel::SelfTest => with(file!("self_test"), 1, 0),
            Kernel::Spread => with(file!("spread"), 2, 0),
            Kernel::SubgroupTest => with(file!("subgroup_test"), 1, 0),
            Kernel::Tiles(_, Weights::One) => with(file!("tiles"), 1, 6),
            Kernel::Tiles(_, Weights::Pair) => with(file!("tiles"), 1, 9),
            Kernel::WorkList => with(file!("work_list"), 2, 0),
            Kernel::WriteDigits => with(file!("write_digits"), 1, 1),
            Kernel::WriteTiles(_) => with(file!("write_tiles"), 1, 2),
        };
        let (label, mut holes) = self.fillings(name, target);
        let mut wgsl = self.prelude(target);
        if self.reads_weights() {
            wgsl.push_str(include_str!("../kernels/decode.wgsl"));
            holes.push(("HALF_SUBNORMALS", target.half_subnormals.to_string()));
            holes.push(("E4M3_FACTOR", if target.half_subnormals { "256.0" } else { "1.0" }.to_owned()));
            holes.push(("E2M1_FACTOR", if target.half_subnormals { "16384.0" } else { "1.0" }.to_owned()));
        }
        let text = text.replace("{{SHARD_ARGS}}\n", include_str!("../kernels/shard_args.wgsl"));
        wgsl.push_str(&text.replace("{{LIST_ITEM}}\n", include_str!("../kernels/list_item.wgsl")));
        for (hole, filling) in holes {
            wgsl = wgsl.replace(&format!("{{{{{hole}}}}}"), &filling);
        }
        Source { name: label, wgsl, read_write, read }
    }
}

fn with((name, text): (&'static str, &'static str), rw: u32, ro: u32) -> (&'static str, &'static str, u32, u32) {
    (name, text, rw, ro)
}

/// `finished.wgsl` for a pair's second weight: its bits of `has` are two further.
fn finished_of_second(finished: &str) -> String {
    let mut text = finished.to_owned();
    for (first, second) in [("finished(", "finished_second("), ("extra[", "extra2["), ("bias_offset", "bias_offset2")] {
        text = text.replace(first, second);
    }
    text.replace("& 2u", "& 8u").replace("& 1u", "& 4u")
}

/// Every kernel that there is, of a code of each kind.
fn all_kernels() -> Vec<Kernel> {
    let mut kernels = Kernel::fixed();
    kernels.extend([Kernel::SelfTest, Kernel::SubgroupTest, Kernel::ArgmaxAtOnce]);
    kernels.extend(Kernel::of_subgroups());
    kernels.extend(Kernel::of_tiles());
    kernels.extend(DIGITS.map(Kernel::MatrixTest));
    let mut codes = vec![Code::Nvfp4, Code::Mxfp4, Code::Mxfp8, Code::Fp8, Code::F32, Code::F16, Code::Bf16];
    for bits in [2, 3, 4, 5, 6, 8] {
        codes.push(Code::Affine { bits, group: 64, scale: ScaleKind::Bf16 });
    }
    for scale in [ScaleKind::F16, ScaleKind::F32] {
        codes.push(Code::Affine { bits: 4, group: 32, scale });
    }
    for code in &codes {
        kernels.extend(Kernel::of_code(*code, Company::Alone, &TOKENS));
        kernels.extend(Kernel::of_code(*code, Company::Experts, &TOKENS));
        kernels.extend([Kernel::LatentHeads(*code), Kernel::JoinHeads(*code)]);
        kernels.extend(Kernel::tiles_of(*code, Company::Alone));
    }
    kernels
}

/// Names and WGSL of all kernels, and of what they are on adapters that lack something: for checks and translations. Those with cooperative
/// matrices and those whose workgroups meet are not among them: see [`cooperative_sources`].
pub fn kernel_sources() -> Vec<(String, String)> {
    let mut sources: Vec<(String, String)> = Vec::new();
    let target = Target { half_subnormals: true, subgroups: true, integers: true, matrices: Some(Matrices::Plain) };
    for kernel in all_kernels().into_iter().filter(|kernel| !kernel.meets_itself()) {
        let best = kernel.source(target);
        let is_fixed = !kernel.reads_weights();
        let one_row = !is_fixed
            && !matches!(kernel, Kernel::Product(_, _, 2..) | Kernel::Chosen(_, _, 2.., _) | Kernel::Beside(_, 2..));
        let variants = [
            ("no_subgroups", Target { subgroups: false, ..target }),
            ("no_subnormals", Target { half_subnormals: false, ..target }),
            ("no_integers", Target { integers: false, ..target }),
        ];
        for (name, target) in variants.into_iter().filter(|_| one_row || is_fixed) {
            let source = kernel.source(target);
            if source.wgsl != best.wgsl {
                sources.push((format!("{}_{name}", source.name), source.wgsl));
            }
        }
        sources.push((best.name, best.wgsl));
    }
    sources
}

/// Names and WGSL of the kernels that Metal has not: those with cooperative matrices of 16 by 16 numbers, and those in which workgroups read
/// what others of the same dispatch wrote.
pub fn cooperative_sources() -> Vec<(String, String)> {
    let matrices = Some(Matrices::Cooperative);
    let target = Target { half_subnormals: true, subgroups: true, integers: true, matrices };
    let kernels = all_kernels().into_iter().filter(|kernel| kernel.has_matrices() || kernel.meets_itself());
    kernels.map(|kernel| kernel.source(target)).map(|source| (source.name, source.wgsl)).collect()
}
