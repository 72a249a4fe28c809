"""The BOSH release as a director sees it: its jobs, rendered with properties, links and an instance."""

import functools
import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

RELEASE = Path(__file__).parents[2] / "compose" / "bosh"
RENDERER = Path(__file__).with_name("render.rb")
JOBS = sorted(each.name for each in (RELEASE / "jobs").iterdir())
ADDRESS = "10.0.1.7"


class RenderError(Exception):
    """A template raised. The text is its message."""


def spec(job: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((RELEASE / "jobs" / job / "spec").read_text())
    return found


def nested(properties: dict[str, Any]) -> dict[str, Any]:
    """Properties by their dotted names as the tree that a manifest has."""
    tree: dict[str, Any] = {}
    for name, value in properties.items():
        *folders, last = name.split(".")
        place = tree
        for each in folders:
            place = place.setdefault(each, {})
        place[last] = value
    return tree


@dataclass
class Instance:
    """One instance: what templates see as `spec`."""

    name: str = "diego-cell"
    index: int = 0
    deployment: str = "cf"
    address: str = ADDRESS
    bootstrap: bool = True
    networks: dict[str, str] = field(default_factory=dict)

    def value(self) -> dict[str, Any]:
        networks = {"default": self.address, **self.networks}
        return {
            "name": self.name,
            "index": self.index,
            "deployment": self.deployment,
            "address": self.address,
            "ip": self.address,
            "id": f"3d9a8f1c-0000-4000-8000-{self.index:012}",
            "az": "z1",
            "bootstrap": self.bootstrap,
            "networks": {name: {"ip": ip} for name, ip in networks.items()},
        }


def link(job: str, name: str, properties: dict[str, Any] | None = None, *addresses: str) -> dict[str, Any]:
    """What consumers of the link `name` see that `job` provides with these properties, by their dotted names."""
    about = spec(job)
    given = properties or {}
    (provided,) = (each for each in about["provides"] if each["name"] == name)
    seen = {}
    for each in provided["properties"]:
        value = given.get(each, about["properties"][each].get("default"))
        if value is not None:
            seen[each] = value
    return {"properties": nested(seen), "instances": [{"address": each} for each in addresses or (ADDRESS,)]}


@functools.cache
def _renderer() -> subprocess.Popen[str]:
    """One renderer for all tests; it ends with its standard input."""
    return subprocess.Popen(["ruby", RENDERER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def render(
    job: str,
    properties: dict[str, Any] | None = None,
    links: dict[str, Any] | None = None,
    instance: Instance | None = None,
) -> dict[str, str]:
    """The files of a job, by their place in its folder; properties by their dotted names. Raises RenderError."""
    request = {
        "job": str(RELEASE / "jobs" / job),
        "properties": nested(properties or {}),
        "links": links or {},
        "spec": (instance or Instance()).value(),
    }
    renderer = _renderer()
    assert renderer.stdin is not None
    assert renderer.stdout is not None
    renderer.stdin.write(json.dumps(request) + "\n")
    renderer.stdin.flush()
    answer = json.loads(renderer.stdout.readline())
    if answer["errors"]:
        raise RenderError("\n".join(sorted(set(answer["errors"].values()))))
    files: dict[str, str] = answer["files"]
    return files
