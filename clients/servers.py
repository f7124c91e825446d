"""Starts the servers that the client tests talk to, each on a port of its own.

`scripted` replays answers (`crates/serve/examples/scripted_server.rs`), so that tests can say what must come.
`bundled` is `moellon serve` with the bundled model: its words are its own, the protocol around them is not.
"""

import contextlib
import os
import pathlib
import socket
import subprocess
import time
import urllib.error
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
KEY = "test-key"
STARTUP_SECONDS = 60


class Server:
    """A server that runs: its address, and what can be expected of its answers."""

    def __init__(self, kind, url):
        self.kind = kind
        self.url = url
        self.is_scripted = kind == "scripted"


def binary(*parts):
    """A program that cargo has built; tests do not build anything."""
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    path = target.joinpath(os.environ.get("MOELLON_PROFILE", "debug"), *parts)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: build it first (cargo build -p moellon && cargo build -p moellon-serve --examples)")
    return path


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(kind, port):
    if kind == "scripted":
        return [binary("examples", "scripted_server"), f"127.0.0.1:{port}", ROOT / "models" / "moellon-tiny"]
    options = ["--port", str(port), "--api-key", KEY, "--alias", "tiny", "--alias", "claude-*", "--drain", "2"]
    return [binary("moellon"), "--log", "warn", "serve", *options]


@contextlib.contextmanager
def running(kind):
    """A server of this kind, stopped with SIGTERM afterwards: it must drain and end with status 0."""
    port = free_port()
    # Settings of the person who runs the tests must not reach the program.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MOELLON_")}
    process = subprocess.Popen([str(word) for word in command(kind, port)], env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy(process, url)
        yield Server(kind, url)
    finally:
        process.terminate()
        status = process.wait(timeout=40)
    assert status == 0, f"the {kind} server ended with status {status}"


def wait_until_healthy(process, url):
    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server ended with status {process.returncode}"
        try:
            urllib.request.urlopen(f"{url}/health", timeout=1)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise TimeoutError(f"the server did not come up within {STARTUP_SECONDS} s")
