"""Measures this build and writes receipts, from which the tables of the documents are generated.

    cargo build --release -p moellon
    python3 bench/receipts.py golden            # worst difference from transformers, every fixture and CPU level
    python3 bench/receipts.py open DIRECTORY    # opening and loading a large checkpoint (bench/large_checkpoint.py)
    python3 bench/receipts.py tiny              # the bundled model: prompt and decode speed
    python3 bench/receipts.py decode [SHAPE ..] # slices of published shapes: decode and prefill against bandwidth
    python3 bench/receipts.py context           # decode at 8192 positions against 128, sparse attention on
    python3 bench/receipts.py context-variants NAME=COMMIT=PROGRAM ..  # the same of several builds in turns
    python3 bench/receipts.py verify [SHAPE ..] # steps of several rows of one sequence against their bytes
    python3 bench/receipts.py resident DIRECTORY # memory of a large checkpoint, loaded and decoding
    python3 bench/receipts.py kernels           # one linear layer by format and rows (examples/kernel_speed)
    python3 bench/receipts.py operations [SHAPE ..] # a step operation by operation, and its parallel regions (examples/step_operations)
    python3 bench/receipts.py variants NAME=COMMIT=PROGRAM .. -- FORMAT/ROWS ..  # builds of examples/kernel_speed in turns; the first is compared with
    python3 bench/receipts.py step-variants NAME=COMMIT=FILE,FILE,..  # what `moellon bench --json` of each commit printed, run in turns
    python3 bench/receipts.py activations NAME=COMMIT=PROGRAM ..  # what rounding activations changes, for each build
    python3 bench/receipts.py pages             # what huge pages are worth on this machine (moellon-tensor's examples/page_walks)
    python3 bench/receipts.py cuda [SHAPE/FORMAT[/BATCHES[/PROMPTS]] ..]  # the same on an NVIDIA GPU, up to the whole GLM-5.2-77; text against the CPU's
    python3 bench/receipts.py wgpu              # a slice on the portable GPU back end, stages by the adapter's clock; text against the CPU's
    python3 bench/receipts.py wgpu-steps FILE   # what examples/step_speed wrote on another machine: {"machine", "binary_sha256", "commands", "steps", "notes"}
    python3 bench/receipts.py cuda-kernels      # each kernel of a step under Nsight Compute: microseconds, bytes (needs ncu)
    python3 bench/receipts.py cuda-sanitizer CONFORMANCE RECORDED [KERNELS]  # the test binaries of backend-cuda under compute-sanitizer; KERNELS: CUBINs made with -DRACECHECK (barriers.cuh)
    cargo xtask docs --write

A receipt holds the commit, the machine, the commands, every sample, rows for tables, and a hash over it all. Needs nothing but Python.
"""

import concurrent.futures
import csv
import datetime
import hashlib
import json
import math
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Another binary than the one that cargo has built last, for runs that outlive a build.
BINARY = Path(os.environ.get("MOELLON_BINARY", ROOT / "target/release/moellon")).resolve()
NAME = "target/release/moellon"


def run(*arguments):
    """Standard output, seconds and peak resident bytes of a run of the program."""
    with tempfile.TemporaryFile() as out:
        start = time.monotonic()
        process = subprocess.Popen([BINARY, *map(str, arguments)], stdout=out, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        elapsed = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise SystemExit(f"{NAME} {' '.join(map(str, arguments))}: exit status {process.returncode}")
        out.seek(0)
        return out.read(), elapsed, usage.ru_maxrss * 1024


def steal_ticks():
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    return int(fields[7]), sum(map(int, fields))


def write(name, commands, samples, tables, stolen, machine=None, binary=None):
    """`machine` is another one than this, where the samples are from; `binary` the hash of another program than `moellon`."""
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    # A machine that has the binary alone cannot ask.
    commit = os.environ.get("MOELLON_COMMIT") or git("rev-parse", "HEAD")
    doctor = json.loads(run("doctor", "--json")[0])
    after = steal_ticks()
    # A second receipt of a day, beside the first.
    name += os.environ.get("MOELLON_RECEIPT_SUFFIX", "")
    receipt = {
        "schema": 1,
        "name": name,
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "binary_sha256": binary or hashlib.sha256(BINARY.read_bytes()).hexdigest(),
        "machine": machine or {key: doctor[key] for key in ("cpu", "cores", "cpu_level", "memory_bytes", "os", "gpus", "driver", "read_gb_s", "read_gb_s_1_thread")},
        "steal_pct": round(100 * (after[0] - stolen[0]) / max(1, after[1] - stolen[1]), 2),
        "load_average": os.getloadavg(),
        "commands": commands,
        "samples": samples,
        "tables": tables,
    }
    path = ROOT / "receipts" / f"{receipt['date']}-{name}.json"
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(receipt, indent=1) + "\n")
    temporary.rename(path)
    run("receipt", "seal", path)
    print(path.relative_to(ROOT))


def tensors(path):
    """Name to a list of numbers (f32 and i32 tensors)."""
    data = Path(path).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    values = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        code = {"F32": "f", "I32": "i"}[entry["dtype"]]
        values[name] = struct.unpack(f"<{(end - start) // 4}{code}", data[8 + length + start : 8 + length + end])
    return values


