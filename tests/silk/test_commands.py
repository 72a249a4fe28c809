"""What a deployment's scripts do with a cell: drain, teardown; and the answers that the original's expect."""

import asyncio
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from bus.local import Refused
from services.silk.namespace import opened
from tests.silk.processes import Start, Worker

pytestmark = pytest.mark.kernel


async def command(worker: Worker, *arguments: str) -> tuple[int, str]:
    def run() -> tuple[int, str]:
        done = subprocess.run(
            ["ip", "netns", "exec", worker.cell.name, sys.executable, "-m", "services.silk.worker", *arguments],
            env={**os.environ, **worker.process.settings},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return done.returncode, done.stderr

    return await asyncio.to_thread(run)


def devices(worker: Worker) -> list[str]:
    return [link["ifname"] for link in json.loads(worker.cell.sh("ip", "-j", "link"))]


async def test_drain_waits_for_containers_and_takes_no_more(start: Start) -> None:
    _, (worker,) = start()
    await worker.ready()
    await worker.attach("web-1", worker.cell.container())
    code, error = await command(worker, "drain", "--timeout", "0.5")
    assert code == 1
    assert "drain: 1 containers are still on this cell after 0.5 s" in error
    with pytest.raises(Refused, match="being drained and takes no more") as refused:
        await worker.attach("web-2", worker.cell.container())
    assert refused.value.status == 503
    draining = asyncio.create_task(command(worker, "drain"))
    await asyncio.sleep(1)
    assert not draining.done()
    await worker.call("POST", "/detach", {"handle": "web-1", "netns": None, "ifname": "eth0"})
    assert await draining == (0, "")
    worker.process.stop()
    assert (await command(worker, "drain"))[0] == 0


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
async def test_teardown_gives_the_lease_back_and_removes_the_device(start: Start, running: bool) -> None:
    centre, (worker,) = start()
    await worker.ready()
    assert (centre.count_leases(), "silk-vtep" in devices(worker)) == (1, True)
    if not running:
        worker.process.stop()
    code, error = await command(worker, "teardown")
    assert code == 0, error
    assert (centre.count_leases(), "silk-vtep" in devices(worker)) == (0, False)
    assert "unreachable" not in worker.cell.sh("ip", "route")
    if running:
        await worker.until(lambda answer: "torn down" in answer)
        await asyncio.sleep(1)
        assert centre.count_leases() == 0, "a worker that was torn down leases nothing"
        worker.process.stop()
    worker.process.start()
    await worker.ready()


async def test_teardown_without_the_centre_removes_the_device_and_says_what_is_left(start: Start) -> None:
    centre, (worker,) = start()
    await worker.ready()
    centre.stop()
    code, error = await command(worker, "teardown")
    assert code == 1
    assert "teardown: release subnet lease:" in error
    assert "silk-vtep" not in devices(worker)


async def test_a_wrong_setting_is_named(start: Start) -> None:
    _, (worker,) = start(workers_up=False)
    worker.process.settings["SILKBUS_VNI"] = "0"
    code, error = await command(worker, "drain")
    assert code == 2
    assert "vni: must be 1 to 16777215" in error


def ask(worker: Worker, method: str, path: str) -> tuple[int, dict[str, object]]:
    def fetch() -> tuple[int, dict[str, object]]:
        request = urllib.request.Request(f"http://127.0.0.1:23954{path}", method=method)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    with opened(f"/run/netns/{worker.cell.name}") as namespace:
        return namespace.run(fetch)


async def test_the_originals_cni_and_scripts_are_answered_on_their_port(start: Start) -> None:
    _, (worker,) = start(worker={"health_port": "23954"})
    await worker.ready()
    expected = {"overlay_subnet": "10.255.1.0/24", "mtu": 1450}
    for method, path in (("GET", "/"), ("GET", "/ping"), ("POST", "/any/thing?x=1"), ("DELETE", "/")):
        assert await asyncio.to_thread(ask, worker, method, path) == (200, expected)
    await command(worker, "teardown")
    status, answer = await asyncio.to_thread(ask, worker, "GET", "/ping")
    assert status == 503
    assert "torn down" in str(answer["error"])


async def test_a_machine_with_a_single_address(start: Start) -> None:
    centre, (worker,) = start(worker={"single_ip_only": "true"})
    await worker.until(lambda answer: isinstance(answer, dict) and str(answer["overlay_subnet"]).endswith("/32"))
    address = (await worker.call("GET", "/"))["overlay_subnet"].removesuffix("/32")
    shown = json.loads(worker.cell.sh("ip", "-j", "-4", "addr", "show", "silk-vtep"))[0]["addr_info"]
    assert [(each["local"], each["prefixlen"]) for each in shown] == [(address, 16)]
    with pytest.raises(Refused, match="the single overlay address"):
        await worker.attach("web-1", worker.cell.container())
    before = worker.cell.sh("ip", "-o", "link", "show", "silk-vtep")
    worker.process.stop()
    worker.process.start()
    await worker.ready()
    # The original's daemon does not recognise its own here, and makes the device anew (contract/cell.md 5.2).
    assert worker.cell.sh("ip", "-o", "link", "show", "silk-vtep") == before
    assert centre.count_leases() == 1


async def test_a_subnet_that_is_not_of_the_pool_any_more_is_left_once_the_cell_is_empty(start: Start) -> None:
    centre, (worker,) = start(lease_expiry="24", worker={"overlay_network": "10.255.0.0/16,10.222.0.0/16"})
    await worker.ready()
    await worker.attach("web-1", worker.cell.container())
    centre.controller.stop()
    centre.controller.start(overlay_network="10.222.0.0/16")
    await worker.until(lambda answer: isinstance(answer, dict))
    end = asyncio.get_running_loop().time() + 60
    while "drain the cell" not in (await worker.readyz())[1]:
        assert asyncio.get_running_loop().time() < end, await worker.readyz()
        await asyncio.sleep(0.1)
    assert (await worker.attach("web-2", worker.cell.container()))["address"] == "10.255.1.3", "it goes on meanwhile"
    for handle in ("web-1", "web-2"):
        await worker.call("POST", "/detach", {"handle": handle, "netns": None, "ifname": "eth0"})
    await worker.until(lambda answer: isinstance(answer, dict) and answer["overlay_subnet"] == "10.222.1.0/24")
    assert (await worker.readyz())[0] == 200
    assert (await worker.attach("web-3", worker.cell.container()))["address"] == "10.222.1.2"
