"""What the silk worker does for its cell: holds the lease, keeps the overlay, attaches containers.

    keep_lease        controller ─▶ tenure ─▶ overlay device       acquires, renews, takes the overlay up
    fence_when_due    tenure ─▶ device down                        needs nobody's answer
    follow_leases     leases ─▶ routes, neighbours, FDB            at each change
    mender            kernel's notices ─▶ what was changed         at each notice, and now and then

What goes wrong in the world (no bus, no controller, a refusing kernel) is logged and tried again; the worker ends only
for errors of its own. It needs neither bus nor centre to attach a container while its lease holds.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from ipaddress import IPv4Address

from prometheus_client import Gauge, Histogram
from pyroute2 import NetlinkError
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from bus.connection import BusAway, NoAnswer
from bus.decode import Malformed
from bus.local import Health
from bus.log import about
from bus.messages import Handle, Lease
from bus.process import KernelThread
from bus.tables.follower import State
from services.silk import tenure as tenures
from services.silk.attachments import Attachment, Conflict, Wanted
from services.silk.client import LeaseDenied, LeaseLost
from services.silk.directory import Directory, Lessor
from services.silk.mending import REPAIRS, Mender
from services.silk.network import CellNetwork, Inspection
from services.silk.notes import Note
from services.silk.overlay import Device, OverlayError
from services.silk.peers import desired
from services.silk.problems import Problem
from services.silk.settings import WorkerSettings
from services.silk.tenure import Tenure, boot_clock

log = logging.getLogger(__name__)

FENCE_CHECK_INTERVAL = 1.0
UNKNOWN_GRACE = 60.0
"""Seconds that a device of an earlier life stays up while nobody says whether its lease still holds."""
MAX_BACKOFF = 5.0
SETTLED = 5.0
PROBLEMS_INTERVAL = 300.0

LEASE_SECONDS = Gauge("silkbus_silk_lease_seconds", "Seconds until this cell fences itself unless it renews its lease")
PEERS = Gauge("silkbus_silk_peers", "Other cells that the overlay leads to")
CONVERGE = Histogram("silkbus_silk_converge_seconds", "Time to make the overlay's entries what the leases say")
PROBLEMS = Gauge("silkbus_silk_problems", "Things on this cell that are in the overlay's way; the log names them")
ATTACH = Histogram("silkbus_silk_attach_seconds", "Time to attach a container")


class NoLease(Exception):
    """This cell may not use the overlay now. The text says why."""


class _NotConverged(Exception):
    """The kernel refused some entries; the log names them."""


TRANSIENT = (
    *(BusAway, NoAnswer, Malformed, LeaseDenied, LeaseLost),
    *(OverlayError, Conflict, _NotConverged, OSError, NetlinkError),
)
"""What goes wrong in the world, and may come right."""


class Cell:
    """The decisions, all made in the event loop. `network` is used in the kernel thread only.

    `_tenure` is the lease as last confirmed; `_device` is the overlay in use, None while there is none or it is fenced.
    `_problem` says why there is none, `_fenced` why it is fenced, `_unrenewed` why the lease was not renewed, and
    `_refusal` why no more containers are taken.
    """

    def __init__(self, settings: WorkerSettings, lessor: Lessor, directory: Directory, kernel: KernelThread) -> None:
        self._networks = settings.overlay_network
        self._file = settings.state_dir / "silk" / "lease.json"
        self._lessor = lessor
        self._directory = directory
        self._kernel = kernel
        self._network = CellNetwork(settings)
        self._mender = Mender(self._network, kernel, self._looked, lambda: _retrying("mending"))
        self._tenure: Tenure | None = None
        self._device: Device | None = None
        self._problem = "no lease yet: the Silk controller has not given one"
        self._fenced: str | None = None
        self._unrenewed: str | None = None
        self._refusal: str | None = None
        self._torn_down = False
        self._confirming = asyncio.Lock()
        self._changed = asyncio.Event()
        self._sweep = False
        directory.listen(lambda _: self._changed.set())

    async def run(self) -> None:
        """Run for ever. A lease remembered from before, if it still holds, is used before anybody is asked."""
        await self._remember()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_lease())
            tasks.create_task(self._fence_when_due())
            tasks.create_task(self._fence_unknown())
            tasks.create_task(self._directory.run())
            tasks.create_task(self._follow_leases())
            tasks.create_task(self._mender.run())
            tasks.create_task(self._tell_problems())

    def overlay(self) -> tuple[Lease, Device]:
        """The lease in use and the device. Raises NoLease."""
        if self._tenure is None or self._device is None:
            raise NoLease(self._problem)
        return self._tenure.lease, self._device

    def leases(self) -> list[Lease]:
        """Every cell's lease, as far as known; our own by our name, which the original's controller does not know."""
        known = {lease.subnet: lease for lease in self._directory.entries.values()}
        if self._tenure is not None:
            known[self._tenure.lease.subnet] = self._tenure.lease
        return list(known.values())

    async def attach(self, wanted: Wanted) -> Attachment:
        """Raises NoLease, and what `Attachments.attach` raises."""
        self.accepting()
        with ATTACH.time():
            return await self._kernel.run(self._network.attach, wanted)

    def accepting(self) -> None:
        """Raise NoLease if this cell takes no containers now."""
        self.overlay()
        if self._refusal is not None:
            raise NoLease(self._refusal)

    async def detach(self, handle: Handle, address: IPv4Address | None, *, interface: str | None = None) -> None:
        """Raises OSError. With `interface`, only if that is its name in the container."""
        await self._kernel.run(self._network.detach, handle, address, interface)

    async def check(self, handle: Handle, netns: str, interface: str) -> Attachment:
        """The container's attachment, if it is whole. Raises NotAttached, NamespaceError or OSError."""
        return await self._kernel.run(self._network.check, handle, netns, interface)

    async def notes(self) -> list[Note]:
        """What this cell was asked to attach."""
        return await self._kernel.run(self._network.notes)

    async def drain(self) -> int:
        """Take no more containers, until the worker is started anew; how many are left. Raises OSError."""
        if self._refusal is None:
            log.info("draining: no more containers are taken")
            self._refusal = "this cell is being drained and takes no more containers: use another"
        return await self._kernel.run(self._network.containers)

    async def tear_down(self) -> list[str]:
        """Give the lease back and take the overlay down, for good: what of it could not be done."""
        async with self._confirming:
            self._torn_down = True
            self._device = None
            self._problem = "torn down: restart the silk worker to lease a subnet again"
            tenure, self._tenure = self._tenure, None
            failed = await take_apart(self._lessor, self._network, self._kernel, tenure)
            await self._kernel.run(self._file.unlink, missing_ok=True)
        log.info("torn down", extra=about(failed=failed))
        return failed

    async def problems(self) -> list[Problem]:
        """What is wrong with this cell, in plain words."""
        own = None if self._tenure is None else self._tenure.lease
        found = await self._kernel.run(self._network.problems, own, self.leases())
        said = [
            ("overlay", None if self._device is not None else self._problem),
            ("lease", self._unrenewed),
            ("kernel", self._mender.problem),
        ]
        return [Problem(name, text) for name, text in said if text is not None] + found

    def watch(self, health: Health) -> None:
        """Add what must be so for the worker to be ready."""
        health.check("lease", lambda: self._problem if self._tenure is None else self._unrenewed)
        health.check("overlay", lambda: self._problem if self._device is None else self._mender.problem)
        usable = (State.LIVE, State.CACHED)
        health.check("table", lambda: None if self._directory.state in usable else f"leases: {self._directory.state}")

    async def _remember(self) -> None:
        tenure = await self._kernel.run(tenures.load, self._file)
        if tenure is None or not self._lessor.may_have(tenure.lease):
            return
        self._tenure = tenure
        if not tenure.holds:
            await self._fence("the lease expired while the silk worker was down")
            return
        try:
            await self._take_up(tenure)
        except TRANSIENT as error:
            log.warning("the remembered lease cannot be used", extra=about(error=str(error)))

    async def _keep_lease(self) -> None:
        while True:
            async for attempt in _retrying("confirming the lease"):
                with attempt:
                    async with self._confirming:
                        interval = MAX_BACKOFF if self._torn_down else (await self._confirm()).renew_interval
            # Spread, so that the cells of a deployment do not come all at once.
            await asyncio.sleep(interval * random.uniform(0.8, 1))  # noqa: S311 (keeps no secret)

    async def _confirm(self) -> Tenure:
        """Renew the lease, or acquire one, and see that the overlay is up for it."""
        known = self._tenure
        try:
            tenure = await (self._lessor.acquire() if known is None else self._renewed(known))
        except LeaseLost as error:
            self._tenure = None
            await self._fence(f"the lease is lost: {error}")
            raise
        except TRANSIENT as error:
            if known is None:
                self._problem = f"{self._fenced or 'no lease yet'}: {error}"
            raise
        if known is not None and known.lease != tenure.lease:
            self._device = None
        self._tenure, self._unrenewed = tenure, None
        try:
            await self._kernel.run(tenures.save, tenure, self._file)
        except OSError as error:
            log.warning("the lease is not remembered", extra=about(file=str(self._file), error=str(error)))
        if self._device is None:
            try:
                await self._take_up(tenure)
            except TRANSIENT as error:
                self._problem = f"{self._fenced or 'the overlay cannot be set up'}: {error}"
                raise
        return tenure

    async def _renewed(self, known: Tenure) -> Tenure:
        """The lease, renewed. One that is refused is used until it ends, or given up if there are no containers."""
        try:
            return await self._lessor.renew(known)
        except LeaseDenied as error:
            self._unrenewed = f"the lease is not renewed: {error}"
            if await self._kernel.run(self._network.containers):
                raise
            return await self._lessor.acquire()

    async def _take_up(self, tenure: Tenure) -> None:
        self._device = await self._kernel.run(self._network.take_up, tenure.lease)
        self._fenced = None
        log.info("overlay in use", extra=about(subnet=str(tenure.lease.subnet), mtu=self._device.mtu))
        self._changed.set()

    async def _fence_when_due(self) -> None:
        while True:
            left = FENCE_CHECK_INTERVAL
            if self._tenure is not None:
                left = self._tenure.fence_at - boot_clock()
                LEASE_SECONDS.set(left)
                if left <= 0 and self._device is not None:
                    await self._fence("the lease could not be renewed in time")
            # The clock that a sleep goes by stands still while the machine sleeps; so never for long.
            await asyncio.sleep(min(FENCE_CHECK_INTERVAL, left) if left > 0 else FENCE_CHECK_INTERVAL)

    async def _fence_unknown(self) -> None:
        """A device that stands without a lease that we know of is used on, but not for long."""
        if self._tenure is None and await self._kernel.run(self._network.stands):
            log.warning("an overlay device stands, of an unknown lease", extra=about(seconds=UNKNOWN_GRACE))
            await asyncio.sleep(UNKNOWN_GRACE)
            if self._tenure is None:
                await self._fence(f"whether the lease of the standing device holds is unknown; {self._problem}")

    async def _fence(self, reason: str) -> None:
        self._device = None
        self._problem = self._fenced = f"fenced: {reason}"
        async for attempt in _retrying("fencing"):
            with attempt:
                if self._device is None:  # else taken up again meanwhile
                    await self._kernel.run(self._network.fence)
        log.error("fenced: the overlay device is down", extra=about(reason=reason))

    async def _follow_leases(self) -> None:
        await self._directory.usable()
        while True:
            async for attempt in _retrying("converging", sleep=self._sleep_until_change):
                with attempt:
                    await self._converge()
            await self._changed.wait()

    async def _converge(self) -> None:
        self._changed.clear()
        if self._tenure is None or self._device is None:
            return
        wanted = desired(self._tenure.lease, self._networks, self._directory.entries.values())
        PEERS.set(len(wanted.routes))
        # A table that is empty for want of anybody to ask says nothing about who is gone.
        delete = self._directory.state is not State.DEGRADED
        sweep, self._sweep = self._sweep, False
        try:
            with CONVERGE.time():
                result = await self._kernel.run(self._network.converge, wanted, delete=delete, sweep=sweep)
            if result.failed:
                raise _NotConverged(f"{result.failed} entries were refused by the kernel")
        except BaseException:
            self._sweep |= sweep
            raise
        REPAIRS.inc(result.drifted)
        if result.changed:
            fields = about(changed=result.changed, peers=len(wanted.routes), revision=self._directory.revision)
            log.info("overlay entries changed", extra=fields)

    def _looked(self, found: Inspection) -> None:
        if found.device is not None and self._device is not None:
            self._device = found.device  # its MTU may be another, as the underlay's
        if found.sweep:
            self._sweep = True
            self._changed.set()

    async def _tell_problems(self) -> None:
        """Log each problem once, when it is found."""
        told: set[Problem] = set()
        await asyncio.sleep(SETTLED)
        while True:
            try:
                own = None if self._tenure is None else self._tenure.lease
                found = set(await self._kernel.run(self._network.problems, own, self.leases()))
                PROBLEMS.set(len(found))
                for problem in sorted(found - told):
                    log.warning("problem on this cell: %s", problem.text, extra=about(problem=problem.name))
                told = found
            except TRANSIENT as error:
                log.warning("problems cannot be looked for", extra=about(error=str(error)))
            await asyncio.sleep(PROBLEMS_INTERVAL)

    async def _sleep_until_change(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()


async def take_apart(lessor: Lessor, network: CellNetwork, kernel: KernelThread, tenure: Tenure | None) -> list[str]:
    """Give a cell's lease back and remove its overlay device, each whatever becomes of the other: what failed."""
    failed = []
    try:
        if tenure is not None:
            await lessor.release(tenure)
    except TRANSIENT as error:
        failed.append(f"release subnet lease: {error}")
    try:
        await kernel.run(network.remove)
    except TRANSIENT as error:
        failed.append(f"delete vtep: {error}")
    return failed


def _retrying(doing: str, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> AsyncRetrying:
    def say(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        log.warning("%s failed, trying again", doing, extra=about(attempt=state.attempt_number, error=str(error)))

    # Without a limit: a cell has nothing better to do than to go on trying, and its readiness says what is wrong.
    return AsyncRetrying(
        retry=retry_if_exception_type(TRANSIENT),
        wait=wait_random_exponential(0.2, max=MAX_BACKOFF),
        before_sleep=say,
        sleep=sleep,
    )
