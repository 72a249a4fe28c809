"""Who a container is: the policy group under which policies name it, what it is for, the space its security groups are
bound to, and the ports its app listens on.

Garden says it in the properties of the container (contract/cell.md 2.8), which are the key `metadata` of each plugin's
configuration. Other runtimes pass no labels to a plugin. There it is CNI_ARGS for one container (`SILKBUS_APP=…`), or
the plugin's configuration: its key `apps` for containers by their names (K8S_POD_NAME, which podman and Kubernetes
send), its keys `app`, `space`, `org` and `workload` for all containers of a network. A container without an app is
attached and has no policies: nothing on the overlay may reach it.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bus.decode import Fields
from bus.messages import MAX_APP_ID, AppId, Workload
from bus.security_groups import SpaceId

ARGUMENT = "SILKBUS_{}"
POD_NAME = "K8S_POD_NAME"
_PORT = re.compile(r"[0-9]{1,5}")
# What each is called in Garden's properties. Organisation and the app's own GUID are for those who read the metadata.
_PROPERTIES = {"app": "policy_group_id", "space": "space_id", "org": "org_id", "workload": "container_workload"}


@dataclass(frozen=True, slots=True)
class Identity:
    """As `bus.messages.Container` has it. `metadata` is Garden's properties, or what stands for them, unread."""

    app: AppId | None = None
    workload: Workload | None = None
    space: SpaceId | None = None
    ports: tuple[int, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)


def identity_of(config: Mapping[str, Any], arguments: Mapping[str, str]) -> Identity:
    """The identity, each part from the first place that names it. Raises Malformed where a part is not as it must be.

    `config` is the plugin's network configuration, `arguments` are those of CNI_ARGS.
    """
    fields = Fields(config, "network configuration")
    metadata = fields.mapping("metadata") if "metadata" in fields else {}
    properties = Fields(metadata, "network configuration: metadata")
    said = {name: next(_said(name, properties, fields, arguments), None) for name in _PROPERTIES}
    workload = said["workload"]
    return Identity(
        app=None if said["app"] is None else AppId(said["app"]),
        # Garden's callers may say anything here, and what is none of these has no groups of its own.
        workload=Workload(workload) if workload in tuple(Workload) else None,
        space=None if said["space"] is None else SpaceId(said["space"]),
        ports=_ports(properties, metadata),
        metadata={_PROPERTIES[name]: value for name, value in said.items() if value is not None} | dict(metadata),
    )


def _said(name: str, properties: Fields, config: Fields, arguments: Mapping[str, str]) -> Iterator[str]:
    """What each place says of this part, the one that counts first."""
    if _PROPERTIES[name] in properties:
        yield properties.text(_PROPERTIES[name], max_length=MAX_APP_ID)
    argument = ARGUMENT.format(name.upper())
    if argument in arguments:
        yield Fields(arguments, "CNI_ARGS").text(argument, max_length=MAX_APP_ID)
    if name == "app" and "apps" in config and POD_NAME in arguments:
        apps = Fields(config.mapping("apps"), "network configuration: apps")
        if arguments[POD_NAME] in apps:
            yield apps.text(arguments[POD_NAME], max_length=MAX_APP_ID)
    if name in config:
        yield config.text(name, max_length=MAX_APP_ID)


def _ports(properties: Fields, metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The property `ports`: "8080, 9999". None is also said by an empty text."""
    text = metadata.get("ports")
    if text is None or text == "":
        return ()
    if not isinstance(text, str):
        raise properties.malformed("ports", 'must be text, as "8080, 9999"')
    parts = [part.strip() for part in text.split(",")]
    if not all(_PORT.fullmatch(part) and 1 <= int(part) <= 65535 for part in parts):
        raise properties.malformed("ports", f'must be port numbers with commas between, as "8080, 9999", not {text!r}')
    return tuple(dict.fromkeys(map(int, parts)))
