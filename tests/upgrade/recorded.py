"""What the version before said on the bus and to its database: recorded while it ran, with NATS and SQLite."""

import base64
import json
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True, slots=True)
class Message:
    subject: str
    reply: str
    data: bytes

    @property
    def fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = msgpack.unpackb(self.data)
        return fields


def messages() -> list[Message]:
    """In the order in which they were said."""
    recorded = json.loads((DATA / "messages.json").read_text())
    return [Message(each["subject"], each["reply"], base64.b64decode(each["data"])) for each in recorded]


def said(subject: str) -> list[Message]:
    return [message for message in messages() if message.subject == subject]


def answer(request: Message) -> Message:
    (found,) = said(request.reply)
    return found


def database(series: str, at: Path) -> None:
    """The database that it left, of the `policy` or `lease` series of steps."""
    with sqlite3.connect(at) as connection:
        connection.executescript((DATA / f"{series}.sql").read_text())
    connection.close()


def run_statements(series: str, connection: sqlite3.Connection, *, commit: bool = True) -> list[list[Any]]:
    """Run what it said to that database next, in its transactions; the rows of each statement."""
    results = []
    for each in json.loads((DATA / f"{series}.statements.json").read_text()):
        values = {k: bytes.fromhex(v) if k in each["bytes"] else v for k, v in each["values"].items()}
        sql = each["sql"] if commit or each["sql"] != "COMMIT" else "ROLLBACK"
        results.append(connection.execute(sql, values).fetchall())
    return results
