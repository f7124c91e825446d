"""llama.cpp or ik_llama.cpp (both are a libllama; two of them do not fit into one process) measured on a GGUF file.

    python3 bench/peers/libllama.py ENGINE LIBRARIES FILE THREADS EXPERTS SEED [--plain]

`llama_cpp.py` calls it and reads the JSON that it prints: windows of decode steps by batch size, prompts, distinct experts. With --plain
matrices stay as the file has them and only prompts are measured.
"""

import ctypes
import json
import math
import random
import re
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from receipts import steal_ticks
from slices import VOCAB

CONTEXT, PROMPT, BATCHES = 128, 512, (1, 2, 4, 8)
WINDOWS, STEPS, WARM, PROMPTS = 3, 16, 2, 2
# Windows in which the host took more of the processors' time than this are measured again.
STEAL_PCT = 2


class Batch(ctypes.Structure):
    """llama_batch; the members after `logits` are ik_llama.cpp's."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
        ("all", ctypes.c_int32 * 3),
    ]


class Params(ctypes.Union):
    """Parameters by value. Larger than any version's: only some members are set, the rest keeps its defaults."""

    _fields_ = [("words", ctypes.c_uint32 * 128), ("bytes", ctypes.c_uint8 * 512), ("pointers", ctypes.c_uint64 * 64)]


class Tensor(ctypes.Structure):
    """The first members of ggml_tensor."""

    _fields_ = [("type", ctypes.c_int32), ("backend", ctypes.c_int32), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4)]


EVALUATED = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.POINTER(Tensor), ctypes.c_bool, ctypes.c_void_p)


