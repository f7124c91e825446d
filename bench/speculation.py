"""Measures speculation and writes its receipts: the experiments that this project grew from, repeated.

    cargo build --release -p moellon
    python3 bench/speculation.py bundled       # plain and speculating decoding of the bundled model, text by text
    python3 bench/speculation.py experiments   # MTP acceptance with whole and with broken heads, DSA, fewer experts, batches
    python3 bench/speculation.py replay qwen3-30b-a3b:layers=4   # verify cost and gain on published shapes
    python3 bench/speculation.py floor qwen3-30b-a3b:layers=4    # what the governor costs where no draft is right
    python3 bench/speculation.py replay-lines PRESET FILE COMMAND  # the same from what a run on another machine printed; floor-lines too
    cargo xtask docs --write

Runs of a pair are interleaved; outputs are compared byte for byte. Needs nothing but Python.
"""

import json
import math
import os
import random
import re
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import receipts
from receipts import BINARY, NAME, ROOT, steal_ticks, write

MODEL = ROOT / "models/moellon-tiny"

CODE = '''use std::collections::HashMap;

/// Counts words.
pub fn count_words(text: &str) -> HashMap<String, usize> {
    let mut counts = HashMap::new();
'''

PYTHON = '''import os
import sys


def read_lines(path):
    with open(path) as f:
        return f.readlines()


def main(argv):
'''

EDITED = '''fn area(shape: &Shape) -> f32 {
    match shape {
        Shape::Circle { radius } => 3.14 * radius * radius,
        Shape::Square { side } => side * side,
        Shape::Rect { width, height } => width * height,
    }
}

fn name(shape: &Shape) -> &str {
    match shape {
        Shape::Circle { .. } => "circle",
        Shape::Square { .. } => "square",
        Shape::Rect { .. } => "rect",
    }
}
'''


def shuffled_prose():
    words = (MODEL / "README.md").read_text().split()
    random.Random(7).shuffle(words)
    return " ".join(words[:120])


TEXTS = {
    "code, Rust": (CODE, []),
    "code, Python": (PYTHON, []),
    # The whole file again, after it: what an edit of a line looks like to a decoder.
    "code edit, verbatim": (EDITED * 2, []),
    # Drafts fail: tokens drawn almost uniformly, and prose without an order.
    "random tokens": (CODE, ["--temp", "8"]),
    "shuffled prose": (shuffled_prose(), ["--temp", "1.5"]),
}


def run(prompt, *flags, model=None, tokens=400, timeout=120):
    where = ["-m", model] if model else []
    command = [BINARY, "run", *where, "--raw", "-p", prompt, "-n", str(tokens), "--json", *map(str, flags)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    if out.returncode != 0:
        raise SystemExit(f"{NAME} run {' '.join(map(str, flags))}: {out.stderr.strip()}")
    return json.loads(out.stdout)


def ms_per_token(result):
    return result["decode_ms"] / max(1, result["completion_tokens"] - 1)


def spread(values):
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f}-{high:.3f})"


def interleaved(prompt, modes, rounds, seeds=False, **options):
    """Results of each mode, in turn and every other round in the opposite order; the same text in all modes of a round, and
    with `seeds` another one each round."""
    results = {name: [] for name in modes}
    for index in range(rounds):
        order = list(modes.items())[:: -1 if index % 2 else 1]
        seed = ["--seed", 100 + index] if seeds else []
        for name, flags in order:
            results[name].append(run(prompt, *flags, *seed, **options))
        assert len({tuple(found[-1]["token_ids"]) for found in results.values()}) == 1, "outputs differ"
    return results


