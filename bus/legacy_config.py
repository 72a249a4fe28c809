"""Reading the configuration files of Cloud Foundry's own servers, as BOSH renders them.

They are translated to our settings, as environment variables, over which the real environment has precedence: NATS, for
one, is named only there. Fatal errors are told as the original tells them, for those who watch for its texts; only the
order of several wrong fields is fixed here. Keys that mean nothing to us are ignored, as unknown ones are: there is no
metron to send metrics to, and /metrics instead.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from bus.decode import Malformed
from bus.json_input import Object, get_flag, get_integer, get_object, get_text, parse

_PREFIX = "cfnetworking"
"""The log prefix until the file tells another."""
_DIALECTS = {"postgres": "postgresql", "mysql": "mysql"}


class CannotUse(Exception):
    """The file cannot be used. The text is the whole line for standard error."""


@dataclass(frozen=True, slots=True)
class Original:
    """One server of the original: how its fatal lines begin, and what its file must hold.

    `name` follows the log prefix; `reading`, `parsing` and `invalid` go before what is wrong at these stages. Keys are
    as in the file, `database.host` for one within another, and come with the fields' names in errors: `texts` must not
    be empty, `numbers` not 0, those of `at_least` not less than that.
    """

    name: str
    reading: str
    parsing: str
    invalid: str
    texts: Mapping[str, str]
    numbers: Mapping[str, str]
    at_least: Mapping[str, tuple[str, int]]

    def fatal(self, prefix: str, text: str) -> str:
        return f"{datetime.now(UTC):%Y/%m/%d %H:%M:%S} {prefix}.{self.name}{text}"

    def problems(self, content: Object) -> list[str]:
        """What is wrong with the fields, in a fixed order. Raises Malformed for a value of another type."""
        found = [f"{field}: zero value" for key, field in self.texts.items() if not get_text(*_find(content, key))]
        found += [
            f"{field}: zero value" for key, field in self.numbers.items() if not get_integer(*_find(content, key))
        ]
        for key, (field, least) in self.at_least.items():
            if get_integer(*_find(content, key)) < least:
                found.append(f"{field}: less than min")
        return found


@dataclass(frozen=True, slots=True)
class LegacyConfig:
    """The file's log prefix, and the rest of it as environment variables."""

    original: Original
    prefix: str
    environment: Mapping[str, str]

    def fatal(self, text: str) -> str:
        """The line that the original writes to standard error when it ends for this reason."""
        return self.original.fatal(self.prefix, text)


def read(path: Path, original: Original, translate: Callable[[Object], Mapping[str, str]]) -> LegacyConfig:
    """Read and check the file; `translate` makes environment variables of it. Raises CannotUse."""
    try:
        content = parse(path.read_bytes())
        problems = original.problems(content)
    except OSError as error:
        reason = (error.strerror or "").lower()
        raise CannotUse(original.fatal(_PREFIX, f"{original.reading}open {path}: {reason}")) from None
    except Malformed as error:
        raise CannotUse(original.fatal(_PREFIX, f"{original.parsing}{error}")) from None
    if problems:
        raise CannotUse(original.fatal(_PREFIX, f"{original.invalid}{', '.join(problems)}"))
    prefix = get_text(content, "log_prefix", "config") or _PREFIX
    try:
        return LegacyConfig(original, prefix, translate(content))
    except Malformed as error:
        raise CannotUse(original.fatal(prefix, str(error))) from None


def _find(content: Object, key: str) -> tuple[Object, str, str]:
    """Where `key` is: the object that may hold it, its name there, and the object's name."""
    if key.startswith("database."):
        return get_object(content, "database", "config"), key.removeprefix("database."), "config.database"
    return content, key, "config"


def database(content: Object, connecting: str) -> dict[str, str]:
    """The settings of the database. Raises Malformed; `connecting` goes before what that says of the database."""
    where = "config.database"
    part = get_object(content, "database", "config")
    kind = get_text(part, "type", where)
    if kind not in _DIALECTS:
        raise Malformed(f"{connecting}failed to create connection string: database type '{kind}' is not supported")
    login = quote(get_text(part, "user", where), safe="")
    if password := get_text(part, "password", where):
        login += f":{quote(password, safe='')}"
    host = bracketed(get_text(part, "host", where))
    name = quote(get_text(part, "database_name", where), safe="")
    result = {
        "SILKBUS_DATABASE": f"{_DIALECTS[kind]}://{login}@{host}:{get_integer(part, 'port', where)}/{name}",
        "SILKBUS_DATABASE_CONNECT_TIMEOUT": str(get_integer(part, "timeout", where)),
    }
    if get_flag(part, "require_ssl", where):
        ca = get_text(part, "ca_cert", where)
        any_name = get_flag(part, "skip_hostname_validation", where)
        result["SILKBUS_DATABASE_TLS"] = "verify" if not any_name else "verify-ca" if ca else "encrypt"
        if ca:
            result["SILKBUS_DATABASE_CA"] = ca
    # 0 is no limit to the original, and here as good as not set; one connection writes, so one alone would not do.
    if connections := get_integer(content, "max_open_connections", "config"):
        result["SILKBUS_DATABASE_CONNECTIONS"] = str(max(connections, 2))
    if lifetime := get_integer(content, "connections_max_lifetime_seconds", "config"):
        result["SILKBUS_DATABASE_CONNECTION_LIFETIME"] = str(lifetime)
    return result


def address(content: Object, host: str, port: str) -> str:
    """HOST:PORT of these two keys."""
    return f"{bracketed(get_text(content, host, 'config'))}:{get_integer(content, port, 'config')}"


def bracketed(host: str) -> str:
    """The host as it goes before a port."""
    return f"[{host}]" if ":" in host else host
