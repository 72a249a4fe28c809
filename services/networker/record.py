"""An attachment: one container on the overlay, and how it is kept in its container record.

What every service must know of a container (address, interface, app) are the record's own fields. What only the
networker needs to answer its runtime again stands under the key `silkbus` of the record's metadata.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Any

from bus.decode import Fields
from bus.messages import AppId, Container, Handle, Stage

OURS = "silkbus"


@dataclass(frozen=True, slots=True)
class Link:
    """What the silk worker made for a container: its address, and a veth from `interface` on the cell."""

    address: IPv4Address
    interface: str
    mac: str
    peer_mac: str
    mtu: int
    gateway: IPv4Address

    @classmethod
    def decode(cls, fields: Fields) -> "Link":
        """Read the answer of /attach. Raises Malformed."""
        return cls(
            address=fields.address("address"),
            interface=fields.text("interface", max_length=15),
            mac=fields.text("mac"),
            peer_mac=fields.text("peer_mac"),
            mtu=fields.integer("mtu", low=68, high=65535),
            gateway=fields.address("gateway"),
        )


@dataclass(frozen=True, slots=True)
class Attachment:
    """A container as its runtime wants it attached and, once `link` is there, as it is attached.

    `ifname` is the interface's name in the container; `network` the runtime's name of the network; `metadata` what the
    runtime says of the container, kept unread.
    """

    handle: Handle
    netns: str
    ifname: str
    network: str
    app: AppId | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    link: Link | None = None

    def record(self, stage: Stage) -> Container:
        ours: dict[str, Any] = {"ifname": self.ifname, "network": self.network}
        if self.link is not None:
            link = self.link
            ours |= {"mac": link.mac, "peer_mac": link.peer_mac, "mtu": link.mtu, "gateway": str(link.gateway)}
        return Container(
            handle=self.handle,
            netns=self.netns,
            stage=stage,
            app=self.app,
            address=None if self.link is None else self.link.address,
            interface=None if self.link is None else self.link.interface,
            metadata={**self.metadata, OURS: ours},
        )

    @classmethod
    def of(cls, record: Container) -> "Attachment":
        """The attachment that a record tells of. Raises Malformed for one that this networker did not write."""
        where = f"record of {record.handle}"
        fields = Fields(record.metadata.get(OURS), f"{where}: metadata.{OURS}")
        link = None
        if record.address is not None and record.interface is not None:
            link = Link(
                address=record.address,
                interface=record.interface,
                mac=fields.text("mac"),
                peer_mac=fields.text("peer_mac"),
                mtu=fields.integer("mtu"),
                gateway=fields.address("gateway"),
            )
        return cls(
            handle=record.handle,
            netns=record.netns,
            ifname=fields.text("ifname"),
            network=fields.text("network"),
            app=record.app,
            metadata={name: value for name, value in record.metadata.items() if name != OURS},
            link=link,
        )
