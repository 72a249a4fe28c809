"""The NATS subjects, laid out so that permissions can be least.

    silkbus.table.TABLE.change       servers publish, everybody follows
    silkbus.table.TABLE.heartbeat    servers publish, everybody follows
    silkbus.table.TABLE.fetch        everybody asks, one server of the queue group answers
    silkbus.lease.CELL.VERB          CELL asks, one Silk controller answers (VERB: acquire, renew, release)
    silkbus.cell.CELL.TOPIC          CELL publishes (TOPIC: state, denied, explained)
    silkbus.cell.CELL.container.KIND CELL publishes, on JetStream; readers read (KIND: created, ports, deleted)
    silkbus.ask.explain              policy servers ask, each cell answers as silkbus.cell.CELL.explained
    silkbus.event.TABLE.KIND         servers publish, on JetStream; readers read (KIND: two tokens, as policy.added)
    _INBOX.ROLE.NAME.>               what answers NAME; nobody else listens there

A cell may publish only under its own name, which vouches for who speaks: also when it answers a question that went to
all cells. Who answers a cell does so in its inbox. bus/permissions.py says it to NATS.
"""

from bus.messages import CellName

ROOT = "silkbus"
INBOX = "_INBOX"
CONTAINERS = "containers"
"""No table: what its stream of events is called after."""
EXPLAIN = f"{ROOT}.ask.explain"
"""Where all cells at once are asked what becomes of a flow (bus/explaining.py)."""


def table_change(table: str) -> str:
    return f"{ROOT}.table.{table}.change"


def table_heartbeat(table: str) -> str:
    return f"{ROOT}.table.{table}.heartbeat"


def table_fetch(table: str) -> str:
    return f"{ROOT}.table.{table}.fetch"


def lease(cell: CellName | str, verb: str) -> str:
    """Where a cell asks for its lease; `*` as the cell is what the controller listens to."""
    return f"{ROOT}.lease.{cell}.{verb}"


def cell(name: CellName | str, topic: str) -> str:
    return f"{ROOT}.cell.{name}.{topic}"


def container(name: CellName | str, kind: str) -> str:
    """Where a cell tells what becomes of its containers; `*` for cell and kind is what the stream takes in."""
    return f"{ROOT}.cell.{name}.container.{kind}"


def event(table: str, kind: str) -> str:
    """Where events of a table are published; `>` as the kind is all of them, which its stream takes in."""
    return f"{ROOT}.event.{table}.{kind}"


def event_stream(table: str) -> str:
    """The name of the JetStream stream of a table's events."""
    return f"{ROOT}_{table}".upper()


def inbox(role: str, name: str) -> str:
    """The inbox prefix of one client: nobody else may listen there."""
    return f"{INBOX}.{role}.{name}"


def is_inbox(subject: str) -> bool:
    """Whether it is somebody's inbox: the only place to which an answer may go."""
    return subject.startswith(f"{INBOX}.")
