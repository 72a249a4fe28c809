"""Imports point one way: services and compose use bus, cli message types at most, services do not know each other."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("bus", "services", "cli", "compose", "tests")


def part(module: str) -> str:
    """`services.policy.store` belongs to `services.policy`, `bus.tables` to `bus`."""
    names = module.split(".")
    return ".".join(names[:2]) if names[0] == "services" else names[0]


def imports() -> Iterator[tuple[str, str]]:
    """Every import of ours in product code: (the importing module, the imported one)."""
    for folder in OURS[:-1]:
        for path in (ROOT / folder).rglob("*.py"):
            importer = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    found = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    assert node.level == 0, f"{importer}: relative import"
                    found = [node.module or ""]
                else:
                    continue
                yield from ((importer, name) for name in found if name.split(".")[0] in OURS)


def allowed(importer: str, imported: str) -> bool:
    here, there = part(importer), part(imported)
    if here == there:
        return True
    if here == "cli":
        return imported == "bus.messages"
    return there == "bus" and here != "bus"


def test_imports_point_one_way() -> None:
    found = list(imports())
    assert len(found) > 50
    assert [pair for pair in found if not allowed(*pair)] == []


@pytest.mark.parametrize("name", ["bus", "services.policy", "services.silk", "services.enforcer", "services.networker"])
def test_every_part_is_a_package(name: str) -> None:
    assert (ROOT / name.replace(".", "/") / "__init__.py").exists()


def test_every_failpoint_is_passed_somewhere() -> None:
    """A listed failpoint that no code passes would make a fault test that tests nothing."""
    from bus.failpoints import POINTS

    code = "".join(path.read_text() for folder in OURS[:-1] for path in (ROOT / folder).rglob("*.py"))
    assert [name for name in POINTS if f'failpoint("{name}")' not in code] == []
