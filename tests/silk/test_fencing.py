"""What becomes of the overlay when the lease cannot be kept: under traffic, with real processes and the real clocks."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from bus.local import Refused
from services.silk.namespace import opened
from tests.silk.conftest import eventually, reaches
from tests.silk.processes import Start, Worker
from tests.silk.traffic import UdpStream

pytestmark = pytest.mark.kernel

EXPIRY = "4"


def is_down(worker: Worker) -> bool:
    return "state DOWN" in worker.cell.sh("ip", "link", "show", "silk-vtep")


async def until_down(worker: Worker) -> None:
    await asyncio.to_thread(eventually, lambda: is_down(worker))


def settings_of(worker: Worker) -> dict[str, str]:
    return {**os.environ, **worker.process.settings}


def give_away(database: Path) -> None:
    """Make the first cell's lease another's, as a controller does with one that has run out."""
    with sqlite3.connect(database, timeout=30) as connection:
        connection.execute("UPDATE leases SET cell = 'cell-9', underlay = '10.77.0.99' WHERE cell = 'cell-1'")
        connection.execute("UPDATE table_head SET revision = revision + 1 WHERE name = 'leases'")


async def test_nothing_happens_to_traffic_while_the_centre_goes_and_returns(start: Start) -> None:
    centre, (first, second) = start(2)
    await first.ready()
    await second.ready()
    source, target = first.cell.container(), second.cell.container()
    await first.attach("client", source)
    address = (await second.attach("server", target))["address"]
    await asyncio.to_thread(eventually, lambda: reaches(source.rpartition("/")[2], address))
    devices = [worker.cell.sh("ip", "-o", "link", "show", "silk-vtep") for worker in (first, second)]
    with opened(source) as here, opened(target) as there, UdpStream(here, there, address) as stream:
        await asyncio.to_thread(stream.wait_for, 100)
        centre.stop()
        await asyncio.to_thread(stream.wait_for, stream.received + 500)
        first.process.stop(signal.SIGKILL)
        first.process.start()
        await first.ready()
        synced = first.log.read_text().count("in sync with the centre")
        centre.start()
        await asyncio.to_thread(eventually, lambda: first.log.read_text().count("in sync with the centre") > synced)
        await asyncio.to_thread(stream.wait_for, stream.received + 500)
    assert (stream.sent, stream.refused) == (stream.received, 0)
    assert devices == [worker.cell.sh("ip", "-o", "link", "show", "silk-vtep") for worker in (first, second)]


async def test_a_lease_given_away_meanwhile_leaves_the_cell_fenced_while_it_has_containers(
    start: Start, tmp_path: Path
) -> None:
    centre, (worker,) = start(lease_expiry=EXPIRY)
    await worker.ready()
    await worker.attach("web-1", worker.cell.container())
    centre.stop()
    await until_down(worker)
    give_away(tmp_path / "silk.db")
    centre.start()
    # It says what is wrong and what to do, and keeps saying so.
    await worker.until(lambda answer: "1 containers of this cell are outside its subnet" in answer)
    await worker.until(lambda answer: answer.startswith("fenced: the lease is lost") and "drain and restart" in answer)
    with pytest.raises(Refused, match="fenced"):
        await worker.attach("web-2", worker.cell.container())
    assert is_down(worker)
    assert "lease" in (await worker.readyz())[1]
    problems = (await worker.call("GET", "/problems"))["problems"]
    assert any(each["name"] == "overlay" and "web-1 (10.255.1.2)" in each["text"] for each in problems)
    # The last container goes, and the cell has a subnet again.
    await worker.call("POST", "/detach", {"handle": "web-1", "netns": None, "ifname": "eth0"})
    await worker.until(lambda answer: isinstance(answer, dict) and answer["overlay_subnet"] != "10.255.1.0/24")
    assert (await worker.attach("web-2", worker.cell.container()))["address"].startswith("10.255.2.")


async def test_a_worker_that_was_paused_past_the_expiry_fences_as_soon_as_it_goes_on(start: Start) -> None:
    centre, (worker,) = start(lease_expiry=EXPIRY)
    await worker.ready()
    await worker.attach("web-1", worker.cell.container())
    worker.process.send(signal.SIGSTOP)
    centre.stop()
    await asyncio.sleep(float(EXPIRY) + 0.5)
    assert not is_down(worker), "who is stopped cannot fence"
    # What a timer of the machine does for it.
    command = ["ip", "netns", "exec", worker.cell.name, sys.executable, "-m", "services.silk.worker", "fence"]
    done = subprocess.run(command, env=settings_of(worker), timeout=60, check=False)
    assert done.returncode == 0
    assert is_down(worker)
    worker.cell.sh("ip", "link", "set", "silk-vtep", "up")
    worker.process.send(signal.SIGCONT)
    await worker.until(lambda answer: "fenced: the lease could not be renewed" in answer)
    await until_down(worker)
    centre.start()
    await worker.ready()
    assert reaches(worker.cell.name, "10.255.1.2", timeout=10)


async def test_dead_past_the_expiry_it_fences_when_it_starts(start: Start) -> None:
    centre, (worker,) = start(lease_expiry=EXPIRY)
    await worker.ready()
    worker.process.stop(signal.SIGKILL)
    centre.stop()
    await asyncio.sleep(float(EXPIRY))
    assert not is_down(worker)
    worker.process.start()
    await worker.until(lambda answer: "fenced: the lease expired while the silk worker was down" in answer)
    await until_down(worker)


async def test_a_machine_that_slept_past_the_expiry_is_fenced(start: Start) -> None:
    """The boot clock goes on while a machine sleeps: here a namespace of time in which it is eight days later."""
    centre, (worker,) = start()
    await worker.ready()
    worker.process.stop()
    centre.stop()
    worker.process.command[4:4] = ["unshare", "--time", "--boottime", str(8 * 86400), "--fork"]
    worker.process.start()
    try:
        await worker.until(lambda answer: "fenced: the lease expired while the silk worker was down" in answer)
        await until_down(worker)
    finally:
        worker.process.end_children()


async def test_a_standing_device_of_an_unknown_lease_is_not_used_for_long(start: Start) -> None:
    centre, (worker,) = start()
    await worker.ready()
    worker.process.stop(signal.SIGKILL)
    centre.stop()
    (worker.cell.settings.state_dir / "silk" / "lease.json").unlink()
    program = "import services.silk.cell as cell; cell.UNKNOWN_GRACE = 3\nfrom services.silk.worker import main\nmain()"
    worker.process.command[-2:] = ["-c", program]
    worker.process.start()
    await worker.until(lambda answer: "no lease yet" in answer)
    assert not is_down(worker)
    await worker.until(lambda answer: "fenced: whether the lease of the standing device holds is unknown" in answer)
    await until_down(worker)
    centre.start()
    await worker.ready()
    assert not is_down(worker)