def golden(stolen):
    levels = json.loads(run("doctor", "--json")[0])["cpu_levels"]
    rows, samples, commands = [], [], []
    for fixture in sorted(p for p in (ROOT / "fixtures/golden").iterdir() if p.is_dir()):
        expected = tensors(fixture / "golden.safetensors")
        worst = {}
        for level in levels:
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out.safetensors"
                ids = ",".join(map(str, expected["input_ids"]))
                mtp = ["--mtp"] if "mtp_logits" in expected else []
                run("logits", "-m", fixture, "--cpu-level", level, "--ids", ids, "--greedy", len(expected["greedy_ids"]), *mtp, "--out", out)
                found = tensors(out)
            assert found["greedy_ids"] == expected["greedy_ids"], f"{fixture.name} {level}: greedy ids differ"
            difference = lambda key, golden_key: max(abs(a - b) for a, b in zip(found[key], expected[golden_key], strict=True))
            deltas = {key: difference(key, "logits" if key == "decode_logits" else key) for key in ("logits", "decode_logits", "greedy_logits", "mtp_logits") if key in found}
            samples.append({"fixture": fixture.name, "level": level, **deltas})
            worst = {key: max(value, worst.get(key, 0)) for key, value in deltas.items()}
        commands.append(f"{NAME} logits -m fixtures/golden/{fixture.name} --cpu-level LEVEL --ids .. --greedy .. --mtp --out ..")
        show = lambda key: f"{worst[key]:.1e}" if key in worst else "-"
        rows.append({"model": fixture.name, "prefill": show("logits"), "decode": show("decode_logits"), "greedy": show("greedy_logits"), "mtp": show("mtp_logits"), "greedy ids": "equal"})
    write("golden", commands, samples, {"golden": rows}, stolen)


def open_and_load(stolen, directory):
    size = sum(p.stat().st_size for p in Path(directory).glob("*.safetensors"))
    opens = [run("inspect", "-m", directory, "--bandwidth", 1)[1] for _ in range(7)]
    with tempfile.TemporaryDirectory() as folder:
        loads = [run("logits", "-m", directory, "--ids", "1,2,3", "--activations", "int8", "--cache", "bf16", "--out", Path(folder) / "out")[1:] for _ in range(1)]
    row = {
        "checkpoint": f"{size / 1e9:.2f} GB, affine-4",
        "open and validate, s": f"{statistics.median(opens):.3f}",
        "load and repack, s": f"{statistics.median(t for t, _ in loads):.1f}",
        "peak resident, GB": f"{max(m for _, m in loads) / 1e9:.2f}",
        "of the file": f"{max(m for _, m in loads) / size:.2f}x",
    }
    commands = ["python3 bench/large_checkpoint.py DIRECTORY", f"{NAME} inspect -m DIRECTORY --bandwidth 1", f"{NAME} logits -m DIRECTORY --ids 1,2,3 --activations int8 --cache bf16 --out .."]
    write("open-and-load", commands, {"open_s": opens, "load_s_and_peak_bytes": loads, "file_bytes": size}, {"open-and-load": [row]}, stolen)


def tiny(stolen):
    command = ["run", "--json", "--temp", "0", "-n", "256", "--raw", "-p", (ROOT / "crates/engine/src/sampler.rs").read_text()[:1500]]
    samples = [json.loads(run(*command)[0]) for _ in range(9)]
    for sample in samples:
        assert sample["token_ids"] == samples[0]["token_ids"], "greedy text changed between runs"
    median = lambda key: statistics.median(s[key] for s in samples)
    row = {
        "model": samples[0]["model"],
        "prompt tokens": samples[0]["prompt_tokens"],
        "prompt tok/s": f"{median('prompt_tok_s'):.0f}",
        "decode tok/s": f"{median('decode_tok_s'):.0f}",
        "load, ms": f"{median('load_ms'):.0f}",
    }
    kept = [{k: v for k, v in s.items() if k not in ("text", "thinking", "token_ids")} for s in samples]
    write("tiny", [f"{NAME} run --json --temp 0 -n 256 --raw -p (1500 characters of Rust)"], kept, {"tiny": [row]}, stolen)


def bench(plans, prompts):
    """Reports of `moellon bench` and rows for a table: (shape, format, batches, further arguments) each."""
    reports, rows, commands = [], [], []
    for spec, plan, batches, *more in plans:
        command = ["bench", "--synthetic", spec, "--format", plan, "--batch", batches, "--prompt", prompts, "--json", *more]
        report = json.loads(run(*command)[0])
        reports.append(report)
        commands.append(f"{NAME} {' '.join(command)}")
        for result in report["results"]:
            row = {
                "shape": spec, "format": plan, "batch": result["batch"], "tok/s": f"{result['decode_tok_s']:.1f}",
                "MB a step": f"{result['bytes_per_step'] / 1e6:.0f}", "GB/s": f"{result['bandwidth_gb_s']:.1f}",
                "share of measured bandwidth": f"{100 * result['bandwidth_share']:.0f} %",
                "distinct experts": f"{result['distinct_experts']:.1f}",
            }
            for prefill in report["prefill"]:
                row[f"prefill {prefill['tokens']}, tok/s"] = f"{prefill['tok_s']:.0f}"
            rows.append(row)
    return reports, rows, commands


