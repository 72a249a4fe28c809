"""explain with a real policy server, lease controller and bus, and cells that answer what the test has them say."""

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from bus import subjects
from bus.explaining import CellAnswer, Instance, Outcome, Probe, Question, Verdict
from bus.messages import AppId, CellName, Handle, Revision
from bus.wire import decode
from tests.cli.running import environment, on_terminal, run
from tests.policy.server import DELETE, POLICIES, WRITE_TOKEN, PolicyServer, body, policy
from tests.policy.test_status import Cells, bus, world

__all__ = ["bus", "world"]

FLOW = ("front", "back", "--port", "8080")
FRONT, BACK = IPv4Address("10.255.1.2"), IPv4Address("10.255.2.3")
PASSES = Instance(Handle("x"), FRONT, Verdict.PASSES, "tag 1 may", "sb-new", "-j ACCEPT", kernel_agrees=True)


class Fleet:
    """Cell a has an instance of front, cell b one of back: what they say of the flow."""

    def __init__(self) -> None:
        self.source = replace(PASSES, handle=Handle("front-0"), address=FRONT)
        self.destination = replace(PASSES, handle=Handle("back-0"), address=BACK)
        self.outcome = Outcome.CONNECTED
        self.revision = Revision(1)
        self.silent = False

    def answer(self, cell: str, question: Question) -> CellAnswer | None:
        assert question.source == AppId("guid-front")
        if cell == "b":
            if self.silent:
                return None
            return CellAnswer(question.id, CellName("b"), self.revision, (), (self.destination,))
        probes = tuple(Probe(address, self.outcome, 1.5) for address in question.targets) if question.targets else None
        return CellAnswer(question.id, CellName("a"), self.revision, (replace(self.source, probes=probes),), ())


@pytest.fixture
async def fleet(world: tuple[PolicyServer, Cells]) -> AsyncIterator[Fleet]:
    _, cells = world
    fleet = Fleet()

    def answering(name: str) -> Callable[[str, bytes], None]:
        import asyncio

        def on_question(subject: str, data: bytes) -> None:
            answer = fleet.answer(name, Question.decode(decode(data, subject)))
            if answer is not None:
                sending = cells.connections[name].publish(subjects.cell(name, "explained"), answer.encode())
                tasks.add(task := asyncio.ensure_future(sending))
                task.add_done_callback(tasks.discard)

        tasks: set[asyncio.Future[bool]] = set()
        return on_question

    for name, connection in cells.connections.items():
        await connection.listen(subjects.EXPLAIN, answering(name))
    return fleet


def change(server: PolicyServer, path: str) -> None:
    with server.client() as api:
        api.post(path, json=body(policy("guid-front", "guid-back"))).raise_for_status()


