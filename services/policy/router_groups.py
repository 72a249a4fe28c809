"""Tags of groups that are no apps, as the ingress router's: given at start, since no policy names them.

The original's router machines ask the internal API for theirs (contract/cell.md 5.7), and still may; ours hold a lease
and follow the table of policies, in which the tag comes by itself.
"""

import logging
from collections.abc import Sequence

from tenacity import AsyncRetrying, RetryCallState, retry_if_not_exception_type, wait_random_exponential

from bus.log import about
from bus.messages import AppId
from services.policy.store import OtherType, Store

log = logging.getLogger(__name__)

KIND = "router"
"""The type that the original gives them."""


async def give_tags(store: Store, groups: Sequence[str]) -> None:
    """See that each group has a tag, and try until it has."""
    for group in groups:

        def say(state: RetryCallState, group: str = group) -> None:
            error = state.outcome.exception() if state.outcome else None
            log.warning("no tag given, trying again", extra=about(app=group, error=str(error)))

        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_not_exception_type(OtherType),
                wait=wait_random_exponential(1, max=60),
                before_sleep=say,
            ):
                with attempt:
                    await store.tag(AppId(group), KIND, actor="settings")
        except OtherType as error:
            log.error("router_groups: no tag given", extra=about(app=group, error=str(error)))
