"""Stops the server that test_clients.py started."""

import sys


def pytest_sessionfinish():
    module = sys.modules.get("test_clients")
    if module is not None and module.SERVER is not None:
        module.SERVER.terminate()
        module.SERVER.wait(timeout=40)