# Slices that fit a small machine, a minute or two each, much of it making weights. Of GLM's three layers one has an indexer.
SLICES = {"qwen": "qwen3-30b-a3b:layers=8,vocab=32768", "glm": "glm-5.2-77:layers=3,vocab=32768"}


def decode(stolen, shapes):
    """24 steps a window: behind the measurement of bandwidth steps become faster for about ten (`step_ms_by_place`)."""
    for shape in shapes or SLICES:
        for plan in ("affine-4", "nvfp4", "affine-3"):
            reports, rows, commands = bench([(SLICES[shape], plan, "1,2,4,8", "--windows", "7", "--steps", "24")], "512")
            for row in rows:
                row["windows discarded for steal"] = sum(r["discarded_windows"] for r in reports[0]["results"] + reports[0]["prefill"])
            write(f"decode-cpu-{shape}-{plan}", commands, reports, {"decode-cpu": rows}, stolen)


def context_command(length, windows):
    return ["bench", "--synthetic", SLICES["glm"], "--format", "affine-4", "--batch", "1", "--context", str(length), "--prompt", "1", "--windows", str(windows), "--cache", "bf16", "--json"]


def context(stolen):
    reports, rows, commands = [], [], []
    for length in (128, 2048, 8192):
        command = context_command(length, 9)
        report = json.loads(run(*command)[0])
        reports.append(report)
        commands.append(f"{NAME} {' '.join(command)}")
        result = report["results"][0]
        rows.append({
            "shape": SLICES["glm"], "format": "affine-4", "context": length, "ms": f"{result['step_ms']:.2f}",
            "quartiles": "-".join(f"{ms:.2f}" for ms in result["step_ms_quartiles"]),
            "against 128": f"{result['step_ms'] / reports[0]['results'][0]['step_ms']:.2f}",
            "MB a step": f"{result['bytes_per_step'] / 1e6:.0f}",
            "share of measured bandwidth": f"{100 * result['bandwidth_share']:.0f} %",
        })
    write("context-cpu", commands, reports, {"context-cpu": rows}, stolen)


def context_rows(samples):
    """A row of every measurement: two rounds have no median, and one minute's bandwidth is not the next one's."""
    rows, first = [], {}
    for sample in sorted(samples, key=lambda s: s["round"]):
        result = sample["report"]["results"][0]
        stages = {stage["stage"]: stage["microseconds"] / 1000 for stage in result["stages"]}
        shortest = first.setdefault((sample["round"], sample["variant"]), result["step_ms"])
        rows.append({
            "shape": SLICES["glm"], "format": "affine-4", "round": sample["round"], "variant": sample["variant"], "commit": sample["commit"][:7],
            "context": sample["context"], "ms a step": f"{result['step_ms']:.2f}", "quartiles": "-".join(f"{ms:.2f}" for ms in result["step_ms_quartiles"]),
            "against 128": f"{result['step_ms'] / shortest:.2f}", "attention, ms": f"{stages['attention']:.2f}", "indexer, ms": f"{stages['indexer']:.2f}",
            "reading, GB/s": f"{result['measured_read_gb_s']:.1f}",
        })
    return rows


def context_variants(stolen, *words):
    """Steps at 128 and 8192 positions of several builds in turns, and what attention and the indexer take of them."""
    builds = [word.split("=", 2) for word in words]
    lengths, rounds, samples = (128, 8192), 2, []
    for number in range(rounds):
        for name, commit, program in builds if number % 2 == 0 else builds[::-1]:
            for length in lengths:
                report = json.loads(subprocess.run([program, *context_command(length, 5)], check=True, capture_output=True, text=True).stdout)
                samples.append({"variant": name, "commit": commit, "round": number + 1, "context": length, "report": report})
    rows = context_rows(samples)
    commands = [f"{NAME} {' '.join(context_command(length, 5))}" for length in lengths]
    kept = {"samples": samples, "builds": [{"variant": n, "commit": c, "binary_sha256": hashlib.sha256(Path(b).read_bytes()).hexdigest()} for n, c, b in builds]}
    write("context-variants", commands, kept, {"context-variants": rows}, stolen)


def verify(stolen, shapes):
    reports, rows, commands = [], [], []
    for shape in [SLICES[shape] for shape in shapes or SLICES]:
        command = ["bench", "--synthetic", shape, "--format", "affine-4", "--speculate", "replay:p=0.8,overlap=0.26,depth=2", "--batch", "1", "--windows", "5", "--steps", "8", "--json"]
        report = json.loads(run(*command)[0])
        reports.append(report)
        commands.append(f"{NAME} {' '.join(command)}")
        for cost in report["verify"]:
            rows.append({
                "shape": shape, "format": "affine-4", "rows of one sequence": cost["rows"], "ms": f"{cost['ms']:.2f}",
                "against one row": f"{cost['cost']:.2f}", "by bytes": f"{cost['bytes_cost']:.2f}",
                "against its bytes": f"{cost['cost'] / cost['bytes_cost']:.2f}", "distinct experts": f"{cost['distinct_experts']:.1f}",
            })
    write("-".join(["verify-cpu", *shapes]), commands, reports, {"verify-cpu": rows}, stolen)


