"""Writes a large checkpoint of random weights, to measure opening, loading and surgery at real sizes.

    python3 bench/large_checkpoint.py DIRECTORY [--layers 28]
    python3 bench/large_checkpoint.py DIRECTORY --glm-experts 24

Qwen3-30B-A3B's shapes in MLX affine-4 (group 64, bf16 scales), one shard a layer: about 0.36 GB a layer, 10 GB with the
default 28. With --glm-experts one MoE layer of GLM-5.2's shapes in bf16, of so many experts of 75.5 MB, with the bundled
model's tokenizer. Needs nothing but Python.
"""

import argparse
import array
import json
import os
import random
import shutil
import struct
from pathlib import Path

HIDDEN, EXPERTS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 2048, 128, 768, 32, 4, 128, 32768
POOL = random.Random(1).randbytes(1 << 24)


def affine4(name, *shape):
    """Tensors (name, dtype, shape) of an affine-4 weight of that shape."""
    *stack, rows, cols = shape
    yield f"{name}.weight", "U32", [*stack, rows, cols // 8]
    yield f"{name}.scales", "BF16", [*stack, rows, cols // 64]
    yield f"{name}.biases", "BF16", [*stack, rows, cols // 64]


def layer_tensors(layer):
    prefix = f"model.layers.{layer}"
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    yield from affine4(f"{attention}.q_proj", HEADS * HEAD_DIM, HIDDEN)
    yield from affine4(f"{attention}.k_proj", KV_HEADS * HEAD_DIM, HIDDEN)
    yield from affine4(f"{attention}.v_proj", KV_HEADS * HEAD_DIM, HIDDEN)
    yield from affine4(f"{attention}.o_proj", HIDDEN, HEADS * HEAD_DIM)
    for norm, size in [("self_attn.q_norm", HEAD_DIM), ("self_attn.k_norm", HEAD_DIM), ("input_layernorm", HIDDEN), ("post_attention_layernorm", HIDDEN)]:
        yield f"{prefix}.{norm}.weight", "BF16", [size]
    yield f"{mlp}.gate.weight", "BF16", [EXPERTS, HIDDEN]
    yield from affine4(f"{mlp}.switch_mlp.gate_proj", EXPERTS, WIDTH, HIDDEN)
    yield from affine4(f"{mlp}.switch_mlp.up_proj", EXPERTS, WIDTH, HIDDEN)
    yield from affine4(f"{mlp}.switch_mlp.down_proj", EXPERTS, HIDDEN, WIDTH)


# GLM-5.2: one layer with its own indexer, and a small vocabulary.
GLM = {
    "model_type": "glm_moe_dsa", "architectures": ["GlmMoeDsaForCausalLM"], "hidden_size": 6144, "num_hidden_layers": 1,
    "num_nextn_predict_layers": 0, "moe_intermediate_size": 2048, "intermediate_size": 12288, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_attention_heads": 64, "num_key_value_heads": 64,
    "q_lora_rank": 2048, "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "qk_head_dim": 256,
    "v_head_dim": 256, "index_head_dim": 128, "index_n_heads": 32, "index_topk": 2048, "indexer_types": ["full"],
    "mlp_layer_types": ["sparse"], "first_k_dense_replace": 0, "vocab_size": 4096, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 8000000.0, "rope_type": "default"}, "max_position_embeddings": 4096,
    "attention_bias": False, "hidden_act": "silu", "tie_word_embeddings": False, "eos_token_id": 4072,
}


def glm_tensors(experts):
    hidden, inner, heads = GLM["hidden_size"], GLM["moe_intermediate_size"], GLM["num_attention_heads"]
    q_rank, kv_rank, rope = GLM["q_lora_rank"], GLM["kv_lora_rank"], GLM["qk_rope_head_dim"]
    index_heads, index_dim = GLM["index_n_heads"], GLM["index_head_dim"]
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    matrix = lambda name, *shape: (f"{name}.weight", "BF16", list(shape))
    yield matrix("model.embed_tokens", GLM["vocab_size"], hidden)
    yield matrix("lm_head", GLM["vocab_size"], hidden)
    yield matrix("model.norm", hidden)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield matrix(f"model.layers.0.{norm}", hidden)
    yield matrix(f"{attention}.q_a_proj", q_rank, hidden)
    yield matrix(f"{attention}.q_a_layernorm", q_rank)
    yield matrix(f"{attention}.q_b_proj", heads * GLM["qk_head_dim"], q_rank)
    yield matrix(f"{attention}.kv_a_proj_with_mqa", kv_rank + rope, hidden)
    yield matrix(f"{attention}.kv_a_layernorm", kv_rank)
    yield matrix(f"{attention}.kv_b_proj", heads * (GLM["qk_nope_head_dim"] + GLM["v_head_dim"]), kv_rank)
    yield matrix(f"{attention}.o_proj", hidden, heads * GLM["v_head_dim"])
    yield matrix(f"{attention}.indexer.wq_b", index_heads * index_dim, q_rank)
    yield matrix(f"{attention}.indexer.wk", index_dim, hidden)
    yield matrix(f"{attention}.indexer.k_norm", index_dim)
    yield (f"{attention}.indexer.k_norm.bias", "BF16", [index_dim])
    yield matrix(f"{attention}.indexer.weights_proj", index_heads, hidden)
    yield matrix(f"{mlp}.gate", experts, hidden)
    yield (f"{mlp}.gate.e_score_correction_bias", "F32", [experts])
    for block in ["shared_experts", *(f"experts.{i}" for i in range(experts))]:
        yield matrix(f"{mlp}.{block}.gate_proj", inner, hidden)
        yield matrix(f"{mlp}.{block}.up_proj", inner, hidden)
        yield matrix(f"{mlp}.{block}.down_proj", hidden, inner)


def write_glm(directory, experts):
    """Normal weights of 0.02 (norms are ones, biases zeros), in shards of about 1 GB."""
    rng = random.Random(2)
    wide = array.array("f", (rng.gauss(0.0, 0.02) for _ in range(1 << 20))).tobytes()
    pool = bytearray(len(wide) // 2)
    pool[0::2], pool[1::2] = wide[2::4], wide[3::4]
    groups, size = [[]], 0
    sizes = lambda dtype, shape: {"BF16": 2, "F32": 4}[dtype] * (shape[0] if len(shape) == 1 else shape[0] * shape[1])
    for name, dtype, shape in glm_tensors(experts):
        if size + sizes(dtype, shape) > 1e9:
            groups.append([])
            size = 0
        groups[-1].append((name, dtype, shape))
        size += sizes(dtype, shape)
    weight_map, total = {}, 0
    for number, group in enumerate(groups, 1):
        shard = f"model-{number:05}-of-{len(groups):05}.safetensors"
        header, offset = {}, 0
        for name, dtype, shape in group:
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + sizes(dtype, shape)]}
            offset += sizes(dtype, shape)
            weight_map[name] = shard
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(os.path.join(directory, shard), "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name, dtype, shape in group:
                left = sizes(dtype, shape)
                if len(shape) == 1:
                    one = b"\x80\x3f" if name.endswith(".weight") else b"\0\0"
                    file.write(one * (left // 2))
                    continue
                # Every matrix begins elsewhere in the pool.
                start = 2 * rng.randrange(1 << 20)
                while left > 0:
                    left -= file.write(pool[start : start + left])
                    start = 0
        total += offset
    with open(os.path.join(directory, "model.safetensors.index.json"), "w") as file:
        json.dump({"metadata": {"total_size": total}, "weight_map": weight_map}, file)
    with open(os.path.join(directory, "config.json"), "w") as file:
        json.dump({**GLM, "n_routed_experts": experts}, file, indent=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(__file__).resolve().parent.parent / "models/moellon-tiny" / name, directory)
    print(f"{directory}: {total / 1e9:.2f} GB in {len(groups)} shards")


def write_shard(path, tensors):
    """Random codes; bf16 values are small positive numbers, so that everything is finite."""
    header, offset, sizes = {}, 0, []
    for name, dtype, shape in tensors:
        size = {"U32": 4, "BF16": 2}[dtype]
        for dim in shape:
            size *= dim
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        sizes.append((dtype, size))
        offset += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for dtype, size in sizes:
            block = POOL if dtype == "U32" else struct.pack("<H", 0x3C00) * (1 << 20)
            while size > 0:
                file.write(block[: min(size, len(block))])
                size -= len(block)
    return offset


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--glm-experts", type=int)
    options = parser.parse_args()
    os.makedirs(options.directory, exist_ok=True)
    if options.glm_experts:
        write_glm(options.directory, options.glm_experts)
        return
    config = {
        "model_type": "qwen3_moe", "hidden_size": HIDDEN, "num_hidden_layers": options.layers, "num_experts": EXPERTS,
        "num_experts_per_tok": 8, "moe_intermediate_size": WIDTH, "intermediate_size": 6144, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "vocab_size": VOCAB, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000, "max_position_embeddings": 40960, "norm_topk_prob": True, "hidden_act": "silu",
        "tie_word_embeddings": False, "eos_token_id": 0, "quantization": {"group_size": 64, "bits": 4},
    }
    shards = {f"layer-{layer:03}.safetensors": list(layer_tensors(layer)) for layer in range(options.layers)}
    shards["outside.safetensors"] = [*affine4("model.embed_tokens", VOCAB, HIDDEN), *affine4("lm_head", VOCAB, HIDDEN), ("model.norm.weight", "BF16", [HIDDEN])]
    total = sum(write_shard(os.path.join(options.directory, name), tensors) for name, tensors in shards.items())
    index = {"metadata": {"total_size": total}, "weight_map": {tensor: shard for shard, tensors in shards.items() for tensor, _, _ in tensors}}
    with open(os.path.join(options.directory, "model.safetensors.index.json"), "w") as file:
        json.dump(index, file)
    with open(os.path.join(options.directory, "config.json"), "w") as file:
        json.dump(config, file, indent=1)
    print(f"{options.directory}: {total / 1e9:.2f} GB in {len(shards)} shards")


if __name__ == "__main__":
    main()
