"""What is wanted, as the tables and the cell's containers say it, indexed by what a change of it touches.

Fed in the event loop by updates of the replicas and by containers; whoever plans an apply takes `touched`, which names
what may look different now, and asks for the content of just that. Nothing here knows the kernel.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network

from bus.messages import AppId, Container, Handle, Lease, Ports, Revision, SecurityGroup, Tag
from bus.tables import Update
from services.enforcer.groups import Groups, Reach
from services.enforcer.tree import Sources, group_of

INGRESS_ROUTER = AppId("INGRESS_ROUTER")
"""The policy group of a router on the overlay, which has a tag but no containers (contract/cell.md 6.2)."""


@dataclass(slots=True)
class Touched:
    """What may look different since the last apply."""

    everything: bool = False
    routine: bool = False
    """Everything only because it is time to look: no reason to look at flows unless rules prove different."""
    apps: dict[AppId, dict[Tag, bool]] = field(default_factory=lambda: defaultdict(dict))
    """Apps on this cell whose chains change, and the source tags by which: True if a port was taken away."""
    groups: set[IPv4Network] = field(default_factory=set)
    addresses: set[IPv4Address] = field(default_factory=set)
    """Addresses whose own tag, or whose container, changes."""
    recheck: set[IPv4Address] = field(default_factory=set)
    """Addresses all of whose flows may not be allowed: they passed to another container, or who may reach it changed
    other than by policies."""
    peers: bool = False
    egress: bool = False
    """What containers may reach off the overlay."""
    forwards: bool = False
    """Which ports are forwarded to whom."""
    released: set[IPv4Address] = field(default_factory=set)
    """Addresses that a container gave up: whoever has one now must not inherit its flows."""

    def __bool__(self) -> bool:
        changed = self.apps or self.groups or self.addresses or self.recheck or self.released
        return self.everything or self.peers or self.egress or self.forwards or bool(changed)


class Model:
    def __init__(self) -> None:
        self.revision = Revision(0)
        self.touched = Touched()
        self.containers: dict[Handle, Container] = {}
        self.security_groups = Groups()
        self._policies: dict[AppId, dict[AppId, tuple[Ports, ...]]] = defaultdict(dict)
        self._destinations: dict[AppId, set[AppId]] = defaultdict(set)
        self._tags: dict[AppId, Tag] = {}
        self._instances: dict[AppId, set[Handle]] = defaultdict(set)
        # The last admitted container of an address owns it; an earlier one can only be a record left behind.
        self._owners: dict[IPv4Address, list[Handle]] = {}
        self._groups: dict[IPv4Network, set[IPv4Address]] = defaultdict(set)
        self._leases: dict[tuple[str, ...], Lease] = {}

    # Feeding

    def update_policies(self, update: Update[tuple[Ports, ...] | Tag]) -> None:
        """Take one revision of the `policies` table: policies and tags."""
        for key, value in update.changes.items():
            match key, value:
                case ("policy", destination, source), (tuple() | None) as ports:
                    self._policy(AppId(destination), AppId(source), ports)
                case ("tag", app), (int() | None) as tag:
                    self._tag(AppId(app), None if tag is None else Tag(tag))
        self.revision = update.revision

    def update_leases(self, update: Update[Lease]) -> None:
        """Take one revision of the `leases` table."""
        for key, lease in update.changes.items():
            if lease is None:
                self._leases.pop(key, None)
            else:
                self._leases[key] = lease
        self.touched.peers = self.touched.forwards = True

    def update_security_groups(self, update: Update[SecurityGroup]) -> None:
        """Take one revision of the `security_groups` table."""
        self.security_groups.update(update)
        self.touched.egress = True

    def use_security_groups(self, used: bool) -> None:
        """Whether what the table says counts."""
        self.security_groups.use(used)
        self.touched.egress = True

    def admit(self, container: Container) -> None:
        """A container is here, or is another than it was. It must have an address."""
        assert container.address is not None  # noqa: S101 (the callers' contract, not a check of input)
        known = self.containers.get(container.handle)
        if known is not None:
            if (known.app, known.address) == (container.app, container.address):
                self._change(known, container)
                return
            self.forget(container.handle)
        self.containers[container.handle] = container
        if container.address in self._owners or container.address in self.touched.released:
            self.touched.recheck.add(container.address)
        self._owners.setdefault(container.address, []).append(container.handle)
        self._groups[group_of(container.address)].add(container.address)
        if container.app is not None:
            self._instances[container.app].add(container.handle)
            self._touch_app(container.app, {})
        self._touch_address(container.address)
        self._touch_reach()

    def _change(self, known: Container, container: Container) -> None:
        """The same app's container at the same address, with other ports or another reach."""
        assert container.address is not None  # noqa: S101 (as in admit)
        self.containers[container.handle] = container
        if known == container:
            return
        self._touch_address(container.address)
        self._touch_reach()
        if known.ports != container.ports:
            self.touched.recheck.add(container.address)

    def forget(self, handle: Handle) -> None:
        """A container is gone; one that is not known is no error."""
        container = self.containers.pop(handle, None)
        self.security_groups.forget(handle)
        if container is None or container.address is None:
            return
        address = container.address
        self._owners[address].remove(handle)
        if not self._owners[address]:
            del self._owners[address]
            self._groups[group_of(address)].discard(address)
            if not self._groups[group_of(address)]:
                del self._groups[group_of(address)]
            self.touched.released.add(address)
        else:
            self.touched.recheck.add(address)
        if container.app is not None:
            self._touch_app(container.app, {})
            self._instances[container.app].discard(handle)
            if not self._instances[container.app]:
                del self._instances[container.app]
        self._touch_address(address)
        self._touch_reach()

    def take_touched(self) -> Touched:
        touched, self.touched = self.touched, Touched()
        return touched

    def _policy(self, destination: AppId, source: AppId, ports: tuple[Ports, ...] | None) -> None:
        lost = set(self._policies[destination].get(source, ())) - set(ports or ())
        if ports is None:
            self._policies[destination].pop(source, None)
            self._destinations[source].discard(destination)
            if not self._policies[destination]:
                del self._policies[destination]
            if not self._destinations[source]:
                del self._destinations[source]
        else:
            self._policies[destination][source] = ports
            self._destinations[source].add(destination)
        tag = self._tags.get(source)
        self._touch_app(destination, {} if tag is None else {tag: bool(lost)})

    def _tag(self, app: AppId, tag: Tag | None) -> None:
        old = self._tags.get(app)
        if tag is None:
            self._tags.pop(app, None)
        else:
            self._tags[app] = tag
        for destination in self._destinations.get(app, ()):
            self._touch_app(destination, {t: t == old for t in (tag, old) if t is not None})
        for handle in self._instances.get(app, ()):
            address = self.containers[handle].address
            if address is not None:
                self._touch_address(address)
        if app == INGRESS_ROUTER:
            self.touched.groups |= self._groups.keys()
            self.touched.recheck |= self._owners.keys()
            self.touched.peers = True  # a router's own tag

    def _touch_app(self, app: AppId, tags: Mapping[Tag, bool]) -> None:
        if app in self._instances:
            changed = self.touched.apps[app]
            for tag, lost in tags.items():
                changed[tag] = changed.get(tag, False) or lost

    def _touch_address(self, address: IPv4Address) -> None:
        self.touched.addresses.add(address)
        self.touched.groups.add(group_of(address))

    def _touch_reach(self) -> None:
        self.touched.egress = self.touched.forwards = True

    # Asking

    def sources(self, app: AppId) -> Sources:
        """Who may open connections to `app`. A policy whose source has no tag allows nobody."""
        tags = self._tags
        return {tags[source]: ports for source, ports in self._policies.get(app, {}).items() if source in tags}

    def apps(self) -> set[AppId]:
        """The apps that have an instance on this cell."""
        return set(self._instances)

    def addresses_of(self, app: AppId) -> set[IPv4Address]:
        owned = (self.containers[handle].address for handle in self._instances.get(app, ()))
        return {address for address in owned if address is not None and self.app_at(address) == app}

    def app_at(self, address: IPv4Address) -> AppId | None:
        container = self.container_at(address)
        return None if container is None else container.app

    def container_at(self, address: IPv4Address) -> Container | None:
        """The container that has this address."""
        owners = self._owners.get(address)
        return self.containers[owners[-1]] if owners else None

    def owners(self) -> list[Container]:
        """The containers that have an address: not those that another took it from. The latest last."""
        return [each for each in self.containers.values() if each.address and self.container_at(each.address) is each]

    @property
    def tags(self) -> Mapping[AppId, Tag]:
        """The tag of each app that has one."""
        return self._tags

    def ports(self, source: AppId, destination: AppId) -> tuple[Ports, ...]:
        """What the policies from one app to another allow."""
        return self._policies.get(destination, {}).get(source, ())

    def lease_of(self, address: IPv4Address) -> Lease | None:
        """The lease in whose subnet this address of the overlay is."""
        return next((lease for lease in self._leases.values() if address in lease.subnet), None)

    def underlay_of(self, cell: str) -> IPv4Address | None:
        """The underlay address of a cell that holds a lease."""
        return next((lease.underlay for lease in self._leases.values() if lease.cell == cell), None)

    def tag_at(self, address: IPv4Address) -> Tag | None:
        """The tag that traffic from this address carries."""
        app = self.app_at(address)
        return None if app is None else self._tags.get(app)

    def ports_at(self, address: IPv4Address) -> tuple[int, ...]:
        """The ports that the app of the container there listens on."""
        container = self.container_at(address)
        return () if container is None else tuple(sorted(set(container.ports)))

    def reach_at(self, address: IPv4Address) -> Reach:
        """Where the container that has this address may go off the overlay."""
        container = self.container_at(address)
        return Reach() if container is None else self.security_groups.reach(container)

    def guests_at(self, addresses: Iterable[IPv4Address], link_prefix: str) -> dict[Handle, IPv4Address]:
        """The containers at these addresses whose links do not begin so: another CNI plugin made them, or may have."""
        found = ((address, self.container_at(address)) for address in addresses)
        return {
            container.handle: address
            for address, container in found
            if container is not None and not (container.interface or "").startswith(link_prefix)
        }

    def addresses(self) -> set[IPv4Address]:
        return set(self._owners)

    def groups(self) -> Mapping[IPv4Network, set[IPv4Address]]:
        """The /28 networks in which containers are, with their addresses."""
        return self._groups

    def subnets_of(self, cell: str) -> frozenset[IPv4Network]:
        """The subnets leased to a cell."""
        return frozenset(lease.subnet for lease in self._leases.values() if lease.cell == cell)

    def peers(self) -> frozenset[IPv4Address]:
        """The underlay addresses of the cells that hold a lease."""
        return frozenset(lease.underlay for lease in self._leases.values())