def bundled(stolen, rounds=9, floor_rounds=31):
    rows, samples, commands = [], [], []
    for text, (prompt, sampling) in TEXTS.items():
        fails = bool(sampling)
        greedy = sampling or ["--temp", "0"]
        modes = {mode: [*greedy, "--speculate", mode] for mode in ("off", "auto", "mtp", "ngram")}
        # Plain decoding once more: what processes differ without a reason.
        modes["again"] = modes["off"]
        results = interleaved(prompt, modes, floor_rounds if fails else rounds, seeds=fails)
        commands.append(f"{NAME} run --raw -p .. -n 400 --json {' '.join(greedy)} --speculate off|auto|mtp|ngram")
        plain = [ms_per_token(r) for r in results["off"]]
        again = [ms_per_token(r) for r in results["again"]]
        row = {"text": text, "plain, ms a token": spread(plain), "plain again": f"{statistics.median(a / b for a, b in zip(plain, again)):.2f}x"}
        samples.append({"text": text, "mode": "again", "plain_ms": plain, "ms": again})
        for mode in ("auto", "mtp", "ngram"):
            times = [ms_per_token(r) for r in results[mode]]
            row[mode] = f"{statistics.median(a / b for a, b in zip(plain, times)):.2f}x"
            stats = [r["speculation"] for r in results[mode]]
            tokens = [r["completion_tokens"] for r in results[mode]]
            samples.append({"text": text, "mode": mode, "plain_ms": plain, "ms": times, "tokens": tokens, "speculation": stats[-1]})
            if mode == "mtp":
                row["mtp predicted"] = f"{statistics.median(map(predicted, stats)):.2f}x"
                depths = [[sum(s["head_by_depth"][d][i] for s in stats if len(s["head_by_depth"]) > d) for i in (0, 1)] for d in range(3)]
                row["mtp right at depth 1, 2, 3"] = ", ".join(f"{100 * hits // n} %" for n, hits in depths if n) or "-"
        rows.append(row)
    write("speculation-bundled", commands, samples, {"speculation-bundled": rows}, stolen)


def predicted(stats):
    """Tokens a step over what the cost curve, measured when the program began, says that a step takes."""
    steps, drafting = stats["sequence_steps"], stats["drafts"]
    if drafting == 0:
        return 1.0
    cost, draft = sorted(map(tuple, stats["step_cost"])), sorted(map(tuple, stats["draft_cost"]))
    depth, accepted = stats["draft_tokens"] / drafting, stats["accepted_tokens"]
    # Steps with drafts, at their mean depth, and steps without.
    seconds = drafting * at(cost, 1 + depth) + (steps - drafting) * at(cost, 1)
    if stats["head_draft_tokens"]:
        # The first drafting step takes the rows that the last step gave, the others one each.
        share = stats["head_draft_tokens"] / stats["draft_tokens"]
        seconds += share * drafting * (at(draft, 1 + accepted / drafting) + (depth - 1) * at(draft, 1))
    return (steps + accepted) * at(cost, 1) / seconds


def at(curve, x):
    """A curve's value between its points."""
    for (x0, y0), (x1, y1) in zip(curve, curve[1:]):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return curve[-1][1]


def tensors(path):
    data = Path(path).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__", None)
    return {name: (entry["dtype"], entry["shape"], data[8 + length + entry["data_offsets"][0] : 8 + length + entry["data_offsets"][1]]) for name, entry in header.items()}, metadata


def write_tensors(path, values, metadata):
    header, offset = ({"__metadata__": metadata} if metadata else {}), 0
    for name, (dtype, shape, data) in values.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in values.values()))


def variant(folder, change_config=None, change_tensors=None, model=MODEL):
    """A copy of a model, the bundled one if none is named, changed."""
    shutil.copytree(model, folder)
    if change_config:
        config = json.loads((folder / "config.json").read_text())
        change_config(config)
        (folder / "config.json").write_text(json.dumps(config))
    if change_tensors:
        values, metadata = tensors(folder / "model.safetensors")
        change_tensors(values)
        write_tensors(folder / "model.safetensors", values, metadata)
    return folder


MTP = "model.layers.6"

