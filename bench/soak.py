"""Ten minutes of 200 clients that behave as clients do: they leave, read slowly, send nonsense, ask for structure and ask
the same again. Checks that every answer is right, that nothing wedges and that memory does not grow; writes a receipt.

    cargo build --release -p moellon
    python3 bench/soak.py [SECONDS] [CLIENTS]     # 600 200

The bundled model answers. Greedy answers do not depend on what runs beside them, so each is compared with the one that an
idle server gave. Needs nothing but Python.
"""

import asyncio
import json
import os
import random
import sys
import time
from pathlib import Path

from receipts import steal_ticks, write
from serving import Server

PROMPTS = [f"Write a function that {what}." for what in (
    "reverses a string", "adds two numbers", "counts words", "sorts a vector", "finds the largest number",
    "checks whether a number is prime", "joins two lists", "parses an integer", "computes a sum", "removes duplicates",
)]
BAD = [
    (b"{", 400), (b"[]", 400), (b'{"messages": []}', 400), (b'{"messages": [{"role": "user", "content": "x"}], "temperature": -1}', 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "model": "../../etc/passwd"}', 404),
    (b'{"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "hiccup"}}}}', 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "structured_outputs": {"regex": "((((("}}', 400),
    (json.dumps({"messages": [{"role": "user", "content": "word " * 20000}]}).encode(), 400),
]
SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "maximum": 99, "minimum": 0}}, "required": ["ok", "n"], "additionalProperties": False}
KINDS = ["stream"] * 5 + ["whole"] * 3 + ["leave"] * 4 + ["slow"] + ["bad"] * 3 + ["json"] * 2 + ["messages", "responses", "half"]


def chat(prompt, **more):
    return {"messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": 48, **more}


async def send(port, path, body):
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    return reader, writer


def unchunk(data):
    out = b""
    while data:
        size, _, rest = data.partition(b"\r\n")
        count = int(size or b"0", 16)
        if count == 0:
            break
        out, data = out + rest[:count], rest[count + 2 :]
    return out


async def exchange(port, path, body):
    """Status and body of a whole answer."""
    reader, writer = await send(port, path, body if isinstance(body, bytes) else json.dumps(body).encode())
    data = await asyncio.wait_for(reader.read(-1), 300)
    writer.close()
    head, _, rest = data.partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    return status, unchunk(rest) if b"transfer-encoding: chunked" in head.lower() else rest


def joined(body):
    text, reason = "", None
    for line in body.split(b"\n"):
        if line.startswith(b"data: {"):
            frame = json.loads(line[6:])
            assert "error" not in frame, frame
            for choice in frame["choices"]:
                delta = choice["delta"]
                text += (delta.get("reasoning_content") or "") + (delta.get("content") or "")
                reason = choice["finish_reason"] or reason
    assert body.rstrip().endswith(b"data: [DONE]"), body[-200:]
    return text, reason


def whole_text(message):
    return (message.get("reasoning_content") or "") + (message.get("content") or "")


