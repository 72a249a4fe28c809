"""A flow as this cell sees it: which containers are its ends here, and the packet that its rules meet for each.

At the destination's cell the packet comes by the VTEP with the source's tag, or from a container of the same cell; at
the source's it goes to the overlay, to a container here, to the underlay, or to the cell itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address

from bus.messages import AppId, Container
from services.enforcer.model import Model
from services.enforcer.rules import GUESTS
from services.enforcer.settings import EnforcerSettings
from services.enforcer.walk import Packet

UNNAMED = "?"
"""A link that nobody named: of a container whose plugin did not, or to nowhere."""


class CannotExplain(ValueError):
    """The question has no answer on this cell. The text says why, and what to ask instead."""


@dataclass(frozen=True, slots=True)
class Flow:
    """What is asked about: apps or addresses, at least one of which is of this cell."""

    source: AppId | IPv4Address
    destination: AppId | IPv4Address
    protocol: str
    port: int = 0
    icmp: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class View:
    """One container as an end of the flow, the app that sends, and the packet that its cell sees."""

    container: Container
    outgoing: bool
    app: AppId | None
    packet: Packet

    @property
    def address(self) -> IPv4Address:
        assert self.container.address is not None  # noqa: S101 (the model has no container without)
        return self.container.address

    @property
    def chain(self) -> str:
        """The built-in chain that the packet meets: what does not leave the host comes in."""
        return "FORWARD" if self.packet.out else "INPUT"


def views(settings: EnforcerSettings, model: Model, flow: Flow, out: str | None) -> list[View]:
    """The ends of a flow on this cell. Raises CannotExplain.

    `out` is the link by which this host sends to an address off the overlay, empty for its own; else None.
    """
    sources, destinations = _containers(model, flow.source), _containers(model, flow.destination)
    if isinstance(flow.source, IPv4Address) and not sources:
        lease = model.lease_of(flow.source)
        hint = "ask for it by its app" if lease is None else f"it is on cell {lease.cell}: ask there, or by its app"
        raise CannotExplain(f"source: {flow.source} is no container of this cell; {hint}")
    app = sources[0].app if isinstance(flow.source, IPv4Address) else flow.source
    tag = None if app is None else model.tags.get(app)
    # From and to somewhere on the overlay, which is all that is known of an end on another cell.
    overlay = settings.overlay_network[0]
    coming = Packet(overlay[0], overlay[-1], flow.protocol, flow.port, settings.vtep_name, mark=int(tag or 0))
    coming = replace(coming, icmp=flow.icmp)
    # On one cell both ends see the same packet, so it is followed as it comes from the first of the sources.
    arriving = _from(settings, model, coming, sources[0]) if sources else coming
    made = [View(to, False, app, _to(settings, arriving, to)) for to in destinations]
    for source in sources:
        packet = _from(settings, model, coming, source)
        if not isinstance(flow.destination, IPv4Address):
            packet = replace(packet, out=settings.vtep_name)
        elif destinations:
            packet = _to(settings, packet, destinations[0])
        else:
            packet = replace(packet, destination=flow.destination, out=_way(settings, model, flow.destination, out))
        made.append(View(source, True, source.app, packet))
    return made


def _way(settings: EnforcerSettings, model: Model, address: IPv4Address, out: str | None) -> str:
    """The link by which a packet for an address of no container here leaves."""
    if out is not None:
        return out
    lease = model.lease_of(address)
    return UNNAMED if lease is None or lease.cell == settings.cell else settings.vtep_name


def _containers(model: Model, end: AppId | IPv4Address) -> Sequence[Container]:
    addresses = [end] if isinstance(end, IPv4Address) else sorted(model.addresses_of(end))
    return [container for at in addresses if (container := model.container_at(at)) is not None]


def _link(settings: EnforcerSettings, container: Container) -> tuple[str, int]:
    """A container's link, and its device group, which tells those that are not ours."""
    name = container.interface or UNNAMED
    return name, 0 if name.startswith(settings.link_prefix) else GUESTS


def _from(settings: EnforcerSettings, model: Model, packet: Packet, container: Container) -> Packet:
    tag = None if container.app is None else model.tags.get(container.app)
    link, group = _link(settings, container)
    address = container.address or packet.source
    return replace(packet, source=address, by=link, by_group=group, mark=int(tag or 0))


def _to(settings: EnforcerSettings, packet: Packet, container: Container) -> Packet:
    link, group = _link(settings, container)
    return replace(packet, destination=container.address or packet.destination, out=link, out_group=group)
