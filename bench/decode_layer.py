"""Turns what bench/decode_layer.cu printed on another machine into a receipt.

    python3 bench/decode_layer.py NAME DRIVER FILE..

A FILE holds the output of runs one after another. A run starts with `== NAME`; NAME is `WHAT@CONTEXT`, CONTEXT the positions in the cache. Runs of one context are
compared with its first by the hash of the residual stream. MOELLON_COMMIT and MOELLON_BINARY as for bench/receipts.py.
"""

import re
import statistics
import sys
from pathlib import Path

import receipts

TAGS = {
    "qkv_a": "queries and latent",
    "row_heads": "heads as one kernel",
    "q_b": "queries, second",
    "heads_k": "keys of heads",
    "attend": "attention",
    "heads_v": "values of heads",
    "o_proj": "output projection",
}
STAGES = ["start", "weights asked for", "wait ends", "rows made", "queries", "queries exchanged", "absorbed", "scores exchanged", "values", "parts joined", "slices exchanged", "end"]


def runs_of(text):
    for part in text.split("\n== ")[1:]:
        name, *lines = part.splitlines()
        what, _, context = name.partition("@")
        hash_line = next((line for line in lines if line.startswith("hash ")), None)
        times = {m[1].strip(): float(m[2]) for m in (re.match(r"(.{14}) *([\d.]+) us a layer", line) for line in lines) if m}
        stages = [line for line in lines if line.startswith("stages")]
        if hash_line and (times or stages):
            yield {"kernels": what, "context": int(context or 128), "hash": hash_line.split()[1], "us": times, "stages": stages}


def table(samples):
    rows, first = [], {}
    for sample in samples:
        first.setdefault(sample["context"], sample["hash"])
    for key in dict.fromkeys((s["kernels"], s["context"]) for s in samples if s["us"] and not s["stages"]):
        same = [s for s in samples if (s["kernels"], s["context"]) == key and not s["stages"]]
        median = lambda tag: f"{statistics.median(s['us'][tag] for s in same):.1f}" if tag in same[0]["us"] else "-"
        row = {"kernels": key[0], "positions": key[1] + 1, "runs": len(same), "us a layer": median("chain"), "us, kernels overlap": median("chain pdl")}
        row |= {label: median(tag) for tag, label in TAGS.items()}
        row["result"] = "same bits" if all(s["hash"] == first[key[1]] for s in same) else "other bits"
        rows.append(row)
    return rows


def stage_table(samples):
    rows = []
    for sample in samples:
        for line in sample["stages"]:
            means = [float(m) for m in re.findall(r" \d+: (-?[\d.]+) -?[\d.]+", line)]
            lasts = [float(m) for m in re.findall(r" \d+: -?[\d.]+ (-?[\d.]+)", line)]
            overlap = "yes" if "overlap" in line else "no"
            for what, values in (("mean", means), ("last block", lasts)):
                rows.append({"kernels": sample["kernels"], "overlap": overlap, "us": what} | {stage: f"{v:.1f}" for stage, v in zip(STAGES, values)})
    return rows


def main():
    name, driver, *files = sys.argv[1:]
    samples = [run for file in files for run in runs_of(Path(file).read_text())]
    machine = {"gpus": ["NVIDIA H200"], "driver": driver}
    commands = [
        "nvcc -std=c++20 -O2 -arch=sm_90 -DNO_KERNELS -DROUTED_BITS=3 -DDEEP=1 -Icrates/backend-cuda/kernels bench/decode_layer.cu -lcuda; HEADS=KERNEL CONTEXT=N ./a.out FOLDER "
        "(a folder of CUBINs a variant; 5 layers; medians of 30 replays of the graph of all kernels, 15 of a kernel alone; variants one after another)",
    ]
    tables = {name: table(samples), f"{name}-stages": stage_table(samples)}
    receipts.write(name, commands, samples, {k: v for k, v in tables.items() if v}, receipts.steal_ticks(), machine)


if __name__ == "__main__":
    main()
