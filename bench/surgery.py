"""Receipts of surgery, from which the tables and the plot of docs/surgery.md are made.

    cargo build --release -p moellon -p moellon-surgery --bin moellon --example bench_encode
    python3 bench/surgery.py calibrate WORK     # statistics of the bundled model; the others need them
    python3 bench/surgery.py curve WORK         # KL divergence over bits, every method; docs/surgery-curve.svg
    python3 bench/surgery.py prune WORK         # scores against each other, 25 % and 50 %, and the MTP layer
    python3 bench/surgery.py routers WORK       # pruned models with their routers recalibrated
    python3 bench/surgery.py layers [FILE]      # matrices of GLM-5.2's experts: output error, speed, hours; FILE has what
                                                # bench_encode printed on a busy machine, whose speeds are left out
    python3 bench/surgery.py large WORK         # a layer of GLM-5.2's shapes on disk: whole commands, disk and memory
    python3 bench/surgery.py kills WORK         # kill -9 at random points, again and again: the same bytes in the end
    python3 bench/surgery.py mlx WORK           # needs mlx and mlx-lm: same bits, and mlx-lm runs what we wrote
    cargo xtask docs --write

WORK is a directory for models and statistics. Texts are sources of this repository, which the bundled model has not seen:
some crates calibrate, others judge.
"""

import contextlib
import datetime
import hashlib
import json
import math
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from receipts import BINARY, NAME, ROOT, run, steal_ticks, write

CALIBRATION = ["engine", "model", "serve", "text"]
JUDGEMENT = ["backend-cpu", "checkpoint", "tensor"]
CALIBRATION_TOKENS, ROUTER_TOKENS, JUDGED_TOKENS, PROBE_TOKENS = 65536, 16384, 8192, 2048


def texts(crates):
    return [path for crate in crates for path in sorted((ROOT / "crates" / crate / "src").glob("*.rs"))]


def call(*arguments):
    return run(*arguments)[0].decode()


def fresh(path):
    for suffix in ("", ".partial"):
        shutil.rmtree(f"{path}{suffix}", ignore_errors=True)
    Path(f"{path}.journal").unlink(missing_ok=True)
    return path


def compare(model):
    return json.loads(call("compare", *(["-m", model] if model else []), "--text", *texts(JUDGEMENT), "--max-tokens", JUDGED_TOKENS, "--json"))


def text_hashes(crates):
    return {str(p.relative_to(ROOT)): hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in texts(crates)}


def calibrate(stolen, work):
    stats = fresh(Path(work) / "stats")
    print(call("calibrate", "--text", *texts(CALIBRATION), "--max-tokens", CALIBRATION_TOKENS, "--moments", "expert", "--out", stats))


def quantize(work, name, *options):
    out = fresh(Path(work) / name)
    call("quantize", *options, "--out", out)
    result = compare(out)
    shutil.rmtree(out)
    return result


