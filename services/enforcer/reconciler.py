"""The loop that keeps the kernel equal to the model.

It lives in the event loop: changes go into the model at once and wake it; one pass takes all that came since the last
(so bursts coalesce by themselves: the slower the kernel, the more), plans it, and has it applied in the kernel thread.
Who must know waits for the pass that has his change. Until both tables are usable only the fence stands.

A pass that fails is tried again from a fresh look at the kernel, with everything planned anew. So is, each second, a
kernel that somebody else changed, and each minute whatever else was not noticed.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from ipaddress import IPv4Address

from prometheus_client import Counter, Gauge, Histogram
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from bus.failpoints import FailpointError
from bus.log import about
from bus.messages import Container, Handle, Lease, Ports, Revision, SecurityGroup, Tag
from bus.process import KernelThread
from bus.tables import Update
from services.enforcer.dataplane import Applied, Dataplane
from services.enforcer.desired import concerned, plan
from services.enforcer.flows import Swept
from services.enforcer.iptables import IptablesError
from services.enforcer.isolation import Part
from services.enforcer.model import Model
from services.enforcer.sets import IpsetError
from services.enforcer.settings import EnforcerSettings, Kind

log = logging.getLogger(__name__)

USABLE_TIMEOUT = 12.0
"""Seconds that a call waits for the tables: a replica is usable within 10 s of its start."""
APPLY_TIMEOUT = 30.0
"""Seconds that a call waits for its change to be in the kernel."""
CHECK_INTERVAL = 1.0
SETTLE_AFTER = 0.1
"""Seconds after an apply until it is looked at once more; several applies share a look."""
SWEEP_INTERVAL = 60.0
ATTEMPTS = 5
MAX_LOOKING = 0.1
"""Share of the time that looking for others' changes may take, where others change rules all the time."""
LOOKING_SAVED = 60.0
"""Seconds of which that share may be used at once: what others change now and then is put right at once."""

APPLY = Histogram(
    "silkbus_enforcer_apply_seconds",
    "Time to make the kernel equal to a change",
    buckets=(0.005, 0.01, 0.02, 0.04, 0.07, 0.15, 0.3, 0.6, 1.2, 2.5, 5, 10),
)
REVISION = Gauge("silkbus_enforcer_revision", "Revision of the policies that the kernel has")
RULES = Gauge("silkbus_enforcer_rules", "Rules of ours in the kernel")
DRIFT = Counter("silkbus_enforcer_drift_repaired_total", "Chains and set members that somebody else had changed")

KernelError = (IptablesError, IpsetError, OSError, FailpointError)


class NotReady(Exception):
    """The rules are not in the kernel in time. The text says why."""


