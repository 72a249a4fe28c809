"""Who may call: bearer tokens from a file, for installations without a UAA.

The file is JSON, `{"tokens": [{"token": "…", "user": "admin", "scopes": ["network.admin"]}]}`; `sha256` (the token's
digest in hexadecimal) may stand for `token`, so that the file need not hold the secret.
"""

import hashlib
from collections.abc import Sequence
from hmac import compare_digest
from pathlib import Path

from bus.decode import Fields, Malformed
from services.policy.identity import Identity
from services.policy.watched import WatchedFile

Known = Sequence[tuple[bytes, Identity]]
"""SHA-256 digest and identity of each token."""


class TokenFile:
    """The tokens in a file. Raises Malformed when the file cannot be used at start."""

    def __init__(self, path: Path) -> None:
        self._file: WatchedFile[Known] = WatchedFile("token file", path, _decode)

    async def verify(self, token: str) -> Identity | None:
        """Who the token stands for, or None. Takes the same time for every token not known."""
        digest = hashlib.sha256(token.encode(errors="replace")).digest()
        found = None
        for known, identity in self._file.content() or ():
            if compare_digest(known, digest):
                found = identity
        return found


def _decode(fields: Fields) -> Known:
    return [_token(Fields(item, f"{fields.where}: tokens[{i}]")) for i, item in enumerate(fields.items("tokens"))]


def _token(fields: Fields) -> tuple[bytes, Identity]:
    scopes = fields.items("scopes")
    if not all(isinstance(scope, str) for scope in scopes):
        raise fields.malformed("scopes", "must be a list of texts")
    user = fields.text("user")
    identity = Identity(subject=user, user=user, scopes=tuple(scopes))
    if "token" in fields:
        return hashlib.sha256(fields.text("token").encode()).digest(), identity
    if "sha256" not in fields:
        raise Malformed(f"{fields.where}: needs a token, or its digest as sha256")
    try:
        digest = bytes.fromhex(fields.text("sha256"))
    except ValueError:
        digest = b""
    if len(digest) != hashlib.sha256().digest_size:
        raise fields.malformed("sha256", "must be 64 hexadecimal digits")
    return digest, identity
