"""What the services speak of, defined once: policies, tags, security groups, leases, containers.

Each type has one `encode` (to plain msgpack or JSON values) and one decoder that refuses what is malformed
(`bus.decode.Malformed`). Nothing here knows how it travels: tables, requests, records and sockets carry these.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network
from typing import Any, NewType

from bus.decode import Fields, Malformed
from bus.security_groups import EgressRule, SpaceId
from bus.security_groups import SecurityGroup as SecurityGroup
from bus.security_groups import decode_security_group_entry as decode_security_group_entry

AppId = NewType("AppId", str)
"""A policy group: an app's GUID, or another group's name such as INGRESS_ROUTER. Opaque, 1..255 characters."""
Tag = NewType("Tag", int)
"""The 16-bit mark of an app's traffic, 1..65535 (contract/policy.md 1.9); 0 is never given."""
Revision = NewType("Revision", int)
"""A table's revision: 0 is the empty table, each committed change adds 1."""
CellName = NewType("CellName", str)
"""A cell, as one NATS subject token: letters, digits, '-' and '_', at most 63."""
Handle = NewType("Handle", str)
"""A container, as its runtime calls it: Garden's handle, CNI's container id."""

MAX_TAG = 0xFFFF
MAX_APP_ID = 255
_CELL = re.compile(r"[A-Za-z0-9_-]{1,63}")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


def cell_name(text: str) -> CellName:
    if not _CELL.fullmatch(text):
        raise Malformed(f"cell: {text!r} is not a cell name: 1 to 63 letters, digits, '-' or '_'")
    return CellName(text)


class Protocol(StrEnum):
    TCP = "tcp"
    UDP = "udp"


@dataclass(frozen=True, slots=True, order=True)
class Ports:
    """One protocol and an inclusive range of destination ports, 1..65535."""

    protocol: Protocol
    start: int
    end: int

    def __post_init__(self) -> None:
        if not 1 <= self.start <= self.end <= 65535:
            raise Malformed(f"ports: {self.start}-{self.end} is not a range within 1-65535")

    def encode(self) -> list[Any]:
        return [str(self.protocol), self.start, self.end]

    @classmethod
    def decode(cls, value: object) -> "Ports":
        match value:
            case [str(protocol), int(start), int(end)] if protocol in ("tcp", "udp"):
                return cls(Protocol(protocol), start, end)
        raise Malformed(f"ports: must be [protocol, start, end], not {value!r}")


@dataclass(frozen=True, slots=True, order=True)
class Policy:
    """Source may open connections to destination on these ports."""

    source: AppId
    destination: AppId
    ports: Ports


@dataclass(frozen=True, slots=True)
class Lease:
    """A subnet of the overlay, leased to a cell.

    `mac` is the address of the cell's VTEP, derived from the subnet's base address (contract/cell.md 4.5).
    """

    subnet: IPv4Network
    cell: CellName
    underlay: IPv4Address
    mac: str

    def encode(self) -> dict[str, Any]:
        return {"subnet": str(self.subnet), "cell": self.cell, "underlay": str(self.underlay), "mac": self.mac}

    @classmethod
    def decode(cls, value: object, where: str = "lease") -> "Lease":
        fields = Fields(value, where)
        mac = fields.text("mac")
        if not _MAC.fullmatch(mac):
            raise fields.malformed("mac", f"not a MAC address: {mac!r}")
        return cls(fields.network("subnet"), cell_name(fields.text("cell")), fields.address("underlay"), mac)


CELL_SILENT = 10.0
"""Seconds after which a cell that has not said its state is taken for unreachable."""


@dataclass(frozen=True, slots=True)
class CellState:
    """What a cell says of itself: the revision of the policies that its kernel has, of which epoch.

    `epoch` is empty before the first. `table` is the state of its replica (bus.tables), `problem` why its kernel is not
    as it should be, or empty.
    """

    epoch: str
    revision: Revision
    table: str
    problem: str = ""

    def encode(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch or None,
            "revision": self.revision,
            "table": self.table,
            "problem": self.problem or None,
        }

    @classmethod
    def decode(cls, fields: Fields) -> "CellState":
        return cls(
            fields.optional_text("epoch", max_length=64) or "",
            Revision(fields.integer("revision")),
            fields.text("table", max_length=20),
            fields.optional_text("problem", max_length=1000) or "",
        )


class Stage(StrEnum):
    """How far a container's attachment has come. What is not `ready` is nobody's, and is taken apart if left so."""

    ATTACHING = "attaching"
    READY = "ready"
    REMOVING = "removing"


class Workload(StrEnum):
    """What a container is for (contract/cell.md 2.4 d): which security groups and deny networks concern it."""

    APP = "app"
    TASK = "task"
    STAGING = "staging"


@dataclass(frozen=True, slots=True, order=True)
class PortForward:
    """What arrives at `host_port` of this cell goes to `container_port` of the container.

    `host_address` is the cell's address that it must arrive at; None is the cell's own underlay address.
    """

    host_port: int
    container_port: int
    protocol: Protocol = Protocol.TCP
    host_address: IPv4Address | None = None

    def __post_init__(self) -> None:
        for name, port in (("host_port", self.host_port), ("container_port", self.container_port)):
            if not 1 <= port <= 65535:
                raise Malformed(f"port forwarding: {name}: must be in 1..65535, not {port}")

    def encode(self) -> dict[str, Any]:
        return {
            "host_port": self.host_port,
            "container_port": self.container_port,
            "protocol": str(self.protocol),
            "host_address": None if self.host_address is None else str(self.host_address),
        }

    @classmethod
    def decode(cls, value: object, where: str = "port forwarding") -> "PortForward":
        fields = Fields(value, where)
        protocol = fields.text("protocol")
        if protocol not in tuple(Protocol):
            raise fields.malformed("protocol", f"must be one of {', '.join(Protocol)}, not {protocol!r}")
        return cls(
            fields.integer("host_port"),
            fields.integer("container_port"),
            Protocol(protocol),
            fields.address("host_address") if "host_address" in fields else None,
        )


