"""Coding agents from npm, unchanged, against our server: each must complete a tool loop, and a receipt says so.

    cargo xtask agents        # or: python3 bench/agents.py [NAME ..]

The server replays answers (`crates/serve/examples/scripted_server.rs`): it asks the agent's own shell tool to write a file
and, once the result has come back, says a few words. So the protocol is what is tested, in both directions, with the
prompts, tools and headers that the agents really send. Agents are installed into target/agents, pinned. The server is built
first, so that it is of the commit that the receipt names.
"""

import contextlib
import datetime
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
KEY = "test-key"
PROMPT = "Please run the command that writes proof.txt, then say what happened."
COMMAND = "echo it-ran > proof.txt"
LAST_WORDS = "The tool said so."
TIMEOUT_SECONDS = 180


def claude(url, home, work):
    environment = {
        "ANTHROPIC_BASE_URL": url, "ANTHROPIC_AUTH_TOKEN": KEY, "ANTHROPIC_MODEL": "claude-tiny",
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": "claude-tiny-small", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    return ["claude", "-p", PROMPT, "--allowedTools", "Bash"], environment


def codex(url, home, work):
    (home / "config.toml").write_text(
        'model = "gpt-tiny"\nmodel_provider = "moellon"\n[model_providers.moellon]\nname = "moellon"\n'
        f'base_url = "{url}/v1"\nwire_api = "responses"\nenv_key = "MOELLON_KEY"\n'
    )
    words = ["codex", "exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", PROMPT]
    return words, {"CODEX_HOME": str(home), "MOELLON_KEY": KEY}


def opencode(url, home, work):
    provider = {
        "npm": "@ai-sdk/openai-compatible", "name": "moellon", "options": {"baseURL": f"{url}/v1", "apiKey": KEY},
        "models": {"tiny": {"name": "tiny", "tool_call": True, "limit": {"context": 131072, "output": 8192}}},
    }
    config = {"provider": {"moellon": provider}, "permission": {"bash": "allow"}, "autoupdate": False, "share": "disabled"}
    (work / "opencode.json").write_text(json.dumps(config))
    return ["opencode", "run", "--model", "moellon/tiny", PROMPT], {}


def qwen(url, home, work):
    environment = {"OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": KEY, "OPENAI_MODEL": "tiny"}
    return ["qwen", "--auth-type", "openai", "--yolo", "-p", PROMPT], environment


AGENTS = {
    "claude": ("Claude Code", "@anthropic-ai/claude-code", "2.1.329", "/v1/messages", claude),
    "codex": ("Codex", "@openai/codex", "0.169.0", "/v1/responses", codex),
    "opencode": ("OpenCode", "opencode-ai", "1.18.33", "/v1/chat/completions", opencode),
    "qwen": ("Qwen Code", "@qwen-code/qwen-code", "0.24.4", "/v1/chat/completions", qwen),
}


def install(package, version):
    """The folder of its programs. Install scripts run: some agents fetch their native part with one."""
    folder = TARGET / "agents" / package.replace("/", "+")
    if not (folder / "done" / version).exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        command = ["npm", "install", "--prefix", folder, "--no-fund", "--no-audit", "--loglevel=error", f"{package}@{version}"]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        (folder / "done").mkdir()
        (folder / "done" / version).touch()
    return folder / "node_modules" / ".bin"


@contextlib.contextmanager
def server():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    binary = TARGET / "debug" / "examples" / "scripted_server"
    environment = {**os.environ, "MOELLON_SCRIPT": COMMAND}
    process = subprocess.Popen([binary, f"127.0.0.1:{port}", ROOT / "models" / "moellon-tiny"], env=environment)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=40)


def counts(url):
    request = urllib.request.Request(f"{url}/metrics", headers={"authorization": f"Bearer {KEY}"})
    text = urllib.request.urlopen(request, timeout=5).read().decode()
    number = lambda pattern: sum(float(value) for value in re.findall(pattern + r"[^\n]* ([0-9.e+]+)", text))
    return {
        "answered": int(number(r"vllm:request_success_total\{")),
        "refused": int(number(r"moellon:requests_refused_total\{")),
        "prompt_tokens": int(number(r"vllm:prompt_tokens_total\{")),
    }


def run(key):
    name, package, version, path, prepare = AGENTS[key]
    programs = install(package, version)
    with server() as url, tempfile.TemporaryDirectory() as folder:
        home, work = Path(folder) / "home", Path(folder) / "work"
        home.mkdir()
        work.mkdir()
        subprocess.run(["git", "init", "-q", work], check=True)
        command, more = prepare(url, home, work)
        # A home of its own, and nothing of the person who runs this.
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
        environment = {**kept, "HOME": str(home), "XDG_CONFIG_HOME": str(home / "config"), "CI": "1", "NO_COLOR": "1", **more}
        environment["PATH"] = f"{programs}:{environment['PATH']}"
        start = time.monotonic()
        try:
            process = subprocess.run(
                command, cwd=work, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
            )
            status, output = process.returncode, process.stdout + process.stderr
        except subprocess.TimeoutExpired as late:
            status, output = "timeout", str(late.stdout) + str(late.stderr)
        seconds = time.monotonic() - start
        proof = work / "proof.txt"
        ran = proof.exists() and proof.read_text().strip() == "it-ran"
        sample = {
            "agent": name, "package": package, "version": version, "endpoint": path, "status": status, "tool_ran": ran,
            "answer_shown": LAST_WORDS in output, "seconds": round(seconds, 1), **counts(url),
        }
    print(json.dumps(sample))
    if not (ran and sample["answer_shown"]):
        print(output[-4000:], file=sys.stderr)
    return sample


def build():
    """The commit of the server, with `-dirty` behind it where its sources differ from that."""
    subprocess.run(["cargo", "build", "-q", "-p", "moellon-serve", "--example", "scripted_server"], cwd=ROOT, check=True)
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", "crates", "Cargo.toml", "Cargo.lock") else "")


def main():
    wanted = sys.argv[1:] or list(AGENTS)
    if shutil.which("npm") is None:
        raise SystemExit("there is no npm")
    commit = build()
    samples = [run(key) for key in wanted]
    done = [sample["tool_ran"] and sample["answer_shown"] for sample in samples]
    if not sys.argv[1:]:
        date = datetime.date.today().isoformat()
        rows = [
            {
                "agent": s["agent"], "version": s["version"], "endpoint": s["endpoint"], "answers": s["answered"],
                "prompt tokens": s["prompt_tokens"], "tool loop": "complete" if ok else "incomplete",
            }
            for s, ok in zip(samples, done)
        ]
        node = subprocess.run(["node", "--version"], capture_output=True, text=True).stdout.strip()
        receipt = {
            "schema": 1, "name": "agents", "date": date, "commit": commit, "node": node,
            "commands": ["cargo xtask agents"], "samples": samples, "tables": {"agents": rows},
        }
        path = ROOT / "receipts" / f"{date}-agents.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(receipt, indent=1) + "\n")
        temporary.rename(path)
    return 0 if all(done) else 1


if __name__ == "__main__":
    raise SystemExit(main())
