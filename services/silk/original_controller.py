"""Leasing from the original's controller (contract/cell.md 4.3, 5.4), where a fleet is still led by it.

Its answers name no time for which a lease holds: that is `partition_tolerance`, which must not be longer than the
controller's own expiry. It knows cells by their underlay address, so names are derived from that.
"""

import asyncio
import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from bus.decode import Fields, Malformed
from bus.log import about
from bus.messages import CellName, Lease, cell_name, lease_key
from bus.tables.follower import State
from services.silk.client import LeaseDenied, LeaseLost
from services.silk.settings import WorkerSettings
from services.silk.subnets import derived_cell
from services.silk.tenure import Tenure, boot_clock

log = logging.getLogger(__name__)

TIMEOUT = 5.0
POLL_INTERVAL = 30.0
MAX_BACKOFF = 30.0
OUTSIDE_POOL = "renew-subnet-lease: overlay subnet not in pool"
"""Refused by a controller of ours (`lease_api`), whose leases outside the pool are their cells' until they end."""


@dataclass(frozen=True, slots=True)
class OriginalController:
    """The HTTP API, with mutual TLS. Certificates are read anew at each call, so that they can be replaced."""

    url: str
    ca: Path
    cert: Path
    key: Path

    async def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """HTTP's status and the JSON answered, or its text. Raises LeaseDenied when there is no answer."""
        try:
            context = ssl.create_default_context(cafile=str(self.ca))
            context.load_cert_chain(self.cert, self.key)
            async with httpx.AsyncClient(verify=context, timeout=TIMEOUT, trust_env=False) as client:
                response = await client.request(method, f"{self.url}{path}", json=body)
        except (httpx.HTTPError, OSError) as error:
            raise LeaseDenied(f"the controller at {self.url} does not answer {method} {path}: {error!r}") from None
        try:
            return response.status_code, response.json()
        except ValueError:
            return response.status_code, response.text


@dataclass(frozen=True, slots=True)
class OriginalLessor:
    """This cell's lease from that controller."""

    controller: OriginalController
    settings: WorkerSettings

    def may_have(self, lease: Lease) -> bool:
        own = (lease.cell, lease.underlay) == (self.settings.cell, self.settings.underlay)
        return own and any(lease.subnet.subnet_of(network) for network in self.settings.overlay_network)

    async def acquire(self) -> Tenure:
        sent = boot_clock()
        body = {"underlay_ip": str(self.settings.underlay), "single_overlay_ip": self.settings.single_ip_only}
        answer = await self._put("acquire", body)
        lease = decode_lease(answer, "answer of the controller", cell_name(self.settings.cell))
        if not self.may_have(lease):
            raise LeaseDenied(
                f"the controller leased {lease.subnet} to {lease.underlay}; this cell is {self.settings.underlay}, and"
                f" overlay_network is {', '.join(map(str, self.settings.overlay_network))}: set both alike"
            )
        return Tenure(lease, sent, self.settings.partition_tolerance)

    async def renew(self, tenure: Tenure) -> Tenure:
        """Raises LeaseLost, too: the controller's 409, after which the original's daemon ends (5.4)."""
        sent = boot_clock()
        await self._put("renew", encode_lease(tenure.lease))
        return Tenure(tenure.lease, sent, self.settings.partition_tolerance)

    async def release(self, tenure: Tenure) -> None:
        await self._put("release", {"underlay_ip": str(tenure.lease.underlay)})

    async def _put(self, verb: str, body: dict[str, Any]) -> Any:
        status, answer = await self.controller.call("PUT", f"/leases/{verb}", body)
        if status == 200:
            return answer
        text = answer.get("error", answer) if isinstance(answer, dict) else answer
        if status == 409 and verb == "renew" and text != OUTSIDE_POOL:
            raise LeaseLost(str(text))
        raise LeaseDenied(f"the controller at {self.controller.url} answered {verb} with {status}: {text}")


class OriginalLeases:
    """All leases that the controller lists, asked for every 30 s; those listed last while it does not answer."""

    def __init__(self, controller: OriginalController) -> None:
        self._controller = controller
        self._listeners: list[Callable[[Any], None]] = []
        self._known = asyncio.Event()
        self.entries: dict[tuple[str, ...], Lease] = {}
        self.state = State.STARTING
        self.revision = 0

    def listen(self, listener: Callable[[Any], None]) -> None:
        self._listeners.append(listener)

    async def usable(self) -> None:
        """Return once the leases have been listed."""
        await self._known.wait()

    async def run(self) -> None:
        """Run for ever."""
        while True:
            retrying = AsyncRetrying(
                retry=retry_if_exception_type((LeaseDenied, Malformed)),
                wait=wait_random_exponential(1, max=MAX_BACKOFF),
                before_sleep=self._failed,
            )
            async for attempt in retrying:
                with attempt:
                    await self._list()
            await asyncio.sleep(POLL_INTERVAL)

    async def _list(self) -> None:
        status, answer = await self._controller.call("GET", "/leases")
        if status != 200:
            raise LeaseDenied(f"the controller at {self._controller.url} answered the list with {status}: {answer}")
        entries = {}
        for item in Fields(answer, "leases").items("leases"):
            try:
                lease = decode_lease(item, "leases")
            except Malformed as error:  # it must not keep us from the others
                log.error("a lease that cannot be understood is left out", extra=about(error=str(error)))
                continue
            entries[lease_key(lease.subnet)] = lease
        self.state = State.LIVE
        if entries != self.entries or not self._known.is_set():
            self.entries = entries
            self.revision += 1
            self._known.set()
            for listener in self._listeners:
                listener(None)

    def _failed(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if self.state is State.LIVE:
            self.state = State.CACHED
        log.warning("leases cannot be listed", extra=about(attempt=state.attempt_number, error=str(error)))


def encode_lease(lease: Lease) -> dict[str, Any]:
    return {
        "underlay_ip": str(lease.underlay),
        "overlay_subnet": str(lease.subnet),
        "overlay_hardware_addr": lease.mac,
    }


def decode_lease(value: object, where: str, cell: CellName | None = None) -> Lease:
    """A lease in the original's form, of `cell` or of one named for its address. Raises Malformed."""
    fields = Fields(value, where)
    underlay = fields.address("underlay_ip")
    form = {
        "subnet": fields.text("overlay_subnet"),
        "cell": cell or derived_cell(underlay),
        "underlay": str(underlay),
        "mac": fields.text("overlay_hardware_addr").lower(),
    }
    return Lease.decode(form, where)
