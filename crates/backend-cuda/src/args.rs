//! Arguments of the kernels, field by field as in `kernels/*.cu` and `*.cuh`.

use crate::driver::DevicePtr;

/// `Mat` of `common.cuh`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Mat {
    pub(crate) p: DevicePtr,
    pub(crate) twin: DevicePtr,
    pub(crate) rows: u32,
    pub(crate) cols: u32,
    pub(crate) stride: u32,
    pub(crate) pad: u32,
}

/// `Paging` of `common.cuh`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Paging {
    pub(crate) positions: DevicePtr,
    pub(crate) sequences: DevicePtr,
    pub(crate) block_table: DevicePtr,
    pub(crate) max_blocks: u32,
    pub(crate) block_size: u32,
}

/// `Activation` of `common.cuh`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Activation {
    pub(crate) kind: u32,
    pub(crate) alpha: f32,
    pub(crate) limit: f32,
    pub(crate) pad: u32,
}

/// `Packed` of `packed.cuh`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Packed {
    pub(crate) codes: DevicePtr,
    pub(crate) scales: DevicePtr,
    pub(crate) global_scales: DevicePtr,
    pub(crate) bias: DevicePtr,
    pub(crate) codes_stride: u64,
    pub(crate) scales_stride: u64,
    pub(crate) rows: u32,
    pub(crate) cols: u32,
    pub(crate) group: u32,
    pub(crate) scale_f32: u32,
    pub(crate) scale_f16: u32,
    pub(crate) inline_scales: u32,
    pub(crate) tile_words: u32,
    pub(crate) pad: u32,
}

/// `Routing` of `matmul.cu`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Routing {
    pub(crate) ids: DevicePtr,
    pub(crate) ids_stride: u32,
    pub(crate) num_tokens: u32,
    pub(crate) top_k: u32,
    pub(crate) slots_in_x: u32,
    pub(crate) offsets: DevicePtr,
    pub(crate) sorted: DevicePtr,
}

/// `Part` of `matmul.cu`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Part {
    pub(crate) w: Packed,
    pub(crate) out: Mat,
}

/// `MatmulArgs` of `matmul.cu`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Matmul {
    pub(crate) part: [Part; 4],
    pub(crate) first_block: [u32; 5],
    pub(crate) num_parts: u32,
    pub(crate) slices: u32,
    pub(crate) x_head_stride: u32,
    pub(crate) x: Mat,
    pub(crate) digits: DevicePtr,
    pub(crate) digits_parts: u32,
    pub(crate) num_experts: u32,
    pub(crate) routing: Routing,
    pub(crate) activation: Activation,
    pub(crate) weights: Mat,
    pub(crate) plus: Mat,
}

/// `BlockArgs` of `prompt.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Block {
    pub(crate) routing: Routing,
    pub(crate) x: Mat,
    pub(crate) digits: DevicePtr,
    pub(crate) out: DevicePtr,
    pub(crate) rows: u32,
    pub(crate) tiles: u32,
    pub(crate) parts: u32,
    pub(crate) experts: u32,
    pub(crate) cols: u32,
    pub(crate) head_stride: u32,
}

/// `PlainArgs` of `matmul.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Plain {
    pub(crate) weights: DevicePtr,
    pub(crate) bias: DevicePtr,
    pub(crate) x: Mat,
    pub(crate) out: Mat,
    pub(crate) routing: Routing,
    pub(crate) matrix_elements: u64,
    pub(crate) rows: u32,
    pub(crate) cols: u32,
    pub(crate) x_head_stride: u32,
    pub(crate) warps: u32,
    pub(crate) chunk: u32,
    pub(crate) pad: u32,
}

/// `SortArgs` of `matmul.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Sort {
    pub(crate) routing: Routing,
    pub(crate) offsets: DevicePtr,
    pub(crate) sorted: DevicePtr,
    pub(crate) num_experts: u32,
    pub(crate) pad: u32,
}

/// `PackArgs` of `pack.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Pack {
    pub(crate) to: Packed,
    pub(crate) codes: DevicePtr,
    pub(crate) scales: DevicePtr,
    pub(crate) offsets: DevicePtr,
    pub(crate) code_row_bytes: u64,
    pub(crate) scale_row_bytes: u64,
    pub(crate) first_block_row: u32,
    pub(crate) block_rows: u32,
    pub(crate) block_cols: u32,
    pub(crate) pad: u32,
}

/// `DigitsArgs` of `pack.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Digits {
    pub(crate) x: Mat,
    pub(crate) out: DevicePtr,
    pub(crate) cols: u32,
    pub(crate) part_stride: u32,
    pub(crate) parts: u32,
    pub(crate) pad: u32,
}

