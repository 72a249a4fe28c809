"""What the documents call by name is called so in the code: routes of the API, chains of the kernel, metrics."""

import json
import re
from functools import cache
from pathlib import Path

import pytest

from tests.docs.test_docs import CODE, ROOT, each_page

API = ROOT / "docs" / "http-api.md"
BOUNDARY = r"(?![\w-])"


@cache
def code(folder: str) -> str:
    return "\n".join(path.read_text() for path in sorted((ROOT / folder).rglob("*.py")))


def routes() -> set[tuple[str, str]]:
    paths = json.loads((ROOT / "services" / "policy" / "openapi.json").read_text())["paths"]
    methods = {(method.upper(), path) for path, all_ in paths.items() for method in all_}
    return {(m, p.replace("{version}", "VERSION")) for m, p in methods if m not in ("OPTIONS", "PARAMETERS")}


def test_every_route_is_named_and_no_other() -> None:
    text = API.read_text()
    named = set(re.findall(r"`(GET|POST|PUT|DELETE) (/networking/VERSION[\w/]+)`", text))
    assert named == {(method, path) for method, path in routes() if "VERSION" in path}
    others = {path for _, path in routes() if "VERSION" not in path}
    assert [path for path in sorted(others) if not re.search(rf"[` ]{path}`", text)] == []


@pytest.mark.parametrize("name", ["data-plane.md", "design.md", "egress.md"])
def test_chains_and_sets_are_the_kernels(name: str) -> None:
    enforcer = code("services/enforcer")
    found = set(re.findall(rf"\bsb-[a-z0-9]+(?:-[a-z0-9]+)*{BOUNDARY}", (ROOT / "docs" / name).read_text()))
    made = re.compile(r"sb-(?:[a-z]|lab-cell-\d|g-[0-9a-f]{8})(?:$|-)")  # an app's, a group's…, or the lab's namespace
    assert [each for each in sorted(found) if f'"{each}"' not in enforcer and not made.match(each)] == []


@each_page
def test_metrics_and_tables_exist(page: Path) -> None:
    """Also properties of the BOSH release, which are named likewise."""
    words = set(re.findall(r"\bsilkbus_[a-z_]+[a-z]\b", page.read_text()))
    known = "\n".join(code(folder) for folder in CODE) + (release() if page.stem in ("bosh", "migrate") else "")
    assert [word for word in sorted(words) if not re.search(rf"\b{word}\b", known)] == []


@cache
def release() -> str:
    files = (path for folder in ("jobs", "operations") for path in (ROOT / "compose" / "bosh" / folder).rglob("*"))
    return "\n".join(path.read_text() for path in files if path.is_file())
