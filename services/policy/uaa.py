"""UAA: asking it whether a token is valid, and our own token for the Cloud Controller (contract/policy.md 1.7).

https://docs.cloudfoundry.org/api/uaa has `POST /check_token` and `POST /oauth/token`. UAA being away, or not taking our
own credentials, says nothing about the caller's token: that is Unavailable, never "not valid".
"""

import asyncio
import hashlib
import time
from collections.abc import Mapping
from typing import Any

from bus.decode import Fields, Malformed
from services.policy.identity import Identity
from services.policy.recent import Recent
from services.policy.remote import Answer, Remote

REMEMBERED = 10_000
EARLY = 60.0
"""Seconds before its end at which our own token is given up, for clocks that do not agree and requests under way."""


class CheckToken:
    """Asks UAA about each token, as client `login`; the client needs the authority uaa.resource.

    A valid token is remembered for `remember` seconds, because a client often makes several requests in a row; a token
    that UAA revokes meanwhile is still taken for that long. Refusals are not: nobody gains from their being fast.
    """

    def __init__(self, uaa: Remote, login: tuple[str, str], *, remember: float) -> None:
        self._uaa = uaa
        self._login = login
        self._known: Recent[bytes, Identity] = Recent(remember, most=REMEMBERED)

    async def verify(self, token: str) -> Identity | None:
        """Whom the token stands for, or None for one that is not valid. Raises Unavailable."""
        digest = hashlib.sha256(token.encode()).digest()
        if (known := self._known.get(digest)) is not None:
            return known
        answer = await self._uaa.ask("POST", "/check_token", form={"token": token}, login=self._login)
        if _refuses_token(answer):
            return None
        _check_login(self._uaa, answer, "/check_token")
        claims = self._uaa.read(answer, "/check_token")
        try:
            identity = from_claims(claims)
            fields = Fields(claims, "claims")
            lasts = fields.number("exp") - time.time() if "exp" in fields else 0.0
        except Malformed as error:
            raise self._uaa.malformed(error, "/check_token") from None
        self._known.put(digest, identity, at_most=lasts)
        return identity


class OwnToken:
    """The token with which this server calls the Cloud Controller, got with client credentials.

    The client needs the authority cloud_controller.admin_read_only.
    """

    def __init__(self, uaa: Remote, login: tuple[str, str]) -> None:
        self._uaa = uaa
        self._login = login
        self._lock = asyncio.Lock()
        self._token = ""
        self._until = 0.0

    async def get(self) -> str:
        """A token that is good for a while. Raises Unavailable."""
        async with self._lock:
            if time.monotonic() >= self._until:
                await self._fetch()
            return self._token

    def refused(self, token: str) -> None:
        """The Cloud Controller does not take this token: get another next time."""
        if token == self._token:
            self._until = 0.0

    async def _fetch(self) -> None:
        asked = time.monotonic()
        form = {"client_id": self._login[0], "grant_type": "client_credentials"}
        answer = await self._uaa.ask("POST", "/oauth/token", form=form, login=self._login)
        _check_login(self._uaa, answer, "/oauth/token")
        fields = Fields(self._uaa.read(answer, "/oauth/token"), "answer")
        try:
            token = fields.text("access_token", max_length=1 << 16)
            if not (token.isascii() and token.isprintable()):
                raise fields.malformed("access_token", "cannot be sent in a header")
            lasts = fields.number("expires_in") if "expires_in" in fields else 0.0
        except Malformed as error:
            raise self._uaa.malformed(error, "/oauth/token") from None
        self._token = token
        self._until = asked + max(lasts - EARLY, lasts / 2)


def from_claims(claims: Mapping[str, Any]) -> Identity:
    """Whom these claims of a token are about. Raises Malformed.

    A user's token has `user_name`, and in `sub` the user's GUID; a client's only `sub`, its id.
    """
    user, subject, scopes = claims.get("user_name") or "", claims.get("sub") or "", claims.get("scope") or []
    if not isinstance(user, str) or not isinstance(subject, str) or not (user or subject):
        raise Malformed("claims: user_name and sub must be texts, and one of them not empty")
    if not isinstance(scopes, list) or not all(isinstance(scope, str) for scope in scopes):
        raise Malformed("claims: scope must be a list of texts")
    return Identity(subject=subject, user=user or subject, scopes=tuple(scopes))


def _refuses_token(answer: Answer) -> bool:
    """UAA says 400 for tokens that are not valid; 401 is about our own credentials, unless it says otherwise."""
    return answer.status == 400 or (answer.status in (401, 403) and b'"invalid_token"' in answer.body)


def _check_login(uaa: Remote, answer: Answer, where: str) -> None:
    if answer.status in (401, 403):
        raise uaa.unavailable(
            "does not accept this server as a client; uaa_client, uaa_client_secret and the client's authorities "
            "(uaa.resource, cloud_controller.admin_read_only) must be checked",
            where,
            answer.body,
        )