/// `EmbedArgs` of `pack.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct EmbedPacked {
    pub(crate) table: Packed,
    pub(crate) token_ids: DevicePtr,
    pub(crate) out: Mat,
}

/// `EmbedPlainArgs` of `pack.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct EmbedPlain {
    pub(crate) table: DevicePtr,
    pub(crate) token_ids: DevicePtr,
    pub(crate) out: Mat,
    pub(crate) cols: u32,
    pub(crate) kind: u32,
}

/// `RmsNormArgs` of `rows.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct RmsNorm {
    pub(crate) x: Mat,
    pub(crate) delta: Mat,
    pub(crate) out: Mat,
    pub(crate) weight: DevicePtr,
    pub(crate) digits: DevicePtr,
    pub(crate) eps: f32,
    pub(crate) pad: u32,
}

/// `LayerNormArgs` of `rows.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct LayerNorm {
    pub(crate) x: Mat,
    pub(crate) out: Mat,
    pub(crate) weight: DevicePtr,
    pub(crate) bias: DevicePtr,
    pub(crate) eps: f32,
    pub(crate) pad: u32,
}

/// `AddArgs` of `rows.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Add {
    pub(crate) x: Mat,
    pub(crate) y: Mat,
}

/// `RopeTableArgs` of `rows.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct RopeTable {
    pub(crate) positions: DevicePtr,
    pub(crate) inverse_frequencies: DevicePtr,
    pub(crate) table: Mat,
    pub(crate) scale: f32,
    pub(crate) pad: u32,
}

/// `RopeArgs` of `rows.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Rope {
    pub(crate) x: Mat,
    pub(crate) table: Mat,
    pub(crate) num_heads: u32,
    pub(crate) head_stride: u32,
    pub(crate) interleaved: u32,
    pub(crate) pad: u32,
}

/// `KvStoreArgs` of `rows.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct KvStore {
    pub(crate) parts: [Mat; 4],
    pub(crate) slots: DevicePtr,
    pub(crate) cache: DevicePtr,
    pub(crate) num_parts: u32,
    pub(crate) width: u32,
    pub(crate) is_bf16: u32,
    pub(crate) pad: u32,
}

/// `GatherArgs` of `rows.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Gather {
    pub(crate) x: Mat,
    pub(crate) out: Mat,
    pub(crate) rows: DevicePtr,
}

/// `SampleArgs` of `sample.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Sample {
    pub(crate) logits: Mat,
    pub(crate) draws: DevicePtr,
    pub(crate) out: DevicePtr,
    pub(crate) draws_stride: u32,
    pub(crate) out_stride: u32,
}

/// `ArgmaxArgs` of `rows.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Argmax {
    pub(crate) logits: Mat,
    pub(crate) out: DevicePtr,
    pub(crate) best: DevicePtr,
    pub(crate) arrived: DevicePtr,
    pub(crate) out_stride: u32,
    pub(crate) pad: u32,
}

/// `ActivateArgs` of `rows.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Activate {
    pub(crate) gate: Mat,
    pub(crate) up: Mat,
    pub(crate) out: Mat,
    pub(crate) activation: Activation,
}

/// `CombineArgs` of `rows.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Combine {
    pub(crate) y: Mat,
    pub(crate) weights: Mat,
    pub(crate) plus: Mat,
    pub(crate) out: Mat,
    pub(crate) top_k: u32,
    pub(crate) pad: u32,
}

/// `RouteArgs` of `route.cuh`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Route {
    pub(crate) logits: Mat,
    pub(crate) weights: Mat,
    pub(crate) correction_bias: DevicePtr,
    pub(crate) ids: DevicePtr,
    pub(crate) ids_stride: u32,
    pub(crate) scoring: u32,
    pub(crate) n_group: u32,
    pub(crate) topk_group: u32,
    pub(crate) norm_topk_prob: u32,
    pub(crate) top_k: u32,
    pub(crate) factor: f32,
    pub(crate) pad: u32,
}

/// `AttendArgs` of `attend.cuh`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Attend {
    pub(crate) q: Mat,
    pub(crate) q_rope: Mat,
    pub(crate) out: Mat,
    pub(crate) cache: DevicePtr,
    pub(crate) partial: DevicePtr,
    pub(crate) sinks: DevicePtr,
    pub(crate) index_ids: DevicePtr,
    pub(crate) index_counts: DevicePtr,
    pub(crate) paging: Paging,
    pub(crate) index_stride: u32,
    pub(crate) num_heads: u32,
    pub(crate) heads_per_block: u32,
    pub(crate) heads_per_key: u32,
    pub(crate) q_dim: u32,
    pub(crate) q_rope_stride: u32,
    pub(crate) q_rope_dim: u32,
    pub(crate) cache_width: u32,
    pub(crate) cache_bf16: u32,
    pub(crate) key_first: u32,
    pub(crate) key_step: u32,
    pub(crate) value_first: u32,
    pub(crate) value_step: u32,
    pub(crate) value_dim: u32,
    pub(crate) values_are_keys: u32,
    pub(crate) window: u32,
    pub(crate) max_splits: u32,
    pub(crate) scale: f32,
}

