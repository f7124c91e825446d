"""Measures `moellon serve` over HTTP and writes receipts, from which the tables of docs/serving.md are generated.

    cargo build --release -p moellon
    python3 bench/serving.py throughput   # 8 streams over HTTP against the decoder's own batch speed, interleaved
    python3 bench/serving.py cache        # an 8 K prefix: cold, cached, after a restart; strangers beside it
    python3 bench/serving.py latency      # time between tokens of running streams before, while and after an 8 K prompt is computed
    python3 bench/serving.py agent        # a conversation's second turn on the bundled model
    python3 bench/serving.py grammar      # what masks cost
    python3 bench/serving.py thinking     # an agent's steps with and without the automatic thinking policy
    python3 bench/serving.py choices      # several answers to one prompt: what they cost, and what the compiler makes of them (needs rustc)
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
# Random weights say the same again and again, which drafts guess as no text could be guessed.
NO_DRAFTS = ("--speculate", "off")


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

    def thread_seconds(self):
        """Seconds on a processor by name of thread."""
        seconds = {}
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                name, spent = (task / "comm").read_text().strip(), int((task / "schedstat").read_text().split()[0])
                seconds[name] = seconds.get(name, 0) + spent / 1e9
        return seconds

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


def streams(server, prompts, max_tokens):
    """Tokens a second of one stream a prompt, from when all of them decode until the first ends."""

    async def all_of_them():
        times = [[] for _ in prompts]
        await asyncio.gather(*(server.stream("/v1/completions", completion(p, max_tokens), t) for p, t in zip(prompts, times)))
        return times

    times = asyncio.run(all_of_them())
    start, end = max(t[0] for t in times), min(t[-1] for t in times)
    frames = sum(sum(start < moment <= end for moment in t) for t in times)
    # A token's text may come with the next one's: half of a character.
    tokens_of_frame = len(prompts) * max_tokens / sum(len(t) for t in times)
    return frames * tokens_of_frame / (end - start)


def batch(server, prompts, max_tokens):
    """Tokens a second of the engine alone: the same prompts in one request, answered in one piece at the end. Two lengths,
    so that only decoding counts."""
    short = 8
    _, little = server.post("/v1/completions", completion(prompts, short))
    _, much = server.post("/v1/completions", completion(prompts, max_tokens))
    return len(prompts) * (max_tokens - short) / (much - little)


def throughput(stolen):
    rng = random.Random(1)
    samples, commands = [], []
    prompt, new, rounds = 64, 160, 12
    bench = ["bench", "--synthetic", SHAPE, "--batch", "1,8", "--context", prompt + new // 2, "--prompt", 64, "--steps", 16, "--windows", 2, "--json"]
    with Server("--synthetic", SHAPE, "--context", CONTEXT, *NO_DRAFTS) as server:
        commands += [server.shown, f"{NAME} {' '.join(map(str, bench))}"]
        streams(server, [ids(rng, prompt) for _ in range(8)], 16)
        for _ in range(rounds):
            before = steal_ticks()
            prompts = [ids(rng, prompt) for _ in range(8)]
            # The prompts are cached by the first; who comes first is drawn.
            batch(server, prompts, 9)
            runs = [("batch_8", lambda: batch(server, prompts, new)), ("http_8", lambda: streams(server, prompts, new)), ("http_1", lambda: streams(server, prompts[:1], new // 2))]
            rng.shuffle(runs)
            sample = {}
            for name, measure in runs:
                threads, client = server.thread_seconds(), time.process_time()
                sample[name] = measure()
                if name == "http_8":
                    sample["client_cpu_s"] = time.process_time() - client
                    sample["thread_cpu_s"] = {key: spent - threads.get(key, 0) for key, spent in server.thread_seconds().items()}
            after = steal_ticks()
            sample["steal_pct"] = 100 * (after[0] - before[0]) / max(1, after[1] - before[1])
            sample["bandwidth_fraction"] = server.metric("moellon:bandwidth_fraction")
            sample["experts"] = server.metric("moellon:experts_unique_per_step")
            samples.append(sample)
            print(sample, file=sys.stderr)
        report = json.loads(run(*bench)[0])
    own = {result["batch"]: result["decode_tok_s"] for result in report["results"]}
    # A round in which the neighbours took time says nothing about us.
    quiet = [sample for sample in samples if sample["steal_pct"] <= 2.0] or samples
    median = lambda key: statistics.median(sample[key] for sample in quiet)

    def share(thread=None):
        spent = lambda sample: sample["thread_cpu_s"].get(thread, 0) if thread else sample["client_cpu_s"]
        return statistics.median(100 * spent(s) / (sum(s["thread_cpu_s"].values()) + s["client_cpu_s"]) for s in quiet)

    ratio = sorted(sample["http_8"] / sample["batch_8"] for sample in quiet)
    row = {
        "shape": SHAPE, "rounds": f"{len(quiet)} of {rounds}",
        "decoder alone, batch 8 (random tokens)": f"{own[8]:.0f}", "engine, one request of 8 prompts": f"{median('batch_8'):.0f}",
        "HTTP, 8 streams": f"{median('http_8'):.0f}", "HTTP / engine": f"{statistics.median(ratio):.3f} ({ratio[0]:.3f}-{ratio[-1]:.3f})",
        "processor time: server beside the engine, client": f"{share('serve'):.1f} %, {share():.1f} %",
        "HTTP, 1 stream": f"{median('http_1'):.0f}", "8 streams / 1": f"{median('http_8') / median('http_1'):.2f}",
    }
    write("serving-throughput", commands, {"rounds": samples, "decoder": report}, {"serving-throughput": [row]}, stolen)


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
    calm_seconds = 20

    async def measure(server):
        # Long enough to be there all the time.
        times = [[] for _ in range(4)]
        running = [asyncio.create_task(server.stream("/v1/completions", completion(ids(rng, 64), 8000), t)) for t in times]
        while min(map(len, times)) < 20:
            await asyncio.sleep(0.05)
        marks = [time.monotonic()]
        await asyncio.sleep(calm_seconds)
        marks.append(time.monotonic())
        done = []
        await server.stream("/v1/completions", completion(ids(rng, LONG), 1), done)
        marks.append(done[0])
        # The streams have grown meanwhile, and with them what a step takes.
        await asyncio.sleep(calm_seconds)
        marks.append(time.monotonic())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        gaps = lambda start, end: [b - a for t in times for a, b in zip(t, t[1:]) if start <= a and b <= end]
        return [gaps(start, end) for start, end in zip(marks, marks[1:])], marks[2] - marks[1]

    with Server("--synthetic", SHAPE, "--context", CONTEXT, *NO_DRAFTS) as server:
        (before, busy, after), seconds = asyncio.run(measure(server))
        commands = [server.shown]
    rows = [
        {
            "4 streams": name, "tokens": len(gaps), "median, ms": f"{1e3 * statistics.median(gaps):.1f}",
            "p99, ms": f"{1e3 * quantile(gaps, 0.99):.1f}", "longest, ms": f"{1e3 * max(gaps):.1f}",
            "p99 / before": f"{quantile(gaps, 0.99) / quantile(before, 0.99):.2f}", "p99 / after": f"{quantile(gaps, 0.99) / quantile(after, 0.99):.2f}",
            "median / before": f"{statistics.median(gaps) / statistics.median(before):.2f}",
        }
        for name, gaps in [("alone, before", before), (f"while 8 K tokens are computed ({seconds:.0f} s)", busy), ("alone, after", after)]
    ]
    print(rows, file=sys.stderr)
    write("serving-latency", commands, {"before_s": before, "busy_s": busy, "after_s": after, "long_prompt_s": seconds}, {"serving-latency": rows}, stolen)


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


def wide_model(folder, num_tokens):
    """A copy of the bundled model's folder whose tokenizer has as many tokens as large models': its own, and pairs of them."""
    model = Path(folder) / "wide"
    shutil.copytree(Path(__file__).resolve().parent.parent / "models" / "moellon-tiny", model)
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    known, own = set(vocab), [token for token in vocab if len(token) > 1]
    next_id = 1 + max([*vocab.values(), *(added["id"] for added in tokenizer["added_tokens"])])
    rng = random.Random(7)
    while next_id < num_tokens:
        pair = [rng.choice(own), rng.choice(own)]
        if "".join(pair) not in known:
            known.add("".join(pair))
            vocab["".join(pair)] = next_id
            merges.append(pair)
            next_id += 1
    path.write_text(json.dumps(tokenizer))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": num_tokens}))
    return model


def grammar(stolen):
    """Seconds of masks per constrained token, against the step that waits for them."""
    rows, samples, commands = [], [], []
    folder, wide_shape = tempfile.mkdtemp(prefix="moellon-wide-"), SHAPE.replace("vocab=4096", "vocab=151936")
    # The tokens of Qwen3.
    wide = ["-m", wide_model(folder, 151_936), "--synthetic", wide_shape, "--context", 2048]
    models = [("bundled model, 4096 tokens", []), (SHAPE, ["--synthetic", SHAPE, "--context", 2048]), (wide_shape, wide)]
    for name, options in models:
        with Server(*options) as server:
            commands.append(server.shown.replace(folder, "DIRECTORY"))
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
    shutil.rmtree(folder)
    print(rows, file=sys.stderr)
    write("serving-grammar", commands, samples, {"serving-grammar": rows}, stolen)


def thinking(stolen):
    """An agent's session step by step: tokens and seconds where every step thinks, and where mechanical ones do not."""
    call = lambda command: {"role": "assistant", "content": "", "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "run", "arguments": json.dumps({"command": command})}}]}
    result = lambda text: {"role": "tool", "tool_call_id": "call_1", "content": text}
    session = [
        [{"role": "user", "content": "Write a function that reverses a string, and test it."}],
        [call("ls"), result("Cargo.toml\nsrc")],
        [call("cargo test"), result("error[E0308]: mismatched types")],
        [call("cargo test"), result("test result: ok. 4 passed; 0 failed")],
        [{"role": "assistant", "content": "Done."}, {"role": "user", "content": "Now for a vector."}],
        [call("cargo test"), result("test result: ok. 5 passed; 0 failed")],
    ]
    rows, samples, commands = [], [], []
    for policy in ("template", "auto"):
        with Server("--thinking", policy) as server:
            commands.append(server.shown)
            for seed in range(8):
                messages = []
                for step, more in enumerate(session):
                    messages = messages + more
                    body = {"messages": messages, "tools": TOOLS, "temperature": 0.7, "seed": seed, "max_tokens": 300}
                    answer, seconds = server.post("/v1/chat/completions", body)
                    usage = answer["usage"]
                    samples.append({"policy": policy, "seed": seed, "step": step, "seconds": seconds, "tokens": usage["completion_tokens"], "thinking": usage["completion_tokens_details"]["reasoning_tokens"]})
        of = [sample for sample in samples if sample["policy"] == policy]
        total = lambda key: sum(sample[key] for sample in of) / 8
        rows.append({
            "--thinking": policy, "steps": len(session), "of them with a thought": f"{sum(s['thinking'] > 0 for s in of) / 8:.1f}",
            "tokens a session": f"{total('tokens'):.0f}", "of them thinking": f"{total('thinking'):.0f}",
        })
    print(rows, file=sys.stderr)
    write("serving-thinking", commands, samples, {"serving-thinking": rows}, stolen)


# Beginnings of functions for the bundled model to finish.
FUNCTIONS = [
    ("Returns the sum of the squares.", "fn sum_of_squares(values: &[i64]) -> i64"),
    ("Returns the words in reverse order.", "fn reverse_words(text: &str) -> String"),
    ("Whether the number is prime.", "fn is_prime(n: u64) -> bool"),
    ("Counts the vowels.", "fn count_vowels(text: &str) -> usize"),
    ("The longest word, if there is one.", "fn longest_word(text: &str) -> Option<&str>"),
    ("Parses a line of numbers with commas between.", "fn parse_numbers(line: &str) -> Vec<i64>"),
    ("Removes duplicates, the first of each stays.", "fn unique(values: &[i32]) -> Vec<i32>"),
    ("The greatest common divisor.", "fn gcd(a: u64, b: u64) -> u64"),
    ("Joins two sorted lists into one.", "fn merge(a: &[i32], b: &[i32]) -> Vec<i32>"),
    ("The number of lines that are not empty.", "fn count_lines(text: &str) -> usize"),
    ("Finds the position of the largest value.", "fn argmax(values: &[f64]) -> Option<usize>"),
    ("How often each word occurs.", "fn word_counts(text: &str) -> std::collections::HashMap<String, usize>"),
    ("The n-th Fibonacci number.", "fn fibonacci(n: u32) -> u64"),
    ("Whether the text reads the same from both ends.", "fn is_palindrome(text: &str) -> bool"),
    ("Splits the list into pieces of `size`.", "fn chunks(values: &[i32], size: usize) -> Vec<Vec<i32>>"),
    ("The mean, if there are values.", "fn mean(values: &[f64]) -> Option<f64>"),
]


def compiles(code):
    with tempfile.TemporaryDirectory() as folder:
        words = ["rustc", "--edition", "2021", "--crate-type", "lib", "--emit", "metadata", "--cap-lints", "allow", "-o", f"{folder}/out", "-"]
        return subprocess.run(words, input=code, text=True, capture_output=True).returncode == 0


def choices(stolen):
    """Several answers to one prompt: the time until all have begun, and how many functions compile if the compiler chooses."""
    rng, costs, commands, n = random.Random(4), [], [], 8
    prompt_tokens = 500
    with Server("--synthetic", SHAPE, "--context", 2048, *NO_DRAFTS) as server:
        commands.append(server.shown)
        first_token(server, ids(rng, 64))
        for _ in range(3):
            one, all_of_one = ids(rng, prompt_tokens), ids(rng, prompt_tokens)
            many = [ids(rng, prompt_tokens) for _ in range(n)]
            sample = {}
            for name, body in [("1 answer", completion(one, 1)), (f"{n} answers to one prompt", {**completion(all_of_one, 1), "n": n}), (f"{n} prompts", completion(many, 1))]:
                sample[name] = server.post("/v1/completions", body)[1]
            costs.append(sample)
            print(sample, file=sys.stderr)
    alone = statistics.median(sample["1 answer"] for sample in costs)
    cost_rows = [
        {f"prompts of {prompt_tokens} tokens": name, "first token of all, s": f"{statistics.median(s[name] for s in costs):.2f}", "against one": f"{statistics.median(s[name] for s in costs) / alone:.2f}x"}
        for name in costs[0]
    ]
    tries = []
    with Server() as server:
        commands.append(server.shown)
        for index, (comment, signature) in enumerate(FUNCTIONS):
            begin = f"/// {comment}\n{signature} {{\n"
            body = {"prompt": begin, "max_tokens": 120, "stop": ["\n}"]}
            whole = lambda answer: begin + answer["text"] + "\n}\n"
            greedy = whole(server.post("/v1/completions", {**body, "temperature": 0})[0]["choices"][0])
            sampled = {**body, "temperature": 0.9, "seed": 100 * index}
            several = [whole(answer) for answer in server.post("/v1/completions", {**sampled, "n": n})[0]["choices"]]
            likeliest = whole(server.post("/v1/completions", {**sampled, "best_of": n})[0]["choices"][0])
            assert likeliest in several, "the best of several is none of them"
            verdicts = [compiles(code) for code in several]
            tries.append({"signature": signature, "greedy": compiles(greedy), "samples": verdicts, "likeliest": compiles(likeliest), "codes": several})
            print(signature, tries[-1]["greedy"], verdicts, tries[-1]["likeliest"], file=sys.stderr)
    share = lambda good: f"{100 * sum(good) / len(good):.0f} %"
    rows = [{
        "functions": len(tries), "one, greedy": share([t["greedy"] for t in tries]), "one, sampled": share([v for t in tries for v in t["samples"]]),
        f"likeliest of {n} (best_of)": share([t["likeliest"] for t in tries]), f"any of {n} (n, the compiler chooses)": share([any(t["samples"]) for t in tries]),
    }]
    print(cost_rows, rows, file=sys.stderr)
    write("serving-choices", commands, {"costs": costs, "functions": tries}, {"serving-choices": cost_rows, "serving-compiles": rows}, stolen)


def main():
    sections = {f.__name__: f for f in (throughput, cache, latency, agent, grammar, thinking, choices)}
    if len(sys.argv) < 2 or any(name not in sections for name in sys.argv[1:]):
        raise SystemExit(__doc__)
    for name in sys.argv[1:]:
        sections[name](steal_ticks())


if __name__ == "__main__":
    main()
