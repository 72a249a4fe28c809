"""Keeps the security groups equal to the Cloud Controller's (contract/policy.md 3).

The Cloud Controller tells when its security groups were last changed (`cc_internal_url`), so that its list need not be
read as long as nobody changes them. That time has whole seconds: a second change within the same second does not show
in it. So a list is taken for final only when the time was first seen long enough before the list was begun that its
second was over; until then the list is read again. And it is compared as a text, not as a time: after a restore of the
Cloud Controller's database it may be lower. Without that address the list is read each time.

A list must not change while it is read, page by page: the time must be the same before and after, or, where there is
none, a list of several pages the same twice. The list is also read from time to time whatever the time says, since
changes by the Cloud Controller's API v2 do not move it. Whatever fails, what was there stays.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from prometheus_client import Counter, Gauge, Histogram
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from bus.decode import Fields, Malformed
from bus.log import about
from bus.security_groups import GroupId
from services.policy.asg_rules import Listed, parse_group
from services.policy.cc_api import Api, Incomplete
from services.policy.leadership import Fence
from services.policy.security_groups import Difference, SecurityGroups

log = logging.getLogger(__name__)

ACTOR = "asg-syncer"
LIST = "/v3/security_groups"
LAST_UPDATE = "/internal/v4/asg_latest_update"
PER_PAGE = 1000
ATTEMPTS = 3
SETTLING_SECONDS = 2.0
RELIST_SECONDS = 600.0
MAY_VANISH = 10
"""As many groups may vanish all at once, down to none; more are taken for a mistake."""
SHOWN = 20

SYNCS = Counter("silkbus_asg_syncs_total", "Looks at the Cloud Controller's security groups", ["outcome"])
SYNC_SECONDS = Histogram("silkbus_asg_sync_seconds", "Time to read and write the security groups, when they were read")
SYNCED_AT = Gauge("silkbus_asg_synced_timestamp_seconds", "When they were last known equal, by the leader's clock")
GROUPS = Gauge("silkbus_asg_groups", "Security groups of the Cloud Controller, as far as they can be understood")
BAD_RULES = Gauge("silkbus_asg_bad_rules", "Rules left out since they cannot be understood; the log names them")
BAD_GROUPS = Gauge("silkbus_asg_bad_groups", "Groups kept as they were since they cannot be understood, likewise")


class Refused(Exception):
    """What the Cloud Controller lists is not believed. The text says why, and what to do if it is true."""


class _Changing(Exception):
    """The list changed while it was read."""


@dataclass(frozen=True, slots=True)
class _Unreadable:
    guid: GroupId
    problem: str


@dataclass(frozen=True, slots=True)
class _Read:
    """All that was listed: groups by GUID, those that cannot be understood, and when the reading was begun."""

    groups: Mapping[GroupId, Listed]
    unreadable: tuple[_Unreadable, ...]
    last_update: str | None
    begun: float


class Syncer:
    """Copies from `controller` to `groups`.

    `internal` is the Cloud Controller's internal API, which knows the time of the last change. `clock` counts seconds.
    """

    def __init__(
        self,
        controller: Api,
        internal: Api | None,
        groups: SecurityGroups,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._controller = controller
        self._internal = internal
        self._groups = groups
        self._clock = clock
        self._seen: tuple[str | None, float] = None, 0.0
        """The time of the last change that was seen last, and since when."""
        self._final: tuple[str | None, float] = None, 0.0
        """The time of the last change for which what was written is final, and when the list for it was read."""
        self._said: tuple[str, ...] = ()

    async def sync(self, fence: Fence | None = None) -> bool:
        """Make the groups what the Cloud Controller has; whether that is final, or soon to be looked at again.

        Raises Unavailable, Refused, what `fence` raises, or what the database raises.
        """
        try:
            last_update = await self._last_update()
            final, at = self._final
            if last_update is not None and last_update == final and self._clock() - at < RELIST_SECONDS:
                SYNCS.labels("skipped").inc()
                SYNCED_AT.set_to_current_time()
                return True
            with SYNC_SECONDS.time():
                read = await self._read_unchanging()
                difference = await self._write(read, fence)
        except Exception:
            SYNCS.labels("failed").inc()
            raise
        SYNCS.labels("changed" if difference else "same").inc()
        SYNCED_AT.set_to_current_time()
        self._say(read)
        if read.last_update is None:
            return True
        _, since = self._seen
        if read.begun - since < SETTLING_SECONDS:
            return False
        self._final = read.last_update, read.begun
        return True

    def reread(self) -> None:
        """Read the list next time in any case: the database holds something else than what was written."""
        self._final = None, 0.0

    async def _last_update(self) -> str | None:
        """The time of the last change, as the Cloud Controller writes it; None if it does not tell."""
        if self._internal is None:
            return None
        answer = await self._internal.get_if_there(LAST_UPDATE)
        if answer is None:
            return None
        remote = self._internal.remote
        try:
            text = Fields(remote.read(answer, LAST_UPDATE), LAST_UPDATE).text("last_update", max_length=100)
        except Malformed as error:
            raise remote.malformed(error, LAST_UPDATE) from None
        if text != self._seen[0]:
            self._seen = text, self._clock()
        return text

    async def _read_unchanging(self) -> _Read:
        """The list, read again if it changes meanwhile. Raises Unavailable."""

        def say(_: RetryCallState) -> None:
            log.info("the list of security groups changed while it was read, reading it again")

        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type((_Changing, Incomplete)),
                stop=stop_after_attempt(ATTEMPTS),
                wait=wait_random_exponential(0.2, max=2),
                before_sleep=say,
                reraise=True,
            ):
                with attempt:
                    return await self._read()
        except _Changing:
            text = f"changed its security groups each of {ATTEMPTS} times while they were read"
            raise self._controller.remote.unavailable(text, LIST) from None
        raise AssertionError("retrying ends by returning or raising")

    async def _read(self) -> _Read:
        """The list, once. Raises _Changing, Unavailable."""
        before = await self._last_update()
        begun = self._clock()
        items = await self._list()
        if before is None:
            changing = len(items) > PER_PAGE and items != await self._list()
        else:
            changing = await self._last_update() != before
        groups = {item.group.guid: item for item in items if isinstance(item, Listed)}
        unreadable = tuple(item for item in items if isinstance(item, _Unreadable))
        if changing or len(groups) + len({item.guid for item in unreadable}) != len(items):
            raise _Changing
        return _Read(groups, unreadable, before, begun)

    async def _list(self) -> list[Listed | _Unreadable]:
        return await self._controller.resources(LIST, {"per_page": str(PER_PAGE)}, _item, whole=True)

    async def _write(self, read: _Read, fence: Fence | None) -> Difference:
        if not read.groups and not read.unreadable and (held := len(await self._groups.all())) > MAY_VANISH:
            raise Refused(
                f"the Cloud Controller lists no security groups at all, and {held} are known: they are kept; if there "
                f"are to be none, keep a single one in the Cloud Controller, without rules"
            )
        return await self._groups.replace(
            {guid: item.group for guid, item in read.groups.items()},
            actor=ACTOR,
            keep={item.guid for item in read.unreadable},
            fence=fence,
        )

    def _say(self, read: _Read) -> None:
        """Name what could not be understood, when that is news."""
        bad_rules = [problem for item in read.groups.values() for problem in item.bad_rules]
        GROUPS.set(len(read.groups))
        BAD_RULES.set(len(bad_rules))
        BAD_GROUPS.set(len(read.unreadable))
        problems = (*bad_rules, *(item.problem for item in read.unreadable))
        for problem in [problem for problem in problems if problem not in self._said][:SHOWN]:
            log.error("a security group is not wholly understood", extra=about(problem=problem, problems=len(problems)))
        self._said = problems


def _item(item: Fields) -> Listed | _Unreadable:
    """A resource. Raises Malformed for one that has not even a GUID."""
    guid = GroupId(item.text("guid", max_length=255))
    try:
        return parse_group(item)
    except Malformed as error:
        return _Unreadable(guid, f"security group {guid}: {error}")
