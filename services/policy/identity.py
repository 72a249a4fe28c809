"""Who calls: the identity a token stands for, its scopes, and what everything that tells tokens apart has in common."""

from dataclasses import dataclass
from typing import Protocol

ADMIN = "network.admin"
WRITE = "network.write"


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom a token stands for, and what it allows.

    `subject` is unique and never given to another: UAA's GUID of a user, or the id of a client; roles hang on it.
    `user` is what people call them, for logs and history; two users of different origins may share it.
    """

    subject: str
    user: str
    scopes: tuple[str, ...]


class Unavailable(Exception):
    """Another component had to be asked and gave no usable answer: nothing is known, so nothing is granted.

    The text is for the client: it names the component and what is wrong, and no addresses; those are in the log.
    """


class Authenticator(Protocol):
    async def verify(self, token: str) -> Identity | None:
        """Whom the token stands for, or None for one that is not valid. Raises Unavailable."""
