"""Checking tokens without asking UAA about each: by its signing keys, as UAA publishes them under /token_keys.

The keys are fetched again regularly, so that one taken out by UAA stops working, and when a token names a key that is
not known, so that a new one works at once; but not for every such token, since anybody can invent key ids. When UAA is
away the known keys go on for a while. What a token cannot bring about: its algorithm is its key's, not its header's,
and only signatures with private keys count.

Beside the signature a token must be an access token (UAA signs refresh tokens with the same keys), be for one of our
audiences, and not be expired. It is not seen when UAA revokes a token: who needs that asks UAA (services.policy.uaa).
RFC 7519 (JWT), RFC 7517 (JWK), RFC 8725 (what to mind).
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jwt

from bus.decode import Malformed
from bus.log import about
from services.policy.identity import Identity, Unavailable
from services.policy.remote import Remote
from services.policy.uaa import from_claims

log = logging.getLogger(__name__)

REFRESH_SECONDS = 60.0
GAP_SECONDS = 5.0
"""At least so long between two fetches, whatever tokens say."""
TRUST_SECONDS = 3600.0
"""So long keys are used that could not be fetched again."""
LEEWAY = 10
"""Seconds by which our clock and UAA's may differ."""
_ALGORITHMS = {"RSA": ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"), "EC": ("ES256", "ES384", "ES512")}


class TokenKeys:
    """UAA's keys, and the tokens signed with them. `run` keeps them fresh.

    A token must have one of `audiences` in `aud`, and `issuer` in `iss` if that is not empty.
    """

    def __init__(
        self,
        uaa: Remote,
        *,
        audiences: Sequence[str],
        issuer: str = "",
        refresh: float = REFRESH_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._uaa = uaa
        self._audiences = tuple(audiences)
        self._issuer = issuer or None
        self._refresh = refresh
        self._clock = clock
        self._lock = asyncio.Lock()
        self._keys: Mapping[str, jwt.PyJWK] = {}
        self._fetched = self._tried = float("-inf")
        self._problem: Unavailable | None = None

    async def run(self) -> None:
        """Fetch the keys now and then, for ever."""
        while True:
            try:
                async with self._lock:
                    await self._fetch()
            except Unavailable:
                pass  # logged by who raised it; tokens that need the keys get it, too
            await asyncio.sleep(self._refresh if self._problem is None else min(self._refresh, GAP_SECONDS))

    async def verify(self, token: str) -> Identity | None:
        """Whom the token stands for, or None for one that is not valid. Raises Unavailable if nobody can say."""
        try:
            return await self._verify(token)
        except (jwt.PyJWTError, Malformed, ValueError, RecursionError) as error:
            log.info("token refused", extra=about(why=str(error)[:500]))
            return None

    async def _verify(self, token: str) -> Identity:
        kid = jwt.get_unverified_header(token).get("kid")
        key = await self._key(kid) if isinstance(kid, str) else None
        if key is None:
            raise Malformed(f"no key of UAA's has the id {kid!r}")
        claims = jwt.decode(
            token,
            key,
            algorithms=[key.algorithm_name],
            audience=self._audiences,
            issuer=self._issuer,
            leeway=LEEWAY,
            options={"require": ["exp"]},
        )
        if str(claims.get("jti", "")).endswith("-r"):
            raise Malformed("it is a refresh token")
        return from_claims(claims)

    async def _key(self, kid: str) -> jwt.PyJWK | None:
        """The key of this id. Raises Unavailable when that cannot be said."""
        if (key := self._known(kid)) is not None:
            return key
        async with self._lock:
            if self._clock() - self._tried >= GAP_SECONDS:
                await self._fetch()
            elif self._problem is not None and self._known(kid) is None:
                raise self._problem
        return self._known(kid)

    def _known(self, kid: str) -> jwt.PyJWK | None:
        return self._keys.get(kid) if self._clock() - self._fetched < TRUST_SECONDS else None

    async def _fetch(self) -> None:
        """Take UAA's keys in place of ours, or leave those. Raises Unavailable."""
        self._tried = self._clock()
        try:
            answer = self._uaa.read(await self._uaa.ask("GET", "/token_keys"), "/token_keys")
            keys = _usable(answer.get("keys"))
            if not keys:
                raise self._uaa.unavailable("publishes no public RSA or EC key for signatures", "/token_keys")
        except Unavailable as error:
            self._problem = error
            raise
        finally:
            self._tried = self._clock()
        self._problem = None
        self._fetched = self._tried
        if keys.keys() != self._keys.keys():
            log.info("UAA's token keys", extra=about(keys=sorted(keys)))
        self._keys = keys


def _usable(keys: object) -> dict[str, jwt.PyJWK]:
    """Those of UAA's keys that may sign tokens, by their ids."""
    found = {}
    for key in keys if isinstance(keys, list) else []:
        try:
            kid, usable = _decode(key)
        except (jwt.PyJWTError, ValueError, TypeError) as error:
            log.warning("one of UAA's token keys is not usable", extra=about(error=str(error)))
        else:
            found[kid] = usable
    return found


def _decode(key: Any) -> tuple[str, jwt.PyJWK]:
    """Raises ValueError, or what PyJWT does, for a key that is malformed, symmetric, or not for signatures."""
    if not isinstance(key, dict) or not isinstance(key.get("kid"), str):
        raise ValueError("it has no key id")
    allowed = _ALGORITHMS.get(str(key.get("kty")))
    if allowed is None or key.get("use", "sig") != "sig":
        raise ValueError(f"{key['kid']}: of type {key.get('kty')!r}, no public key for signatures")
    if key.get("alg") not in (None, *allowed) or (usable := jwt.PyJWK.from_dict(key)).algorithm_name not in allowed:
        raise ValueError(f"{key['kid']}: its algorithm must be one of {', '.join(allowed)}")
    return key["kid"], usable