def resident(stolen, directory):
    """Not by `moellon bench`, whose buffer for measuring bandwidth counts as well."""
    size = sum(p.stat().st_size for p in Path(directory).glob("*.safetensors"))
    cache = json.loads(run("inspect", "-m", directory, "--bandwidth", 1, "--json")[0])
    with tempfile.TemporaryDirectory() as folder:
        command = ["logits", "-m", directory, "--ids", "1,2,3", "--greedy", "128", "--activations", "int8", "--cache", "bf16", "--out", Path(folder) / "out"]
        process = subprocess.Popen([BINARY, *map(str, command)], stderr=subprocess.DEVNULL)
        samples = []
        while process.poll() is None:
            lines = [line.split() for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()]
            kb = {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[0] in ("VmRSS:", "VmHWM:", "RssAnon:", "RssFile:")}
            samples += [kb] if kb else []
            time.sleep(0.02)
        assert process.returncode == 0, f"{NAME} logits: exit status {process.returncode}"
    # Tokens are decoded from the prompt on to the end: the last second is that.
    last = samples[-50:-2]
    resident, peak = statistics.median(s["VmRSS"] for s in last), max(s["VmHWM"] for s in samples)
    gb = lambda size: f"{size / 1e9:.2f}"
    row = {
        "checkpoint": f"{gb(size)} GB, affine-4", "resident, decoding, GB": gb(resident), "of the file": f"{resident / size:.2f}x",
        "peak, while loading, GB": gb(peak), "peak of the file": f"{peak / size:.2f}x",
    }
    commands = ["python3 bench/large_checkpoint.py DIRECTORY", f"{NAME} {' '.join(map(str, command[:-1]))} ..".replace(str(directory), "DIRECTORY")]
    write("resident-cpu", commands, {"file_bytes": size, "inspect": cache, "last_second": last, "peak_bytes": peak}, {"resident-cpu": [row]}, stolen)


def kernels(stolen):
    program = Path(os.environ.get("MOELLON_KERNEL_SPEED", ROOT / "target/release/examples/kernel_speed"))
    # The two best levels in turns: with AMX, the other one multiplies bytes.
    words = ["affine-4", "nvfp4", "affine-3", *json.loads(run("doctor", "--json")[0])["cpu_levels"][-2:]]
    lines = subprocess.run([program, *words], check=True, capture_output=True, text=True).stdout.splitlines()
    rows = []
    for line in lines:
        # `FORMAT LEVEL rows N: X GB/s (P % of Y), Z GMAC/s`
        name, level, _, count, rate, _, _, share, _, _, _, macs, _ = line.replace("(", "( ").split()
        rows.append({
            "format": name, "level": level, "rows": count.rstrip(":"), "GB/s": rate, "share of measured bandwidth": f"{share} %", "GMAC/s": macs,
            "against one row": None,
        })
        one = next(row for row in rows if (row["format"], row["level"]) == (name, level))
        rows[-1]["against one row"] = f"{float(one['GB/s']) / float(rate):.2f}"
    write("kernels-cpu", ["target/release/examples/kernel_speed " + " ".join(words)], lines, {"kernels-cpu": rows}, stolen)


def operations(stolen, shapes):
    program = Path(os.environ.get("MOELLON_STEP_OPERATIONS", ROOT / "target/release/examples/step_operations"))
    reports, steps, rows, commands = [], [], [], []
    for shape, batch in [(SLICES[shape], batch) for shape in shapes or ["qwen"] for batch in ("1", "8")]:
        words = [shape, "affine-4", batch, "128", "30"]
        report = json.loads(subprocess.run([program, *words], check=True, capture_output=True, text=True).stdout)
        reports.append(report)
        commands.append("target/release/examples/step_operations " + " ".join(words))
        meetings_us = report["regions"] * report["region_us"] + report["barriers"] * report["barrier_us"]
        steps.append({
            "shape": shape, "format": "affine-4", "batch": batch, "ms a step": f"{report['step_ms']:.2f}",
            "quartiles": "-".join(f"{ms:.2f}" for ms in report["step_ms_quartiles"]), "regions": report["regions"],
            "barriers in them": report["barriers"], "us of an empty region": f"{report['region_us']:.2f}", "us of a barrier": f"{report['barrier_us']:.2f}",
            "all of them, of a step": f"{meetings_us / report['step_ms'] / 10:.1f} %",
        })
        for operation in report["operations"]:
            rows.append({
                "shape": shape, "batch": batch, "operation": operation["operation"], "a step": operation["count"],
                "us each": f"{operation['us']:.1f}", "us of a step": f"{operation['of_step_us']:.0f}",
            })
    write("-".join(["operations-cpu", *shapes]), commands, reports, {"regions-cpu": steps, "operations-cpu": rows}, stolen)


