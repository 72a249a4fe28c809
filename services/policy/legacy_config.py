"""Running with the configuration file of Cloud Foundry's own policy server (contract/policy.md 1.13).

What BOSH renders for it is translated to our settings, as environment variables, over which the real environment has
precedence: NATS, for one, is named only there. Fatal errors are told as the original tells them, for those who watch
for its texts; only the order of several wrong fields is fixed here. Keys that mean nothing to us are ignored, as
unknown ones are: there is no metron to send metrics to, and /metrics instead.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from bus.decode import Malformed
from bus.json_input import Object, get_flag, get_integer, get_object, get_text, get_texts, parse

JOB = "policy-server"
_PREFIX = "cfnetworking"
"""The log prefix until the file tells another."""

_TEXTS = {
    "listen_host": "ListenHost",
    "log_prefix": "LogPrefix",
    "debug_server_host": "DebugServerHost",
    "uaa_client": "UAAClient",
    "uaa_client_secret": "UAAClientSecret",
    "uaa_url": "UAAURL",
    "cc_url": "CCURL",
    "metron_address": "MetronAddress",
    "database.type": "Database.Type",
    "database.user": "Database.User",
    "database.host": "Database.Host",
}
_NUMBERS = {
    "listen_port": "ListenPort",
    "debug_server_port": "DebugServerPort",
    "uaa_port": "UAAPort",
    "tag_length": "TagLength",
    "database.port": "Database.Port",
}
_AT_LEAST = {
    "database.timeout": ("Database.Timeout", 1),
    "database_migration_timeout": ("DatabaseMigrationTimeout", 1),
    "cleanup_interval": ("CleanupInterval", 1),
    "max_policies": ("MaxPolicies", 1),
    "max_idle_connections": ("MaxIdleConnections", 0),
    "max_open_connections": ("MaxOpenConnections", 0),
    "connections_max_lifetime_seconds": ("MaxConnectionsLifetimeSeconds", 0),
}
_LEVELS = {"": "info", "debug": "debug", "info": "info", "warn": "warning", "error": "error", "fatal": "error"}
_DIALECTS = {"postgres": "postgresql", "mysql": "mysql"}


class CannotUse(Exception):
    """The file cannot be used. The text is the whole line for standard error."""


@dataclass(frozen=True, slots=True)
class LegacyConfig:
    """The file's log prefix, and the rest of it as environment variables."""

    prefix: str
    environment: Mapping[str, str]

    def fatal(self, text: str) -> str:
        return _fatal(self.prefix, text)


def read(path: Path) -> LegacyConfig:
    """Read and check the file. Raises CannotUse."""
    try:
        content = parse(path.read_bytes())
    except OSError as error:
        reason = (error.strerror or "").lower()
        raise CannotUse(_fatal(_PREFIX, f"could not read config file: reading config: open {path}: {reason}")) from None
    except Malformed as error:
        raise CannotUse(_fatal(_PREFIX, f"could not read config file: parsing config: {error}")) from None
    try:
        problems = _check(content)
    except Malformed as error:
        raise CannotUse(_fatal(_PREFIX, f"could not read config file: parsing config: {error}")) from None
    if problems:
        text = f"could not read config file: invalid config: {', '.join(problems)}"
        raise CannotUse(_fatal(_PREFIX, text))
    prefix = get_text(content, "log_prefix", "config")
    try:
        return LegacyConfig(prefix, {**_service(content), **_database(content), **_authority(content)})
    except Malformed as error:
        raise CannotUse(_fatal(prefix, str(error))) from None


def _fatal(prefix: str, text: str) -> str:
    return f"{datetime.now(UTC):%Y/%m/%d %H:%M:%S} {prefix}.{JOB}: {text}"


def _check(content: Object) -> list[str]:
    """What is wrong with the fields, in a fixed order. Raises Malformed for a value of another type."""
    problems = [f"{field}: zero value" for key, field in _TEXTS.items() if not get_text(*_find(content, key))]
    problems += [f"{field}: zero value" for key, field in _NUMBERS.items() if not get_integer(*_find(content, key))]
    for key, (field, least) in _AT_LEAST.items():
        if get_integer(*_find(content, key)) < least:
            problems.append(f"{field}: less than min")
    return problems


