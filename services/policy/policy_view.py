"""The policies as foreign agents ask for them (contract/policy.md 2.3): JSON kept ready, from a publisher's mirror.

Every cell asks every few seconds, mostly for what it asked before. So each pair of apps is encoded once, when it
changes; an answer is joined from these pieces, by an index from app to pairs, and kept until anything changes. No
request reads the database or encodes anything.
"""

import asyncio
import gzip
import hashlib
import logging
import time
from collections import OrderedDict
from dataclasses import dataclass
from json.encoder import encode_basestring as quote

from bus.decode import Malformed
from bus.log import about
from bus.messages import PolicyKey, decode_policy_entry
from bus.tables.publisher import Mirrored
from bus.wire import unpack

log = logging.getLogger(__name__)

MAX_CACHED = 64 << 20
"""Bytes of answers that are kept, beside the whole list."""
SETTLE_SECONDS = 10.0
"""After so long every server that still answers has a change: they answer with nothing older (internal_api.MAX_AGE)."""


@dataclass(slots=True, eq=False)
class Body:
    """An answer's bytes, its ETag, and, once somebody asked for it, the same compressed."""

    plain: bytes
    etag: bytes
    _compressing: "asyncio.Task[bytes] | None" = None

    async def gzipped(self) -> bytes:
        """Compressed once, beside the event loop, whoever asks meanwhile."""
        if self._compressing is None:
            self._compressing = asyncio.create_task(asyncio.to_thread(gzip.compress, self.plain, 1, mtime=0))
        return await asyncio.shield(self._compressing)


class Bodies:
    """The answers made since the last change, the latest used kept longest, up to MAX_CACHED bytes."""

    def __init__(self) -> None:
        self._bodies: OrderedDict[str, Body] = OrderedDict()
        self._size = 0

    def clear(self) -> None:
        self._bodies.clear()
        self._size = 0

    def get(self, question: str) -> Body | None:
        body = self._bodies.get(question)
        if body is not None:
            self._bodies.move_to_end(question)
        return body

    def keep(self, question: str, plain: bytes) -> Body:
        """Keep what answers a question; its ETag is of the content, so that it outlives changes elsewhere."""
        body = Body(plain, b'W/"%s"' % hashlib.blake2b(plain, digest_size=16).hexdigest().encode())
        self._bodies[question] = body
        self._size += len(question) + len(plain)
        while self._size > MAX_CACHED:
            old, gone = self._bodies.popitem(last=False)
            self._size -= len(old) + len(gone.plain)
        return body


class PolicyView:
    """Answers about policies. `update` it with all that a publisher tells. `tag_length` is in bytes."""

    def __init__(self, tag_length: int) -> None:
        self._digits = 2 * tag_length
        self._ports: dict[PolicyKey, tuple[str, ...]] = {}
        self._tags: dict[str, int] = {}
        self._pairs_of: dict[str, set[PolicyKey]] = {}
        self._pieces: dict[PolicyKey, bytes] = {}
        self._policies = 0
        self._bodies = Bodies()
        self._whole: Body | None = None
        self._etag = b'W/""'
        self._last_updated = 0
        self._updated_at = time.monotonic()

    def update(self, mirrored: Mirrored) -> None:
        """Take in what became of the mirror."""
        stale: dict[PolicyKey, None] = {}
        for key, data in mirrored.changes:
            try:
                self._take(key, data, stale)
            except Malformed as error:
                log.error("entry left out", extra=about(key=list(key), error=str(error)))
                self._take(key, None, stale)
        for pair in stale:
            self._encode(pair)
        self._bodies.clear()
        self._whole = None
        self._etag = b'W/"%s-%d"' % (mirrored.digest.hex().encode(), self._digits)
        computed = mirrored.changed_at_ms * 1_000_000 + 2 * mirrored.revision
        if mirrored.reloaded and self._last_updated:
            # The database holds another history: agents must read it, whatever its own times are.
            computed = max(computed, time.time_ns())
        self._last_updated = max(computed, self._last_updated + 2)
        self._updated_at = time.monotonic()

    @property
    def last_updated(self) -> int:
        """A number that grows with each change: about the time of the last one, in ns since 1970.

        It is the latest time in the change log and twice the revision: the same on all servers, whatever their clocks
        say, and after restarts. Once a change is old enough to be known to all servers it grows by 1, so that an agent
        that heard of the change from one server, and asked one that did not know it yet, asks again. Since agents look
        only whether it is greater, it is kept from falling when a database is restored while servers run; ahead of
        servers started later, restoring notes itself in the change log (docs/backup.md).
        """
        return self._last_updated + (time.monotonic() - self._updated_at >= SETTLE_SECONDS)

    @property
    def etag(self) -> bytes:
        """That of the whole list, known before it is made."""
        return self._etag

    def tag(self, app: str) -> int | None:
        return self._tags.get(app)

    def all(self) -> Body:
        """Every policy."""
        if self._whole is None:
            self._whole = Body(_document(self._policies, list(self._pieces.values())), self._etag)
        return self._whole

    def of(self, ids: str) -> Body:
        """The policies of which either end is one of these apps, comma-separated."""
        body = self._bodies.get(ids)
        if body is None:
            pairs = set[PolicyKey]().union(*(self._pairs_of.get(app, ()) for app in ids.split(",")))
            total = sum(len(self._ports[pair]) for pair in pairs)
            # In one order, so that all servers give one answer the same ETag.
            body = self._bodies.keep(ids, _document(total, [self._pieces[pair] for pair in sorted(pairs)]))
        return body

    def _take(self, key: PolicyKey, data: bytes | None, stale: dict[PolicyKey, None]) -> None:
        value = None if data is None else decode_policy_entry(key, unpack(data, "policies"))
        if key[0] == "tag":
            if isinstance(value, int):
                self._tags[key[1]] = value
            else:
                self._tags.pop(key[1], None)
            stale.update(dict.fromkeys(self._pairs_of.get(key[1], ())))
            return
        self._policies -= len(self._ports.pop(key, ()))
        if isinstance(value, tuple):
            self._ports[key] = tuple(
                f'"protocol":"{ports.protocol}","ports":{{"start":{ports.start},"end":{ports.end}}}}}}}'
                for ports in value
            )
            self._policies += len(value)
        for app in key[1:]:
            pairs = self._pairs_of.setdefault(app, set())
            if key in self._ports:
                pairs.add(key)
            else:
                pairs.discard(key)
                if not pairs:
                    del self._pairs_of[app]
        stale[key] = None

    def _encode(self, pair: PolicyKey) -> None:
        ports = self._ports.get(pair)
        if ports is None:
            self._pieces.pop(pair, None)
            return
        _, destination, source = pair
        head = f'{{"source":{{{self._end(source)}}},"destination":{{{self._end(destination)},'
        self._pieces[pair] = ",".join(head + item for item in ports).encode()

    def _end(self, app: str) -> str:
        tag = self._tags.get(app)
        return f'"id":{quote(app)}' + ("" if tag is None else f',"tag":"{tag:0{self._digits}X}"')


def _document(total: int, pieces: list[bytes]) -> bytes:
    return b'{"total_policies":%d,"policies":[%s]}' % (total, b",".join(pieces))
