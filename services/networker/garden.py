"""The forms of Garden's external networker: flags, configuration, inputs and outputs (contract/cell.md 1).

All errors are one line on standard error, `PREFIX: TEXT`, with the texts and in the order of the original, since people
and other programs know them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bus.decode import Malformed
from bus.messages import Handle
from services.networker.go_json import Struct, first_value, go_output, whole_value
from services.networker.links import link_of
from services.networker.ports import Mapping as PortMapping
from services.networker.ports import Range
from services.networker.record import Attachment

PREFIX = "cfnetworking"
IFNAME = "eth0"
FLAGS = ("action", "configFile", "handle")
ACTIONS = ("up", "down", "net-in", "net-out", "bulk-net-out")
NO_HOST_IP = "255.255.255.255"
MAX_PORT = 65535


class GardenError(Exception):
    """What is printed on standard error. `usage`: before it, how the program is called."""

    def __init__(self, text: str, prefix: str = PREFIX, *, usage: bool = False) -> None:
        super().__init__(f"{prefix}: {text}")
        self.usage = usage

    def output(self) -> str:
        lines = [f"  -{flag} string\n" for flag in FLAGS] if self.usage else []
        first = [f"{str(self).partition(': parse args: ')[2]}\n", "Usage of silkbus-garden:\n"] if self.usage else []
        return "".join([*first, *lines, str(self).replace("\n", " "), "\n"])


@dataclass(frozen=True, slots=True)
class Config:
    """The file of --configFile. Keys that only the original's way of doing things needs are checked and not used."""

    plugin_dir: str
    config_dir: str
    bind_mount_dir: str
    state_file: str
    ports: Range
    prefix: str
    proxy_port: int
    search_domains: tuple[str, ...] = ()
    redirect_cidr: str = ""
    redirect_ingress: bool = False