def _find(content: Object, key: str) -> tuple[Object, str, str]:
    """Where `key` is: the object that may hold it, its name there, and the object's name."""
    if key.startswith("database."):
        return get_object(content, "database", "config"), key.removeprefix("database."), "config.database"
    return content, key, "config"


def _service(content: Object) -> dict[str, str]:
    level = get_text(content, "log_level", "config")
    if level not in _LEVELS:
        raise Malformed(f"unknown log level: {level}; use debug, info, warn, error or fatal")
    result = {
        "SILKBUS_LISTEN": _address(content, "listen_host", "listen_port"),
        "SILKBUS_DEBUG_LISTEN": _address(content, "debug_server_host", "debug_server_port"),
        "SILKBUS_LOG_LEVEL": _LEVELS[level],
        "SILKBUS_TAG_LENGTH": str(get_integer(content, "tag_length", "config")),
        "SILKBUS_MAX_POLICIES": str(get_integer(content, "max_policies", "config")),
        "SILKBUS_CLEANUP_INTERVAL": str(get_integer(content, "cleanup_interval", "config")),
        "SILKBUS_ALLOWED_CORS_DOMAINS": ",".join(get_texts(content, "allowed_cors_domains", "config")),
    }
    if get_flag(content, "enable_tls", "config"):
        result["SILKBUS_ENABLE_TLS"] = "true"
        for key in ("server_cert_file", "server_key_file"):
            if file := get_text(content, key, "config"):
                result[f"SILKBUS_{key.upper()}"] = file
    return result


def _database(content: Object) -> dict[str, str]:
    where = "config.database"
    database = get_object(content, "database", "config")
    kind = get_text(database, "type", where)
    if kind not in _DIALECTS:
        raise Malformed(f"db connect: failed to create connection string: database type '{kind}' is not supported")
    login = quote(get_text(database, "user", where), safe="")
    if password := get_text(database, "password", where):
        login += f":{quote(password, safe='')}"
    host = _host(get_text(database, "host", where))
    name = quote(get_text(database, "database_name", where), safe="")
    result = {
        "SILKBUS_DATABASE": f"{_DIALECTS[kind]}://{login}@{host}:{get_integer(database, 'port', where)}/{name}",
        "SILKBUS_DATABASE_CONNECT_TIMEOUT": str(get_integer(database, "timeout", where)),
    }
    if get_flag(database, "require_ssl", where):
        ca = get_text(database, "ca_cert", where)
        any_name = get_flag(database, "skip_hostname_validation", where)
        result["SILKBUS_DATABASE_TLS"] = "verify" if not any_name else "verify-ca" if ca else "encrypt"
        if ca:
            result["SILKBUS_DATABASE_CA"] = ca
    # 0 is no limit to the original, and here as good as not set; one connection writes, so one alone would not do.
    if connections := get_integer(content, "max_open_connections", "config"):
        result["SILKBUS_DATABASE_CONNECTIONS"] = str(max(connections, 2))
    if lifetime := get_integer(content, "connections_max_lifetime_seconds", "config"):
        result["SILKBUS_DATABASE_CONNECTION_LIFETIME"] = str(lifetime)
    return result


def _authority(content: Object) -> dict[str, str]:
    result = {
        "SILKBUS_AUTH": "uaa-check",
        "SILKBUS_UAA_PORT": str(get_integer(content, "uaa_port", "config")),
    }
    for key in ("uaa_url", "uaa_client", "uaa_client_secret", "cc_url"):
        result[f"SILKBUS_{key.upper()}"] = get_text(content, key, "config")
    for key in ("skip_ssl_validation", "enable_space_developer_self_service"):
        result[f"SILKBUS_{key.upper()}"] = str(get_flag(content, key, "config")).lower()
    for key in ("uaa_ca", "cc_ca_cert"):
        file = get_text(content, key, "config")
        if file and not _is_blank(Path(file)):
            result[f"SILKBUS_{key.upper()}"] = file
    return result


def _is_blank(file: Path) -> bool:
    """Whether the file is there and holds nothing: what BOSH renders for a certificate that is not set."""
    try:
        return not file.read_bytes().strip()
    except OSError:
        return False


def _address(content: Object, host: str, port: str) -> str:
    return f"{_host(get_text(content, host, 'config'))}:{get_integer(content, port, 'config')}"


def _host(host: str) -> str:
    return f"[{host}]" if ":" in host else host
