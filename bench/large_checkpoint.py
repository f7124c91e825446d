"""Writes a large checkpoint of random weights, to measure opening and loading at real sizes.

    python3 bench/large_checkpoint.py DIRECTORY [--layers 28]

Qwen3-30B-A3B's shapes in MLX affine-4 (group 64, bf16 scales), one shard a layer: about 0.36 GB a layer, 10 GB with the
default 28. Needs nothing but Python.
"""

import argparse
import json
import os
import random
import struct

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
    options = parser.parse_args()
    os.makedirs(options.directory, exist_ok=True)
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
