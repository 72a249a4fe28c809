"""Flows that rules log, as JSON lines and events: real packets on the real kernel, both kinds of tables."""

import asyncio
import json
import resource
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bus.messages import CellName, Container, Revision, SecurityGroup, Workload
from bus.security_groups import AddressRange, EgressProtocol, EgressRule, GroupId, SpaceId
from bus.tables import Update
from services.enforcer.denied import DeniedEvents
from services.enforcer.nflog import NflogSocket
from services.enforcer.traffic import Traffic
from tests.enforcer.conftest import Enforcer, enforcing, tags, tcp
from tests.enforcer.world import Box, Cell, Namespace, inside, until

pytestmark = pytest.mark.kernel


class Said:
    """Stands for the bus: what would be sent on it."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []

    async def publish(self, subject: str, message: dict[str, Any]) -> bool:
        assert subject == "silkbus.cell.cell-1.denied"
        self.messages.append(message)
        return True

    @property
    def flows(self) -> list[dict[str, Any]]:
        return [flow for message in self.messages for flow in message["flows"]]


class Logging:
    def __init__(self, enforcer: Enforcer, traffic: Traffic, file: Path, said: Said) -> None:
        self.enforcer, self.traffic, self.file, self.said = enforcer, traffic, file, said

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []

    async def line(self, message: str) -> dict[str, Any]:
        await until(lambda: any(line["message"].endswith(message) for line in self.lines))
        return next(line for line in self.lines if line["message"].endswith(message))


@asynccontextmanager
async def logging(
    cell: Cell, kind: str, tmp_path: Path, *, known: dict[tuple[str, ...], object], **settings: Any
) -> AsyncIterator[Logging]:
    file = tmp_path / "traffic.log"
    async with enforcing(cell, kind, known=known, **settings, traffic_log=file) as enforcer:
        said = Said()
        reconciler = enforcer.reconciler
        events = DeniedEvents(said, CellName("cell-1"), reconciler.settings.denied_events_per_sec)  # type: ignore[arg-type]
        traffic = Traffic(reconciler.settings, reconciler.model, enforcer.kernel, events)
        task = asyncio.create_task(traffic.run())
        await until(lambda: traffic.problem is None)
        try:
            yield Logging(enforcer, traffic, file, said)
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


def named(box: Box) -> Container:
    """A container that its runtime has said all of."""
    metadata = {"app_id": box.container.app, "space_id": "the-space", "org_id": "the-org"}
    return replace(box.container, space=SpaceId("the-space"), metadata=metadata)


async def in_thread(work: Any, *args: Any) -> Any:
    return await asyncio.to_thread(work, *args)


async def test_a_refused_flow_is_a_line_and_an_event_and_an_accepted_one_on_demand(
    cell: Cell, kind: str, tmp_path: Path
) -> None:
    web, db = cell.box("web"), cell.box("db")
    for box in (web, db):
        box.container = named(box)
    db.serve(8080)
    known = {**tags(web=5, db=6), ("policy", "db", "web"): (tcp(8080),)}
    async with logging(cell, kind, tmp_path, known=known, log_denied=True) as made:
        assert not await in_thread(web.reaches, db, 9)
        line = await made.line("ingress-denied")
        assert line["source"] == "cfnetworking.iptables"
        assert line["data"]["reason"] == "nothing"
        ends = {
            "space_guid": "the-space",
            "organization_guid": "the-org",
            "host_ip": str(cell.underlay),
            "host_guid": "cell-1",
        }
        assert line["data"]["destination"] == {"container_id": db.name, "app_guid": "db", **ends}
        assert line["data"]["source"] == {"container_id": web.name, "app_guid": "web", **ends}
        packet = line["data"]["packet"]
        assert packet.pop("src_port") > 0
        assert packet == {
            "direction": "ingress",
            "allowed": False,
            "src_ip": str(web.address),
            "dst_ip": str(db.address),
            "dst_port": 9,
            "protocol": "TCP",
            "mark": "0x5",
            "icmp_type": 0,
            "icmp_code": 0,
        }
        await until(lambda: bool(made.said.flows))
        assert made.said.flows[0] == {
            "source": {"address": str(web.address), "app": "web"},
            "destination": {"address": str(db.address), "app": "db"},
            "protocol": "tcp",
            "port": 9,
            "why": "nothing",
            "count": made.said.flows[0]["count"],
        }
        assert await in_thread(web.reaches, db, 8080)
        await made.enforcer.reconciler.log_accepted(True)
        assert await in_thread(web.reaches, db, 8080)
        line = await made.line("ingress-allowed")
        assert line["data"]["reason"] == "policy"
        assert line["data"]["packet"]["dst_port"] == 8080
        await asyncio.sleep(0.5)
        assert len([line for line in made.lines if line["message"].endswith("ingress-allowed")]) == 1
        await made.enforcer.reconciler.log_accepted(False)
        assert "NFLOG --nflog-prefix sb:allowed" not in cell.saved(kind)


async def test_a_flow_off_the_overlay_is_about_its_source(cell: Cell, kind: str, tmp_path: Path) -> None:
    web = cell.box("web")
    web.container = named(web)
    async with logging(cell, kind, tmp_path, known=tags(web=5), log_denied=True) as made:
        with suppress(OSError):
            await in_thread(send, web, str(cell.underlay), 53)
        line = await made.line("egress-denied")
        assert line["data"]["source"]["container_id"] == web.name
        assert "destination" not in line["data"]
        assert (line["data"]["packet"]["protocol"], line["data"]["packet"]["dst_port"]) == ("UDP", 53)


async def test_a_source_on_another_cell_is_named_by_its_tag(two_cells: list[Cell], kind: str, tmp_path: Path) -> None:
    here, there = two_cells
    db, web = here.box("db"), there.box("web")
    known = {**tags(web=5, db=6)}
    async with enforcing(there, kind, known=known), logging(here, kind, tmp_path, known=known, log_denied=True) as made:
        with suppress(OSError):
            await in_thread(send, web, str(db.address), 7)
        line = await made.line("ingress-denied")
        assert line["data"]["source"] == {"app_guid": "web"}
        assert made.lines[0]["data"]["destination"]["container_id"] == db.name


def send(box: Namespace, address: str, port: int, times: int = 1, ports: int = 1) -> None:
    def make() -> socket.socket:
        return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    with inside(box.name, make) as made:
        for number in range(times):
            with suppress(OSError):
                made.sendto(b"x", (address, port + number % ports))


async def test_what_is_not_wanted_is_not_written_but_said(cell: Cell, kind: str, tmp_path: Path) -> None:
    web, db = cell.box("web"), cell.box("db")
    async with logging(cell, kind, tmp_path, known=tags(web=5, db=6)) as made:
        await in_thread(send, web, str(db.address), 7)
        await until(lambda: bool(made.said.flows))
        assert made.lines == []


async def test_each_container_has_its_own_rate(cell: Cell, kind: str, tmp_path: Path) -> None:
    """A flood at one does not keep what another is refused out of the log."""
    web, db, other = cell.box("web"), cell.box("db"), cell.box("other")
    known = tags(web=5, db=6, other=7)
    async with logging(cell, kind, tmp_path, known=known, log_denied=True, denied_logs_per_sec=2) as made:
        began = time.monotonic()
        await in_thread(send, web, str(db.address), 7, 3000)
        await in_thread(send, web, str(other.address), 7)

        def lines(box: Box) -> list[Any]:
            return [line for line in made.lines if line["data"]["packet"]["dst_ip"] == str(box.address)]

        await until(lambda: bool(lines(other)))
        passed = time.monotonic() - began
        assert 1 <= len(lines(db)) <= 2 + 2 * passed + 1


async def test_a_burst_neither_blocks_nor_grows(cell: Cell, kind: str, tmp_path: Path) -> None:
    """20 000 refused packets that are all handed over, to 4 000 ports."""
    web, db = cell.box("web"), cell.box("db")
    known = tags(web=5, db=6)
    settings = {"log_denied": True, "denied_logs_per_sec": 10_000, "denied_events_per_sec": 10}
    async with logging(cell, kind, tmp_path, known=known, **settings) as made:
        await in_thread(send, web, str(db.address), 1, 100, 100)
        await until(lambda: len(made.lines) > 0)
        longest, stop = 0.0, False
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        async def watch() -> None:
            nonlocal longest
            while not stop:
                at = time.monotonic()
                await asyncio.sleep(0.001)
                longest = max(longest, time.monotonic() - at)

        watching = asyncio.create_task(watch())
        sending = asyncio.create_subprocess_exec(
            "ip", "netns", "exec", web.name, "python3", "-c", BURST, str(db.address)
        )
        assert await (await sending).wait() == 0
        await asyncio.sleep(2.5)
        stop = True
        await watching
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert len(made.lines) > 1000
        assert grown < 40_000, f"{grown} KiB more"
        assert longest < 1.0, f"{longest} s"
        assert all(len(message["flows"]) <= 10 for message in made.said.messages)
        assert any(message["dropped"] for message in made.said.messages)


BURST = """
import socket, sys
made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for number in range(20000):
    try:
        made.sendto(b"x", (sys.argv[1], 1000 + number % 4000))
    except OSError:
        pass
