"""llama.cpp beside us on one machine: the same shape, about the same bits, in turns. Writes a receipt.

    cargo build --release -p moellon
    pip install numpy gguf
    npm pack @node-llama-cpp/linux-x64 && tar xzf node-llama-cpp-linux-x64-*.tgz     # llama.cpp prebuilt for every CPU
    python3 bench/peers/llama_cpp.py package/bins/linux-x64 DIRECTORY [--format F] [--rounds N]

DIRECTORY takes the synthetic GGUF file (2.1 to 2.8 GB). It is a slice of eight layers of Qwen3-30B-A3B with random weights: codes
random, scales constant, symmetric around zero, so that routing is not degenerate. We run `moellon bench` on the same slice in the
format beside it:

| F | llama.cpp | moellon |
|---|---|---|
| q4_k_m | Q4_K, Q6_K where Q4_K_M spends more bits | affine-4, groups of 64 |
| q3_k | Q3_K (3.44 bits), head in Q6_K | affine-3 (3.5 bits), head in affine-6 |
| nvfp4 | NVFP4 | NVFP4 |
| q4_0 | Q4_0 (as many bits as NVFP4, its fastest), head in Q6_K | NVFP4 |

Rounds alternate, so that a noisy neighbour meets both; a number is the median over the rounds.
"""

import argparse
import ctypes
import datetime
import hashlib
import json
import os
import random
import statistics
import subprocess
import time
from pathlib import Path

import gguf
import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
# Another binary than the one that cargo has built last, as in bench/receipts.py.
BINARY = Path(os.environ.get("MOELLON_BINARY", ROOT / "target/release/moellon")).resolve()
NAME = "target/release/moellon"
SPEC = "qwen3-30b-a3b:layers=8,vocab=32768"
LAYERS, VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, EXPERTS, TOP_K, WIDTH = 8, 32768, 2048, 32, 4, 128, 128, 8, 768
CONTEXT, PROMPT, STEPS, BATCHES = 128, 512, 16, (1, 2, 4, 8)


