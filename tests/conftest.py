"""What tests of several parts share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import leftovers
from tests.nats_server import NatsServer


@pytest.fixture
def nats_server(tmp_path: Path) -> Iterator[NatsServer]:
    server = NatsServer(tmp_path)
    server.start()
    yield server
    server.stop()


def pytest_sessionstart(session: pytest.Session) -> None:
    """Once for a run, not in each of its processes."""
    if os.geteuid() == 0 and not hasattr(session.config, "workerinput"):
        leftovers.remove()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a database server is marked, so that `make unit` can do without one."""
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        kind = item.callspec.params.get("database") if hasattr(item, "callspec") else None
        if kind in ("postgresql", "mysql") or {"postgresql", "mariadb"} & set(item.fixturenames):
            item.add_marker("databases")
