"""Measures what bench/receipts.py does not on an NVIDIA GPU, and writes receipts.

    cargo build --release -p moellon
    python3 bench/cuda.py ladder [FORMAT ..]    # hot operations one by one: reference, plain, best; checked and timed
    python3 bench/cuda.py sampling [REQUESTS ..] # draws on the device against draws on the host, over HTTP: the same texts, and their speed
    python3 bench/cuda.py context [SHAPE/FORMAT/BATCHES ..]  # decode at 8192 positions against 128
    python3 bench/cuda.py prompts [SHAPE/FORMAT ..]  # prompts of 512 to 4096 tokens, each in one step, stage by stage
    python3 bench/cuda.py turns SHAPE/FORMAT NAME=KERNELS ..  # steps and a prompt with folders of kernels, in turns
    python3 bench/cuda.py waits NAME=KERNELS/FORMAT/ROWS ..  # what the experts' kernels of a step wait for, by folders of kernels (needs ncu)
    python3 bench/cuda.py golden                # worst difference from transformers; texts of the bundled model against the CPU's
    python3 bench/cuda.py formats TEST          # golden models in every format, from the test golden_cuda (its binary, on a machine that compiles nothing)
    python3 bench/cuda.py load DIRECTORY        # loading a large checkpoint (bench/large_checkpoint.py) against the bus (needs torch, which measures it)
    python3 bench/cuda.py faults [KERNELS]      # no memory, no driver, a lost GPU (a folder of kernels of which one traps): what is said, and who survives
    cargo xtask docs --write

Needs nothing but Python.
"""

import contextlib
import csv
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error

from receipts import BINARY, NAME, ROOT, run, steal_ticks, tensors, write
from serving import Server, wide_model

SHAPE = "glm-5.2-77"
SLICE = "glm-5.2-77:layers=12"


def ladder(stolen, formats):
    reports, rows, kernels, commands = [], [], [], []
    for form in formats or ("nvfp4", "affine-4", "affine-3"):
        command = ["bench", "--kernels", "--backend", "cuda", "--synthetic", SHAPE, "--format", form, "--batch", "1,8,32", "--prompt", "512", "--json"]
        report = json.loads(run(*command)[0])
        reports.append(report)
        commands.append(f"{NAME} {' '.join(command)}")
        experts = {}
        for rung in report["rungs"]:
            if not rows or [rows[-1][key] for key in ("format", "operation", "rows")] != [form, rung["operation"], rung["rows"]]:
                rows.append({
                    "format": form, "operation": rung["operation"], "rows": rung["rows"], "MB": f"{rung['bytes'] / 1e6:.1f}", "reference, us": "-",
                    "plain, us": "-", "best, us": "-", "best, GB/s": "-", "share of measured bandwidth": "-", "best, TFLOP/s": "-",
                    "plain against the reference": "-", "best against plain": "-",
                })
            rows[-1][f"{rung['implementation']}, us"] = f"{rung['microseconds']:.1f}"
            if rung["implementation"] == "plain":
                rows[-1]["plain against the reference"] = rung["check"]
            if rung["implementation"] == "best":
                rows[-1] |= {
                    "best, GB/s": f"{rung['gb_s']:.0f}", "share of measured bandwidth": f"{100 * rung['bandwidth_share']:.0f} %",
                    "best, TFLOP/s": f"{rung['tflop_s']:.1f}", "best against plain": rung["check"],
                }
            if rung["implementation"] == "plain" and rung["operation"].startswith("expert "):
                experts[rung["operation"], rung["rows"]] = rung
            if rung["operation"].startswith("experts,") and rung["implementation"] == "best":
                for kernel in rung["kernels"]:
                    operation = "expert down" if "down" in kernel["name"] else "expert gate and up" if "_up" in kernel["name"] or kernel["name"].startswith("up") else None
                    moved = experts.get((operation, rung["rows"]))
                    row = {"format": form, "rows": rung["rows"], "kernel": kernel["name"], "us": f"{kernel['microseconds']:.1f}", "MB": "-", "GB/s": "-", "share of measured bandwidth": "-", "us a distinct expert": "-", "against one row": "-"}
                    if moved:
                        rate = moved["bytes"] / kernel["microseconds"] / 1e3
                        each = kernel["microseconds"] / rung["distinct_experts"]
                        one = next((k for k in kernels if (k["format"], k["rows"], k["of"]) == (form, 1, operation)), None)
                        row |= {
                            "MB": f"{moved['bytes'] / 1e6:.1f}", "GB/s": f"{rate:.0f}", "share of measured bandwidth": f"{100 * rate / report['measured_read_gb_s']:.0f} %",
                            "us a distinct expert": f"{each:.2f}", "against one row": f"{each / one['each']:.2f}" if one else "1.00", "each": each,
                        }
                    kernels.append({**row, "of": operation})
    shown = [{key: value for key, value in row.items() if key not in ("of", "each")} for row in kernels]
    write("cuda-ladder", commands, reports, {"cuda-ladder": rows, "cuda-ladder-kernels": shown}, stolen)


