"""The Silk controller: gives cells their subnets over the bus, keeps them in SQL, and publishes the `leases` table.

Several may run on one database: each answers a share of the requests, and all publish. The cell that asks is the one
the subject names, since NATS lets a cell publish under its own name only; what the body says of it is not believed.
"""

import asyncio
import logging
from typing import Any

from prometheus_client import Counter

from bus import subjects
from bus.connection import Connection, connect
from bus.database import open_database
from bus.decode import Fields, Malformed
from bus.events import Relay
from bus.failpoints import failpoint
from bus.ledger import Ledger
from bus.local import Health, application, serving_privately
from bus.log import about, setup
from bus.messages import CellName, Lease, cell_name
from bus.process import run
from bus.settings import from_command_line
from bus.tables import LEASES, Publisher
from services.silk.leases import MIGRATIONS, LeaseRefused, LeaseStore
from services.silk.settings import ControllerSettings

log = logging.getLogger(__name__)

QUEUE = "silk-controller"
REQUESTS = Counter("silkbus_silk_lease_requests_total", "Lease requests answered", ["verb", "outcome"])


class Controller:
    """Answers the three lease requests (docs/design.md, "Leases, on the bus")."""

    def __init__(self, store: LeaseStore, publisher: Publisher[Lease], relay: Relay, expiry: int) -> None:
        self._store = store
        self._publisher = publisher
        self._relay = relay
        self._expiry = expiry

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
        except LeaseRefused as error:
            log.warning("lease refused", extra=about(cell=cell, request=verb, error=str(error)))
            answer = {"error": str(error)}
        REQUESTS.labels(verb, "refused" if "error" in answer else "granted").inc()
        return answer

    async def _acquire(self, cell: CellName, fields: Fields) -> dict[str, Any]:
        outcome = await self._store.acquire(cell, fields.address("underlay"))
        failpoint("silk.lease.after-commit")
        self._publisher.committed(outcome)
        self._relay.wake()
        if outcome.result is None:  # only for a request id that is not new, and ours always are
            raise LeaseRefused(f"cell {cell}: the database gave no lease: ask again")
        log.info("lease acquired", extra=about(cell=cell, subnet=str(outcome.result.subnet), revision=outcome.revision))
        return {"lease": outcome.result.encode(), "expires_in": self._expiry}

    async def _renew(self, cell: CellName, fields: Fields) -> dict[str, Any]:
        lease = _own(cell, fields)
        if await self._store.renew(lease):
            return {"expires_in": self._expiry}
        log.warning("renewal refused", extra=about(cell=cell, subnet=str(lease.subnet)))
        return {"error": f"cell {cell} has no lease of {lease.subnet} at {lease.underlay} any more", "lost": True}

    async def _release(self, cell: CellName, fields: Fields) -> dict[str, Any]:
        lease = _own(cell, fields)
        outcome = await self._store.release(lease)
        failpoint("silk.lease.after-commit")
        self._publisher.committed(outcome)
        self._relay.wake()
        log.info("lease released", extra=about(cell=cell, subnet=str(lease.subnet), revision=outcome.revision))
        return {}


def _own(cell: CellName, fields: Fields) -> Lease:
    """The lease a request speaks of, which must be the asking cell's."""
    lease = Lease.decode(fields.mapping("lease"), f"{fields.where}: lease")
    if lease.cell != cell:
        raise Malformed(f"{fields.where}: lease: is of cell {lease.cell}, and cell {cell} asks")
    return lease


async def control(settings: ControllerSettings) -> None:
    """Run the controller for ever."""
    async with open_database(settings.database, settings.database_options) as database:
        ledger = Ledger(database, LEASES.name)
        await ledger.migrate(MIGRATIONS)
        store = LeaseStore(ledger, settings.overlay_network, settings.subnet_prefix_length, settings.lease_expiry)
        async with connect(
            settings.nats, role="silk-controller", name="central", credentials=settings.nats_credentials
        ) as connection:
            publisher = Publisher(connection, ledger, LEASES, store.entries)
            relay = Relay(connection, ledger, readers=settings.event_readers, replicas=settings.event_replicas)
            controller = Controller(store, publisher, relay, settings.lease_expiry)
            health = Health()
            health.check("bus", lambda: None if connection.connected else "no connection to NATS")
            health.check("database", lambda: None if publisher.revision is not None else "the leases are not read yet")
            async with serving_privately(application([], health), settings.socket), asyncio.TaskGroup() as tasks:
                tasks.create_task(publisher.run())
                tasks.create_task(relay.run())
                await controller.serve(connection)


def main() -> None:
    settings = from_command_line(
        ControllerSettings, "silkbus-silk-controller", "Leases subnets of the overlay network to cells."
    )
    setup("silk-controller", settings.log_level)
    run(lambda: control(settings))


if __name__ == "__main__":
    main()
