"""The glm_moe_dsa decoder in PyTorch: MLA attention, the DSA indexer, noaux_tc experts and one MTP layer.

Parameter names are the checkpoint's, except that a layer's experts are stacked into three tensors.
Shapes in comments: B sequences, T positions, H heads, E experts, I moe_intermediate_size.
"""

import dataclasses
import json

import torch
import torch.nn.functional as F
from torch import nn


@dataclasses.dataclass(frozen=True)
class Config:
    """The keys of config.json that the model reads."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    moe_intermediate_size: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    indexer_types: list
    mlp_layer_types: list
    n_routed_experts: int
    num_experts_per_tok: int
    routed_scaling_factor: float
    rms_norm_eps: float
    rope_parameters: dict

    @classmethod
    def load(cls, path):
        values = json.loads(open(path).read())
        return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight, self.eps).to(x.dtype)


def linear(in_features, out_features, scale=1.0):
    layer = nn.Linear(in_features, out_features, bias=False)
    nn.init.normal_(layer.weight, std=scale * in_features**-0.5)
    return layer


def rope_tables(config, num_positions, device):
    """cos, sin: [T, qk_rope_head_dim / 2]."""
    dim = config.qk_rope_head_dim
    theta = config.rope_parameters["rope_theta"]
    inverse = 1.0 / theta ** (torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    angle = torch.arange(num_positions, device=device, dtype=torch.float32)[:, None] * inverse
    return angle.cos(), angle.sin()


def rope(x, cos, sin):
    """Rotate the pairs (2i, 2i+1) of x [..., T, d]; the output holds all first halves, then all second ones."""
    a, b = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Indexer(nn.Module):
    """The lightning indexer: one score per (query, key); its inputs are detached, so it only learns from its own loss."""

    def __init__(self, c):
        super().__init__()
        self.num_heads, self.head_dim, self.rope_dim = c.index_n_heads, c.index_head_dim, c.qk_rope_head_dim
        self.wq_b = linear(c.q_lora_rank, self.num_heads * self.head_dim)
        self.wk = linear(c.hidden_size, self.head_dim)
        self.weights_proj = linear(c.hidden_size, self.num_heads)
        self.k_norm = nn.LayerNorm(self.head_dim, eps=1e-6)

    def forward(self, x, q_latent, cos, sin):
        """x [B,T,hidden_size], q_latent [B,T,q_lora_rank] -> scores [B,T,T] fp32."""
        x, q_latent = x.detach(), q_latent.detach()
        batch, length, _ = x.shape
        q = self.wq_b(q_latent).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_norm(self.wk(x).float()).to(q.dtype)
        q = torch.cat([rope(q[..., : self.rope_dim], cos, sin), q[..., self.rope_dim:]], -1)
        k = torch.cat([rope(k[..., : self.rope_dim], cos, sin), k[..., self.rope_dim:]], -1)
        weights = F.linear(x.float(), self.weights_proj.weight.float()) * self.num_heads**-0.5  # [B,T,heads]
        products = torch.relu(q @ k.transpose(-1, -2).unsqueeze(1)).float() * self.head_dim**-0.5
        return (products * weights.transpose(1, 2).unsqueeze(-1)).sum(1)


class Attention(nn.Module):
    def __init__(self, c, indexer_type):
        super().__init__()
        self.c = c
        self.qk_head_dim = c.qk_nope_head_dim + c.qk_rope_head_dim
        heads = c.num_attention_heads
        self.q_a_proj = linear(c.hidden_size, c.q_lora_rank)
        self.q_a_layernorm = RMSNorm(c.q_lora_rank, c.rms_norm_eps)
        self.q_b_proj = linear(c.q_lora_rank, heads * self.qk_head_dim)
        self.kv_a_proj_with_mqa = linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, c.rms_norm_eps)
        self.kv_b_proj = linear(c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim))
        self.o_proj = linear(heads * c.v_head_dim, c.hidden_size, 0.3)
        self.indexer = Indexer(c) if indexer_type == "full" else None

    def forward(self, x, cos, sin, allowed, selected, mode):
        """x [B,T,hidden_size], allowed [B,T,T] bool, selected [B,T,T] bool of the last full layer (or None).

        mode "dense" ignores the indexer; "warmup" scores but attends to everything allowed; "sparse" attends to
        the index_topk best. Returns output, selected, index scores (full layers) and the mean attention [B,T,T].
        """
        c = self.c
        batch, length, _ = x.shape
        q_latent = self.q_a_layernorm(self.q_a_proj(x))
        q = self.q_b_proj(q_latent).view(batch, length, c.num_attention_heads, self.qk_head_dim).transpose(1, 2)
        kv_latent, k_rope = self.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(kv_latent))
        kv = kv.view(batch, length, c.num_attention_heads, -1).transpose(1, 2)
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        k_rope = rope(k_rope, cos, sin).unsqueeze(1).expand(-1, c.num_attention_heads, -1, -1)
        q = torch.cat([q[..., : c.qk_nope_head_dim], rope(q[..., c.qk_nope_head_dim:], cos, sin)], -1)
        k = torch.cat([k_nope, k_rope], -1)

        scores = None
        if mode != "dense" and self.indexer is not None:
            scores = self.indexer(x, q_latent, cos, sin).masked_fill(~allowed, -torch.inf)
            selected = allowed
            if mode == "sparse" and length > c.index_topk:
                top = scores.detach().topk(c.index_topk, -1, sorted=False).indices
                selected = torch.zeros_like(allowed).scatter_(-1, top, True) & allowed
        mask = allowed if mode == "dense" else selected
        logits = (q @ k.transpose(-1, -2)).float() * self.qk_head_dim**-0.5  # [B,H,T,T]
        probs = logits.masked_fill(~mask.unsqueeze(1), -torch.inf).softmax(-1)
        mean_probs = probs.detach().mean(1) if mode != "dense" else None
        out = (probs.to(v.dtype) @ v).transpose(1, 2).reshape(batch, length, -1)
        return self.o_proj(out), selected, scores, mean_probs


class DenseMlp(nn.Module):
    def __init__(self, hidden_size, intermediate_size):
        super().__init__()
        self.gate_proj = linear(hidden_size, intermediate_size)
        self.up_proj = linear(hidden_size, intermediate_size)
        self.down_proj = linear(intermediate_size, hidden_size, 0.3)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SparseMlp(nn.Module):
    """The noaux_tc router, the routed experts and the shared expert.

    All experts are computed for every token and weighted (with zeros for those not chosen): at this size two large
    matrix products are faster than grouping tokens by expert.
    """

    def __init__(self, c):
        super().__init__()
        self.c = c
        shape = (c.n_routed_experts, c.moe_intermediate_size, c.hidden_size)
        self.gate = linear(c.hidden_size, c.n_routed_experts)
        self.gate.register_buffer("e_score_correction_bias", torch.zeros(c.n_routed_experts))
        self.experts_gate_proj = nn.Parameter(torch.randn(shape) * c.hidden_size**-0.5)  # [E,I,hidden_size]
        self.experts_up_proj = nn.Parameter(torch.randn(shape) * c.hidden_size**-0.5)  # [E,I,hidden_size]
        self.experts_down_proj = nn.Parameter(  # [E,hidden_size,I]
            torch.randn(shape).transpose(1, 2).contiguous() * 0.3 * c.moe_intermediate_size**-0.5
        )
        self.shared_experts = DenseMlp(c.hidden_size, c.moe_intermediate_size)

    def forward(self, x):
        """x [B,T,hidden_size] -> output, tokens per expert [E]."""
        c = self.c
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.gate.weight.float()).sigmoid()  # [B,T,E]
            chosen = (scores + self.gate.e_score_correction_bias).topk(c.num_experts_per_tok, -1).indices
            picked = torch.zeros_like(scores).scatter_(-1, chosen, 1.0)
            weights = scores * picked
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * c.routed_scaling_factor
        hidden = F.silu(F.linear(x, self.experts_gate_proj.flatten(0, 1))) * F.linear(x, self.experts_up_proj.flatten(0, 1))
        hidden = hidden.unflatten(-1, (c.n_routed_experts, c.moe_intermediate_size)) * weights.unsqueeze(-1).to(hidden.dtype)
        routed = F.linear(hidden.flatten(-2), self.experts_down_proj.permute(1, 0, 2).flatten(1))
        return routed + self.shared_experts(x), picked.sum((0, 1))


class DecoderLayer(nn.Module):
    def __init__(self, c, indexer_type, mlp_type):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, indexer_type)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = SparseMlp(c) if mlp_type == "sparse" else DenseMlp(c.hidden_size, c.intermediate_size)

    def forward(self, h, cos, sin, allowed, selected, mode):
        """h [B,T,hidden_size] -> h, selected, index scores, mean attention, expert load [E] or None."""
        out, selected, scores, mean_probs = self.self_attn(self.input_layernorm(h), cos, sin, allowed, selected, mode)
        h = h + out
        out, load = self.mlp(self.post_attention_layernorm(h)), None
        if isinstance(self.mlp, SparseMlp):
            out, load = out
        return h + out, selected, scores, mean_probs, load


class MtpLayer(DecoderLayer):
    """A full decoder layer over the previous hidden state and the next token's embedding."""

    def __init__(self, c):
        super().__init__(c, "full", "sparse")
        self.enorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.hnorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.eh_proj = linear(2 * c.hidden_size, c.hidden_size)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(c.hidden_size, c.rms_norm_eps)})


