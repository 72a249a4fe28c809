"""What may pass, said the short way: by looking at every policy, group and container for each probe.

Nothing here is shared with what makes rules, but for the types.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from bus.messages import Container, Ports, SecurityGroup, Workload
from bus.security_groups import EgressRule

Place = tuple[str, IPv4Address]
"""("container", its address), ("cell", a cell's address), or ("outside", any other)."""


@dataclass(frozen=True)
class World:
    """All that decides. `cells`: container's address -> its cell's; `policies`: (source, destination) -> ports."""

    containers: Mapping[IPv4Address, Container]
    cells: Mapping[IPv4Address, IPv4Address]
    tagged: frozenset[str]
    policies: Mapping[tuple[str, str], tuple[Ports, ...]]
    groups: tuple[SecurityGroup, ...]
    denied: Mapping[Workload | None, tuple[IPv4Network, ...]]


def passes(world: World, source: Place, to: IPv4Address, protocol: str, port: int) -> bool:
    """Whether a new flow gets through, if something listens there."""
    container = world.containers.get(source[1]) if source[0] == "container" else None
    if to in world.containers:
        return container is not None and by_policy(world, container, world.containers[to], protocol, port)
    if to in world.cells.values():
        if container is not None and container.address is not None and world.cells[container.address] == to:
            taken = forwarded(world, to, protocol, port)
            return taken is not None and by_policy(world, container, taken[0], protocol, taken[1])
        return forwarded(world, to, protocol, port) is not None and (
            container is None or by_group(world, container, to, protocol, port)
        )
    return container is not None and by_group(world, container, to, protocol, port)


def by_policy(world: World, source: Container, to: Container, protocol: str, port: int) -> bool:
    if source.app is None or to.app is None or source.app not in world.tagged:
        return False
    allowed = world.policies.get((source.app, to.app), ())
    return any(each.protocol == protocol and each.start <= port <= each.end for each in allowed)


def forwarded(world: World, cell: IPv4Address, protocol: str, port: int) -> tuple[Container, int] | None:
    for address, container in world.containers.items():
        for each in container.forwards if world.cells[address] == cell else ():
            if (each.protocol, each.host_port) == (protocol, port):
                return container, each.container_port
    return None


def by_group(world: World, container: Container, to: IPv4Address, protocol: str, port: int) -> bool:
    workload = Workload.APP if container.workload is Workload.TASK else container.workload
    if any(to in network for kind in (None, workload) for network in world.denied.get(kind, ())):
        return False
    rules = [*container.opened]
    if container.space is None:
        rules += container.egress
    elif workload is not None:
        for group in world.groups:
            staging = workload is Workload.STAGING
            bound = group.staging_spaces if staging else group.running_spaces
            default = group.staging_default if staging else group.running_default
            rules += group.rules if default or container.space in bound else ()
    return any(lets(rule, to, protocol, port) for rule in rules)


def lets(rule: EgressRule, to: IPv4Address, protocol: str, port: int) -> bool:
    there = any(each.first <= to <= each.last for each in rule.destinations)
    ports = not rule.ports or any(start <= port <= end for start, end in rule.ports)
    return there and rule.protocol in ("all", protocol) and ports
