"""Attaching and detaching containers: an address of the cell's subnet and a link, by handle.

All methods block, and belong to the worker's one kernel thread, so no two attachments are ever under way at once; that
is why a link without an alias whose note is not complete can only be one that a crash left.
"""

import errno
import logging
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

from bus.failpoints import failpoint
from bus.log import about
from bus.messages import Handle
from bus.records import Records
from services.silk.addresses import AddressPool, RecordedAddresses, usable
from services.silk.bandwidth import Bandwidth, remove_ifbs
from services.silk.links import GATEWAY, ContainerLink, Links, container_mac, host_interface, host_mac, is_attached
from services.silk.namespace import Namespace, NamespaceError, namespace_number, opened
from services.silk.netlink import Netlink, NetlinkError
from services.silk.notes import Note, Notes

log = logging.getLogger(__name__)


class Conflict(Exception):
    """What was asked for contradicts what is there. The text says both."""


class NotAttached(Exception):
    """The container is not attached, or not as it must be. The text says what is missing."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a container is to get. Without `address` any free one, without `mac` that of the address."""

    handle: Handle
    netns: str
    interface: str
    address: IPv4Address | None = None
    mac: str | None = None
    bandwidth: Bandwidth | None = None
    network: str | None = None


@dataclass(frozen=True, slots=True)
class Attachment:
    """A container's link, complete."""

    address: IPv4Address
    mtu: int
    mac: str

    def encode(self) -> dict[str, Any]:
        return {
            "address": str(self.address),
            "interface": host_interface(self.address),
            "mac": host_mac(self.address),
            "peer_mac": self.mac,
            "mtu": self.mtu,
            "gateway": str(GATEWAY),
        }