def variants(stolen, *words):
    """Builds of `kernel_speed` (one of each commit) in turns, a process each: designs that were tried beside the one that stayed."""
    cut = words.index("--")
    builds = [word.split("=", 2) for word in words[:cut]]
    cases = [word.split("/") for word in words[cut + 1 :]]
    level = json.loads(run("doctor", "--json")[0])["cpu_levels"][-1]
    rounds, samples = 4, []
    for number in range(rounds):
        for form in dict.fromkeys(form for form, _ in cases):
            counts = [rows for of, rows in cases if of == form]
            # In turns of order as well: who comes first finds another machine.
            for name, _, program in builds if number % 2 == 0 else builds[::-1]:
                lines = subprocess.run([program, form, level, *counts], check=True, capture_output=True, text=True).stdout.splitlines()
                samples += [{"variant": name, "line": line} for line in lines]
    found = {}
    for sample in samples:
        form, _, _, rows, rate, _, _, _, _, _, read, macs, _ = sample["line"].replace("(", "( ").split()
        found.setdefault((form, rows.rstrip(":"), sample["variant"]), []).append([float(rate), float(rate) / float(read.rstrip("),")), float(macs)])
    rows = []
    for form, count in cases:
        first = None
        for name, commit, _ in builds:
            rates, shares, macs = zip(*found[form, count, name])
            first = first or statistics.median(shares)
            rows.append({
                "format": form, "rows": count, "variant": name, "commit": commit[:7], "GB/s": f"{statistics.median(rates):.1f}",
                "lowest and highest": f"{min(rates):.1f}-{max(rates):.1f}", "GMAC/s": f"{statistics.median(macs):.0f}",
                "share of measured bandwidth": f"{100 * statistics.median(shares):.0f} %", "against the first": f"{statistics.median(shares) / first:.2f}",
            })
    kept = {"samples": samples, "builds": [{"variant": n, "commit": c, "binary_sha256": hashlib.sha256(Path(b).read_bytes()).hexdigest()} for n, c, b in builds]}
    write("cpu-variants", [f"kernel_speed FORMAT {level} ROWS, {rounds} rounds of each build in turns"], kept, {"cpu-variants": rows}, stolen)


def step_variants(stolen, *words):
    """Steps and prompts of several builds of the program, run in turns: the first file of each, then the second, .."""
    rows, samples = [], []
    for word in words:
        name, commit, files = word.split("=", 2)
        reports = [json.loads(Path(file).read_text()) for file in files.split(",")]
        samples.append({"variant": name, "commit": commit, "reports": reports})
        first = reports[0]
        for number, result in enumerate(first["results"]):
            steps = [report["results"][number] for report in reports]
            rows.append({
                "shape": first["model"].removeprefix("synthetic "), "format": first["format"], "variant": name, "commit": commit[:7], "batch": result["batch"],
                "ms a step": f"{statistics.median(s['step_ms'] for s in steps):.2f}",
                "lowest and highest": f"{min(s['step_ms'] for s in steps):.2f}-{max(s['step_ms'] for s in steps):.2f}",
                "share of measured bandwidth": f"{100 * statistics.median(s['bandwidth_share'] for s in steps):.0f} %",
                "prefill 512, tok/s": f"{statistics.median(r['prefill'][0]['tok_s'] for r in reports):.0f}",
            })
    commands = [
        f"{NAME} bench --synthetic {shape} --format {form} --batch 1,8 --prompt 512 --windows 4 --steps 12 --json"
        for shape, form in dict.fromkeys((row["shape"], row["format"]) for row in rows)
    ]
    write("cpu-step-variants", commands, samples, {"cpu-step-variants": rows}, stolen)


def activations(stolen, *words):
    """The bundled model in formats of several groups: predictions with rounded activations against those with exact ones, on the same weights, of
    each build. Texts are sources of this repository."""
    from serving import Server

    builds = [word.split("=", 2) for word in words]
    sequence, texts = 256, ["crates/engine/src/engine.rs", "crates/engine/src/sampler.rs", "bench/serving.py", "crates/text/src/lib.rs"]
    with Server() as server:
        ids = [server.post("/tokenize", {"prompt": (ROOT / text).read_text()})[0]["tokens"][:sequence] for text in texts]
    rows, samples = [], []
    with tempfile.TemporaryDirectory() as folder:
        for form in ("affine-3-g64", "affine-4-g64", "affine-4-g128", "affine-6-g64", "affine-4-g32", "nvfp4"):
            model, out = Path(folder) / form, Path(folder) / "out.safetensors"
            run("quantize", "--format", form, "--method", "search", "--out", model)

            def logits(program, how):
                for tokens in ids:
                    command = [program, "logits", "-m", model, "--backend", "cpu", "--ids", ",".join(map(str, tokens)), "--activations", how, "--out", out]
                    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                    yield tensors(out)["logits"]

            exact = list(logits(builds[0][2], "exact"))
            for name, commit, program in builds:
                found = [far(a, b, tokens) for a, b, tokens in zip(logits(program, "int8"), exact, ids, strict=True)]
                mean = lambda key: statistics.fmean(value for each in found for value in each[key])
                samples.append({"variant": name, "commit": commit, "format": form, "kl": [statistics.fmean(each["kl"]) for each in found]})
                rows.append({
                    "format": form, "variant": name, "commit": commit[:7], "error of a logit, of their spread": f"{100 * mean('error'):.2f} %",
                    "KL, nats": f"{mean('kl'):.5f}", "same first choice": f"{100 * mean('same'):.1f} %",
                    "perplexity": f"{math.exp(mean('nats')):.3f}", "with exact activations": f"{math.exp(mean('exact_nats')):.3f}",
                })
                print(rows[-1], flush=True)
    commands = [f"{NAME} quantize --format FORMAT --method search --out MODEL", f"{NAME} logits -m MODEL --ids .. --activations exact", f"{NAME} logits -m MODEL --ids .. --activations int8"]
    kept = {"texts": texts, "tokens of each": sequence, "samples": samples}
    write("cpu-activations", commands, kept, {"cpu-activations": rows}, stolen)


