//! Every buffer of a step, allocated once at load. A step takes views of the rows it needs.

use crate::Result;
use crate::config::{Attention, Ffn, ModelConfig};
use crate::decoder::DecoderOptions;
use crate::weights::Weights;
use moellon_ops::{Backend, Buffer, ElementType};

/// Buffers by what they hold; the first dimension is `max_batch_tokens` unless stated.
pub(crate) struct Workspace {
    /// u32 `[1, _]`
    pub(crate) token_ids: Buffer,
    /// u32 `[1, _]`
    pub(crate) positions: Buffer,
    /// u32 `[1, _]`
    pub(crate) sequences: Buffer,
    /// u32 `[1, _]`
    pub(crate) slots: Buffer,
    /// u32 `[max_sequences, max_blocks]`
    pub(crate) block_table: Buffer,
    /// u32 `[1, max(max_batch_tokens, max_logit_rows)]`
    pub(crate) rows: Buffer,
    /// u32 `[1, _]`, for the MTP layer: which hidden states its rows read
    pub(crate) hidden_rows: Buffer,
    /// `[_, rope dim]`
    pub(crate) rope_table: Buffer,
    /// Residual stream `[_, hidden_size]`
    pub(crate) hidden: Buffer,
    /// `[_, hidden_size]`
    pub(crate) normed: Buffer,
    /// Output of attention or feed-forward `[_, hidden_size]`
    pub(crate) delta: Buffer,
    /// Post-norm output of the trunk `[_, hidden_size]`
    pub(crate) final_hidden: Buffer,
    /// Post-norm output of the MTP layer `[_, hidden_size]`
    pub(crate) mtp_hidden: Buffer,
    /// Post-norm outputs of the trunk that the MTP layer has not read yet `[_, hidden_size]`
    pub(crate) mtp_saved: Buffer,
    /// `[_, 2 * hidden_size]`
    pub(crate) mtp_input: Buffer,
    /// `[max_logit_rows, hidden_size]`
    pub(crate) head_input: Buffer,
    /// `[max_logit_rows, vocab_size]`
    pub(crate) logits: Buffer,
    /// MLA: query latent `[_, q_lora_rank]`
    pub(crate) q_latent_raw: Buffer,
    /// Queries, all heads
    pub(crate) q: Buffer,
    /// MLA: `[_, kv_lora_rank + rope]`; GQA: `[_, 2 * num_kv_heads * head_dim]`
    pub(crate) kv: Buffer,
    /// MLA: absorbed queries `[_, num_heads * kv_lora_rank]`
    pub(crate) q_absorbed: Buffer,
    /// MLA: averaged latents `[_, num_heads * kv_lora_rank]`
    pub(crate) latents: Buffer,
    /// Values of all heads
    pub(crate) attended: Buffer,
    /// Indexer: `[_, num_heads * head_dim]`
    pub(crate) index_q: Buffer,
    /// `[_, head_dim]`
    pub(crate) index_key: Buffer,
    /// `[_, num_heads]`
    pub(crate) index_weights: Buffer,
    /// `[_, max_context]`
    pub(crate) index_scores: Buffer,
    /// u32 `[_, index_topk]`
    pub(crate) index_ids: Buffer,
    /// u32 `[1, _]`
    pub(crate) index_counts: Buffer,
    /// Activated products of dense or shared feed-forward
    pub(crate) ffn: Buffer,
    /// Router logits `[_, num_experts]`
    pub(crate) router_logits: Buffer,
    /// u32 `[_, num_experts_per_tok]`
    pub(crate) expert_ids: Buffer,
    /// `[_, num_experts_per_tok]`
    pub(crate) expert_weights: Buffer,
    /// `[_, num_experts_per_tok * moe_intermediate_size]`
    pub(crate) experts: Buffer,
}

