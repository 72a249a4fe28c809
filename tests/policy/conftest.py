from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.databases import database, mariadb, postgresql
from tests.policy.server import POLICIES, PolicyServer
from tests.policy.stubs import CloudControllerStub, Uaa

__all__ = ["database", "mariadb", "postgresql"]


@pytest.fixture(scope="module")
def standing_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PolicyServer]:
    """One server for a module; the bus is away."""
    server = PolicyServer(tmp_path_factory.mktemp("policy"))
    server.start()
    yield server
    server.close()


@pytest.fixture
def api(standing_server: PolicyServer) -> Iterator[httpx.Client]:
    """An admin's client of a server that has no policies."""
    with standing_server.client() as client:
        if policies := client.get(POLICIES).json()["policies"]:
            client.post(f"{POLICIES}/delete", json={"policies": policies}).raise_for_status()
        yield client


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PolicyServer]:
    """A server of the test's own, not started."""
    server = PolicyServer(tmp_path)
    yield server
    server.close()


@pytest.fixture
def stub() -> Iterator[CloudControllerStub]:
    """A Cloud Controller with a UAA beside it, for tests that make it err."""
    uaa = Uaa()
    uaa.start()
    stub = CloudControllerStub(uaa)
    stub.start()
    yield stub
    stub.fault = None
    stub.stop()
    uaa.stop()
