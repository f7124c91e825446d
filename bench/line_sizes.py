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
FASTEST = 2  # sizes of a kind in the table; all are among the samples


def kind(size):
    """What a size is, in words."""
    product = "wgmma" if size["wide"] else "mma.sync"
    blocks = size["blocks of a unit"]
    join = "one block" if blocks == 1 else f"{blocks} blocks, " + ("second-level cache" if size["through the cache"] else "cluster")
    return f"{product}, {join}"


def parse(call, path):
    """The sizes and the kernels before of one log."""
    sizes, before = [], []
    with open(path) as lines:
        for line in lines:
            if line.startswith("-- nothing multiplied"):
                break
            if m := LINE.match(line):
                rows, product, blocks, cache, warps, wide, row_tiles, tiles, most, depth, shared, grid, us, wrong = m.groups()
                sizes.append({
                    "call": call, "rows": int(rows), "product": product, "blocks of a unit": int(blocks), "through the cache": bool(cache),
                    "warps": int(warps), "wide": bool(wide), "row tiles of a warp": int(row_tiles), "tiles of a slot": int(tiles), "most warps": int(most),
                    "slots": int(depth), "shared bytes": int(shared), "blocks": int(grid), "us": float(us), "differences": int(wrong),
                })
            elif m := BASE.match(line):
                before.append({"call": call, "rows": int(m[1]), "product": m[2], "us": float(m[3]), "MB": float(m[4])})
    return sizes, before


def main(arguments):
    out, commit, machine, *rest = arguments
    cut = rest.index("--")
    digest = hashlib.sha256(b"".join(open(path, "rb").read() for path in rest[:cut])).hexdigest()
    sizes, before = [], []
    for entry in rest[cut + 1:]:
        call, path = entry.split(":", 1)
        found = parse(int(call), path)
        sizes += found[0]
        before += found[1]
    table = []
    for base in before:
        table.append({"rows": base["rows"], "product": base["product"], "kernel": "few_line, before", "size": "-", "us": f"{base['us']:.1f}", "MB": f"{base['MB']:.1f}",
                      "TB/s": f"{base['MB'] / base['us']:.2f}", "bits": "-", "call": base["call"]})
        kinds = collections.defaultdict(list)
        for size in sizes:
            if all(size[key] == base[key] for key in ("call", "rows", "product")):
                kinds[kind(size)].append(size)
        for name, found in sorted(kinds.items()):
            for size in sorted(found, key=lambda size: size["us"])[:FASTEST]:
                text = f"{size['blocks']} blocks of {size['warps']} warps, {size['row tiles of a warp']} row tiles a warp, {size['slots']} slots of {size['tiles of a slot']}"
                table.append({"rows": base["rows"], "product": base["product"], "kernel": name, "size": text, "us": f"{size['us']:.1f}", "MB": f"{base['MB']:.1f}",
                              "TB/s": f"{base['MB'] / size['us']:.2f}", "bits": "the same" if size["differences"] == 0 else "DIFFER", "call": base["call"]})
    with open(machine) as text:
        about = json.load(text)["machine"]
    receipt = {
        "content_sha256": "", "schema": 1, "name": "cuda-line-sizes", "date": "2026-12-01", "commit": commit, "binary_sha256": digest, "machine": about, "steal_pct": None,
        "commands": ["nvcc -std=c++20 -O2 -gencode=arch=compute_90a,code=sm_90a -Icrates/backend-cuda/kernels -DNO_KERNELS -DNUM_ROWS=8|16|32 bench/line_sizes.cu -lcuda; ./a.out "
                     "FOLDER LOG (medians of graphs of five layers; lines.cu compiled with -DVARIANTS); binary_sha256 is that of the three programs, one after another"],
        "samples": {"sizes": sizes, "before": before},
        "tables": {"cuda-line-sizes": table},
    }
    with open(out, "w") as text:
        json.dump(receipt, text, indent=1)


main(sys.argv[1:])
