"""Attaching and detaching containers: an address of the cell's subnet and a link, by handle.

All methods block, and belong to the worker's one kernel thread, so no two attachments are ever under way at once; that
is why a link without an alias can only be one that a crash left.
"""

import errno
import logging
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

from bus.failpoints import failpoint
from bus.log import about
from bus.messages import Handle
from bus.records import Records
from services.silk.addresses import AddressPool, RecordedAddresses, usable
from services.silk.links import GATEWAY, ContainerLink, Links, container_mac, host_interface, host_mac, is_attached
from services.silk.namespace import Namespace, opened
from services.silk.netlink import Netlink, NetlinkError

log = logging.getLogger(__name__)


class Conflict(Exception):
    """What was asked for contradicts what is there. The text says both."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """A container's link, complete."""

    address: IPv4Address
    mtu: int

    def encode(self) -> dict[str, Any]:
        return {
            "address": str(self.address),
            "interface": host_interface(self.address),
            "mac": host_mac(self.address),
            "peer_mac": container_mac(self.address),
            "mtu": self.mtu,
            "gateway": str(GATEWAY),
        }


class Attachments:
    """The attachments of a cell. `netlink` is a socket of the namespace that the host's ends live in.

    `released` is the file that remembers the order in which addresses were released.
    """

    def __init__(self, netlink: Netlink, records: Records, released: Path) -> None:
        self._links = Links(netlink)
        self._recorded = RecordedAddresses(records)
        self._released = released
        self._pool: AddressPool | None = None
        self._mtu = 0

    def refuse_strangers(self, subnet: IPv4Network) -> None:
        """Raise Conflict if containers have addresses outside `subnet`, where no other cell would look for them."""
        strangers = [link for link in self._links.all() if link.handle and link.address not in subnet]
        if strangers:
            some = ", ".join(f"{link.handle} ({link.address})" for link in strangers[:3])
            raise Conflict(
                f"{len(strangers)} containers of this cell are outside its subnet {subnet}, as {some}: detach them"
            )

    def take_up(self, subnet: IPv4Network, mtu: int) -> None:
        """Attach in this subnet from now on, and remove the links that a crash left there."""
        self._pool = AddressPool(subnet, self._released)
        self._mtu = mtu
        self.clean()

    def attach(self, handle: Handle, netns: str, interface: str) -> Attachment:
        """Link the container's namespace, at path `netns`, to this cell; the same handle gets the same answer again.

        Raises Conflict, Exhausted, NamespaceError, or OSError with the kernel's reason. Then nothing was changed.
        """
        if self._pool is None:
            raise Conflict("this cell has no subnet yet")
        with opened(netns) as namespace:
            links = self.clean()
            keep = self._existing(links, handle, namespace, interface, self._pool.subnet)
            if isinstance(keep, Attachment):
                return keep
            address = self._choose(self._pool, handle, keep, [link for link in links if link.handle != handle])
            failpoint("silk.attach.after-address")
            try:
                self._links.create(handle, address, namespace, interface, self._mtu)
            except NetlinkError as error:
                if error.errno != errno.EEXIST:
                    raise
                # It is the container's end: that nobody has the name of the host's was just seen.
                raise Conflict(f"{netns} already has an interface {interface!r} that is not ours: {error}") from None
        log.info("attached", extra=about(handle=handle, address=str(address), netns=netns))
        return Attachment(address, self._mtu)

    def detach(self, handle: Handle, address: IPv4Address | None) -> None:
        """Remove the container's link and give its address back.

        `address` is what the caller knows to be its address, used when there is no link any more. A handle that is not
        attached is no error. Raises OSError with the kernel's reason.
        """
        links = self.clean()
        owned = [link for link in links if link.handle == handle]
        for link in owned:
            self._links.delete(link.link)
        failpoint("silk.detach.after-link")
        released = {link.address for link in owned}
        if address is not None and all(link.address != address for link in links):
            released.add(address)
        if self._pool is not None:
            for each in released:
                self._pool.release(each)
        if owned:
            log.info("detached", extra=about(handle=handle, addresses=[str(each) for each in released]))

    def clean(self) -> list[ContainerLink]:
        """Remove the links that a crash left incomplete, and give back the complete ones, of any subnet."""
        complete = []
        for link in self._links.all():
            if link.handle:
                complete.append(link)
            elif self._pool is not None and link.address in self._pool.subnet:
                log.warning("removing an incomplete link", extra=about(interface=link.link.name))
                self._links.delete(link.link)
        return complete

    def _existing(
        self, links: list[ContainerLink], handle: Handle, namespace: Namespace, interface: str, subnet: IPv4Network
    ) -> Attachment | IPv4Address | None:
        """The handle's attachment if it is whole; the address of one that was not and is now removed; or None."""
        link = next((link for link in links if link.handle == handle), None)
        if link is None:
            return None
        whole = is_attached(link, namespace, interface)
        if whole is None:
            place = f"{link.link.name}, not as {interface!r} in {namespace.path}"
            raise Conflict(f"container {handle!r} is already attached elsewhere, by {place}: detach it first")
        if whole and link.address in subnet:
            return Attachment(link.address, link.link.mtu)
        log.warning("redoing a damaged link", extra=about(handle=handle, interface=link.link.name))
        self._links.delete(link.link)
        return link.address

    def _choose(
        self, pool: AddressPool, handle: Handle, keep: IPv4Address | None, links: list[ContainerLink]
    ) -> IPv4Address:
        """An address nobody uses; the one that the container had, if it had one and nobody else does."""
        recorded = self._recorded.by_handle()
        in_use = {link.address for link in links} | {each for owner, each in recorded.items() if owner != handle}
        for own in (keep, recorded.get(handle)):
            if own is not None and own not in in_use and own in set(usable(pool.subnet)):
                return own
        return pool.choose(in_use)