def complete(server, count, body, tokens):
    """Texts of `count` requests at a time, and tokens a second of all."""
    texts = [None] * count

    def one(index):
        answer, _ = server.post("/v1/completions", {"prompt": [5 + index, 17, 99, 3 + 7 * index], "max_tokens": tokens, "seed": 100 + index, "ignore_eos": True, **body})
        texts[index] = (answer["choices"][0]["text"], answer["usage"]["completion_tokens"])

    threads = [threading.Thread(target=one, args=(index,)) for index in range(count)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.monotonic() - start
    return [text for text, _ in texts], sum(tokens for _, tokens in texts) / elapsed


def sampling(stolen, counts):
    ways = {
        "greedy": {"temperature": 0},
        "temperature 0.8, top-p 0.95": {"temperature": 0.8, "top_p": 0.95, "top_k": 0, "min_p": 0},
        "temperature 0.7, top-k 40, min-p 0.05": {"temperature": 0.7, "top_p": 1, "top_k": 40, "min_p": 0.05},
    }
    rows, samples, commands = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        model = wide_model(folder, 154_880)
        options = ["-m", model, "--backend", "cuda", "--synthetic", SLICE, "--format", "affine-4", "--context", 1024, "--max-sequences", 32, "--speculate", "off"]
        with Server(*options) as server:
            commands.append(server.shown.replace(str(model), "(the bundled model with a tokenizer of 154,880 tokens)"))
            complete(server, 32, ways["greedy"], 16)
            for count in counts or (1, 8, 32):
                for name, body in ways.items():
                    # A bias of nothing needs the logits on the host and changes none.
                    speeds = {"device": [], "host": []}
                    texts = {}
                    for _ in range(3 if count < 32 else 2):
                        for where, more in (("device", {}), ("host", {"logit_bias": {"0": 0}})):
                            texts[where], speed = complete(server, count, {**body, **more}, 64 if count == 1 else 32)
                            speeds[where].append(speed)
                    middle = {where: statistics.median(values) for where, values in speeds.items()}
                    same = sum(a == b for a, b in zip(texts["device"], texts["host"]))
                    print(count, name, middle, same, flush=True)
                    samples.append({"requests": count, "way": name, "tok_s": speeds, "same texts": same})
                    rows.append({
                        "requests at a time": count, "choice": name, "on the device, tok/s": f"{middle['device']:.0f}", "on the host, tok/s": f"{middle['host']:.0f}",
                        "factor": f"{middle['device'] / middle['host']:.2f}", "same texts": f"{same} of {count}",
                    })
    write("cuda-sampling", commands, samples, {"cuda-sampling": rows}, stolen)


def context(stolen, chosen):
    reports, rows, stages, commands = [], [], [], []
    for plan in chosen or (f"{SLICE}/affine-4", f"{SHAPE}/q3a4"):
        shape, form, *more = plan.split("/")
        batches = more[0] if more else "1,8"
        # Both contexts with one load, so that the whole model takes a minute.
        command = ["bench", "--backend", "cuda", "--synthetic", shape, "--format", form, "--batch", batches, "--context", "128,8192", "--prompt", "1", "--windows", "7", "--steps", "20", "--json"]
        report = json.loads(run(*command)[0])
        reports.append(report)
        commands.append(f"{NAME} {' '.join(command)}")
        first, took = {}, {}
        for result in report["results"]:
            ms = result["step_ms"]
            first.setdefault(result["batch"], ms)
            rows.append({
                "shape": shape, "format": form, "batch": result["batch"], "context": result["context"], "tok/s": f"{result['decode_tok_s']:.1f}", "ms a step": f"{ms:.2f}",
                "against 128": f"{ms / first[result['batch']]:.2f}", "MB a step": f"{result['bytes_per_step'] / 1e6:.0f}",
                "share of measured bandwidth": f"{100 * result['bandwidth_share']:.0f} %",
            })
            for stage in result["stages"]:
                took[result["batch"], stage["stage"], result["context"]] = stage["microseconds"]
        for (batch, stage, length), us in took.items():
            if length == 8192 and stage in ("indexer", "attention"):
                before = took[batch, stage, 128]
                stages.append({"shape": shape, "format": form, "batch": batch, "stage": stage, "us at 128": f"{before:.0f}", "us at 8192": f"{us:.0f}", "more, us": f"{us - before:.0f}"})
    write("cuda-context", commands, reports, {"cuda-context": rows, "cuda-context-stages": stages}, stolen)


def prompts(stolen, chosen):
    reports, rows, stages, commands = [], [], [], []
    lengths = (512, 1024, 2048, 4096)
    for plan in chosen or (f"{SLICE}/affine-4", f"{SLICE}/nvfp4", f"{SHAPE}/q3a4"):
        shape, form = plan.split("/")
        command = ["bench", "--backend", "cuda", "--synthetic", shape, "--format", form, "--batch", "1", "--prompt", ",".join(map(str, lengths)), "--chunk", str(lengths[-1]), "--windows", "3", "--steps", "5", "--json"]
        report = json.loads(run(*command)[0])
        reports.append(report)
        commands.append(f"{NAME} {' '.join(command)}")
        for prefill in report["prefill"]:
            rows.append({
                "shape": shape, "format": form, "tokens": prefill["tokens"], "tok/s": f"{prefill['tok_s']:.0f}",
                "quartiles": "-".join(f"{x:.0f}" for x in prefill["tok_s_quartiles"]), "ms": f"{1e3 * prefill['tokens'] / prefill['tok_s']:.1f}",
            })
            total = sum(stage["microseconds"] for stage in prefill["stages"])
            for stage in prefill["stages"]:
                stages.append({
                    "shape": shape, "format": form, "tokens": prefill["tokens"], "stage": stage["stage"], "ms": f"{stage['microseconds'] / 1e3:.2f}",
                    "share": f"{100 * stage['microseconds'] / total:.0f} %",
                })
    write("cuda-prompts", commands, reports, {"cuda-prompts": rows, "cuda-prompt-stages": stages}, stolen)


def turns(stolen, plan, kernels):
    """Steps of 1, 8 and 32 rows and prompts of 512 tokens, twice with each folder of kernels in turn."""
    shape, form = plan.split("/")
    command = ["bench", "--backend", "cuda", "--synthetic", shape, "--format", form, "--batch", "1,8,32", "--prompt", "512", "--windows", "3", "--steps", "10", "--json"]
    found, reports, commands = {}, [], []
    for _ in range(2):
        for name, folder in (words.split("=") for words in kernels):
            report = json.loads(run(*command, "--cuda-kernels", folder)[0])
            reports.append(report | {"kernels": name})
            commands.append(f"{NAME} {' '.join(command)} --cuda-kernels {name}")
            results = [(f"step, {r['batch']} rows", r["decode_tok_s"], r["bandwidth_share"]) for r in report["results"]]
            for what, speed, share in results + [("prompt, 512 tokens", r["tok_s"], None) for r in report["prefill"]]:
                found.setdefault(what, {}).setdefault(name, []).append((speed, share))
    rows = []
    for what, by_name in found.items():
        first = None
        for name, values in by_name.items():
            speeds, shares = zip(*values)
            middle = statistics.median(speeds)
            first = first or middle
            rows.append({
                "shape": shape, "format": form, "what": what, "kernels": name, "tok/s": f"{middle:.0f}", "least and most": f"{min(speeds):.0f}-{max(speeds):.0f}",
                "share of measured bandwidth": "-" if shares[0] is None else f"{100 * statistics.median(shares):.0f} %", "against the first": f"{middle / first:.2f}",
            })
    write("cuda-turns", commands, reports, {"cuda-turns": rows}, stolen)


def waits(stolen, plans):
    """The experts' kernels of a step under Nsight Compute: instructions, pipes, and the reasons for which warps issue nothing."""
    stall = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
    reasons = ("long_scoreboard", "short_scoreboard", "wait", "math_pipe_throttle", "mio_throttle", "lg_throttle", "barrier", "membar", "not_selected", "no_instruction", "dispatch_stall", "branch_resolving")
    basic = {
        "ns": "gpu__time_duration.sum", "bytes": "dram__bytes_read.sum", "instructions": "smsp__inst_executed.sum", "issue": "smsp__issue_active.avg.pct_of_peak_sustained_active",
        "alu": "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active", "fma": "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active", "warps": "smsp__warps_active.avg.per_cycle_active",
    }
    rows, samples, commands = [], [], []
    for plan in plans:
        kernels, form, batch = plan.rsplit("/", 2)
        name, folder = kernels.split("=")
        command = ["bench", "--synthetic", "glm-5.2-77:layers=4,vocab=4096", "--format", form, "--backend", "cuda", "--batch", batch, "--prompt", "1", "--windows", "1", "--steps", "2"]
        metrics = [*basic.values(), *map(stall.format, reasons)]
        profiler = ["ncu", "--clock-control", "none", "--cache-control", "none", "-k", "regex:^(up_|experts_down|few_up|few_down)", "--metrics", ",".join(metrics), "--launch-skip", "6", "--launch-count", "4", "--csv"]
        words = [*profiler, BINARY, *command]
        out = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ, "MOELLON_CUDA_KERNELS": folder}).stdout
        commands.append(" ".join([*profiler[:7], "..", NAME, *command]))
        found = {}
        for row in csv.DictReader(line for line in out.splitlines() if line.startswith('"')):
            launch = found.setdefault(row["Kernel Name"].split("(")[0], {}).setdefault(row["ID"], {})
            # A reason that this GPU does not know is none.
            launch[row["Metric Name"]] = 0.0 if row["Metric Value"] == "n/a" and "stalled" in row["Metric Name"] else float(row["Metric Value"].replace(",", ""))
        for kernel, launches in found.items():
            samples.append({"plan": f"{name}/{form}/{batch}", "kernel": kernel, "launches": list(launches.values())})
            middle = lambda metric: statistics.median(launch[metric] for launch in launches.values())
            value = {key: middle(metric) for key, metric in basic.items()}
            stalls = sorted(((middle(stall.format(reason)), reason) for reason in reasons), reverse=True)
            rows.append({
                "kernels": name, "format": form, "rows": batch, "kernel": kernel, "us": f"{value['ns'] / 1e3:.1f}", "TB/s": f"{value['bytes'] / value['ns'] / 1e3:.2f}",
                "instructions of a warp for 576 bytes": f"{576 * value['instructions'] / value['bytes']:.0f}", "issue slots used": f"{value['issue']:.0f} %", "ALU": f"{value['alu']:.0f} %",
                "FMA": f"{value['fma']:.0f} %", "warps a scheduler": f"{value['warps']:.1f}", "cycles a warp waits for each instruction": ", ".join(f"{reason.replace('_', ' ')} {cycles:.1f}" for cycles, reason in stalls[:5]),
            })
    write("cuda-waits", commands, samples, {"cuda-waits": rows}, stolen)