class Attachments:
    """The attachments of a cell. `netlink` is a socket of the namespace that the host's ends live in.

    `folder` keeps the notes and the order in which addresses were released; `bandwidth` is what containers get for
    which none is asked.
    """

    def __init__(self, netlink: Netlink, records: Records, folder: Path, bandwidth: Bandwidth) -> None:
        self._links = Links(netlink)
        self._recorded = RecordedAddresses(records)
        self._notes = Notes(folder / "attachments")
        self._released = folder / "released.json"
        self._bandwidth = bandwidth
        self._pool: AddressPool | None = None
        self._mtu = 0

    def refuse_strangers(self, subnet: IPv4Network) -> None:
        """Raise Conflict if containers have addresses outside `subnet`, where no other cell would look for them."""
        strangers = [link for link in self.clean() if link.address not in subnet]
        if strangers:
            some = ", ".join(f"{link.handle or link.link.name} ({link.address})" for link in strangers[:3])
            raise Conflict(
                f"{len(strangers)} containers of this cell are outside its subnet {subnet}, as {some}: they cannot be"
                " reached any more; move them (drain and restart the cell) and the overlay is used again"
            )

    def take_up(self, subnet: IPv4Network, mtu: int) -> None:
        """Attach in this subnet from now on, and remove what a crash left there."""
        self._pool = AddressPool(subnet, self._released)
        self._mtu = mtu
        for link in self.clean():
            note = self._notes.get(link.handle)
            if note is not None and not note.complete:  # killed just before it was noted
                self._notes.put(replace(note, complete=True))
        self._remove_ifbs()

    def resize(self, mtu: int) -> None:
        """Give containers that are attached from now on this MTU; the others keep what they know."""
        self._mtu = mtu

    def attach(self, wanted: Wanted) -> Attachment:
        """Link a container to this cell; the same handle gets the same answer again.

        Raises Conflict, Exhausted, NamespaceError, Malformed, or OSError with the kernel's reason. Then nothing was
        changed.
        """
        if self._pool is None:
            raise Conflict("this cell has no subnet yet")
        with opened(wanted.netns) as namespace:
            if namespace.is_own:  # its default route would be replaced
                raise Conflict(f"{wanted.netns} is the cell's own network namespace, not a container's")
            links = self.clean()
            keep = self._existing(links, wanted, namespace, self._pool.subnet)
            if isinstance(keep, Attachment):
                return keep
            address = self._choose(self._pool, wanted, keep, [link for link in links if link.handle != wanted.handle])
            bandwidth = wanted.bandwidth or self._bandwidth
            bandwidth.check(self._mtu)
            note = Note(wanted.handle, wanted.netns, wanted.interface, address, wanted.mac, bandwidth, wanted.network)
            self._notes.put(note)
            failpoint("silk.attach.after-address")
            try:
                number = self._links.create(note, namespace, self._mtu)
            except BaseException as error:
                with suppress(OSError):
                    self._notes.delete(wanted.handle)
                if not isinstance(error, NetlinkError) or error.errno != errno.EEXIST:
                    raise
                # It is the container's end: that nobody has the name of the host's was just seen.
                text = f"{wanted.netns} already has an interface {wanted.interface!r} that is not ours: {error}"
                raise Conflict(text) from None
            self._notes.put(replace(note, namespace=number, complete=True))
        log.info("attached", extra=about(handle=wanted.handle, address=str(address), netns=wanted.netns))
        return Attachment(address, self._mtu, self._mac(note))

    def detach(self, handle: Handle, address: IPv4Address | None, interface: str | None = None) -> None:
        """Remove the container's link and give its address back.

        `address` is what the caller knows to be its address, used when there is no link any more. A handle that is not
        attached is no error, nor is one whose interface has another name than `interface`, if that is given. Raises
        OSError with the kernel's reason.
        """
        links = self.clean()
        note = self._notes.get(handle)
        if note is not None and interface not in (None, note.interface):
            return
        # First: what is not noted is not made again by those who mend.
        self._notes.delete(handle)
        owned = [link for link in links if link.handle == handle]
        for link in owned:
            self._links.delete(link.link)
        if note is not None and note.bandwidth.egress is not None:
            self._remove_ifbs()
        failpoint("silk.detach.after-link")
        released = {link.address for link in owned}
        for each in (address, note.address if note is not None else None):
            if each is not None and all(link.address != each for link in links):
                released.add(each)
        if self._pool is not None:
            for each in released:
                self._pool.release(each)
        if owned:
            log.info("detached", extra=about(handle=handle, addresses=[str(each) for each in released]))

    def check(self, handle: Handle, netns: str, interface: str) -> Attachment:
        """The container's attachment, if it is whole at both ends. Raises NotAttached, NamespaceError or OSError."""
        link = next((link for link in self._links.all() if link.handle == handle), None)
        if link is None:
            raise NotAttached(f"container {handle!r} has no link on this cell")
        note = self._notes.get(handle)
        mac = container_mac(link.address) if note is None else self._mac(note)
        with opened(netns) as namespace:
            if not is_attached(link, namespace, interface, mac):
                raise NotAttached(f"{interface!r} in {netns} is not, or not wholly, the other end of {link.link.name}")
        return Attachment(link.address, link.link.mtu, mac)

    def all(self) -> list[ContainerLink]:
        """Every container's link, also those that somebody else made."""
        return self._links.all()

    def notes(self) -> list[Note]:
        return self._notes.all()

    def clean(self) -> list[ContainerLink]:
        """Remove the links that a crash left incomplete, and give back all others, of any subnet and any maker."""
        unfinished = {note.address for note in self._notes.all() if not note.complete}
        links = []
        for link in self._links.all():
            if link.handle or link.address not in unfinished:
                links.append(link)
            else:
                log.warning("removing an incomplete link", extra=about(interface=link.link.name))
                self._links.delete(link.link)
        return links

    def mend(self, indexes: Collection[int] | None = None) -> list[str]:
        """Give our links, all or those with these indexes, back what others took: what was mended. Raises OSError."""
        hosts = {}
        for link in self.clean():
            if link.handle and (indexes is None or link.link.index in indexes):
                note = self._notes.get(link.handle)
                hosts[link.handle] = (link, container_mac(link.address) if note is None else self._mac(note))
        return self._links.mend(hosts) if hosts else []

    def restore(self) -> list[str]:
        """Make vanished links of containers that still live anew: which. Gives up those whose namespace is gone."""
        links = self.clean()
        there = {link.handle for link in links} | {link.address for link in links}
        vanished = [note for note in self._notes.all() if not there & {note.handle, note.address}]
        done = [f"vanished link of {note.handle}" for note in vanished if self._restored(note)]
        if any(note.bandwidth.egress is not None for note in vanished):
            self._remove_ifbs()
        return done

    def _restored(self, note: Note) -> bool:
        """Whether the vanished link of a container that still lives was made anew."""
        fields = about(handle=note.handle, interface=host_interface(note.address))
        try:
            with opened(note.netns) as namespace:
                if note.complete and namespace.run(namespace_number) == note.namespace != 0:
                    self._links.create(note, namespace, self._mtu)
                    return True
        except NamespaceError:
            pass
        except OSError as error:
            log.error("a vanished link cannot be made anew", extra=fields | about(error=str(error)))
            return False
        log.info("a container's namespace is gone, and its link with it", extra=fields)
        self._notes.delete(note.handle)
        if self._pool is not None:
            self._pool.release(note.address)
        return False

    def _remove_ifbs(self) -> None:
        try:
            remove_ifbs({link.handle for link in self._links.all()})
        except OSError as error:
            log.warning("bandwidth devices are left for the next time", extra=about(error=str(error)))

    def _mac(self, note: Note) -> str:
        return note.mac or container_mac(note.address)

    def _existing(
        self, links: list[ContainerLink], wanted: Wanted, namespace: Namespace, subnet: IPv4Network
    ) -> Attachment | IPv4Address | None:
        """The handle's attachment if it is whole; the address of one that was not and is now removed; or None."""
        handle = wanted.handle
        link = next((link for link in links if link.handle == handle), None)
        if link is None:
            return None
        note = self._notes.get(handle)
        mac = container_mac(link.address) if note is None else self._mac(note)
        whole = is_attached(link, namespace, wanted.interface, mac)
        if whole is None:
            place = f"{link.link.name}, not as {wanted.interface!r} in {namespace.path}"
            raise Conflict(f"container {handle!r} is already attached elsewhere, by {place}: detach it first")
        for has, wants, what in ((link.address, wanted.address, "address"), (mac, wanted.mac, "MAC")):
            if wants is not None and wants != has:
                raise Conflict(f"container {handle!r} is already attached with {what} {has}, not {wants}: detach it")
        if whole and link.address in subnet:
            return Attachment(link.address, link.link.mtu, mac)
        log.warning("redoing a damaged link", extra=about(handle=handle, interface=link.link.name))
        self._links.delete(link.link)
        return link.address

    def _choose(
        self, pool: AddressPool, wanted: Wanted, keep: IPv4Address | None, links: list[ContainerLink]
    ) -> IPv4Address:
        """An address nobody uses: the one asked for; else the one that the container had, if nobody else has it."""
        recorded = self._recorded.by_handle()
        in_use = {link.address: link.handle or link.link.name for link in links}
        in_use |= {each: owner for owner, each in recorded.items() if owner != wanted.handle}
        if wanted.address is not None:
            return _asked(pool.subnet, wanted.address, in_use.get(wanted.address))
        for own in self._former(wanted.handle, keep, recorded.get(wanted.handle)):
            if own not in in_use and own in set(usable(pool.subnet)):
                return own
        return pool.choose(in_use)

    def _former(self, handle: Handle, *known: IPv4Address | None) -> Iterator[IPv4Address]:
        yield from (each for each in known if each is not None)
        if (note := self._notes.get(handle)) is not None:
            yield note.address


def _asked(subnet: IPv4Network, address: IPv4Address, owner: str | None) -> IPv4Address:
    """The address that was asked for. Raises Conflict if it cannot be given."""
    if address not in set(usable(subnet)):
        raise Conflict(
            f"address {address} is none that containers of this cell may have: its subnet is {subnet}, of which the"
            " first two and the last are reserved; ask for another, or for none"
        )
    if owner is not None:
        raise Conflict(f"address {address} is in use by {owner}: ask for another, or for none")
    return address
