"""The chains that depend on the settings alone, and what stands before anything else is known: the fence.

A packet's way, in order:

- raw: from a container's link with a source address that is not routed back to that link: dropped; VXLAN from a
  container, or from a host that holds no lease: dropped; VXLAN is not tracked.
- mangle: from a container: marked with its app's tag, by one look-up in a set; and, if it answers a flow that a policy
  let in, as let in.
- nat (a flow's first packet): `forwarding.py`.
- filter FORWARD, `sb-forward`: revoked flows are cut, established ones pass; new ones by where they go:
  `sb-in` to a container: from a container or the overlay through `sb-to` by its address (/28, then host) to the chain
  of its app, where the tag decides; from elsewhere only what a forwarded port brought.
  `sb-out` from a container to elsewhere: to the overlay with a tag, for the cell of the destination decides; beyond it
  as `egress.py` says. All else from or to our links is logged (`logged.py`) and refused.
- filter INPUT: containers may reach the services named in the settings and answer the host; the overlay may answer.

A link is a container's by its name, or, where another CNI plugin made it, by its device group (`guests.py`). Every
packet of this host pays for rules that ask for it, so those for the group stand only where there are such containers;
and in the fence, when none is known yet.

That a flow is established is not enough between cells, since each cell sees only its own half of what happened:

- Two containers that each send first look to both cells like one that is answered. So an answer from another cell must
  be marked as let in, which is its cell's word, not its container's.
- The cell of the destination is not told that the source's address has another container. So what the opener of a flow
  sends must carry the tag that the flow was let in with; otherwise it is judged as a new flow.

Nor is it enough between containers of one cell: somebody may have taken the rules away for a moment. So what no policy
let in is judged as new when its opener sends, and not answered before.

Without the container network policy (`disable_container_network_policy`) what goes from one overlay address to another
is let through before all that; what comes from no container or cell is not, nor who says to be another.
"""

from functools import lru_cache
from itertools import product

from bus.messages import Protocol
from services.enforcer.egress import DENIED, FROM, static_egress
from services.enforcer.forwarding import NAT, static_nat
from services.enforcer.logged import DENY_IN, DENY_OUT, Why, allowed, deny_chains, refused
from services.enforcer.rules import (
    ANSWER,
    COMPARE_TAG,
    ESTABLISHED,
    FLOW_TAGGED,
    FLOW_UNTAGGED,
    FROM_GUEST,
    FROM_OPENER,
    NEW,
    NOT_FROM_GUEST,
    PROVE,
    REJECT,
    RESET,
    REVOKED,
    TAG_MASK,
    TAGGED,
    TO_GUEST,
    TRANSLATED,
    UNPROVEN,
    ChainId,
    Chains,
    Rules,
    from_link,
    rule,
    to_link,
)
from services.enforcer.settings import EnforcerSettings
from services.enforcer.tree import ACCEPT_FLOW

TAG_SET = "sb-tag"
"""hash:ip with skbinfo: the address of each container of this cell -> the mark its traffic gets, 0 without a tag; and a
router's own address."""
PEER_SET = "sb-peers"
"""hash:ip: underlay addresses from which VXLAN is accepted."""
TO = ChainId("filter", "sb-to")
NOT_A_BEGINNING = "-p tcp -m tcp ! --syn -m conntrack --ctstate NEW"
"""The rest of a flow that was cut, which would be taken for a new one."""

_LOCAL = "-m addrtype --dst-type LOCAL"
UNTRACKED = "CT --notrack"


def fence(settings: EnforcerSettings, *, guests: bool = True) -> Chains:
    """What stands before anything is known of containers and peers: nothing new passes, what is established does.

    Without `guests` it has no hold on links of other plugins' containers.
    """
    empty: dict[ChainId, Rules] = {FROM: (), NAT: ()}
    return {**static(settings, peers_known=False, guests=guests), **empty, TO: dispatching(())}


def dispatching(steps: Rules) -> Rules:
    """The chain of what goes over the overlay to a container: these steps to its app's chain, else refused."""
    return (rule(NOT_A_BEGINNING, to="DROP"), *steps, rule(to=DENY_IN))


