"""What a caller may do with which policies (contract/policy.md 1.7).

Admins may do everything. Everybody else needs the role SpaceDeveloper in every space that a policy concerns, to make it
and to delete it, and sees the policies of which both ends lie in such spaces. An app that nobody knows lies in no
space: policies on invented ids are refused.
"""

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager
from typing import NewType, Protocol

from bus.messages import AppId, Policy
from services.policy.identity import ADMIN, WRITE, Identity, Unavailable

DECISION_SECONDS = 10.0
"""The longest a decision may take, however many questions it asks."""

Space = NewType("Space", str)
"""A space, by a name that no other has: the Cloud Controller's GUID, or org and name together."""


class Forbidden(Exception):
    """The caller may not do this. The text is the contract's."""


class Spaces(Protocol):
    """Which apps lie where, and who develops there. All raise Unavailable."""

    async def of_apps(self, apps: Collection[AppId]) -> Mapping[AppId, Space]:
        """The space of each of these apps; apps that do not exist are left out."""

    async def developed_by(self, subject: str, wanted: AbstractSet[Space] = frozenset()) -> AbstractSet[Space]:
        """The spaces in which this user or client is a developer.

        The answer may be some seconds old, but not to the caller's harm: a space `wanted` is missing only if it was
        just now looked for.
        """


class Access:
    """The rules. Without `spaces` only admins have access.

    With `self_service` any valid token will do in place of the scope network.write, and its spaces decide.
    """

    def __init__(self, spaces: Spaces | None, *, self_service: bool = False) -> None:
        self._spaces = spaces
        self._self_service = self_service

    def check_scopes(self, identity: Identity, allowed: tuple[str, ...]) -> None:
        """Raises Forbidden unless the token has one of the scopes."""
        if set(allowed) & set(identity.scopes) or (self._self_service and WRITE in allowed):
            return
        given, needed = " ".join(identity.scopes), " ".join(allowed)
        raise Forbidden(f"provided scopes [{given}] do not include allowed scopes [{needed}]")

    async def check_change(self, identity: Identity, policies: Collection[Policy]) -> None:
        """Raises Forbidden unless the caller may create and delete all of these policies; Unavailable."""
        if is_admin(identity):
            return
        apps = _apps(policies)
        async with _deciding():
            spaces = self._known()
            places = await spaces.of_apps(apps)
            if len(places) == len(apps):
                concerned = frozenset(places.values())
                if concerned <= await spaces.developed_by(identity.subject, concerned):
                    return
        raise _refused()

    async def visible(self, identity: Identity, policies: list[Policy]) -> list[Policy]:
        """Those of the policies that the caller may see. Raises Forbidden, Unavailable."""
        if is_admin(identity):
            return policies
        spaces = self._known()
        async with _deciding():
            own = await spaces.developed_by(identity.subject)
            if not own:
                return []
            places = await spaces.of_apps(_apps(policies))
        mine = {app for app, space in places.items() if space in own}
        return [policy for policy in policies if policy.source in mine and policy.destination in mine]

    def _known(self) -> Spaces:
        if self._spaces is None:
            raise _refused()
        return self._spaces


def is_admin(identity: Identity) -> bool:
    return ADMIN in identity.scopes


def _apps(policies: Collection[Policy]) -> list[AppId]:
    return list(dict.fromkeys(app for policy in policies for app in (policy.source, policy.destination)))


def _refused() -> Forbidden:
    return Forbidden("one or more applications cannot be found or accessed")


@asynccontextmanager
async def _deciding() -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(DECISION_SECONDS):
            yield
    except TimeoutError:
        raise Unavailable(f"finding the apps and their spaces took longer than {DECISION_SECONDS:g} s") from None