def curve(stolen, work):
    stats = Path(work) / "stats"
    formats = ["affine-2-g128", "affine-2", "affine-3-g128", "affine-3", "affine-4-g128", "affine-4", "affine-5", "affine-6", "affine-8", "mxfp4", "nvfp4"]
    samples, commands, rows = [], [], {}

    def measure(label, method, *options):
        result = quantize(work, "candidate", *options)
        result["layer_snr_db"] = [round(x, 2) for x in result["layer_snr_db"]]
        samples.append({"formats": label, "method": method, **result})
        shown = " ".join(str(o) for o in options).replace(str(work), "WORK")
        commands.append(f"{NAME} quantize {shown} --out OUT; compare -m OUT --text .. --max-tokens {JUDGED_TOKENS} --json")
        print(label, method, round(result["bits_per_weight"], 3), round(result["kl_mean"], 5), flush=True)
        return result

    for name in formats:
        # mlx-lm's convert writes NVFP4 without a global scale.
        rtn = measure(name, "rtn", "--format", name, "--method", "rtn", "--nvfp4-global-scale", "off")
        search = measure(name, "search", "--format", name, "--method", "search", "--stats", stats)
        gptq = measure(name, "gptq", "--format", name, "--method", "gptq", "--stats", stats)
        rows[name] = {"rtn": rtn, "search": search, "gptq": gptq}
    sensitivities = Path(work) / "sensitivities.json"
    sensitivities.unlink(missing_ok=True)
    planned = {}
    for bits in (2.4, 2.6, 3.0, 3.25, 3.5, 4.0, 4.5, 5.0, 5.5, 6.5, 8.5):
        plan = Path(work) / f"plan-{bits}.json"
        call("plan", "--bpw", bits, "--stats", stats, "--text", *texts(CALIBRATION), "--max-tokens", PROBE_TOKENS, "--sensitivities", sensitivities, "--formats", "affine-2-g128,affine-2,affine-3-g128,affine-3,affine-4,affine-5,affine-6,affine-8", "--out", plan)
        planned[bits] = measure(f"plan {bits}", "plan + gptq", "--plan", plan, "--method", "gptq", "--stats", stats)
    table = []
    for name, found in rows.items():
        rtn = found["rtn"]["kl_mean"]
        row = {"formats": name, "bits a weight": f"{found['rtn']['bits_per_weight']:.3f}"}
        for method in ("rtn", "search", "gptq"):
            row[f"KL {method}"] = f"{found[method]['kl_mean']:.4f}"
        row["gptq / rtn"] = f"{found['gptq']['kl_mean'] / rtn:.2f}"
        row["99.9 % rtn"] = f"{found['rtn']['kl_p999']:.2f}"
        row["99.9 % gptq"] = f"{found['gptq']['kl_p999']:.2f}"
        row["same token rtn"] = f"{100 * found['rtn']['top1_agreement']:.1f} %"
        row["same token gptq"] = f"{100 * found['gptq']['top1_agreement']:.1f} %"
        row["ppl rtn"] = f"{found['rtn']['ppl']:.2f}"
        row["ppl gptq"] = f"{found['gptq']['ppl']:.2f} ({found['gptq']['ref_ppl']:.2f})"
        table.append(row)
    plans = []
    for bits, found in planned.items():
        plans.append({
            "budget": bits, "bits a weight": f"{found['bits_per_weight']:.3f}", "KL": f"{found['kl_mean']:.4f} ± {found['kl_standard_error']:.4f}",
            "99.9 %": f"{found['kl_p999']:.3f}", "same token": f"{100 * found['top1_agreement']:.1f} %",
            "ppl": f"{found['ppl']:.2f} ({found['ref_ppl']:.2f})", "MTP drafts right": f"{100 * found['mtp_agreement']:.1f} % ({100 * found['ref_mtp_agreement']:.1f} %)",
        })
    curves = []
    for method in ("rtn", "search", "gptq"):
        points = sorted((found[method]["bits_per_weight"], found[method]["kl_mean"]) for name, found in rows.items() if name.startswith("affine"))
        curves.append((f"affine, {method}" + (" (as mlx-lm)" if method == "rtn" else ""), points))
    curves.append(("plan + gptq", sorted((f["bits_per_weight"], f["kl_mean"]) for f in planned.values())))
    for name in ("mxfp4", "nvfp4"):
        curves.append((f"{name}, rtn and gptq", [(rows[name][m]["bits_per_weight"], rows[name][m]["kl_mean"]) for m in ("rtn", "gptq")]))
    samples.append({"calibration": text_hashes(CALIBRATION), "judgement": text_hashes(JUDGEMENT)})
    write("surgery-curve", commands, samples, {"surgery-curve": table, "surgery-plan": plans}, stolen)
    plot(curves, ROOT / "docs/surgery-curve.svg")


