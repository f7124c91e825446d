"""llama.cpp and ik_llama.cpp beside us on one machine: the same shape, about the same bits, in turns. Writes a receipt.

    cargo build --release -p moellon
    pip install numpy gguf
    npm pack @node-llama-cpp/linux-x64 && tar xzf node-llama-cpp-linux-x64-*.tgz     # llama.cpp prebuilt for every CPU
    git clone https://github.com/ikawrakow/ik_llama.cpp                              # ik_llama.cpp is built for this one (4 minutes)
    cmake -S ik_llama.cpp -B ik_llama.cpp/build -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=ON -DGGML_IQK_FA_ALL_QUANTS=OFF
    cmake --build ik_llama.cpp/build --target llama -j2
    python3 bench/peers/llama_cpp.py DIRECTORY --llama.cpp package/bins/linux-x64 --ik_llama.cpp ik_llama.cpp [--shape S] [--format F]
    cargo xtask docs --write

DIRECTORY takes the synthetic GGUF file: a slice of a published shape with random weights (`slices.py`), eight layers of Qwen3-30B-A3B (2.1
to 2.8 GB) or three of GLM-5.2 with 77 experts (5 GB). We run `moellon bench` on the same slice in the format beside it:

| F | llama.cpp and ik_llama.cpp | moellon |
|---|---|---|
| q4_k_m | Q4_K, Q6_K where Q4_K_M spends more bits | affine-4, groups of 64 |
| q3_k | Q3_K (3.44 bits), head in Q6_K | affine-3 (3.5 bits), head in affine-6 |
| nvfp4 | NVFP4 (llama.cpp alone has it) | NVFP4 |
| q4_0 | Q4_0 (as many bits as NVFP4), head in Q6_K | NVFP4 |
| iq4_xs | IQ4_XS (4.25 bits), head in Q6_K | affine-4, groups of 64 |
| mxfp4 | experts in MXFP4, the rest in Q8_0 | MXFP4, head in affine-6 |

Each measurement is a process of its own. Rounds alternate and begin with another engine each, so that a noisy neighbour meets all; a number
is the median over the rounds, of medians over windows (those with more than 2 % steal are measured again). ik_llama.cpp runs with -rtr -muge
-mqkv, which is its fastest in decoding; prompts are measured without them as well, and the table has the better.
--more adds rounds to the newest receipt, if the same binary wrote it.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from libllama import BATCHES, CONTEXT, ENGINES, PROMPT
from receipts import BINARY, NAME, ROOT, run, steal_ticks, write
from slices import FORMATS, SHAPES, bytes_per_step, write_gguf

# What we set out to be faster by: batch 1, batch 8, a prompt. That of a prompt is meant against llama.cpp's Q4_K_M and ik_llama.cpp's best.
BARS = {"llama.cpp": {1: 1.6, 8: 1.8, "prompt": 4.0}, "ik_llama.cpp": {1: 1.3, 8: 1.35, "prompt": 2.0}}
PLAIN = ", plain"
median = statistics.median


def their_speed(samples, size):
    """Tokens a second of a run of `libllama.py`. A prompt is the better of two."""
    if size == "prompt":
        return PROMPT / min(samples["prompt_s"])
    return size * 1e3 / median(median(window) for window in samples["steps_ms"][str(size)])


def our_speed(report, size):
    if size == "prompt":
        return report["prefill"][0]["tok_s"]
    return size * 1e3 / report["results"][BATCHES.index(size)]["step_ms"]


def table(options, rounds, read):
    """One row for each engine and what is measured. `read`: bytes that an engine reads (`write_gguf`)."""
    shape, formats = SHAPES[options.shape], FORMATS[options.format]
    variants = [name for name in rounds[0] if name != "moellon"]
    rows = []
    for engine in dict.fromkeys(name.removesuffix(PLAIN) for name in variants):
        for size in (*BATCHES, "prompt"):
            us = median(our_speed(turn["moellon"], size) for turn in rounds)
            measured = [name for name in variants if name == engine or name == engine + PLAIN and size == "prompt"]
            speeds = {name: median(their_speed(turn[name], size) for turn in rounds) for name in measured}
            best = max(speeds, key=speeds.get)
            digits = 0 if size == "prompt" else 1
            row = {
                "shape": shape.ours, "what": f"prompt of {PROMPT}" if size == "prompt" else f"decode, batch {size}", "engine": best,
                "its format": formats.name, "its tok/s": f"{speeds[best]:.{digits}f}", "its share of bandwidth": "",
                "our format": formats.ours, "moellon, tok/s": f"{us:.{digits}f}", "our share of bandwidth": "",
                "ratio": f"{us / speeds[best]:.2f}", "bar": f"{BARS[engine][size]:.2f}" if size in BARS[engine] else "",
            }
            if size != "prompt":
                distinct = median(turn[best]["distinct_experts"][str(size)] for turn in rounds)
                gb = bytes_per_step(read, shape, distinct) / 1e9
                ours = [turn["moellon"]["results"][BATCHES.index(size)] for turn in rounds]
                bandwidth = median(result["measured_read_gb_s"] for result in ours)
                row["its share of bandwidth"] = f"{100 * gb * speeds[best] / size / bandwidth:.0f} %"
                row["our share of bandwidth"] = f"{100 * median(result['bandwidth_share'] for result in ours):.0f} %"
            rows.append(row)
    return rows


def check_routing(name, distinct_experts, shape):
    """Collapsed routing would make batches cheap: E(1-(1-k/E)^B) experts are expected of random tokens."""
    for size, distinct in distinct_experts.items():
        expected = shape.experts * (1 - (1 - shape.used / shape.experts) ** int(size))
        assert abs(distinct / expected - 1) < 0.15, f"{name}: {distinct} experts at batch {size}, expected {expected:.1f}"


def release(engine, directory):
    """Which version a directory holds."""
    if engine == "ik_llama.cpp":
        commit = subprocess.run(["git", "-C", directory, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        return f"{commit}, built on this machine"
    build = json.loads((Path(directory) / "_nlcBuildMetadata.json").read_text())
    return f"{build['buildOptions']['llamaCpp']['release']}, prebuilt by node-llama-cpp"


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("directory", type=Path)
    for engine in ENGINES:
        arguments.add_argument(f"--{engine}", dest=engine, metavar="DIRECTORY")
    arguments.add_argument("--shape", choices=SHAPES, default="qwen")
    arguments.add_argument("--format", choices=FORMATS, default="q4_k_m")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments.add_argument("--prepare", action="store_true", help="only write the GGUF file")
    arguments.add_argument("--more", action="store_true", help="add rounds to the newest receipt")
    options = arguments.parse_args()
    shape, formats, stolen = SHAPES[options.shape], FORMATS[options.format], steal_ticks()
    path, read_path = (options.directory / f"{options.shape}-{options.format}.{end}" for end in ("gguf", "json"))
    if not read_path.exists():
        read_path.write_text(json.dumps(write_gguf(path, shape, formats)))
    if options.prepare:
        return
    read = json.loads(read_path.read_text())
    chosen = {engine: directory for engine in ENGINES if (directory := vars(options)[engine])}
    assert chosen, "--llama.cpp, --ik_llama.cpp or both"
    name = f"peers-{options.shape}-{options.format.replace('_', '-')}"
    samples = {"peers": {engine: release(engine, directory) for engine, directory in chosen.items()}, "bytes": read, "rounds": []}
    if options.more:
        # The newest of its name; with the new rounds it stands under today's date.
        newest = max((ROOT / "receipts").glob(f"????-??-??-{name}.json"))
        earlier = json.loads(newest.read_text())
        assert earlier["binary_sha256"] == hashlib.sha256(BINARY.read_bytes()).hexdigest(), "another binary wrote the receipt"
        samples = earlier["samples"]
    command = ["bench", "--synthetic", shape.ours, "--format", formats.ours, "--batch", ",".join(map(str, BATCHES)), "--context", str(CONTEXT)]
    command += ["--prompt", str(PROMPT), "--windows", "3", "--threads", str(options.threads), "--json"]
    runners = {"moellon": lambda seed: json.loads(run(*command)[0])}

    def peer(engine, *more):
        def call(seed):
            words = [sys.executable, Path(__file__).parent / "libllama.py", engine, chosen[engine], path, options.threads, shape.experts, seed, *more]
            result = json.loads(subprocess.run(list(map(str, words)), check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
            check_routing(engine, result.get("distinct_experts", {}), shape)
            return result

        return call

    for engine in chosen:
        runners[engine] = peer(engine)
    if "ik_llama.cpp" in chosen:
        runners["ik_llama.cpp" + PLAIN] = peer("ik_llama.cpp", "--plain")
    names = list(runners)
    for _ in range(options.rounds):
        seed = len(samples["rounds"])
        turn = {}
        for index in range(len(names)):
            name_of = names[(seed + index) % len(names)]
            turn[name_of] = runners[name_of](seed)
        samples["rounds"].append({name_of: turn[name_of] for name_of in names})
    rows = table(options, samples["rounds"], read)
    ours = [f"--{engine} {'LIBRARIES' if engine == 'llama.cpp' else 'REPOSITORY'}" for engine in chosen]
    commands = [f"python3 bench/peers/llama_cpp.py DIRECTORY {' '.join(ours)} --shape {options.shape} --format {options.format}", f"{NAME} {' '.join(command)}"]
    if options.more:
        newest.unlink()
    write(name, commands, samples, {"peers-cpu": rows}, stolen)
    print(*(" | ".join(row.values()) for row in rows), sep="\n")


if __name__ == "__main__":
    main()
