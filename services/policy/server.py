"""The policy server: the external API over the policies in SQL, and the `policies` table on the bus.

SQL is the truth. A change is answered when it is committed; it is published at once, but never waited for, so the API
works with the bus away.
"""

import asyncio
import logging
import time

from bus import watchdog
from bus.connection import connect
from bus.debug import debugging
from bus.events import Relay
from bus.ledger import Outcome
from bus.listener import STOP_SECONDS, BoundedProtocol, listening, raise_file_limit
from bus.local import HttpServer, serving
from bus.log import about
from bus.tables import POLICIES, SECURITY_GROUPS, Publisher
from bus.tls_server import TlsServer
from services.policy import legacy_config, security_groups
from services.policy.authority import open_authority
from services.policy.event_feed import EventFeed
from services.policy.gateway import Gateway
from services.policy.history import History
from services.policy.instance import instance
from services.policy.instances import Instances
from services.policy.listing import Listing
from services.policy.migrate import open_ledger, security_groups_ledger
from services.policy.realisation import Realisation
from services.policy.router_groups import give_tags
from services.policy.security_groups import SecurityGroups
from services.policy.settings import PolicySettings
from services.policy.sse import Streams
from services.policy.starting import start
from services.policy.status_http import StatusApi
from services.policy.store import Store, entries
from services.policy.tag_pool import REST_MARGIN, TagPool
from services.policy.upkeep import Upkeep, open_sources

PROGRAM = "silkbus-policy-server"

log = logging.getLogger(__name__)


def main() -> None:
    start(
        PolicySettings,
        PROGRAM,
        "Policies and tags: HTTP API, SQL, and the table on the bus.",
        legacy_config.read,
        serve,
    )


async def serve(settings: PolicySettings) -> None:
    """Serve until cancelled; then finish the requests begun. Raises CannotListen, CannotOpen or Malformed."""
    raise_file_limit()
    tls = settings.tls()
    with listening(settings.listen) as listener:
        async with (
            debugging(settings.debug_listen),
            open_authority(settings) as authority,
            open_sources(settings) as sources,
            open_ledger(settings.database, settings.database_options) as ledger,
            connect(
                settings.nats, role="policy-server", name=instance(), credentials=settings.nats_credentials
            ) as connection,
            asyncio.TaskGroup() as tasks,
        ):
            publisher = Publisher(connection, ledger, POLICIES, entries)
            relay = Relay(connection, ledger, readers=settings.event_readers, replicas=settings.event_replicas)
            groups_ledger = security_groups_ledger(ledger)
            groups_publisher = Publisher(connection, groups_ledger, SECURITY_GROUPS, security_groups.entries)
            realisation, streams = Realisation(connection, publisher), Streams()
            instances = Instances(connection, lambda: realisation.cells)
            await instances.listen()
            feed = EventFeed(ledger, publisher, realisation.leases)
            tasks.create_task(realisation.run())
            tasks.create_task(publisher.run())
            tasks.create_task(groups_publisher.run())
            tasks.create_task(relay.run())
            if authority.run is not None:
                tasks.create_task(authority.run())

            def committed(outcome: Outcome[None]) -> None:
                publisher.committed(outcome)
                relay.wake()

            pool = TagPool(rest=settings.max_stale + REST_MARGIN, clock=time.time)
            store = Store(ledger, pool, committed)
            tasks.create_task(give_tags(store, settings.router_groups))
            upkeep = None
            if sources is not None:
                groups = SecurityGroups(groups_ledger, groups_publisher.committed)
                upkeep = Upkeep(ledger.database, sources, groups, store, settings)
                groups_publisher.listen(upkeep.mirrored)
                tasks.create_task(upkeep.run())
            gateway = Gateway(
                store,
                Listing(ledger),
                History(ledger),
                authority.authenticator,
                authority.access,
                settings.gateway_options,
                bus_connected=lambda: connection.connected,
                upkeep=upkeep,
                status=StatusApi(realisation, feed, streams),
                instances=instances,
            )
            async with serving(
                gateway.application(),
                listener,
                protocol=BoundedProtocol,
                tls=tls,
                server=HttpServer if tls is None else TlsServer,
                stop_timeout=STOP_SECONDS,
            ):
                host, port = listener.getsockname()[:2]
                log.info(
                    "listening", extra=about(address=host, port=port, database=ledger.database.url.obscure_password)
                )
                watchdog.ready()
                try:
                    await asyncio.Event().wait()
                finally:
                    streams.stop()


if __name__ == "__main__":
    main()
