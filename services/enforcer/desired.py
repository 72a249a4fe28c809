"""What the kernel shall hold, as pure functions of the settings and the model: what each apply is to make so.

`fixed.py` has the chains that stand whatever the model says, and describes a packet's way through all of them;
`egress.py` and `forwarding.py` have those of security groups and of forwarded ports. Here are those of policies.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from ipaddress import IPv4Address, IPv4Network

from bus.messages import AppId, Handle, Ports, Protocol, Revision, Tag
from services.enforcer.egress import SHARED, egress_chains, list_chain, reach_chain, source_chain
from services.enforcer.fixed import TO, dispatching, static
from services.enforcer.forwarding import FORWARDS, forwarding_chains, port_chain
from services.enforcer.model import INGRESS_ROUTER, Model, Touched
from services.enforcer.rules import ChainId, Chains, Rule, Rules, rule
from services.enforcer.settings import EnforcerSettings
from services.enforcer.tree import Sources, allowing, app_chains, group_of

_SHARED = (*SHARED, FORWARDS)


@dataclass(frozen=True, slots=True)
class FlowCheck:
    """Flows to `address` are to be held against `sources`.

    Those whose tag `lost` something may have to be cut (None: any tag may have), of those whose tag only `gained`
    some may be revived.
    """

    address: IPv4Address
    sources: Sources
    lost: frozenset[Tag] | None
    gained: frozenset[Tag] = frozenset()


@dataclass(frozen=True, slots=True)
class Plan:
    """One apply. Applying it twice, or a later one without it, ends the same.

    `families` of chains begin with the same name (an app's); of a family nothing is wanted but what it lists. In a
    `complete` plan nothing of ours is wanted but what `chains` and `tags` hold. A tag of None takes the address out of
    the set; `peers` None leaves that set alone. `guests` are containers whose links may have to be made known as
    containers'; none of them can be the one that has the `underlay` address. `subnets` are this cell's: a flow let in
    to an address there that no container has is a dead container's, and a complete plan deletes it. A `routine` one
    looks at flows only if rules were not as planned.
    """

    revision: Revision
    complete: bool
    routine: bool
    chains: Chains
    families: Mapping[str, frozenset[str]]
    tags: Mapping[IPv4Address, int | None]
    peers: frozenset[IPv4Address] | None
    guests: Mapping[Handle, IPv4Address]
    underlay: IPv4Address | None
    flows: tuple[FlowCheck, ...]
    subnets: frozenset[IPv4Network]
    released: frozenset[IPv4Address]


def plan(settings: EnforcerSettings, model: Model, touched: Touched) -> Plan:
    """What to apply after these parts of the model were touched."""
    everything = touched.everything
    apps = model.apps() if everything else touched.apps
    groups = set(model.groups()) if everything else touched.groups
    addresses = model.addresses() if everything else touched.addresses
    owned = model.addresses()
    underlay = model.underlay_of(settings.cell)
    # With the first container of another plugin, and after the last.
    chains: dict[ChainId, Rules] = dict(fixed_chains(settings, model)) if everything or addresses else {}
    families: dict[str, frozenset[str]] = {}
    sources = {app: model.sources(app) for app in apps}
    local = model.apps()
    for app in apps:
        tree = app_chains(app_chain(app), sources[app]) if app in local else {}
        chains |= tree
        families[app_chain(app)] = frozenset(chain.name for chain in tree)
    for group in groups:
        chains |= group_chain(settings, group, model) if group in model.groups() else {}
        families[_group_name(group)] = frozenset({_group_name(group)} if group in model.groups() else ())
    if groups or everything:
        chains[TO] = dispatch(set(model.groups()))
    # These are many containers' at once: what is wanted of them is named in full whenever one may differ.
    shared: dict[ChainId, Rules] = {}
    if everything or touched.egress:
        shared |= egress_chains(settings, {address: model.reach_at(address) for address in owned})
    if everything or touched.forwards:
        shared |= forwarding_chains(model.owners(), settings.instance_address or underlay)
    chains |= shared
    for family, concerned in ((SHARED, touched.egress), ((FORWARDS,), touched.forwards)):
        for name in family if concerned or everything else ():
            families[name] = frozenset(chain.name for chain in shared if family_of(chain.name) == name)
    # An address with another container: all its flows. An app whose policies changed: those with the tags concerned.
    # An address that had none before has no flows: they were deleted with its last container.
    anew = owned if everything else touched.recheck & owned
    flows = [
        FlowCheck(address, _sources_at(settings, model, address, _sources_of(model, model.app_at(address))), None)
        for address in anew
    ]
    for app, changed in touched.apps.items():
        lost = frozenset(tag for tag, less in changed.items() if less)
        flows += [
            FlowCheck(address, _sources_at(settings, model, address, sources[app]), lost, frozenset(changed) - lost)
            for address in (model.addresses_of(app) - anew if changed and app in sources else ())
        ]
    return Plan(
        revision=model.revision,
        complete=everything,
        routine=touched.routine,
        chains=chains,
        families=families,
        tags={
            **({} if not (everything or touched.peers) else _own_tags(settings, model)),
            **{address: model.tag_at(address) or 0 if address in owned else None for address in addresses},
        },
        peers=model.peers() if everything or touched.peers else None,
        guests=model.guests_at(addresses, settings.link_prefix),
        underlay=underlay,
        flows=tuple(flows),
        subnets=model.subnets_of(settings.cell),
        released=frozenset(touched.released),
    )


def fixed_chains(settings: EnforcerSettings, model: Model) -> Chains:
    """The chains that stand once everything is known, whatever the policies."""
    guests = model.guests_at(model.addresses(), settings.link_prefix)
    return static(settings, peers_known=True, guests=bool(guests))


def _sources_of(model: Model, app: AppId | None) -> Sources:
    return {} if app is None else model.sources(app)


def _sources_at(settings: EnforcerSettings, model: Model, address: IPv4Address, sources: Sources) -> Sources:
    """Who may open connections to a container: the sources of its app, and the ingress router if it may."""
    routed = _routed(settings, model, address)
    if not routed:
        return sources
    return {**sources, **{tag: (*sources.get(tag, ()), *ports) for tag, ports in routed.items()}}


def _own_tags(settings: EnforcerSettings, model: Model) -> Mapping[IPv4Address, Tag | None]:
    """What a router's own traffic carries: it has the first address of its lease."""
    if not settings.ingress_router:
        return {}
    return dict.fromkeys((subnet[0] for subnet in model.subnets_of(settings.cell)), model.tags.get(INGRESS_ROUTER))


def _routed(settings: EnforcerSettings, model: Model, address: IPv4Address) -> Sources:
    """What the ingress router may reach of a container over the overlay: the ports that its app listens on."""
    tag = model.tags.get(INGRESS_ROUTER)
    if not settings.enable_overlay_ingress_rules or tag is None:
        return {}
    ports = tuple(Ports(Protocol.TCP, port, port) for port in model.ports_at(address))
    return {tag: ports} if ports else {}


def app_chain(app: AppId) -> str:
    """The chain of an app. A hash: app ids are longer than a chain's name may be (28), and may hold anything."""
    return f"sb-a-{blake2b(app.encode(), digest_size=8).hexdigest()}"


def family_of(chain: str) -> str:
    """The family that this chain belongs to: the first of it, `sb-a-HASH` of `sb-a-HASH-3f`, or what they all share."""
    for family in _SHARED:
        if chain.startswith(f"{family}-"):
            return family
    return "-".join(chain.split("-", 3)[:3])


def _group_name(group: IPv4Network) -> str:
    return f"sb-g-{int(group.network_address):08x}"


def group_chain(settings: EnforcerSettings, group: IPv4Network, model: Model) -> Chains:
    """Within a /28: each container's address to the chain of its app. One without an app is left to be refused."""
    rules: list[Rule] = []
    for address in sorted(model.groups()[group]):
        for tag, ports in _routed(settings, model, address).items():
            rules += [_at(address, allowing(tag, each)) for each in ports]
        app = model.app_at(address)
        if app is not None:
            rules.append(rule(f"-d {address}/32", to=app_chain(app)))
    return {ChainId("filter", _group_name(group)): tuple(rules)}


def _at(address: IPv4Address, allowed: Rule) -> Rule:
    return rule(f"-d {address}/32", allowed.match, to=allowed.target)


def dispatch(groups: set[IPv4Network]) -> Rules:
    """From the destination's address to the chain of its /28."""
    return dispatching(tuple(rule(f"-d {group}", to=_group_name(group)) for group in sorted(groups)))


def concerned(model: Model, chain: str) -> list[str]:
    """Whom it concerns when a chain, or a rule of it, is not in the kernel: security groups and containers, by name."""
    names = [f"security group {name!r}" for name in model.security_groups.named(chain.removeprefix("sb-s-"))]
    for container in model.owners():
        reach = model.security_groups.reach(container)
        chains = {reach_chain(reach), *(list_chain(each) for each in reach.lists)}
        if container.address is not None:
            group = group_of(container.address)
            chains |= {source_chain(group), _group_name(group)}
        if container.app is not None:
            chains.add(app_chain(container.app))
        chains |= {port_chain(forward.protocol, forward.host_port) for forward in container.forwards}
        if any(chain == each or chain.startswith(f"{each}-") for each in chains):
            names.append(f"container {container.handle!r}")
    return names


def allows(sources: Sources, tag: int, protocol: str, port: int) -> bool:
    """Whether a flow with this tag to this port may be."""
    return any(p.protocol == protocol and p.start <= port <= p.end for p in sources.get(Tag(tag), ()))
