"""Who may publish and hear what on NATS: the least that each role needs, each grant with its reason.

The roles are those of `bus.connection.connect`; the subjects those of bus/subjects.py. Two things that permissions
alone do not give, and how they are had:

- A server answers wherever a request says, and may publish where the one who asks may not. So services answer to
  inboxes only (bus/micro.py), and are given no inboxes to publish to: NATS lets them answer (`allow_responses`) what
  they were asked, for a while.
- JetStream, asked for a message, delivers it wherever the request says, in the stream's account, whoever may publish
  there. So readers have an account of their own: what they ask for crosses into it and can go nowhere else. For the
  same reason they make no consumers; the relay makes one for each reader, of the reader's name.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from bus import subjects
from bus.tables import LEASES, POLICIES, SECURITY_GROUPS

POLICY_SERVER = "policy-server"
SILK_CONTROLLER = "silk-controller"
CELL = "cell"
READER = "reader"
OPERATOR = "operator"

TABLES = {POLICY_SERVER: (POLICIES.name, SECURITY_GROUPS.name), SILK_CONTROLLER: (LEASES.name,)}
"""The tables of each central service, which nobody else publishes."""
WITH_EVENTS = (POLICIES.name, LEASES.name)
"""The tables whose changes are told as events, too."""


@dataclass(frozen=True, slots=True)
class Grant:
    """Subjects as NATS writes them in permissions (`subject` or `subject queue`), and why they are granted."""

    why: str
    subjects: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class User:
    """One identity: the name in its certificate, and its grants. `answers`: may answer what it was asked."""

    role: str
    name: str
    publish: tuple[Grant, ...]
    subscribe: tuple[Grant, ...]
    answers: bool = False

    @property
    def identity(self) -> str:
        """The DNS name in its certificate, by which NATS knows it: `NAME.ROLE.silkbus`, or `ROLE.silkbus`."""
        return ".".join(part for part in (self.name, self.role, subjects.ROOT) if part)


def streams() -> Iterator[str]:
    for table in (*WITH_EVENTS, subjects.CONTAINERS):
        yield subjects.event_stream(table)


def reader_services(reader: str) -> tuple[tuple[str, str, bool], ...]:
    """What a reader asks of the account of the streams: why, subject, whether the answer is of several messages."""
    return tuple(
        service
        for stream in streams()
        for service in (
            ("fetch events", f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{reader}", True),
            ("see how far it is", f"$JS.API.CONSUMER.INFO.{stream}.{reader}", False),
            ("say what it is done with", f"$JS.ACK.{stream}.{reader}.>", False),
        )
    )


def _inbox(role: str, name: str) -> Grant:
    return Grant("the answers to its own questions", (f"{subjects.inbox(role, name or '*')}.>",))


def _making(stream: str) -> list[Grant]:
    """To make a stream of events and its readers' consumers."""
    return [
        Grant("makes the stream", tuple(f"$JS.API.STREAM.{verb}.{stream}" for verb in ("CREATE", "INFO"))),
        Grant(
            "makes the consumers of the readers",
            (
                f"$JS.API.CONSUMER.CREATE.{stream}.*",
                f"$JS.API.CONSUMER.DURABLE.CREATE.{stream}.*",
                f"$JS.API.CONSUMER.INFO.{stream}.*",
            ),
        ),
    ]


def central(role: str) -> User:
    """The policy server or the Silk controller: all its instances are one user, as they do the same."""
    publish: list[Grant] = []
    subscribe: list[Grant] = []
    for table in TABLES[role]:
        subscribe.append(Grant("who asks for its table", (f"{subjects.table_fetch(table)} publishers",)))
        publish.append(
            Grant(
                "changes of its table, and heartbeats", (subjects.table_change(table), subjects.table_heartbeat(table))
            )
        )
        if table not in WITH_EVENTS:
            continue
        stream = subjects.event_stream(table)
        publish += [
            Grant("events, which the stream takes in", (subjects.event(table, ">"),)),
            Grant("the relay looks what the stream's last messages are", (f"$JS.API.STREAM.MSG.GET.{stream}",)),
            *_making(stream),
        ]
    if role == POLICY_SERVER:
        leases = LEASES.name
        publish += [
            Grant("asks which cells there are", (subjects.table_fetch(leases),)),
            Grant("asks all cells what becomes of a flow", (subjects.EXPLAIN,)),
        ]
        subscribe += [
            Grant("which cells there are", (subjects.table_change(leases), subjects.table_heartbeat(leases))),
            Grant("what cells have of its table", (subjects.cell("*", "state"),)),
            Grant("what cells say of a flow", (subjects.cell("*", "explained"),)),
        ]
    if role == SILK_CONTROLLER:
        publish += _making(subjects.event_stream(subjects.CONTAINERS))
        subscribe.append(Grant("cells that ask for their lease", (f"{subjects.lease('*', '*')} {SILK_CONTROLLER}",)))
    verbs = ("PING", "INFO", "STATS")
    subscribe.append(
        Grant(
            "operators who look for services and their statistics",
            tuple(f"$SRV.{verb}{of}" for verb in verbs for of in ("", f".{role}", f".{role}.*")),
        )
    )
    subscribe.append(_inbox(role, ""))
    return User(role, "", tuple(publish), tuple(subscribe), answers=True)


def cell(name: str) -> User:
    """All services of one cell."""
    return User(
        CELL,
        name,
        publish=(
            Grant("asks for tables", (subjects.table_fetch("*"),)),
            Grant("asks for its own lease; the subject says who asks", (subjects.lease(name, "*"),)),
            Grant(
                "tells of itself and its containers, under its own name only; the latter on JetStream",
                (subjects.cell(name, "*"), subjects.container(name, "*")),
            ),
        ),
        subscribe=(
            Grant("follows tables", (subjects.table_change("*"), subjects.table_heartbeat("*"))),
            Grant("what becomes of a flow, which it answers under its own name", (subjects.EXPLAIN,)),
            _inbox(CELL, name),
        ),
    )


def reader(name: str) -> User:
    """Another component, which reads events and nothing else."""
    return User(
        READER,
        name,
        publish=tuple(Grant(why, (subject,)) for why, subject, _ in reader_services(name)),
        subscribe=(_inbox(READER, name),),
    )


def operator() -> User:
    """A person who looks after the services: `nats micro …`, with --inbox-prefix _INBOX.operator.NAME."""
    return User(
        OPERATOR,
        "",
        publish=(Grant("asks services how they are", ("$SRV.>",)),),
        subscribe=(Grant("which flows cells refuse", (subjects.cell("*", "denied"),)), _inbox(OPERATOR, "")),
    )
