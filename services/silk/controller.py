"""The Silk controller: leases subnets to cells, keeps the leases in SQL, and publishes the `leases` table.

Cells ask over the bus; those of the original over HTTPS (`lease_api`), if that is set up.

Several may run on one database: each answers a share of the requests, and all publish. The cell that asks is the one
the subject names, since NATS lets a cell publish under its own name only; what the body says of it is not believed.
"""

import asyncio
import logging
import os
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from prometheus_client import Counter

from bus import subjects, watchdog
from bus.connection import Connection, connect
from bus.debug import debugging
from bus.decode import Fields, Malformed
from bus.events import ContainerStream, Relay
from bus.ledger import Outcome
from bus.legacy_config import CannotUse
from bus.listener import BoundedProtocol, CannotListen, listening, raise_file_limit
from bus.local import Health, application, serving, serving_privately
from bus.log import about, setup
from bus.messages import CellName, Lease, cell_name
from bus.process import run
from bus.settings import SettingsError, command_line, load, refuse
from bus.tables import LEASES, Publisher
from bus.tls_server import TlsServer
from services.silk import legacy_config
from services.silk.controller_settings import ControllerSettings
from services.silk.expiry import Expiry, Hearing
from services.silk.health_check import health_check
from services.silk.lease_api import LeaseApi
from services.silk.leases import LeaseLost, LeaseRefused, LeaseStore, Terms
from services.silk.migrate import CannotOpen, open_ledger
from services.silk.pool import Kind
from services.silk.takeover import take_over_at_start

log = logging.getLogger(__name__)

PROGRAM = "silkbus-silk-controller"
QUEUE = "silk-controller"
MAX_AGE = 10.0
"""Seconds without the database after which the controller is not ready; it looks each second."""
REQUESTS = Counter("silkbus_silk_lease_requests_total", "Lease requests answered", ["verb", "outcome"])


class Controller:
    """Answers the three lease requests (docs/design.md, "Leases, on the bus")."""

    def __init__(self, store: LeaseStore) -> None:
        self._store = store

    async def serve(self, connection: Connection) -> None:
        for verb in ("acquire", "renew", "release"):
            await connection.serve(subjects.lease("*", verb), self.answer, queue=QUEUE)

    async def answer(self, subject: str, fields: Fields) -> dict[str, Any]:
        """Answer the request `fields` that came on `subject`. Raises Malformed; the bus answers that as an error."""
        *_, name, verb = subject.split(".")
        cell = cell_name(name)
        try:
            match verb:
                case "acquire":
                    answer = await self._acquire(cell, fields)
                case "renew":
                    answer = await self._renew(cell, fields)
                case "release":
                    answer = await self._release(cell, fields)
                case _:
                    raise Malformed(f"{subject}: no such request")
        except LeaseLost as error:
            log.warning("renewal refused", extra=about(cell=cell, error=str(error)))
            answer = {"error": str(error), "lost": True}
        except LeaseRefused as error:
            log.warning("lease refused", extra=about(cell=cell, request=verb, error=str(error)))
            answer = {"error": str(error)}
        REQUESTS.labels(verb, "refused" if "error" in answer else "granted").inc()
        return answer

    async def _acquire(self, cell: CellName, fields: Fields) -> dict[str, Any]:
        kind = Kind.SINGLE if "single" in fields and fields.flag("single") else Kind.BLOCK
        had = fields.network("subnet") if "subnet" in fields else None
        outcome = await self._store.acquire(cell, fields.address("underlay"), kind, had=had)
        lease = outcome.result
        assert lease is not None  # noqa: S101 (acquire raises otherwise)
        log.info("lease acquired", extra=about(cell=cell, subnet=str(lease.subnet), revision=outcome.revision))
        return {"lease": lease.encode(), "expires_in": self._store.terms.expiry}

    async def _renew(self, cell: CellName, fields: Fields) -> dict[str, Any]:
        await self._store.renew(_own(cell, fields))
        return {"expires_in": self._store.terms.expiry}

    async def _release(self, cell: CellName, fields: Fields) -> dict[str, Any]:
        lease = _own(cell, fields)
        outcome = await self._store.release(lease)
        log.info("lease released", extra=about(cell=cell, subnet=str(lease.subnet), revision=outcome.revision))
        return {}


