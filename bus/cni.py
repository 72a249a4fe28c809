"""The forms of CNI: what a runtime asks, what it is answered, how it is told of errors.

CNI spec 1.1.0, sections 2 (execution protocol) and 5 (result types); texts of errors as the Go library gives them
(contract/cell.md 2.1). Versions 0.3.1 to 1.1.0: older ones have another form of result and no users. Two services are
behind a plugin: the networker, and the silk worker where somebody else's agent does the rest.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bus.decode import Fields, Malformed
from bus.messages import Handle
from bus.records import file_name

VERSIONS = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")
MAX_IFNAME = 15

INCOMPATIBLE_VERSION = 1
UNKNOWN_CONTAINER = 3
INVALID_ENVIRONMENT = 4
IO_FAILURE = 5
DECODING_FAILURE = 6
INVALID_CONFIG = 7
TRY_AGAIN_LATER = 11
NOT_AVAILABLE = 50
INTERNAL = 999

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")
_NEEDS = {
    "ADD": ("container_id", "netns", "ifname", "path"),
    "CHECK": ("container_id", "netns", "ifname", "path"),
    "DEL": ("container_id", "ifname", "path"),
    "STATUS": ("path",),
    "GC": ("path",),
}
_VARIABLES = {"container_id": "CNI_CONTAINERID", "netns": "CNI_NETNS", "ifname": "CNI_IFNAME", "path": "CNI_PATH"}


class CniError(Exception):
    """An error as CNI tells it: a code, what is wrong, and details."""

    def __init__(self, code: int, message: str, details: str = "", *, version: str = VERSIONS[-1]) -> None:
        super().__init__(message)
        self.code = code
        self.details = details
        self.version = version

    def output(self) -> str:
        body: dict[str, Any] = {"cniVersion": self.version, "code": self.code, "msg": str(self)}
        return output(body | ({"details": self.details} if self.details else {}))


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a plugin, checked. STATUS and GC have no handle, netns or ifname: they are empty."""

    command: str
    handle: Handle
    netns: str
    ifname: str
    arguments: Mapping[str, str]
    config: Mapping[str, Any]

    @property
    def version(self) -> str:
        return str(self.config["cniVersion"])

    def valid_attachments(self) -> set[tuple[str, str]]:
        """What GC is to keep: (container id, interface name). Raises CniError; a missing list is not an empty one."""
        pairs = self.config.get("cni.dev/valid-attachments")
        try:
            return {(pair["containerID"], pair["ifname"]) for pair in pairs}  # type: ignore[union-attr]
        except (TypeError, KeyError):
            text = "cni.dev/valid-attachments: must be a list of objects with containerID and ifname"
            raise CniError(INVALID_CONFIG, text, version=self.version) from None


def items(fields: Fields, name: str) -> Sequence[Any]:
    return fields.items(name) if name in fields else ()


def wishes(runtime: Fields, arguments: Mapping[str, str]) -> dict[str, Any]:
    """What the silk worker is asked for beside a link: limits of bandwidth, a certain address, a certain MAC.

    They come as the capabilities bandwidth, ips and mac; podman sends the latter two in CNI_ARGS, as IP and MAC.
    """
    wishes: dict[str, Any] = {}
    if "bandwidth" in runtime:
        wishes["bandwidth"] = dict(runtime.mapping("bandwidth"))
    ips = items(runtime, "ips")
    if len(ips) > 1:
        raise runtime.malformed("ips", "a container has one address, so at most one can be asked for")
    address = ips[0] if ips else arguments.get("IP")
    if address:
        text = str(address).partition("/")[0]
        wishes["address"] = str(Fields({"ips": text}, "runtimeConfig").address("ips"))
    mac = runtime.text("mac") if "mac" in runtime else arguments.get("MAC")
    if mac:
        wishes["mac"] = mac.lower()
    return wishes


def parse(call: Fields) -> Call:
    """A call as the shim hands it on (docs/design.md, POST /cni). Raises CniError."""
    try:
        texts = {name: call.optional_text(name) or "" for name in ("container_id", "netns", "ifname", "path", "args")}
        command = call.text("command")
        json.dumps(texts, ensure_ascii=False).encode()
    except (Malformed, UnicodeEncodeError) as error:
        raise CniError(INVALID_ENVIRONMENT, f"environment of the call: {error}") from None
    if command not in _NEEDS:
        raise CniError(INVALID_ENVIRONMENT, f"unknown CNI_COMMAND: {command}", f"known: {', '.join(_NEEDS)}, VERSION")
    missing = [_VARIABLES[name] for name in ("container_id", "netns", "ifname", "path") if _lacks(command, name, texts)]
    if missing:
        raise CniError(INVALID_ENVIRONMENT, f"required env variables [{','.join(missing)}] missing")
    if texts["container_id"]:
        _check_container_id(texts["container_id"])
    if texts["ifname"]:
        _check_ifname(texts["ifname"])
    config = _config(call)
    return Call(
        command=command,
        handle=Handle(texts["container_id"]),
        netns=texts["netns"],
        ifname=texts["ifname"],
        arguments=_arguments(texts["args"]),
        config=config,
    )


