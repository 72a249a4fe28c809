"""Version v0 of the external API's shapes: policies with one port (contract/policy.md 1.4, 1.5).

It shares the store with v1. A range of ports cannot be expressed, so such policies are neither listed nor counted.
"""

from collections.abc import Iterable

from bus.json_input import Object, get_integer
from bus.messages import Policy
from services.policy import wire
from services.policy.wire import MAX_PORT, Invalid


class _Shape(wire.Shape):
    def read_ports(self, destination: Object, where: str) -> None:
        self.port = get_integer(destination, "port", where)

    def range(self) -> tuple[int, int]:
        if self.port == 0:
            raise Invalid("missing port")
        if not 0 < self.port <= MAX_PORT:  # the original had no upper bound
            raise Invalid(f"invalid port {self.port}, must be in range 1-65535")
        return self.port, self.port


def decode(body: bytes) -> list[Policy]:
    """As `Wire.decode`."""
    return wire.decode(body, _Shape)


def encode(policies: Iterable[Policy]) -> bytes:
    """As `Wire.encode`: those with a single port."""
    return wire.encode(
        [
            wire.encode_item(policy, f'"port":{policy.ports.start}')
            for policy in policies
            if policy.ports.start == policy.ports.end
        ]
    )
