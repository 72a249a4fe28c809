"""Many rows in one statement, on each kind of database.

Rows go to the database as one JSON parameter, and statements read them from there as they read a table. So the text of
a statement is the same however many rows there are: nothing is composed for each row, and PostgreSQL keeps its plan.
(Bound values one by one cost SQLAlchemy 0.1 ms a row, and are limited in number.)

In a statement `{rows}` stands for the rows, called `item`, after FROM; `{columns}` for the names of their columns; and
`{then}` for the join that looks into the table on its right for each row on its left: left to themselves SQLite and
MySQL may read that whole table.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import islice
from typing import Any, TypeVar

from databases.core import Connection as DatabaseConnection

T = TypeVar("T")
Columns = tuple[tuple[str, type], ...]
"""Names, and `str` or `int`."""
Row = Sequence[str | int]

CHUNK = 500
"""How many rows one statement carries: the event loop does other things in between."""

APPS: Columns = (("app", str),)

_THEN = {"sqlite": "CROSS JOIN", "postgresql": "JOIN", "mysql": "STRAIGHT_JOIN"}


async def select(database: DatabaseConnection, statement: str, columns: Columns, items: Iterable[Row]) -> list[Any]:
    """What the statement, which must have a `{rows}`, finds for all of these rows."""
    found: list[Any] = []
    query = _text(str(database._database.url.dialect), statement, columns)
    for chunk in chunks(items):
        found += await database.fetch_all(query, {"rows": _json(chunk)})
    return found


async def execute(database: DatabaseConnection, statement: str, columns: Columns, items: Iterable[Row]) -> None:
    """Run the statement, which must have a `{rows}`, for all of these rows."""
    query = _text(str(database._database.url.dialect), statement, columns)
    for chunk in chunks(items):
        await database.execute(query, {"rows": _json(chunk)})


async def execute_in(database: DatabaseConnection, statement: str, numbers: Iterable[int]) -> None:
    """Run the statement with all of these numbers in place of `{numbers}`.

    They are written out: MySQL would look at each row of the table if they came as rows.
    """
    for chunk in chunks(numbers):
        await database.execute(statement.replace("{numbers}", ",".join(str(int(number)) for number in chunk)))


def chunks(items: Iterable[T], size: int = CHUNK) -> Iterator[Sequence[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _json(items: Sequence[Row]) -> str:
    return json.dumps(items, separators=(",", ":"), ensure_ascii=False)


@cache
def _text(kind: str, statement: str, columns: Columns) -> str:
    source = {"sqlite": _sqlite, "postgresql": _postgresql, "mysql": _mysql}[kind](columns)
    names = ", ".join(name for name, _ in columns)
    return statement.replace("{rows}", f"{source} AS item").replace("{then}", _THEN[kind]).replace("{columns}", names)


def _sqlite(columns: Columns) -> str:
    values = ", ".join(f"json_extract(value, '$[{number}]') AS {name}" for number, (name, _) in enumerate(columns))
    return _subquery(values, "json_each(:rows)")


def _postgresql(columns: Columns) -> str:
    types = {str: "text", int: "bigint"}
    values = ", ".join(
        f"CAST(value ->> {number} AS {types[of]}) AS {name}" for number, (name, of) in enumerate(columns)
    )
    return _subquery(values, "json_array_elements(CAST(:rows AS json)) AS element (value)")


def _mysql(columns: Columns) -> str:
    # Our texts are compared byte for byte, whatever the database's own way is.
    types = {str: "VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin", int: "BIGINT"}
    paths = ", ".join(f"{name} {types[of]} PATH '$[{number}]'" for number, (name, of) in enumerate(columns))
    return _subquery("*", f"JSON_TABLE(:rows, '$[*]' COLUMNS ({paths})) AS element")


def _subquery(values: str, source: str) -> str:
    return "(SELECT {} FROM {})".format(values, source)  # noqa: UP032, S608 (our own texts, none from outside)
