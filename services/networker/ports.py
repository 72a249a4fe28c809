"""Which ports of the cell are forwarded to which container.

The records say it; this is what they say, kept in memory so that choosing a port is one step that nobody can come
between. It lives as long as the record: taken before the record is first written, given back after it is deleted. So
neither two calls at once nor a crash can give a port twice, or lose one.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from bus.decode import Malformed
from bus.messages import Container, Handle, PortForward, Protocol
from services.networker.errors import Conflict, Failed

LAST_PORT = 65535


@dataclass(frozen=True, slots=True)
class Mapping:
    """A port that is to be forwarded; `host_port` 0 is for the pool to choose."""

    host_port: int
    container_port: int


@dataclass(frozen=True, slots=True)
class Range:
    """`total` ports from `start` on, to choose from, as far as there are so many: the original's default, 5000 from
    61000 on, ends beyond the last port."""

    start: int
    total: int

    @property
    def ports(self) -> range:
        return range(self.start, min(self.start + self.total, LAST_PORT + 1))

    def __str__(self) -> str:
        return f"{self.ports[0]}-{self.ports[-1]}"


class PortPool:
    def __init__(self) -> None:
        self._taken: dict[Handle, tuple[PortForward, ...]] = {}

    def load(self, records: Iterable[Container]) -> None:
        """Take what the records of this cell say."""
        for record in records:
            if record.forwards:
                self._taken[record.handle] = record.forwards

    @property
    def handles(self) -> Collection[Handle]:
        """The containers that have ports."""
        return self._taken.keys()

    def take(self, handle: Handle, forwards: Sequence[PortForward]) -> None:
        """Give these ports to a container, beside those that it has. Raises Conflict if one is another's."""
        own = self._taken.get(handle, ())
        for place, forward in enumerate(forwards):
            same = ((handle, each) for each in (*own, *forwards[:place]) if each != forward)
            for owner, taken in [*self._of_others(handle), *same]:
                if _overlap(forward, taken):
                    raise Conflict(
                        f"port {forward.host_port}/{forward.protocol} of the cell is forwarded to container {owner} "
                        f"(port {taken.container_port}): choose another, or remove that container"
                    )
        if forwards:
            self._taken[handle] = tuple(dict.fromkeys((*own, *forwards)))

    def choose(
        self,
        handle: Handle,
        mappings: Sequence[Mapping],
        ports: Range,
        used: Collection[int] = (),
        *,
        same: bool = False,
    ) -> tuple[PortForward, ...]:
        """The forwards of these mappings, in their order, as `take` gives them; `used` are ports to be left alone.

        With `same` the container's port is the host's where none is given.

        The lowest free port is chosen (contract/cell.md 1.7). Raises Failed when there is none, and Conflict.
        """
        explicit = {mapping.host_port for mapping in mappings}
        every = {forward.host_port for taken in self._taken.values() for forward in taken if _is_tcp(forward)}
        free = (port for port in ports.ports if port not in every and port not in explicit and port not in used)
        chosen = []
        for mapping in mappings:
            if (port := mapping.host_port or next(free, None)) is None:
                raise Failed(
                    f"port pool exhausted: all {len(ports.ports)} ports of {ports} are taken; remove containers, "
                    "or raise nat_port_range_size (total_ports in the configuration)"
                )
            inside = mapping.container_port or (port if same else 0)
            chosen.append(_forward(port, inside))
        self.take(handle, chosen)
        return tuple(chosen)

    def keep(self, handle: Handle, forwards: tuple[PortForward, ...]) -> None:
        """A container has these ports and no others any more."""
        if forwards:
            self._taken[handle] = forwards
        else:
            self._taken.pop(handle, None)

    def _of_others(self, handle: Handle) -> Iterable[tuple[Handle, PortForward]]:
        return ((owner, each) for owner, taken in self._taken.items() if owner != handle for each in taken)


def _forward(host_port: int, container_port: int) -> PortForward:
    try:
        return PortForward(host_port, container_port)
    except Malformed as error:
        raise Failed(str(error)) from None


def _is_tcp(forward: PortForward) -> bool:
    return forward.protocol is Protocol.TCP


def _overlap(one: PortForward, other: PortForward) -> bool:
    addresses = {one.host_address, other.host_address}
    return (one.protocol, one.host_port) == (other.protocol, other.host_port) and (
        len(addresses) == 1 or None in addresses
    )