"""


async def test_the_file_may_be_rotated_and_removed(cell: Cell, tmp_path: Path) -> None:
    web, db = cell.box("web"), cell.box("db")
    async with logging(
        cell, "nft", tmp_path, known=tags(web=5, db=6), log_denied=True, denied_logs_per_sec=100
    ) as made:
        await in_thread(send, web, str(db.address), 7)
        await until(lambda: len(made.lines) == 1)
        made.file.rename(tmp_path / "old")
        await in_thread(send, web, str(db.address), 8)
        await until(lambda: len(made.lines) == 1)
        made.file.unlink()
        await in_thread(send, web, str(db.address), 9)
        await until(lambda: [line["data"]["packet"]["dst_port"] for line in made.lines] == [9])
        assert len((tmp_path / "old").read_text().splitlines()) == 1


async def test_a_group_that_another_reads_is_named_and_taken_when_free(cell: Cell) -> None:
    async with enforcing(cell, "nft", known={}) as enforcer:
        taken = await enforcer.kernel.run(NflogSocket, enforcer.reconciler.settings.nflog_group)
        events = DeniedEvents(Said(), CellName("cell-1"), 1)  # type: ignore[arg-type]
        traffic = Traffic(enforcer.reconciler.settings, enforcer.reconciler.model, enforcer.kernel, events)
        task = asyncio.create_task(traffic.run())
        await until(lambda: "another process reads it" in str(traffic.problem))
        taken.close()
        await until(lambda: traffic.problem is None)
        task.cancel()


def group(guid: str, *networks: str, log: bool = False) -> SecurityGroup:
    """Everything to these networks, for all running apps."""
    destinations = tuple(AddressRange.parse(network) for network in networks)
    return SecurityGroup(
        GroupId(guid), guid, (EgressRule(EgressProtocol.ALL, destinations, log=log),), running_default=True
    )


@asynccontextmanager
async def logging_groups(
    cell: Cell, kind: str, tmp_path: Path, box: Box, *groups: SecurityGroup, **settings: Any
) -> AsyncIterator[Logging]:
    """With these security groups in force for the box, and a way out of the cell."""
    cell.ip("route add default dev under")
    box.container = replace(named(box), workload=Workload.APP)
    async with logging(cell, kind, tmp_path, known=tags(web=5), **settings) as made:
        model = made.enforcer.reconciler.model
        model.update_security_groups(Update(Revision(1), {(each.guid,): each for each in groups}))
        model.use_security_groups(True)
        await made.enforcer.reconciler.sync()
        yield made


async def seen(made: Logging, box: Box, *addresses: str) -> dict[str, str]:
    """What is logged of one datagram to each of these: destination -> message. The last one must be."""
    for address in addresses:
        await in_thread(send, box, address, 53)
        await asyncio.sleep(0.05)
    await until(lambda: any(line["data"]["packet"]["dst_ip"] == addresses[-1] for line in made.lines))
    return {line["data"]["packet"]["dst_ip"]: line["message"].rpartition(".")[2] for line in made.lines}


async def test_a_rule_that_says_log_logs_just_that(cell: Cell, kind: str, tmp_path: Path) -> None:
    web = cell.box("web")
    groups = group("silent", "203.0.113.0/25"), group("loud", "203.0.113.128/25", log=True)
    async with logging_groups(cell, kind, tmp_path, web, *groups) as made:
        found = await seen(made, web, "203.0.113.1", "198.51.100.1", "203.0.113.129")
        assert found == {"203.0.113.129": "egress-allowed"}
        (line,) = made.lines
        assert line["data"]["reason"] == "group"
        assert line["data"]["source"]["app_guid"] == "web"
        # What is refused is said on the bus all the same.
        await until(lambda: [flow["destination"]["address"] for flow in made.said.flows] == ["198.51.100.1"])


async def test_all_groups_and_all_that_is_refused(cell: Cell, kind: str, tmp_path: Path) -> None:
    web = cell.box("web")
    settings = {"log_security_groups": True, "log_denied": True, "denied_logs_per_sec": 10}
    denied = {"deny_networks_always": ("203.0.113.64/32",)}
    async with logging_groups(cell, kind, tmp_path, web, group("g", "203.0.113.0/24"), **settings, **denied) as made:
        found = await seen(made, web, "203.0.113.64", "169.254.169.254", "198.51.100.1", "203.0.113.1")
        assert found == {
            "203.0.113.64": "egress-denied",
            "169.254.169.254": "egress-denied",
            "198.51.100.1": "egress-denied",
            "203.0.113.1": "egress-allowed",
        }


@pytest.mark.parametrize("dry", [True, False])
async def test_too_many_connections_are_logged_and_on_trial_let_through(
    cell: Cell, kind: str, tmp_path: Path, *, dry: bool
) -> None:
    web = cell.box("web")
    limits = {"outbound_limit": True, "outbound_rate": 1, "outbound_burst": 1, "outbound_dry_run": dry}
    async with logging_groups(cell, kind, tmp_path, web, group("g", "0.0.0.0/0"), log_denied=True, **limits) as made:
        for _ in range(3):
            await in_thread(syn, web, "203.0.113.1", 80)
        line = await made.line("egress-denied")
        assert line["data"]["packet"]["dst_port"] == 80
        assert line["data"]["reason"] == ("rate, on trial" if dry else "rate")
        if dry:
            assert made.said.flows == []


def syn(box: Box, address: str, port: int) -> None:
    """Begin to connect, and do not wait."""

    def make() -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        made.setblocking(False)
        return made

    with inside(box.name, make) as made:
        with suppress(OSError):
            made.connect((address, port))
        time.sleep(0.05)