def flags(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The flags as Go's package flag reads them (-x v, --x v, -x=v, --x=v), and what is left. Raises GardenError."""
    found: dict[str, str] = {}
    rest = list(arguments)
    while rest and rest[0].startswith("-") and rest[0] != "-":
        argument = rest.pop(0)
        if argument == "--":
            break
        name, equals, value = argument.removeprefix("-").removeprefix("-").partition("=")
        if not name or name.startswith("-"):
            raise GardenError(f"parse args: bad flag syntax: {argument}", usage=True)
        if name not in FLAGS:
            problem = "flag: help requested" if name in ("h", "help") else f"flag provided but not defined: -{name}"
            raise GardenError(f"parse args: {problem}", usage=True)
        if not equals:
            if not rest:
                raise GardenError(f"parse args: flag needs an argument: -{name}", usage=True)
            value = rest.pop(0)
        found[name] = value
    return found, rest


def read_config(path: str, folder: str) -> Config:
    """The configuration in the file `path`, as seen from `folder`. Blocks. Raises GardenError."""
    file = Path(folder) / path
    try:
        file.stat()
    except (OSError, ValueError) as error:
        problem = f"stat {path}: {_reason(error)}"
        raise GardenError(f"parse args: file does not exist: {problem}") from None
    try:
        text = file.read_text(errors="replace")
    except OSError as error:
        action = "read" if file.is_dir() else "open"
        raise GardenError(f"parse args: reading config file: {action} {path}: {_reason(error)}") from None
    try:
        return _config(whole_value(text) if text.strip() else _cut_short())
    except Malformed as error:
        raise GardenError(f"parse args: parsing config ({path}): {error}") from None


def _cut_short() -> Any:
    raise Malformed("unexpected end of JSON input")


def _config(value: Any) -> Config:
    struct = Struct(value, "Config", "config.")
    text = {
        key: struct.get(key, "string", "")
        for key in (
            "cni_plugin_dir",
            "cni_config_dir",
            "bind_mount_dir",
            "state_file",
            "log_prefix",
            "iptables_lock_file",
            "proxy_redirect_cidr",
        )
    }
    number = {key: struct.get(key, "int", 0) for key in ("start_port", "total_ports", "proxy_port")}
    uid = struct.get("proxy_uid", "int", None)
    domains = struct.get("search_domains", "[]string", [])
    ingress = struct.get("enable_ingress_proxy_redirect", "bool", False)
    required: Mapping[str, Any] = {
        "cni_plugin_dir": text["cni_plugin_dir"],
        "cni_config_dir": text["cni_config_dir"],
        "bind_mount_dir": text["bind_mount_dir"],
        "state_file": text["state_file"],
        "start_port": number["start_port"],
        "total_ports": number["total_ports"],
        "log_prefix": text["log_prefix"],
        "iptables_lock_file": text["iptables_lock_file"],
        "proxy_port": number["proxy_port"],
        "proxy_uid": uid is not None,
    }
    for key, given in required.items():
        if not given:
            raise GardenError(f"parse args: missing required config '{key}'", text["log_prefix"] or PREFIX)
    start, total, proxy = (number[key] for key in ("start_port", "total_ports", "proxy_port"))
    if not (1 <= start <= MAX_PORT and total > 0):
        raise Malformed(f"start_port, total_ports: there are no {total} ports from {start} on within 1-{MAX_PORT}")
    if not 1 <= proxy <= MAX_PORT:
        raise Malformed(f"proxy_port: {proxy} is not within 1-{MAX_PORT}")
    for key in ("cni_plugin_dir", "cni_config_dir", "bind_mount_dir", "state_file"):
        if not Path(text[key]).is_absolute():
            raise Malformed(f"{key}: must be an absolute path, not {text[key]!r}")
    if not all(isinstance(domain, str) for domain in domains):
        raise Malformed("json: cannot unmarshal into Go struct field Config.search_domains of type string")
    return Config(
        plugin_dir=text["cni_plugin_dir"],
        config_dir=text["cni_config_dir"],
        bind_mount_dir=text["bind_mount_dir"],
        state_file=text["state_file"],
        ports=Range(start, total),
        prefix=text["log_prefix"],
        proxy_port=proxy,
        search_domains=tuple(domains),
        redirect_cidr=text["proxy_redirect_cidr"],
        redirect_ingress=ingress,
    )


@dataclass(frozen=True, slots=True)
class Command:
    action: str
    handle: Handle
    config: Config

    @property
    def netns(self) -> str:
        """Where the container's namespace is mounted."""
        return str(Path(self.config.bind_mount_dir) / self.handle)

    def error(self, text: str) -> GardenError:
        return GardenError(text, self.config.prefix)


def parse(arguments: Sequence[str], folder: str) -> Command:
    """The call that these arguments are, made in `folder`. Blocks. Raises GardenError."""
    found, rest = flags(arguments)
    if not found.get("configFile"):
        raise GardenError("parse args: missing required flag 'configFile'")
    config = read_config(found["configFile"], folder)
    if rest:
        raise GardenError(f"parse args: unexpected extra args: [{' '.join(rest)}]", config.prefix)
    for flag in ("handle", "action"):
        if not found.get(flag):
            raise GardenError(f"parse args: missing required flag '{flag}'", config.prefix)
    return Command(found["action"], Handle(found["handle"]), config)


@dataclass(frozen=True, slots=True)
class UpInputs:
    """What `up` reads. A `pid` of 0 says that the namespace is the caller's descriptor 3."""

    pid: int
    properties: Mapping[str, Any]
    netin: tuple[PortMapping, ...]
    netout_rules: tuple[Any, ...]


def up_inputs(text: str) -> UpInputs:
    """Raises Malformed, with Go's texts."""
    struct = Struct(first_value(text), "UpInputs", "manager.")
    pid = struct.get("Pid", "int", 0)
    netin = struct.get("netin", "[]garden.NetIn", [])
    mappings = [
        _mapping(Struct(item, "NetIn", "garden."), "host_port", "container_port", number, "netin")
        for number, item in enumerate(netin)
    ]
    if pid < 0:
        raise Malformed(f"Pid: {pid} is not a process")
    return UpInputs(
        pid,
        struct.get("Properties", "map[string]interface {}", {}),
        tuple(mappings),
        tuple(struct.get("netout_rules", "[]garden.NetOutRule", [])),
    )


def net_in_input(text: str) -> PortMapping:
    """What `net-in` reads. Raises Malformed."""
    struct = Struct(first_value(text), "NetInInputs", "manager.")
    return _mapping(struct, "HostPort", "ContainerPort", 0, "net-in")


def net_out_inputs(text: str, action: str) -> tuple[Any, ...]:
    """The rules that `net-out` and `bulk-net-out` read. Raises Malformed."""
    struct = Struct(first_value(text), "NetOutInputs", "manager.")
    if action == "net-out":
        return (struct.get("netout_rule", "map[string]interface {}", {}),)
    return tuple(struct.get("netout_rules", "[]garden.NetOutRule", []))


def _mapping(struct: Struct, host: str, container: str, number: int, where: str) -> PortMapping:
    ports = [struct.get(name, "int", 0) for name in (host, container)]
    for name, port in zip((host, container), ports, strict=True):
        if not 0 <= port <= MAX_PORT:
            raise Malformed(f"{where}[{number}]: {name}: must be in 0..{MAX_PORT}, not {port}")
    return PortMapping(*ports)


def lower_rule(rule: Any) -> Any:
    """A rule with its keys as its form has them, whatever their case."""
    match rule:
        case dict():
            return {str(key).casefold(): lower_rule(value) for key, value in rule.items()}
        case list():
            return [lower_rule(item) for item in rule]
    return rule


def up_output(attachment: Attachment, dns_servers: Sequence[str], search_domains: Sequence[str]) -> str:
    """What `up` prints (contract/cell.md 1.4.8)."""
    link = attachment.link
    assert link is not None  # noqa: S101 (only complete attachments are answered)
    forwards = [{"HostPort": each.host_port, "ContainerPort": each.container_port} for each in attachment.forwards]
    interface = attachment.ifname if attachment.result is None else interface_name(attachment.result)
    properties = {
        "garden.network.container-ip": str(link.address),
        "garden.network.host-ip": NO_HOST_IP,
        "garden.network.mapped-ports": json.dumps(forwards, separators=(",", ":")),
        **({"garden.network.interface": interface} if interface else {}),
    }
    return go_output(
        {
            "properties": properties,
            **({"dns_servers": list(dns_servers)} if dns_servers else {}),
            **({"search_domains": list(search_domains)} if search_domains else {}),
        }
    )


def interface_name(result: Mapping[str, Any]) -> str:
    """The name of the interface that has the first IPv4 address of a CNI result, or nothing."""
    address = str(link_of(result).address)
    for ip in result["ips"]:
        if ip["address"].partition("/")[0] == address and ip.get("interface") is not None:
            return str(result["interfaces"][ip["interface"]].get("name") or "")
    return ""


def _reason(error: Exception) -> str:
    return (error.strerror or "").lower() if isinstance(error, OSError) else "invalid argument"
