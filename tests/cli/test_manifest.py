"""Policies as a file: what is read, what is refused and where, and that what is written is read back."""

import json
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.errors import Failed
from cli.manifest import Ports, Reference, as_json, as_yaml, document, flat
from cli.manifest_reader import parse

WHOLE = """
org: acme
space: dev
spaces: [staging, other/prod, {org: a/b, space: c}]
policies:
- source: [front, staging/front, {app: x/y}]
  destination: other/prod/db
  tcp: [5432, 9000-9010]
  udp: 53
- source: no
  destination: {guid: 6f3c}
  tcp: "1"
"""


def test_every_form_is_read() -> None:
    manifest = parse(WHOLE, "f.yml")
    front, staged, slashed = (
        Reference("front", "dev", "acme"),
        Reference("front", "staging", "acme"),
        Reference("x/y", "dev", "acme"),
    )
    first, second = manifest.rules
    assert first.sources == (front, staged, slashed)
    assert first.destination == Reference("db", "prod", "other")
    assert first.ports == (Ports("tcp", 5432, 5432), Ports("tcp", 9000, 9010), Ports("udp", 53, 53))
    assert second.sources == (Reference("no", "dev", "acme"),)
    assert second.destination == Reference(guid="6f3c")
    assert manifest.spaces == (("acme", "staging"), ("other", "prod"), ("a/b", "c"), ("acme", "dev"))
    assert (manifest.lines[front], manifest.lines[second.destination]) == (6, 11)


def test_all_that_is_wrong_is_said_with_its_line() -> None:
    text = """\
orgs: acme
policies:
- source: front
  tcp: 0
- source: a/b/c/d
  destination: [x, y]
  tcp: [80-70, 08, 1-2-3, 70000, x]
- source: []
  destination: {app: x, guid: y}
  udp: []
- source: ~
  destination: db
  destination: db
- [front, db]
"""
    with pytest.raises(Failed) as failure:
        parse(text, "f.yml")
    assert str(failure.value).splitlines() == [
        "f.yml:1: the file: `orgs`: no such key; there are `org`, `space`, `spaces`, `policies`",
        "f.yml:3: a policy: `destination` is missing",
        "f.yml:4: tcp: '0' is no port or range in 1-65535, such as 8080 or 8080-8090",
        "f.yml:5: source: 'a/b/c/d' is none of NAME, SPACE/NAME and ORG/SPACE/NAME;"
        " write names that have a slash as {org: …, space: …, app: …}",
        "f.yml:6: destination: must be a text",
        *(
            f"f.yml:7: tcp: '{wrong}' is no port or range in 1-65535, such as 8080 or 8080-8090"
            for wrong in ("08", "1-2-3", "70000", "80-70", "x")
        ),
        "f.yml:8: source: must name one app at least",
        "f.yml:9: destination: give either `guid` or `app`, not both",
        "f.yml:10: udp: must have one port at least",
        "f.yml:11: a policy must have ports: `tcp`, `udp` or both",
        "f.yml:11: source: is empty",
        "f.yml:13: a policy: `destination`: given more than once",
        "f.yml:14: a policy: must be a mapping with `source`, `destination`, `tcp`, `udp`",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "f.yml: is empty"),
        ("policies: [\n", "f.yml:2: is not YAML: "),
        ("a:\n\t- b", "f.yml:2: is not YAML: "),
        ("policies: []\n---\npolicies: []", "f.yml:2: is not YAML: expected a single document"),
        ("- a", "f.yml:1: the file: must be a mapping with"),
        ("policies: none", "f.yml:1: policies: must be a list"),
        ("org: acme", "f.yml:1: the file: `policies` is missing"),
        ("policies: [{source: !secret a, destination: b, tcp: 1}]", "f.yml:1: source: must be a text"),
        ("policies: &a [*a]", "f.yml:1: "),
        ("[" * 5000, "f.yml:"),
        ("policies: []\nspaces: [a/b/c]", "f.yml:2: spaces: 'a/b/c' is neither SPACE nor ORG/SPACE"),
        ("x: \x00", "f.yml:"),
    ],
)
def test_what_is_no_file_of_policies(text: str, problem: str) -> None:
    with pytest.raises(Failed) as failure:
        parse(text, "f.yml")
    assert str(failure.value).startswith(problem)


NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
REFERENCES = st.one_of(
    st.builds(Reference, NAMES, NAMES, NAMES),
    st.builds(Reference, guid=NAMES),
    st.builds(Reference, st.sampled_from("ab"), st.sampled_from("ab"), st.just("o")),
)
PORTS = st.builds(
    lambda protocol, ends: Ports(protocol, min(ends), max(ends)),
    st.sampled_from(["tcp", "udp"]),
    st.tuples(st.integers(1, 65535), st.integers(1, 65535)),
)


@settings(deadline=None)
@given(st.sets(st.tuples(REFERENCES, REFERENCES, PORTS), max_size=12), st.sampled_from([as_yaml, as_json]))
def test_what_is_written_is_read_back(policies, writer) -> None:
    text = writer(document(policies))
    assert set(flat(parse(text, "f.yml").rules)) == policies


@settings(deadline=None)
@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda raw: raw.decode("latin-1")))
def test_no_text_makes_the_reader_stumble(text: str) -> None:
    with suppress(Failed):  # anything else is a bug
        parse("policies: []\n" + text, "f.yml")


def test_sources_with_the_same_ports_are_put_together() -> None:
    db = Reference("db", "prod", "acme")
    policies = [
        (Reference(name, "dev", "acme"), db, ports)
        for name in ("web", "api")
        for ports in (Ports("tcp", 5432, 5432), Ports("udp", 1, 9))
    ]
    assert json.loads(as_json(document(policies))) == {
        "policies": [
            {"source": ["acme/dev/api", "acme/dev/web"], "destination": "acme/prod/db", "tcp": 5432, "udp": "1-9"}
        ]
    }
