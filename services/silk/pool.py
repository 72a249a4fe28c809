"""The subnets that can be leased, cut from the networks of the overlay (contract/cell.md 4.5).

Each network is cut into blocks of one size, one for each cell. The first block of each network is nobody's: its
addresses, but for the first, are leased one by one to machines without containers ("singles", /32). Adding a network
adds to both and moves nothing. Blocks are computed when asked for, in numbers: a /8 has 65 535 of /24.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Network
from itertools import combinations
from socket import inet_aton

from bus.decode import Malformed

MAX_BLOCK_PREFIX = 30
_BITS = 32


class Kind(StrEnum):
    """What a lease is of: a block for a cell's containers, or a single address for a machine without."""

    BLOCK = "block"
    SINGLE = "single"


@dataclass(frozen=True, slots=True)
class Pool:
    """All blocks of `prefix_length`, and all singles, of these networks. Raises Malformed for what cannot be cut."""

    networks: tuple[IPv4Network, ...]
    prefix_length: int

    def __post_init__(self) -> None:
        if not self.networks:
            raise Malformed("overlay_network: name at least one network")
        for network in self.networks:
            if not network.prefixlen < self.prefix_length <= MAX_BLOCK_PREFIX:
                raise Malformed(
                    f"subnet_prefix_length: must be longer than that of {network} and at most {MAX_BLOCK_PREFIX},"
                    f" not {self.prefix_length}"
                )
        for one, other in combinations(self.networks, 2):
            if one.overlaps(other):
                raise Malformed(f"overlay_network: {one} and {other} overlap: name the larger one only")

    def __str__(self) -> str:
        return ", ".join(map(str, self.networks))

    def kind_of(self, subnet: IPv4Network) -> Kind | None:
        """Which kind of the pool's subnets this is; None for one that is none of them."""
        for kind in Kind:
            base = int(subnet.network_address)
            if subnet.prefixlen == self._prefix(kind) and any(base in span for span in self._spans(kind)):
                return kind
        return None

    def size(self, kind: Kind) -> int:
        return sum(len(span) for span in self._spans(kind))

    def subnets(self, kind: Kind) -> Iterator[IPv4Network]:
        """All subnets of that kind, ascending within each network."""
        for span in self._spans(kind):
            for base in span:
                yield self.subnet(kind, base)

    def bases(self, kind: Kind) -> Iterator[int]:
        """The base addresses of `subnets`, as numbers."""
        for span in self._spans(kind):
            yield from span

    def subnet(self, kind: Kind, base: int) -> IPv4Network:
        return IPv4Network((base, self._prefix(kind)))

    def covered(self, kind: Kind, subnets: Iterable[str]) -> set[int]:
        """The bases of the pool's subnets that share an address with any of these, whatever their size.

        Leases given while the pool was another one still cover their addresses. They are texts, as in SQL: making a
        network of each takes several times as long as all the rest of leasing one.
        """
        found: set[int] = set()
        spans = self._spans(kind)
        for subnet in subnets:
            address, _, length = subnet.partition("/")
            first = int.from_bytes(inet_aton(address))
            end = first + (1 << (_BITS - int(length)))
            for span in spans:
                low, high = max(first - first % span.step, span.start), min(end, span.stop)
                found.update(range(low, high, span.step))
        return found

    def _prefix(self, kind: Kind) -> int:
        return self.prefix_length if kind is Kind.BLOCK else _BITS

    def _spans(self, kind: Kind) -> list[range]:
        """The bases of that kind in each network."""
        size = 1 << (_BITS - self.prefix_length)
        starts = [(int(network.network_address), network.num_addresses) for network in self.networks]
        if kind is Kind.BLOCK:
            return [range(start + size, start + count, size) for start, count in starts]
        return [range(start + 1, start + size) for start, _ in starts]
