"""Security groups as foreign agents ask for them (contract/policy.md 2.3): JSON kept ready, from a publisher's mirror.

The original pages by row number, which agents treat as opaque. Ours is a hash of the group's GUID: the same on all
servers and after a restore, and a group that comes or goes between two pages moves no other one.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bus.decode import Malformed
from bus.log import about
from bus.messages import SecurityGroup, decode_security_group_entry
from bus.security_groups import EgressProtocol, EgressRule
from bus.tables import Key
from bus.tables.publisher import Mirrored
from bus.wire import unpack
from services.policy.policy_view import Bodies, Body

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Group:
    number: int
    everywhere: bool
    spaces: frozenset[str]
    piece: bytes


class GroupView:
    """Answers about security groups. `update` it with all that a publisher tells."""

    def __init__(self) -> None:
        self._groups: dict[Key, _Group] = {}
        self._ordered: list[_Group] = []
        self._bodies = Bodies()

    def update(self, mirrored: Mirrored) -> None:
        """Take in what became of the mirror."""
        for key, data in mirrored.changes:
            self._groups.pop(key, None)
            if data is None:
                continue
            try:
                group = decode_security_group_entry(key, unpack(data, "security_groups"))
            except Malformed as error:
                log.error("entry left out", extra=about(key=list(key), error=str(error)))
                continue
            self._groups[key] = _Group(
                number(group.guid),
                group.running_default or group.staging_default,
                group.running_spaces | group.staging_spaces,
                _encode(group),
            )
        self._ordered = sorted(self._groups.values(), key=lambda group: group.number)
        self._bodies.clear()

    def page(self, spaces: str, start: int, limit: int) -> Body:
        """The groups that are everywhere or in one of these spaces (comma-separated), numbered from `start` on.

        At most `limit` if that is positive; the answer says where the next page starts, 0 for nowhere.
        """
        question = f"{start} {limit} {spaces}"
        if (body := self._bodies.get(question)) is not None:
            return body
        wanted = frozenset(spaces.split(","))
        pieces: list[bytes] = []
        following = 0
        for group in self._ordered:
            if group.number < start or not (group.everywhere or not wanted.isdisjoint(group.spaces)):
                continue
            if 0 < limit <= len(pieces):
                following = group.number
                break
            pieces.append(group.piece)
        return self._bodies.keep(question, b'{"next":%d,"security_groups":[%s]}' % (following, b",".join(pieces)))


def number(guid: str) -> int:
    """By what a group is paged: positive, and small enough for every language's integers."""
    return (int.from_bytes(hashlib.blake2b(guid.encode(), digest_size=8).digest(), "big") >> 2) + 1


def _encode(group: SecurityGroup) -> bytes:
    # Agents take `rules` out of its quotes as a Go string: raw UTF-8, and no escape that Go does not know.
    rules = [item for rule in group.rules for item in _rules(rule)]
    return _json(
        {
            "guid": group.guid,
            "name": group.name,
            "rules": _json(rules).decode(),
            "staging_default": group.staging_default,
            "running_default": group.running_default,
            "staging_space_guids": sorted(group.staging_spaces),
            "running_space_guids": sorted(group.running_spaces),
        }
    )


def _rules(rule: EgressRule) -> Iterator[dict[str, Any]]:
    """The rule as agents know it, with all keys: one for each destination, since not every agent knows lists."""
    icmp = rule.protocol is EgressProtocol.ICMP
    for destination in rule.destinations:
        yield {
            "protocol": str(rule.protocol),
            "destination": str(destination),
            "ports": ",".join(str(first) if first == last else f"{first}-{last}" for first, last in rule.ports),
            "type": (-1 if rule.icmp_type is None else rule.icmp_type) if icmp else 0,
            "code": (-1 if rule.icmp_code is None else rule.icmp_code) if icmp else 0,
            "description": rule.description,
            "log": rule.log,
        }


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