# The tokenizer's words, for ASCII.
WORDS = re.compile(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def keep_experts(values, layer, keep):
    """Slices a layer to these experts: what pruning does."""
    block = f"model.layers.{layer}.mlp"
    for name in [n for n in values if n.startswith(f"{block}.experts.")]:
        values[name.replace(block, "old", 1)] = values.pop(name)
    for new, old in enumerate(keep):
        for name in [n for n in values if n.startswith(f"old.experts.{old}.")]:
            values[name.replace(f"old.experts.{old}.", f"{block}.experts.{new}.", 1)] = values[name]
    for name in [n for n in values if n.startswith("old.")]:
        del values[name]
    for name in (f"{block}.gate.weight", f"{block}.gate.e_score_correction_bias"):
        dtype, shape, data = values[name]
        size = len(data) // shape[0]
        values[name] = (dtype, [len(keep), *shape[1:]], b"".join(data[old * size : (old + 1) * size] for old in keep))


def mismatched_router(values, behind):
    """The 0 %: the first 7 of 24 experts under the router of all 24, and the trunk's norm before the head. Such a loader reads past
    its experts; `behind` says what is in memory there."""
    for name in [n for n in values if n.startswith(f"{MTP}.mlp.experts.")]:
        if int(name.split(".")[5]) >= 7:
            dtype, shape, data = values[name]
            found = {"zeros": lambda: bytes(len(data)), "weights of layer 5": lambda: values[name.replace(MTP, "model.layers.5")][2], "random bytes": lambda: finite(random.Random(name).randbytes(len(data)))}
            values[name] = (dtype, shape, found[behind]())
    values[f"{MTP}.shared_head.norm.weight"] = values["model.norm.weight"]


def past_the_scales(values, kept):
    """What the notes' loader did with 4-bit codes: the first `kept` of 24 experts under the router of all 24. Past an array's end is
    another array; here packed codes are where scales and biases should be (finite ones, since others are refused by name at load)."""
    for name in [n for n in values if n.startswith(f"{MTP}.mlp.switch_mlp.") and not n.endswith(".weight")]:
        dtype, shape, data = values[name]
        end = len(data) // shape[0] * kept
        codes = bytearray(values[name.rsplit(".", 1)[0] + ".weight"][2][: len(data) - end])
        for at in range(0, len(codes), 2):
            if codes[at + 1] & 0x7F == 0x7F and codes[at] & 0x80:
                codes[at + 1] ^= 1
        values[name] = (dtype, shape, data[:end] + bytes(codes))


def finite(data):
    """bf16 numbers below 2: with larger ones the head's 8-bit codes overflow, and it is refused by name when it is loaded."""
    return bytes(byte & 0xBF if at % 2 else byte for at, byte in enumerate(data))


def acceptance(prompts, model, flags=(), **options):
    trials = [[0, 0], [0, 0]]
    for prompt in prompts:
        stats = run(prompt, "--temp", 0, "--speculate", "mtp", "--draft-always", "--draft-depth", 2, *flags, model=model, **options)["speculation"]
        for depth, (n, hits) in enumerate(stats["head_by_depth"][:2]):
            trials[depth][0] += n
            trials[depth][1] += hits
    return trials


def experiments(stolen):
    rows, samples = [], []
    prompts = [CODE, PYTHON, EDITED]
    row = lambda lever, setting, result, note="": rows.append({"lever": lever, "setting": setting, "result": result, "of the notes": note})
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        # What saliency the trunk's pruning would have kept: any fixed 7 of 24 that were not chosen for this layer.
        trunk_choice = sorted(random.Random(1).sample(range(24), 7))
        heads = {
            "whole": variant(folder / "whole"),
            "pruned to 7 of 24 by another layer's indices": variant(folder / "pruned", None, lambda v: keep_experts(v, 6, trunk_choice)),
        }
        for behind in ("zeros", "weights of layer 5", "random bytes"):
            name = f"7 of 24 experts under the router of 24, wrong norm, behind them {behind}"
            heads[name] = variant(folder / f"mismatched {behind}", None, lambda v, behind=behind: mismatched_router(v, behind))
        receipts.run("quantize", "-m", MODEL, "-o", folder / "whole4", "--format", "affine-4", "--method", "rtn")
        heads4 = {"all at 4 bits": folder / "whole4"}
        for kept in (7, 3):
            name = f"all at 4 bits, {kept} of 24 experts under the router of 24, behind them packed codes read as scales"
            heads4[name] = variant(folder / f"scales {kept}", None, lambda v, kept=kept: past_the_scales(v, kept), model=folder / "whole4")
        for name, model in (heads | heads4).items():
            trials = acceptance(prompts, model)
            rate = [100 * hits / max(1, n) for n, hits in trials]
            samples.append({"head": name, "trials": trials})
            row("MTP, drafts right", name, f"{rate[0]:.0f} % (chained: {rate[1]:.0f} %)", "0 %")
        for group in (heads, heads4):
            plain = [run(p, "--temp", 0, "--speculate", "off", model=next(iter(group.values()))) for p in prompts]
            for model in group.values():
                assert all(run(p, "--temp", 0, "--speculate", "mtp", "--draft-always", model=model)["token_ids"] == q["token_ids"] for p, q in zip(prompts, plain))
        lookup = interleaved(EDITED * 2, {m: ["--temp", 0, "--speculate", m] for m in ("off", "ngram")}, 5)
        factor = statistics.median(ms_per_token(a) / ms_per_token(b) for a, b in zip(lookup["off"], lookup["ngram"]))
        row("prompt lookup", "verbatim code edit, 400 tokens", f"{factor:.2f}x", "0.32x")
        # A draft model: the bundled model's own first three layers.
        def three_layers(config):
            config.update(num_hidden_layers=3, num_nextn_predict_layers=0, indexer_types=config["indexer_types"][:3], mlp_layer_types=config["mlp_layer_types"][:3])

        def first_three(values):
            for name in [n for n in values if n.startswith("model.layers.") and int(n.split(".")[2]) >= 3]:
                del values[name]

        draft = variant(folder / "draft", three_layers, first_three)
        pair = interleaved(CODE, {"off": ["--temp", 0, "--speculate", "off"], "draft": ["--temp", 0, "--speculate", f"draft={draft}"]}, 5)
        factor = statistics.median(ms_per_token(a) / ms_per_token(b) for a, b in zip(pair["off"], pair["draft"]))
        stats = pair["draft"][-1]["speculation"]
        right = stats["head_by_depth"][0] if stats["head_by_depth"] else [0, 0]
        row("draft model", f"half of the model, untrained for it: {100 * right[1] // max(1, right[0])} % right, governed", f"{factor:.2f}x", "0.32x")
        samples.append({"lookup": [ms_per_token(r) for r in lookup["ngram"]], "draft model": stats})
        # A head of the frequent tokens alone.
        for count in (4096, 2048, 1024):
            trials = acceptance(prompts, heads["whole"], flags=["--draft-vocab", count])
            row("MTP, drafts right", f"a head of {count} of 4096 tokens", f"{100 * trials[0][1] / max(1, trials[0][0]):.0f} %", "spec: 32 k of 155 k")
            samples.append({"draft_vocab": count, "trials": trials})
        # DSA: how many positions attention sees, at a context beyond all of them.
        models = {k: variant(folder / f"topk{k}", lambda config, k=k: config.update(index_topk=k)) for k in (16, 32, 64, 128, 2048)}
        times = {k: [] for k in models}
        # A process is up to twice as fast as the next one of the same model: many processes, in turns of order.
        for index in range(15):
            for k, model in list(models.items())[:: -1 if index % 2 else 1]:
                out = json.loads(receipts.run("bench", "-m", model, "--batch", "1", "--context", "1000", "--prompt", "64", "--windows", "9", "--json")[0])
                times[k].append(out["results"][0]["step_ms"])
        base = statistics.median(times[64])
        samples.append({"index_topk": times})
        for k in models:
            row("DSA index_topk", f"{k}{' (all)' if k == 2048 else ''}, about 1000 positions", f"{base / statistics.median(times[k]):.2f}x of 64", "flat 1.00-1.03x")
        times = {size: [] for size in (16, 64, 256)}
        for index in range(15):
            for size in list(times)[:: -1 if index % 2 else 1]:
                out = json.loads(receipts.run("bench", "--batch", "1", "--context", "1000", "--block-size", size, "--prompt", "64", "--windows", "9", "--json")[0])
                times[size].append(out["results"][0]["step_ms"])
        base = statistics.median(times[64])
        samples.append({"block_size": times})
        for size in times:
            row("block size of the cache", f"{size}, about 1000 positions", f"{base / statistics.median(times[size]):.2f}x of 64", "flat 1.00-1.03x")
        # Fewer active experts, with what it costs.
        held = (ROOT / "crates/tensor/src/rng.rs").read_text()[:6000]
        for k in (4, 3, 2):
            model = variant(folder / f"experts{k}", lambda config, k=k: config.update(num_experts_per_tok=k))
            times = [ms_per_token(run(CODE, "--temp", 0, "--speculate", "off", model=model, tokens=200)) for _ in range(5)]
            nll = negative_log_likelihood(model, held, folder)
            samples.append({"experts": k, "ms": times, "nats_per_token": nll})
            row("active experts", f"{k} of 24", f"{statistics.median(times):.3f} ms a token, {nll:.3f} nats a token on held-out code", "8 to 6: quality-dead")
    for kind, (speeds, counted) in batches().items():
        result = ", ".join(f"{b}: {s:.2f}x ({counted[b]:.1f} experts)" for b, s in speeds.items())
        row("batch scaling", kind, result, "2.6x at 8, prompts identical")
        samples.append({"batches": kind, "speedup": speeds, "distinct_experts": counted})
    write("speculation-experiments", [f"{NAME} run --raw -p .. --json --temp 0 --speculate .. --draft-always", f"{NAME} bench --batch 1,2,4,8"], samples, {"speculation-experiments": rows}, stolen)


def negative_log_likelihood(model, text, folder):
    """Nats a token of held-out text, from the logits of the program."""
    encoded = token_ids(text)[:1000]
    out = Path(folder) / "logits.safetensors"
    receipts.run("logits", "-m", model, "--ids", ",".join(map(str, encoded)), "--activations", "int8", "--cache", "bf16", "--out", out)
    values, _ = tensors(out)
    dtype, shape, data = values["logits"]
    vocab, total = shape[-1], 0.0
    for row in range(len(encoded) - 1):
        logits = struct.unpack_from(f"<{vocab}f", data, 4 * vocab * row)
        top = max(logits)
        total -= logits[encoded[row + 1]] - top - math.log(sum(math.exp(x - top) for x in logits))
    return total / (len(encoded) - 1)


def token_ids(text):
    """Token ids of ASCII code by the bundled model's tokenizer: its words, then its merges in the order of their ranks."""
    model = json.loads((MODEL / "tokenizer.json").read_text())["model"]
    ranks = {tuple(m) if isinstance(m, list) else tuple(m.split(" ")): i for i, m in enumerate(model["merges"])}
    # Byte-level BPE writes bytes that are no visible character as others that are.
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    table = {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    found = []
    for word in WORDS.findall(text):
        parts = [table[byte] for byte in word.encode()]
        while len(parts) > 1:
            rank, at = min((ranks.get(pair, 1 << 30), i) for i, pair in enumerate(zip(parts, parts[1:])))
            if rank == 1 << 30:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        found.extend(model["vocab"][part] for part in parts)
    return found


def batches():
    """Throughput at batch sizes, with tokens of each sequence's own and with one token for all, of the bundled model and of a
    slice of a published shape that does not fit into caches."""
    found = {}
    for model in ("the bundled model", "qwen3-30b-a3b:layers=2"):
        shape = [] if model.startswith("the") else ["--synthetic", model]
        for kind, flags in (("distinct", []), ("identical", ["--identical"])):
            out = json.loads(receipts.run("bench", *shape, *flags, "--batch", "1,2,4,8", "--prompt", "64", "--windows", "5", "--json")[0])
            speed = {r["batch"]: r["decode_tok_s"] for r in out["results"]}
            experts = {r["batch"]: r["distinct_experts"] for r in out["results"]}
            found[f"{model}, {kind} tokens"] = ({b: s / speed[1] for b, s in speed.items()}, experts)
    return found


def replay(stolen, preset, *flags):
    """All acceptances and overlaps on one loaded model."""
    spec = "replay:p=0.6/0.7/0.8/0.9,overlap=0.10/0.26/0.38"
    arguments = ["bench", "--synthetic", preset, "--speculate", spec, "--batch", "1", "--windows", "5", "--steps", "40", *flags]
    lines = receipts.run(*arguments, "--json")[0].splitlines()
    replay_receipt(stolen, preset, [f"{NAME} {' '.join(arguments)}"], [json.loads(line) for line in lines])


def floor(stolen, preset, *flags):
    """Plain and governed decoding in turn, in one engine, where every draft is wrong or nearly every one."""
    arguments = ["bench", "--synthetic", preset, "--speculate", "replay:p=0.0/0.1,overlap=0.26", "--batch", "1,4", "--windows", "9", "--steps", "60", *flags]
    lines = receipts.run(*arguments, "--json")[0].splitlines()
    floor_receipt(stolen, preset, [f"{NAME} {' '.join(arguments)}"], [json.loads(line) for line in lines])


def floor_receipt(stolen, preset, commands, reports, machine=None):
    rows = [
        {"model": preset, "on": report["backend"].split(",")[0], "right": f"{100 * report['acceptance']:.0f} %", "batch": r["batch"], "plain, ms a token": f"{r['plain_ms']:.3f}", "governed": f"{r['drafted_ms']:.3f}", "factor": f"{r['factor']:.3f}x", "drafts a step": f"{r['depth']:.3f}"}
        for report in reports for r in report["results"]
    ]
    write(f"speculation-floor-{where(preset, reports)}", commands, reports, {"speculation-floor": rows}, stolen, machine)


def where(preset, reports):
    """What a receipt's name says of a shape and a back end."""
    return preset.split(":")[0] + ("-cuda" if reports[0]["backend"].startswith("cuda") else "")


def replay_receipt(stolen, preset, commands, reports, machine=None):
    rows, verify, seen = [], [], set()
    for report in reports:
        overlap = f"{report['overlap']:.2f}"
        for r in report["results"]:
            rows.append({"model": preset, "right": report["acceptance"], "overlap": overlap, "plain, ms a token": f"{r['plain_ms']:.2f}", "drafted": f"{r['drafted_ms']:.2f}", "factor": f"{r['factor']:.2f}x", "predicted": f"{r['predicted_factor']:.2f}x", "by bytes": f"{r['bytes_factor']:.2f}x", "drafts a step": f"{r['depth']:.2f}", "tokens a step": f"{r['tokens_per_step']:.2f}"})
        if overlap in seen:
            continue
        seen.add(overlap)
        for v in report["verify"]:
            verify.append({"model": preset, "overlap": overlap, "rows": v["rows"], "ms": f"{v['ms']:.2f}", "cost": f"{v['cost']:.2f}", "cost by bytes": f"{v['bytes_cost']:.2f}", "experts a layer": f"{v['distinct_experts']:.1f}"})
    write(f"speculation-replay-{where(preset, reports)}", commands, reports, {"speculation-replay": rows, "speculation-verify": verify, "speculation-truncation": truncation(preset, reports)}, stolen, machine)


def truncation(preset, reports):
    """What in-flight truncation could bring at most: each step verifies as many rows as are best for the experts that it will
    really read, known before it begins, against the best number of rows for all steps."""
    rows = []
    for report in {f"{r['overlap']:.2f}": r for r in reports}.values():
        verify, top_k = report["verify"], report["verify"][0]["distinct_experts"]
        # Bytes of what is read once and of the experts of one token, in plain steps.
        more = verify[-1]["distinct_experts"] / top_k - 1
        expert_share = (verify[-1]["bytes_cost"] - 1) / more
        steps = list(zip(*(v["distinct_experts_of_steps"] for v in verify)))
        costs = [[1 + expert_share * (union / top_k - 1) for union in step] for step in steps]
        for p in (0.6, 0.7, 0.8, 0.9):
            tokens = [sum(p**i for i in range(v["rows"])) for v in verify]
            count = range(len(verify))
            fixed = max(tokens[k] * len(costs) / sum(c[k] for c in costs) for k in count)
            rate = fixed
            for _ in range(20):
                best = [max(count, key=lambda k: tokens[k] - rate * c[k]) for c in costs]
                rate = sum(tokens[k] for k in best) / sum(c[k] for k, c in zip(best, costs))
            rows.append({"model": preset, "right": p, "overlap": f"{report['overlap']:.2f}", "best fixed depth": f"{fixed:.3f}x", "best depth of each step": f"{rate:.3f}x", "gain at most": f"{100 * (rate / fixed - 1):.1f} %"})
    return rows


def main():
    stolen = steal_ticks()
    os.environ.setdefault("XDG_CACHE_HOME", tempfile.mkdtemp())
    match sys.argv[1:]:
        case ["bundled"]:
            bundled(stolen)
        case ["experiments"]:
            experiments(stolen)
        case ["replay", preset, *flags]:
            replay(stolen, preset, *flags)
        case ["floor", preset, *flags]:
            floor(stolen, preset, *flags)
        case ["replay-lines" | "floor-lines" as kind, preset, path, *command]:
            # What a machine without Python has printed.
            reports = [json.loads(line) for line in Path(path).read_text().splitlines()]
            here = reports[0]["machine"]
            machine = {"cpu": here["cpu"], "cores": here["cores"], "memory_bytes": here["memory_bytes"], "gpu": reports[0]["backend"]}
            keep = replay_receipt if kind == "replay-lines" else floor_receipt
            keep(stolen, preset, [" ".join(command)], reports, machine)
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
