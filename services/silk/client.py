"""Asking the Silk controller for this cell's lease."""

from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class LeaseClient:
    """The lease requests of one cell. Each raises BusAway, NoAnswer, Malformed or LeaseDenied."""

    connection: Connection
    cell: CellName
    underlay: IPv4Address
    overlay: IPv4Network

    def may_have(self, lease: Lease) -> bool:
        """Whether a lease is this cell's, as it is set up now."""
        own = (lease.cell, lease.underlay) == (self.cell, self.underlay)
        return own and lease.subnet.subnet_of(self.overlay)

    async def acquire(self) -> Tenure:
        sent = boot_clock()
        answer = await self._ask("acquire", {"underlay": str(self.underlay)})
        lease = Lease.decode(answer.mapping("lease"), f"{answer.where}: lease")
        if (lease.cell, lease.underlay) != (self.cell, self.underlay):
            raise answer.malformed("lease", f"is of {lease.cell} at {lease.underlay}, not of this cell")
        if not lease.subnet.subnet_of(self.overlay):
            raise LeaseDenied(
                f"the controller leased {lease.subnet}, which is not in the overlay network {self.overlay}:"
                " set overlay_network alike on the cell and the controller"
            )
        return Tenure(lease, sent, answer.number("expires_in"))

    async def renew(self, tenure: Tenure) -> Tenure:
        """Raises LeaseLost, too."""
        sent = boot_clock()
        answer = await self._ask("renew", {"lease": tenure.lease.encode()})
        return Tenure(tenure.lease, sent, answer.number("expires_in"))

    async def _ask(self, verb: str, message: dict[str, object]) -> Fields:
        await self.connection.wait_connected(TIMEOUT)
        answer = await self.connection.request(subjects.lease(self.cell, verb), message, timeout=TIMEOUT)
        if "error" in answer:
            error = answer.text("error")
            raise LeaseLost(error) if "lost" in answer and answer.flag("lost") else LeaseDenied(error)
        return answer
