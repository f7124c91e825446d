"""Fetch the corpus crates, keep permissively licensed text, and write corpus.jsonl and MANIFEST.json.

The crates are exactly those of crates.lock, fetched by cargo, whose lock file holds the sha256 of every
.crate file. Each kept file becomes one line of build/corpus.jsonl:
{"crate": name, "path": path inside the crate, "split": "train" | "heldout", "text": file contents}.
"""

import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import tomllib
import zlib

HERE = pathlib.Path(__file__).resolve().parent
BUILD = HERE / "build"

PERMISSIVE = {
    "MIT", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause",
    "ISC", "Zlib", "Unlicense", "0BSD", "CC0-1.0", "BSL-1.0",
}
# Tables and bindings: large, machine-made and of no use as examples of Rust.
SKIPPED_CRATES = re.compile(r"^(windows|winapi|libc$|linux-raw-sys|web-sys|js-sys|icu_|fearless_simd|objc2|wasi|errno|encoding_rs$|unicode-)")
SKIPPED_PATHS = re.compile(r"(^|/)(bindings?|generated|tables?|unicode_tables|unicode_data|fixtures|corpus|vendor|target|third[_-]party)(/|\.|_)|CHANGELOG|CHANGES|RELEASES|HISTORY|LICENSE|COPYING", re.I)
GENERATED = re.compile(r"@generated|automatically generated|auto-generated|do not edit|do not modify", re.I)
LICENCE_HEADER = re.compile(r"\A(?:\s*(?://[^\n]*\n|/\*.*?\*/\s*\n))+", re.S)
MAX_FILE_BYTES = 96 * 1024
MIN_FILE_BYTES = 200
MAX_CRATE_BYTES = 3_000_000
MIN_COMPRESSED_SHARE = 0.16  # zlib makes less of a file only if it repeats itself
HELDOUT_PER_MILLE = 10


def permissive_choice(expression):
    """The permissive licence an SPDX expression allows us to choose, or None."""
    expression = expression.strip().replace("/", " OR ")
    while expression.startswith("(") and expression.endswith(")") and "(" not in expression[1:]:
        expression = expression[1:-1]
    for operator, need_all in ((" OR ", False), (" AND ", True)):
        parts = split_top_level(expression, operator)
        if len(parts) > 1:
            choices = [permissive_choice(part) for part in parts]
            if need_all:
                return " AND ".join(choices) if all(choices) else None
            return next((choice for choice in choices if choice), None)
    expression = " ".join(expression.split())
    return expression if expression in PERMISSIVE else None


def split_top_level(expression, operator):
    """Split at `operator` where no parenthesis is open."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(expression):
        depth += (char == "(") - (char == ")")
        if depth == 0 and expression.startswith(operator, i):
            parts.append(expression[start:i])
            start = i + len(operator)
    parts.append(expression[start:])
    return parts


def fetch_crates():
    """Run `cargo fetch --locked` on the pinned list; return the lock file's registry packages."""
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        shutil.copy(HERE / "crates.toml", scratch / "Cargo.toml")
        shutil.copy(HERE / "crates.lock", scratch / "Cargo.lock")
        (scratch / "lib.rs").touch()
        subprocess.run(
            ["cargo", "fetch", "--locked", "--target", "x86_64-unknown-linux-gnu"], cwd=scratch, check=True
        )
    packages = tomllib.loads((HERE / "crates.lock").read_text())["package"]
    return sorted((p for p in packages if "checksum" in p), key=lambda p: (p["name"], p["version"]))


def crate_directory(name, version):
    """Where cargo unpacked a crate, or None if this target does not need it."""
    home = pathlib.Path(os.environ.get("CARGO_HOME", pathlib.Path.home() / ".cargo"))
    found = sorted((home / "registry" / "src").glob(f"*/{name}-{version}"))
    return found[0] if found else None


def clean_text(path):
    """The text of a file worth training on, or None."""
    raw = path.read_bytes()
    if not MIN_FILE_BYTES <= len(raw) <= MAX_FILE_BYTES:
        return None
    try:
        text = raw.decode("utf-8").replace("\r\n", "\n").lstrip("\ufeff")
    except UnicodeDecodeError:
        return None
    if GENERATED.search(text[:2000]) or "\0" in text:
        return None
    header = LICENCE_HEADER.match(text)
    if header and re.search(r"copyright|licensed under|spdx", header.group(), re.I):
        text = text[header.end():]
    lines = text.split("\n")
    digits = sum(char.isdigit() for char in text)
    non_ascii = sum(ord(char) > 127 for char in text)
    if max(map(len, lines)) > 1000 or digits > 0.15 * len(text) or non_ascii > 0.05 * len(text) or len(text) < MIN_FILE_BYTES:
        return None
    if len(zlib.compress(text.encode())) < MIN_COMPRESSED_SHARE * len(text):
        return None
    return text.strip() + "\n"


def candidate_files(directory):
    """Rust sources, README and docs of a crate, in a stable order."""
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory).as_posix()
        if not path.is_file() or SKIPPED_PATHS.search(relative):
            continue
        if path.suffix in (".rs", ".md") or relative == "Cargo.toml.orig":
            yield path, relative


def main():
    BUILD.mkdir(exist_ok=True)
    seen_lines = set()
    manifest, refused = [], []
    with open(BUILD / "corpus.jsonl", "w") as out:
        for package in fetch_crates():
            directory = crate_directory(package["name"], package["version"])
            if directory is None or SKIPPED_CRATES.search(package["name"]):
                continue
            licence = tomllib.loads((directory / "Cargo.toml").read_text())["package"].get("license", "")
            if permissive_choice(licence) is None:
                refused.append(f"{package['name']} {package['version']}: {licence or 'no licence expression'}")
                continue
            used_bytes = num_files = 0
            for path, relative in candidate_files(directory):
                text = clean_text(path)
                if text is None or used_bytes > MAX_CRATE_BYTES:
                    continue
                # A file most of whose longer lines were already seen is a copy (another version, a fork).
                lines = {hash_line(line) for line in text.split("\n") if len(line) > 24}
                if lines and len(lines & seen_lines) > 0.5 * len(lines):
                    continue
                seen_lines |= lines
                digest = hashlib.sha256(text.encode()).digest()
                split = "heldout" if int.from_bytes(digest[:4], "big") % 1000 < HELDOUT_PER_MILLE else "train"
                json.dump({"crate": package["name"], "path": relative, "split": split, "text": text}, out)
                out.write("\n")
                used_bytes += len(text.encode())
                num_files += 1
            if num_files:
                manifest.append({
                    "crate": package["name"], "version": package["version"], "license": licence,
                    "used_under": permissive_choice(licence), "crate_sha256": package["checksum"],
                    "num_files": num_files, "bytes_used": used_bytes,
                })
    total = {"num_crates": len(manifest), "num_files": sum(m["num_files"] for m in manifest),
             "bytes_used": sum(m["bytes_used"] for m in manifest)}
    text = json.dumps({"source": "https://crates.io", "total": total, "refused": refused, "crates": manifest}, indent=1)
    (HERE / "MANIFEST.json").write_text(text + "\n")
    print(total, "refused:", *refused, sep="\n")


def hash_line(line):
    """A stable 8-byte key of a line, indentation ignored."""
    return hashlib.blake2b(line.strip().encode(), digest_size=8).digest()


if __name__ == "__main__":
    main()
