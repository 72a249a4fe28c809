"""`GET …/explain?source=&destination=&protocol=&port=`: its parameters, and its answer.

    {"allowed": true, "revision": 9,
     "policies": [{"policy": as in v1, "since": {"revision": 7, "time": "2026-11-23T19:20:40.123Z", "user": "admin"}}],
     "others": [those between the two that do not allow it, likewise],
     "removed": [{"policy": …, "at": {…}}],
     "source": {"id": "…", "tag": "0001", "instances": null}, "destination": {…}}

`since` is null when the change log does not say; `tag` for an app that is in no policy; `instances` always, since not
known here: where an app's instances run is known on their cells only. A security group is another way to be allowed, or
not, to leave a container; this is about policies.
"""

import json
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import QueryParams

from bus.messages import AppId, Policy, Ports, Protocol
from services.policy import wire_v1
from services.policy.explain import Explanation, Flow, Known
from services.policy.history import Entry
from services.policy.history_http import BadParameter, integer, said, text

PARAMETERS = ("source", "destination", "protocol", "port")


def flow(query: QueryParams) -> Flow:
    """The flow that a query asks about. Raises BadParameter."""
    for name in query:
        if name not in PARAMETERS:
            raise BadParameter(f"{name}: no such parameter; there are {', '.join(PARAMETERS)}")
    for name in PARAMETERS:
        if len(query.getlist(name)) != 1:
            raise BadParameter(f"{name}: must be given, once; needed are {', '.join(PARAMETERS)}")
    source, destination = text(query, "source"), text(query, "destination")
    port = integer(query, "port", low=1, high=65535)
    protocol = query["protocol"]
    if protocol not in tuple(Protocol):
        raise BadParameter(f"protocol: must be one of {', '.join(Protocol)}, not {protocol[:40]!a}")
    assert source is not None and destination is not None and port is not None  # noqa: S101, PT018 (given: see above)
    return Flow(AppId(source), AppId(destination), Protocol(protocol), port)


def as_policy(asked: Flow) -> Policy:
    """The policy that would allow just this flow: who may see it may have it explained."""
    return Policy(asked.source, asked.destination, Ports(asked.protocol, asked.port, asked.port))


def encode(asked: Flow, found: Explanation, *, tag_length: int) -> bytes:
    """The answer. Tags are written with so many bytes, as everywhere."""

    def app(name: AppId) -> dict[str, Any]:
        tag = found.tags.get(name)
        return {"id": name, "tag": None if tag is None else f"{tag:0{2 * tag_length}X}", "instances": None}

    answer = {
        "allowed": bool(found.allowing),
        "revision": found.revision,
        "policies": _known(found.allowing, "since"),
        "others": _known(found.others, "since"),
        "removed": _known(found.removed, "at"),
        "source": app(asked.source),
        "destination": app(asked.destination),
    }
    return json.dumps(answer, separators=(",", ":"), ensure_ascii=False).encode()


def _known(items: Sequence[Known], when: str) -> list[dict[str, Any]]:
    return [{"policy": json.loads(wire_v1.item(item.policy)), when: _change(item.change)} for item in items]


def _change(entry: Entry | None) -> dict[str, Any] | None:
    if entry is None:
        return None
    return {"revision": entry.revision, "time": said(entry.at_ms), "user": entry.user}
