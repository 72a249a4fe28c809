"""The calls by which others make the original agent work at once (contract/cell.md 6.6), on TCP, as it has them.

For side jobs and scripts that know them; ours use the private socket. Each is one full pass over the kernel, so none
can do harm: where the original's clean-up empties the rules of a container that is alive, here what is wanted is made
so, and what nobody needs goes.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from bus.listener import BoundedProtocol, listening
from bus.local import serving
from bus.log import about
from services.enforcer.reconciler import NotReady, Reconciler

log = logging.getLogger(__name__)

PLAIN = "text/plain"


class ForeignApi:
    """`dynamic`: whether security groups are followed, without which there is nothing to force of them."""

    def __init__(self, reconciler: Reconciler, *, dynamic: bool) -> None:
        self._reconciler = reconciler
        self._dynamic = dynamic

    def application(self) -> Starlette:
        """The calls, with any method."""
        routes = [
            Route("/force-policy-poll-cycle", self.policies),
            Route("/force-asgs-for-container", self.groups),
            Route("/force-orphaned-asgs-cleanup", self.cleanup),
        ]
        for route in routes:
            route.methods = None
        return Starlette(routes=routes)

    async def policies(self, _: Request) -> Response:
        return await self._forced("", "failed to force policy poll cycle: ")

    async def groups(self, request: Request) -> Response:
        return await self._of_container(
            request,
            lambda name: self._forced(f"updated container {name}", f"failed to update asgs for container {name}: "),
        )

    async def cleanup(self, request: Request) -> Response:
        return await self._of_container(
            request,
            lambda name: self._forced(
                f"cleaned up ASGs for container {name}", f"failed to cleanup ASGs for container {name}: "
            ),
        )

    async def _of_container(self, request: Request, work: Callable[[str], Awaitable[Response]]) -> Response:
        if not self._dynamic:
            return Response("ASG syncing has been disabled administratively", 405, media_type=PLAIN)
        name = request.query_params.get("container", "")
        if not name:
            return Response("no container specified", 400, media_type=PLAIN)
        return await work(name)

    async def _forced(self, done: str, failed: str) -> Response:
        try:
            await self._reconciler.sync()
        except NotReady as error:
            return Response(f"{failed}{error}", 500, media_type=PLAIN)
        return Response(done, 200, media_type=PLAIN if done else None)


@asynccontextmanager
async def forcing(api: ForeignApi, host: str, port: int) -> AsyncIterator[None]:
    """Serve while inside; nothing if the port is 0. Raises bus.listener.CannotListen."""
    if port == 0:
        yield
        return
    with listening(f"{host}:{port}") as listener:
        async with serving(api.application(), listener, protocol=BoundedProtocol):
            log.info("forced passes are served", extra=about(address=host, port=port))
            yield
