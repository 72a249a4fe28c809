"""The policy server: the external API over the policies in SQL, and the `policies` table on the bus.

SQL is the truth. A change is answered when it is committed; it is published at once, but never waited for, so the API
works with the bus away.
"""

import asyncio
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bus.connection import connect
from bus.decode import Malformed
from bus.events import Relay
from bus.ledger import Outcome
from bus.local import serving
from bus.log import about, setup
from bus.process import run
from bus.settings import from_command_line, setting
from bus.tables import POLICIES, Publisher
from services.policy.authority import AuthoritySettings, open_authority
from services.policy.gateway import Gateway, Options
from services.policy.migrate import CannotOpen, open_ledger
from services.policy.store import Store, entries
from services.policy.tag_pool import REST_MARGIN, TagPool

PROGRAM = "silkbus-policy-server"
_LISTEN = re.compile(r"fd:\d+|([^\[\]:]+|\[[0-9a-fA-F:]+\]):\d{1,5}")

log = logging.getLogger(__name__)


class CannotStart(Exception):
    """Something that the server needs at start is not there. The text says what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySettings(AuthoritySettings):
    """Settings of the policy server."""

    database: str = setting("SQL database, as a URL", "sqlite:///policy.db")
    listen: str = setting("where the API listens: HOST:PORT, or fd:N for a socket inherited", "127.0.0.1:4002")
    max_stale: int = setting("seconds a cell may act on its last known state; freed tags rest longer", 604_800)

    def __post_init__(self) -> None:
        # Named, since a dataclass with slots is made anew and has not the class that super() would look for.
        AuthoritySettings.__post_init__(self)
        if not _LISTEN.fullmatch(self.listen):
            raise Malformed(f"listen: {self.listen!r} is neither HOST:PORT nor fd:N")
        if self.max_stale < 0:
            raise Malformed(f"max_stale: must not be negative, as {self.max_stale} is")


def main() -> None:
    settings = from_command_line(PolicySettings, PROGRAM, "Policies and tags: HTTP API, SQL, and the table on the bus.")
    setup("policy-server", settings.log_level)
    try:
        run(lambda: serve(settings))
    except (CannotStart, CannotOpen, Malformed) as error:
        sys.exit(f"{PROGRAM}: {error}")


async def serve(settings: PolicySettings) -> None:
    """Serve until cancelled; then finish the requests begun. Raises CannotStart, CannotOpen or Malformed."""
    with listening(settings.listen) as listener:
        async with (
            open_authority(settings) as authority,
            open_ledger(settings.database, settings.database_options) as ledger,
            connect(
                settings.nats, role="policy-server", name=_instance(), credentials=settings.nats_credentials
            ) as connection,
            asyncio.TaskGroup() as tasks,
        ):
            publisher = Publisher(connection, ledger, POLICIES, entries)
            relay = Relay(connection, ledger, readers=settings.event_readers, replicas=settings.event_replicas)
            tasks.create_task(publisher.run())
            tasks.create_task(relay.run())
            if authority.run is not None:
                tasks.create_task(authority.run())

            def committed(outcome: Outcome[None]) -> None:
                publisher.committed(outcome)
                relay.wake()

            pool = TagPool(rest=settings.max_stale + REST_MARGIN, clock=time.time)
            gateway = Gateway(
                Store(ledger, pool, committed),
                authority.authenticator,
                authority.access,
                Options(max_policies=settings.max_policies),
                bus_connected=lambda: connection.connected,
            )
            async with serving(gateway.application(), listener):
                host, port = listener.getsockname()[:2]
                log.info(
                    "listening", extra=about(address=host, port=port, database=ledger.database.url.obscure_password)
                )
                await asyncio.Event().wait()


@contextmanager
def listening(where: str) -> Iterator[socket.socket]:
    """A bound, listening socket: `HOST:PORT`, or `fd:N`. Raises CannotStart."""
    try:
        if where.startswith("fd:"):
            listener = socket.socket(fileno=int(where.removeprefix("fd:")))
        else:
            host, _, port = where.rpartition(":")
            family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
            listener = socket.create_server((host.strip("[]"), int(port)), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise CannotStart(f"cannot listen on {where}: {error}") from error
    with listener:
        listener.setblocking(False)
        yield listener


def _instance() -> str:
    """A name for this process on the bus, as one subject token."""
    return f"{re.sub(r'[^A-Za-z0-9_-]', '-', socket.gethostname())[:40]}-{os.getpid()}"


if __name__ == "__main__":
    main()
