"""Whether the table of security groups counts on this cell: it is known, and not too old.

Policies must not wait for it. A centre that has no such table, or one that nobody ever wrote to because no Cloud
Controller is asked for groups, would otherwise leave containers without egress: then what each container was given
when it was made is in force, until the table comes.
"""

import asyncio
from contextlib import suppress
from typing import Any

from bus.tables import Replica
from bus.tables.follower import State
from services.enforcer.reconciler import Reconciler

MOMENT = 2.0
"""Seconds that the first rules wait for the table, longer than policies and leases take: as a rule it comes with them,
and egress need not change twice."""
INTERVAL = 1.0


def counts(groups: Replica[Any]) -> bool:
    """Whether what the replica holds is to be enforced."""
    return groups.state in (State.LIVE, State.CACHED) and groups.revision > 0


async def first(groups: Replica[Any], reconciler: Reconciler) -> None:
    """Wait a moment for the table, before the first rules are made."""
    with suppress(TimeoutError):
        async with asyncio.timeout(MOMENT):
            await groups.usable()
    reconciler.use_security_groups(counts(groups))


async def follow(groups: Replica[Any], reconciler: Reconciler) -> None:
    """Go on saying whether the table counts, for ever: it may come later, or grow too old."""
    while True:
        await asyncio.sleep(INTERVAL)
        reconciler.use_security_groups(counts(groups))
