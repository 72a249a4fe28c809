"""How many flows each policy let in here, and how much was refused: from the rules' own counters in the kernel.

A policy's rule sees each flow once, when it begins, so its packets are flows. It is one rule for all instances of the
destination on this cell. Counters in the kernel begin anew whenever a chain is written anew, which each change of the
policies of its app does; so they are read from time to time and added up here. What a chain counted between the last
reading and being written anew is missed: the figures are never too high, and a busy app's are too low by as much as a
reading interval around each change of its policies. They begin with the enforcer's start.

Reading costs as much as the table is long (kernel.md 4: half a second for 39 000 rules), so it is done beside the
kernel thread, and rarely enough to take a thousandth of the time at most; who asks gets a reading of now.
"""

import asyncio
import json
import logging
import time
from dataclasses import dataclass
from datetime import UTC, datetime

from prometheus_client import Counter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bus.log import about
from bus.messages import AppId, Ports, Tag
from bus.process import KernelThread
from services.enforcer.desired import app_chain, family_of
from services.enforcer.kernel_view import CannotLook, Held, whole_table
from services.enforcer.logged import DENY_IN, DENY_OUT
from services.enforcer.reconciler import Reconciler
from services.enforcer.settings import Kind
from services.enforcer.tree import allowing

log = logging.getLogger(__name__)

INTERVAL = 60.0
REST = 1000
"""Times as long as a reading took it is rested at least."""

ALLOWED = Counter("silkbus_enforcer_policy_flows_total", "Flows that policies let in, as last read")
REFUSED = Counter("silkbus_enforcer_refused_packets_total", "Packets refused, as last read", ["chain"])

_REFUSING = {DENY_IN: "in", DENY_OUT: "out", "sb-cut": "revoked"}
_Rule = tuple[str, str]
"""The chain in which a rule is, by its first of a family, and the rule's hash."""
_Policy = tuple[AppId, AppId, Ports]
"""Source, destination, ports."""
_Wanted = list[tuple[AppId, list[tuple[AppId, Tag, tuple[Ports, ...]]]]]
"""Each destination, with the sources that may reach it: their names, tags and ports."""


@dataclass(slots=True)
class _Tally:
    """One counter of the kernel, added up over its new beginnings."""

    total: int = 0
    last: int = 0

    def take(self, now: int) -> int:
        """Take a reading; by how much the total grew."""
        # A counter that is lower has begun anew, and has counted what it says since.
        grown = now - self.last if now >= self.last else now
        self.last = now
        self.total += grown
        return grown


class Counters:
    """`run` it in a task. `thread` is one of its own, in the cell's network namespace."""

    def __init__(self, reconciler: Reconciler, thread: KernelThread) -> None:
        self._reconciler = reconciler
        self._thread = thread
        self._policies: dict[_Policy, _Tally] = {}
        self._refused = {name: _Tally() for name in _REFUSING.values()}
        self._turn = asyncio.Lock()
        self.since = datetime.now(UTC)

    def routes(self) -> list[Route]:
        return [Route("/counters", self.counters, methods=["GET"])]

    async def run(self) -> None:
        """Read now and then, for ever."""
        while True:
            began = time.monotonic()
            try:
                await self.read()
            except CannotLook as error:
                log.warning("counters not read", extra=about(error=str(error)))
            await asyncio.sleep(max(INTERVAL, REST * (time.monotonic() - began)))

    async def read(self) -> None:
        """Read them now. Raises CannotLook."""
        async with self._turn:
            await self._thread.run(self._read, self._reconciler.kind, self._wanted())

    async def counters(self, request: Request) -> Response:
        """`GET /counters[?source=APP][&destination=APP]`: of policies whose destination is here."""
        query = request.query_params
        try:
            async with self._turn:
                await self._thread.run(self._read, self._reconciler.kind, self._wanted())
                body = await self._thread.run(self._said, query.get("source"), query.get("destination"))
        except CannotLook as error:
            return JSONResponse({"error": str(error)}, status_code=503)
        return Response(body, media_type="application/json")

    def _wanted(self) -> _Wanted:
        """The policies whose destination is here, to be looked at beside the event loop."""
        model = self._reconciler.model
        apps = {tag: app for app, tag in model.tags.items()}
        return [(app, [(apps[tag], tag, ports) for tag, ports in model.sources(app).items()]) for app in model.apps()]

    # In the thread, one at a time

    def _read(self, kind: Kind, wanted: _Wanted) -> None:
        found = whole_table(kind, "filter")
        by_rule = _by_rule(found)
        known: dict[_Policy, _Tally] = {}
        for destination, sources in wanted:
            chain = app_chain(destination)
            for source, tag, allowed in sources:
                for ports in allowed:
                    policy = (source, destination, ports)
                    tally = known[policy] = self._policies.get(policy) or _Tally()
                    ALLOWED.inc(tally.take(by_rule.get((chain, allowing(tag, ports).hash), 0)))
        self._policies = known
        for chain, name in _REFUSING.items():
            refused = sum(rule.packets for at, rules in found.items() if at.name == chain for rule in rules[1:])
            REFUSED.labels(name).inc(self._refused[name].take(refused))

    def _said(self, source: str | None, destination: str | None) -> bytes:
        policies = [
            {
                "source": policy[0],
                "destination": policy[1],
                "protocol": str(policy[2].protocol),
                "start": policy[2].start,
                "end": policy[2].end,
                "flows": tally.total,
            }
            for policy, tally in sorted(self._policies.items(), key=lambda item: item[0])
            if source in (None, policy[0]) and destination in (None, policy[1])
        ]
        refused = {name: tally.total for name, tally in self._refused.items()}
        return json.dumps({"since": self.since.isoformat(), "policies": policies, "refused_packets": refused}).encode()


def _by_rule(found: Held) -> dict[_Rule, int]:
    """How many packets met each rule of apps' chains."""
    return {
        (family_of(chain.name), rule.hash): rule.packets
        for chain, rules in found.items()
        if chain.name.startswith("sb-a-")
        for rule in rules
        if rule.hash
    }
