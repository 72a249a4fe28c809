"""How many flows each policy let in here, and how much was refused: from the rules' own counters in the kernel.

A policy's rule sees each flow once, when it begins, so its packets are flows. It is one rule for all instances of the
destination on this cell. Counters in the kernel begin anew whenever a chain is written anew, which each change of the
policies of its app does; so they are read from time to time and added up here. What a chain counted between the last
reading and being written anew is missed: the figures are never too high, and a busy app's are too low by as much as a
reading interval around each change of its policies. They begin with the enforcer's start.

Reading costs as much as the table is long (kernel.md 4: half a second for 39 000 rules), so it is done beside the
kernel thread, and rarely enough to take a two-hundredth of the time at most; who asks gets a reading of now.
"""

import asyncio
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from prometheus_client import Counter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bus.log import about
from bus.messages import AppId, Ports
from bus.process import KernelThread
from services.enforcer.desired import app_chain, family_of
from services.enforcer.kernel_view import CannotLook, Held, whole_table
from services.enforcer.logged import DENY_IN, DENY_OUT
from services.enforcer.reconciler import Reconciler
from services.enforcer.tree import allowing

log = logging.getLogger(__name__)

INTERVAL = 60.0
REST = 200
"""Times as long as a reading took it is rested at least."""

ALLOWED = Counter("silkbus_enforcer_policy_flows_total", "Flows that policies let in, as last read")
REFUSED = Counter("silkbus_enforcer_refused_packets_total", "Packets refused, as last read", ["chain"])

_REFUSING = {DENY_IN: "in", DENY_OUT: "out", "sb-cut": "revoked"}
_Rule = tuple[str, str]
"""The chain in which a rule is, by its first of a family, and the rule's hash."""
_Policy = tuple[AppId, AppId, Ports]
"""Source, destination, ports."""


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
            found = await self._thread.run(whole_table, self._reconciler.kind, "filter")
            by_rule = _by_rule(found)
            known: dict[_Policy, _Tally] = {}
            for policy, rule in self._rules():
                tally = self._policies.get(policy) or _Tally()
                ALLOWED.inc(tally.take(by_rule.get(rule, 0)))
                known[policy] = tally
            self._policies = known
            for chain, name in _REFUSING.items():
                refused = sum(rule.packets for at, rules in found.items() if at.name == chain for rule in rules[1:])
                REFUSED.labels(name).inc(self._refused[name].take(refused))

    async def counters(self, request: Request) -> Response:
        """`GET /counters[?source=APP][&destination=APP]`: of policies whose destination is here."""
        wanted = {name: request.query_params.get(name) for name in ("source", "destination")}
        try:
            await self.read()
        except CannotLook as error:
            return JSONResponse({"error": str(error)}, status_code=503)
        policies: list[dict[str, Any]] = [
            {
                "source": source,
                "destination": destination,
                "protocol": str(ports.protocol),
                "start": ports.start,
                "end": ports.end,
                "flows": tally.total,
            }
            for (source, destination, ports), tally in sorted(self._policies.items())
            if wanted["source"] in (None, source) and wanted["destination"] in (None, destination)
        ]
        refused = {name: tally.total for name, tally in self._refused.items()}
        return JSONResponse({"since": self.since.isoformat(), "policies": policies, "refused_packets": refused})

    def _rules(self) -> Iterator[tuple[_Policy, _Rule]]:
        """Each policy whose destination is here, and its rule."""
        model = self._reconciler.model
        apps = {tag: app for app, tag in model.tags.items()}
        for destination in model.apps():
            chain = app_chain(destination)
            for tag, allowed in model.sources(destination).items():
                for ports in allowed:
                    yield (apps[tag], destination, ports), (chain, allowing(tag, ports).hash)


def _by_rule(found: Held) -> dict[_Rule, int]:
    """How many packets met each rule of apps' chains."""
    return {
        (family_of(chain.name), rule.hash): rule.packets
        for chain, rules in found.items()
        if chain.name.startswith("sb-a-")
        for rule in rules
        if rule.hash
    }