@dataclass(frozen=True, slots=True)
class Container:
    """One container on this cell: the record the networker keeps and the enforcer enforces.

    `app` is the policy group whose policies apply; without one the container has none. `address` and `interface` (its
    link in the cell's namespace; absent when another CNI plugin attached it without one) are known once attached.
    `workload` and `space` say which security groups are its; None where the runtime does not say. `ports` are those
    the app listens on. `egress` is what its runtime's specification lets out, the security groups as they were when it
    was made, in force where the table of security groups is not used; `opened` is what the runtime let out since, in
    force whatever the groups say. `metadata` is what the runtime gave us, unread: org and log identity for those who
    need them. A record of an earlier version has none of workload to opened.
    """

    handle: Handle
    netns: str
    stage: Stage
    app: AppId | None = None
    address: IPv4Address | None = None
    interface: str | None = None
    workload: Workload | None = None
    space: SpaceId | None = None
    ports: tuple[int, ...] = ()
    forwards: tuple[PortForward, ...] = ()
    egress: tuple[EgressRule, ...] = ()
    opened: tuple[EgressRule, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def encode(self) -> dict[str, Any]:
        return {
            "handle": self.handle,
            "netns": self.netns,
            "stage": str(self.stage),
            "app": self.app,
            "address": None if self.address is None else str(self.address),
            "interface": self.interface,
            "workload": None if self.workload is None else str(self.workload),
            "space": self.space,
            "ports": list(self.ports),
            "forwards": [forward.encode() for forward in self.forwards],
            "egress": [rule.encode() for rule in self.egress],
            "opened": [rule.encode() for rule in self.opened],
            "metadata": dict(self.metadata),
        }

    @classmethod
    def decode(cls, value: object, where: str = "container") -> "Container":
        fields = Fields(value, where)
        stage = fields.text("stage")
        if stage not in tuple(Stage):
            raise fields.malformed("stage", f"must be one of {', '.join(Stage)}, not {stage!r}")
        app = fields.optional_text("app", max_length=MAX_APP_ID)
        workload = fields.optional_text("workload")
        if workload is not None and workload not in tuple(Workload):
            raise fields.malformed("workload", f"must be one of {', '.join(Workload)}, not {workload!r}")
        space = fields.optional_text("space", max_length=MAX_APP_ID)
        ports = _some(fields, "ports")
        if not all(type(port) is int and 1 <= port <= 65535 for port in ports):
            raise fields.malformed("ports", f"must be in 1..65535, not {ports!r}")
        return cls(
            handle=Handle(fields.text("handle")),
            netns=fields.text("netns"),
            stage=Stage(stage),
            app=None if app is None else AppId(app),
            address=fields.address("address") if "address" in fields else None,
            interface=fields.optional_text("interface", max_length=15),
            workload=None if workload is None else Workload(workload),
            space=None if space is None else SpaceId(space),
            ports=tuple(ports),
            forwards=tuple(PortForward.decode(item, f"{where}: forwards") for item in _some(fields, "forwards")),
            egress=tuple(EgressRule.decode(item, f"{where}: egress") for item in _some(fields, "egress")),
            opened=tuple(EgressRule.decode(item, f"{where}: opened") for item in _some(fields, "opened")),
            metadata=fields.mapping("metadata") if "metadata" in fields else {},
        )


def _some(fields: Fields, name: str) -> list[Any]:
    return list(fields.items(name)) if name in fields else []


# The tables on the bus. A key is a tuple of texts; a value is always whole. Decoders give typed values.

PolicyKey = tuple[str, ...]
"""("policy", destination, source) -> tuple[Ports, ...], or ("tag", app) -> Tag: both under one revision."""


def policy_key(destination: AppId, source: AppId) -> PolicyKey:
    return ("policy", destination, source)


def tag_key(app: AppId) -> PolicyKey:
    return ("tag", app)


def decode_policy_entry(key: tuple[str, ...], value: object) -> "tuple[Ports, ...] | Tag":
    """A value of the `policies` table, by the kind its key names."""
    match key, value:
        case ("policy", str(), str()), [_, *_] if isinstance(value, (list, tuple)):
            return tuple(Ports.decode(item) for item in value)
        case ("tag", str()), int(tag) if 1 <= tag <= MAX_TAG:
            return Tag(tag)
    raise Malformed(f"policies table: no entry can be {key!r} -> {value!r}")


def lease_key(subnet: IPv4Network) -> tuple[str, ...]:
    return (str(subnet),)


def decode_lease_entry(key: tuple[str, ...], value: object) -> Lease:
    """A value of the `leases` table: subnet -> Lease."""
    lease = Lease.decode(value, f"lease {key!r}")
    if key != lease_key(lease.subnet):
        raise Malformed(f"leases table: key {key!r} does not name the subnet {lease.subnet}")
    return lease