class Engine:
    """What both have in common: loading, contexts, decoding."""

    name = None
    libraries = {}  # attribute and pattern of file names, in the order in which they depend on each other

    def __init__(self, directory, path, threads, plain=False):
        for attribute, pattern in self.libraries.items():
            found = sorted(Path(directory).glob(pattern))
            assert found, f"{self.name}: no {pattern} in {directory}"
            setattr(self, attribute, ctypes.CDLL(str(found[0]), ctypes.RTLD_GLOBAL))
        lib = self.llama
        # Errors only.
        self.log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
            lambda level, text, _: print(text.decode(errors="replace"), end="", file=sys.stderr) if level == 4 else None
        )
        lib.llama_log_set(self.log, None)
        for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_get_logits_ith"):
            getattr(lib, name).restype = ctypes.c_void_p
        lib.llama_model_default_params.restype = lib.llama_context_default_params.restype = Params
        lib.llama_batch_init.restype = Batch
        lib.llama_model_load_from_file.argtypes = [ctypes.c_char_p, Params]
        lib.llama_init_from_model.argtypes = [ctypes.c_void_p, Params]
        lib.llama_decode.argtypes = [ctypes.c_void_p, Batch]
        lib.llama_free.argtypes = [ctypes.c_void_p]
        self.threads, self.plain = threads, plain
        self.prepare(directory)
        self.model = lib.llama_model_load_from_file(str(path).encode(), self.model_params())
        assert self.model, f"{self.name} does not load the file"
        self.batch = lib.llama_batch_init(2048, 0, 1)

    def open(self, evaluated=None):
        """A new context. `evaluated` is called with each tensor of a graph."""
        params = self.llama.llama_context_default_params()
        self.context_params(params)
        if evaluated:
            # The callback stands behind the seven defaults of YaRN and defragmentation, in both engines.
            words, minus = list(params.words), 0xBF800000
            at = next(i for i in range(8, 40) if words[i : i + 4] == [minus] * 4 and words[i + 5] == minus) + 6
            params.pointers[(at + 1) // 2] = ctypes.cast(evaluated, ctypes.c_void_p).value
        self.context = ctypes.c_void_p(self.llama.llama_init_from_model(self.model, params))
        assert self.context, f"{self.name} makes no context"
        self.llama.llama_set_n_threads(self.context, self.threads, self.threads)

    def close(self):
        self.llama.llama_free(self.context)

    def decode(self, rows):
        """`rows`: (token, position, sequence, whether logits are wanted). Gives the last row's logits."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, logits) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, logits
        status = self.llama.llama_decode(self.context, batch)
        assert status == 0, f"llama_decode: {status}"
        return ctypes.cast(self.llama.llama_get_logits_ith(self.context, len(rows) - 1), ctypes.POINTER(ctypes.c_float))


class LlamaCpp(Engine):
    name = "llama.cpp"
    libraries = {"tensors": "libggml-base*.so", "ggml": "libggml.*so", "llama": "libllama.*so"}

    def prepare(self, directory):
        self.ggml.ggml_backend_load_all_from_path(str(directory).encode())
        self.llama.llama_get_memory.restype = ctypes.c_void_p

    def model_params(self):
        return self.llama.llama_model_default_params()

    def context_params(self, params):
        assert tuple(params.words[0:4]) == (512, 2048, 512, 1), f"unknown llama_context_params: {list(params.words[0:10])}"
        params.words[0:4] = (1024 * max(BATCHES), 2048, 512, max(BATCHES))

    def forget(self, sequence, position):
        """Drops what a sequence holds from a position on."""
        memory = ctypes.c_void_p(self.llama.llama_get_memory(self.context))
        self.llama.llama_memory_seq_rm(memory, sequence, position, -1)


class IkLlamaCpp(Engine):
    """What its users turn on beyond its defaults (which have fused experts, flash attention and MLA's third form on): `-rtr` (matrices are
    interleaved when they are loaded: 1.5 times the speed in decoding, and a prompt that may be slower), `-muge`, `-mqkv`."""

    name = "ik_llama.cpp"
    libraries = {"tensors": "**/libggml.so", "llama": "**/libllama.so"}
    # Where members of llama_model_params stand, their defaults and what they become.
    MODEL_WORDS = {"mla": (3, 0, 3), "n_seq_max": (12, 1, max(BATCHES)), "n_ubatch": (13, 512, 512)}
    MODEL_FLAGS = {"use_mmap": (169, 1), "repack_tensors": (172, 0), "merge_qkv": (175, 0), "merge_up_gate_exps": (176, 0), "flash_attn": (179, 1)}

    def prepare(self, directory):
        self.llama.llama_backend_init()

    def model_params(self):
        params = self.llama.llama_model_default_params()
        for name, (at, default, value) in self.MODEL_WORDS.items():
            assert params.words[at] == default, f"unknown llama_model_params: {name}"
            params.words[at] = value
        for name, (at, default) in self.MODEL_FLAGS.items():
            assert params.bytes[at] == default, f"unknown llama_model_params: {name}"
        for name in [] if self.plain else ["repack_tensors", "merge_qkv", "merge_up_gate_exps"]:
            params.bytes[self.MODEL_FLAGS[name][0]] = 1
        return params

    def context_params(self, params):
        assert tuple(params.words[1:5]) == (512, 2048, 512, 1), f"unknown llama_context_params: {list(params.words[0:10])}"
        params.words[1:5] = (1024 * max(BATCHES), 2048, 512, max(BATCHES))

    def forget(self, sequence, position):
        self.llama.llama_kv_cache_seq_rm(self.context, sequence, position, -1)


ENGINES = {engine.name: engine for engine in (LlamaCpp, IkLlamaCpp)}


def quiet(measure):
    """The first of five windows that the host left alone, the share that it took of the others, how many were discarded."""
    for discarded in range(5):
        before = steal_ticks()
        result = measure()
        after = steal_ticks()
        steal = 100 * (after[0] - before[0]) / max(1, after[1] - before[1])
        if steal <= STEAL_PCT:
            break
    return result, round(steal, 2), discarded


def measure(engine, rng, batches=BATCHES):
    """Milliseconds of decode steps by batch size, seconds of prompts, steal, windows discarded for it."""
    token = lambda: rng.randrange(VOCAB)
    samples = {"steps_ms": {}, "prompt_s": [], "steal_pct": [], "discarded_windows": 0}

    def window(call, *arguments):
        result, steal, discarded = quiet(lambda: call(*arguments))
        samples["steal_pct"].append(steal)
        samples["discarded_windows"] += discarded
        return result

    def steps(size):
        times = []
        for step in range(WARM + STEPS):
            rows = [(token(), CONTEXT + step, sequence, 1) for sequence in range(size)]
            start = time.perf_counter()
            engine.decode(rows)
            times.append(round(1e3 * (time.perf_counter() - start), 3))
        for sequence in range(size):
            engine.forget(sequence, CONTEXT)
        return times[WARM:]

    def prompt():
        rows = [(token(), i, 0, i == PROMPT - 1) for i in range(PROMPT)]
        start = time.perf_counter()
        engine.decode(rows)
        elapsed = time.perf_counter() - start
        engine.forget(0, 0)
        return elapsed

    engine.open()
    for sequence in range(max(batches, default=0)):
        engine.decode([(token(), i, sequence, i == CONTEXT - 1) for i in range(CONTEXT)])
    for size in batches:
        samples["steps_ms"][size] = [window(steps, size) for _ in range(WINDOWS)]
    for sequence in range(max(batches, default=0)):
        engine.forget(sequence, 0)
    samples["prompt_s"] = [window(prompt) for _ in range(PROMPTS)]
    engine.close()
    return samples


def distinct_experts(engine, rng, experts):
    """The mean over layers and steps of how many different experts a step of so many rows chooses. Checks logits as well."""
    chosen = []

    def evaluated(tensor, ask, _):
        wanted = re.fullmatch(rb"ffn_moe_topk-\d+", engine.tensors.ggml_get_name(tensor)) is not None
        if wanted and not ask:
            found, at = tensor.contents, engine.tensors.ggml_get_data(tensor)
            ids = {ctypes.c_int32.from_address(at + row * found.nb[1] + i * found.nb[0]).value for row in range(found.ne[1]) for i in range(found.ne[0])}
            assert ids <= set(range(experts)), f"experts {sorted(ids)}"
            chosen.append(len(ids))
        return wanted or not ask

    engine.tensors.ggml_get_name.restype = ctypes.c_char_p
    engine.tensors.ggml_get_data.restype = ctypes.c_void_p
    callback = EVALUATED(evaluated)
    engine.open(callback)
    means = {}
    for size in BATCHES:
        chosen.clear()
        for step in range(4):
            logits = engine.decode([(rng.randrange(VOCAB), step, sequence, 1) for sequence in range(size)])[:VOCAB]
            assert all(map(math.isfinite, logits)) and max(logits) - min(logits) > 0.1, "logits are not finite or all the same"
        assert chosen, "no tensor holds the experts"
        means[size] = round(statistics.mean(chosen), 2)
        for sequence in range(size):
            engine.forget(sequence, 0)
    engine.close()
    return means


def main():
    name, directory, path, threads, experts, seed, *plain = sys.argv[1:]
    rng = random.Random(int(seed))
    engine = ENGINES[name](directory, path, int(threads), bool(plain))
    samples = measure(engine, rng, () if plain else BATCHES)
    if not plain:
        samples["distinct_experts"] = distinct_experts(engine, rng, int(experts))
    print(json.dumps(samples))


if __name__ == "__main__":
    main()
