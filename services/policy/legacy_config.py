"""Running with the configuration files of Cloud Foundry's own policy servers (contract/policy.md 1.13, 2.1)."""

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
    "metron_address": "MetronAddress",
    "database.type": "Database.Type",
    "database.user": "Database.User",
    "database.host": "Database.Host",
}
_NUMBERS = {
    "debug_server_port": "DebugServerPort",
    "tag_length": "TagLength",
    "database.port": "Database.Port",
}
_AT_LEAST = {
    "database.timeout": ("Database.Timeout", 1),
    "max_idle_connections": ("MaxIdleConnections", 0),
    "max_open_connections": ("MaxOpenConnections", 0),
    "connections_max_lifetime_seconds": ("MaxConnectionsLifetimeSeconds", 0),
}
_LEVELS = {"": "info", "debug": "debug", "info": "info", "warn": "warning", "error": "error", "fatal": "error"}
_CERTIFICATES = ("ca_cert_file", "server_cert_file", "server_key_file")


def _original(
    job: str, texts: dict[str, str], numbers: dict[str, str], at_least: dict[str, tuple[str, int]]
) -> Original:
    """A server with what both need, and these."""
    return Original(
        name=f"{job}: ",
        reading="could not read config file: reading config: ",
        parsing="could not read config file: parsing config: ",
        invalid="could not read config file: invalid config: ",
        texts=_TEXTS | texts,
        numbers=_NUMBERS | numbers,
        at_least=_AT_LEAST | at_least,
    )


EXTERNAL = _original(
    "policy-server",
    {
        "uaa_client": "UAAClient",
        "uaa_client_secret": "UAAClientSecret",
        "uaa_url": "UAAURL",
        "cc_url": "CCURL",
    },
    {"listen_port": "ListenPort", "uaa_port": "UAAPort"},
    {
        "database_migration_timeout": ("DatabaseMigrationTimeout", 1),
        "cleanup_interval": ("CleanupInterval", 1),
        "max_policies": ("MaxPolicies", 1),
    },
)
INTERNAL = _original(
    "policy-server-internal",
    {"ca_cert_file": "CACertFile", "server_cert_file": "ServerCertFile", "server_key_file": "ServerKeyFile"},
    {"internal_listen_port": "InternalListenPort", "health_check_port": "HealthCheckPort"},
    {},
)


def read(path: Path) -> LegacyConfig:
    """Read and check the policy server's file. Raises CannotUse."""
    return bus.legacy_config.read(
        path,
        EXTERNAL,
        lambda content: {**_service(content), **_common(content), **_authority(content)},
    )


def read_internal(path: Path) -> LegacyConfig:
    """Read and check the internal API's file. Raises CannotUse."""
    return bus.legacy_config.read(path, INTERNAL, lambda content: {**_internal(content), **_common(content)})


def _common(content: Object) -> dict[str, str]:
    level = get_text(content, "log_level", "config")
    if level not in _LEVELS:
        raise Malformed(f"unknown log level: {level}; use debug, info, warn, error or fatal")
    return {
        "SILKBUS_LOG_LEVEL": _LEVELS[level],
        "SILKBUS_TAG_LENGTH": str(get_integer(content, "tag_length", "config")),
        **database(content, "db connect: "),
    }


def _internal(content: Object) -> dict[str, str]:
    result = {
        f"SILKBUS_{key.upper()}": get_text(content, key, "config")
        for key in ("listen_host", "debug_server_host", *_CERTIFICATES)
    }
    for key in ("internal_listen_port", "health_check_port", "debug_server_port"):
        result[f"SILKBUS_{key.upper()}"] = str(get_integer(content, key, "config"))
    return result


def _service(content: Object) -> dict[str, str]:
    result = {
        "SILKBUS_LISTEN": address(content, "listen_host", "listen_port"),
        "SILKBUS_DEBUG_LISTEN": address(content, "debug_server_host", "debug_server_port"),
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