def far(found, exact, tokens):
    """By position: root mean square error over the spread of the exact logits, divergence, whether both choose alike, nats of the next token."""
    size = len(found) // len(tokens)
    result = {"error": [], "kl": [], "same": [], "nats": [], "exact_nats": []}
    for at, token in enumerate(tokens[1:]):
        a, b = found[at * size : (at + 1) * size], exact[at * size : (at + 1) * size]
        log_a, log_b = (math.log(math.fsum(map(math.exp, row))) for row in (a, b))
        middle = math.fsum(b) / size
        result["error"].append(math.dist(a, b) / math.dist(b, [middle] * size))
        result["kl"].append(math.fsum(math.exp(y - log_b) * ((y - log_b) - (x - log_a)) for x, y in zip(a, b)))
        result["same"].append(a.index(max(a)) == b.index(max(b)))
        result["nats"].append(log_a - a[token])
        result["exact_nats"].append(log_b - b[token])
    return result


def pages(stolen):
    program = Path(os.environ.get("MOELLON_PAGE_WALKS", ROOT / "target/release/examples/page_walks"))
    samples = [subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines() for _ in range(5)]
    rows = []
    for lines in zip(*samples):
        # `huge pages: 4.9 ns a line side by side, 14.4 ns a line a page`
        numbers = [[float(line.split()[at]) for at in (2, 9)] for line in lines]
        dense, paged = (statistics.median(column) for column in zip(*numbers))
        rows.append({"pages": lines[0].split()[0], "ns a line, side by side": f"{dense:.1f}", "ns a line, a 4 KiB page each": f"{paged:.1f}"})
    write("pages-cpu", ["target/release/examples/page_walks"], samples, {"pages-cpu": rows}, stolen)


def cuda(stolen, chosen):
    """All plans, or those named as SHAPE/FORMAT[/BATCHES[/PROMPTS]], the last two as `moellon bench` takes them."""
    batches = "1,2,4,8,16,32"
    everything = ["glm-5.2-77/q3a4", *(f"glm-5.2-77:layers=12/{form}" for form in ("affine-4", "nvfp4", "affine-3")), "qwen3-30b-a3b:layers=40/affine-4"]
    reports, rows, commands = [], [], []
    for plan in chosen or everything:
        shape, form, *more = plan.split("/")
        measured = bench([(shape, form, more[0] if more else batches, "--backend", "cuda", "--windows", "7", "--steps", "20")], more[1] if more[1:] else "512")
        for every, found in zip((reports, rows, commands), measured):
            every += found
    prompts = ["def quicksort(items):", "fn main() {\n    let mut", "class Stack:\n    def __init__(self):"]
    texts = []
    for prompt in prompts:
        for where in (["--backend", "cpu", "--activations", "exact"], ["--backend", "cuda"]):
            for speculate in ("off", "auto"):
                command = ["run", *where, "--speculate", speculate, "--temp", "0", "-n", "200", "--raw", "--json", "-p", prompt]
                texts.append(json.loads(run(*command)[0]))
                commands.append(f"{NAME} {' '.join(command)}")
    same = sum(len({tuple(t["token_ids"]) for t in texts[4 * i:4 * i + 4]}) == 1 for i in range(len(prompts)))
    text_row = {
        "model": "moellon-tiny (bundled)", "prompts": len(prompts), "tokens each": min(t["completion_tokens"] for t in texts),
        "CPU exact, CUDA, speculation off and on: all the same": f"{same} of {len(prompts)}",
    }
    write("cuda", commands, {"bench": reports, "text": texts}, {"decode-cuda": rows, "text-cuda": [text_row]}, stolen)


def wgpu(stolen):
    shape = "glm-5.2-77:layers=12"
    more = ["--backend", "wgpu", "--context", "128", "--windows", "7", "--steps", "20"]
    reports, rows, commands = bench([(shape, "affine-4", "1,2,4,8", *more)], "512")
    one, stages = reports[0]["results"][0], []
    for row, result in zip(rows, reports[0]["results"], strict=True):
        row["against batch 1"] = f"{result['decode_tok_s'] / one['decode_tok_s']:.2f}"
        if result.get("device_ms"):
            row["of a step outside the adapter's clock"] = f"{100 * (1 - result['device_ms'] / result['step_ms']):.1f} %"
        for stage in result["stages"]:
            stages.append({
                "shape": shape, "batch": result["batch"], "stage": stage["stage"], "us": f"{stage['microseconds']:.1f}",
                "MB": f"{stage['bytes'] / 1e6:.1f}", "GB/s": f"{stage['gb_s']:.0f}",
            })
    prompts = ["def quicksort(items):", "fn main() {\n    let mut", "class Stack:\n    def __init__(self):"]
    texts, same = [], 0
    for prompt in prompts:
        found = []
        for where in (["--backend", "cpu", "--activations", "exact"], ["--backend", "wgpu"]):
            for speculate in ("off", "auto"):
                command = ["run", *where, "--speculate", speculate, "--temp", "0", "-n", "200", "--raw", "--json", "-p", prompt]
                found.append(json.loads(run(*command)[0]))
                commands.append(f"{NAME} {' '.join(command)}")
        same += len({tuple(text["token_ids"]) for text in found}) == 1
        texts += found
    text_row = {
        "model": "moellon-tiny (bundled)", "adapter": reports[0]["backend"], "prompts": len(prompts),
        "tokens each": min(text["completion_tokens"] for text in texts),
        "CPU exact, wgpu, speculation off and on: all the same": f"{same} of {len(prompts)}",
    }
    doctor = json.loads(run("doctor", "--json")[0])
    samples = {"bench": reports, "text": texts, "adapters": doctor["adapters"]}
    write("wgpu", commands, samples, {"decode-wgpu": rows, "stages-wgpu": stages, "text-wgpu": [text_row]}, stolen)


