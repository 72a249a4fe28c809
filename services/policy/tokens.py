"""Who may call: bearer tokens from a file, for installations without a UAA.

The file is JSON, `{"tokens": [{"token": "…", "user": "admin", "scopes": ["network.admin"]}]}`; `sha256` (the token's
digest in hexadecimal) may stand for `token`, so that the file need not hold the secret. It is looked at on every
request (one stat) and read again when it changed. While it cannot be read or understood nobody is let in, because a
token taken out of it must stop working; so replace it by renaming, not by writing into it.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from hmac import compare_digest
from pathlib import Path

from bus.decode import Fields, Malformed
from bus.log import about

log = logging.getLogger(__name__)

ADMIN = "network.admin"
WRITE = "network.write"


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a token stands for, and what it allows."""

    user: str
    scopes: tuple[str, ...]


class TokenFile:
    """The tokens in a file. Raises Malformed when the file cannot be used at start."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen = _state(path)
        self._identities = read(path)

    def verify(self, token: str) -> Identity | None:
        """Who the token stands for, or None. Takes the same time for every token not known."""
        self._reload()
        digest = hashlib.sha256(token.encode(errors="replace")).digest()
        found = None
        for known, identity in self._identities:
            if compare_digest(known, digest):
                found = identity
        return found

    def _reload(self) -> None:
        state = _state(self.path)
        if state == self._seen:
            return
        self._seen = state
        try:
            self._identities = read(self.path)
        except Malformed as error:
            self._identities = []
            log.error("token file unusable, refusing every token until it is mended", extra=about(error=str(error)))
        else:
            log.info("token file read again", extra=about(file=str(self.path), tokens=len(self._identities)))


def read(path: Path) -> list[tuple[bytes, Identity]]:
    """SHA-256 digest and identity of each token in the file. Raises Malformed."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise Malformed(f"token file {path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise Malformed(f"token file {path}: is not JSON: {error}") from None
    items = Fields(content, f"token file {path}").items("tokens")
    return [_decode(item, f"token file {path}: tokens[{index}]") for index, item in enumerate(items)]


def _decode(item: object, where: str) -> tuple[bytes, Identity]:
    fields = Fields(item, where)
    scopes = fields.items("scopes")
    if not all(isinstance(scope, str) for scope in scopes):
        raise fields.malformed("scopes", "must be a list of texts")
    identity = Identity(fields.text("user"), tuple(scopes))
    if "token" in fields:
        return hashlib.sha256(fields.text("token").encode()).digest(), identity
    if "sha256" not in fields:
        raise Malformed(f"{where}: needs a token, or its digest as sha256")
    try:
        digest = bytes.fromhex(fields.text("sha256"))
    except ValueError:
        digest = b""
    if len(digest) != hashlib.sha256().digest_size:
        raise fields.malformed("sha256", "must be 64 hexadecimal digits")
    return digest, identity


def _state(path: Path) -> tuple[int, int, int] | None:
    """What changes when the file does; None while it is not there."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