@lru_cache(maxsize=8)
def static(settings: EnforcerSettings, *, peers_known: bool, guests: bool) -> Chains:
    """The IPv4 chains that do not depend on containers or policies, but for whether any are `guests`."""
    vtep = settings.vtep_name
    link = f"{settings.link_prefix}+"
    sources = (from_link(link), FROM_GUEST) if guests else (from_link(link),)
    destinations = (to_link(link), TO_GUEST) if guests else (to_link(link),)
    not_from_link = (f"! {from_link(link)}", NOT_FROM_GUEST) if guests else (f"! {from_link(link)}",)
    vxlan = f"-p udp -m udp --dport {settings.vtep_port}"
    from_overlay = [f"-s {network}" for network in settings.overlay_network]
    to_overlay = [f"-d {network}" for network in settings.overlay_network]
    untracked = rule(to=UNTRACKED)
    stranger = rule(f"-m set ! --match-set {PEER_SET} src", to="DROP")
    chains: dict[tuple[str, str], Rules] = {
        ("raw", "PREROUTING"): (
            *(rule(source, to="sb-raw-link") for source in sources),
            # Only what is for this host: somebody else's VXLAN may be forwarded here.
            rule(vxlan, _LOCAL, to="sb-raw-vxlan"),
        ),
        ("raw", "sb-raw-link"): (
            rule("-m rpfilter --invert", to="DROP"),
            rule(vxlan, to="DROP"),
        ),
        ("raw", "sb-raw-vxlan"): (stranger, untracked) if peers_known else (untracked,),
        ("raw", "OUTPUT"): (rule(vxlan, to=UNTRACKED),),
        ("mangle", "PREROUTING"): tuple(rule(source, to="sb-mark") for source in sources),
        ("mangle", "sb-mark"): (
            rule(to=f"SET --map-set {TAG_SET} src --map-mark"),
            rule("-m conntrack --ctdir REPLY", FLOW_TAGGED, to=PROVE),
        ),
        # What this host itself says to other cells' containers: a router's, and the resets of flows that it cuts.
        ("mangle", "OUTPUT"): (
            *([rule(to_link(vtep), to=f"SET --map-set {TAG_SET} src --map-mark")] if settings.ingress_router else []),
            rule(to_link(vtep), to=PROVE),
        ),
        ("filter", "FORWARD"): tuple(
            rule(match, to="sb-forward") for match in (*sources, *destinations, from_link(vtep), to_link(vtep))
        ),
        ("filter", "sb-forward"): (
            *(
                rule(*ends, to="sb-open")
                for ends in product(from_overlay, to_overlay)
                if settings.disable_container_network_policy
            ),
            rule(REVOKED, to="sb-cut"),
            # From another cell, or from somebody on the underlay who pretends to be there.
            *(
                rule(*not_from_link, overlay, ANSWER, UNPROVEN, to="DROP")
                for overlay in from_overlay
                if not settings.unmarked_answers
            ),
            rule(FROM_OPENER, FLOW_TAGGED, to="sb-opener"),
            # Between containers what no policy let in began while these rules were not there.
            *(rule(*ends, FROM_OPENER, to="sb-new") for ends in product(from_overlay, destinations)),
            *(rule(*ends, FLOW_UNTAGGED, ANSWER, to=DENY_IN) for ends in product(sources, destinations)),
            rule(ESTABLISHED, to="ACCEPT"),
            rule("-p tcp -m conntrack --ctstate INVALID", to="DROP"),
            rule(to="sb-new"),
        ),
        ("filter", "sb-opener"): (
            rule(to=COMPARE_TAG),
            rule(f"-m mark --mark 0x0/{TAG_MASK:#x}", to="ACCEPT"),
            rule(to=COMPARE_TAG),
            rule(to="sb-new"),
        ),
        ("filter", "sb-new"): (
            *(rule(destination, to="sb-in") for destination in destinations),
            *(rule(source, to="sb-out") for source in sources),
            rule(to=DENY_OUT),
        ),
        ("filter", "sb-in"): (
            # The mark is a tag only on what came from a container or the overlay.
            *(rule(source, to=TO.name) for source in (*sources, from_link(vtep))),
            rule(TRANSLATED, to="ACCEPT"),
            rule(to=DENY_IN),
        ),
        ("filter", "sb-out"): (
            rule(to_link(vtep), NOT_A_BEGINNING, to="DROP"),
            # No policy is of another protocol; and errors that belong to no flow are not for the next cell to sort.
            *(
                rule(f"-p {protocol}", to_link(vtep), overlay, NEW, TAGGED, to="ACCEPT")
                for overlay, protocol in product(to_overlay, Protocol)
            ),
            rule(to_link(vtep), to=DENY_OUT),
            # An overlay address for which there is no lease is nobody's, and not the underlay's business.
            *(rule(overlay, to=DENY_OUT) for overlay in to_overlay),
            rule(to=DENIED),
            rule(to=FROM.name),
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
            *(rule(source, to="sb-input") for source in sources),
            rule(from_link(vtep), to="sb-input-vtep"),
        ),
        ("filter", "sb-input"): (
            rule(ESTABLISHED, to="ACCEPT"),
            *(
                rule(
                    f"-d {service.address}/32 -p {service.protocol} -m {service.protocol} --dport {service.port}",
                    to="ACCEPT",
                )
                for service in settings.host_services
            ),
            rule(to=DENY_OUT),
        ),
        ("filter", "sb-input-vtep"): (rule(ESTABLISHED, to="ACCEPT"), rule(to="DROP")),
    }
    if settings.disable_container_network_policy:
        chains["filter", "sb-open"] = tuple(rule(source, to="ACCEPT") for source in (*sources, from_link(vtep)))
    fixed = {ChainId(*key): rules for key, rules in chains.items()}
    return {**fixed, **deny_chains(settings), **static_nat(settings, TAG_SET), **static_egress(settings)}


def static_v6(settings: EnforcerSettings) -> Chains:
    """IPv6: containers have none. Nothing from or to their links or the overlay."""
    link = f"{settings.link_prefix}+"
    refused = [rule(match, to="sb-v6") for match in (from_link(link), FROM_GUEST, from_link(settings.vtep_name))]
    unsent = [rule(match, to="sb-v6") for match in (to_link(link), TO_GUEST, to_link(settings.vtep_name))]
    return {
        ChainId("filter", "INPUT"): tuple(refused),
        ChainId("filter", "FORWARD"): (*refused, *unsent),
        ChainId("filter", "OUTPUT"): tuple(unsent),
        ChainId("filter", "sb-v6"): (rule(to="DROP"),),
    }
