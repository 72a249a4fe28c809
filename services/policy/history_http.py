"""`GET …/history`: its parameters, and its answer.

    {"history": [{"revision": 7, "time": "2026-11-23T19:20:40.123Z", "user": "admin", "request_id": "…",
                  "added": [policies as in v1…], "removed": […]}],
     "next": {"before": 7}}

The latest change comes first. `next` has what to add to the same question for the page that follows; null on the last.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from starlette.datastructures import QueryParams

from bus.messages import MAX_APP_ID, Policy, Revision
from services.policy import wire_v1
from services.policy.history import Entry, Wanted

MAX_LIMIT = 1000
MAX_REVISION = 2**63 - 1
PARAMETERS = ("limit", "before", "after", "app_id", "user", "since", "until")


class BadParameter(ValueError):
    """A parameter of the query that cannot be used. The text names it."""


def wanted(query: QueryParams) -> Wanted:
    """The changes that a query asks for. Raises BadParameter."""
    for name in query:
        if name not in PARAMETERS:
            raise BadParameter(f"{name}: no such parameter; there are {', '.join(PARAMETERS)}")
        if len(query.getlist(name)) > 1:
            raise BadParameter(f"{name}: given more than once")
    limit = integer(query, "limit", low=1, high=MAX_LIMIT)
    return Wanted(
        limit=100 if limit is None else limit,
        before=integer(query, "before"),
        after=integer(query, "after"),
        app=text(query, "app_id"),
        user=text(query, "user"),
        since_ms=_time(query, "since"),
        until_ms=_time(query, "until"),
    )


def integer(query: QueryParams, name: str, *, low: int = 0, high: int = MAX_REVISION) -> int | None:
    """A parameter that is a number, None if it is not given. Raises BadParameter."""
    text = query.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 19 and low <= int(text) <= high):
        raise BadParameter(f"{name}: must be a whole number in {low}..{high}, not {text[:40]!a}")
    return int(text)


def text(query: QueryParams, name: str) -> str | None:
    """A parameter that is a name, None if it is not given. Raises BadParameter."""
    value = query.get(name)
    if value is not None and (not value or len(value) > MAX_APP_ID or not value.isprintable()):
        raise BadParameter(f"{name}: must be 1 to {MAX_APP_ID} printable characters")
    return value


def _time(query: QueryParams, name: str) -> int | None:
    text = query.get(name)
    if text is None:
        return None
    try:
        time = datetime.fromisoformat(text)
        if time.tzinfo is None:
            raise ValueError
        return int(time.timestamp() * 1000)
    except (ValueError, OverflowError):
        raise BadParameter(
            f"{name}: must be a time with its zone, as 2026-11-23T19:20:40Z, not {text[:40]!a} (write + as %2B)"
        ) from None


def encode(entries: Sequence[Entry], following: Revision | None) -> bytes:
    """The answer."""
    items = (
        f'{{"revision":{entry.revision},"time":{_json(said(entry.at_ms))},"user":{_json(entry.user)},"request_id":{_json(entry.request_id)},"added":{_policies(entry.added)},"removed":{_policies(entry.removed)}}}'
        for entry in entries
    )
    before: Mapping[str, int] | None = None if following is None else {"before": following}
    return f'{{"history":[{",".join(items)}],"next":{_json(before)}}}'.encode()


def _policies(policies: Sequence[Policy]) -> str:
    return f"[{','.join(map(wire_v1.item, policies))}]"


def said(at_ms: int) -> str:
    """A Unix time in ms as the API writes it."""
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
