"""Which DNS servers a container is told of."""

from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from typing import Any

from bus.decode import Malformed


def nameservers(result: Mapping[str, Any] | None, config: Mapping[str, Any], setting: Sequence[str]) -> tuple[str, ...]:
    """Those of our plugin's configuration (`dns_servers`, or CNI's `dns.nameservers`), else of the other plugins'
    result, else of the setting. Raises Malformed for what is no address."""
    for found in (config.get("dns_servers"), _in(config), _in(result or {}), list(setting)):
        if found:
            if not isinstance(found, list):
                raise Malformed("dns_servers: must be a list of addresses")
            return tuple(check(server) for server in found)
    return ()


def check(server: object) -> str:
    try:
        return str(ip_address(server)) if isinstance(server, str) else _refuse(server)
    except ValueError:
        return _refuse(server)


def _refuse(server: object) -> str:
    raise Malformed(f'invalid DNS server "{server}", must be valid IP address')


def _in(value: Mapping[str, Any]) -> Any:
    dns = value.get("dns")
    return dns.get("nameservers") if isinstance(dns, Mapping) else None