class Soak:
    def __init__(self, port, expected):
        self.port, self.expected = port, expected
        self.counts, self.wrong, self.busy = {}, [], 0

    async def client(self, number, end):
        rng = random.Random(number)
        while time.monotonic() < end:
            kind = rng.choice(KINDS)
            try:
                await getattr(self, kind)(rng)
                self.counts[kind] = self.counts.get(kind, 0) + 1
            except Exception as error:  # every client goes on, and the end of the run says what was wrong
                self.wrong.append(f"{kind}: {type(error).__name__}: {str(error)[:300]}")
            await asyncio.sleep(rng.random() * 0.2)

    def accept(self, status):
        """Whether an answer came; a full server may say so."""
        if status == 429:
            self.busy += 1
            return False
        assert status == 200, status
        return True

    async def stream(self, rng):
        prompt = rng.choice(PROMPTS)
        status, body = await exchange(self.port, "/v1/chat/completions", chat(prompt, stream=True))
        if self.accept(status):
            assert joined(body) == self.expected[prompt], (prompt, joined(body))

    async def whole(self, rng):
        prompt = rng.choice(PROMPTS)
        status, body = await exchange(self.port, "/v1/chat/completions", chat(prompt))
        if self.accept(status):
            choice = json.loads(body)["choices"][0]
            assert (whole_text(choice["message"]), choice["finish_reason"]) == self.expected[prompt], choice

    async def json(self, rng):
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
        more = {"response_format": form, "chat_template_kwargs": {"enable_thinking": False}, "temperature": 1, "seed": rng.randrange(1000)}
        status, body = await exchange(self.port, "/v1/chat/completions", {**chat(rng.choice(PROMPTS)), **more})
        if self.accept(status):
            choice = json.loads(body)["choices"][0]
            if choice["finish_reason"] == "stop":
                found = json.loads(choice["message"]["content"])
                assert set(found) == {"ok", "n"} and 0 <= found["n"] <= 99, found

    async def messages(self, rng):
        prompt = rng.choice(PROMPTS)
        body = {"max_tokens": 48, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
        status, body = await exchange(self.port, "/v1/messages", body)
        if self.accept(status):
            text = "".join(block.get("thinking", "") + block.get("text", "") for block in json.loads(body)["content"])
            assert text == self.expected[prompt][0], text

    async def responses(self, rng):
        prompt = rng.choice(PROMPTS)
        status, body = await exchange(self.port, "/v1/responses", {"input": prompt, "max_output_tokens": 48, "temperature": 0})
        if self.accept(status):
            text = "".join(part["text"] for item in json.loads(body)["output"] for part in item["content"])
            assert text == self.expected[prompt][0], text

    async def leave(self, rng):
        """Goes away at any time: in the queue, while the prompt is computed, in the answer."""
        body = chat(rng.choice(PROMPTS) + f" Please. {rng.random()}", stream=rng.random() < 0.7, max_tokens=400)
        _, writer = await send(self.port, "/v1/chat/completions", json.dumps(body).encode())
        await asyncio.sleep(rng.random() * 1.5)
        writer.transport.abort()

    async def slow(self, rng):
        """Reads a few bytes a second for a while, then leaves or reads the rest."""
        body = json.dumps(chat(rng.choice(PROMPTS), stream=True, max_tokens=200)).encode()
        reader, writer = await send(self.port, "/v1/chat/completions", body)
        for _ in range(10):
            if not await asyncio.wait_for(reader.read(8), 300):
                break
            await asyncio.sleep(0.3)
        if rng.random() < 0.5:
            await asyncio.wait_for(reader.read(-1), 300)
        writer.transport.abort()

    async def half(self, rng):
        """Half a request, then nothing."""
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 500\r\n\r\n{\"mess")
        await asyncio.sleep(rng.random() * 3)
        writer.transport.abort()

    async def bad(self, rng):
        body, expected = rng.choice(BAD)
        status, answer = await exchange(self.port, "/v1/chat/completions", body)
        assert status in (expected, 429), (status, expected, answer[:200])
        assert status == 429 or json.loads(answer)["error"]["message"]


def resident_bytes(process):
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def watch(server, end, samples):
    while time.monotonic() < end:
        status, body = await exchange_get(server.port, "/health")
        health = json.loads(body)
        samples.append({
            "s": round(time.monotonic() - end + DURATION, 1), "rss": resident_bytes(server.process), "status": status,
            "running": health["running"], "waiting": health["waiting"], "steps": health["steps"],
            "open_files": len(os.listdir(f"/proc/{server.process.pid}/fd")),
        })
        await asyncio.sleep(5)


async def exchange_get(port, path):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
    data = await asyncio.wait_for(reader.read(-1), 60)
    writer.close()
    head, _, rest = data.partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]), rest


async def run(server, seconds, clients):
    expected = {}
    for prompt in PROMPTS:
        status, body = await exchange(server.port, "/v1/chat/completions", chat(prompt))
        choice = json.loads(body)["choices"][0]
        expected[prompt] = (whole_text(choice["message"]), choice["finish_reason"])
    soak, samples, end = Soak(server.port, expected), [], time.monotonic() + seconds
    await asyncio.gather(watch(server, end, samples), *(soak.client(number, end) for number in range(clients)))
    for _ in range(100):
        if json.loads((await exchange_get(server.port, "/health"))[1])["running"] == 0:
            break
        await asyncio.sleep(0.1)
    status = json.loads((await exchange_get(server.port, "/moellon/status"))[1])
    return soak, samples, status


def main():
    global DURATION
    DURATION = seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 600
    clients = int(sys.argv[2]) if len(sys.argv) > 2 else 200
    stolen = steal_ticks()
    with Server("--max-sequences", 16) as server:
        soak, samples, status = asyncio.run(run(server, seconds, clients))
        command = server.shown
    third = len(samples) // 3
    middle, last = (max(s["rss"] for s in part) for part in (samples[third : 2 * third], samples[2 * third :]))
    stuck = sum(a["steps"] == b["steps"] and b["running"] > 0 for a, b in zip(samples, samples[1:]))
    row = {
        "clients": clients, "seconds": seconds, "requests": sum(soak.counts.values()), "wrong answers": len(soak.wrong),
        "busy (429)": soak.busy, "peak MB, middle third": f"{middle / 1e6:.1f}", "last third": f"{last / 1e6:.1f}",
        "open files at the end": samples[-1]["open_files"], "samples without a step": stuck,
        "cache in use after": status["cache_used_bytes"], "requests left": len(status["requests"]),
    }
    print(json.dumps(row), soak.counts, soak.wrong[:5], sep="\n")
    write("serving-soak", [f"python3 bench/soak.py {seconds} {clients}", command], {"counts": soak.counts, "wrong": soak.wrong[:50], "every_5_s": samples}, {"serving-soak": [row]}, stolen)
    grown = last > 1.05 * middle
    return 1 if soak.wrong or grown or stuck or status["cache_used_bytes"] or status["requests"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
