"""CNI's forms (`bus.cni`) as the networker fills them: what its workflow is asked for, and what it answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import bus.cni
from bus.cni import DECODING_FAILURE as DECODING_FAILURE
from bus.cni import INTERNAL as INTERNAL
from bus.cni import INVALID_CONFIG as INVALID_CONFIG
from bus.cni import INVALID_ENVIRONMENT as INVALID_ENVIRONMENT
from bus.cni import IO_FAILURE as IO_FAILURE
from bus.cni import NOT_AVAILABLE as NOT_AVAILABLE
from bus.cni import TRY_AGAIN_LATER as TRY_AGAIN_LATER
from bus.cni import UNKNOWN_CONTAINER as UNKNOWN_CONTAINER
from bus.cni import VERSIONS as VERSIONS
from bus.cni import Call, items, veth_result, wishes
from bus.cni import CniError as CniError
from bus.cni import output as output
from bus.decode import Fields, Malformed
from services.networker.egress import egress_rules
from services.networker.forwards import port_forwards
from services.networker.identity import identity_of
from services.networker.record import Attachment


@dataclass(frozen=True, slots=True)
class Request(Call):
    """One call of the plugin, as the networker understands it."""

    @property
    def chained(self) -> bool:
        """Whether other plugins attach the container before ours, which then does the rest."""
        return self.config.get("chained") is True

    def attachment(self) -> Attachment:
        """What the workflow is asked for. Raises CniError."""
        try:
            runtime = Fields(self.config.get("runtimeConfig") or {}, "runtimeConfig")
            # Rules that are not valid let nothing out; only Garden's user can be told of them (garden_door).
            egress, _ = egress_rules(items(runtime, "netOutRules"), "runtimeConfig: netOutRules")
            result = Fields(self.config, "network configuration").mapping("prevResult") if self.chained else None
            return Attachment(
                self.handle,
                self.netns,
                self.ifname,
                str(self.config["name"]),
                identity_of(self.config, self.arguments),
                port_forwards(items(runtime, "portMappings"), "runtimeConfig: portMappings"),
                egress,
                wishes=wishes(runtime, self.arguments),
                result=result,
            )
        except Malformed as error:
            raise CniError(INVALID_CONFIG, str(error), version=self.version) from None


def parse(call: Fields) -> Request:
    """A call as the shim hands it on (docs/design.md, POST /cni). Raises CniError."""
    found = bus.cni.parse(call)
    return Request(found.command, found.handle, found.netns, found.ifname, found.arguments, found.config)


def result(attachment: Attachment, version: str, dns: Mapping[str, Any]) -> str:
    """What ADD answers, in the form of `version`. Where others attached the container, it is their result."""
    if attachment.result is not None:
        return output({**attachment.result, **({"dns": dict(dns)} if dns else {})})
    return output(result_value(attachment, version, dns))


def result_value(attachment: Attachment, version: str, dns: Mapping[str, Any]) -> dict[str, Any]:
    """The result of an attachment by the silk worker."""
    link = attachment.link
    assert link is not None  # noqa: S101 (only complete attachments are answered)
    return veth_result(
        version,
        ifname=attachment.ifname,
        netns=attachment.netns,
        interface=link.interface,
        mac=link.mac,
        peer_mac=link.peer_mac,
        mtu=link.mtu,
        address=str(link.address),
        gateway=str(link.gateway),
        dns=dns,
    )


def contradiction(config: Mapping[str, Any], attachment: Attachment) -> str | None:
    """What `prevResult` says of the container that is not so, or None; what it does not say is no contradiction."""
    previous, link = config.get("prevResult"), attachment.link
    if not isinstance(previous, dict) or link is None:
        return None
    addresses = {str(ip.get("address")).partition("/")[0] for ip in _objects(previous.get("ips"))}
    if addresses and str(link.address) not in addresses:
        return f"its address is {link.address}, prevResult has {', '.join(sorted(addresses))}"
    own = {attachment.ifname: link.peer_mac, link.interface: link.mac}
    named = {interface.get("name"): interface.get("mac") for interface in _objects(previous.get("interfaces"))}
    for name, mac in own.items():
        if named and name is not None and name not in named:
            return f"its interface {name} is not in prevResult"
        if mac is not None and named.get(name) not in (None, "", mac):
            return f"the MAC address of {name} is {mac}, prevResult has {named[name]}"
    return None


def _objects(value: object) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
