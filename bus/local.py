"""HTTP between the services of one cell, over Unix sockets that only their owner may use.

The folder is 0700, the socket 0600, and each caller's credentials are checked when it connects: root or the same user,
or the connection is closed unread. (uvicorn alone would create the socket open to everyone.) Errors are JSON objects
with one key, `error`.
"""

import asyncio
import errno
import json
import logging
import os
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from bus.decode import Fields, Malformed
from bus.log import about

log = logging.getLogger(__name__)

MAX_SOCKET_PATH = 107
"""Bytes (unix(7), sun_path)."""
START_TIMEOUT = 10.0
STOP_TIMEOUT = 10
KEEP_SECONDS = 2.0


class Unreachable(Exception):
    """The service does not answer: it is down, or slower than the time given. Nothing is known of what it did."""


class Refused(Exception):
    """The service answered with an error. `status` is HTTP's."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Service:
    """A client of one service of this cell, with connections kept alive."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path
        # Kept for less long than the server keeps them (uvicorn: 5 s), so that none is used just as it is closed.
        limits = httpx.Limits(keepalive_expiry=KEEP_SECONDS)
        transport = httpx.AsyncHTTPTransport(uds=str(path), verify=False, limits=limits)
        self._client = httpx.AsyncClient(transport=transport, base_url=f"http://{name}", trust_env=False)

    async def call(self, method: str, target: str, body: Any = None, *, timeout: float = 10.0) -> dict[str, Any]:
        """Call `method target` with `body` as JSON and give back the JSON object answered.

        Raises Unreachable or Refused; `timeout`, in seconds, covers the whole call.
        """
        try:
            async with asyncio.timeout(timeout):
                response = await self._client.request(method, target, json=body, timeout=None)
        except TimeoutError:
            raise Unreachable(f"{self.name} did not answer {method} {target} within {timeout:g} s") from None
        except httpx.HTTPError as error:
            raise Unreachable(f"{self.name} is not reachable at {self.path}: {error}") from None
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if response.status_code >= 400 or not isinstance(answer, dict):
            message = answer.get("error") if isinstance(answer, dict) else None
            raise Refused(str(message or f"{self.name} answered {response.status_code}"), response.status_code)
        return answer

    async def close(self) -> None:
        await self._client.aclose()


async def json_body(request: Request, where: str, *, limit: int = 1 << 20) -> Fields:
    """The request's body as a JSON object. Raises Malformed, also for one longer than `limit` bytes."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise Malformed(f"{where}: the body is longer than {limit} bytes")
    try:
        return Fields(json.loads(body), where)
    except (ValueError, RecursionError) as error:
        if isinstance(error, Malformed):
            raise
        raise Malformed(f"{where}: the body is not JSON: {error}") from None


class Health:
    """What `/livez`, `/readyz` and `/metrics` of a service answer.

    Live is who answers at all. Ready is who has nothing to object: each check gives None, or what is missing.
    """

    def __init__(self) -> None:
        self._checks: dict[str, Callable[[], str | None]] = {}

    def check(self, name: str, check: Callable[[], str | None]) -> None:
        self._checks[name] = check

    async def livez(self, _: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(self, _: Request) -> Response:
        problems = {name: problem for name, check in self._checks.items() if (problem := check()) is not None}
        lines = [f"{name}: {problems.get(name, 'ok')}\n" for name in self._checks]
        return PlainTextResponse("".join(lines) or "ok\n", status_code=503 if problems else 200)

    async def metrics(self, _: Request) -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    def routes(self) -> list[Route]:
        return [
            Route("/livez", self.livez),
            Route("/readyz", self.readyz),
            Route("/metrics", self.metrics),
        ]


async def _malformed(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, status_code=400)


async def _unexpected(request: Request, error: Exception) -> Response:
    log.error("request failed", exc_info=error, extra=about(request=f"{request.method} {request.url.path}"))
    return JSONResponse({"error": f"unexpected error: {error!r}; see the service's log"}, status_code=500)


def application(routes: list[Route], health: Health) -> Starlette:
    """The app of a cell service: its routes, the health routes, and errors as JSON."""
    return Starlette(
        routes=[*routes, *health.routes()],
        exception_handlers={Malformed: _malformed, Exception: _unexpected},
    )


class _PrivateProtocol(H11Protocol):
    """HTTP for callers who are root or this process's own user; others are cut off before they are read."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        peer: socket.socket = transport.get_extra_info("socket")
        _, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid not in (0, os.geteuid()):
            log.warning("refused a caller on the private socket", extra=about(uid=uid))
            # A transport that is aborted still gets its lost connection reported, so the protocol must know it.
            super().connection_made(transport)
            transport.abort()
            return
        super().connection_made(transport)


class HttpServer(uvicorn.Server):
    """uvicorn's server, without its handling of signals. One made of it may accept connections in its own way."""

    @contextmanager
    def capture_signals(self) -> Any:
        """Signals are the process's business (bus.process), not each server's."""
        yield


@asynccontextmanager
async def serving(
    app: ASGIApp,
    listener: socket.socket,
    *,
    protocol: type[asyncio.Protocol] = H11Protocol,
    tls: ssl.SSLContext | None = None,
    server: type[HttpServer] = HttpServer,
    stop_timeout: int = STOP_TIMEOUT,
) -> AsyncIterator[None]:
    """Serve `app` on a bound socket while inside; on leaving, finish what was begun (at most `stop_timeout` seconds).

    `protocol` is uvicorn's HTTP, or made of it.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        http=protocol,
        ws="none",
        timeout_graceful_shutdown=stop_timeout,
        server_header=False,
    )
    config.load()
    config.ssl = tls
    running = server(config)
    task = asyncio.create_task(running.serve(sockets=[listener]))
    try:
        async with asyncio.timeout(START_TIMEOUT):
            while not running.started:
                if task.done():
                    task.result()
                    raise RuntimeError("the HTTP server ended while starting")
                await asyncio.sleep(0.005)
        yield
    finally:
        running.should_exit = True
        await task


@asynccontextmanager
async def serving_privately(app: Starlette, path: Path) -> AsyncIterator[None]:
    """Serve `app` on the private Unix socket `path`; a socket left there by a dead process is replaced."""
    async with AsyncExitStack() as stack:
        listener = stack.enter_context(private_socket(path))
        await stack.enter_async_context(serving(app, listener, protocol=_PrivateProtocol))
        yield


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(path))
        except BlockingIOError:
            return True  # it has more callers than it takes
        except OSError:
            return False
    return True


def private_socket(path: Path) -> socket.socket:
    """A listening Unix socket of mode 0600 in a folder of mode 0700, private before the socket is made.

    Raises OSError: EADDRINUSE when a live process serves there, since each of a cell's services is the only writer of
    what it owns.
    """
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise OSError(errno.ENAMETOOLONG, f"a socket's path has at most {MAX_SOCKET_PATH} bytes", str(path))
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.parent.chmod(0o700)
    if _is_served(path):
        raise OSError(errno.EADDRINUSE, "another process serves here; end it first", str(path))
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(1024)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener
