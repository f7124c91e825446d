"""llama.cpp's quantizers beside ours on the bundled model, at equal bits. Writes a receipt.

    cargo build --release -p moellon
    python3 bench/surgery.py calibrate WORK
    pip install numpy gguf
    npm pack @node-llama-cpp/linux-x64 && tar xzf node-llama-cpp-linux-x64-*.tgz     # llama.cpp prebuilt for every CPU
    python3 bench/peers/llama_quantize.py package/bins/linux-x64 WORK

Matrices go through `ggml_quantize_chunk`, the function that llama-quantize calls for every tensor, with an importance
matrix: the E[x²] of every input channel, an expert each, from the same calibration that ours uses. What it wrote is
decoded (by gguf-py) to f32 and put back into the bundled model, and one program (`moellon compare`) judges both.

K-quants and i-quants come in blocks of 256. So only matrices of 256 columns are quantized, on both sides, and the others
(experts' down_proj of 64, two halves of kv_b_proj, q_b_proj) stay bf16: otherwise llama.cpp would have to fall back to
its oldest types. Bits are those of the quantized matrices. llama-quantize's own mixtures are the head in Q6_K and the
rest in one type (its other exceptions are for matrices that are left out here); ours of the same kind is the head in
affine-6. To have no more bits than the other side, some of our matrices get groups of 128 instead of 64.
"""

import ctypes
import json
import shutil
import struct
import sys
from pathlib import Path

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from receipts import NAME, ROOT, steal_ticks, write
from surgery import JUDGED_TOKENS, call, compare, fresh

MODEL = ROOT / "models/moellon-tiny"
BLOCK = 256
# Pairs of (type of the matrices, type of the head).
THEIRS = [("IQ3_XXS", None), ("Q3_K", None), ("IQ3_S", None), ("Q3_K", "Q6_K"), ("IQ3_S", "Q6_K"), ("IQ4_XS", None), ("Q4_K", None), ("IQ4_NL", None), ("IQ4_XS", "Q6_K"), ("Q4_K", "Q6_K"), ("Q5_K", None), ("Q6_K", None)]


def load(path):
    """Name to (dtype, shape, bytes)."""
    data = Path(path).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    return {name: (e["dtype"], e["shape"], data[8 + length + e["data_offsets"][0] : 8 + length + e["data_offsets"][1]]) for name, e in header.items()}


def save(path, tensors):
    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))


def as_floats(tensor):
    dtype, shape, data = tensor
    assert dtype == "BF16", dtype
    return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)


class Importance:
    def __init__(self, stats):
        self.tensors = {}
        for path in sorted(Path(stats).glob("*.safetensors")):
            self.tensors |= load(path)
        self.aliases = json.loads((Path(stats) / "config.json").read_text())["moellon_stats"]["aliases"]

    def of(self, module, expert):
        found = self.tensors.get(f"{self.aliases.get(module, module)}.input_sq")
        return None if found is None else np.frombuffer(found[2], np.float32).reshape(found[1])[expert]


def modules(tensors):
    """Weights of 256 columns: tensor name, module name as in plans, expert. Routers and the indexer's head weights stay."""
    for name, (dtype, shape, _) in tensors.items():
        if dtype != "BF16" or len(shape) != 2 or shape[1] % BLOCK or ".mlp.gate." in name or "weights_proj" in name:
            continue
        module, expert = name.removesuffix(".weight"), 0
        if ".experts." in module:
            block, rest = module.split(".experts.")
            number, projection = rest.split(".")
            module, expert = f"{block}.experts.{projection}", int(number)
        yield name, module, expert


def library(folder):
    for name in ("libggml-base.so",):
        ggml = ctypes.CDLL(str(Path(folder).resolve() / name), mode=ctypes.RTLD_GLOBAL)
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int64] * 3 + [ctypes.c_void_p]
    for name in ("ggml_version", "ggml_commit"):
        getattr(ggml, name).restype = ctypes.c_char_p
    return ggml


