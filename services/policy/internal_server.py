"""The internal API's server: what foreign agents on the cells poll, over mutual TLS (contract/policy.md 2).

A process of its own, as the original's is: what thousands of polling cells cost must not delay a change on its way to
our own, it has another certificate, and who has no foreign agents does not run it. It keeps mirrors of the tables as
each policy server does, vouches for them on the bus as each does, and publishes the tags it gives to routers. It works
with the bus away.
"""

import asyncio
import logging
import time
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from bus import watchdog
from bus.connection import connect
from bus.debug import debugging
from bus.listener import STOP_SECONDS, BoundedProtocol, listening, raise_file_limit
from bus.local import Health, serving
from bus.log import about
from bus.tables import POLICIES, SECURITY_GROUPS, Publisher
from bus.tls_server import TlsServer
from services.policy import legacy_config, security_groups
from services.policy.gateway import go_duration
from services.policy.group_view import GroupView
from services.policy.instance import instance
from services.policy.internal_api import MAX_AGE, InternalApi
from services.policy.internal_settings import InternalSettings
from services.policy.migrate import open_ledger, security_groups_ledger
from services.policy.policy_view import PolicyView
from services.policy.starting import start
from services.policy.store import Store, entries
from services.policy.tag_pool import REST_MARGIN, TagPool

PROGRAM = "silkbus-policy-server-internal"
CHECK_TIMEOUT = 5.0

log = logging.getLogger(__name__)


def main() -> None:
    start(
        InternalSettings,
        PROGRAM,
        "Policies and security groups for foreign agents.",
        legacy_config.read_internal,
        serve,
    )


async def serve(settings: InternalSettings) -> None:
    """Serve until cancelled; then finish the requests begun. Raises CannotListen, CannotOpen or Malformed."""
    raise_file_limit()
    tls = settings.tls()
    health_address = f"127.0.0.1:{settings.health_check_port}"
    with listening(settings.listen) as listener, listening(health_address) as health_listener:
        async with (
            debugging(settings.debug_listen),
            open_ledger(settings.database, settings.database_options) as ledger,
            connect(
                settings.nats, role="policy-server", name=instance(), credentials=settings.nats_credentials
            ) as connection,
            asyncio.TaskGroup() as tasks,
        ):
            publisher = Publisher(connection, ledger, POLICIES, entries)
            groups_publisher = Publisher(
                connection, security_groups_ledger(ledger), SECURITY_GROUPS, security_groups.entries
            )
            policies, groups = PolicyView(settings.tag_length), GroupView()
            publisher.listen(policies.update)
            groups_publisher.listen(groups.update)
            store = Store(ledger, TagPool(rest=settings.max_stale + REST_MARGIN, clock=time.time), publisher.committed)
            api = InternalApi(
                policies,
                groups,
                store,
                policies_age=lambda: publisher.age,
                groups_age=lambda: groups_publisher.age,
                tag_length=settings.tag_length,
            )
            tasks.create_task(publisher.run())
            tasks.create_task(groups_publisher.run())
            async with (
                serving(_health(store, publisher, groups_publisher), health_listener, protocol=BoundedProtocol),
                serving(api, listener, protocol=BoundedProtocol, tls=tls, server=TlsServer, stop_timeout=STOP_SECONDS),
            ):
                log.info("listening", extra=about(address=settings.listen, health=health_address))
                watchdog.ready()
                await asyncio.Event().wait()


def _health(store: Store, *publishers: Publisher[Any]) -> Starlette:
    """The health check: the original's two routes, and ours."""
    started = time.monotonic_ns()
    health = Health()
    for publisher in publishers:

        def fresh(publisher: Publisher[Any] = publisher) -> str | None:
            return None if publisher.age <= MAX_AGE else "the database was not seen of late; requests are refused"

        health.check(publisher.table.name, fresh)

    async def uptime(_: Request) -> Response:
        return PlainTextResponse(f"Network policy server, up for {go_duration(time.monotonic_ns() - started)}\n")

    async def check(_: Request) -> Response:
        try:
            async with asyncio.timeout(CHECK_TIMEOUT):
                await store.check()
        except Exception as error:  # noqa: BLE001 (each database driver has errors of its own)
            log.warning("the database does not answer", extra=about(error=repr(error)))
            return JSONResponse({"error": "check database failed"}, 500)
        return Response()

    return Starlette(routes=[Route("/", uptime), Route("/health", check), *health.routes()])


if __name__ == "__main__":
    main()