def plot(curves, path):
    """Divergence (logarithmic) over bits a weight."""
    colors = ["#8a8f94", "#1b6ca8", "#3a7d44", "#c8553d", "#7d4e9e", "#b8860b"]
    left, top, width, height = 70, 50, 560, 380
    xs, ys = [x for _, points in curves for x, _ in points], [y for _, points in curves for _, y in points]
    x_low, x_high = math.floor(min(xs)), math.ceil(max(xs))
    y_low, y_high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))
    place = lambda x, y: (left + width * (x - x_low) / (x_high - x_low), top + height * (y_high - math.log10(y)) / (y_high - y_low))
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 480" font-family="sans-serif" font-size="12">', '<rect width="860" height="480" fill="white"/>']
    text = lambda x, y, anchor, what: out.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#222">{what}</text>')
    line = lambda a, b: out.append(f'<line x1="{a[0]:.1f}" y1="{a[1]:.1f}" x2="{b[0]:.1f}" y2="{b[1]:.1f}" stroke="#ddd"/>')
    text(left, 28, "start", "KL divergence from bf16 (mean, nats) over bits a weight: moellon-tiny, held-out source code")
    for bits in range(x_low, x_high + 1):
        line(place(bits, 10**y_low), place(bits, 10**y_high))
        text(place(bits, 1)[0], top + height + 18, "middle", bits)
    for power in range(y_low, y_high + 1):
        line(place(x_low, 10**power), place(x_high, 10**power))
        text(left - 6, place(x_low, 10**power)[1] + 4, "end", f"{10.0**power:g}")
    for index, (name, points) in enumerate(curves):
        color = colors[index % len(colors)]
        places = [place(*point) for point in points]
        out.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}" fill="none" stroke="{color}" stroke-width="2"/>')
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"/>' for x, y in places]
        out.append(f'<rect x="645" y="{60 + 20 * index}" width="14" height="4" fill="{color}"/>')
        text(665, 65 + 20 * index, "start", name)
    out.append("</svg>")
    path.write_text("\n".join(out) + "\n")


def prune(stolen, work):
    stats = Path(work) / "stats"
    samples, commands, table = [], [], []
    whole = compare(None)
    samples.append({"experts": 24, **whole})
    table.append({"experts": 24, "score": "-", "MTP layer": "whole", "KL": "0", "ppl": f"{whole['ref_ppl']:.2f}", "same token": "100 %", "MTP drafts right": f"{100 * whole['ref_mtp_agreement']:.1f} %"})
    for ratio in (0.25, 0.5):
        for score, seeds, mtp in [("reap", [0], "whole"), ("reap", [0], "pruned"), ("weighted_sum", [0], "whole"), ("frequency", [0], "whole"), ("random", [1, 2, 3], "whole")]:
            found = []
            for seed in seeds:
                out = fresh(Path(work) / "pruned")
                options = ["--ratio", ratio, "--score", score, "--mtp", mtp] + (["--seed", seed] if score == "random" else [])
                call("prune", "--stats", stats, *options, "--out", out)
                found.append(compare(out))
                commands.append(f"{NAME} prune --stats WORK/stats {' '.join(map(str, options))} --out OUT; compare -m OUT")
                samples.append({"ratio": ratio, "score": score, "mtp": mtp, "seed": seed, **found[-1]})
                shutil.rmtree(out)
            mean = lambda key: sum(f[key] for f in found) / len(found)
            table.append({"experts": round(24 * (1 - ratio)), "score": score + (f", mean of {len(seeds)}" if len(seeds) > 1 else ""), "MTP layer": mtp, "KL": f"{mean('kl_mean'):.3f}", "ppl": f"{mean('ppl'):.2f}", "same token": f"{100 * mean('top1_agreement'):.1f} %", "MTP drafts right": f"{100 * mean('mtp_agreement'):.1f} %"})
            print(table[-1], flush=True)
    write("surgery-prune", commands, samples, {"surgery-prune": table}, stolen)