@dataclasses.dataclass
class Output:
    logits: torch.Tensor  # [B,T,vocab_size] for token i+1
    mtp_logits: torch.Tensor  # [B,T,vocab_size] for token i+2, or None
    indexer_loss: torch.Tensor  # mean KL(attention || indexer) over full layers; 0 in dense mode
    loads: list  # per sparse layer [E], MTP last


def indexer_kl(scores, attention, mask):
    """KL of the indexer's softmax over `mask` from the attention it must predict, both [B,T,T]."""
    target = attention / attention.sum(-1, keepdim=True)
    log_q = scores.masked_fill(~mask, -torch.inf).log_softmax(-1).masked_fill(~mask, 0.0)
    log_p = target.clamp_min(1e-9).log().masked_fill(~mask, 0.0)
    return (target * (log_p - log_q)).sum(-1).mean()


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        layers = [DecoderLayer(c, i, m) for i, m in zip(c.indexer_types, c.mlp_layer_types)]
        self.layers = nn.ModuleList(layers + [MtpLayer(c)])
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = linear(c.hidden_size, c.vocab_size, 0.1)

    def forward(self, tokens, next_tokens, allowed, mode):
        """tokens, next_tokens [B,T] (next_tokens None: no MTP), allowed [B,T,T] bool -> Output."""
        cos, sin = rope_tables(self.config, tokens.shape[1], tokens.device)
        h = self.embed_tokens(tokens)
        selected, loads, groups = None, [], []
        for layer in self.layers[:-1]:
            h, selected, scores, probs, load = layer(h, cos, sin, allowed, selected, mode)
            if load is not None:
                loads.append(load)
            if scores is not None:  # a full layer opens a group, the shared layers behind it join
                groups.append([scores, probs, selected])
            elif mode != "dense":
                groups[-1][1] = groups[-1][1] + probs
        h = self.norm(h)
        mtp_logits = None
        if next_tokens is not None:
            mtp = self.layers[-1]
            x = mtp.eh_proj(torch.cat([mtp.enorm(self.embed_tokens(next_tokens)), mtp.hnorm(h)], -1).to(h.dtype))
            x, selected, scores, probs, load = mtp(x, cos, sin, allowed, None, mode)
            loads.append(load)
            if scores is not None:
                groups.append([scores, probs, selected])
            mtp_logits = self.lm_head(mtp.shared_head["norm"](x))
        losses = [indexer_kl(*group) for group in groups]
        indexer_loss = torch.stack(losses).mean() if losses else h.new_zeros(())
        return Output(self.lm_head(h), mtp_logits, indexer_loss, loads)


def causal_mask(tokens):
    """[B,T,T] bool: every earlier position, for one document per row."""
    batch, length = tokens.shape
    return torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril().expand(batch, -1, -1)
