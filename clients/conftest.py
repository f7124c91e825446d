"""Fixtures: each client test runs against both servers, `server`; pages and tool loops against the scripted one."""

import pytest

from servers import running


@pytest.fixture(scope="session")
def scripted():
    with running("scripted") as server:
        yield server


@pytest.fixture(scope="session")
def bundled():
    with running("bundled") as server:
        yield server


@pytest.fixture(params=["scripted", "bundled"])
def server(request):
    return request.getfixturevalue(request.param)
