"""An attachment: one container, how it is attached, and how it is kept in its container record.

What every service must know of a container (address, interface, app, forwards, egress) are the record's own fields.
What only the networker needs, to answer its runtime again and to take the container apart, stands under the key
`silkbus` of the record's metadata.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Any

from bus.decode import Fields
from bus.messages import Container, Handle, PortForward, Stage
from bus.security_groups import EgressRule
from services.networker.identity import Identity

OURS = "silkbus"


@dataclass(frozen=True, slots=True)
class Link:
    """A container's address, and what leads to it: a veth from `interface` on the cell.

    Only the address is sure. The silk worker says the rest, too; another plugin says of it what it will.
    """

    address: IPv4Address
    interface: str | None = None
    mac: str | None = None
    peer_mac: str | None = None
    mtu: int | None = None
    gateway: IPv4Address | None = None

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

    `ifname` is the interface's name in the container; `network` the runtime's name of the network. `forwards` to
    `opened` are as `bus.messages.Container` has them. `wishes` are what /attach of the silk worker takes beside the
    container: bandwidth, address, mac. `birth` tells this attachment from an earlier one of the same handle.

    `plugins` is a list of CNI plugins that attach it (services.networker.plugins), `result` the CNI result of those or,
    where a runtime ran them, of the plugins before ours; empty and None where the silk worker alone does it.

    `source` is the namespace that is to be mounted at `netns` first; in a record only `mounted` says that it was.
    `redirects` are rules for the container's own table nat. `changing` is so while the enforcer may not know what the
    record says. `asked_egress` is egress as the runtime gave it, for other plugins, and not recorded.
    """

    handle: Handle
    netns: str
    ifname: str
    network: str
    identity: Identity = field(default_factory=Identity)
    forwards: tuple[PortForward, ...] = ()
    egress: tuple[EgressRule, ...] = ()
    opened: tuple[EgressRule, ...] = ()
    wishes: Mapping[str, Any] = field(default_factory=dict)
    birth: str = ""
    plugins: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] | None = None
    source: str | None = None
    mounted: bool = False
    redirects: tuple[str, ...] = ()
    changing: bool = False
    asked_egress: tuple[Any, ...] = ()
    link: Link | None = None

    def record(self, stage: Stage) -> Container:
        ours: dict[str, Any] = {"ifname": self.ifname, "network": self.network}
        ours |= {"birth": self.birth} if self.birth else {}
        ours |= {"wishes": dict(self.wishes)} if self.wishes else {}
        ours |= {"plugins": dict(self.plugins)} if self.plugins else {}
        ours |= {"result": dict(self.result)} if self.result is not None else {}
        ours |= {"mounted": True} if self.mounted or self.source is not None else {}
        ours |= {"redirects": list(self.redirects)} if self.redirects else {}
        ours |= {"changing": True} if self.changing else {}
        if (link := self.link) is not None:
            gateway = None if link.gateway is None else str(link.gateway)
            ours |= {"mac": link.mac, "peer_mac": link.peer_mac, "mtu": link.mtu, "gateway": gateway}
        return Container(
            handle=self.handle,
            netns=self.netns,
            stage=stage,
            app=self.identity.app,
            address=None if self.link is None else self.link.address,
            interface=None if self.link is None else self.link.interface,
            workload=self.identity.workload,
            space=self.identity.space,
            ports=self.identity.ports,
            forwards=self.forwards,
            egress=self.egress,
            opened=self.opened,
            metadata={**self.identity.metadata, OURS: ours},
        )

    @classmethod
    def of(cls, record: Container) -> "Attachment":
        """The attachment that a record tells of. Raises Malformed for one that this networker did not write."""
        fields = Fields(record.metadata.get(OURS), f"record of {record.handle}: metadata.{OURS}")
        link = None
        if record.address is not None:
            link = Link(
                address=record.address,
                interface=record.interface,
                mac=fields.optional_text("mac"),
                peer_mac=fields.optional_text("peer_mac"),
                mtu=fields.integer("mtu") if "mtu" in fields else None,
                gateway=fields.address("gateway") if "gateway" in fields else None,
            )
        metadata = {name: value for name, value in record.metadata.items() if name != OURS}
        return cls(
            handle=record.handle,
            netns=record.netns,
            ifname=fields.text("ifname"),
            network=fields.text("network"),
            identity=Identity(record.app, record.workload, record.space, record.ports, metadata),
            forwards=record.forwards,
            egress=record.egress,
            opened=record.opened,
            wishes=fields.mapping("wishes") if "wishes" in fields else {},
            birth=fields.optional_text("birth") or "",
            plugins=fields.mapping("plugins") if "plugins" in fields else {},
            result=fields.mapping("result") if "result" in fields else None,
            mounted=fields.flag("mounted") if "mounted" in fields else False,
            redirects=tuple(map(str, fields.items("redirects"))) if "redirects" in fields else (),
            changing=fields.flag("changing") if "changing" in fields else False,
            link=link,
        )
