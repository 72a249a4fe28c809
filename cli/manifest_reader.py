"""Reads a file of policies (cli/manifest.py) strictly: all that is wrong, each with its line.

It reads YAML's nodes rather than the values YAML makes of them: nodes know their lines, and their text as written.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import yaml

from cli.errors import Failed
from cli.manifest import PROTOCOLS, Manifest, Ports, Reference, Rule

T = TypeVar("T")
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

MAX_BYTES = 16 << 20
_PORTS = re.compile(r"([1-9][0-9]{0,4})(?:-([1-9][0-9]{0,4}))?")
_STANDARD_TAG = "tag:yaml.org,2002:"


def parse(text: str, file: str) -> Manifest:
    """The policies of a file of this name. Raises Failed with all that is wrong."""
    if len(text) > MAX_BYTES:
        raise Failed(f"{file}: is longer than {MAX_BYTES >> 20} MiB; split it")
    try:
        root = yaml.compose(text, Loader=Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f"{mark.line + 1}: "
        problem = " ".join(part for part in (error.context, error.problem) if part)
        raise Failed(f"{file}:{line}is not YAML: {problem}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise Failed(f"{file}: is not YAML: {str(error) or 'it is nested too deeply'}") from None
    if root is None:
        raise Failed(f"{file}: is empty; it must have at least `policies: []`")
    reader = _Reader(file)
    manifest = reader.manifest(root)
    if reader.errors:
        raise Failed("\n".join(text for _, text in sorted(reader.errors)))
    return manifest


class _Reader:
    """Reads YAML nodes, which know their lines; collects what is wrong, and goes on."""

    def __init__(self, file: str) -> None:
        self._file = file
        self.errors: list[tuple[int, str]] = []
        self._org = ""
        self._space = ""
        self._lines: dict[Reference, int] = {}

    def manifest(self, root: Any) -> Manifest:
        fields = self._mapping(root, "the file", ("org", "space", "spaces", "policies"), needed=("policies",))
        if "org" in fields:
            self._org = self._text(fields["org"], "org") or ""
        if "space" in fields:
            self._space = self._text(fields["space"], "space") or ""
        spaces = [self._a_space(node) for node in self._list(fields.get("spaces"))]
        if self._space:
            spaces.append((self._org, self._space))
        listed = fields.get("policies")
        if listed is not None and not isinstance(listed, yaml.SequenceNode):
            self._wrong(listed, "policies: must be a list, each entry with `source`, `destination` and `tcp` or `udp`")
        entries = self._list(listed) if isinstance(listed, yaml.SequenceNode) else []
        rules = [rule for node in entries if (rule := self._rule(node)) is not None]
        named = dict.fromkeys(space for space in spaces if space is not None)
        return Manifest(self._file, tuple(rules), tuple(named), self._lines)

    def _rule(self, node: Any) -> Rule | None:
        keys = ("source", "destination", *PROTOCOLS)
        fields = self._mapping(node, "a policy", keys, needed=("source", "destination"))
        if not fields:
            return None
        if not fields.keys() & set(PROTOCOLS):
            self._wrong(node, "a policy must have ports: `tcp`, `udp` or both")
        sources = [self._app(item, "source") for item in self._list(fields.get("source"))]
        if "source" in fields and not sources:
            self._wrong(fields["source"], "source: must name one app at least")
        destination = None
        if "destination" in fields:
            destination = self._app(fields["destination"], "destination")
        ports = []
        for protocol in PROTOCOLS:
            if protocol in fields:
                items = self._list(fields[protocol])
                if not items:
                    self._wrong(fields[protocol], f"{protocol}: must have one port at least")
                ports += [self._ports(item, protocol) for item in items]
        if destination is None:
            return None
        return Rule(_given(sources), destination, _given(ports))

    def _app(self, node: Any, where: str) -> Reference | None:
        found = self._named_app(node, where) if isinstance(node, yaml.MappingNode) else self._short_app(node, where)
        if found is not None:
            self._lines.setdefault(found, node.start_mark.line + 1)
        return found

    def _named_app(self, node: Any, where: str) -> Reference | None:
        fields = self._mapping(node, where, ("app", "space", "org", "guid"))
        texts = {name: self._text(value, f"{where}: {name}") for name, value in fields.items()}
        if not texts or None in texts.values():
            return None
        given = {name: text for name, text in texts.items() if text is not None}
        if "guid" in given:
            if len(given) > 1:
                self._wrong(node, f"{where}: give either `guid` or `app`, not both")
            return Reference(guid=given["guid"])
        if "app" not in given:
            self._wrong(node, f"{where}: `app` is missing: the app's name, or `guid`")
            return None
        if "org" in given and "space" not in given and not self._space:
            self._wrong(node, f"{where}: an org needs a space, too")
        return Reference(given["app"], given.get("space", self._space), given.get("org", self._org))

    def _short_app(self, node: Any, where: str) -> Reference | None:
        text = self._text(node, where)
        if text is None:
            return None
        parts = text.split("/")
        if len(parts) > 3 or not all(parts):
            self._wrong(
                node,
                f"{where}: {text!r} is none of NAME, SPACE/NAME and ORG/SPACE/NAME; "
                "write names that have a slash as {org: …, space: …, app: …}",
            )
            return None
        name, space, org = [*reversed(parts), "", ""][:3]
        return Reference(name, space or self._space, org or self._org)

    def _a_space(self, node: Any) -> tuple[str, str] | None:
        if isinstance(node, yaml.MappingNode):
            fields = self._mapping(node, "spaces", ("org", "space"), needed=("space",))
            texts = {name: self._text(value, f"spaces: {name}") for name, value in fields.items()}
            space = texts.get("space")
            return None if space is None else (texts.get("org", self._org) or "", space)
        text = self._text(node, "spaces")
        if text is None:
            return None
        parts = text.split("/")
        if len(parts) > 2 or not all(parts):
            self._wrong(node, f"spaces: {text!r} is neither SPACE nor ORG/SPACE; or write {{org: …, space: …}}")
            return None
        return (parts[0] if len(parts) == 2 else self._org, parts[-1])

    def _ports(self, node: Any, protocol: str) -> Ports | None:
        text = self._text(node, protocol)
        if text is None:
            return None
        found = _PORTS.fullmatch(text)
        if found is not None:
            start, end = int(found[1]), int(found[2] or found[1])
            if start <= end <= 65535:
                return Ports(protocol, start, end)
        self._wrong(node, f"{protocol}: {text!r} is no port or range in 1-65535, such as 8080 or 8080-8090")
        return None

    def _mapping(self, node: Any, where: str, keys: Sequence[str], *, needed: Sequence[str] = ()) -> dict[str, Any]:
        if not isinstance(node, yaml.MappingNode) or not node.tag.startswith(_STANDARD_TAG):
            self._wrong(node, f"{where}: must be a mapping with {', '.join(f'`{key}`' for key in keys)}")
            return {}
        found: dict[str, Any] = {}
        for key, value in node.value:
            name = str(key.value) if isinstance(key, yaml.ScalarNode) else ""
            if name not in keys:
                shown = f"`{name}`" if name else "a key that is no text"
                self._wrong(key, f"{where}: {shown}: no such key; there are {', '.join(f'`{key}`' for key in keys)}")
            elif name in found:
                self._wrong(key, f"{where}: `{name}`: given more than once")
            else:
                found[name] = value
        for name in needed:
            if name not in found:
                self._wrong(node, f"{where}: `{name}` is missing")
        return found

    def _list(self, node: Any) -> list[Any]:
        """The items of a list; what is no list is taken for its only item."""
        if node is None:
            return []
        return list(node.value) if isinstance(node, yaml.SequenceNode) else [node]

    def _text(self, node: Any, where: str) -> str | None:
        if not isinstance(node, yaml.ScalarNode) or not node.tag.startswith(_STANDARD_TAG):
            self._wrong(node, f"{where}: must be a text")
            return None
        if not node.value or (not node.style and node.tag.endswith(":null")):
            self._wrong(node, f"{where}: is empty")
            return None
        return str(node.value)

    def _wrong(self, node: Any, text: str) -> None:
        line = node.start_mark.line + 1
        self.errors.append((line, f"{self._file}:{line}: {text}"))


def _given(items: Iterable[T | None]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(item for item in items if item is not None))
