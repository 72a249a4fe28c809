"""Version v1 of the external API's shapes: policies with port ranges (contract/policy.md 1.4, 1.5)."""

from collections.abc import Iterable

from bus.json_input import Object, get_integer, get_object
from bus.messages import Policy
from services.policy import wire
from services.policy.wire import MAX_PORT, Invalid


class _Shape(wire.Shape):
    def read_ports(self, destination: Object, where: str) -> None:
        ports = get_object(destination, "ports", where)
        self.start = get_integer(ports, "start", f"{where}.ports")
        self.end = get_integer(ports, "end", f"{where}.ports")

    def range(self) -> tuple[int, int]:
        if self.start > self.end:
            raise Invalid(f"invalid port range {self.start}-{self.end}, start must be less than or equal to end")
        if self.start < 0:
            raise Invalid(f"invalid start port {self.start}, must be in range 1-65535")
        if self.start == 0:
            raise Invalid("missing start port")
        if self.end > MAX_PORT:
            raise Invalid(f"invalid end port {self.end}, must be in range 1-65535")
        return self.start, self.end


def decode(body: bytes) -> list[Policy]:
    """As `Wire.decode`."""
    return wire.decode(body, _Shape)


def encode(policies: Iterable[Policy]) -> bytes:
    """As `Wire.encode`: all of them."""
    return wire.encode([item(policy) for policy in policies])


def item(policy: Policy) -> str:
    """One policy as JSON."""
    return wire.encode_item(policy, f'"ports":{{"start":{policy.ports.start},"end":{policy.ports.end}}}')