def routers(stolen, work):
    stats, spare = Path(work) / "stats", Path(work) / "pruned"
    samples, commands, table = [], [], []
    for ratio in (0.25, 0.5):
        for score, mtp in [("reap", "whole"), ("weighted_sum", "whole")]:
            pruned, out = fresh(spare), fresh(Path(work) / "recalibrated")
            options = ["--ratio", ratio, "--score", score, "--mtp", mtp]
            call("prune", "--stats", stats, *options, "--out", pruned)
            before = compare(pruned)
            _, seconds, peak = run("recalibrate", "-m", pruned, "--text", *texts(CALIBRATION), "--max-tokens", ROUTER_TOKENS, "--out", out)
            after = compare(out)
            fitted = json.loads((out / "surgery.json").read_text())["routers"]
            errors = [sum(float(r[key]) for r in fitted) / len(fitted) for key in ("relative_error_before", "relative_error")]
            shown = " ".join(map(str, options))
            commands.append(f"{NAME} prune --stats WORK/stats {shown} --out PRUNED; recalibrate -m PRUNED --text .. --max-tokens {ROUTER_TOKENS} --out OUT; compare -m OUT --max-tokens {JUDGED_TOKENS} --json")
            samples.append({"ratio": ratio, "score": score, "mtp": mtp, "before": before, "after": after, "routers": fitted, "seconds": seconds, "peak_resident_bytes": peak})
            arrow = lambda key, show: f"{show(before[key])} → {show(after[key])}"
            percent = lambda x: f"{100 * x:.1f} %"
            table.append({"experts": round(24 * (1 - ratio)), "score": score, "MTP layer": mtp, "error of a block": f"{errors[0]:.3f} → {errors[1]:.3f}", "KL": arrow("kl_mean", "{:.3f}".format), "ppl": arrow("ppl", "{:.2f}".format), "same token": arrow("top1_agreement", percent), "MTP drafts right": arrow("mtp_agreement", percent), "fitted in, s": f"{seconds:.0f}"})
            print(table[-1], flush=True)
            shutil.rmtree(pruned)
            shutil.rmtree(out)
            write("surgery-routers", commands, samples, {"surgery-routers": table}, stolen)


def large(stolen, work, experts=24):
    """Whole commands on one MoE layer of GLM-5.2's shapes, files not in memory, and what the disk alone takes."""
    experts = int(experts)
    model, stats = Path(work) / "glm-layer", Path(work) / "glm-stats"
    shutil.rmtree(model, ignore_errors=True)
    subprocess.run([sys.executable, ROOT / "bench/large_checkpoint.py", model, "--glm-experts", str(experts)], check=True)
    os.sync()
    shards = sorted(model.glob("*.safetensors"))
    source_bytes = sum(path.stat().st_size for path in shards)
    # Embedding and head are no part of the layer.
    layer_bytes = source_bytes - 2 * 4096 * 6144 * 2
    read_s = min(read_all(shards) for _ in range(2))
    rows, samples, commands = [], [{"layer_bytes": layer_bytes, "source_bytes": source_bytes, "read_seconds": read_s}], []

    def measure(what, options, out):
        fresh(out)
        forget(shards)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        _, seconds, peak = run(*options, "--out", out)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # What a busy machine does not change much.
        core_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        written = sum(path.stat().st_size for path in out.iterdir())
        shown = " ".join(str(o) for o in options if not str(o).endswith(".rs")).replace(str(work), "WORK")
        commands.append(f"{NAME} {shown} --out OUT")
        samples.append({"command": what, "seconds": seconds, "core_seconds": core_seconds, "peak_resident_bytes": peak, "written_bytes": written})
        print(samples[-1], flush=True)
        return seconds, core_seconds, peak, written

    seconds, core_seconds, peak, written = measure("calibrate", ["calibrate", "-m", model, "--text", *texts(CALIBRATION), "--max-tokens", 1024, "--moments", "layer"], stats)
    rows.append({"command": "calibrate --max-tokens 1024 --moments layer", "experts": experts, "s": f"{seconds:.1f}", "core-seconds": f"{core_seconds:.1f}", "weights a second, millions": "-", "GB written": f"{written / 1e9:.2f}", "disk alone, s": f"{read_s + write_seconds(Path(work) / 'probe', written):.1f}", "peak memory, GB": f"{peak / 1e9:.2f}", "peak / layer": f"{peak / layer_bytes:.2f}", "hours for 218 G weights": "-", "by core-seconds, on two cores": "-"})
    weights = source_bytes / 2
    for format, method in [("affine-3", "rtn"), ("affine-3", "search"), ("affine-3", "gptq"), ("nvfp4", "search")]:
        out = Path(work) / "glm-quantized"
        options = ["quantize", "-m", model, "--format", format, "--method", method, *(["--stats", stats] if method != "rtn" else [])]
        seconds, core_seconds, peak, written = measure(f"{format} {method}", options, out)
        alone = read_s + write_seconds(Path(work) / "probe", written)
        rows.append({"command": f"quantize --format {format} --method {method}", "experts": experts, "s": f"{seconds:.1f}", "core-seconds": f"{core_seconds:.1f}", "weights a second, millions": f"{weights / seconds / 1e6:.1f}", "GB written": f"{written / 1e9:.2f}", "disk alone, s": f"{alone:.1f}", "peak memory, GB": f"{peak / 1e9:.2f}", "peak / layer": f"{peak / layer_bytes:.2f}", "hours for 218 G weights": f"{218e9 / (weights / seconds) / 3600:.1f}", "by core-seconds, on two cores": f"{218e9 / (weights / core_seconds) / 7200:.1f}"})
        shutil.rmtree(out)
        # GPTQ takes longer than all before it: what there is is kept.
        write("surgery-large" if experts == 24 else f"surgery-large-{experts}", commands, samples, {"surgery-large": rows}, stolen)
    for folder in (model, stats):
        shutil.rmtree(folder)


