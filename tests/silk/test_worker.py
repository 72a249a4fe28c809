"""The worker and the controller as processes in namespaces: leases over a real bus, attaching over the socket."""

import asyncio
import signal
import time
from pathlib import Path

import pytest

from bus.local import Refused
from services.silk.namespace import opened
from tests.silk.conftest import eventually, reaches
from tests.silk.processes import Start
from tests.silk.traffic import UdpStream

pytestmark = pytest.mark.kernel


async def test_two_cells_meet_and_a_restart_is_not_noticed(start: Start) -> None:
    _, (first, second) = start(2)
    await first.ready()
    await second.ready()
    source, target = first.cell.container(), second.cell.container()
    await first.attach("client", source)
    server = await second.attach("server", target)
    address = server["address"]
    await asyncio.to_thread(eventually, lambda: reaches(source.rpartition("/")[2], address))
    with opened(source) as here, opened(target) as there, UdpStream(here, there, address) as stream:
        await asyncio.to_thread(stream.wait_for, 100)
        for number in (signal.SIGTERM, signal.SIGKILL):
            for worker in (first, second):
                worker.process.stop(number)
                worker.process.start()
                await worker.ready()
        assert await second.attach("server", target) == server
        await asyncio.to_thread(stream.wait_for, stream.received + 100)
    assert stream.sent == stream.received
    await second.call("POST", "/detach", {"handle": "server", "netns": target, "ifname": "eth0"})
    assert not reaches(source.rpartition("/")[2], address, timeout=1)


async def test_readiness_says_what_is_missing(start: Start) -> None:
    centre, (worker,) = start(centre_up=False)
    await worker.until(lambda answer: "no lease yet: no connection to NATS" in answer)
    status, text = await worker.readyz()
    assert status == 503
    assert "lease: no lease yet: no connection to NATS" in text
    assert "overlay: no lease yet" in text
    centre.start()
    end = time.monotonic() + 30
    while await worker.readyz() != (200, "lease: ok\noverlay: ok\ntable: ok\n"):
        assert time.monotonic() < end, await worker.readyz()
        await asyncio.sleep(0.1)


async def test_another_overlay_network_is_refused(start: Start) -> None:
    _, (worker,) = start(overlay_network="10.100.0.0/16")
    await worker.until(lambda answer: "10.100.1.0/24, which is not in the overlay network 10.255.0.0/16" in answer)


async def test_a_cell_goes_on_without_bus_and_centre(start: Start) -> None:
    centre, (worker,) = start()
    await worker.ready()
    centre.stop()
    first = await worker.attach("web-1", worker.cell.container())
    worker.process.stop(signal.SIGKILL)
    worker.process.start()
    await worker.ready()
    second = await worker.attach("web-2", worker.cell.container())
    assert reaches(worker.cell.name, first["address"])
    assert reaches(worker.cell.name, second["address"])


async def test_a_cold_cell_waits_for_the_centre(start: Start) -> None:
    centre, (worker,) = start(centre_up=False)
    await worker.until(lambda answer: "no lease yet" in answer)
    with pytest.raises(Refused, match="no lease yet") as refused:
        await worker.attach("web-1", worker.cell.container())
    assert refused.value.status == 503
    centre.start()
    await worker.ready()


async def test_a_lost_lease_is_not_used(start: Start, tmp_path: Path) -> None:
    centre, (worker,) = start(lease_expiry="4")
    await worker.ready()
    await worker.attach("web-1", worker.cell.container())
    centre.controller.stop()
    for file in tmp_path.glob("silk.db*"):
        file.unlink()
    centre.controller.start()
    # The new database gives the same subnet again: fenced, and back.
    await asyncio.to_thread(eventually, lambda: worker.log_has("the lease is lost"))
    await worker.ready()


async def test_killed_after_the_commit_the_cell_gets_that_lease(start: Start) -> None:
    centre, (worker,) = start(centre_up=False)
    centre.nats.start()
    centre.controller.start(failpoints="silk.lease.after-commit=kill")
    assert await asyncio.to_thread(centre.controller.wait) == -signal.SIGKILL
    centre.controller.start()
    await worker.until(lambda answer: isinstance(answer, dict) and answer["overlay_subnet"] == "10.255.1.0/24")


async def test_what_is_malformed_is_refused(start: Start) -> None:
    _, (worker,) = start()
    await worker.ready()
    netns = worker.cell.container()
    good = {"handle": "a", "netns": "/absent", "ifname": "eth0"}
    for body, status, error in (
        ({**good, "handle": ""}, 400, "handle: must not be empty"),
        ({**good, "handle": "a\n"}, 400, "cannot be printed"),
        ({**good, "handle": "a" * 300}, 400, "1 to 200 characters"),
        ({**good, "netns": None}, 400, "netns: missing"),
        ({**good, "ifname": "a-name-of-18-chars"}, 400, "not an interface name"),
        ({**good, "ifname": "a/b"}, 400, "not an interface name"),
        (good, 400, "'/absent' cannot be opened"),
        ({**good, "address": "10.255.1.2/32"}, 400, "not an IPv4 address"),
        ({**good, "mac": "01:00:5e:00:00:01"}, 400, "not the MAC address of one interface"),
        ({**good, "mac": "00:00:00:00:00:00"}, 400, "not the MAC address of one interface"),
        ({**good, "bandwidth": {"egressRate": 8000}}, 400, "egress: if rate is set, burst must also be set"),
        ({**good, "bandwidth": [1]}, 400, "bandwidth: must be a mapping"),
        ({**good, "netns": netns, "address": "10.255.9.9"}, 409, "its subnet is 10.255.1.0/24"),
        ({**good, "netns": f"/run/netns/{worker.cell.name}"}, 409, "the cell's own network namespace"),
    ):
        with pytest.raises(Refused, match=error) as refused:
            await worker.call("POST", "/attach", body)
        assert refused.value.status == status