/// `StepHeads` of `attend_rows.cuh`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct StepHeads {
    pub(crate) k: Mat,
    pub(crate) v: Mat,
    pub(crate) table: Mat,
    pub(crate) q_norm: DevicePtr,
    pub(crate) k_norm: DevicePtr,
    pub(crate) slots: DevicePtr,
    pub(crate) cache: DevicePtr,
    pub(crate) digits: DevicePtr,
    pub(crate) arrived: DevicePtr,
    pub(crate) rows: u32,
    pub(crate) interleaved: u32,
    pub(crate) eps: f32,
    pub(crate) pad: u32,
}

/// `GqaArgs` of `gqa.cu`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Gqa {
    pub(crate) attend: Attend,
    pub(crate) heads: StepHeads,
}

/// `JoinArgs` of `attention.cu`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Join {
    pub(crate) attend: Attend,
    pub(crate) digits: DevicePtr,
}

/// `PromptArgs` of `prompt_attention.cu`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct AttendPrompt {
    pub(crate) attend: Attend,
    pub(crate) num_tokens: u32,
    pub(crate) pad: u32,
}

/// `IndexScoreArgs` of `attention.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct IndexScore {
    pub(crate) q: Mat,
    pub(crate) weights: Mat,
    pub(crate) scores: Mat,
    pub(crate) cache: DevicePtr,
    pub(crate) paging: Paging,
    pub(crate) num_heads: u32,
    pub(crate) head_dim: u32,
    pub(crate) cache_bf16: u32,
    pub(crate) block_tokens: u32,
    pub(crate) scale: f32,
    pub(crate) num_tokens: u32,
}

/// `IndexTopkArgs` of `attention.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct IndexTopk {
    pub(crate) scores: Mat,
    pub(crate) positions: DevicePtr,
    pub(crate) ids: DevicePtr,
    pub(crate) counts: DevicePtr,
    pub(crate) ids_stride: u32,
    pub(crate) k: u32,
}

/// `ReadArgs` of `rows.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Read {
    pub(crate) p: DevicePtr,
    pub(crate) len: u64,
    pub(crate) out: DevicePtr,
}

/// `TwinArgs` of `rows.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Twin {
    pub(crate) x: Mat,
}

/// `RowInput` of `row.cuh`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct RowInput {
    pub(crate) x: Mat,
    pub(crate) digits: DevicePtr,
    pub(crate) kind: u32,
    pub(crate) eps: f32,
    pub(crate) weight: DevicePtr,
    pub(crate) out: Mat,
    pub(crate) out_digits: DevicePtr,
}

/// `LineArgs` of `decode.cu`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Line {
    pub(crate) part: [Part; 4],
    pub(crate) first_unit: [u32; 5],
    pub(crate) num_parts: u32,
    pub(crate) slices: u32,
    pub(crate) pad: u32,
    pub(crate) input: RowInput,
    pub(crate) residual: Mat,
}

/// `Latent` of `row.cuh`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Latent {
    pub(crate) latent: Mat,
    pub(crate) k_pe: Mat,
    pub(crate) q: Mat,
    pub(crate) table: Mat,
    pub(crate) weight: DevicePtr,
    pub(crate) slots: DevicePtr,
    pub(crate) cache: DevicePtr,
    pub(crate) cache_width: u32,
    pub(crate) cache_bf16: u32,
    pub(crate) num_heads: u32,
    pub(crate) head_stride: u32,
    pub(crate) interleaved: u32,
    pub(crate) eps: f32,
}

/// `HeadsArgs` of `decode.cu`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Heads {
    pub(crate) w: Packed,
    pub(crate) out: Mat,
    pub(crate) out_digits: DevicePtr,
    pub(crate) x: DevicePtr,
    pub(crate) x_head_stride: u32,
    pub(crate) slices: u32,
    pub(crate) joins: u32,
    pub(crate) has_latent: u32,
    pub(crate) attend: Attend,
    pub(crate) latent: Latent,
}

/// `RowHeadsArgs` of `latent.cu`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct RowHeads {
    pub(crate) w_q: Packed,
    pub(crate) w_k: Packed,
    pub(crate) w_v: Packed,
    pub(crate) input: RowInput,
    pub(crate) latent: Latent,
    pub(crate) attend: Attend,
    pub(crate) out: Mat,
    pub(crate) out_digits: DevicePtr,
    pub(crate) log_slices: u32,
    pub(crate) pad: u32,
}

