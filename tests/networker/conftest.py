"""Namespaces and cells for the networker's tests."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.networker.cell import Cell, eventually


@contextmanager
def namespace() -> Iterator[str]:
    """A network namespace of its own, held by a sleeping process; gone when left."""
    own = Path("/proc/self/ns/net").stat().st_ino
    with subprocess.Popen(["unshare", "--net", "sleep", "infinity"]) as process:
        path = Path(f"/proc/{process.pid}/ns/net")
        try:
            eventually("the namespace exists", lambda: process.poll() is not None or path.stat().st_ino != own)
            assert process.poll() is None, "unshare --net failed: these tests need root"
            yield str(path)
        finally:
            process.kill()


@pytest.fixture(scope="session")
def netns() -> Iterator[str]:
    with namespace() as path:
        yield path


@pytest.fixture
def cell(netns: str) -> Iterator[Cell]:
    with Cell(netns) as cell:
        yield cell
