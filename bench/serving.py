"""Measures `moellon serve` over HTTP and writes receipts, from which the tables of docs/serving.md are generated.

    cargo build --release -p moellon
    python3 bench/serving.py throughput   # 8 streams over HTTP against the decoder's own batch speed, interleaved
    python3 bench/serving.py cache        # an 8 K prefix: cold, cached, after a restart; strangers beside it
    python3 bench/serving.py latency      # time between tokens of running streams while an 8 K prompt is computed
    python3 bench/serving.py agent        # a conversation's second turn on the bundled model
    python3 bench/serving.py grammar      # what masks cost
    cargo xtask docs --write

Random weights of published shapes stand for a large model: scheduling and caches do not look at values. Needs nothing but
Python; prompts are random token ids, so that nothing is cached that should not be.
"""

import asyncio
import contextlib
import json
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path


from receipts import BINARY, NAME, run, steal_ticks, write

SHAPE = "qwen3-30b-a3b:layers=4,vocab=4096"
CONTEXT = 10240
LONG = 8192


class Server:
    """`moellon serve` on a port of its own."""

    def __init__(self, *options):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.command = ["serve", "--port", str(self.port), *map(str, options)]
        self.shown = f"{NAME} serve {' '.join(map(str, options))}"

    def __enter__(self):
        self.process = subprocess.Popen([BINARY, "--log", "warn", *self.command], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                self.get("/health")
                return self
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise SystemExit(f"{self.shown}: did not start")
            time.sleep(0.05)

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(timeout=120) == 0, f"{self.shown}: exit status {self.process.returncode}"

    def get(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            return answer.read().decode()

    def metric(self, name):
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(name + "{")]
        return float(lines[0].rsplit(" ", 1)[1])

    def post(self, path, body):
        """The answer and its seconds."""
        start = time.monotonic()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.loads(answer.read()), time.monotonic() - start

    async def stream(self, path, body, times):
        """Appends the time of every frame with a token to `times`; returns the last frame's usage."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)
        data = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
        writer.write(
            f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n"
            f"content-length: {len(data)}\r\n\r\n".encode() + data
        )
        usage = None
        async for line in reader:
            if line.startswith(b"data: {"):
                if b'"usage"' in line:
                    usage = json.loads(line[6:])["usage"]
                elif b'"finish_reason":null' in line:
                    times.append(time.monotonic())
        writer.close()
        return usage


def ids(rng, count):
    # Not the first few: special tokens.
    return [rng.randrange(300, 4000) for _ in range(count)]


def completion(prompt, max_tokens):
    # Bytes of half a character show late; token ids of text do not matter for speed. Greedy: chosen on the device.
    return {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}


def streams(server, rng, count, prompt_tokens, max_tokens):
    """Tokens a second of `count` streams, from when all of them decode until the first ends."""

    async def all_of_them():
        times = [[] for _ in range(count)]
        body = lambda: completion(ids(rng, prompt_tokens), max_tokens)
        usages = await asyncio.gather(*(server.stream("/v1/completions", body(), t) for t in times))
        assert all(usage["completion_tokens"] == max_tokens for usage in usages)
        return times

    before = server.metric("moellon:steps_total")
    times = asyncio.run(all_of_them())
    steps = server.metric("moellon:steps_total") - before
    start, end = max(t[0] for t in times), min(t[-1] for t in times)
    # Every token is a step of its own, whether or not its text came with a later one.
    frames = sum(sum(start < moment <= end for moment in t) for t in times)
    tokens_of_frame = count * max_tokens / sum(len(t) for t in times)
    return {"streams": count, "tok_s": frames * tokens_of_frame / (end - start), "steps": steps}


def throughput(stolen):
    rng = random.Random(1)
    samples, commands = [], []
    prompt, new, rounds = 64, 96, 4
    bench = ["bench", "--synthetic", SHAPE, "--batch", "1,8", "--context", prompt + new // 2, "--prompt", 64, "--steps", 16, "--windows", 2, "--json"]
    with Server("--synthetic", SHAPE, "--context", CONTEXT) as server:
        commands += [server.shown, f"{NAME} {' '.join(map(str, bench))}"]
        streams(server, rng, 8, prompt, 16)
        for _ in range(rounds):
            report = json.loads(run(*bench)[0])
            own = {result["batch"]: result["decode_tok_s"] for result in report["results"]}
            one = streams(server, rng, 1, prompt, new // 2)
            eight = streams(server, rng, 8, prompt, new)
            samples.append({
                "engine_1": own[1], "engine_8": own[8], "http_1": one["tok_s"], "http_8": eight["tok_s"],
                "bandwidth_fraction": server.metric("moellon:bandwidth_fraction"), "read_gb_s": report["measured_read_gb_s"],
                "experts": server.metric("moellon:experts_unique_per_step"),
            })
            print(samples[-1], file=sys.stderr)
    median = lambda key: statistics.median(sample[key] for sample in samples)
    ratio = [sample["http_8"] / sample["engine_8"] for sample in samples]
    row = {
        "shape": SHAPE, "decoder, batch 1": f"{median('engine_1'):.1f}", "HTTP, 1 stream": f"{median('http_1'):.1f}",
        "decoder, batch 8": f"{median('engine_8'):.1f}", "HTTP, 8 streams": f"{median('http_8'):.1f}",
        "HTTP / decoder at 8": f"{statistics.median(ratio):.3f} ({min(ratio):.3f}-{max(ratio):.3f})",
        "8 streams / 1 stream": f"{median('http_8') / median('http_1'):.2f}",
        "share of bandwidth at 8": f"{100 * median('bandwidth_fraction'):.0f} %",
    }
    write("serving-throughput", commands, samples, {"serving-throughput": [row]}, stolen)


def first_token(server, prompt):
    answer, seconds = server.post("/v1/completions", completion(prompt, 1))
    return seconds, answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def cache(stolen):
    rng = random.Random(2)
    prompts = [ids(rng, LONG) for _ in range(2)]
    more = [[prompt + ids(rng, 16) for _ in range(3)] for prompt in prompts]
    folder = tempfile.mkdtemp(prefix="moellon-cache-")
    options = ["--synthetic", SHAPE, "--context", CONTEXT, "--disk-cache", folder]
    samples = {}
    try:
        with Server(*options) as server:
            first_token(server, ids(rng, 64))
            samples["cold"] = [first_token(server, prompt) for prompt in prompts]
            samples["cached"] = [first_token(server, prompt) for each in more for prompt in each]

            async def strangers():
                bodies = [completion(ids(rng, 256), 8) for _ in range(8)]
                await asyncio.gather(*(server.stream("/v1/completions", body, []) for body in bodies))

            asyncio.run(strangers())
            samples["cached, after 8 strangers"] = [first_token(server, prompt + ids(rng, 16)) for prompt in prompts]
            commands = [server.shown]
        with Server(*options) as server:
            first_token(server, ids(rng, 64))
            samples["from disk"] = [first_token(server, prompt + ids(rng, 16)) for prompt in prompts]
        blocks = list(Path(folder).glob("*.kv"))
        size = sum(path.stat().st_size for path in blocks)
    finally:
        shutil.rmtree(folder)
    print(samples, file=sys.stderr)
    cold = statistics.median(seconds for seconds, _ in samples["cold"])
    rows = []
    for name, found in samples.items():
        seconds = [s for s, _ in found]
        rows.append({
            "8 K prompt": name, "first token, s": f"{statistics.median(seconds):.3f} ({min(seconds):.3f}-{max(seconds):.3f})",
            "cached tokens": f"{min(c for _, c in found)}", "share of the prefix": f"{100 * min(c for _, c in found) / LONG:.1f} %",
            "faster than cold": f"{cold / statistics.median(seconds):.0f}x",
        })
    write("serving-cache", commands, {**samples, "disk_bytes": size, "disk_blocks": len(blocks)}, {"serving-cache": rows}, stolen)


def quantile(values, q):
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def latency(stolen):
    rng = random.Random(3)

    async def measure(server):
        # Long enough to be there all the time.
        times = [[] for _ in range(4)]
        running = [asyncio.create_task(server.stream("/v1/completions", completion(ids(rng, 64), 4000), t)) for t in times]
        while min(map(len, times)) < 20:
            await asyncio.sleep(0.05)
        calm_from = time.monotonic()
        await asyncio.sleep(15)
        long_from = time.monotonic()
        done = []
        await server.stream("/v1/completions", completion(ids(rng, LONG), 2), done)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        gaps = lambda start, end: [b - a for t in times for a, b in zip(t, t[1:]) if start <= a and b <= end]
        return gaps(calm_from, long_from), gaps(long_from, done[0]), done[0] - long_from

    with Server("--synthetic", SHAPE, "--context", CONTEXT) as server:
        calm, busy, seconds = asyncio.run(measure(server))
        commands = [server.shown]
    rows = [
        {
            "4 streams": name, "tokens": len(gaps), "median, ms": f"{1e3 * statistics.median(gaps):.1f}",
            "p99, ms": f"{1e3 * quantile(gaps, 0.99):.1f}", "longest, ms": f"{1e3 * max(gaps):.1f}",
            "p99 / undisturbed": f"{quantile(gaps, 0.99) / quantile(calm, 0.99):.2f}",
        }
        for name, gaps in [("alone", calm), (f"while 8 K tokens are computed ({seconds:.0f} s)", busy)]
    ]
    print(rows, file=sys.stderr)
    write("serving-latency", commands, {"calm_s": calm, "busy_s": busy, "long_prompt_s": seconds}, {"serving-latency": rows}, stolen)


TOOLS = [
    {"type": "function", "function": {"name": name, "description": text, "parameters": {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}}}
    for name, text, argument in [
        ("read_file", "Reads a file of the project", "path"), ("run", "Runs a shell command", "command"),
        ("write_file", "Writes a file", "path"), ("search", "Searches the project's text", "pattern"),
    ]
]
SYSTEM = "You are a careful engineer. " + " ".join(f"Rule {i}: keep functions short and names clear." for i in range(40))


def tokens(server, body):
    return server.post("/tokenize", body)[0]["tokens"]


def agent(stolen):
    """Three turns with tools: how much of what the turns have in common comes from the cache."""
    rows, samples = [], []
    with Server() as server:
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Reverse a string in Rust."}]
        fixed = {"tools": TOOLS, "temperature": 0, "max_tokens": 60}
        before = None
        for turn in range(1, 4):
            prompt = tokens(server, {"messages": messages, **fixed})
            answer, seconds = server.post("/v1/chat/completions", {"messages": messages, **fixed})
            cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            sample = {"turn": turn, "prompt_tokens": len(prompt), "cached_tokens": cached, "seconds": seconds}
            if before is not None:
                sample["prompt_before"] = len(before)
                sample["common"] = next((i for i, (a, b) in enumerate(zip(before, prompt)) if a != b), len(before))
                rows.append({
                    "turn": turn, "prompt tokens": len(prompt), "of them also in the turn before": sample["common"],
                    "cached tokens": cached, "share reused": f"{100 * min(1, cached / sample['common']):.1f} %",
                })
            samples.append(sample)
            before = prompt
            message = answer["choices"][0]["message"]
            messages.append({key: value for key, value in message.items() if value is not None})
            messages.append({"role": "user", "content": "Now for a vector, please."})
        commands = [server.shown]
    print(samples, file=sys.stderr)
    write("serving-agent", commands, samples, {"serving-agent": rows}, stolen)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"}, "tags": {"type": "array", "items": {"type": "string"}, "minItems": 30},
        "size": {"type": "object", "properties": {"width": {"type": "integer"}, "unit": {"enum": ["mm", "cm"]}}, "required": ["width", "unit"], "additionalProperties": False},
    },
    "required": ["name", "size", "tags"],
    "additionalProperties": False,
}


def grammar(stolen):
    """Seconds of masks per constrained token, against the step that waits for them."""
    rows, samples, commands = [], [], []
    for name, options in [("bundled model", []), (SHAPE, ["--synthetic", SHAPE, "--context", 2048])]:
        with Server(*options) as server:
            commands.append(server.shown)
            body = {
                "messages": [{"role": "user", "content": "Describe a thing."}], "max_tokens": 200, "temperature": 0.8,
                "response_format": {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}},
                "chat_template_kwargs": {"enable_thinking": False},
            }
            server.post("/v1/chat/completions", {**body, "seed": 0})
            read = lambda: {n: server.metric(f"moellon:{n}") for n in ["masks_total", "mask_seconds_total", "steps_total"]}
            for seed in range(1, 6):
                start = read()
                answer, _ = server.post("/v1/chat/completions", {**body, "seed": seed})
                end = read()
                count = end["masks_total"] - start["masks_total"]
                decode = answer["timings"]["predicted_ms"] / 1e3
                samples.append({"model": name, "masks": count, "mask_s": end["mask_seconds_total"] - start["mask_seconds_total"], "decode_s": decode, "tokens": answer["usage"]["completion_tokens"]})
            of = [sample for sample in samples if sample["model"] == name]
            mask = sum(s["mask_s"] for s in of) / sum(s["masks"] for s in of)
            step = sum(s["decode_s"] for s in of) / sum(s["tokens"] - 1 for s in of)
            rows.append({"model": name, "masks": int(sum(s["masks"] for s in of)), "mask, us": f"{1e6 * mask:.1f}", "step, us": f"{1e6 * step:.0f}", "share of the step": f"{100 * mask / step:.2f} %"})
    print(rows, file=sys.stderr)
    write("serving-grammar", commands, samples, {"serving-grammar": rows}, stolen)


def main():
    sections = {f.__name__: f for f in (throughput, cache, latency, agent, grammar)}
    if len(sys.argv) < 2 or any(name not in sections for name in sys.argv[1:]):
        raise SystemExit(__doc__)
    for name in sys.argv[1:]:
        sections[name](steal_ticks())


if __name__ == "__main__":
    main()
