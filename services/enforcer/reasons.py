"""Why a packet passed or was refused, in words: which policy, security group, denied network or setting decided."""

from bus.explaining import Verdict
from bus.messages import AppId, Container, Protocol, Tag
from services.enforcer.egress import DENIED, list_chain
from services.enforcer.groups import RuleList
from services.enforcer.model import INGRESS_ROUTER, Model
from services.enforcer.settings import EnforcerSettings
from services.enforcer.viewpoint import View
from services.enforcer.walk import Walk

DENY_NETWORKS = {
    DENIED: "deny_networks_always or metadata_endpoints",
    "sb-deny-running": "deny_networks_running",
    "sb-deny-staging": "deny_networks_staging",
}
HOST_SERVICES = "host_tcp_services, host_udp_services or dns_servers"
MAX_NAMES = 500


def reason(settings: EnforcerSettings, model: Model, view: View, made: Walk, verdict: Verdict) -> str:
    """Why the packet of a view ended as it did."""
    if verdict is Verdict.UNKNOWN:
        return "none of the enforcer's rules decides: other rules of this host may"
    passes = verdict is Verdict.PASSES
    tag = None if view.app is None else model.tags.get(view.app)
    packet = view.packet
    to = model.container_at(packet.destination)
    if made.chain is not None and made.chain.name == "sb-open":
        return "disable_container_network_policy is set: containers reach one another without policies"
    if to is not None:
        return _allowed(model, view, tag, to) if passes else _not_allowed(view, tag, to.app)
    if packet.out == settings.vtep_name:
        if passes:
            return f"goes to the overlay with tag {tag or 0:04X}; the destination's cell decides"
        return _not_allowed(view, tag, None)
    if settings.on_overlay(packet.destination):
        return f"{packet.destination} is on the overlay, and no container has it"
    if not packet.out:
        return f"{HOST_SERVICES} let it to this host" if passes else f"none of {HOST_SERVICES} lets it to this host"
    return _off_overlay(model, view.container, packet.out, made, passes=passes)


def _allowed(model: Model, view: View, tag: Tag | None, to: Container) -> str:
    packet = view.packet
    for ports in model.ports(view.app, to.app) if view.app is not None and to.app is not None else ():
        if ports.protocol == packet.protocol and ports.start <= packet.port <= ports.end:
            span = f"{ports.start}" if ports.start == ports.end else f"{ports.start}-{ports.end}"
            return f"a policy from {view.app} (tag {tag or 0:04X}) to {to.app} allows {ports.protocol} {span}"
    if view.app == INGRESS_ROUTER:
        return f"enable_overlay_ingress_rules is set, and the app listens on port {packet.port}"
    return "a rule lets it in that is of no policy"


def _not_allowed(view: View, tag: Tag | None, destination: AppId | None) -> str:
    packet = view.packet
    if packet.protocol not in tuple(Protocol):
        return f"policies are of {' and '.join(Protocol)}, so no {packet.protocol} passes between containers"
    if tag is None:
        return f"{view.app or 'the source'} is in no policy, so its traffic has no tag"
    return f"no policy from {view.app} to {destination} allows {packet.protocol} {packet.port}"


def _off_overlay(model: Model, container: Container, out: str, made: Walk, *, passes: bool) -> str:
    groups = model.security_groups.of(container)
    chain = "" if made.chain is None else made.chain.name
    if passes:
        names = sorted(group.name for group in groups if list_chain(RuleList.of(group.rules)) == chain)
        if names:
            return f"security group {' and '.join(names)[:MAX_NAMES]} lets it out by {out}"
        return f"what the container's runtime opened for it lets it out by {out}"
    if chain in DENY_NETWORKS and made.rule is not None:
        return f"in a denied network ({DENY_NETWORKS[chain]}): {made.rule.match.removeprefix('-d ')}"
    names = sorted(group.name for group in groups)
    return f"no rule of its security groups lets it out ({', '.join(names)[:MAX_NAMES] or 'it has none'})"
