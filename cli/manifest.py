"""Policies as a file: YAML that names apps, not GUIDs, so that it outlives the apps it names.

    org: acme                        # optional: for apps and spaces that are written without
    space: dev
    spaces: [acme/staging]           # optional: spaces the file speaks for, beside those of its sources
    policies:
    - source: front                  # one app, or a list
      destination: prod/db           # NAME, SPACE/NAME or ORG/SPACE/NAME
      tcp: [5432, 9000-9010]         # one port or range, or a list
      udp: 53
    - source: {org: a/b, space: dev, app: front}   # for names with a slash
      destination: {guid: 6f3c…}                   # for an app without a name: one that is gone, a router
      tcp: 8080

Scalars are taken as they are written, whatever YAML would make of them, so that an app may be called `no` or `1e3`.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

PROTOCOLS = ("tcp", "udp")
_NOT_IN_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
"""What JSON has unescaped, and YAML not at all, or for a line break (YAML 1.1, 5.1)."""


@dataclass(frozen=True, slots=True, order=True)
class Reference:
    """An app as the file has it: by `guid`, or by `name`; `org` and `space` are empty where nothing says them."""

    name: str = ""
    space: str = ""
    org: str = ""
    guid: str = ""

    def __str__(self) -> str:
        return self.guid or "/".join(part for part in (self.org, self.space, self.name) if part)


@dataclass(frozen=True, slots=True, order=True)
class Ports:
    """One protocol and an inclusive range of ports."""

    protocol: str
    start: int
    end: int

    def __str__(self) -> str:
        return str(self.start) if self.start == self.end else f"{self.start}-{self.end}"


@dataclass(frozen=True, slots=True)
class Rule:
    """What one entry of `policies` allows: each of the sources to the destination, on each of the ports."""

    sources: tuple[Reference, ...]
    destination: Reference
    ports: tuple[Ports, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """`lines` says where each app was named first; `spaces` are those named by themselves, as (org, space)."""

    file: str
    rules: tuple[Rule, ...]
    spaces: tuple[tuple[str, str], ...]
    lines: Mapping[Reference, int]


def flat(rules: Iterable[Rule]) -> Iterator[tuple[Reference, Reference, Ports]]:
    """Every policy of these rules by itself."""
    for rule in rules:
        for source in rule.sources:
            for ports in rule.ports:
                yield source, rule.destination, ports


def document(policies: Iterable[tuple[Reference, Reference, Ports]]) -> dict[str, Any]:
    """The file's content that has just these policies: sources with the same ports are put together."""
    of_pair: dict[tuple[Reference, Reference], set[Ports]] = defaultdict(set)
    for source, destination, ports in policies:
        of_pair[destination, source].add(ports)
    together: dict[tuple[Reference, tuple[Ports, ...]], list[Reference]] = defaultdict(list)
    for (destination, source), of_both in sorted(of_pair.items()):
        together[destination, tuple(sorted(of_both))].append(source)
    entries = []
    for (destination, allowed), sources in together.items():
        entry = {
            "source": _one_or_list([_written(app) for app in sources]),
            "destination": _written(destination),
        }
        for protocol in PROTOCOLS:
            ranges = [
                item.start if item.start == item.end else str(item) for item in allowed if item.protocol == protocol
            ]
            if ranges:
                entry[protocol] = _one_or_list(ranges)
        entries.append(entry)
    return {"policies": entries}


def as_yaml(content: object) -> str:
    """Any JSON value as YAML, lists of scalars on one line."""
    text: str = yaml.dump(
        content, Dumper=Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100
    )
    return text


def as_json(content: object) -> str:
    """Any JSON value as JSON that is YAML, too."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    return _NOT_IN_YAML.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def _one_or_list(items: list[Any]) -> Any:
    return items[0] if len(items) == 1 else items


def _written(app: Reference) -> Any:
    if app.guid:
        return {"guid": app.guid}
    parts = [app.org, app.space, app.name]
    if all(part and "/" not in part for part in parts):
        return "/".join(parts)
    return {key: part for key, part in zip(("org", "space", "app"), parts, strict=True) if part}
