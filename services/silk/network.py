"""Everything of a cell that Silk keeps in the kernel, in one object for the worker's one kernel thread.

All methods block. They work in the network namespace that the process was started in.
"""

from ipaddress import IPv4Address

from bus.messages import Handle, Lease
from bus.records import Records
from services.silk import overlay
from services.silk.attachments import Attachment, Attachments, Wanted
from services.silk.bandwidth import Bandwidth
from services.silk.netlink import Netlink
from services.silk.overlay import Device, Overlay
from services.silk.peers import Entries, Peers, Result
from services.silk.settings import WorkerSettings


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
        self._peers: Peers | None = None

    def take_up(self, lease: Lease) -> Device:
        """Set the overlay up for this lease. Raises OverlayError, Conflict or OSError."""
        self._peers = None
        # Before the device: it would be replaced under the containers that still have addresses of the old subnet.
        self._attachments.refuse_strangers(lease.subnet)
        device = overlay.ensure(self._overlay, lease)
        self._attachments.take_up(lease.subnet, device.mtu)
        self._peers = Peers(self._netlink, device.index, self._overlay.network)
        return device

    def fence(self) -> None:
        """Cut this cell off the overlay: others may have its subnet now."""
        self._peers = None
        overlay.fence(self._overlay.name)

    def converge(self, wanted: Entries, *, delete: bool, sweep: bool) -> Result:
        """Make the entries what is wanted; nothing while the overlay is not taken up. Raises OSError."""
        if self._peers is None:
            return Result(0, 0)
        return self._peers.sweep(wanted, delete=delete) if sweep else self._peers.apply(wanted, delete=delete)

    def attach(self, wanted: Wanted) -> Attachment:
        return self._attachments.attach(wanted)

    def detach(self, handle: Handle, address: IPv4Address | None) -> None:
        self._attachments.detach(handle, address)

    def containers(self) -> int:
        """How many containers have a link, whoever made it."""
        return len(self._attachments.all())