impl Workspace {
    /// Allocates everything for `config`, with routers as wide as `weights` has them.
    pub(crate) fn new(
        config: &ModelConfig,
        options: &DecoderOptions,
        weights: &Weights,
        backend: &mut dyn Backend,
    ) -> Result<Self> {
        let tokens = options.max_batch_tokens;
        let mtp_tokens = if weights.mtp.is_empty() { 0 } else { tokens };
        let max_experts = weights.max_experts();
        let mut alloc = |element, len| backend.alloc("activations", element, len);
        let (q, kv, q_latent, absorbed, attended) = match config.attention {
            Attention::Mla(mla) => (
                mla.num_heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim),
                mla.kv_lora_rank + mla.qk_rope_head_dim,
                mla.q_lora_rank.unwrap_or(0),
                mla.num_heads * mla.kv_lora_rank,
                mla.num_heads * mla.v_head_dim,
            ),
            Attention::Gqa(gqa) => {
                let q = gqa.num_heads * gqa.head_dim;
                (q, 2 * gqa.num_kv_heads * gqa.head_dim, 0, 0, q)
            }
        };
        let index = config.indexer.map_or((0, 0, 0, 0, 0), |i| {
            (i.num_heads * i.head_dim, i.head_dim, i.num_heads, options.max_context, i.topk)
        });
        let dense = config.layers.iter().filter_map(|l| match l.ffn {
            Ffn::Dense { intermediate_size } => Some(intermediate_size),
            Ffn::Moe => None,
        });
        let ffn = dense.chain(config.moe.shared_intermediate_size).max().unwrap_or(0);
        let max_blocks = options.max_context.div_ceil(options.block_size);
        let (f32_, u32_) = (ElementType::F32, ElementType::U32);
        let top_k = config.moe.num_experts_per_tok;
        Ok(Workspace {
            token_ids: alloc(u32_, tokens)?,
            positions: alloc(u32_, tokens)?,
            sequences: alloc(u32_, tokens)?,
            slots: alloc(u32_, tokens)?,
            block_table: alloc(u32_, options.max_sequences * max_blocks)?,
            rows: alloc(u32_, tokens.max(options.max_logit_rows))?,
            hidden_rows: alloc(u32_, mtp_tokens)?,
            rope_table: alloc(f32_, tokens * config.rope.dim())?,
            hidden: alloc(f32_, tokens * config.hidden_size)?,
            normed: alloc(f32_, tokens * config.hidden_size)?,
            delta: alloc(f32_, tokens * config.hidden_size)?,
            final_hidden: alloc(f32_, tokens * config.hidden_size)?,
            mtp_hidden: alloc(f32_, mtp_tokens * config.hidden_size)?,
            mtp_saved: alloc(f32_, mtp_tokens * config.hidden_size)?,
            mtp_input: alloc(f32_, mtp_tokens * config.hidden_size * 2)?,
            head_input: alloc(f32_, options.max_logit_rows * config.hidden_size)?,
            logits: alloc(f32_, options.max_logit_rows * config.vocab_size)?,
            q_latent_raw: alloc(f32_, tokens * q_latent)?,
            q: alloc(f32_, tokens * q)?,
            kv: alloc(f32_, tokens * kv)?,
            q_absorbed: alloc(f32_, tokens * absorbed)?,
            latents: alloc(f32_, tokens * absorbed)?,
            attended: alloc(f32_, tokens * attended)?,
            index_q: alloc(f32_, tokens * index.0)?,
            index_key: alloc(f32_, tokens * index.1)?,
            index_weights: alloc(f32_, tokens * index.2)?,
            index_scores: alloc(f32_, tokens * index.3)?,
            index_ids: alloc(u32_, tokens * index.4)?,
            index_counts: alloc(u32_, tokens)?,
            ffn: alloc(f32_, tokens * ffn)?,
            router_logits: alloc(f32_, tokens * max_experts)?,
            expert_ids: alloc(u32_, tokens * top_k)?,
            expert_weights: alloc(f32_, tokens * top_k)?,
            experts: alloc(f32_, tokens * top_k * config.moe.moe_intermediate_size)?,
        })
    }
}
