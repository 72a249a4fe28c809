"""Cells as network namespaces, joined by an underlay bridge in one of its own. Nothing is done in the host's."""

import itertools
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any, TypeVar

import pytest

from bus.messages import CellName, Handle, Lease
from services.silk.attachments import Attachment, Wanted
from services.silk.namespace import opened
from services.silk.network import CellNetwork
from services.silk.peers import desired
from services.silk.settings import OVERLAY, WorkerSettings
from services.silk.subnets import vtep_mac

R = TypeVar("R")


def sh(*command: str, timeout: float = 60) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr or done.stdout}"
    return done.stdout


def reaches(namespace: str, address: str, timeout: float = 2) -> bool:
    """Whether packets go from the namespace to `address` and back: a closed TCP port answers, too."""

    def knock() -> bool:
        try:
            with socket.create_connection((address, 9), timeout):
                return True
        except ConnectionRefusedError:
            return True
        except OSError:
            return False

    with opened(f"/run/netns/{namespace}") as opened_namespace:
        return opened_namespace.run(knock)


def eventually(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not become true in time"
        time.sleep(0.05)


def lease_of(number: int, underlay: str | None = None) -> Lease:
    """The lease of cell `number`, 1 to 65535: subnets beyond the overlay's 255 lie in 10.255.0.0/8's next /16s."""
    subnet = IPv4Network(f"10.255.{number}.0/24")
    address = IPv4Address(underlay) if underlay else IPv4Address("10.77.0.0") + number
    return Lease(subnet, CellName(f"cell-{number}"), address, vtep_mac(subnet))


@dataclass
class Namespaces:
    """Makes namespaces whose names nobody else has, and deletes them all."""

    prefix: str = f"sbs-{os.getpid()}"
    names: list[str] = field(default_factory=list)
    counter: Iterator[int] = field(default_factory=itertools.count)

    def make(self, what: str) -> str:
        name = f"{self.prefix}-{what}{next(self.counter)}"
        sh("ip", "netns", "add", name)
        self.names.append(name)
        return name

    def delete(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@dataclass
class TestCell:
    """One cell's namespace, and Silk's network in it."""

    __test__ = False
    name: str
    namespaces: Namespaces
    settings: WorkerSettings
    lease: Lease
    network: CellNetwork

    def run(self, work: Callable[[], R]) -> R:
        with opened(f"/run/netns/{self.name}") as namespace:
            return namespace.run(work)

    def sh(self, *command: str) -> str:
        return sh("ip", "netns", "exec", self.name, *command)

    def take_up(self) -> None:
        self.run(lambda: self.network.take_up(self.lease))

    def restart(self) -> None:
        """What a new worker process does."""
        self.network = self.run(lambda: CellNetwork(self.settings))
        self.take_up()

    def converge(self, leases: list[Lease], *, delete: bool = True, sweep: bool = False) -> tuple[int, int]:
        wanted = desired(self.lease, (OVERLAY,), leases)
        result = self.run(lambda: self.network.converge(wanted, delete=delete, sweep=sweep))
        return result.changed, result.failed

    def container(self) -> str:
        """A new container's network namespace, by path."""
        name = self.namespaces.make("c")
        sh("ip", "-n", name, "link", "set", "lo", "up")
        return f"/run/netns/{name}"

    def attach(self, handle: str, netns: str, interface: str = "eth0", **more: Any) -> Attachment:
        return self.run(lambda: self.network.attach(Wanted(Handle(handle), netns, interface, **more)))

    def detach(self, handle: str, address: IPv4Address | None = None) -> None:
        self.run(lambda: self.network.detach(Handle(handle), address))


@pytest.fixture
def namespaces() -> Iterator[Namespaces]:
    made = Namespaces()
    yield made
    made.delete()


@pytest.fixture
def make_cell(namespaces: Namespaces, tmp_path: Path) -> Callable[[int], TestCell]:
    """Makes cell NUMBER, at underlay address 10.77.0.NUMBER, with subnet 10.255.NUMBER.0/24."""
    hub = namespaces.make("hub")
    sh("ip", "-n", hub, "link", "set", "lo", "up")
    sh("ip", "-n", hub, "link", "add", "underlay", "type", "bridge")
    sh("ip", "-n", hub, "link", "set", "underlay", "up")

    def make(number: int) -> TestCell:
        name = namespaces.make("cell")
        sh("ip", "-n", name, "link", "set", "lo", "up")
        link = ("link", "add", "eth0", "type", "veth", "peer", "name", f"port{number}", "netns", hub)
        sh("ip", "-n", name, *link)
        sh("ip", "-n", hub, "link", "set", f"port{number}", "master", "underlay", "up")
        sh("ip", "-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
        sh("ip", "-n", name, "link", "set", "eth0", "up")
        settings = WorkerSettings(
            cell=f"cell-{number}",
            underlay=IPv4Address(f"10.77.0.{number}"),
            state_dir=tmp_path / name / "state",
            run_dir=tmp_path / name / "run",
        )
        with opened(f"/run/netns/{name}") as namespace:
            network = namespace.run(lambda: CellNetwork(settings))
        return TestCell(name, namespaces, settings, lease_of(number), network)

    return make


@pytest.fixture
def cell(make_cell: Callable[[int], TestCell]) -> TestCell:
    """One cell with its overlay up."""
    made = make_cell(1)
    made.take_up()
    return made


@pytest.fixture
def start(make_cell: Callable[[int], TestCell], namespaces: Namespaces, tmp_path: Path) -> Iterator[Any]:
    """Starts a centre with these settings, and COUNT cells' workers with `worker`'s."""
    from tests.silk.processes import Centre, Worker

    made: list[Any] = []

    def begin(
        count: int = 1,
        *,
        centre_up: bool = True,
        workers_up: bool = True,
        worker: dict[str, str] | None = None,
        **settings: str,
    ) -> tuple[Centre, list[Worker]]:
        centre = Centre(namespaces.names[0], tmp_path, **settings)
        made.append(centre)
        if centre_up:
            centre.start()
        workers = [Worker(make_cell(number), tmp_path, **(worker or {})) for number in range(1, count + 1)]
        for each in workers:
            made.append(each.process)
            if workers_up:
                each.process.start()
        return centre, workers

    yield begin
    for each in made:
        each.stop()