def golden(stolen):
    rows, samples, commands = [], [], []
    for fixture in sorted(p for p in (ROOT / "fixtures/golden").iterdir() if p.is_dir()):
        expected = tensors(fixture / "golden.safetensors")
        mtp = ["--mtp"] if "mtp_logits" in expected else []
        with tempfile.TemporaryDirectory() as folder:
            out = f"{folder}/out.safetensors"
            ids = ",".join(map(str, expected["input_ids"]))
            run("logits", "-m", fixture, "--backend", "cuda", "--ids", ids, "--greedy", len(expected["greedy_ids"]), *mtp, "--out", out)
            found = tensors(out)
        worst = lambda key, golden_key: max(abs(a - b) for a, b in zip(found[key], expected[golden_key], strict=True))
        deltas = {key: worst(key, "logits" if key == "decode_logits" else key) for key in ("logits", "decode_logits", "greedy_logits", "mtp_logits") if key in found}
        same = found["greedy_ids"] == expected["greedy_ids"]
        samples.append({"fixture": fixture.name, **deltas, "greedy ids equal": same})
        commands.append(f"{NAME} logits -m fixtures/golden/{fixture.name} --backend cuda --ids .. --greedy .. --mtp --out ..")
        show = lambda key: f"{deltas[key]:.1e}" if key in deltas else "-"
        rows.append({"model": fixture.name, "prefill": show("logits"), "decode": show("decode_logits"), "greedy": show("greedy_logits"), "mtp": show("mtp_logits"), "greedy ids": "equal" if same else "DIFFERENT"})
    prompts = ["def quicksort(items):", "fn main() {\n    let mut", "class Stack:\n    def __init__(self):"]
    ways = {"greedy": ["--temp", 0], "temperature 0.8, top-p 0.95, seed 7": ["--temp", 0.8, "--top-p", 0.95, "--top-k", 0, "--min-p", 0, "--seed", 7]}
    texts, text_rows = [], []
    for way, flags in ways.items():
        same, first = 0, []
        for prompt in prompts:
            answers = []
            for where in (["--backend", "cpu", "--activations", "exact"], ["--backend", "cuda"]):
                for speculate in ("off", "auto"):
                    command = ["run", *where, "--speculate", speculate, *flags, "-n", 200, "--raw", "--json", "-p", prompt]
                    answers.append(json.loads(run(*command)[0]))
                    commands.append(f"{NAME} {' '.join(map(str, command))}")
            ids = [answer["token_ids"] for answer in answers]
            same += all(i == ids[0] for i in ids)
            first += [next(n for n, pair in enumerate(zip(i, ids[0])) if pair[0] != pair[1]) for i in ids if i != ids[0]]
            texts += [{key: answer[key] for key in ("token_ids", "completion_tokens")} for answer in answers]
        text_rows.append({
            "model": "moellon-tiny (bundled)", "choice": way, "prompts": len(prompts), "tokens each": min(t["completion_tokens"] for t in texts),
            "CPU exact, CUDA, speculation off and on: all the same": f"{same} of {len(prompts)}", "first different tokens": ", ".join(map(str, first)) or "-",
        })
    write("cuda-golden", commands, {"golden": samples, "text": texts}, {"golden-cuda": rows, "texts-cuda": text_rows}, stolen)


