"""Slices of published shapes as GGUF files: a few layers, random weights, in a format that llama.cpp and ik_llama.cpp load.

Codes are random, scales constant and everything symmetric around zero: one-sided codes would give all rows a common bias, routing would
collapse and batches would look free (`libllama.py` counts distinct experts for that reason).
"""

import math
from typing import NamedTuple

import gguf
import numpy as np

VOCAB = 32768


def half(value):
    return np.frombuffer(np.float16(value).tobytes(), np.uint8)


def random_blocks(rng, rows, cols, block, size):
    return rng.integers(0, 256, (rows * cols // block, size), np.uint8)


def spread(cols, levels, offset=0.0):
    """The scale that gives a dot product with `cols` inputs of unit variance unit variance: `levels` even codes around `offset`."""
    return 1 / math.sqrt(cols * ((levels * levels - 1) / 12 + offset * offset))


def signed(blocks, at, scale):
    """An f16 scale at byte `at`, of either sign, where codes alone are not symmetric."""
    signs = blocks[:, at + 1] & 0x80
    blocks[:, at : at + 2] = half(scale)
    blocks[:, at + 1] |= signs


def q4_k(rng, rows, cols):
    """Blocks of 256: d, dmin, eight 6-bit scales and minima (all 32), codes. The middle code is zero."""
    blocks = random_blocks(rng, rows, cols, 256, 144)
    scale = spread(cols, 16)
    blocks[:, 0:2], blocks[:, 2:4] = half(scale / 32), half(7.5 * scale / 32)
    blocks[:, 4:12], blocks[:, 12:16] = 0xA0, 0
    return blocks, gguf.GGMLQuantizationType.Q4_K


def q6_k(rng, rows, cols):
    """Blocks of 256: codes, sixteen scales (all 16), d."""
    blocks = random_blocks(rng, rows, cols, 256, 210)
    blocks[:, 192:208] = 16
    blocks[:, 208:] = half(spread(cols, 64) / 16)
    return blocks, gguf.GGMLQuantizationType.Q6_K


def q3_k(rng, rows, cols):
    """Blocks of 256: high bits, low bits, sixteen 6-bit scales (16 or -16: codes are -4 to 3, which is not symmetric), d."""
    blocks = random_blocks(rng, rows, cols, 256, 110)
    blocks[:, 96:104] = 0
    blocks[:, 104:108] = blocks[:, 104:108] & 0xAA | 0x55
    blocks[:, 108:] = half(spread(cols, 8, 0.5) / 16)
    return blocks, gguf.GGMLQuantizationType.Q3_K


def signed_blocks(rng, rows, cols, block_bytes, codes):
    """Blocks of 32 that begin with d, of either sign because codes reach one further down than up."""
    blocks = random_blocks(rng, rows, cols, 32, block_bytes)
    signed(blocks, 0, spread(cols, codes, 0.5))
    return blocks


def q4_0(rng, rows, cols):
    """d, codes from -8 to 7."""
    return signed_blocks(rng, rows, cols, 18, 16), gguf.GGMLQuantizationType.Q4_0


def q5_0(rng, rows, cols):
    """d, fifth bits, codes from -16 to 15."""
    return signed_blocks(rng, rows, cols, 22, 32), gguf.GGMLQuantizationType.Q5_0


def q8_0(rng, rows, cols):
    """d, codes from -128 to 127."""
    return signed_blocks(rng, rows, cols, 34, 256), gguf.GGMLQuantizationType.Q8_0


def nvfp4(rng, rows, cols):
    """Blocks of 64: four E4M3 scales (subnormal, in steps of 2^-9), codes."""
    blocks = random_blocks(rng, rows, cols, 64, 36)
    blocks[:, :4] = max(1, round(512 / (math.sqrt(cols) * math.sqrt(68.5 / 8))))
    return blocks, gguf.GGMLQuantizationType.NVFP4


def mxfp4(rng, rows, cols):
    """Blocks of 32: a power of two (biased by 127, codes are doubled: 128), codes."""
    blocks = random_blocks(rng, rows, cols, 32, 17)
    blocks[:, 0] = 127 + round(math.log2(1 / (math.sqrt(cols) * math.sqrt(68.5 / 8))))
    return blocks, gguf.GGMLQuantizationType.MXFP4


def iq4_xs(rng, rows, cols):
    """Blocks of 256: d, upper 2 bits of eight 6-bit scales (48 or 16, that is 16 or -16: values are -127 to 113), lower 4, codes."""
    blocks = random_blocks(rng, rows, cols, 256, 136)
    blocks[:, 2:4] = blocks[:, 2:4] & 0xAA | 0x55
    blocks[:, 4:8] = 0
    # The sixteen values have a mean square of 4548.
    blocks[:, 0:2] = half(1 / math.sqrt(cols * 4548) / 16)
    return blocks, gguf.GGMLQuantizationType.IQ4_XS


class Format(NamedTuple):
    name: str  # what its users call it
    ours: str  # `moellon bench --format` beside it
    experts: object
    more: object  # down projections and values where Q4_K_M spends more bits
    rest: object
    head: object


FORMATS = {
    "q4_k_m": Format("Q4_K_M", "affine-4", q4_k, q6_k, q4_k, q6_k),
    "q4_0": Format("Q4_0", "nvfp4", q4_0, q4_0, q4_0, q6_k),
    "q3_k": Format("Q3_K", "affine-3", q3_k, q3_k, q3_k, q6_k),
    "nvfp4": Format("NVFP4", "nvfp4", nvfp4, nvfp4, nvfp4, nvfp4),
    "iq4_xs": Format("IQ4_XS", "affine-4", iq4_xs, iq4_xs, iq4_xs, q6_k),
    "mxfp4": Format("MXFP4, rest Q8_0", "mxfp4", mxfp4, mxfp4, q8_0, q8_0),
}


class Shape(NamedTuple):
    ours: str  # `moellon bench --synthetic`
    architecture: str
    layers: int
    experts: int
    used: int  # experts a token
    keys: dict  # GGUF metadata under the architecture's name
    # Tensors of a layer: name, role, shape. A role is a member of Format, "heads", "ones", "zeros" or "router".
    tensors: list


QWEN = Shape(
    "qwen3-30b-a3b:layers=8,vocab=32768", "qwen3moe", 8, 128, 8,
    {
        "context_length": 32768, "embedding_length": 2048, "feed_forward_length": 6144, "attention.head_count": 32,
        "attention.head_count_kv": 4, "attention.key_length": 128, "attention.value_length": 128,
        "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1e6, "expert_feed_forward_length": 768,
    },
    [
        ("attn_norm.weight", "ones", (2048,)),
        ("attn_q.weight", "rest", (4096, 2048)),
        ("attn_k.weight", "rest", (512, 2048)),
        ("attn_v.weight", "more", (512, 2048)),
        ("attn_output.weight", "rest", (2048, 4096)),
        ("attn_q_norm.weight", "ones", (128,)),
        ("attn_k_norm.weight", "ones", (128,)),
        ("ffn_norm.weight", "ones", (2048,)),
        ("ffn_gate_inp.weight", "router", (128, 2048)),
        ("ffn_gate_exps.weight", "experts", (128, 768, 2048)),
        ("ffn_up_exps.weight", "experts", (128, 768, 2048)),
        ("ffn_down_exps.weight", "more", (128, 2048, 768)),
    ],
)

# Three MoE layers, of which the first chooses the positions that all attend to, as in ours.
GLM = Shape(
    "glm-5.2-77:layers=3,vocab=32768", "glm-dsa", 3, 77, 8,
    {
        "context_length": 1048576, "embedding_length": 6144, "feed_forward_length": 12288, "attention.head_count": 64,
        "attention.head_count_kv": 1, "attention.q_lora_rank": 2048, "attention.kv_lora_rank": 512, "attention.key_length": 576,
        "attention.value_length": 512, "attention.key_length_mla": 256, "attention.value_length_mla": 256,
        "attention.layer_norm_rms_epsilon": 1e-5, "rope.dimension_count": 64, "rope.freq_base": 8e6,
        "attention.indexer.head_count": 32, "attention.indexer.key_length": 128, "attention.indexer.top_k": 2048,
        "attention.indexer.types": [1, 0, 0], "expert_feed_forward_length": 2048, "expert_shared_count": 1,
        "expert_weights_scale": 2.5, "expert_weights_norm": True, "expert_gating_func": 2, "leading_dense_block_count": 0,
    },
    [
        ("attn_norm.weight", "ones", (6144,)),
        ("attn_q_a.weight", "rest", (2048, 6144)),
        ("attn_q_a_norm.weight", "ones", (2048,)),
        ("attn_q_b.weight", "rest", (64 * 256, 2048)),
        ("attn_kv_a_mqa.weight", "rest", (576, 6144)),
        ("attn_kv_a_norm.weight", "ones", (512,)),
        ("attn_k_b.weight", "heads", (64, 512, 192)),
        ("attn_v_b.weight", "heads", (64, 256, 512)),
        ("attn_output.weight", "rest", (6144, 64 * 256)),
        ("indexer.k_norm.weight", "ones", (128,)),
        ("indexer.k_norm.bias", "zeros", (128,)),
        ("indexer.proj.weight", "router", (32, 6144)),
        ("indexer.attn_k.weight", "rest", (128, 6144)),
        ("indexer.attn_q_b.weight", "rest", (32 * 128, 2048)),
        ("ffn_norm.weight", "ones", (6144,)),
        ("ffn_gate_inp.weight", "router", (77, 6144)),
        ("exp_probs_b.bias", "zeros", (77,)),
        ("ffn_gate_exps.weight", "experts", (77, 2048, 6144)),
        ("ffn_up_exps.weight", "experts", (77, 2048, 6144)),
        ("ffn_down_exps.weight", "more", (77, 6144, 2048)),
        ("ffn_gate_shexp.weight", "rest", (2048, 6144)),
        ("ffn_up_shexp.weight", "rest", (2048, 6144)),
        ("ffn_down_shexp.weight", "more", (6144, 2048)),
    ],
)

SHAPES = {"qwen": QWEN, "glm": GLM}


def write_gguf(path, shape, formats):
    """Writes the slice. Returns the bytes that a step reads of an expert (gate, up and down of all layers) and of the rest."""
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, shape.architecture)
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
    keys = shape.keys | {"block_count": shape.layers, "vocab_size": VOCAB, "expert_count": shape.experts, "expert_used_count": shape.used}
    for key, value in keys.items():
        adders[type(value)](f"{shape.architecture}.{key}", value)
    writer.add_tokenizer_model("none")
    read = {"expert": 0, "rest": 0}

    def tensor(name, make, size):
        if callable(make):
            data, dtype = make(rng, math.prod(size[:-1]), size[-1])
            data = data.reshape(*size[:-1], -1)
        else:
            data = {"ones": np.ones, "zeros": np.zeros, "router": rng.standard_normal}[make](size).astype(np.float32)
            dtype = None
            if make == "router":
                data *= size[-1] ** -0.5
        # The embedding: one row a token, which is nothing.
        if name != "token_embd.weight":
            stack = "_exps." in name
            read["expert" if stack else "rest"] += data.nbytes // (size[0] if stack else 1)
        writer.add_tensor(name, data, raw_dtype=dtype)

    hidden = shape.keys["embedding_length"]
    tensor("token_embd.weight", formats.rest, (VOCAB, hidden))
    tensor("output.weight", formats.head, (VOCAB, hidden))
    tensor("output_norm.weight", "ones", (hidden,))
    for layer in range(shape.layers):
        more = layer < shape.layers // 8 or layer >= 7 * shape.layers // 8 or (layer - shape.layers // 8) % 3 == 2
        for name, role, size in shape.tensors:
            # Layers that share the choice of positions have no indexer.
            if name.startswith("indexer.") and not shape.keys["attention.indexer.types"][layer]:
                continue
            if role == "more" and not more:
                role = "experts" if "_exps." in name else "rest"
            # A small matrix a head: 192 columns are no block of 256, and llama.cpp aborts where its CPU back end repacks them.
            tensor(f"blk.{layer}.{name}", q5_0 if role == "heads" else getattr(formats, role, role), size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


def bytes_per_step(read, shape, distinct):
    """Bytes of one step whose rows choose `distinct` different experts a layer (a mean)."""
    return read["expert"] * distinct + read["rest"]