async def test_what_is_allowed_and_what_is_not(world: tuple[PolicyServer, Cells], fleet: Fleet, tmp_path: Path) -> None:
    server, _ = world
    variables = environment(server, tmp_path)
    fleet.source = replace(fleet.source, verdict=Verdict.REFUSED, reason="no tag", chain="")
    fleet.destination = replace(fleet.destination, verdict=Verdict.REFUSED, reason="no policy")
    refused = await run(variables, "explain", *FLOW)
    assert (refused.code, refused.err) == (1, "")
    assert refused.out.splitlines()[:3] == [
        "Not allowed: acme/dev/front → acme/dev/back tcp 8080 (revision 0)",
        "  policies between the two: none",
        "  to allow it: silkbus add-network-policy front back -s dev -o acme --protocol tcp --port 8080",
    ]
    change(server, POLICIES)
    fleet.source = replace(fleet.source, verdict=Verdict.PASSES)
    fleet.destination = replace(fleet.destination, verdict=Verdict.PASSES, reason="policy tcp 8080")
    allowed = await run(variables, "explain", *FLOW, "--probe")
    assert (allowed.code, allowed.err) == (0, "")
    lines = allowed.out.splitlines()
    assert lines[0] == "Allowed: acme/dev/front → acme/dev/back tcp 8080 (revision 1)"
    assert lines[1].startswith("  by the policy tcp 8080, since revision 1 (")
    assert lines[1].endswith(", by admin)")
    assert "Source acme/dev/front: tag 0001" in lines
    assert "b      back-0      10.255.2.3   passes    agrees   policy tcp 8080 [sb-new]" in lines
    assert lines[-1] == "front-0   10.255.2.3   connected   1.5"
    value = json.loads((await run(variables, "explain", *FLOW, "--output", "json")).out)
    assert value["contradictions"] == []
    assert value["destination"]["instances"][0]["cell"] == "b"
    assert "contradictions: []" in (await run(variables, "explain", *FLOW, "--output", "yaml")).out
    code, shown = await on_terminal(variables, "explain", *FLOW)
    assert code == 0
    assert shown.startswith("\x1b[32;1mAllowed\x1b[0m: ")
    change(server, DELETE)
    fleet.destination = replace(fleet.destination, verdict=Verdict.REFUSED)
    gone = await run(variables, "explain", *FLOW)
    assert gone.code == 1
    assert "  the policy tcp 8080 was removed, at revision 2 (" in gone.out


async def test_where_policies_cells_kernels_and_probes_differ(
    world: tuple[PolicyServer, Cells], fleet: Fleet, tmp_path: Path
) -> None:
    server, _ = world
    variables = environment(server, tmp_path)
    change(server, POLICIES)
    right = fleet.destination

    async def contradiction(*arguments: str) -> str:
        result = await run(variables, "explain", *FLOW, *arguments)
        assert result.code == 3, result
        return "\n".join(line for line in result.out.splitlines() if line.startswith("Contradiction: "))

    fleet.destination = replace(right, verdict=Verdict.REFUSED, reason="no policy")
    fleet.revision = Revision(0)
    assert await contradiction() == (
        "Contradiction: The policies allow it, and b (back-0, destination) refuses it: no policy;"
        " its kernel has revision 0 of 1"
    )
    fleet.revision = Revision(1)
    fleet.destination = replace(right, kernel_agrees=False, differences=("chain sb-a-1: rule 2 is missing",))
    assert await contradiction() == (
        "Contradiction: The kernel of b (back-0, destination) does not have the rules that its enforcer wants:"
        " chain sb-a-1: rule 2 is missing"
    )
    fleet.destination, fleet.outcome = right, Outcome.TIMEOUT
    assert await contradiction("--probe") == (
        "Contradiction: Tried from front-0 to 10.255.2.3: timeout, while the verdict there is passes"
    )
    fleet.outcome = Outcome.REFUSED  # by an app that does not listen
    assert (await run(variables, "explain", *FLOW, "--probe")).code == 0
    fleet.silent = True
    silent = await run(variables, "explain", *FLOW)
    assert silent.code == 0
    assert "Cells that did not answer: b. What they have and do is not known." in silent.out


async def test_who_may_ask_and_what_is_not_understood(world: tuple[PolicyServer, Cells], tmp_path: Path) -> None:
    server, _ = world
    variables = environment(server, tmp_path)
    for arguments, problem in (
        (("front", "back"), "the following arguments are required: --port"),
        (("front", "back", "--port", "8080-8090"), "--port must be one port in 1-65535"),
        (("front", "back", "--port", "0"), "--port must be one port in 1-65535"),
        (("front", "back", "--port", "1", "--protocol", "icmp"), 'PROTOCOL must be "tcp" or "udp"'),
        (("front", "nobody", "--port", "1"), "App 'nobody' not found"),
    ):
        result = await run(variables, "explain", *arguments)
        assert result.code == 2
        assert problem in result.err
    refused = await run(environment(server, tmp_path, WRITE_TOKEN), "explain", *FLOW, "--probe")
    assert refused.code == 2
    assert refused.err