def wgpu_steps(stolen, path):
    found = json.loads(Path(path).read_text())
    rows, stages = [], []
    for step in found["steps"]:
        rows.append({
            "shape": step["shape"], "format": step["format"], "kernels": step["kernels_of"], "batch": step["batch"],
            "tok/s": f"{step['tok_s']:.1f}", "ms a step": f"{step['step_ms']:.2f}", "by the adapter's clock": f"{step['device_ms']:.2f}",
            "outside of it": f"{100 * (1 - step['device_ms'] / step['step_ms']):.1f} %",
            "MB a step": f"{step['bytes'] / 1e6:.0f}", "GB/s": f"{step['bytes'] / step['step_ms'] / 1e6:.0f}",
        })
        # Of runs of one program again the steps are enough.
        for stage in [] if step.get("again") else step["stages"]:
            stages.append({
                "kernels": step["kernels_of"], "batch": step["batch"], "stage": stage["stage"], "us": f"{stage['us']:.0f}",
                "MB": f"{stage['bytes'] / 1e6:.1f}",
                # Kernels of another stage do what a stage without time of its own does.
                "GB/s": f"{stage['bytes'] / stage['us'] / 1e3:.0f}" if stage["us"] else None,
            })
    prompts, prompt_stages = [], []
    for prompt in found.get("prompts", []):
        what = "cooperative matrices" if prompt["cooperative_matrices"] else "eight rows at a time"
        prompts.append({
            "shape": prompt["shape"], "format": prompt["format"], "products": prompt.get("kernels_of", what), "prompt tokens": prompt["prompt"],
            "tok/s": f"{prompt['tok_s']:.0f}", "ms": f"{prompt['ms']:.1f}", "by the adapter's clock": f"{prompt['device_ms']:.1f}",
            "hash of logits": prompt["hash_of_logits"],
        })
        times = {stage["stage"]: f"{stage['us'] / 1e3:.1f}" for stage in prompt["stages"]}
        prompt_stages.append({
            "shape": prompt["shape"], "products": prompt.get("kernels_of", what), "prompt tokens": prompt["prompt"],
            **{stage: times.get(stage) for stage in ("attention input", "attention", "attention output", "router", "shared expert", "experts")},
        })
    tables = {"decode-wgpu": rows, "stages-wgpu": stages, "prefill-wgpu": prompts, "prefill-stages-wgpu": prompt_stages}
    tables = {name: rows for name, rows in tables.items() if rows}
    write(found.get("name", "wgpu"), found["commands"], found, tables, stolen, found["machine"], found["binary_sha256"])


