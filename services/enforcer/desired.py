"""What the kernel shall hold, as pure functions of the settings and the model.

A packet's way, in order:

- raw: from a container's link with a source address that is not routed back to that link: dropped; VXLAN from a
  container, or from a host that holds no lease: dropped; VXLAN is not tracked.
- mangle: from a container: marked with its app's tag, by one look-up in a set; and, if it answers a flow that a policy
  let in, as let in.
- filter FORWARD, `sb-forward`: revoked flows are cut, established ones pass; to a container: by its address (/28, then
  host) to the chain of its app, where the tag decides; from a tagged container to the overlay: passes, the cell of the
  destination decides. All else from or to our links is logged (`logged.py`) and refused.
- filter INPUT: containers, and the overlay, may only answer the host.

That a flow is established is not enough between cells, since each cell sees only its own half of what happened:

- Two containers that each send first look to both cells like one that is answered. So an answer from another cell must
  be marked as let in, which is its cell's word, not its container's.
- The cell of the destination is not told that the source's address has another container. So what the opener of a flow
  sends must carry the tag that the flow was let in with; otherwise it is judged as a new flow.

Where a container may go beyond the overlay (security groups, DNS) and who may come from there (port forwarding)
belongs before the last rule of `sb-new`, and in `sb-input`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from ipaddress import IPv4Address, IPv4Network

from bus.messages import AppId, Protocol, Revision, Tag
from services.enforcer.logged import DENY_IN, DENY_OUT, Why, allowed, deny_chains, refused
from services.enforcer.model import Model, Touched
from services.enforcer.rules import (
    ANSWER,
    COMPARE_TAG,
    ESTABLISHED,
    FLOW_TAGGED,
    FROM_OPENER,
    NEW,
    PROVE,
    REJECT,
    RESET,
    REVOKED,
    TAG_MASK,
    TAGGED,
    UNPROVEN,
    ChainId,
    Chains,
    Rules,
    from_link,
    rule,
    to_link,
)
from services.enforcer.settings import EnforcerSettings
from services.enforcer.tree import ACCEPT_FLOW, Sources, app_chains

TAG_SET = "sb-tag"
"""hash:ip with skbinfo: a container's address -> the mark its traffic gets."""
PEER_SET = "sb-peers"
"""hash:ip: underlay addresses from which VXLAN is accepted."""

_DISPATCH = ChainId("filter", "sb-to")
_LOCAL = "-m addrtype --dst-type LOCAL"


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
    the set; `peers` None leaves that set alone. `subnets` are this cell's: a flow let in to an address there that no
    container has is a dead container's, and a complete plan deletes it. A `routine` one looks at flows only if rules
    were not as planned.
    """

    revision: Revision
    complete: bool
    routine: bool
    chains: Chains
    families: Mapping[str, frozenset[str]]
    tags: Mapping[IPv4Address, Tag | None]
    peers: frozenset[IPv4Address] | None
    flows: tuple[FlowCheck, ...]
    subnets: frozenset[IPv4Network]
    released: frozenset[IPv4Address]


def plan(settings: EnforcerSettings, model: Model, touched: Touched) -> Plan:
    """What to apply after these parts of the model were touched."""
    everything = touched.everything
    apps = model.apps() if everything else touched.apps
    groups = set(model.groups()) if everything else touched.groups
    addresses = model.addresses() if everything else touched.addresses
    chains: dict[ChainId, Rules] = dict(static(settings, peers_known=True)) if everything else {}
    families: dict[str, frozenset[str]] = {}
    sources = {app: model.sources(app) for app in apps}
    local = model.apps()
    for app in apps:
        tree = app_chains(app_chain(app), sources[app]) if app in local else {}
        chains |= tree
        families[app_chain(app)] = frozenset(chain.name for chain in tree)
    for group in groups:
        chains |= group_chain(group, model) if group in model.groups() else {}
        families[_group_name(group)] = frozenset({_group_name(group)} if group in model.groups() else ())
    if groups or everything:
        chains |= dispatch(set(model.groups()))
    # An address with another container: all its flows. An app whose policies changed: those with the tags concerned.
    # An address that had none before has no flows: they were deleted with its last container.
    anew = model.addresses() if everything else touched.replaced & model.addresses()
    flows = [FlowCheck(address, _sources_of(model, model.app_at(address)), None) for address in anew]
    for app, changed in touched.apps.items():
        lost = frozenset(tag for tag, less in changed.items() if less)
        flows += [
            FlowCheck(address, sources[app], lost, frozenset(changed) - lost)
            for address in (model.addresses_of(app) - anew if changed and app in sources else ())
        ]
    return Plan(
        revision=model.revision,
        complete=everything,
        routine=touched.routine,
        chains=chains,
        families=families,
        tags={address: model.tag_at(address) for address in addresses},
        peers=model.peers() if everything or touched.peers else None,
        flows=tuple(flows),
        subnets=model.subnets_of(settings.cell),
        released=frozenset(touched.released),
    )


def _sources_of(model: Model, app: AppId | None) -> Sources:
    return {} if app is None else model.sources(app)


def app_chain(app: AppId) -> str:
    """The chain of an app. A hash: app ids are longer than a chain's name may be (28), and may hold anything."""
    return f"sb-a-{blake2b(app.encode(), digest_size=8).hexdigest()}"


