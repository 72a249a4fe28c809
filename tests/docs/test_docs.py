"""What the documents say is there: links, commands and their options, settings, files, targets of make."""

import contextlib
import dataclasses
import io
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

from bus.settings import ServiceSettings
from cli.main import main
from tests.docs import settings_reference

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE = ("bus", "cli", "services", "compose")
COMMAND = re.compile(r"(?:^|[\s`(=]|bin/)(silkbus(?:-[a-z-]+)?)(?=[ `\n]|$)((?: [^\n`|;&]*)?)", re.MULTILINE)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(text: str) -> str:
    """The text without code blocks."""
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)


def code(text: str) -> Iterator[str]:
    """Lines of code blocks, with those that a backslash continues as one; and code within the text."""
    for block in re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL):
        yield from re.sub(r"\\\n\s*", " ", block).splitlines()
    yield from re.findall(r"`([^`\n]+)`", prose(text))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[tuple[Path, str]]:
    """(file, anchor) of each link of a page that leads to a file."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text()))
    inside = [target.partition("#") for target in found if not re.match(r"[a-z]+:", target)]
    return [((page.parent / unquote(file)).resolve() if file else page, anchor) for file, _, anchor in inside]


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for file, anchor in links(page):
        assert file.exists(), f"{page.name}: there is no {file}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {file.name} has no heading #{anchor}"


def test_every_page_is_two_clicks_from_the_readme() -> None:
    reached = {README}
    for _ in range(2):
        reached |= {file for page in reached if page.suffix == ".md" for file, _ in links(page)}
    wanted = {file for file in (ROOT / "docs").rglob("*") if file.suffix in (".md", ".yaml", ".json", ".py")}
    assert wanted - reached == set()


@cache
def scripts() -> set[str]:
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"])


@cache
def help_of(*command: str) -> str | None:
    """What `silkbus COMMAND --help` prints, or None if there is no such command."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()):
        try:
            status = main([*command, "--help"])
        except SystemExit as ended:
            status = int(ended.code or 0)
    return output.getvalue() if status == 0 else None


def arguments(text: str) -> list[str]:
    try:
        return shlex.split(text, comments=True)
    except ValueError:
        return text.split("#")[0].split()


@each_page
def test_commands_and_their_options_exist(page: Path) -> None:
    for line in code(page.read_text()):
        for program, rest in COMMAND.findall(line):
            words = arguments(rest)
            if f"cf {program}" in line:
                program, words = "silkbus", [program.removeprefix("silkbus-"), *words]
            if program != "silkbus":
                assert program in scripts() | NOT_PROGRAMS, f"{line!r}: no program {program}"
                continue
            if not words or not re.fullmatch(r"[a-z][a-z-]*", words[0]):
                continue  # the word alone, or a placeholder
            command = words[:1]
            assert help_of(*command) is not None, f"{line!r}: no command {words[0]}"
            if len(words) > 1 and re.fullmatch(r"[a-z][a-z-]*", words[1]) and help_of(*words[:2]) is not None:
                command = words[:2]
            described = f"{help_of(*command[:1])}\n{help_of(*command)}"
            # What follows "--" is another program's.
            own = words[: words.index("--")] if "--" in words else words
            for option in (word.partition("=")[0] for word in own if re.match(r"--?[a-z]", word)):
                assert re.search(rf"(?<![\w-]){option}(?![\w-])", described), f"{line!r}: no option {option}"


NOT_PROGRAMS = {"silkbus-cni", "silkbus-garden", "silkbus-silk", "silkbus-NAME", "silkbus-nats"}
"""Plugins, which `silkbus install-cni` and `silkbus install-garden` put where their runtime looks for them; and a job
of the BOSH release."""


STREAMS = {f"SILKBUS_{name}" for name in ("POLICIES", "LEASES", "CONTAINERS")}
"""JetStream's, which are named like variables."""
CNI_ARGS = {f"SILKBUS_{name}" for name in ("APP", "SPACE", "ORG", "WORKLOAD")}
"""What a CNI runtime says of a container (services/networker/identity.py)."""


@cache
def variables() -> set[str]:
    """The variables of settings, and those that the code names."""
    known = {f"SILKBUS_{f.name.upper()}" for kind in all_settings() for f in dataclasses.fields(kind)}
    for folder in CODE:
        for path in (file for file in (ROOT / folder).rglob("*") if file.is_file() and file.suffix != ".pyc"):
            known |= set(re.findall(r"\bSILKBUS_[A-Z_]+[A-Z]\b", path.read_text()))
    return known | STREAMS | CNI_ARGS


@each_page
def test_variables_exist(page: Path) -> None:
    assert set(re.findall(r"\bSILKBUS_[A-Z_]*[A-Z]\b", page.read_text())) - variables() - {"SILKBUS_KEY"} == set()


@each_page
def test_files_named_exist(page: Path) -> None:
    named = set(re.findall(r"\b((?:bus|cli|services|compose|tests|bench)/[\w/.*-]+\.\w+)", page.read_text()))
    assert [name for name in sorted(named) if not list(ROOT.glob(name))] == []


@each_page
def test_targets_of_make_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for line in code(page.read_text()):
        for target in re.findall(r"(?:^|\s)make ([a-z]+)\b", line):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"{line!r}: no target {target}"


def all_settings() -> set[type[ServiceSettings]]:
    found, left = set[type[ServiceSettings]](), [ServiceSettings]
    while left:
        each = left.pop()
        found.add(each)
        left += each.__subclasses__()
    return found


def test_the_settings_page_is_what_the_code_says() -> None:
    assert settings_reference.TARGET.read_text() == settings_reference.page(), "run `make docs`"


def test_the_settings_page_has_every_setting() -> None:
    text = settings_reference.TARGET.read_text()
    fields = {f.name for kind in all_settings() for f in dataclasses.fields(kind)}
    assert [name for name in sorted(fields) if f"| `{name}` |" not in text] == []