def cuda_kernels(stolen):
    """Kernels of recorded steps, each alone on the device: their times add up to more than a step."""
    names = "line|heads|up_|experts_down|router|attend|rms|route|linear|gate|down|write|rope|plain|gather|layer|add|argmax|embed|few|latent"
    metrics = ["gpu__time_duration.sum", "dram__bytes_read.sum", "smsp__issue_active.avg.pct_of_peak_sustained_active"]
    rows, samples, commands = [], [], []
    for model, form, batch in (("glm-5.2-77:layers=4", form, batch) for form, batch in (("affine-4", 1), ("affine-4", 8), ("affine-4", 32), ("q3a4", 1))):
        command = ["bench", "--synthetic", model, "--format", form, "--backend", "cuda", "--batch", str(batch), "--prompt", "1"]
        # The steps before the first that is fused are skipped.
        profiler = ["ncu", "--clock-control", "none", "--cache-control", "none", "-k", f"regex:^({names})", "--metrics", ",".join(metrics)]
        words = [*profiler, "--launch-skip", "260", "--launch-count", "180", "--csv", BINARY, *command]
        out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        commands.append(" ".join([*profiler[:5], "..", NAME, *command]))
        launches = {}
        for row in csv.DictReader(line for line in out.splitlines() if line.startswith('"')):
            kernel = (row["ID"], row["Kernel Name"].split("(")[0], row["Grid Size"])
            launches.setdefault(kernel, {})[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
        kernels = {}
        for (_, name, grid), values in launches.items():
            kernels.setdefault((name, grid), []).append([values[metric] for metric in metrics])
        samples.append([{"kernel": name, "grid": grid, "ns, bytes, issue %": values} for (name, grid), values in kernels.items()])
        for (name, grid), values in sorted(kernels.items(), key=lambda item: -sum(value[0] for value in item[1])):
            ns, read, issue = (statistics.median(column) for column in zip(*values))
            rows.append({
                "model": f"{model}, {form}", "rows": batch, "kernel": name, "grid": grid, "launches": len(values), "us": round(ns / 1e3, 1),
                "MB read": round(read / 1e6, 1), "TB/s": round(read / ns / 1e3, 2), "issue slots used": f"{issue:.0f} %",
            })
    write("cuda-kernels", commands, samples, {"cuda-kernels": rows}, stolen)


def cuda_sanitizer(stolen, conformance, recorded, kernels=None):
    """The tests of the CUDA back end under compute-sanitizer, MOELLON_SANITIZER_JOBS side by side: each waits for its own process most
    of the time, but two dozen of them at once take conformance from one minute to more than three."""
    tools = ("memcheck", "racecheck", "initcheck")
    one_row = {"MOELLON_TEST_FORMATS": "affine-4,q3a4,nvfp4"}
    plans = [(tool, "conformance, every operation", [conformance], {}) for tool in tools]
    plans += [(tool, "recorded steps of one row, bundled shape: affine-4, q3a4, NVFP4", [recorded, "bundled_shape_in_every", "--skip", "rows_of", "--test-threads=1"], one_row) for tool in tools]
    plans += [(tool, "recorded steps of the MTP layer, bundled shape", [recorded, "mtp_steps", "--test-threads=1"], one_row) for tool in tools]
    plans += [
        (tool, f"recorded steps of {rows} rows, bundled shape: {form}", [recorded, "rows_of_the_bundled", "--test-threads=1"], {"MOELLON_TEST_FORMATS": form, "MOELLON_TEST_ROWS": rows})
        for rows in ("2", "7") for form in ("affine-4", "q3a4", "nvfp4") for tool in tools
    ]
    deadline = time.monotonic() + float(os.environ.get("MOELLON_SANITIZER_LIMIT_S", 3600))

    def check(plan):
        tool, what, words, environment = plan
        if tool == "racecheck" and kernels:
            environment = {**environment, "MOELLON_CUDA_KERNELS": kernels}
            what += " (every lane arrives)"
        start = time.monotonic()
        try:
            done = subprocess.run(["compute-sanitizer", "--tool", tool, *words], capture_output=True, text=True, env={**os.environ, **environment}, timeout=max(1, deadline - start))
        except subprocess.TimeoutExpired:
            print(f"compute-sanitizer {tool}, {what}: no time left, no sample", flush=True)
            return None
        text = done.stdout + done.stderr
        summary = [line.removeprefix("========= ") for line in text.splitlines() if "SUMMARY" in line]
        passed = [line for line in text.splitlines() if line.startswith("test result: ok. 1 passed")]
        if not summary or not passed:
            raise SystemExit(f"compute-sanitizer {tool}, {what}: no summary, or no test\n{text[-2000:]}")
        print(f"{tool}, {what}: {summary}, {time.monotonic() - start:.0f} s", flush=True)
        return {"tool": tool, "what": what, "summary": summary, "status": done.returncode, "seconds": round(time.monotonic() - start, 1)}

    with concurrent.futures.ThreadPoolExecutor(int(os.environ.get("MOELLON_SANITIZER_JOBS", 6))) as pool:
        samples = [sample for sample in pool.map(check, plans) if sample]
    rows = [{"tool": sample["tool"], "tests": sample["what"], "found": ", ".join(sample["summary"])} for sample in samples]
    commands = [f"compute-sanitizer --tool {sample['tool']} {sample['what']}" for sample in samples]
    write("cuda-sanitizer", commands, samples, {"cuda-sanitizer": rows}, stolen)


def main():
    if len(sys.argv) < 2 or sys.argv[1] not in ("golden", "open", "tiny", "decode", "context", "verify", "resident", "kernels", "operations", "variants", "step-variants", "context-variants", "activations", "pages", "cuda", "wgpu", "wgpu-steps", "cuda-kernels", "cuda-sanitizer"):
        raise SystemExit(__doc__)
    stolen = steal_ticks()
    match sys.argv[1]:
        case "golden":
            golden(stolen)
        case "open":
            open_and_load(stolen, sys.argv[2])
        case "tiny":
            tiny(stolen)
        case "decode":
            decode(stolen, sys.argv[2:])
        case "context":
            context(stolen)
        case "verify":
            verify(stolen, sys.argv[2:])
        case "resident":
            resident(stolen, sys.argv[2])
        case "kernels":
            kernels(stolen)
        case "operations":
            operations(stolen, sys.argv[2:])
        case "variants":
            variants(stolen, *sys.argv[2:])
        case "context-variants":
            context_variants(stolen, *sys.argv[2:])
        case "step-variants":
            step_variants(stolen, *sys.argv[2:])
        case "activations":
            activations(stolen, *sys.argv[2:])
        case "pages":
            pages(stolen)
        case "cuda":
            cuda(stolen, sys.argv[2:])
        case "wgpu":
            wgpu(stolen)
        case "wgpu-steps":
            wgpu_steps(stolen, sys.argv[2])
        case "cuda-kernels":
            cuda_kernels(stolen)
        case "cuda-sanitizer":
            cuda_sanitizer(stolen, *sys.argv[2:])


if __name__ == "__main__":
    main()