def forget(paths):
    """Drops files from the page cache."""
    for path in paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(paths):
    forget(paths)
    start = time.monotonic()
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    return time.monotonic() - start


def write_seconds(path, size_bytes):
    """Seconds that the disk takes for so many bytes, the flush included."""
    block = random.Random(3).randbytes(1 << 24)
    start = time.monotonic()
    with open(path, "wb", buffering=0) as file:
        for _ in range(math.ceil(size_bytes / len(block))):
            file.write(block)
        os.fsync(file.fileno())
    elapsed = time.monotonic() - start
    path.unlink()
    return elapsed


def layers(stolen, printed=None):
    example = ROOT / "target/release/examples/bench_encode"
    found = json.loads(Path(printed).read_text() if printed else subprocess.run([example], capture_output=True, check=True).stdout)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    table, speeds = [], {}
    key = lambda r: (r["matrix"], r["inputs"], r["tokens"], r["format"])
    by = {(*key(r), r["method"]): r for r in found["results"]}
    for matrix, inputs, tokens, format in dict.fromkeys(map(key, found["results"])):
        row = {method: by[matrix, inputs, tokens, format, method] for method in ("rtn", "search", "gptq")}
        show = lambda key, scale, digits: {f"{m} {key}": f"{row[m][scale[0]] * scale[1]:.{digits}f}" for m in row}
        left = lambda method: 10 ** (-(row[method]["output_snr_db"] - row["rtn"]["output_snr_db"]) / 10)
        table.append({"matrix": matrix, "inputs": inputs, "tokens": tokens, "format": format, "bits a weight": f"{row['rtn']['bits_per_weight']:.2f}", **show("dB", ("output_snr_db", 1), 1), "error, search / rtn": f"{left('search'):.2f}", "error, gptq / rtn": f"{left('gptq'):.2f}"})
    if printed:
        for result in found["results"]:
            for key in ("weights_per_s", "moments_s", "factor_s"):
                del result[key]
        write("surgery-layers", ["target/release/examples/bench_encode"], [found], {"surgery-outputs": table}, stolen)
        return
    # An expert is two matrices of 6144 columns to one of 2048: 218 G weights of 77 experts in 75 layers.
    of = lambda matrix, format, method: by[matrix, "causes", 4096, format, method]
    for format in dict.fromkeys(r["format"] for r in found["results"]):
        for method in ("rtn", "search", "gptq"):
            seconds = 218e9 * (2 / 3 / of("gate_proj", format, method)["weights_per_s"] + 1 / 3 / of("down_proj", format, method)["weights_per_s"])
            if method == "gptq":
                # Moments of 6144 columns are factored once a layer, those of 2048 once an expert.
                seconds += 75 * of("gate_proj", format, method)["factor_s"] + 75 * 77 * of("down_proj", format, method)["factor_s"]
            speeds.setdefault(format, {})[method] = seconds / 3600
    million = lambda matrix, format, m: f"{of(matrix, format, m)['weights_per_s'] / 1e6:.1f}"
    hours = [{"format": format, **{f"{matrix} {m}, Mw/s": million(matrix, format, m) for matrix in ("gate_proj", "down_proj") for m in methods}, **{f"{m}, hours for 218 G weights": f"{h:.1f}" for m, h in methods.items()}} for format, methods in speeds.items()]
    samples = [found, {"peak_resident_bytes": peak}]
    write("surgery-layers", ["target/release/examples/bench_encode"], samples, {"surgery-outputs": table, "surgery-hours": hours}, stolen)


