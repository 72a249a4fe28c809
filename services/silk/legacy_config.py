"""Running with the configuration file of the original's controller (contract/cell.md 4.1)."""

import json
from ipaddress import IPv4Network
from pathlib import Path

import bus.legacy_config
from bus.decode import Malformed
from bus.json_input import Object, get_integer, get_text, get_texts, parse
from bus.legacy_config import LegacyConfig, Original, address, database

ORIGINAL = Original(
    name="silk-controller error: ",
    reading="read config: ",
    parsing="unmarshal config: ",
    invalid="invalid config: ",
    texts={
        "listen_host": "ListenHost",
        "ca_cert_file": "CACertFile",
        "server_cert_file": "ServerCertFile",
        "server_key_file": "ServerKeyFile",
        "log_prefix": "LogPrefix",
    },
    numbers={"listen_port": "ListenPort", "subnet_prefix_length": "SubnetPrefixLength"},
    at_least={
        "debug_server_port": ("DebugServerPort", 1),
        "lease_expiration_seconds": ("LeaseExpirationSeconds", 1),
        "metron_port": ("MetronPort", 1),
        "health_check_port": ("HealthCheckPort", 1),
        "metrics_emit_seconds": ("MetricsEmitSeconds", 1),
        "staleness_threshold_seconds": ("StalenessThresholdSeconds", 1),
        "max_idle_connections": ("MaxIdleConnections", 0),
        "max_open_connections": ("MaxOpenConnections", 0),
        "connections_max_lifetime_seconds": ("MaxConnectionsLifetimeSeconds", 0),
    },
)


def read(path: Path) -> LegacyConfig:
    """Read and check the file. Raises bus.legacy_config.CannotUse."""
    return bus.legacy_config.read(path, ORIGINAL, _settings)


def is_original(path: Path) -> bool:
    """Whether a file of settings is the original's: it has a key that ours have not."""
    try:
        return "lease_expiration_seconds" in parse(path.read_bytes())
    except (OSError, Malformed):
        return False  # told when it is read


def _settings(content: Object) -> dict[str, str]:
    result = {
        "SILKBUS_LISTEN": address(content, "listen_host", "listen_port"),
        "SILKBUS_DEBUG_LISTEN": f"127.0.0.1:{get_integer(content, 'debug_server_port', 'config')}",
        "SILKBUS_HEALTH_CHECK_PORT": str(get_integer(content, "health_check_port", "config")),
        "SILKBUS_OVERLAY_NETWORK": ",".join(map(str, _networks(content))),
        "SILKBUS_SUBNET_PREFIX_LENGTH": str(get_integer(content, "subnet_prefix_length", "config")),
        "SILKBUS_LEASE_EXPIRY": str(get_integer(content, "lease_expiration_seconds", "config")),
    }
    for key in ("ca_cert_file", "server_cert_file", "server_key_file"):
        result[f"SILKBUS_{key.upper()}"] = get_text(content, key, "config")
    return result | database(content, "connecting to database: ")


def _networks(content: Object) -> list[IPv4Network]:
    """One network or a list of them; host bits are dropped, as the original drops them."""
    value = content.get("network")
    texts = get_texts(content, "network", "config") if isinstance(value, list) else [str(value or "")]
    try:
        return [IPv4Network(text.strip(), strict=False) for each in texts for text in each.split(",")]
    except ValueError:
        raise Malformed(f"network: {json.dumps(value)} names no IPv4 network: write 10.255.0.0/16, or a list") from None
