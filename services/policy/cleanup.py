"""Removes the policies of apps that the Cloud Controller does not list any more (contract/policy.md 1.10).

The original believes whatever it is told: a Cloud Controller that answers with an empty list, as one does on an empty
database or with too narrow a token, costs it every policy. Here a clean-up that would remove more than a share of all
policies is refused, and so is an answer that is not whole. An admin who knows better can force it.
"""

import logging
from collections.abc import Collection
from collections.abc import Set as AbstractSet
from typing import Protocol

from prometheus_client import Counter

from bus.log import about
from bus.messages import AppId, Policy
from services.policy.leadership import Fence
from services.policy.store import Filter, Store
from services.policy.tag_pool import APP

log = logging.getLogger(__name__)

ACTOR = "policy-cleaner"
MAY_GO = 10
"""As many policies may go whatever their share."""

CLEANUPS = Counter("silkbus_cleanups_total", "Clean-ups of the policies of deleted apps", ["outcome"])
CLEANED = Counter("silkbus_cleanup_policies_total", "Policies removed since their apps are gone")


class Refused(Exception):
    """So many policies would go that it is taken for a mistake. The text says how many, and what to do."""


class Apps(Protocol):
    async def existing(self, apps: Collection[AppId]) -> AbstractSet[AppId]:
        """Which of these apps exist. Raises Unavailable, also for an answer that is not whole."""


class Cleaner:
    """Cleans `store` up by what `apps` knows. More than `max_percent` of all policies are removed only by force."""

    def __init__(self, store: Store, apps: Apps, *, max_percent: int) -> None:
        self._store = store
        self._apps = apps
        self._max_percent = max_percent

    async def clean(
        self, *, actor: str = ACTOR, request_id: str | None = None, force: bool = False, fence: Fence | None = None
    ) -> list[Policy]:
        """Remove the policies with an end that is gone; which these are, in the order in which they were added.

        Raises Refused, Unavailable, what `fence` raises, or what the database raises.
        """
        try:
            gone = await self._clean(actor, request_id, force, fence)
        except Refused as error:
            CLEANUPS.labels("refused").inc()
            log.error("clean-up refused", extra=about(error=str(error), user=actor))
            raise
        except Exception:
            CLEANUPS.labels("failed").inc()
            raise
        CLEANUPS.labels("done").inc()
        CLEANED.inc(len(gone))
        return gone

    async def _clean(self, actor: str, request_id: str | None, force: bool, fence: Fence | None) -> list[Policy]:
        policies = await self._store.list(Filter())
        # A tag of another type is no app's: nobody deletes the router.
        others = {app for app, _, kind in await self._store.tags() if kind != APP}
        apps = {app for policy in policies for app in (policy.source, policy.destination)} - others
        kept = await self._apps.existing(sorted(apps)) | others
        gone = [policy for policy in policies if not {policy.source, policy.destination} <= kept]
        log.info("deleting stale policies", extra=about(total_c2c_policies=len(policies), stale_c2c_policies=len(gone)))
        if not force and len(gone) > max(MAY_GO, len(policies) * self._max_percent / 100):
            raise Refused(
                f"the Cloud Controller does not know the apps of {len(gone)} of {len(policies)} policies, more than "
                f"cleanup_max_percent = {self._max_percent} allows: see whether it has all its apps, and whether "
                f"uaa_client may read them; if they are really gone, force it with POST .../policies/cleanup?force=true"
            )
        if gone:
            await self._store.delete(gone, actor=actor, request_id=request_id, fence=fence)
        return gone
