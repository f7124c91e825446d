"""What goes wrong around a server, done to the real program: full and read-only disks, SIGKILL, damaged and cut files, a second
process, hostile grammars. Every answer is compared with that of a server to which nothing happened; writes a receipt.

    cargo build --release -p moellon
    python3 bench/faults.py          # as root: it mounts small file systems in memory

Needs nothing but Python.
"""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
from pathlib import Path

from receipts import BINARY, ROOT, steal_ticks, write
from serving import Server

TOPICS = ["reverses a string", "adds two numbers", "counts words", "sorts a vector", "joins two lists", "parses an integer"]
# Long enough for several blocks of the cache.
PROMPTS = [f"Write a function that {topic}. " * 20 for topic in TOPICS]
CHAT = "/v1/chat/completions"


def chat(prompt, **more):
    return {"messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": 24, **more}


def answer(server, prompt):
    body, _ = server.post(CHAT, chat(prompt))
    message = body["choices"][0]["message"]
    return (message.get("reasoning_content") or "") + (message.get("content") or "")


class Tally:
    """Answers of one event against the expected ones."""

    def __init__(self, expected):
        self.expected, self.answers, self.wrong = expected, 0, []

    def ask(self, server, prompts=PROMPTS):
        for prompt in prompts:
            text = answer(server, prompt)
            self.answers += 1
            if text != self.expected[prompt]:
                self.wrong.append((prompt[:60], text))

    def row(self, event, outcome):
        return {"event": event, "answers": self.answers, "wrong": len(self.wrong), "what else": outcome}


@contextlib.contextmanager
def small_disk(size):
    folder = tempfile.mkdtemp(prefix="moellon-disk-")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield Path(folder)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
        Path(folder).rmdir()


def refused(*options):
    """Exit status and last line of a server that must not start."""
    done = subprocess.run([BINARY, "--log", "warn", "serve", *map(str, options)], capture_output=True, text=True, timeout=60)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode != 0 and lines, (done.returncode, done.stderr)
    return done.returncode, lines[-1]


def files(folder, suffix):
    return [path for path in Path(folder).iterdir() if path.suffix == suffix]


def full_disk(expected):
    tally = Tally(expected)
    with small_disk("600k") as folder:
        with Server("--disk-cache", folder) as server:
            tally.ask(server)
            tally.ask(server)
        kept = len(files(folder, ".kv"))
        assert not files(folder, ".tmp"), "half a file is left"
        free = shutil.disk_usage(folder).free
        with Server("--disk-cache", folder) as server:
            tally.ask(server)
            warm = int(server.metric("moellon:prefix_cache_disk_hits_total"))
    return tally.row("cache folder on a full disk, then a restart on it", f"{kept} blocks kept, {free} bytes free, {warm} tokens from them after the restart, no half files")


def lost_disk(expected):
    tally = Tally(expected)
    with small_disk("64m") as folder:
        with Server("--disk-cache", folder) as server:
            tally.ask(server, PROMPTS[:2])
            # What is there afterwards is an empty folder that belongs to the disk below.
            subprocess.run(["umount", "-l", folder], check=True)
            tally.ask(server)
        shutil.rmtree(folder)
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], check=True)
        status, line = refused("--disk-cache", folder, "--port", 0)
    assert "Read-only" in line, line
    return tally.row("the cache's disk is taken away while it runs; then a start on a read-only one", f"the start ends with status {status}: {line.split('/')[-1]}")


def killed(expected):
    tally, rng, kills, left = Tally(expected), random.Random(5), 12, 0
    folder = Path(tempfile.mkdtemp(prefix="moellon-kill-"))
    try:
        for _ in range(kills):
            server = Server("--disk-cache", folder)
            server.__enter__()
            tally.ask(server, rng.sample(PROMPTS, 1))
            # In the middle of others' prompts and of writing their blocks.
            asking = [threading.Thread(target=quietly, args=(server, f"{rng.random()} {prompt}")) for prompt in PROMPTS]
            for thread in asking:
                thread.start()
            time.sleep(rng.random() * 0.15)
            server.process.kill()
            server.process.wait()
            for thread in asking:
                thread.join()
            left += len(files(folder, ".tmp"))
        with Server("--disk-cache", folder) as server:
            tally.ask(server)
            warm = int(server.metric("moellon:prefix_cache_disk_hits_total"))
        assert not files(folder, ".tmp"), "half a file is left"
    finally:
        shutil.rmtree(folder)
    return tally.row(f"SIGKILL while prompts are computed and blocks written, {kills} times", f"{left} half files, all removed by the next start; {warm} tokens from disk at the end")


def quietly(server, prompt):
    with contextlib.suppress(OSError, urllib.error.URLError, json.JSONDecodeError, ConnectionError):
        server.post(CHAT, chat(prompt))


def damaged(expected):
    tally, rng = Tally(expected), random.Random(6)
    folder = Path(tempfile.mkdtemp(prefix="moellon-damage-"))
    try:
        with Server("--disk-cache", folder) as server:
            tally.ask(server)
        blocks = files(folder, ".kv")
        for path in blocks:
            data = bytearray(path.read_bytes())
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
        with Server("--disk-cache", folder) as server:
            tally.ask(server)
            # What prompts have in common came from memory.
            used = int(server.metric("moellon:prefix_cache_disk_hits_total"))
    finally:
        shutil.rmtree(folder)
    assert used == 0, f"{used} tokens came from damaged files"
    return tally.row("a bit of every cached file turned", f"{len(blocks)} files damaged, {used} tokens taken from them")


