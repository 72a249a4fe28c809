"""How HTTP APIs are listened for: TLS, and limits on clients that take their time.

uvicorn waits for ever for a request that has begun, and for a client to read its answer. The original has no limits at
all (contract/policy.md 1.1). A connection costs little while idle, and routers keep idle ones for up to 90 s and may
lose a request on one that is closed under them; so idleness is borne for longer than that, slowness is not.
"""

import asyncio
import logging
import re
import resource
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from bus.decode import Malformed
from bus.log import about

log = logging.getLogger(__name__)

ADDRESS = re.compile(r"fd:\d+|([^\[\]:]+|\[[0-9a-fA-F:]+\]):\d{1,5}")
"""Where to listen: `HOST:PORT`, `[IPv6]:PORT`, or `fd:N` for a socket inherited."""
IDLE_SECONDS = 120.0
HEAD_SECONDS = 10.0
BODY_SECONDS = 75.0
"""Longer than a handler waits for a body, since it has a better answer than we."""
ANSWER_SECONDS = 60.0
"""For the client to read on when it has left an answer unread."""
MAX_HEAD = 1 << 20
"""Bytes of a request's first line and headers: lists can be filtered by thousands of ids."""
STOP_SECONDS = 60
"""How long requests that have begun may take to end when the server stops."""
MAX_FILES = 65_536

_TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class CannotListen(Exception):
    """The address cannot be listened on. The text says why."""


@contextmanager
def listening(where: str) -> Iterator[socket.socket]:
    """A bound, listening socket at `where`, as `ADDRESS`. Raises CannotListen."""
    try:
        if where.startswith("fd:"):
            listener = socket.socket(fileno=int(where.removeprefix("fd:")))
        else:
            host, _, port = where.rpartition(":")
            family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
            listener = socket.create_server((host.strip("[]"), int(port)), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise CannotListen(f"cannot listen on {where}: {error}") from error
    with listener:
        listener.setblocking(False)
        yield listener


def server_tls(certificate: Path, key: Path) -> ssl.SSLContext:
    """TLS 1.2 and later with this certificate; clients need none. Raises Malformed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise Malformed(
            f"server_cert_file, server_key_file: {certificate} and {key} are not a readable PEM certificate and its "
            f"unencrypted key ({error})"
        ) from None
    return context


def raise_file_limit() -> None:
    """Allow this process as many connections as the system lets it have: the usual soft limit is 1 024 files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class BoundedProtocol(H11Protocol):
    """HTTP for clients who may be slow, but not for ever: a bound on each stage of a connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = h11.Connection(h11.SERVER, MAX_HEAD)
        self.timeout_keep_alive = IDLE_SECONDS  # type: ignore[assignment]
        self._stage = 0.0
        self._deadline: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._enter(IDLE_SECONDS)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        state = self.conn.their_state
        self._enter(HEAD_SECONDS if state is h11.IDLE else BODY_SECONDS if state is h11.SEND_BODY else 0)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.IDLE:
            self._enter(0)  # uvicorn's own limit on idleness runs now

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(ANSWER_SECONDS, self._give_up, "does not read its answer")

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._enter(0)
        super().connection_lost(exc)

    def _enter(self, seconds: float) -> None:
        """The stage that must be over within `seconds`; 0 for none. More of the same stage gets no more time."""
        if seconds == self._stage:
            return
        self._stage = seconds
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if seconds:
            self._deadline = self.loop.call_later(seconds, self._expired)

    def _expired(self) -> None:
        if self._stage == HEAD_SECONDS and not self.transport.is_closing():
            self.transport.write(_TOO_SLOW)
            self.transport.close()
        else:
            self._give_up("is idle" if self._stage == IDLE_SECONDS else "does not send its request's body")

    def _give_up(self, why: str) -> None:
        log.info("closing a connection: its client %s", why, extra=about(client=self.client))
        self.transport.abort()