def quantized(ggml, values, kind, importance):
    """What `kind` makes of a matrix, decoded, and its bytes."""
    rows, cols = values.shape
    kind = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    out = np.zeros((rows, cols // block * size), np.uint8)
    source = np.ascontiguousarray(values)
    weights = None if importance is None else np.ascontiguousarray(importance)
    written = ggml.ggml_quantize_chunk(kind.value, source.ctypes.data, out.ctypes.data, 0, rows, cols, None if weights is None else weights.ctypes.data)
    assert written == out.nbytes, (written, out.nbytes)
    return gguf.quants.dequantize(out, kind).astype(np.float32), out.nbytes


def theirs(ggml, tensors, importance, work, kind, head):
    changed, size_bytes, weights = dict(tensors), 0, 0
    for name, module, expert in modules(tensors):
        values = as_floats(tensors[name])
        decoded, nbytes = quantized(ggml, values, head if head and module == "lm_head" else kind, importance.of(module, expert))
        changed[name] = ("F32", list(decoded.shape), decoded.tobytes())
        size_bytes, weights = size_bytes + nbytes, weights + values.size
    out = fresh(Path(work) / "llama")
    out.mkdir(parents=True)
    for path in MODEL.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copy(path, out)
    save(out / "model.safetensors", changed)
    result = compare(out)
    shutil.rmtree(out)
    return 8 * size_bytes / weights, result


def ours(tensors, work, bits, head, limit, stats):
    """Affine with `bits`, as much of it in groups of 64 as `limit` bits a weight allow, the rest in groups of 128."""
    sizes = {}
    for name, module, _ in modules(tensors):
        sizes[module] = sizes.get(module, 0) + tensors[name][1][0] * tensors[name][1][1]
    total = sum(sizes.values())
    fixed = {"lm_head": head} if head else {}
    bits_of = lambda kind: {"affine-6": 6.5}[kind]
    spent = sum(sizes[m] * (bits_of(fixed[m]) if m in fixed else bits + 0.25) for m in sizes)
    rules, used = [{"modules": "*", "format": "bf16"}], spent
    # Experts first: they are most of a model.
    for module in sorted(sizes, key=lambda m: (".experts." not in m, m)):
        kind = fixed.get(module)
        if kind is None:
            more = sizes[module] * 0.25
            wide = (used + more) / total <= limit + 1e-9
            used += more if wide else 0
            kind = f"affine-{bits}" if wide else f"affine-{bits}-g128"
        rules.append({"modules": module, "format": kind})
    if used / total > limit + 1e-9:
        return None
    plan = Path(work) / "llama-plan.json"
    plan.write_text(json.dumps({"schema": 1, "name": "as many bits as llama.cpp", "rules": rules}))
    found = {}
    for method in ("rtn", "gptq"):
        out = fresh(Path(work) / "candidate")
        call("quantize", "--plan", plan, "--method", method, *(["--stats", stats] if method == "gptq" else []), "--out", out)
        found[method] = compare(out)
        shutil.rmtree(out)
    return used / total, found


def main(folder, work):
    stolen = steal_ticks()
    ggml, tensors, stats = library(folder), load(MODEL / "model.safetensors"), Path(work) / "stats"
    importance = Importance(stats)
    counted = sum(tensors[name][1][0] * tensors[name][1][1] for name, _, _ in modules(tensors))
    everything = sum(np.prod(shape) for _, shape, _ in tensors.values())
    rows, samples = [], [{"ggml": ggml.ggml_version().decode(), "commit": ggml.ggml_commit().decode(), "quantized_weights": counted, "all_weights": int(everything)}]
    for kind, head in THEIRS:
        size, result = theirs(ggml, tensors, importance, work, kind, head)
        mine = ours(tensors, work, int(size - (0.2 if head else 0)), "affine-6" if head else None, size, stats)
        samples.append({"llama": kind, "head": head, "bits_per_weight": size, **result})
        row = {"llama.cpp": kind + (f", head {head}" if head else ""), "bits": f"{size:.3f}", "KL": f"{result['kl_mean']:.4f}", "same token": f"{100 * result['top1_agreement']:.1f} %"}
        if mine:
            bits, found = mine
            for method, one in found.items():
                samples.append({"ours": method, "head": "affine-6" if head else None, "bits_per_weight": bits, **one})
            best = found["gptq"]
            row |= {"ours": f"affine-{int(size - (0.2 if head else 0))}" + (", head affine-6" if head else ""), "bits, ours": f"{bits:.3f}", "KL rtn": f"{found['rtn']['kl_mean']:.4f}", "KL gptq": f"{best['kl_mean']:.4f} ± {best['kl_standard_error']:.4f}", "ours / llama.cpp": f"{best['kl_mean'] / result['kl_mean']:.2f}", "same token, ours": f"{100 * best['top1_agreement']:.1f} %"}
        rows.append(row)
        print(row, flush=True)
    commands = ["python3 bench/peers/llama_quantize.py package/bins/linux-x64 WORK", f"{NAME} quantize --plan PLAN --method gptq --stats WORK/stats --out OUT; compare -m OUT --max-tokens {JUDGED_TOKENS} --json"]
    write("surgery-llama", commands, samples, {"surgery-llama": [row for row in rows if "ours" in row]}, stolen)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
