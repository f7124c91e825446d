"""Makes a receipt of what bench/line_sizes.cu printed.

usage: line_sizes.py OUT.json COMMIT MACHINE.json BINARY.. -- CALL:LOG..

MACHINE.json is a receipt of the same machine, whose `machine` is taken over; BINARY the program (for its hash); a LOG what the program appended to its second
argument, and CALL the number of the run on the device. Seal the result with `moellon receipt seal`.
"""

import collections
import hashlib
import json
import re
import sys

LINE = re.compile(r"(\d+) rows (.+): cluster (\d)(g?) warps (\d+) kernel (w?)(\d)_(\d)_(\d+) depth (\d+) shared (\d+) blocks (\d+): ([\d.]+) us, (\d+) differ")
BASE = re.compile(r"(\d+) rows (.+): few_line ([\d.]+) us, ([\d.]+) MB")
CHAIN = re.compile(r"six products(, overlap)?, (few_line|lines): ([\d.]+) us")
HEAD = re.compile(r"== \S+, (\d+) rows")


def kind(size):
    """What a size is, in words."""
    product = "wgmma" if size["wide"] else "mma.sync"
    blocks = size["blocks of a unit"]
    join = "one block" if blocks == 1 else f"{blocks} blocks, " + ("second-level cache" if size["through the cache"] else "cluster")
    return f"{product}, {join}"


def parse(call, path):
    """The sizes, the kernels before, the six products behind each other, and sizes with nothing multiplied, of one log."""
    sizes, before, chains, rows, bare = [], [], {}, 0, []
    with open(path) as lines:
        for line in lines:
            if line.startswith("-- nothing multiplied"):  # results are wrong, times are what the rest takes
                sizes, bare = bare, sizes
            if m := HEAD.match(line):
                rows = int(m[1])
            elif m := CHAIN.match(line):
                chains.setdefault(rows, {})[m[2] + (m[1] or "")] = m[3]
            elif m := LINE.match(line):
                of, product, blocks, cache, warps, wide, row_tiles, tiles, most, depth, shared, grid, us, wrong = m.groups()
                sizes.append({
                    "call": call, "rows": int(of), "product": product, "blocks of a unit": int(blocks), "through the cache": bool(cache),
                    "warps": int(warps), "wide": bool(wide), "row tiles of a warp": int(row_tiles), "tiles of a slot": int(tiles), "most warps": int(most),
                    "slots": int(depth), "shared bytes": int(shared), "blocks": int(grid), "us": float(us), "differences": int(wrong),
                })
            elif (m := BASE.match(line)) and not bare:
                before.append({"call": call, "rows": int(m[1]), "product": m[2], "us": float(m[3]), "MB": float(m[4])})
    if bare:
        sizes, bare = bare, sizes
    table = [{"rows": rows, "us, few_line": us["few_line"], "us, the fastest sizes": us["lines"], "few_line, kernels overlap": us["few_line, overlap"],
              "the fastest sizes, kernels overlap": us["lines, overlap"], "call": call} for rows, us in chains.items() if len(us) == 4]
    return sizes, before, table, bare


def short(size):
    """A size and its time in a line."""
    cache, wide = "g" if size["through the cache"] else "", "w" if size["wide"] else ""
    kernel = f"{wide}{size['row tiles of a warp']}_{size['tiles of a slot']}_{size['most warps']}"
    blocks = f"{size['blocks of a unit']}{cache} {size['blocks']}"
    return f"{size['call']} {size['rows']} {size['product']}: {blocks} {size['warps']} {kernel} {size['slots']} {size['us']}"


def main(arguments):
    out, commit, machine, *rest = arguments
    cut = rest.index("--")
    digest = hashlib.sha256(b"".join(open(path, "rb").read() for path in rest[:cut])).hexdigest()
    sizes, before, chains, bare = [], [], [], []
    for entry in rest[cut + 1:]:
        call, path = entry.split(":", 1)
        found = parse(int(call), path)
        sizes += found[0]
        before += found[1]
        chains += found[2]
        bare += found[3]
    table = []
    for base in before:
        table.append({"rows": base["rows"], "product": base["product"], "kernel": "few_line, before", "size": "-", "us": f"{base['us']:.1f}", "MB": f"{base['MB']:.1f}",
                      "TB/s": f"{base['MB'] / base['us']:.2f}", "bits": "-", "call": base["call"]})
        kinds = collections.defaultdict(list)
        for size in sizes:
            if all(size[key] == base[key] for key in ("call", "rows", "product")):
                kinds[kind(size)].append(size)
        for name, found in sorted(kinds.items()):
            size = min(found, key=lambda size: size["us"])
            text = f"{size['blocks']} blocks of {size['warps']} warps, {size['row tiles of a warp']} row tiles a warp, {size['slots']} slots of {size['tiles of a slot']}"
            table.append({"rows": base["rows"], "product": base["product"], "kernel": name, "size": text, "us": f"{size['us']:.1f}", "MB": f"{base['MB']:.1f}",
                          "TB/s": f"{base['MB'] / size['us']:.2f}", "bits": "DIFFER" if any(size["differences"] for size in found) else "the same", "call": base["call"]})
    with open(machine) as text:
        about = json.load(text)["machine"]
    receipt = {
        "schema": 1, "name": "cuda-line-sizes", "date": "2026-12-01", "commit": commit, "binary_sha256": digest, "machine": about, "steal_pct": None,
        "commands": ["nvcc -std=c++20 -O2 -gencode=arch=compute_90a,code=sm_90a -Icrates/backend-cuda/kernels -DNO_KERNELS -DNUM_ROWS=8|16|32 bench/line_sizes.cu -lcuda; ./a.out "
                     "FOLDER LOG (medians of graphs of five layers; lines.cu compiled with -DVARIANTS); binary_sha256 is that of the three programs, one after another"],
        "samples": {"call rows product: blocks of a unit (g: no cluster), of the grid, warps, kernel, slots, us": [short(size) for size in sizes],
                    "the same with nothing multiplied": [short(size) for size in bare]},
        "tables": {"cuda-line-sizes": table, "cuda-line-chain": chains},
    }
    with open(out, "w") as text:
        json.dump(receipt, text, indent=1)


main(sys.argv[1:])