def _lacks(command: str, name: str, texts: Mapping[str, str]) -> bool:
    return name in _NEEDS[command] and not texts[name]


def _check_container_id(text: str) -> None:
    if not _NAME.fullmatch(text):
        raise CniError(INVALID_ENVIRONMENT, "invalid characters in containerID", text)
    try:
        file_name(Handle(text))
    except Malformed as error:
        raise CniError(INVALID_ENVIRONMENT, "containerID is too long", str(error)) from None


def _check_ifname(text: str) -> None:
    if len(text.encode()) > MAX_IFNAME:
        raise CniError(INVALID_ENVIRONMENT, "interface name is too long", f"{text}: at most {MAX_IFNAME} bytes")
    if text in (".", ".."):
        raise CniError(INVALID_ENVIRONMENT, "interface name is . or ..")
    if any(character in "/:" or character.isspace() for character in text):
        raise CniError(INVALID_ENVIRONMENT, "interface name contains / or : or whitespace characters", text)


def _config(call: Fields) -> dict[str, Any]:
    """The network configuration: a JSON object with a name and a version that we speak."""
    try:
        text = call.optional_text("config", max_length=1 << 20) or ""
        config = json.loads(text)
        # What cannot be written again (lone surrogates, NaN, 1e999) could not be kept in a record either.
        json.dumps(config, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise CniError(DECODING_FAILURE, f"error unmarshall network config: {error}") from None
    if not isinstance(config, dict):
        raise CniError(DECODING_FAILURE, "error unmarshall network config: it is not a JSON object")
    version = config.get("cniVersion")
    if version not in VERSIONS:
        supported = ", ".join(VERSIONS)
        details = f"config is {json.dumps(version or '0.1.0')}, plugin supports [{supported}]"
        raise CniError(INCOMPATIBLE_VERSION, "incompatible CNI versions", details)
    name = config.get("name")
    if not isinstance(name, str) or not name:
        raise CniError(INVALID_CONFIG, "missing network name", "the key `name` of the configuration", version=version)
    if not _NAME.fullmatch(name):
        raise CniError(INVALID_CONFIG, "invalid characters found in network name", name, version=version)
    if not isinstance(config.get("dns", {}), dict):
        raise CniError(INVALID_CONFIG, "dns: must be an object", version=version)
    return config


def _arguments(text: str) -> dict[str, str]:
    """CNI_ARGS: `KEY=VALUE;KEY=VALUE`. Keys that are not ours are for others."""
    pairs = [part.partition("=") for part in text.split(";") if part]
    for key, equals, _ in pairs:
        if not key or not equals:
            raise CniError(INVALID_ENVIRONMENT, f"CNI_ARGS: invalid pair {key!r}", "the form is KEY=VALUE;KEY=VALUE")
    return {key: value for key, _, value in pairs}


def veth_result(
    version: str,
    *,
    ifname: str,
    netns: str,
    interface: str | None,
    mac: str | None,
    peer_mac: str | None,
    mtu: int | None,
    address: str,
    gateway: str,
    dns: Mapping[str, Any],
) -> dict[str, Any]:
    """What ADD answers, in the form of `version`, of a link that the silk worker made."""
    host: dict[str, Any] = {"name": interface, "mac": mac}
    inside: dict[str, Any] = {"name": ifname, "mac": peer_mac, "sandbox": netns}
    ip: dict[str, Any] = {"address": f"{address}/32", "gateway": gateway, "interface": 1}
    if version in ("0.3.1", "0.4.0"):
        ip = {"version": "4", **ip}
    if version == "1.1.0":
        host, inside = {**host, "mtu": mtu}, {**inside, "mtu": mtu}
    return {
        "cniVersion": version,
        "interfaces": [host, inside],
        "ips": [ip],
        "routes": [{"dst": "0.0.0.0/0", "gw": gateway}],
        "dns": dict(dns),
    }


def output(value: Mapping[str, Any]) -> str:
    """JSON as CNI plugins print it (contract/cell.md 2.1): four blanks, and a line's end."""
    return json.dumps(value, indent=4) + "\n"