def _own(cell: CellName, fields: Fields) -> Lease:
    """The lease a request speaks of, which must be the asking cell's."""
    lease = Lease.decode(fields.mapping("lease"), f"{fields.where}: lease")
    if lease.cell != cell:
        raise Malformed(f"{fields.where}: lease: is of cell {lease.cell}, and cell {cell} asks")
    return lease


async def control(settings: ControllerSettings) -> None:
    """Run the controller until cancelled. Raises CannotOpen, CannotListen or Malformed."""
    tls = settings.tls()
    async with AsyncExitStack() as stack:
        listener = stack.enter_context(listening(settings.listen)) if settings.listen else None
        await stack.enter_async_context(debugging(settings.debug_listen))
        ledger = await stack.enter_async_context(open_ledger(settings.database, settings.database_options))
        terms = Terms(settings.pool, settings.lease_expiry, settings.subnet_rest)
        await take_over_at_start(ledger, terms)
        connection = await stack.enter_async_context(
            connect(settings.nats, role="silk-controller", name="central", credentials=settings.nats_credentials)
        )
        relay = Relay(connection, ledger, readers=settings.event_readers, replicas=settings.event_replicas)

        def committed(outcome: Outcome[Any]) -> None:
            publisher.committed(outcome)
            relay.wake()

        store = LeaseStore(ledger, terms, committed)
        publisher = Publisher(connection, ledger, LEASES, store.entries)
        hearing = Hearing(min(settings.lease_grace, settings.lease_expiry))
        connection.on_connect(lambda: hearing.interrupted("the connection to NATS is new"))
        expiry = Expiry(store, hearing, share=settings.max_overdue_share, connected=lambda: connection.connected)
        health = _health(connection, publisher, expiry)
        await stack.enter_async_context(serving_privately(application([], health), settings.socket))
        if settings.health_check_port:
            where = stack.enter_context(listening(f"127.0.0.1:{settings.health_check_port}"))
            await stack.enter_async_context(serving(health_check(store, health), where, protocol=BoundedProtocol))
        if listener is not None:
            raise_file_limit()
            api = LeaseApi(store).application()
            await stack.enter_async_context(serving(api, listener, protocol=BoundedProtocol, tls=tls, server=TlsServer))
            log.info("listening", extra=about(address=settings.listen))
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        stream = ContainerStream(connection, readers=settings.event_readers, replicas=settings.event_replicas)
        for work in (publisher.run(), relay.run(), stream.run(), expiry.run(), Controller(store).serve(connection)):
            tasks.create_task(work)
        watchdog.ready()


def _health(connection: Connection, publisher: Publisher[Lease], expiry: Expiry) -> Health:
    def database() -> str | None:
        if publisher.revision is None:
            return "the leases are not read yet"
        return None if publisher.age <= MAX_AGE else f"the database has not answered for {publisher.age:.0f} s"

    health = Health()
    health.check("bus", lambda: None if connection.connected else "no connection to NATS")
    health.check("database", database)
    health.check("expiry", lambda: expiry.problem)
    return health


def main() -> None:
    parser = command_line(ControllerSettings, PROGRAM, "Leases subnets of the overlay network to cells.")
    parser.add_argument(
        "-config",
        dest="original",
        type=Path,
        metavar="PATH",
        help="configuration of Cloud Foundry's own controller; --config takes one, too; the environment has precedence",
    )
    arguments = parser.parse_args()
    ours, original = arguments.config, arguments.original
    if original is None and ours is not None and legacy_config.is_original(ours):
        ours, original = None, ours
    try:
        legacy = None if original is None else legacy_config.read(original)
        settings = load(ControllerSettings, ours, {**(legacy.environment if legacy else {}), **os.environ})
    except CannotUse as error:
        sys.exit(str(error))
    except SettingsError as error:
        refuse(PROGRAM, error)
    setup("silk-controller", settings.log_level)
    try:
        run(lambda: control(settings))
    except CannotOpen as error:
        sys.exit(legacy.fatal(f"connecting to database: {error}") if legacy else f"{PROGRAM}: {error}")
    except (CannotListen, Malformed) as error:
        sys.exit(legacy.fatal(str(error)) if legacy else f"{PROGRAM}: {error}")


if __name__ == "__main__":
    main()
