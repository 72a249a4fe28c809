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
    """Which apps lie where, and who develops there.

    Answers may be some seconds old, as far as that does not harm the caller: what would be refused was just now asked.
    Lists may lack what came in those seconds. All raise Unavailable.
    """

    async def of_apps(self, apps: Collection[AppId]) -> Mapping[AppId, Space]:
        """The space of each of these apps; apps that do not exist are left out."""

    async def developed(self, subject: str, spaces: AbstractSet[Space]) -> AbstractSet[Space]:
        """In which of these spaces this user or client is a developer."""

    async def apps_of(self, subject: str, apps: Collection[AppId]) -> AbstractSet[AppId]:
        """Which of these apps lie in spaces in which this user or client is a developer."""


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
        spaces, apps = self._known(), _apps(policies)
        async with _deciding():
            places = await spaces.of_apps(apps)
            concerned = frozenset(places.values())
            if len(places) < len(apps) or not concerned <= await spaces.developed(identity.subject, concerned):
                raise refused()

    async def visible(self, identity: Identity, policies: list[Policy]) -> list[Policy]:
        """Those of the policies that the caller may see. Raises Forbidden, Unavailable."""
        if is_admin(identity):
            return policies
        spaces = self._known()
        async with _deciding():
            mine = await spaces.apps_of(identity.subject, _apps(policies))
        return [policy for policy in policies if policy.source in mine and policy.destination in mine]

    def _known(self) -> Spaces:
        if self._spaces is None:
            raise refused()
        return self._spaces


def is_admin(identity: Identity) -> bool:
    return ADMIN in identity.scopes


def _apps(policies: Collection[Policy]) -> list[AppId]:
    return list(dict.fromkeys(app for policy in policies for app in (policy.source, policy.destination)))


def refused() -> Forbidden:
    """What those are told who may not see or change all of the apps concerned."""
    return Forbidden("one or more applications cannot be found or accessed")


@asynccontextmanager
async def _deciding() -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(DECISION_SECONDS):
            yield
    except TimeoutError:
        raise Unavailable(f"finding the apps and their spaces took longer than {DECISION_SECONDS:g} s") from None
