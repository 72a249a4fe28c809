"""Everything of a cell that Silk keeps in the kernel, in one object for the worker's one kernel thread.

All methods block. They work in the network namespace that the process was started in.
"""

from dataclasses import dataclass, field
from ipaddress import IPv4Address

from bus.messages import Handle, Lease
from bus.records import Records
from services.silk import overlay
from services.silk.attachments import Attachment, Attachments, Wanted
from services.silk.bandwidth import Bandwidth
from services.silk.namespace import write_sysctl
from services.silk.netlink import Netlink
from services.silk.notes import Note
from services.silk.overlay import Device, Overlay
from services.silk.peers import Entries, Peers, Result
from services.silk.problems import Facts, Problem, find
from services.silk.settings import WorkerSettings
from services.silk.watch import Noticed, Watch


@dataclass(slots=True)
class Inspection:
    """What a look at the kernel found and mended, in words; and whether the entries need a sweep.

    `device` is the overlay device as it is now, if it was looked at and is in use.
    """

    mended: list[str] = field(default_factory=list)
    sweep: bool = False
    device: Device | None = None


class CellNetwork:
    """The overlay device, the entries that lead to the other cells, and the containers' links."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._overlay = Overlay(
            settings.overlay_network,
            settings.underlay,
            settings.vni,
            settings.vtep_port,
            settings.vtep_name,
            settings.mtu,
        )
        self._netlink = Netlink()
        records = Records(settings.containers_dir)
        bandwidth = Bandwidth.both_ways(settings.bandwidth_rate, settings.bandwidth_burst)
        self._attachments = Attachments(self._netlink, records, settings.state_dir / "silk", bandwidth)
        self._lease: Lease | None = None
        self._peers: Peers | None = None
        self._fenced = False

    def take_up(self, lease: Lease) -> Device:
        """Set the overlay up for this lease. Raises OverlayError, Conflict or OSError."""
        self._peers = None
        # Before the device: it would be replaced under the containers that still have addresses of the old subnet.
        self._attachments.refuse_strangers(lease.subnet)
        device = overlay.ensure(self._overlay, lease)
        self._attachments.take_up(lease.subnet, device.mtu)
        self._peers = Peers(self._netlink, device.index, self._overlay.networks)
        self._lease, self._fenced = lease, False
        return device

    def fence(self) -> None:
        """Cut this cell off the overlay: others may have its subnet now."""
        self._peers = None
        self._fenced = True
        overlay.fence(self._overlay)

    def remove(self) -> None:
        """Take the overlay down for good. Raises OverlayError or OSError."""
        self._peers = None
        overlay.remove(self._overlay)

    def stands(self) -> bool:
        """Whether there is an overlay device, from before perhaps."""
        return overlay.index(self._overlay) is not None

    def converge(self, wanted: Entries, *, delete: bool, sweep: bool) -> Result:
        """Make the entries what is wanted; nothing while the overlay is not taken up. Raises OSError."""
        if self._peers is None:
            return Result(0, 0)
        return self._peers.sweep(wanted, delete=delete) if sweep else self._peers.apply(wanted, delete=delete)

    def watch(self) -> Watch:
        """A socket that hears what others change, from now on."""
        links = [link.link for link in self._attachments.all()]
        ours = {self._netlink.port}
        return Watch(
            self._overlay.networks,
            self._overlay.name,
            overlay.index(self._overlay),
            ours=ours,
            links=links,
            underlay=self._overlay.underlay,
            underlay_index=overlay.underlay_index(self._overlay),
        )

    def inspect(self, noticed: Noticed) -> Inspection:
        """Look at what was noticed, and mend it; the entries are for `converge`. Raises OverlayError or OSError."""
        found = Inspection()
        if noticed.device or noticed.all:
            self._inspect_device(found)
        if self._peers is not None:
            entries = noticed.entries or noticed.all
            found.sweep = found.sweep or entries or self._peers.contradicts(noticed.forwarding, noticed.neighbours)
        if noticed.links or noticed.down or noticed.all:
            found.mended += self._attachments.mend(None if noticed.all else noticed.links | noticed.down)
        if noticed.vanished or noticed.all:
            found.mended += self._attachments.restore()
        if (noticed.settings or noticed.all) and self.containers() and write_sysctl("ipv4/ip_forward", "1"):
            found.mended.append("net.ipv4.ip_forward")
        return found

    def attach(self, wanted: Wanted) -> Attachment:
        return self._attachments.attach(wanted)

    def detach(self, handle: Handle, address: IPv4Address | None, interface: str | None = None) -> None:
        self._attachments.detach(handle, address, interface)

    def check(self, handle: Handle, netns: str, interface: str) -> Attachment:
        return self._attachments.check(handle, netns, interface)

    def notes(self) -> list[Note]:
        return self._attachments.notes()

    def problems(self, own: Lease | None, leases: list[Lease]) -> list[Problem]:
        """What on this cell is in the way. Raises OSError."""
        return find(Facts(self._overlay, own, leases, self._attachments.all()))

    def containers(self) -> int:
        """How many containers have a link, whoever made it."""
        return len(self._attachments.all())

    def _inspect_device(self, found: Inspection) -> None:
        if self._fenced:
            if overlay.fence(self._overlay):
                found.mended.append("the overlay device was set up though the cell is fenced")
        elif self._peers is not None and self._lease is not None:
            found.device = device = overlay.ensure(self._overlay, self._lease)
            self._attachments.resize(device.mtu)
            if device.changes:
                # Going down takes entries with it, and another device has none.
                self._peers = Peers(self._netlink, device.index, self._overlay.networks)
                found.mended += [f"overlay device: {change}" for change in device.changes]
                found.sweep = True
