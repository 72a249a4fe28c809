"""What tests of several parts share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nats_server import NatsServer


@pytest.fixture
def nats_server(tmp_path: Path) -> Iterator[NatsServer]:
    server = NatsServer(tmp_path)
    server.start()
    yield server
    server.stop()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a database server is marked, so that `make unit` can do without one."""
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        kind = item.callspec.params.get("database") if hasattr(item, "callspec") else None
        if kind in ("postgresql", "mysql") or {"postgresql", "mariadb"} & set(item.fixturenames):
            item.add_marker("databases")
