"""status and --wait, with a real policy server, lease controller and bus, and cells that say what they enforce."""

import asyncio
import json
import re
from pathlib import Path

from tests.bus.tables import cancel, eventually
from tests.cli.running import WAIT, environment, on_terminal, run, started
from tests.policy.server import WRITE_TOKEN, PolicyServer
from tests.policy.test_status import STATUS, Cells, bus, world

__all__ = ["bus", "world"]

ADD = ("add-network-policy", "front", "back")
REMOVE = ("remove-network-policy", "front", "back", "--protocol", "tcp", "--port", "8080")


def head(server: PolicyServer) -> int:
    with server.client() as api:
        return int(api.get(STATUS).json()["head"])


async def test_status_shows_each_cell(world: tuple[PolicyServer, Cells], tmp_path: Path) -> None:
    server, cells = world
    variables = environment(server, tmp_path)
    assert (await run(variables, *ADD)).code == 0
    await cells.say("a", 1)
    await cells.say("b", 0, problem="no iptables")
    with server.client() as api:
        await eventually(lambda: api.get(STATUS).json()["enforcing"]["count"] == 1, WAIT)
        await eventually(lambda: api.get(STATUS).json()["behind"]["cells"][0]["revision"] == 0, WAIT)
    result = await run(variables, "status")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines() == [
        "Revision 1: not yet everywhere",
        "Cells: 1 enforcing, 1 behind, 0 unreachable",
        "",
        "cell   state       revision   details",
        "a      enforcing   1          ",
        "b      behind      0          no iptables",
    ]
    assert "Revision 0 of 1: enforced by all live cells" in (await run(variables, "status", "--revision", "0")).out
    assert json.loads((await run(variables, "status", "-o", "json")).out)["behind"]["cells"][0]["cell"] == "b"
    assert "cells:\n  - a\n" in (await run(variables, "status", "-o", "yaml")).out
    developer = await run(environment(server, tmp_path, WRITE_TOKEN), "status")
    assert developer.out.splitlines()[1:] == ["Cells: 1 enforcing, 1 behind, 0 unreachable"]
    wrong = await run(variables, "status", "--revision", "x")
    assert (wrong.code, wrong.err.splitlines()[0]) == (2, "Incorrect Usage: --revision must be a whole number, not 'x'")


async def test_waiting_ends_when_all_live_cells_enforce_the_change(
    world: tuple[PolicyServer, Cells], tmp_path: Path
) -> None:
    server, cells = world
    variables = environment(server, tmp_path)
    async with started(variables, *ADD, "--wait") as adding:
        assert (await adding.line()).startswith("Adding network policy")
        await eventually(lambda: head(server) == 1, WAIT)
        await cells.say("a", 1)
        await asyncio.sleep(1)
        assert adding.process.returncode is None
        await cells.say("b", 1)
        result = await adding.ended()
    assert (result.code, result.err) == (0, "")
    assert result.out == "Revision 1 is enforced on 2 cells.\nOK\n\n"
    # It is a line on a terminal, each over the last, and nothing is left of it.
    removing = asyncio.create_task(on_terminal(variables, *REMOVE, "--timeout", "50"))
    await eventually(lambda: head(server) == 2, WAIT)
    await asyncio.sleep(1)
    await cells.say("a", 2)
    await asyncio.sleep(1)
    await cells.say("b", 2)
    code, shown = await removing
    assert code == 0
    assert "\r\x1b[Kenforced on 0 of 2 cells, waiting for a, b…" in shown
    assert "\r\x1b[Kenforced on 1 of 2 cells, waiting for b…" in shown
    kept = "\n".join(re.split(r"\r\x1b\[K", line)[-1] for line in shown.split("\n"))
    assert "waiting" not in kept
    assert "Revision 2 is enforced on 2 cells.\n" in kept


async def test_what_is_not_enforced_in_time_has_its_own_exit_code(
    world: tuple[PolicyServer, Cells], tmp_path: Path
) -> None:
    server, cells = world
    await cells.say("a", 1)
    await cells.say("b", 0, problem="no iptables")
    result = await run(environment(server, tmp_path), *ADD, "--timeout", "3")
    assert result.code == 4
    assert "OK" not in result.out
    assert "Not enforced everywhere within 3 s: enforced on " in result.err
    assert "b (no iptables)" in result.err


async def test_unreachable_cells_are_named_and_have_their_own_exit_code(
    world: tuple[PolicyServer, Cells], tmp_path: Path
) -> None:
    server, cells = world
    variables = environment(server, tmp_path)

    async def keep_alive() -> None:
        while True:
            await cells.say("a", 99)
            await asyncio.sleep(1)

    alive = asyncio.create_task(keep_alive())
    await cells.say("b", 0)  # its last word
    manifest = tmp_path / "policies.yml"
    manifest.write_text("policies:\n- {source: acme/dev/front, destination: acme/dev/back, tcp: 8080}\n")
    result = await run(variables, "apply", "-f", str(manifest), "--wait", "-o", "json")
    await cancel(alive)
    assert result.code == 3
    assert json.loads(result.out)["done"] is True
    assert "Revision 1 is enforced on 1 cell.\n" in result.err
    assert "Unreachable, so that nobody knows what they enforce: b." in result.err


async def test_waiting_goes_on_when_the_server_is_started_anew(
    world: tuple[PolicyServer, Cells], tmp_path: Path
) -> None:
    server, cells = world
    variables = environment(server, tmp_path)
    async with started(variables, *ADD, "--wait") as adding:
        await adding.line()
        await eventually(lambda: head(server) == 1, WAIT)
        await asyncio.sleep(1)
        assert server.process is not None
        server.process.kill()
        await asyncio.to_thread(server.process.wait)
        await asyncio.to_thread(server.start)

        async def keep_saying() -> None:
            while True:
                await cells.say("a", 1)
                await cells.say("b", 1)
                await asyncio.sleep(1)

        saying = asyncio.create_task(keep_saying())
        result = await adding.ended()
        await cancel(saying)
    assert result.code == 0
    assert "no news of the cells" in result.err
    assert result.out.endswith("OK\n\n")
