"""Running with the configuration file of Cloud Foundry's own policy server (contract/policy.md 1.13)."""

from pathlib import Path

import bus.legacy_config
from bus.decode import Malformed
from bus.json_input import Object, get_flag, get_integer, get_text, get_texts
from bus.legacy_config import CannotUse as CannotUse
from bus.legacy_config import LegacyConfig, Original, address, database

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


ORIGINAL = Original(
    name="policy-server: ",
    reading="could not read config file: reading config: ",
    parsing="could not read config file: parsing config: ",
    invalid="could not read config file: invalid config: ",
    texts=_TEXTS,
    numbers=_NUMBERS,
    at_least=_AT_LEAST,
)


def read(path: Path) -> LegacyConfig:
    """Read and check the file. Raises CannotUse."""
    return bus.legacy_config.read(
        path,
        ORIGINAL,
        lambda content: {**_service(content), **database(content, "db connect: "), **_authority(content)},
    )


def _service(content: Object) -> dict[str, str]:
    level = get_text(content, "log_level", "config")
    if level not in _LEVELS:
        raise Malformed(f"unknown log level: {level}; use debug, info, warn, error or fatal")
    result = {
        "SILKBUS_LISTEN": address(content, "listen_host", "listen_port"),
        "SILKBUS_DEBUG_LISTEN": address(content, "debug_server_host", "debug_server_port"),
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
