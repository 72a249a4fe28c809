"""Asking the Silk controller for this cell's lease, over the bus."""

from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network

from bus import subjects
from bus.connection import Connection
from bus.decode import Fields
from bus.messages import CellName, Lease
from services.silk.tenure import Tenure, boot_clock

TIMEOUT = 5.0


class LeaseDenied(Exception):
    """The controller answered, and gave no lease. The text is its reason."""


class LeaseLost(Exception):
    """The lease is not this cell's any more: it must not be used from now on."""


@dataclass(slots=True)
class LeaseClient:
    """The lease requests of one cell. Each raises BusAway, NoAnswer, Malformed or LeaseDenied."""

    connection: Connection
    cell: CellName
    underlay: IPv4Address
    overlay: tuple[IPv4Network, ...]
    single: bool = False
    _had: IPv4Network | None = field(default=None, init=False)
    """The subnet last used, which is asked for again when it was lost: containers may still have its addresses."""

    def may_have(self, lease: Lease) -> bool:
        """Whether a lease is this cell's, as it is set up now."""
        return (lease.cell, lease.underlay) == (self.cell, self.underlay) and self._in_overlay(lease)

    async def acquire(self) -> Tenure:
        sent = boot_clock()
        wish = {} if self._had is None else {"subnet": str(self._had)}
        answer = await self._ask("acquire", {"underlay": str(self.underlay), "single": self.single, **wish})
        lease = Lease.decode(answer.mapping("lease"), f"{answer.where}: lease")
        if (lease.cell, lease.underlay) != (self.cell, self.underlay):
            raise answer.malformed("lease", f"is of {lease.cell} at {lease.underlay}, not of this cell")
        if not self._in_overlay(lease):
            networks = ", ".join(map(str, self.overlay))
            raise LeaseDenied(
                f"the controller leased {lease.subnet}, which is not in the overlay network {networks}:"
                " set overlay_network alike on the cell and the controller"
            )
        self._had = lease.subnet
        return Tenure(lease, sent, answer.number("expires_in"))

    async def renew(self, tenure: Tenure) -> Tenure:
        """Raises LeaseLost, too."""
        self._had = tenure.lease.subnet
        sent = boot_clock()
        answer = await self._ask("renew", {"lease": tenure.lease.encode()})
        return Tenure(tenure.lease, sent, answer.number("expires_in"))

    async def release(self, tenure: Tenure) -> None:
        """Give the lease back; one that is not there any more is no error."""
        await self._ask("release", {"lease": tenure.lease.encode()})

    def _in_overlay(self, lease: Lease) -> bool:
        return any(lease.subnet.subnet_of(network) for network in self.overlay)

    async def _ask(self, verb: str, message: dict[str, object]) -> Fields:
        await self.connection.wait_connected(TIMEOUT)
        answer = await self.connection.request(subjects.lease(self.cell, verb), message, timeout=TIMEOUT)
        if "error" in answer:
            error = answer.text("error")
            raise LeaseLost(error) if "lost" in answer and answer.flag("lost") else LeaseDenied(error)
        return answer
