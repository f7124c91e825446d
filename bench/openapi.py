"""What `/openapi.json` says is taken at its word for longer than in CI: schemathesis makes legal and illegal requests of every
operation against the bundled model, and none may be answered with a 5xx or not at all. Writes a receipt.

    cargo build --release -p moellon
    target/clients/venv/bin/python bench/openapi.py [EXAMPLES]     # of each operation and kind, 1000

Needs schemathesis: `cargo xtask check` makes that environment from clients/requirements.txt. The same seed makes the same
requests. A few of them run in CI: clients/test_openapi.py.
"""

import json
import sys

import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from receipts import steal_ticks, write
from serving import Server


def exercise(server, operation, mode, examples):
    """Counts of statuses, and what failed."""
    statuses, failures = {}, []

    def check(case):
        # 503 says when to come back where somebody is busy; nobody else is there.
        response = case.call(timeout=60)
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        case.validate_response(response, checks=[not_a_server_error])

    strategy = operation.as_strategy(generation_mode=mode)
    run = settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    try:
        run(given(case=strategy)(check))()
    except Exception as error:
        # A GET without parameters has no illegal form.
        if "unsatisfiable" not in (type(error).__name__ + str(error)).lower():
            failures.append(str(error)[:2000])
    return statuses, failures


def main():
    examples = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    stolen, samples = steal_ticks(), []
    # Short answers: how long they are does not matter to what may be asked, and a legal request may ask for any length.
    with Server("--max-tokens", 4, "--context", 512) as server:
        document = schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")
        for found in document.get_all_operations():
            operation = found.ok()
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                statuses, failures = exercise(server, operation, mode, examples)
                name = f"{operation.method.upper()} {operation.path}"
                samples.append({"operation": name, "kind": mode.value, "statuses": statuses, "failures": failures})
                print(json.dumps(samples[-1]), file=sys.stderr)
        alive = json.loads(server.get("/health"))
        command = server.shown
    rows = []
    for name in dict.fromkeys(sample["operation"] for sample in samples):
        of = [sample for sample in samples if sample["operation"] == name]
        total = {}
        for sample in of:
            for status, count in sample["statuses"].items():
                total[status] = total.get(status, 0) + count
        rows.append({
            "operation": name, "requests": sum(total.values()),
            "statuses": ", ".join(f"{status}: {count}" for status, count in sorted(total.items())),
            "5xx": sum(count for status, count in total.items() if status >= 500), "failures": sum(len(sample["failures"]) for sample in of),
        })
    write("serving-openapi", [f"python bench/openapi.py {examples}", command], {"health_after": alive, "operations": samples}, {"serving-openapi": rows}, stolen)
    return 1 if any(sample["failures"] for sample in samples) else 0


if __name__ == "__main__":
    raise SystemExit(main())