def q4_k(rng, rows, cols):
    """Blocks of 256: d, dmin, eight 6-bit scales and minima (all 32), codes. The middle code is zero."""
    blocks = np.zeros((rows * cols // 256, 144), np.uint8)
    scale = 1 / (np.sqrt(cols) * np.sqrt((16 * 16 - 1) / 12))
    blocks[:, 0:4] = np.frombuffer(np.array([scale / 32, 7.5 * scale / 32], np.float16).tobytes(), np.uint8)
    blocks[:, 4:12] = 0xA0
    blocks[:, 16:] = rng.integers(0, 256, blocks[:, 16:].shape, np.uint8)
    return blocks.reshape(rows, cols // 256 * 144), gguf.GGMLQuantizationType.Q4_K


def q6_k(rng, rows, cols):
    """Blocks of 256: codes, sixteen scales (all 16), d."""
    blocks = np.zeros((rows * cols // 256, 210), np.uint8)
    blocks[:, :192] = rng.integers(0, 256, blocks[:, :192].shape, np.uint8)
    blocks[:, 192:208] = 16
    scale = 1 / (np.sqrt(cols) * np.sqrt((64 * 64 - 1) / 12) * 16)
    blocks[:, 208:] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    return blocks.reshape(rows, cols // 256 * 210), gguf.GGMLQuantizationType.Q6_K


def q3_k(rng, rows, cols):
    """Blocks of 256: high bits, low bits, sixteen 6-bit scales (16 or -16: codes are -4 to 3, which is not symmetric), d."""
    blocks = rng.integers(0, 256, (rows * cols // 256, 110), np.uint8)
    blocks[:, 96:104] = 0
    blocks[:, 104:108] = blocks[:, 104:108] & 0xAA | 0x55
    scale = 1 / (np.sqrt(cols) * np.sqrt((8 * 8 - 1) / 12 + 0.25) * 16)
    blocks[:, 108:] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    return blocks.reshape(rows, cols // 256 * 110), gguf.GGMLQuantizationType.Q3_K


def q4_0(rng, rows, cols):
    """Blocks of 32: d (of either sign: codes are -8 to 7), codes."""
    blocks = rng.integers(0, 256, (rows * cols // 32, 18), np.uint8)
    scale = 1 / (np.sqrt(cols) * np.sqrt((16 * 16 - 1) / 12 + 0.25))
    signs = blocks[:, 1] & 0x80
    blocks[:, :2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    blocks[:, 1] |= signs
    return blocks.reshape(rows, cols // 32 * 18), gguf.GGMLQuantizationType.Q4_0


def nvfp4(rng, rows, cols):
    """Blocks of 64: four E4M3 scales (subnormal, in steps of 2^-9), codes."""
    blocks = rng.integers(0, 256, (rows * cols // 64, 36), np.uint8)
    blocks[:, :4] = max(1, round(512 / (np.sqrt(cols) * np.sqrt(68.5 / 8))))
    return blocks.reshape(rows, cols // 64 * 36), gguf.GGMLQuantizationType.NVFP4


# What llama.cpp has, ours beside it, and how its matrices are made: most of them, those that get more bits, the head.
FORMATS = {
    "q4_k_m": ("Q4_K_M", "affine-4", q4_k, q6_k, q6_k),
    "q3_k": ("Q3_K", "affine-3", q3_k, q3_k, q6_k),
    "nvfp4": ("NVFP4", "nvfp4", nvfp4, nvfp4, nvfp4),
    "q4_0": ("Q4_0", "nvfp4", q4_0, q4_0, q6_k),
}


def write_gguf(path, most, more_bits, head):
    """The slice. Returns the bytes that one token reads: each matrix once, 8 of 128 experts, one embedding row."""
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(LAYERS)
    writer.add_context_length(32768)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(6144)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(TOP_K)
    writer.add_expert_feed_forward_length(WIDTH)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("none")
    token_bytes = 0

    def quantized(name, make, rows, cols, count=1, used=1):
        nonlocal token_bytes
        data, dtype = make(rng, rows * count, cols)
        token_bytes += data.nbytes * used // count
        writer.add_tensor(name, data.reshape((count, rows, -1) if count > 1 else (rows, -1)), raw_dtype=dtype)

    def plain(name, *shape, std=None):
        nonlocal token_bytes
        data = np.ones(shape, np.float32) if std is None else (rng.standard_normal(shape) * std).astype(np.float32)
        token_bytes += data.nbytes
        writer.add_tensor(name, data)

    quantized("token_embd.weight", most, VOCAB, HIDDEN, used=0)
    quantized("output.weight", head, VOCAB, HIDDEN)
    plain("output_norm.weight", HIDDEN)
    for layer in range(LAYERS):
        # The layers where Q4_K_M spends more bits on values and down projections.
        more = more_bits if layer < LAYERS // 8 or layer >= 7 * LAYERS // 8 or (layer - LAYERS // 8) % 3 == 2 else most
        name = lambda part: f"blk.{layer}.{part}.weight"
        plain(name("attn_norm"), HIDDEN)
        quantized(name("attn_q"), most, HEADS * HEAD_DIM, HIDDEN)
        quantized(name("attn_k"), most, KV_HEADS * HEAD_DIM, HIDDEN)
        quantized(name("attn_v"), more, KV_HEADS * HEAD_DIM, HIDDEN)
        quantized(name("attn_output"), most, HIDDEN, HEADS * HEAD_DIM)
        plain(name("attn_q_norm"), HEAD_DIM)
        plain(name("attn_k_norm"), HEAD_DIM)
        plain(name("ffn_norm"), HIDDEN)
        plain(name("ffn_gate_inp"), EXPERTS, HIDDEN, std=HIDDEN**-0.5)
        quantized(name("ffn_gate_exps"), most, WIDTH, HIDDEN, EXPERTS, TOP_K)
        quantized(name("ffn_up_exps"), most, WIDTH, HIDDEN, EXPERTS, TOP_K)
        quantized(name("ffn_down_exps"), more, HIDDEN, WIDTH, EXPERTS, TOP_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return token_bytes


class Batch(ctypes.Structure):
    """llama_batch"""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


class Params(ctypes.Structure):
    """Parameters by value. Larger than any version's: only the first members are set, the rest keeps its defaults."""

    _fields_ = [("words", ctypes.c_uint32 * 128)]


class LlamaCpp:
    def __init__(self, binaries, path, threads):
        binaries = Path(binaries)
        load = lambda pattern: ctypes.CDLL(str(next(binaries.glob(pattern))), ctypes.RTLD_GLOBAL)
        load("libggml-base*.so")
        ggml = load("libggml.*so")
        self.lib = load("libllama.*so")
        ggml.ggml_backend_load_all_from_path(str(binaries).encode())
        # Warnings and worse only.
        self.log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
            lambda level, text, _: print(text.decode(errors="replace"), end="") if level >= 4 and level != 5 else None
        )
        self.lib.llama_log_set(self.log, None)
        for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_get_memory", "llama_get_logits_ith"):
            getattr(self.lib, name).restype = ctypes.c_void_p
        self.lib.llama_model_default_params.restype = Params
        self.lib.llama_context_default_params.restype = Params
        self.lib.llama_batch_init.restype = Batch
        self.lib.llama_model_load_from_file.argtypes = [ctypes.c_char_p, Params]
        self.lib.llama_init_from_model.argtypes = [ctypes.c_void_p, Params]
        self.lib.llama_decode.argtypes = [ctypes.c_void_p, Batch]
        model = self.lib.llama_model_load_from_file(str(path).encode(), self.lib.llama_model_default_params())
        assert model, "llama.cpp does not load the file"
        params = self.lib.llama_context_default_params()
        assert tuple(params.words[0:4]) == (512, 2048, 512, 1), f"unknown llama_context_params: {list(params.words[0:10])}"
        params.words[0:4] = (1024 * max(BATCHES), 2048, 512, max(BATCHES))
        self.context = ctypes.c_void_p(self.lib.llama_init_from_model(model, params))
        assert self.context, "llama.cpp makes no context"
        self.lib.llama_set_n_threads(self.context, threads, threads)
        self.batch = self.lib.llama_batch_init(2048, 0, 1)
        self.clear()

    def clear(self):
        self.lib.llama_memory_clear(ctypes.c_void_p(self.lib.llama_get_memory(self.context)), True)

    def decode(self, rows):
        """`rows`: (token, position, sequence, whether logits are wanted)."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, logits) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, logits
        status = self.lib.llama_decode(self.context, batch)
        assert status == 0, f"llama_decode: {status}"
        row = ctypes.cast(self.lib.llama_get_logits_ith(self.context, len(rows) - 1), ctypes.POINTER(ctypes.c_float))
        assert row[0] == row[0], "logits are NaN"

    def measure(self, rng):
        """Seconds of a decode step by batch size, and of the prompt."""
        token = lambda: rng.randrange(VOCAB)
        seconds = {}
        for size in BATCHES:
            self.clear()
            for sequence in range(size):
                self.decode([(token(), i, sequence, i == CONTEXT - 1) for i in range(CONTEXT)])
            times = []
            for step in range(STEPS + 2):
                start = time.perf_counter()
                self.decode([(token(), CONTEXT + step, sequence, 1) for sequence in range(size)])
                times.append(time.perf_counter() - start)
            # The first two warm up.
            seconds[size] = statistics.median(times[2:])
        prompts = []
        for _ in range(2):
            self.clear()
            start = time.perf_counter()
            self.decode([(token(), i, 0, i == PROMPT - 1) for i in range(PROMPT)])
            prompts.append(time.perf_counter() - start)
        return seconds, min(prompts)


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("binaries")
    arguments.add_argument("directory")
    arguments.add_argument("--format", choices=FORMATS, default="q4_k_m")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments.add_argument("--prepare", action="store_true", help="only write the GGUF file")
    options = arguments.parse_args()
    their_format, our_format, *makers = FORMATS[options.format]
    path, size_path = (Path(options.directory) / f"qwen3-slice-{options.format}.{end}" for end in ("gguf", "json"))
    if not size_path.exists():
        size_path.write_text(json.dumps(write_gguf(path, *makers)))
    token_bytes = json.loads(size_path.read_text())
    if options.prepare:
        return
    build = json.loads((Path(options.binaries) / "_nlcBuildMetadata.json").read_text())
    release = build["buildOptions"]["llamaCpp"]["release"]
    peer = LlamaCpp(options.binaries, path, options.threads)
    rng = random.Random(1)
    ours, theirs = [], []
    batches = ",".join(map(str, BATCHES))
    command = [NAME, "bench", "--synthetic", SPEC, "--format", our_format, "--batch", batches, "--context", str(CONTEXT)]
    command += ["--prompt", str(PROMPT), "--windows", "3", "--threads", str(options.threads), "--json"]
    for _ in range(options.rounds):
        theirs.append(peer.measure(rng))
        run = subprocess.run([BINARY, *command[1:]], cwd=ROOT, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        ours.append(json.loads(run.stdout))
    median = statistics.median
    read = median(report["measured_read_gb_s"] for report in ours)
    rows = []

    def row(what, us, them, digits):
        rows.append({
            "what": what, "our format": our_format, "moellon": f"{us:.{digits}f}", "its format": their_format,
            "llama.cpp": f"{them:.{digits}f}", "ratio": f"{us / them:.2f}",
        })

    for i, size in enumerate(BATCHES):
        us = median(size * 1e3 / report["results"][i]["step_ms"] for report in ours)
        row(f"decode, batch {size}, tok/s", us, median(size / seconds[size] for seconds, _ in theirs), 1)
    us = median(report["prefill"][0]["tok_s"] for report in ours)
    row(f"prefill of {PROMPT}, tok/s", us, median(PROMPT / seconds for _, seconds in theirs), 0)
    git = lambda: subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    name = "peers-llama-cpp" if options.format == "q4_k_m" else f"peers-llama-cpp-{options.format.replace('_', '-')}"
    receipt = {
        "schema": 1,
        "name": name,
        "date": datetime.date.today().isoformat(),
        "commit": os.environ.get("MOELLON_COMMIT") or git(),
        "binary_sha256": hashlib.sha256(BINARY.read_bytes()).hexdigest(),
        "machine": ours[0]["machine"] | {"backend": ours[0]["backend"], "read_gb_s": read},
        "peer": f"llama.cpp {release}, prebuilt by node-llama-cpp",
        "peer_token_bytes": token_bytes,
        "load_average": os.getloadavg(),
        "commands": [f"python3 bench/peers/llama_cpp.py BINARIES DIRECTORY --format {options.format} --rounds {options.rounds}", " ".join(command)],
        "samples": {
            "moellon": ours,
            "llama.cpp": [{"step_s": seconds, "prompt_s": prompt} for seconds, prompt in theirs],
        },
        "tables": {"peers-llama-cpp": rows},
    }
    out = ROOT / "receipts" / f"{receipt['date']}-{name}.json"
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps(receipt, indent=1) + "\n")
    temporary.rename(out)
    subprocess.run([BINARY, "receipt", "seal", out], check=True)
    print(out.relative_to(ROOT), *(" | ".join(row.values()) for row in rows), sep="\n")


if __name__ == "__main__":
    main()