/// `RouterArgs` of `decode.cu`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Router {
    pub(crate) weights: DevicePtr,
    pub(crate) bias: DevicePtr,
    pub(crate) out: Mat,
    pub(crate) input: RowInput,
    pub(crate) rows: u32,
    pub(crate) cols: u32,
}

/// `UpPair` of `decode.cu`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct UpPair {
    pub(crate) gate: Packed,
    pub(crate) up: Packed,
    pub(crate) out: Mat,
    pub(crate) x: DevicePtr,
}

/// `PairArgs` of `decode.cu`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Pair {
    pub(crate) router: Router,
    pub(crate) route: Route,
    pub(crate) arrived: DevicePtr,
    pub(crate) pair: UpPair,
    pub(crate) input: RowInput,
    pub(crate) router_kind: u32,
    pub(crate) slices: u32,
    pub(crate) activation: Activation,
}

/// `UpArgs` of `decode.cu`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Up {
    pub(crate) routed: UpPair,
    pub(crate) shared_blocks: u32,
    pub(crate) slices: u32,
    pub(crate) ids: DevicePtr,
    pub(crate) top_k: u32,
    pub(crate) pad: u32,
    pub(crate) activation: Activation,
    pub(crate) h_digits: DevicePtr,
    pub(crate) arrived: DevicePtr,
    pub(crate) shared: Line,
}

/// `DownArgs` of `decode.cu`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Down {
    pub(crate) w: Packed,
    pub(crate) out: Mat,
    pub(crate) weights: Mat,
    pub(crate) plus: Mat,
    pub(crate) residual: Mat,
    pub(crate) ids: DevicePtr,
    pub(crate) x: DevicePtr,
    pub(crate) part_bytes: u64,
    pub(crate) slices: u32,
    pub(crate) top_k: u32,
}

/// `PlanArgs` of `few.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Plan {
    pub(crate) route: Route,
    pub(crate) plan: DevicePtr,
    pub(crate) rows: u32,
    pub(crate) warp_floats: u32,
}

/// `FewPair` of `few.cu`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct FewPair {
    pub(crate) gate: Packed,
    pub(crate) up: Packed,
    pub(crate) out: Mat,
    pub(crate) x: DevicePtr,
    pub(crate) x_bytes: u64,
    pub(crate) digits: DevicePtr,
}

/// `FewUpArgs` of `few.cu`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct FewUp {
    pub(crate) routed: FewPair,
    pub(crate) shared: FewPair,
    pub(crate) plan: DevicePtr,
    pub(crate) shared_blocks: u32,
    pub(crate) slices: u32,
    pub(crate) rows: u32,
    pub(crate) top_k: u32,
    pub(crate) activation: Activation,
}

/// `FewDownArgs` of `few.cu`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct FewDown {
    pub(crate) w: Packed,
    pub(crate) plan: DevicePtr,
    pub(crate) x: DevicePtr,
    pub(crate) part_bytes: u64,
    pub(crate) results: DevicePtr,
    pub(crate) slices: u32,
    pub(crate) pad: u32,
}

/// `FewSumArgs` of `few.cu`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct FewSum {
    pub(crate) out: Mat,
    pub(crate) weights: Mat,
    pub(crate) plus: Mat,
    pub(crate) residual: Mat,
    pub(crate) results: DevicePtr,
    pub(crate) top_k: u32,
    pub(crate) pad: u32,
}

/// `DenseArgs` of `lots.cuh`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Dense {
    pub(crate) part: [Part; 4],
    pub(crate) first_unit: [u32; 5],
    pub(crate) num_parts: u32,
    pub(crate) slices: u32,
    pub(crate) rows: u32,
    pub(crate) x: DevicePtr,
    pub(crate) x_bytes: u64,
    pub(crate) matrices: u32,
    pub(crate) x_matrix_bytes: u32,
    pub(crate) residual: Mat,
}

/// `FewLineArgs` of `few.cu`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct FewLine {
    pub(crate) dense: Dense,
    pub(crate) shares: u32,
    pub(crate) pad: u32,
    pub(crate) sums: DevicePtr,
    pub(crate) arrived: DevicePtr,
}

/// `LinesArgs` of `lines.cu`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Lines {
    pub(crate) dense: Dense,
    pub(crate) depth: u32,
    pub(crate) x_at: u32,
    pub(crate) shares: u32,
    pub(crate) pad: u32,
    pub(crate) sums: DevicePtr,
    pub(crate) arrived: DevicePtr,
}
