"""What the policy server asks the cells about a flow, and what each says: defined here as `bus.messages` has the rest.

A question goes to all cells at once. Each answers under its own name (`silkbus.cell.CELL.explained`), which NATS lets
nobody else use, and repeats the question's id; so no cell can speak for another, and none needs an inbox to publish to.
A cell without an instance of either app says so, with no instances: then it is known at once who has not answered.
"""

from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address
from typing import Any

from bus.decode import Fields, Malformed
from bus.messages import MAX_APP_ID, AppId, CellName, Handle, Protocol, Revision, cell_name

MAX_TARGETS = 20
"""Addresses that one question has probed."""
MAX_INSTANCES = 500
MAX_ID = 64
_LONG = 1000


class Verdict(StrEnum):
    """What becomes of the flow at one instance, by the rules of its cell."""

    PASSES = "passes"
    REFUSED = "refused"
    UNKNOWN = "unknown"


class Outcome(StrEnum):
    """What a probe met. `sent` is all that UDP can say."""

    CONNECTED = "connected"
    REFUSED = "refused"
    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"
    SENT = "sent"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Question:
    """A flow from one app's instances to a port of another's. With `targets`, the source's instances try these."""

    id: str
    source: AppId
    destination: AppId
    protocol: Protocol
    port: int
    targets: tuple[IPv4Address, ...] = ()

    def encode(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "source": self.source,
            "destination": self.destination,
            "protocol": str(self.protocol),
            "port": self.port,
            "targets": [str(address) for address in self.targets],
        }

    @classmethod
    def decode(cls, fields: Fields) -> "Question":
        protocol = _one_of(fields, "protocol", Protocol)
        targets = fields.items("targets")
        if len(targets) > MAX_TARGETS:
            raise fields.malformed("targets", f"at most {MAX_TARGETS}, not {len(targets)}")
        return cls(
            fields.text("id", max_length=MAX_ID),
            AppId(fields.text("source", max_length=MAX_APP_ID)),
            AppId(fields.text("destination", max_length=MAX_APP_ID)),
            protocol,
            fields.integer("port", low=1, high=65535),
            tuple(_address(item, f"{fields.where}: targets") for item in targets),
        )


@dataclass(frozen=True, slots=True)
class Probe:
    """A connection that was really tried: to whom, what came of it after how long, and the system's words if any."""

    address: IPv4Address
    outcome: Outcome
    milliseconds: float
    error: str = ""

    def encode(self) -> dict[str, Any]:
        return {
            "address": str(self.address),
            "outcome": str(self.outcome),
            "milliseconds": self.milliseconds,
            "error": self.error or None,
        }

    @classmethod
    def decode(cls, value: object, where: str) -> "Probe":
        fields = Fields(value, where)
        return cls(
            fields.address("address"),
            _one_of(fields, "outcome", Outcome),
            fields.number("milliseconds"),
            fields.optional_text("error", max_length=_LONG) or "",
        )


@dataclass(frozen=True, slots=True)
class Instance:
    """What a cell says of one container of its own, as an end of the flow.

    `reason` is for people; `chain` and `rule` the one that decides, as iptables writes it, empty where none does.
    `kernel_agrees` is whether the kernel holds, right now, the rules and set members that the verdict comes from:
    None if it could not be looked; `differences` say where it does not.
    """

    handle: Handle
    address: IPv4Address
    verdict: Verdict
    reason: str
    chain: str = ""
    rule: str = ""
    kernel_agrees: bool | None = None
    differences: tuple[str, ...] = ()
    probes: tuple[Probe, ...] | None = None

    def encode(self) -> dict[str, Any]:
        return {
            "handle": self.handle,
            "address": str(self.address),
            "verdict": str(self.verdict),
            "reason": self.reason,
            "chain": self.chain or None,
            "rule": self.rule or None,
            "kernel_agrees": self.kernel_agrees,
            "differences": list(self.differences),
            "probes": None if self.probes is None else [probe.encode() for probe in self.probes],
        }

    @classmethod
    def decode(cls, value: object, where: str) -> "Instance":
        fields = Fields(value, where)
        differences = fields.items("differences")
        if not all(isinstance(item, str) for item in differences):
            raise fields.malformed("differences", "must be texts")
        probes = None
        if "probes" in fields:
            items = fields.items("probes")[:MAX_TARGETS]
            probes = tuple(Probe.decode(item, f"{where}: probes") for item in items)
        return cls(
            Handle(fields.text("handle", max_length=_LONG)),
            fields.address("address"),
            _one_of(fields, "verdict", Verdict),
            fields.text("reason", max_length=_LONG),
            fields.optional_text("chain", max_length=_LONG) or "",
            fields.optional_text("rule", max_length=_LONG) or "",
            fields.flag("kernel_agrees") if "kernel_agrees" in fields else None,
            tuple(item[:_LONG] for item in differences[:MAX_TARGETS]),
            probes,
        )


@dataclass(frozen=True, slots=True)
class CellAnswer:
    """A cell's answer: its instances of the source and of the destination, by the policies of `revision`."""

    id: str
    cell: CellName
    revision: Revision
    sources: tuple[Instance, ...] = ()
    destinations: tuple[Instance, ...] = ()
    problem: str = ""

    def encode(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "revision": self.revision,
            "sources": [instance.encode() for instance in self.sources],
            "destinations": [instance.encode() for instance in self.destinations],
            "problem": self.problem or None,
        }

    @classmethod
    def decode(cls, cell: str, fields: Fields) -> "CellAnswer":
        """The answer of `cell`, which the subject names."""
        where = f"{fields.where}: instance"
        return cls(
            fields.text("id", max_length=MAX_ID),
            cell_name(cell),
            Revision(fields.integer("revision")),
            tuple(Instance.decode(item, where) for item in fields.items("sources")[:MAX_INSTANCES]),
            tuple(Instance.decode(item, where) for item in fields.items("destinations")[:MAX_INSTANCES]),
            fields.optional_text("problem", max_length=_LONG) or "",
        )


def _one_of(fields: Fields, name: str, kind: Any) -> Any:
    value = fields.text(name, max_length=_LONG)
    if value not in tuple(kind):
        raise fields.malformed(name, f"must be one of {', '.join(kind)}, not {value[:40]!r}")
    return kind(value)


def _address(item: object, where: str) -> IPv4Address:
    try:
        return IPv4Address(str(item))
    except ValueError:
        raise Malformed(f"{where}: not an IPv4 address: {str(item)[:40]!r}") from None
