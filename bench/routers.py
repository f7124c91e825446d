"""Routers of several servers, unchanged, over two of ours: each must find the model, spread conversations, keep a conversation
where its prefix is cached, give the same greedy answers as a worker and go on when a worker ends. Writes a receipt.

    cargo build --release -p moellon
    python3 bench/routers.py [NAME ..]      # sglang-router, smg
    cargo xtask docs --write

Routers are installed from PyPI into target/routers, pinned. The bundled model answers. What the routers ask of a worker
(`/health`, `/server_info`, `/v1/models`, `/v1/loads`, `/metrics` ..) is theirs to decide; the receipt says what they made of it.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from receipts import ROOT, steal_ticks, write
from serving import Server

TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
ROUTERS = {
    "sglang-router": ("0.3.2", ["-m", "sglang_router.launch_router"]),
    "smg": ("1.13.0", ["-m", "smg.cli", "launch"]),
}
CONVERSATIONS, TURNS = 6, 3
TOPICS = ["reverses a string", "adds two numbers", "counts words", "sorts a vector", "joins two lists", "parses an integer"]


def install(name, version):
    folder = TARGET / "routers" / f"{name}-{version}"
    python = folder / "bin" / "python"
    if not (folder / "done").exists():
        subprocess.run(["python3", "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", f"{name}=={version}"], check=True)
        (folder / "done").touch()
    return python


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(port, path, body=None):
    """Status and body; status 0 where nobody listens."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


@contextlib.contextmanager
def router(name, workers):
    version, words = ROUTERS[name]
    port, prometheus = free_port(), free_port()
    urls = [f"http://127.0.0.1:{worker.port}" for worker in workers]
    options = ["--host", "127.0.0.1", "--port", port, "--prometheus-port", prometheus, "--worker-urls", *urls, "--policy", "cache_aware"]
    with tempfile.TemporaryFile() as log:
        command = [install(name, version), *words, *options]
        process = subprocess.Popen([str(word) for word in command], stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 60
            while name_of_model(port) is None:
                if time.monotonic() > deadline or process.poll() is not None:
                    log.seek(0)
                    raise SystemExit(f"{name} does not list the model:\n{log.read().decode()[-3000:]}")
                time.sleep(0.2)
            yield port
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


def name_of_model(port):
    status, body = ask(port, "/v1/models")
    models = json.loads(body)["data"] if status == 200 else []
    return models[0]["id"] if models else None


def chat(messages, **more):
    return {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 24, **more}


def text_of(message):
    return (message.get("reasoning_content") or "") + (message.get("content") or "")


def streamed(body):
    text = ""
    for line in body.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                text += (choice["delta"].get("reasoning_content") or "") + (choice["delta"].get("content") or "")
    assert body.rstrip().endswith("data: [DONE]"), body[-200:]
    return text


class Worker(Server):
    """A server that may end before the others."""

    def end(self):
        if self.process.poll() is None:
            super().__exit__()

    def __exit__(self, *_):
        self.end()


def requests_of(worker):
    lines = [line for line in worker.get("/metrics").splitlines() if line.startswith("vllm:request_success_total{")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def run(name):
    wrong, cached, prompts = [], 0, 0
    with Worker("--name", MODEL) as first, Worker("--name", MODEL) as second:
        with router(name, [first, second]) as port:
            listed = name_of_model(port)
            conversations = [[{"role": "user", "content": f"Write a function that {topic}. " * 12}] for topic in TOPICS[:CONVERSATIONS]]
            for turn in range(TURNS):
                for messages in conversations:
                    status, body = ask(port, "/v1/chat/completions", chat(messages))
                    if status != 200:
                        wrong.append((turn, status, body[:200]))
                        continue
                    answer = json.loads(body)
                    if turn > 0:
                        cached += answer["usage"]["prompt_tokens_details"]["cached_tokens"]
                        prompts += answer["usage"]["prompt_tokens"]
                    text = text_of(answer["choices"][0]["message"])
                    _, direct = ask(first.port, "/v1/chat/completions", chat(messages))
                    if text != text_of(json.loads(direct)["choices"][0]["message"]):
                        wrong.append((turn, text))
                    _, stream = ask(port, "/v1/chat/completions", chat(messages, stream=True))
                    if streamed(stream) != text:
                        wrong.append((turn, "stream", stream[-300:]))
                    messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "Now for a list, please."}]
            # The direct questions went to the first.
            asked = [int(requests_of(first)) - CONVERSATIONS * TURNS, int(requests_of(second))]
            # The one that the router prefers for these conversations: it must notice, and go to the other.
            (first if asked[0] >= asked[1] else second).end()
            after = [ask(port, "/v1/chat/completions", chat(conversations[0])) for _ in range(8)]
    sample = {
        "router": name, "version": ROUTERS[name][0], "model_listed": listed, "requests_of_workers": asked, "wrong": wrong,
        "cached_tokens": cached, "prompt_tokens": prompts, "statuses_after_a_worker_ended": [status for status, _ in after],
        # Whose words they are: ours have a type and a code.
        "errors_after_a_worker_ended": [body[:300] for status, body in after if status != 200],
    }
    print(json.dumps(sample))
    return sample


MODEL = "moellon-tiny"


def main():
    stolen = steal_ticks()
    names = sys.argv[1:] or list(ROUTERS)
    samples = [run(name) for name in names]
    rows = [
        {
            "router": f"{s['router']} {s['version']}", "model listed as": s["model_listed"], "requests of two workers": " + ".join(map(str, s["requests_of_workers"])),
            "wrong answers": len(s["wrong"]), "prompt tokens cached from the second turn on": f"{100 * s['cached_tokens'] / max(1, s['prompt_tokens']):.0f} %",
            "answered after a worker ended": f"{sum(status == 200 for status in s['statuses_after_a_worker_ended'])} of {len(s['statuses_after_a_worker_ended'])}",
        }
        for s in samples
    ]
    if not sys.argv[1:]:
        write("routers", ["python3 bench/routers.py"], samples, {"routers": rows}, stolen)
    fine = lambda s: s["model_listed"] == MODEL and not s["wrong"] and s["statuses_after_a_worker_ended"][-1] == 200
    return 0 if all(map(fine, samples)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
