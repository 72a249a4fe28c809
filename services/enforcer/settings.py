"""The enforcer's settings. Names of links and the overlay must equal the Silk worker's, or nothing is enforced.

What concerns egress has the meaning of the property of the original of the same purpose (contract/cell.md 9); lists of
networks are given as there, and host bits are taken as zero.
"""

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Literal, NamedTuple

from bus.decode import Malformed
from bus.messages import Protocol
from bus.settings import setting
from services.enforcer.traffic_settings import TrafficSettings

Kind = Literal["legacy", "nft"]
"""Which of the kernel's two packet filters: xtables ("legacy") or nf_tables by way of iptables-nft ("nft")."""

MAX_RATE = 10_000
MAX_BURST = 10_000
"""What xt_hashlimit takes of both in every revision of it."""
_LINK = re.compile(r"[A-Za-z0-9_.-]{1,15}")


class HostService(NamedTuple):
    """What containers may reach on the cell itself."""

    protocol: Protocol
    address: IPv4Address
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EnforcerSettings(TrafficSettings):
    overlay_network: tuple[IPv4Network, ...] = setting("the networks of the overlay", (IPv4Network("10.255.0.0/16"),))
    vtep_name: str = setting("name of the VXLAN device", "silk-vtep")
    vtep_port: int = setting("UDP port of VXLAN", 4789)
    link_prefix: str = setting("how the host ends of containers' links begin", "s-")
    iptables: str = setting("auto, legacy or nft", "auto")
    leases_from: str = setting(
        "bus, or worker: as the silk worker of this cell has them from the original's controller", "bus"
    )
    unmarked_answers: bool = setting(
        "take answers that their cell did not mark: true only while cells of the original Silk are in the fleet", False
    )
    disable_container_network_policy: bool = setting("let all containers reach one another over the overlay", False)
    enable_overlay_ingress_rules: bool = setting(
        "let INGRESS_ROUTER reach the ports that containers' apps listen on, over the overlay", False
    )
    ingress_router: bool = setting(
        "this machine is a router: what it sends over the overlay itself has the tag of INGRESS_ROUTER", False
    )
    dynamic_security_groups: bool = setting(
        "security groups as the table has them now; false: as each container's runtime gave them", True
    )
    deny_networks_always: tuple[str, ...] = setting("networks no container reaches, whatever security groups say", ())
    deny_networks_running: tuple[str, ...] = setting("networks apps and tasks do not reach", ())
    deny_networks_staging: tuple[str, ...] = setting("networks staging containers do not reach", ())
    metadata_endpoints: tuple[str, ...] = setting(
        "the cloud's metadata service, denied like deny_networks_always; empty: as security groups say",
        ("169.254.169.254",),
    )
    dns_servers: tuple[IPv4Address, ...] = setting(
        "containers' resolvers; those that are link-local are on this host, and let in", ()
    )
    host_tcp_services: tuple[str, ...] = setting("ADDRESS:PORT on this host that containers reach by TCP", ())
    host_udp_services: tuple[str, ...] = setting("ADDRESS:PORT on this host that containers reach by UDP", ())
    instance_address: IPv4Address | None = setting(
        "this cell's address at which containers' ports are forwarded; else the underlay address of its lease", None
    )
    no_masquerade: IPv4Network | None = setting(
        "what containers reach under their own address; else the overlay_network", None
    )
    outbound_limit: bool = setting("limit each container's new TCP connections to one address and port", False)
    outbound_rate: int = setting("new connections a second that outbound_limit allows", 100)
    outbound_burst: int = setting("new connections at once that outbound_limit allows", 1000)
    outbound_dry_run: bool = setting("only log what outbound_limit would refuse", False)

    def __post_init__(self) -> None:
        # Not super(): slots=True makes a second class, which the zero-argument form does not know.
        TrafficSettings.__post_init__(self)
        if self.leases_from not in ("bus", "worker"):
            raise Malformed(f"leases_from: {self.leases_from!r} is neither bus nor worker")
        if not self.overlay_network:
            raise Malformed("overlay_network: name at least one network")
        if self.iptables not in ("auto", "legacy", "nft"):
            raise Malformed(f"iptables: {self.iptables!r} is not one of auto, legacy, nft")
        if not 1 <= self.vtep_port <= 65535:
            raise Malformed(f"vtep_port: must be in 1..65535, not {self.vtep_port}")
        for name, value, longest in (("vtep_name", self.vtep_name, 15), ("link_prefix", self.link_prefix, 14)):
            if not _LINK.fullmatch(value) or len(value) > longest:
                raise Malformed(f"{name}: {value!r} must be 1 to {longest} letters, digits, '.', '_' or '-'")
        if self.vtep_name.startswith(self.link_prefix):
            raise Malformed(
                f"vtep_name: {self.vtep_name!r} must not begin as containers' links do, {self.link_prefix!r}"
            )
        for name, number, most in (
            ("outbound_rate", self.outbound_rate, MAX_RATE),
            ("outbound_burst", self.outbound_burst, MAX_BURST),
        ):
            if not 1 <= number <= most:
                raise Malformed(f"{name}: must be in 1..{most}, not {number}")
        # These check what they read.
        _ = self.denied_always, self.denied_running, self.denied_staging, self.host_services

    def on_overlay(self, address: IPv4Address) -> bool:
        return any(address in network for network in self.overlay_network)

    @property
    def denied_always(self) -> tuple[IPv4Network, ...]:
        return _networks(
            deny_networks_always=self.deny_networks_always,
            metadata_endpoints=self.metadata_endpoints,
        )

    @property
    def denied_running(self) -> tuple[IPv4Network, ...]:
        return _networks(deny_networks_running=self.deny_networks_running)

    @property
    def denied_staging(self) -> tuple[IPv4Network, ...]:
        return _networks(deny_networks_staging=self.deny_networks_staging)

    @property
    def host_services(self) -> tuple[HostService, ...]:
        """What containers may reach on this host: resolvers that are link-local, and the services named."""
        local = [address for address in self.dns_servers if address.is_link_local]
        resolvers = [HostService(protocol, address, 53) for address in local for protocol in Protocol]
        return (
            *resolvers,
            *(_service("host_tcp_services", text, Protocol.TCP) for text in self.host_tcp_services),
            *(_service("host_udp_services", text, Protocol.UDP) for text in self.host_udp_services),
        )

    @property
    def limits_outbound(self) -> bool:
        """Whether the rate of outgoing connections is looked at at all."""
        return self.outbound_limit or self.outbound_dry_run


def _networks(**settings: tuple[str, ...]) -> tuple[IPv4Network, ...]:
    networks = []
    for name, texts in settings.items():
        for text in texts:
            try:
                networks.append(IPv4Network(text, strict=False))
            except ValueError:
                raise Malformed(f"{name}: {text!r} is not an IPv4 network such as 10.0.0.0/8") from None
    return tuple(dict.fromkeys(networks))


def _service(name: str, text: str, protocol: Protocol) -> HostService:
    address, _, port = text.rpartition(":")
    try:
        service = HostService(protocol, IPv4Address(address), int(port))
    except ValueError:
        raise Malformed(f"{name}: {text!r} is not an IPv4 address and a port such as 10.0.0.5:8080") from None
    if not 1 <= service.port <= 65535:
        raise Malformed(f"{name}: {text!r}: the port must be in 1..65535")
    if service.address.is_loopback:
        raise Malformed(f"{name}: {text!r}: containers cannot reach a loopback address of this host")
    return service
