"""Server-sent events as a client reads them (HTML Living Standard, 9.2)."""

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cli.client import Client, checked
from cli.errors import Failed, Refused
from cli.web import Answer

SILENCE = 45.0
"""Seconds without anything: the server says something every 15."""


class Ended(Exception):
    """The stream has ended or broken off; one may come back."""


def passing(error: BaseException) -> bool:
    """Whether it may be over in a moment: the server restarts, say."""
    return isinstance(error, Ended) or (
        isinstance(error, Failed)
        and not (isinstance(error, Refused) and error.status < http.client.INTERNAL_SERVER_ERROR)
    )


@dataclass(frozen=True, slots=True)
class Event:
    """`kind` is empty for a comment, which says no more than that the server is there; `number` is the event's id."""

    kind: str
    data: Any = None
    number: str = ""


@contextmanager
def following(client: Client, path: str, last: str = "", *, silence: float = SILENCE) -> Iterator[Iterator[Event]]:
    """The events of a path below the API's, from after the one with the id `last`.

    Raises Failed when the server refuses; reading raises Ended.
    """
    headers = {"Accept": "text/event-stream", **({"Last-Event-ID": last} if last else {})}
    with client.server.open("GET", path, headers=headers, timeout=silence) as response:
        if response.status == http.client.NOT_FOUND:
            what = path.partition("?")[0]
            text = f"{client.server.url} has no {what}: it is not Silkbus's policy server, or an older one"
            raise Refused(text, response.status, text)
        if response.status != http.client.OK:
            try:
                body = response.read()
            except (OSError, http.client.HTTPException) as error:
                raise Ended(repr(error)) from None
            checked(Answer(response.status, response.headers, body))
            raise Failed(f"{client.server.url}{path}: answered {response.status}, and no events")
        yield _events(response)


def _events(response: http.client.HTTPResponse) -> Iterator[Event]:
    kind, number, data = "", "", list[str]()
    while True:
        try:
            line = response.readline()
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Ended(repr(error)) from None
        if not line:
            raise Ended("the server has ended it")
        text = line.decode(errors="replace").rstrip("\r\n")
        if text.startswith(":"):
            yield Event("")
            continue
        name, _, value = text.partition(":")
        value = value.removeprefix(" ")
        if not text:
            if data:
                yield _event(kind, "\n".join(data), number)
            kind, number, data = "", "", []
        elif name == "event":
            kind = value
        elif name == "id":
            number = value
        elif name == "data":
            data.append(value)


def _event(kind: str, data: str, number: str) -> Event:
    try:
        return Event(kind, json.loads(data), number)
    except ValueError:
        raise Ended(f"an event {kind!r} that is not JSON") from None
