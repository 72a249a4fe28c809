"""The controller's health check on loopback: the original's `/health` (contract/cell.md 4.2), and ours beside it."""

import asyncio
import logging

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from bus.local import Health
from bus.log import about
from services.silk.leases import LeaseStore

log = logging.getLogger(__name__)

CHECK_SECONDS = 5.0


def health_check(store: LeaseStore, health: Health) -> Starlette:
    """`/health` asks the database; `/livez`, `/readyz` and `/metrics` are as on the private socket."""

    async def check(_: Request) -> Response:
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                await store.ledger.database.fetch_val("SELECT 1")
        except Exception as error:  # noqa: BLE001 (each database driver has errors of its own)
            log.warning("the database does not answer", extra=about(error=repr(error)))
            return Response('{"error": "check database failed"}', 500, media_type="text/plain; charset=utf-8")
        return Response()

    return Starlette(routes=[Route("/health", check), *health.routes()])
