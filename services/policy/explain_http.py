"""`GET …/explain?source=&destination=&protocol=&port=[&probe=true]`: its parameters, and its answer.

    {"allowed": true, "revision": 9,
     "policies": [{"policy": as in v1, "since": {"revision": 7, "time": "2026-11-23T19:20:40.123Z", "user": "admin"}}],
     "others": [those between the two that do not allow it, likewise],
     "removed": [{"policy": …, "at": {…}}],
     "source": {"id": "…", "tag": "0001", "instances": [
         {"cell": "cell-1", "revision": 9, "handle": "…", "address": "10.255.1.2", "verdict": "passes", "reason": "…",
          "chain": "sb-new", "rule": "…", "kernel_agrees": true, "differences": [],
          "probes": [{"address": "10.255.2.2", "outcome": "connected", "milliseconds": 0.8, "error": null}]}]},
     "destination": {likewise},
     "cells": {"asked": 3, "answered": 2, "silent": {"count": 1, "cells": ["cell-3"]}, "problems": []}}

The policies are the policy server's own knowledge; the instances are what their cells say (bus/explaining.py), each by
the `revision` that its kernel has. `instances` and `cells` are null while the cells cannot be asked, `since` when the
change log does not say, `tag` for an app that is in no policy, `probes` unless `probe=true`, which only admins may.
Only admins are told the names of silent cells, and why others could not say all (`problems`). A security group is
another way to be allowed, or not, to leave a container; this is about policies.
"""

import json
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import QueryParams

from bus.explaining import CellAnswer, Instance
from bus.messages import AppId, Policy, Ports, Protocol
from services.policy import wire_v1
from services.policy.explain import Explanation, Flow, Known
from services.policy.history import Entry
from services.policy.history_http import BadParameter, integer, said, text
from services.policy.instances import Asked

REQUIRED = ("source", "destination", "protocol", "port")
PARAMETERS = (*REQUIRED, "probe")


def flow(query: QueryParams) -> Flow:
    """The flow that a query asks about. Raises BadParameter."""
    for name in query:
        if name not in PARAMETERS:
            raise BadParameter(f"{name}: no such parameter; there are {', '.join(PARAMETERS)}")
    for name in REQUIRED:
        if len(query.getlist(name)) != 1:
            raise BadParameter(f"{name}: must be given, once; needed are {', '.join(REQUIRED)}")
    source, destination = text(query, "source"), text(query, "destination")
    port = integer(query, "port", low=1, high=65535)
    protocol = query["protocol"]
    if protocol not in tuple(Protocol):
        raise BadParameter(f"protocol: must be one of {', '.join(Protocol)}, not {protocol[:40]!a}")
    assert source is not None and destination is not None and port is not None  # noqa: S101, PT018 (given: see above)
    return Flow(AppId(source), AppId(destination), Protocol(protocol), port)


def probe(query: QueryParams) -> bool:
    """Whether the query wants the connection tried. Raises BadParameter."""
    match query.getlist("probe"):
        case []:
            return False
        case [("true" | "false") as wish]:
            return wish == "true"
    raise BadParameter("probe: must be true or false, once")


def as_policy(asked: Flow) -> Policy:
    """The policy that would allow just this flow: who may see it may have it explained."""
    return Policy(asked.source, asked.destination, Ports(asked.protocol, asked.port, asked.port))


def encode(asked: Flow, found: Explanation, cells: Asked | None, *, tag_length: int, names: bool) -> bytes:
    """The answer. Tags are written with so many bytes, as everywhere; silent cells are named if `names`."""

    def app(name: AppId, instances: list[dict[str, Any]] | None) -> dict[str, Any]:
        tag = found.tags.get(name)
        return {"id": name, "tag": None if tag is None else f"{tag:0{2 * tag_length}X}", "instances": instances}

    answers = None if cells is None else cells.answers
    answer = {
        "allowed": bool(found.allowing),
        "revision": found.revision,
        "policies": _known(found.allowing, "since"),
        "others": _known(found.others, "since"),
        "removed": _known(found.removed, "at"),
        "source": app(asked.source, None if answers is None else [_at(a, i) for a in answers for i in a.sources]),
        "destination": app(
            asked.destination, None if answers is None else [_at(a, i) for a in answers for i in a.destinations]
        ),
        "cells": None if cells is None else _cells(cells, names=names),
    }
    return json.dumps(answer, separators=(",", ":"), ensure_ascii=False).encode()


def _at(answer: CellAnswer, instance: Instance) -> dict[str, Any]:
    return {"cell": answer.cell, "revision": answer.revision, **instance.encode()}


def _cells(cells: Asked, *, names: bool) -> dict[str, Any]:
    silent: dict[str, Any] = {"count": len(cells.silent)}
    said: dict[str, Any] = {"asked": cells.cells, "answered": len(cells.answers), "silent": silent}
    if names:
        silent["cells"] = list(cells.silent)
        said["problems"] = [{"cell": a.cell, "problem": a.problem} for a in cells.answers if a.problem]
    return said


def _known(items: Sequence[Known], when: str) -> list[dict[str, Any]]:
    return [{"policy": json.loads(wire_v1.item(item.policy)), when: _change(item.change)} for item in items]


def _change(entry: Entry | None) -> dict[str, Any] | None:
    if entry is None:
        return None
    return {"revision": entry.revision, "time": said(entry.at_ms), "user": entry.user}