def golden_formats(stolen, test):
    """What the test says of each format: it fails beyond the tolerance."""
    done = subprocess.run([test, "--nocapture"], capture_output=True, text=True, cwd=ROOT / "crates/model")
    if done.returncode != 0:
        raise SystemExit(f"{test} failed\n{done.stderr[-3000:]}")
    line = re.compile(r"^(.+): ([0-9.]+) of the tolerance; (\d+) of (\d+) positions and layers compared, (\d+) other choices$", re.M)
    found = line.findall(done.stdout + done.stderr)
    if not found:
        raise SystemExit(f"{test} said nothing of formats: is there a GPU?\n{done.stderr[-1000:]}")
    rows = [
        {"format": form, "worst difference, share of the tolerance": worst, "positions and layers": int(positions), "compared": int(compared), "other choices": int(others)}
        for form, worst, compared, positions, others in found
    ]
    write("cuda-golden-formats", ["cargo test -p moellon-model --test golden_cuda -- --nocapture"], rows, {"golden-formats-cuda": rows}, stolen)


def bus_gb_s():
    """Page-locked memory to the GPU."""
    import torch

    host, device = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True), torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.monotonic()
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        times.append(time.monotonic() - start)
    return (1 << 30) / statistics.median(times) / 1e9


def load(stolen, directory):
    """Loading from the page cache: what is left beside the bus is what the host does."""
    bus = bus_gb_s()
    command = ["bench", "-m", directory, "--backend", "cuda", "--batch", "1", "--context", "16", "--prompt", "1", "--windows", "1", "--steps", "1", "--json"]
    samples = []
    for _ in range(5):
        done = subprocess.run([BINARY, *command], capture_output=True, text=True, check=True)
        size, unit, seconds = re.search(r"loaded ([0-9.]+) (.B) of .* in ([0-9.]+) s onto", done.stderr).groups()
        samples.append({"GB": float(size) * {"GB": 1, "MB": 1e-3}[unit], "s": float(seconds)})
    middle = statistics.median(sample["s"] for sample in samples[1:])
    size = samples[0]["GB"]
    row = {
        "checkpoint": f"{size:.1f} GB, affine-4", "first load, s": samples[0]["s"], "from the page cache, s": f"{middle:.2f}", "GB/s": f"{size / middle:.1f}",
        "bus, GB/s": f"{bus:.1f}", "host threads": os.cpu_count(),
    }
    write("cuda-load", ["python3 bench/large_checkpoint.py DIRECTORY", f"{NAME} {' '.join(map(str, command)).replace(str(directory), 'DIRECTORY')}"], {"loads": samples, "bus_gb_s": bus}, {"cuda-load": [row]}, stolen)