def kills(stolen, work):
    """SIGKILL at random points of runs, each started again until it ends by itself."""
    stats, rng = Path(work) / "stats", random.Random(20261121)
    rows, samples, commands = [], [], []
    for what, options in [("prune --ratio 0.25", ["prune", "--stats", stats, "--ratio", 0.25, "--shard-gb", 0.001]), ("quantize --plan q3a4 --method search", ["quantize", "--plan", "q3a4", "--method", "search", "--stats", stats, "--shard-gb", 0.001]), ("quantize --format affine-3 --method gptq", ["quantize", "--format", "affine-3", "--method", "gptq", "--stats", stats, "--shard-gb", 0.001])]:
        hashes = lambda folder: {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
        whole = fresh(Path(work) / "whole")
        _, seconds, _ = run(*options, "--out", whole)
        killed, same, starts = 0, 0, 0
        for _ in range(5):
            out = fresh(Path(work) / "killed")
            while not out.exists() or Path(f"{out}.journal").exists():
                process = subprocess.Popen([BINARY, *map(str, options), "--out", out], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                try:
                    process.wait(rng.uniform(0.02, 0.6 * seconds))
                except subprocess.TimeoutExpired:
                    process.kill()
                    killed += 1
                process.wait()
                starts += 1
            same += hashes(out) == hashes(whole)
        samples.append({"command": what, "runs": 5, "starts": starts, "kills": killed, "same": same})
        rows.append({"command": what, "uninterrupted, s": f"{seconds:.1f}", "runs": 5, "kills": killed, "same bytes as uninterrupted": f"{same} of 5"})
        commands.append(f"{NAME} {' '.join(map(str, options)).replace(str(work), 'WORK')} --out OUT")
        print(rows[-1], flush=True)
    write("surgery-kills", commands, samples, {"surgery-kills": rows}, stolen)


def mlx(stolen, work):
    import mlx.core as mx
    import mlx_lm
    import numpy as np

    mx.set_default_device(mx.cpu)
    rows, samples = [], []
    bundled = mx.load(str(ROOT / "models/moellon-tiny/model.safetensors"))
    for name, options in [("affine-2", dict(bits=2, group_size=64)), ("affine-3", dict(bits=3, group_size=64)), ("affine-4", dict(bits=4, group_size=64)), ("affine-5", dict(bits=5, group_size=64)), ("affine-6", dict(bits=6, group_size=64)), ("affine-8", dict(bits=8, group_size=64)), ("mxfp4", dict(bits=4, group_size=32, mode="mxfp4")), ("mxfp8", dict(bits=8, group_size=32, mode="mxfp8")), ("nvfp4", dict(bits=4, group_size=16, mode="nvfp4"))]:
        out = fresh(Path(work) / "rtn")
        call("quantize", "--format", name, "--method", "rtn", "--nvfp4-global-scale", "off", "--shard-gb", 5, "--out", out)
        ours = mx.load(str(out / "model.safetensors"))
        compared = 0
        for path in [key.removesuffix(".scales") for key in ours if key.endswith(".scales")]:
            if f"{path}.weight" in bundled:
                source = bundled[f"{path}.weight"]
            elif "switch_mlp" in path:
                block, projection = path.split(".switch_mlp.")
                count = sum(1 for key in bundled if key.startswith(f"{block}.experts.") and key.endswith(f".{projection}.weight"))
                source = mx.stack([bundled[f"{block}.experts.{i}.{projection}.weight"] for i in range(count)])
            else:
                continue
            expected = mx.quantize(source, **options)
            for part, value in zip(("weight", "scales", "biases"), expected):
                assert bool(mx.all(ours[f"{path}.{part}"] == value)), f"{name} {path}.{part} differs"
            compared += ours[f"{path}.weight"].size
        samples.append({"format": name, "compared_words": compared})
        print(name, compared, "words equal", flush=True)
        shutil.rmtree(out)
    # Models of which mlx-lm computes what transformers does on the same fixture.
    for fixture in ("deepseek_v32", "qwen3_moe", "glm4_moe"):
        for format in ("bf16", "affine-4-g32", "affine-3-g32", "nvfp4", "mxfp4"):
            out = fresh(Path(work) / "written")
            call("quantize", "-m", ROOT / "fixtures/golden" / fixture, "--format", format, "--nvfp4-global-scale", "off", "--out", out)
            hub_fields(out / "config.json")
            # f32 activations, as ours: MLX on a CPU accumulates bf16 products in bf16.
            model, config = mlx_lm.utils.load_model(out, lazy=False)
            model.update(floats_as(model, mx.float32))
            ids = [int(i) for i in np.random.default_rng(5).integers(1, config["vocab_size"], 40)]
            free = np.array(model(mx.array([ids]))[0].astype(mx.float32))
            with index_ties_to_the_first():
                theirs = np.array(model(mx.array([ids]))[0].astype(mx.float32))
            file = Path(work) / "logits.safetensors"
            call("logits", "-m", out, "--ids", ",".join(map(str, ids)), "--out", file)
            mine = np.array(mx.load(str(file))["logits"])
            difference, scale = float(np.abs(mine - theirs).max()), float(np.abs(mine).max())
            agree = float((mine.argmax(1) == theirs.argmax(1)).mean())
            rows.append({"model": fixture, "written as": format, "largest logit": f"{scale:.2f}", "largest difference": f"{difference:.1e}", "with mlx-lm's choice among ties": f"{float(np.abs(mine - free).max()):.1e}", "same token": f"{100 * agree:.0f} %"})
            samples.append(rows[-1])
            print(rows[-1], flush=True)
            shutil.rmtree(out)
    samples.append({"mlx": mx.__version__, "mlx_lm": mlx_lm.__version__})
    write("surgery-mlx", ["python3 bench/surgery.py mlx WORK"], samples, {"surgery-mlx": rows}, stolen)


@contextlib.contextmanager
def index_ties_to_the_first():
    """Scores of the indexer are sums of ReLUs: some are exactly 0, and several can compete for the last of the top-k places.
    argpartition leaves open who gets it; here the earliest position does, as in Moellon and in a stable sort."""
    import mlx.core as mx
    import numpy as np

    partition = mx.argpartition

    def stable(values, kth, axis=-1):
        # The indexer alone counts from the end; the router's calls are compiled and cannot look at values.
        if kth >= 0:
            return partition(values, kth=kth, axis=axis)
        order = np.argsort(-np.array(values), axis=axis, kind="stable")
        return mx.array(np.concatenate([order[..., -kth:], order[..., :-kth]], axis).astype(np.uint32))

    mx.argpartition = stable
    try:
        yield
    finally:
        mx.argpartition = partition


def hub_fields(path):
    """Fields that published configs have, mlx-lm asks for, and the fixtures (saved by transformers 5) lack."""
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters", {})
    fields = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1, "decoder_sparse_step": 1, "rope_scaling": None}
    fields |= {"rope_theta": rope.get("rope_theta"), "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0), "num_experts": config.get("num_local_experts")}
    path.write_text(json.dumps({**fields, **config}))


def floats_as(model, dtype):
    import mlx.core as mx
    from mlx.utils import tree_map

    return tree_map(lambda x: x.astype(dtype) if mx.issubdtype(x.dtype, mx.floating) else x, model.parameters())


if __name__ == "__main__":
    commands = {"calibrate": calibrate, "curve": curve, "prune": prune, "routers": routers, "layers": layers, "large": large, "kills": kills, "mlx": mlx}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        raise SystemExit(__doc__)
    commands[sys.argv[1]](steal_ticks(), *sys.argv[2:])
