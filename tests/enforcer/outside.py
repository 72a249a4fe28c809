"""What lies beyond the cells: hosts of the underlay and further away, and containers that say where they may go."""

import socket
from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Address

from bus.messages import PortForward, Protocol, SecurityGroup, Workload
from bus.security_groups import AddressRange, EgressProtocol, EgressRule, GroupId, SpaceId
from bus.tables import Update
from tests.enforcer.conftest import Enforcer
from tests.enforcer.world import Box, Cell, Echo, dial, inside, run

ROUTER = IPv4Address("10.77.0.99")
NEAR, FAR, THIRD = (IPv4Address(f"198.51.100.{n}") for n in (1, 2, 3))
METADATA = IPv4Address("169.254.169.254")
SPACE = SpaceId("space-1")


class Outside:
    """One host with all the addresses beyond, which is the cells' way to them; it echoes on these ports."""

    def __init__(self, cells: list[Cell], *ports: int) -> None:
        self.network = cells[0].network
        self.network.ip(
            f"addr add {ROUTER}/24 dev br0",
            *(f"addr add {address}/32 dev lo" for address in (NEAR, FAR, THIRD, METADATA)),
        )
        for cell in cells:
            cell.ip(f"route add default via {ROUTER}")
            # The way to containers, so that only rules can be what is in the way.
            self.network.ip(f"route add {cell.subnet} via {cell.underlay}")
        everywhere = (ROUTER, NEAR, FAR, THIRD, METADATA)
        self.echoes = [Echo(self.network, port, str(address)) for port in ports for address in everywhere]

    def reaches(self, address: IPv4Address, port: int) -> bool:
        """Whether this host can open a connection to there."""
        return connects(lambda: dial(self.network, address, port, source=ROUTER))


def connects(connect: Callable[[], socket.socket]) -> bool:
    try:
        connect().close()
    except (ConnectionRefusedError, TimeoutError, OSError):
        return False
    return True


def reaches(box: Box, address: IPv4Address | str, port: int) -> bool:
    """Whether a container can open a TCP connection to there."""
    return connects(lambda: dial(box, address, port, source=box.address))


def answered(box: Box, address: IPv4Address | str, port: int) -> bool:
    """Whether a datagram from a container comes back."""

    def made() -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.bind((str(box.address), 0))
        made.settimeout(1.0)
        made.connect((str(address), port))
        return made

    with inside(box.name, made) as sender:
        try:
            sender.send(b"x")
            return sender.recv(16) == b"x"
        except OSError:
            return False


def may(
    protocol: str, to: str, *ports: int | tuple[int, int], icmp: tuple[int | None, int | None] | None = None
) -> EgressRule:
    """A rule: `may("tcp", "10.0.0.0/8", 80, (8000, 8100))`."""
    spans = tuple((port, port) if isinstance(port, int) else port for port in ports)
    kind, code = icmp or (None, None)
    destinations = tuple(AddressRange.parse(each) for each in to.split(","))
    return EgressRule(EgressProtocol(protocol), destinations, spans, kind, code)


def group(name: str, *rules: EgressRule, running: str = "", staging: str = "") -> SecurityGroup:
    """A group; `running` and `staging` are "default", or the space it is bound to."""
    return SecurityGroup(
        GroupId(name),
        name,
        rules,
        running_default=running == "default",
        staging_default=staging == "default",
        running_spaces=frozenset({SpaceId(running)} - {"default", ""}),
        staging_spaces=frozenset({SpaceId(staging)} - {"default", ""}),
    )


async def tell_groups(enforcer: Enforcer, *groups: SecurityGroup, gone: tuple[str, ...] = ()) -> None:
    """A revision of the table of security groups; returns when the kernel has it."""
    changes: dict[tuple[str, ...], SecurityGroup | None] = {(each.guid,): each for each in groups}
    enforcer.reconciler.update_security_groups(
        Update(enforcer.reconciler.revision, changes | {(g,): None for g in gone})
    )
    enforcer.reconciler.use_security_groups(True)
    await enforcer.settled()


def of(
    box: Box,
    workload: Workload | None = Workload.APP,
    *,
    space: SpaceId | None = SPACE,
    egress: tuple[EgressRule, ...] = (),
    opened: tuple[EgressRule, ...] = (),
    forwards: tuple[PortForward, ...] = (),
    ports: tuple[int, ...] = (),
) -> Box:
    """The container, as its runtime describes it."""
    box.container = replace(
        box.container, workload=workload, space=space, egress=egress, opened=opened, forwards=forwards, ports=ports
    )
    return box


def forward(host_port: int, container_port: int, protocol: str = "tcp") -> PortForward:
    return PortForward(host_port, container_port, Protocol(protocol))


def attach_foreign(cell: Cell, box: Box, name: str, bridge: str | None = None) -> None:
    """Attach a container as another CNI plugin would: a link with a name of its own, perhaps on a bridge."""
    run(f"ip -n {cell.name} link set {box.link} down")
    run(f"ip -n {cell.name} link set {box.link} name {name}")
    if bridge is not None:
        cell.ip(f"addr flush dev {name}", f"link set {name} master {bridge}")
    cell.ip(f"link set {name} up")
    if bridge is None:
        cell.ip(f"route replace {box.address}/32 dev {name} scope link")
    box.link = name
    box.container = replace(box.container, interface=None)
