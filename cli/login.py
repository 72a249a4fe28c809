"""Who asks: tokens, and how a new one is got when one has expired.

What is signed is not checked here: that is the API's business. A token is read only for what it tells its owner.
"""

import base64
import json
import time
from dataclasses import dataclass
from typing import Any, Protocol

LEEWAY = 30.0
"""Seconds before its end at which a token counts as expired: it must last until the request has arrived."""


class Login(Protocol):
    def token(self) -> str:
        """The value of the header Authorization, with the word bearer; a new one if it has expired. Raises Failed."""

    def renew(self) -> bool:
        """The token was refused: whether there is another now. Raises Failed when there should be and is not."""

    def user(self) -> str | None:
        """Whose login it is, as far as that is known. Raises Failed."""


@dataclass(frozen=True, slots=True)
class FixedToken:
    """A token given by flag, environment or file: there is no other."""

    given: str

    def token(self) -> str:
        # A token copied from `cf oauth-token` brings the word along.
        return self.given if self.given.lower().startswith("bearer ") else f"bearer {self.given}"

    def renew(self) -> bool:
        return False

    def user(self) -> str | None:
        return owner(self.given)


def claims(token: str) -> dict[str, Any]:
    """What a JSON Web Token (RFC 7519) says, unchecked; nothing if it is not one."""
    parts = token.split(" ")[-1].split(".")
    if len(parts) != 3:
        return {}
    try:
        found = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def expired(token: str) -> bool:
    """Whether a token says that it has expired, or is about to."""
    end = claims(token).get("exp")
    return isinstance(end, int | float) and end < time.time() + LEEWAY


def owner(token: str) -> str | None:
    """Whose token it is, as cf says it: the user's name, or else the client's; None if it does not tell."""
    found = claims(token)
    name = found.get("user_name") or found.get("client_id")
    return name if isinstance(name, str) else None
