"""Port mappings as runtimes give them, in Garden's spelling (`host_port`) or CNI's (`hostPort`), as our port forwards.

Garden's say nothing of a protocol: its forwards are TCP (contract/cell.md 2.4 c). CNI's are as its capability
`portMappings` has them: `hostIP`, where given, is the only address of the host that is forwarded.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from bus.decode import Fields, Malformed
from bus.messages import PortForward, Protocol

# All of the cell's addresses, as far as they are forwarded: IPv4 only, as containers have no other addresses.
_ANY_ADDRESS = ("", "0.0.0.0", "::")  # noqa: S104 (what runtimes write, not what is bound)


def port_forwards(mappings: Sequence[Any], where: str) -> tuple[PortForward, ...]:
    """The forwards, without repetitions. Raises Malformed, with the place of the mapping that is at fault."""
    found = (_forward(item, Fields(item, f"{where}[{number}]")) for number, item in enumerate(mappings))
    return tuple(dict.fromkeys(forward for forward in found if forward is not None))


def _forward(mapping: Mapping[str, Any], fields: Fields) -> PortForward | None:
    host_port, container_port = _port(fields, "host_port", "hostPort"), _port(fields, "container_port", "containerPort")
    if host_port is None or container_port is None:
        missing = "host_port" if host_port is None else "container_port"
        raise fields.malformed(missing, "missing")
    if host_port == 0 and "hostPort" in fields:
        return None  # CNI's way to say that the port is the container's only
    protocol = fields.text("protocol").lower() if mapping.get("protocol") else str(Protocol.TCP)
    if protocol not in tuple(Protocol):
        raise fields.malformed("protocol", f"only {' and '.join(Protocol)} can be forwarded, not {protocol!r}")
    address = None if mapping.get("hostIP") in (None, *_ANY_ADDRESS) else fields.address("hostIP")
    try:
        return PortForward(host_port, container_port, Protocol(protocol), address)
    except Malformed as error:
        raise Malformed(f"{fields.where}: {error}") from None


def _port(fields: Fields, *names: str) -> int | None:
    return next((fields.integer(name, high=65535) for name in names if name in fields), None)
