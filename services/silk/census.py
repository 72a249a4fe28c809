"""What there is of leases and subnets, counted: for the metrics, and to judge by whether leases may expire."""

from dataclasses import dataclass
from ipaddress import IPv4Network

from databases.core import Connection
from prometheus_client import Gauge

from services.silk.leases import LeaseStore
from services.silk.pool import Kind

SUBNETS = Gauge(
    "silkbus_silk_subnets", "Subnets of the pool, by state: all, leased, resting (not to be leased yet), free",
    ["kind", "state"],
)  # fmt: skip
LEASES = Gauge(
    "silkbus_silk_leases",
    "Leases, by state: all, overdue (not renewed for half their time), expired, outside (of no network of the pool)",
    ["state"],
)


@dataclass(frozen=True, slots=True)
class Stock:
    """The subnets of one kind. `free` ones can be leased to anybody at once."""

    all: int
    leased: int
    resting: int

    @property
    def free(self) -> int:
        return self.all - self.leased - self.resting


@dataclass(frozen=True, slots=True)
class Census:
    """At `now`, of the database's clock: leases in all, and those of them that are overdue, expired, or outside.

    `ahead` is how many times are written down that are yet to come: the clock was set back.
    """

    now: int
    leases: int
    overdue: int
    expired: int
    outside: int
    ahead: int
    stock: dict[Kind, Stock]

    def show(self) -> None:
        """Set the metrics."""
        for kind, stock in self.stock.items():
            for state in ("all", "leased", "resting", "free"):
                SUBNETS.labels(kind, state).set(getattr(stock, state))
        for state, number in (
            ("all", self.leases),
            ("overdue", self.overdue),
            ("expired", self.expired),
            ("outside", self.outside),
        ):
            LEASES.labels(state).set(number)


async def take(store: LeaseStore) -> Census:
    """Count. Raises what the database raises."""
    terms = store.terms

    async def work(connection: Connection) -> Census:
        now = int(await connection.fetch_val(f"SELECT {store.clock} AS now"))
        rows = await connection.fetch_all(
            f"SELECT subnet, renewed_at, {store.ends_at} AS ends_at FROM leases"  # noqa: S608
        )
        former = await connection.fetch_all(
            "SELECT subnet, released_at FROM former_leases WHERE released_at > :rested", {"rested": now - terms.rest}
        )
        times = [row["renewed_at"] for row in rows] + [row["released_at"] for row in former]
        leased = [row["subnet"] for row in rows]
        stock = {}
        for kind in Kind:
            taken = terms.pool.covered(kind, leased)
            resting = terms.pool.covered(kind, (row["subnet"] for row in former)) - taken
            stock[kind] = Stock(terms.pool.size(kind), len(taken), len(resting))
        return Census(
            now=now,
            leases=len(rows),
            overdue=sum((row["renewed_at"] + row["ends_at"]) / 2 < now for row in rows),
            expired=sum(row["ends_at"] < now for row in rows),
            outside=sum(terms.pool.kind_of(IPv4Network(subnet)) is None for subnet in leased),
            ahead=sum(time > now for time in times),
            stock=stock,
        )

    return await store.ledger.read(work)