def family_of(chain: str) -> str:
    """The first chain of the family that this one belongs to: `sb-a-HASH` of `sb-a-HASH-3f`."""
    return "-".join(chain.split("-", 3)[:3])


def _group_name(group: IPv4Network) -> str:
    return f"sb-g-{int(group.network_address):08x}"


def group_chain(group: IPv4Network, model: Model) -> Chains:
    """Within a /28: each container's address to the chain of its app. One without an app is left to be refused."""
    owned = ((address, model.app_at(address)) for address in sorted(model.groups()[group]))
    return {
        ChainId("filter", _group_name(group)): tuple(
            rule(f"-d {address}/32", to=app_chain(app)) for address, app in owned if app is not None
        )
    }


def dispatch(groups: set[IPv4Network]) -> Chains:
    """From the destination's address to the chain of its /28."""
    return {_DISPATCH: tuple(rule(f"-d {group}", to=_group_name(group)) for group in sorted(groups))}


def fence(settings: EnforcerSettings) -> Chains:
    """What stands before anything is known of containers and peers: nothing new passes, what is established does."""
    return {**static(settings, peers_known=False), **dispatch(set())}


def static(settings: EnforcerSettings, *, peers_known: bool) -> Chains:
    """The IPv4 chains that do not depend on containers or policies."""
    link = f"{settings.link_prefix}+"
    vtep = settings.vtep_name
    vxlan = f"-p udp -m udp --dport {settings.vtep_port}"
    to_overlay = (from_link(link), to_link(vtep), f"-d {settings.overlay_network}")
    overlay = f"-s {settings.overlay_network}"
    untracked = rule(to="CT --notrack")
    stranger = rule(f"-m set ! --match-set {PEER_SET} src", to="DROP")
    chains = {
        ("raw", "PREROUTING"): (
            rule(from_link(link), to="sb-raw-link"),
            # Only what is for this host: somebody else's VXLAN may be forwarded here.
            rule(vxlan, _LOCAL, to="sb-raw-vxlan"),
        ),
        ("raw", "sb-raw-link"): (
            rule("-m rpfilter --invert", to="DROP"),
            rule(vxlan, to="DROP"),
        ),
        ("raw", "sb-raw-vxlan"): (stranger, untracked) if peers_known else (untracked,),
        ("raw", "OUTPUT"): (rule(vxlan, to="sb-raw-out"),),
        ("raw", "sb-raw-out"): (untracked,),
        ("mangle", "PREROUTING"): (rule(from_link(link), to="sb-mark"),),
        ("mangle", "sb-mark"): (
            rule(to=f"SET --map-set {TAG_SET} src --map-mark"),
            rule("-m conntrack --ctdir REPLY", FLOW_TAGGED, to=PROVE),
        ),
        ("mangle", "OUTPUT"): (rule(to_link(vtep), to="sb-mark-out"),),
        # What this host itself says to other cells' containers: the resets of flows that it cuts.
        ("mangle", "sb-mark-out"): (rule(to=PROVE),),
        ("filter", "FORWARD"): (
            rule(from_link(link), to="sb-forward"),
            rule(to_link(link), to="sb-forward"),
            rule(from_link(vtep), to="sb-forward"),
            rule(to_link(vtep), to="sb-forward"),
        ),
        ("filter", "sb-forward"): (
            rule(REVOKED, to="sb-cut"),
            # From another cell, or from somebody on the underlay who pretends to be there.
            *(
                ()
                if settings.unmarked_answers
                else (rule(f"! {from_link(link)}", overlay, ANSWER, UNPROVEN, to="DROP"),)
            ),
            rule(FROM_OPENER, FLOW_TAGGED, to="sb-opener"),
            rule(ESTABLISHED, to="ACCEPT"),
            # A flow begins with SYN; what does not is the rest of one that was cut, and would be taken for a new one.
            rule("-p tcp -m tcp ! --syn -m conntrack --ctstate INVALID,NEW", to="DROP"),
            rule(to="sb-new"),
        ),
        ("filter", "sb-opener"): (
            rule(to=COMPARE_TAG),
            rule(f"-m mark --mark 0x0/{TAG_MASK:#x}", to="ACCEPT"),
            rule(to=COMPARE_TAG),
            rule(to="sb-new"),
        ),
        ("filter", "sb-new"): (
            # The mark is a tag only on what came from a container or the overlay.
            rule(from_link(link), to_link(link), to=_DISPATCH.name),
            rule(from_link(vtep), to_link(link), to=_DISPATCH.name),
            # No policy is of another protocol; and errors that belong to no flow are not for the next cell to sort.
            *(rule(f"-p {protocol}", *to_overlay, NEW, TAGGED, to="ACCEPT") for protocol in Protocol),
            rule(to_link(link), to=DENY_IN),
            rule(to=DENY_OUT),
        ),
        ("filter", "sb-cut"): (
            refused(settings, Why.REVOKED, by="srcip"),
            rule("-p tcp", to=RESET),
            rule(to=REJECT),
        ),
        ("filter", ACCEPT_FLOW): (
            *(allowed(settings, Why.POLICY) if settings.log_accepted else ()),
            rule(to=f"CONNMARK --save-mark --nfmask {TAG_MASK:#x} --ctmask {TAG_MASK:#x}"),
            rule(to="ACCEPT"),
        ),
        ("filter", "INPUT"): (
            rule(from_link(link), to="sb-input"),
            rule(from_link(vtep), to="sb-input-vtep"),
        ),
        ("filter", "sb-input"): (rule(ESTABLISHED, to="ACCEPT"), rule(to=DENY_OUT)),
        ("filter", "sb-input-vtep"): (rule(ESTABLISHED, to="ACCEPT"), rule(to="DROP")),
    }
    return {ChainId(*key): rules for key, rules in chains.items()} | dict(deny_chains(settings))


def static_v6(settings: EnforcerSettings) -> Chains:
    """IPv6: containers have none. Nothing from or to their links or the overlay."""
    link = f"{settings.link_prefix}+"
    refused = [rule(from_link(name), to="sb-v6") for name in (link, settings.vtep_name)]
    unsent = [rule(to_link(name), to="sb-v6") for name in (link, settings.vtep_name)]
    return {
        ChainId("filter", "INPUT"): tuple(refused),
        ChainId("filter", "FORWARD"): (*refused, *unsent),
        ChainId("filter", "OUTPUT"): tuple(unsent),
        ChainId("filter", "sb-v6"): (rule(to="DROP"),),
    }


def allows(sources: Sources, tag: int, protocol: str, port: int) -> bool:
    """Whether a flow with this tag to this port may be."""
    return any(p.protocol == protocol and p.start <= port <= p.end for p in sources.get(Tag(tag), ()))
