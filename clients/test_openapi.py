"""What /openapi.json says is taken at its word: schemathesis makes requests of it, legal ones and illegal ones, and none
may give a 5xx. MOELLON_EXAMPLES is how many of each operation and kind (a few in CI, thousands in a longer run)."""

import os

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from servers import KEY

NUM_EXAMPLES = int(os.environ.get("MOELLON_EXAMPLES", "8"))
HEADERS = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def document(scripted):
    return schemathesis.openapi.from_url(f"{scripted.url}/openapi.json", headers=HEADERS)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["legal", "illegal"])
def test_no_request_is_a_server_error(document, mode):
    statuses = {}
    for found in document.get_all_operations():
        operation = found.ok()

        def check(case):
            response = case.call(headers=HEADERS, timeout=30)
            counts = statuses.setdefault(f"{operation.method.upper()} {operation.path}", {})
            counts[response.status_code] = counts.get(response.status_code, 0) + 1
            case.validate_response(response, checks=[not_a_server_error])

        strategy = operation.as_strategy(generation_mode=mode)
        health = list(HealthCheck)
        run = settings(max_examples=NUM_EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=health)
        try:
            run(given(case=strategy)(check))()
        except Exception as error:
            # A GET without parameters has no illegal form.
            if "Unsatisfiable" not in type(error).__name__ and "unsatisfiable" not in str(error).lower():
                raise
    print(statuses)
    # Without a body there is only one request to make.
    bodies = {f"POST {path}" for path, item in document.raw_schema["paths"].items() if "requestBody" in item.get("post", {})}
    posts = {name: counts for name, counts in statuses.items() if name in bodies}
    assert len(posts) == 7 and all(sum(counts.values()) >= min(NUM_EXAMPLES, 3) for counts in posts.values()), statuses
    if mode == GenerationMode.POSITIVE:
        assert all(200 in counts or 400 in counts for counts in posts.values()), statuses


def test_every_route_is_in_the_document(document):
    paths = set(document.raw_schema["paths"])
    assert {"/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/completions", "/metrics", "/health"} <= paths
    for path, operations in document.raw_schema["paths"].items():
        for operation in operations.values():
            assert operation["summary"] and operation["responses"]["200"], path