class Reconciler:
    """Feed it from the event loop, after `open`; `run` it in a task."""

    def __init__(self, settings: EnforcerSettings, kernel: KernelThread) -> None:
        self._settings = settings
        self._kernel = kernel
        self._dataplane = Dataplane(settings)
        self._model = Model()
        self._wake = asyncio.Event()
        self._usable = asyncio.Event()
        self._waiting: list[asyncio.Future[Revision]] = []
        self._look_again = False
        self._next_look = 0.0
        self._next_sweep = 0.0
        self._settle_at = math.inf
        self._other_kind_swept = False
        self.revision = Revision(0)
        """Of the policies, as the kernel has them."""
        self.applied_at: datetime | None = None
        self.problem: str | None = "the tables are not usable yet"
        self._watchers: list[Callable[[], None]] = []
        self._refused: Mapping[Part, str] = {}
        self._unfenced: dict[str, str] = {}

    async def open(self) -> None:
        """Put the fence up. Raises what the dataplane raises: without a fence there is no enforcer."""
        kind = await self._kernel.run(self._dataplane.open)
        log.info("fence stands", extra=about(kind=kind, rules=self._dataplane.rules))

    @property
    def containers(self) -> int:
        return len(self._model.containers)

    @property
    def faults(self) -> list[str]:
        """What is not enforced as it should be, though the rest is: what that is, whom it concerns, and why."""
        left_out = [
            f"chain {part.chain.name} ({', '.join(concerned(self._model, part.chain.name)) or 'nobody now'}):"
            f" refused by the kernel, left out: {error}"
            for part, error in self._refused.items()
        ]
        return left_out + [text for handle, text in self._unfenced.items() if Handle(handle) in self._model.containers]

    @property
    def model(self) -> Model:
        """What is wanted. To be read in the event loop, and changed by this class only."""
        return self._model

    @property
    def kind(self) -> Kind:
        """Which of the kernel's packet filters is written; known once this is open."""
        return self._dataplane.kind

    @property
    def settings(self) -> EnforcerSettings:
        """The settings in force: those given, but for what was changed while running."""
        return self._settings

    def on_pass(self, watcher: Callable[[], None]) -> None:
        """Call `watcher` after each pass from now on, and when one has failed for good."""
        self._watchers.append(watcher)

    # Feeding

    def update_policies(self, update: Update[tuple[Ports, ...] | Tag]) -> None:
        self._model.update_policies(update)
        self._wake.set()

    def update_leases(self, update: Update[Lease]) -> None:
        self._model.update_leases(update)
        self._wake.set()

    def update_security_groups(self, update: Update[SecurityGroup]) -> None:
        self._model.update_security_groups(update)
        self._wake.set()

    def use_security_groups(self, used: bool) -> None:
        """Whether the table of security groups counts: else, what containers were given when they were made."""
        if self._model.security_groups.used != used:
            self._model.use_security_groups(used)
            self._wake.set()
            log.info("security groups", extra=about(used="table" if used else "containers' own"))

    def restore(self, containers: list[Container]) -> None:
        """Take the containers that the cell's records name, at start."""
        for container in containers:
            self._model.admit(container)

    def begin(self) -> None:
        """Both tables are usable: enforce."""
        self._everything()
        self._usable.set()
        self._wake.set()

    async def admit(self, container: Container) -> Revision:
        """Enforce for a container that has an address; returns once the kernel does. Raises NotReady."""
        await self._until_usable()
        self._model.admit(container)
        if container.handle in self._unfenced and container.address is not None:
            self._model.touched.addresses.add(container.address)  # its link may be there by now
        revision = await self._applied()
        if container.handle in self._unfenced:
            raise NotReady(self._unfenced[container.handle])
        return revision

    async def forget(self, handle: Handle) -> Revision:
        """Take a container's rules and flows away; returns once they are gone. Raises NotReady."""
        await self._until_usable()
        self._model.forget(handle)
        self._unfenced.pop(handle, None)
        return await self._applied()

    async def sync(self) -> Revision:
        """One full pass over the kernel. Raises NotReady."""
        await self._until_usable()
        self._everything()
        return await self._applied()

    async def log_accepted(self, wanted: bool) -> None:
        """Log flows that policies let in, or no more; returns once the rules are so. Raises NotReady."""
        await self._until_usable()
        self._settings = replace(self._settings, log_accepted=wanted)
        self._everything()
        await self._applied()

    def _everything(self) -> None:
        """Nothing is taken as known."""
        self._dataplane.distrust()
        self._look_again = True
        self._model.touched.everything, self._model.touched.routine = True, False

    async def _until_usable(self) -> None:
        try:
            async with asyncio.timeout(USABLE_TIMEOUT):
                await self._usable.wait()
        except TimeoutError:
            raise NotReady("policies and leases are not known yet; try again") from None

    async def _applied(self) -> Revision:
        waiter: asyncio.Future[Revision] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        self._wake.set()
        try:
            async with asyncio.timeout(APPLY_TIMEOUT):
                return await waiter
        except TimeoutError:
            raise NotReady(f"the kernel did not take the rules within {APPLY_TIMEOUT:g} s; see the log") from None

    # Applying

    async def run(self) -> None:
        """Reconcile for ever."""
        await self._usable.wait()
        await self._try_pass()
        next_check = time.monotonic()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(min(next_check, self._settle_at) - time.monotonic()):
                    await self._wake.wait()
            if time.monotonic() >= next_check:
                await self._check()
                next_check = time.monotonic() + CHECK_INTERVAL
            if self._wake.is_set() or self._look_again:
                await self._try_pass()
            if time.monotonic() >= self._settle_at:
                await self._settle()

    async def _settle(self) -> None:
        try:
            swept = await self._kernel.run(self._dataplane.settle, self._namespaces())
            self._settle_at = math.inf
            if swept != Swept():
                log.info("late flows", extra=about(flows_cut=swept.cut, flows_revived=swept.revived))
        except KernelError as error:
            self._settle_at = time.monotonic() + CHECK_INTERVAL
            log.warning("could not look at flows once more, trying again", extra=about(error=str(error)))

    def _namespaces(self) -> dict[IPv4Address, str]:
        return {c.address: c.netns for c in self._model.containers.values() if c.address is not None and c.netns}

    async def _check(self) -> None:
        """Now and then: is the kernel still as we left it?"""
        now = time.monotonic()
        if now < self._next_look:
            return
        if self.problem is not None or now >= self._next_sweep or await self._kernel.run(self._dataplane.doubtful):
            touched = self._model.touched
            touched.routine = touched.routine or not touched.everything
            touched.everything = self._look_again = True
        elif not self._wake.is_set():
            await self._tidy()

    async def _tidy(self) -> None:
        """What can wait until nothing else is to be done, and until the rules are complete."""
        try:
            await self._kernel.run(self._dataplane.prune)
            if not self._other_kind_swept:
                await self._kernel.run(self._dataplane.sweep_other_kind)
                self._other_kind_swept = True
        except KernelError as error:
            log.warning("could not tidy up", extra=about(error=str(error)))

    async def _try_pass(self) -> None:
        """Passes until one succeeds; after some that failed, whoever waits is told, and the next check tries again."""
        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(KernelError),
                stop=stop_after_attempt(ATTEMPTS),
                wait=wait_random_exponential(0.1, max=2),
                before_sleep=self._say,
                reraise=True,
            ):
                with attempt:
                    await self._pass()
        except KernelError as error:
            self.problem = str(error)
            self._tell()
            log.error("the kernel does not take the rules", extra=about(error=self.problem))
            waiting, self._waiting = self._waiting, []
            for waiter in waiting:
                if not waiter.done():
                    waiter.set_exception(NotReady(f"the kernel does not take the rules: {error}"))

    def _tell(self) -> None:
        for watcher in self._watchers:
            watcher()

    def _say(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        log.warning("apply failed, trying again", extra=about(error=str(error), attempt=state.attempt_number))

    async def _pass(self) -> None:
        """Take all that is touched, and make the kernel so. Raises KernelError, having put everything back."""
        looked, self._look_again = self._look_again, False
        began = time.monotonic()
        if looked:
            try:
                await self._kernel.run(self._dataplane.refresh)
            except BaseException:
                self._everything()
                raise
        self._wake.clear()
        waiting, self._waiting = self._waiting, []
        touched = self._model.take_touched()
        quiet = not replace(touched, everything=False)
        try:
            if touched:
                planned = plan(self._settings, self._model, touched)
                applied = await self._kernel.run(self._dataplane.apply, planned, self._namespaces())
                self._note(applied, planned.revision, drift=looked and quiet and self.applied_at is not None)
            else:  # what came concerns no container here, so the kernel has it as it is
                self.revision = self._model.revision
                REVISION.set(self.revision)
        except BaseException:
            self._everything()
            self._model.touched.released |= touched.released
            self._waiting[:0] = waiting
            raise
        if looked:
            ended = time.monotonic()
            self._next_look = max(self._next_look, ended - LOOKING_SAVED) + (ended - began) / MAX_LOOKING
            self._next_sweep = ended + SWEEP_INTERVAL
        self.problem = None
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(self.revision)
        self._tell()

    def _note_faults(self, applied: Applied) -> None:
        self._refused = applied.refused
        for handle, why in applied.guests.items():
            if why is None:
                self._unfenced.pop(handle, None)
            elif self._unfenced.get(handle) != why:
                log.error("a container cannot be enforced", extra=about(handle=handle, error=why))
                self._unfenced[handle] = why

    def _note(self, applied: Applied, revision: Revision, *, drift: bool) -> None:
        self.revision = revision
        REVISION.set(revision)
        RULES.set(self._dataplane.rules)
        self._note_faults(applied)
        changed = applied.chains + applied.members
        if changed or applied.swept != Swept():
            self._settle_at = min(self._settle_at, time.monotonic() + SETTLE_AFTER)
        if changed:
            APPLY.observe(applied.seconds)
        if drift and changed:
            DRIFT.inc(changed)
            log.warning("repaired what somebody else had changed", extra=about(chains_and_members=changed))
        if changed or applied.swept != Swept() or self.applied_at is None:
            self.applied_at = datetime.now(UTC)
            log.info(
                "applied",
                extra=about(
                    revision=revision,
                    chains=applied.chains,
                    members=applied.members,
                    flows_cut=applied.swept.cut,
                    flows_revived=applied.swept.revived,
                    milliseconds=round(applied.seconds * 1000, 1),
                ),
            )