def cut_model(expected):
    tally = Tally(expected)
    folder = Path(tempfile.mkdtemp(prefix="moellon-cut-"))
    try:
        model = folder / "moellon-tiny"
        shutil.copytree(ROOT / "models" / "moellon-tiny", model)
        shard = model / "model.safetensors"
        whole, times = shard.read_bytes(), shard.stat()
        with Server("-m", model, "--idle-unload", 3600) as server:
            tally.ask(server, PROMPTS[:2])
            shard.write_bytes(b"")
            tally.ask(server, PROMPTS[2:4])
            # The step that gave the last answer may not have ended.
            while json.loads(server.get("/health"))["running"]:
                time.sleep(0.05)
            server.post("/models/unload", {})
            try:
                server.post(CHAT, chat(PROMPTS[0]))
                raise AssertionError("an empty file was served")
            except urllib.error.HTTPError as error:
                status, message = error.code, json.loads(error.read())["error"]["message"]
            # From a backup: with another time of change it would be taken for another file, and refused.
            shard.write_bytes(whole)
            os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
            tally.ask(server, PROMPTS[4:])
        assert "model.safetensors" in message and "\n" not in message, message
        shard.write_bytes(whole[: len(whole) // 2])
        exit_status, line = refused("-m", model, "--port", 0)
        assert "model.safetensors" in line, line
    finally:
        shutil.rmtree(folder)
    return tally.row("the model's file emptied while it is served, unloaded and asked for again; restored", f"{status} while it is empty, naming the file; a start on half of it ends with status {exit_status}")


def twice(expected):
    tally = Tally(expected)
    folder = tempfile.mkdtemp(prefix="moellon-twice-")
    try:
        with Server("--disk-cache", folder) as server:
            status, line = refused("--disk-cache", folder, "--port", 0)
            assert "another process" in line, line
            taken, port_line = refused("--port", server.port)
            assert str(server.port) in port_line, port_line
            tally.ask(server)
    finally:
        shutil.rmtree(folder)
    return tally.row("a second process on the cache folder, one on the port", f"they end with status {status} and {taken}, naming folder and address")


def nested(depth):
    return "(" * depth + "a" + ")" * depth


def schema(value):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": value}}}


def deep(levels):
    value = {"type": "integer"}
    for _ in range(levels):
        value = {"type": "object", "properties": {"a": value}, "required": ["a"]}
    return value


HOSTILE = {
    "regex of 60,000 nested parentheses": {"structured_outputs": {"regex": nested(60_000)}},
    "Lark of 60,000 nested parentheses": {"structured_outputs": {"grammar": "start: " + nested(60_000)}},
    "pattern of 60,000 nested parentheses": schema({"type": "string", "pattern": nested(60_000)}),
    "regex (?<=a)b": {"structured_outputs": {"regex": "(?<=a)b"}},
    "regex a{1,1000000}": {"structured_outputs": {"regex": "a{1,1000000}"}},
    "regex (a*)*b": {"structured_outputs": {"regex": "(a*)*b"}},
    "regex (.*a){40}": {"structured_outputs": {"regex": "(.*a){40}"}},
    "enum of 100,000": schema({"enum": [f"value number {i}" for i in range(100_000)]}),
    "enum of 10,000": schema({"enum": [f"value number {i}" for i in range(10_000)]}),
    "allOf of 1,000": schema({"allOf": [{"type": "integer", "minimum": i} for i in range(1000)]}),
    "anyOf of 2,000 objects": schema({"anyOf": [{"type": "object", "properties": {f"k{i}": {"type": "string"}}, "required": [f"k{i}"]} for i in range(2000)]}),
    "100 nested objects": schema(deep(100)),
    "$ref to itself": schema({"$ref": "#"}),
    "$ref in a circle": schema({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
    "remote $ref": schema({"$ref": "https://example.com/a.json"}),
    "a contradiction": schema({"allOf": [{"type": "string"}, {"type": "integer"}]}),
    'type "hiccup"': schema({"type": "hiccup"}),
}


def hostile(expected):
    """Status and seconds of each grammar, three at a time, beside requests whose answers are known."""
    tally, rows, stop = Tally(expected), [], threading.Event()
    with Server("--max-tokens", 8) as server:

        def beside():
            while not stop.is_set():
                tally.ask(server, PROMPTS[:1])

        other = threading.Thread(target=beside)
        other.start()
        for name, fields in HOSTILE.items():
            seconds, statuses = [], []

            def ask(seed):
                body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "seed": seed, **fields}
                body["chat_template_kwargs"] = {"enable_thinking": False}
                start = time.monotonic()
                try:
                    server.post(CHAT, body)
                    statuses.append(200)
                except urllib.error.HTTPError as error:
                    statuses.append(error.code)
                seconds.append(time.monotonic() - start)

            asking = [threading.Thread(target=ask, args=(seed,)) for seed in range(3)]
            for thread in asking:
                thread.start()
            for thread in asking:
                thread.join()
            rows.append({"grammar": name, "status": ", ".join(map(str, sorted(set(statuses)))), "slowest of three at once, s": f"{max(seconds):.2f}"})
        stop.set()
        other.join()
    return rows, tally


def main():
    stolen = steal_ticks()
    with Server() as server:
        expected = {prompt: answer(server, prompt) for prompt in PROMPTS}
    rows = []
    for event in (full_disk, lost_disk, killed, damaged, cut_model, twice):
        rows.append(event(expected))
        print(rows[-1], file=sys.stderr)
    grammars, beside = hostile(expected)
    rows.append(beside.row("hostile grammars beside other requests", "see the next table"))
    print(rows[-1], *grammars, sep="\n", file=sys.stderr)
    write("serving-faults", ["python3 bench/faults.py"], {"events": rows, "grammars": grammars}, {"serving-faults": rows, "serving-hostile": grammars}, stolen)
    return 1 if any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