def ask(server, **more):
    """Status and text of a short completion."""
    try:
        answer, _ = server.post("/v1/completions", {"prompt": "def f(x):", "max_tokens": 8, "temperature": 1, "seed": 1, **more})
        return 200, answer["choices"][0]["text"]
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]["message"]


def said(*arguments, **environment):
    """Exit status and the last line of a program that fails."""
    done = subprocess.run([BINARY, *map(str, arguments)], capture_output=True, text=True, env={**os.environ, **environment})
    return done.returncode, (done.stderr.strip().splitlines() or [""])[-1]


def faults(stolen, kernels):
    rows = []

    def note(what, expected, found, text):
        rows.append({"fault": what, "expected": expected, "found": found, "said": text})
        print(rows[-1], flush=True)

    small = ["run", "--backend", "cuda", "-p", "x", "-n", "1"]
    note("no GPU is visible", "exit status 1, one line", *said(*small, CUDA_VISIBLE_DEVICES=""))
    note("a GPU that does not exist", "exit status 1, one line", *said(*small, "--gpu", 9))
    note("a cache larger than the memory", "exit status 1, the numbers", *said("serve", "--backend", "cuda", "--port", 0, "--cache-gb", 400))
    with Server("--backend", "cuda", "--context", 512, "--cache-gb", 30) as server:
        before = ask(server)
        note("none", 200, *before)
        server.post("/models/unload", {})
        with contextlib.ExitStack() as hog:
            hog.enter_context(Server("--backend", "cuda", "--cache-gb", 100))
            note("another program has the memory when a model is loaded again", "an error with the numbers", *ask(server))
        after = ask(server)
        note("the other program has ended", 200, after[0], "the same text" if after == before else after[1])
    if kernels:
        with Server("--backend", "cuda", "--context", 512, "--cuda-kernels", kernels[0]) as server:
            note("none, kernels that can trap", 200, *ask(server, top_k=7))
            note("a kernel traps: the context is lost", "an error", *ask(server, top_k=12345))
            note("the next request", "an error that says what to do", *ask(server, top_k=7))
            note("a request after that", "an error that says what to do", *ask(server, top_k=7))
            try:
                note("its health", 503, 200, server.get("/health"))
            except urllib.error.HTTPError as error:
                note("its health", 503, error.code, json.loads(error.read()).get("status", ""))
    write("cuda-faults", [f"{NAME} serve --backend cuda ..", f"{NAME} run --backend cuda .."], rows, {"cuda-faults": rows}, stolen)


def main():
    stolen = steal_ticks()
    match sys.argv[1:]:
        case ["ladder", *formats]:
            ladder(stolen, formats)
        case ["sampling", *counts]:
            sampling(stolen, list(map(int, counts)))
        case ["context", *plans]:
            context(stolen, plans)
        case ["prompts", *plans]:
            prompts(stolen, plans)
        case ["turns", plan, *kernels]:
            turns(stolen, plan, kernels)
        case ["waits", *plans]:
            waits(stolen, plans)
        case ["golden"]:
            golden(stolen)
        case ["load", directory]:
            load(stolen, directory)
        case ["formats", test]:
            golden_formats(stolen, test)
        case ["faults", *kernels]:
            faults(stolen, kernels)
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
