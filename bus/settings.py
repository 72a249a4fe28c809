"""Settings of a service: a frozen dataclass, filled from the environment over a JSON file over its defaults.

`cell: str = setting("name of this cell")` becomes the key `cell` of the file and the variable `SILKBUS_CELL`. A field's
comment is its documentation, printed by `--help`. Whatever is wrong is reported at once, all of it, with its place.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import sys
import types
import typing
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from bus.credentials import Credentials
from bus.database_options import DatabaseOptions
from bus.decode import Malformed
from bus.log import LEVELS

T = TypeVar("T")
_REQUIRED: Any = dataclasses.MISSING
_READER = re.compile(r"[A-Za-z0-9_-]{1,63}")


class SettingsError(Exception):
    """Settings that cannot be used. The text has one line for each thing that is wrong."""


def setting(help: str, default: Any = _REQUIRED) -> Any:  # noqa: A002 (argparse's own name for it)
    """A field of a settings dataclass; without a default it is required."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSettings:
    """What every service has."""

    nats: str = setting("NATS servers, comma-separated", "nats://127.0.0.1:4222")
    nats_ca: Path | None = setting("certificate of the authority that NATS servers must have, for mutual TLS", None)
    nats_cert: Path | None = setting("this service's certificate for NATS", None)
    nats_key: Path | None = setting("private key of nats_cert", None)
    log_level: str = setting("debug, info, warning or error", "info")

    def __post_init__(self) -> None:
        given = [file is not None for file in (self.nats_ca, self.nats_cert, self.nats_key)]
        if any(given) and not all(given):
            raise Malformed("nats_ca, nats_cert, nats_key: set all three, for mutual TLS with NATS, or none")
        if self.log_level not in LEVELS:
            raise Malformed(f"log_level: {self.log_level!r} is not one of {', '.join(LEVELS)}")

    @property
    def nats_credentials(self) -> Credentials | None:
        """What `bus.connection.connect` needs to be let in; None where NATS lets everybody in."""
        if self.nats_ca is None or self.nats_cert is None or self.nats_key is None:
            return None
        return Credentials(self.nats_ca, self.nats_cert, self.nats_key)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CentralSettings(ServiceSettings):
    """What every service has that writes a table, and tells others what happens (docs/events.md)."""

    event_readers: tuple[str, ...] = setting("components that read events: a consumer is made for each name", ())
    event_replicas: int = setting("servers of the NATS cluster that keep the stream of events: 1, 3 or 5", 1)
    database_tls: str = setting("TLS with the database: off, encrypt, verify-ca (any name) or verify", "off")
    database_ca: Path | None = setting("certificates the database is verified by; else the system's", None)
    database_connect_timeout: float = setting("seconds to wait for a connection to the database", 5.0)
    database_statement_timeout: float = setting("seconds to wait for the database's answer to a statement", 10.0)
    database_connections: int = setting("connections to the database at most", 10)
    database_connection_lifetime: float = setting("seconds after which an idle connection is closed", 300.0)
    database_newer_schema: bool = setting(
        "go on with a schema that the next minor version has migrated; for going back to this one", False
    )

    def __post_init__(self) -> None:
        ServiceSettings.__post_init__(self)
        for name in self.event_readers:
            if not _READER.fullmatch(name):
                raise Malformed(f"event_readers: {name!r} is not a name of 1 to 63 letters, digits, '-' or '_'")
        if self.event_replicas not in (1, 3, 5):
            raise Malformed(f"event_replicas: must be 1, 3 or 5, not {self.event_replicas}")
        _ = self.database_options  # checks them

    @property
    def database_options(self) -> DatabaseOptions:
        """How the database is connected to. Raises Malformed."""
        return DatabaseOptions(
            tls=self.database_tls,
            ca=self.database_ca,
            connect_timeout=self.database_connect_timeout,
            statement_timeout=self.database_statement_timeout,
            connections=self.database_connections,
            connection_lifetime=self.database_connection_lifetime,
            newer_schema=self.database_newer_schema,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CellSettings(ServiceSettings):
    """What every service of a cell has."""

    cell: str = setting("name of this cell: letters, digits, '-' and '_'")
    run_dir: Path = setting("folder of the services' sockets, one private folder each", Path("/run/silkbus"))
    state_dir: Path = setting("folder of container records and table caches", Path("/var/lib/silkbus"))

    @property
    def containers_dir(self) -> Path:
        return self.state_dir / "containers"

    def cache(self, table: str, service: str) -> Path:
        """Where a service keeps its last state of a table."""
        return self.state_dir / "cache" / service / f"{table}.table"

    def socket(self, service: str) -> Path:
        """The socket of a service of this cell: silk, enforcer or networker."""
        return self.run_dir / service / f"{service}.sock"


def load(kind: type[T], file: Path | None, environment: Mapping[str, str], *, partial: bool = False) -> T:
    """Settings of `kind` from these sources. Raises SettingsError.

    With `partial` the file may hold other settings, too: it is that of a service, and `kind` a part of its settings.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    if file is not None:
        try:
            content = json.loads(file.read_text())
        except OSError as error:
            raise SettingsError(f"{file}: cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise SettingsError(f"{file}: is not JSON: {error}") from None
        if not isinstance(content, dict):
            raise SettingsError(f"{file}: must hold a JSON object")
        values.update(content)
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not partial:
        problems += [f"{file}: {name}: no such setting" for name in values if name not in fields]
    sources = {name: f"{file}: {name}" for name in values}
    for name in fields:
        variable = f"SILKBUS_{name.upper()}"
        if variable in environment:
            values[name], sources[name] = environment[variable], variable
    arguments = {}
    for name, field in fields.items():
        if name not in values:
            if field.default is _REQUIRED:
                where = f"as {name!r} in {file} or " if file else ""
                problems.append(f"{name}: required: set it {where}as SILKBUS_{name.upper()} ({field.metadata['help']})")
            continue
        try:
            arguments[name] = _convert(values[name], hints[name])
        except ValueError as error:
            problems.append(f"{sources[name]}: {error}")
    if not problems:
        try:
            return kind(**arguments)
        except ValueError as error:
            problems.append(str(error))
    raise SettingsError("\n".join(problems))


def _convert(value: Any, kind: Any) -> Any:
    if isinstance(kind, types.UnionType):
        if value is None or value == "":
            return None
        kind = next(option for option in kind.__args__ if option is not types.NoneType)
    if kind is bool:
        if str(value).lower() not in ("true", "false"):
            raise ValueError(f"must be true or false, not {value!r}")
        return str(value).lower() == "true"
    if kind in (int, float):
        # Never rounded, and finite: a limit that is "nan" is never exceeded.
        with suppress(TypeError, ValueError, OverflowError):
            number = kind(value)
            if not isinstance(value, bool) and math.isfinite(number) and (isinstance(value, str) or number == value):
                return number
        raise ValueError(f"must be {'an integer' if kind is int else 'a number'}, not {value!r}")
    if typing.get_origin(kind) is tuple:
        items = [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value
        if not isinstance(items, list):
            raise ValueError(f"must be a list, not {value!r}")
        return tuple(_convert(item, kind.__args__[0]) for item in items)
    if not isinstance(value, str):
        raise ValueError(f"must be text, not {value!r}")
    if kind is Path and (not value or "\0" in value):
        raise ValueError(f"must be a path, not {value!r}")
    return kind(value)


def command_line(kind: type[Any], program: str, what: str) -> argparse.ArgumentParser:
    """The parser for a service's main: `--config FILE`, and its settings in the help."""
    lines = [
        f"  {f.name:22} {f.metadata['help']} " + ("(required)" if f.default is _REQUIRED else f"[{f.default}]")
        for f in dataclasses.fields(kind)
    ]
    parser = argparse.ArgumentParser(
        program,
        description=what,
        epilog="settings (key in FILE, or SILKBUS_KEY in the environment):\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings as a JSON object")
    return parser


def from_command_line(kind: type[T], program: str, what: str) -> T:
    """Settings for a service's main: reads `--config FILE` and the environment; prints what is wrong and exits 2."""
    arguments = command_line(kind, program, what).parse_args()
    try:
        return load(kind, arguments.config, os.environ)
    except SettingsError as error:
        refuse(program, error)


def refuse(program: str, error: SettingsError) -> NoReturn:
    """Print what is wrong with the settings, and exit 2."""
    sys.stderr.writelines(f"{program}: {line}\n" for line in str(error).splitlines())
    sys.exit(2)
