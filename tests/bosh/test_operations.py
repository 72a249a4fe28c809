"""The ops files, applied as `bosh` applies them to a manifest laid out as cf-deployment; and what vendor makes."""

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.bosh.deployment import CC, CERTIFICATE, KEY
from tests.bosh.machine import machine
from tests.bosh.release import JOBS, RELEASE, Instance, link, render
from tests.bosh.test_running import nats_variables

pytestmark = pytest.mark.packaging

DATA = Path(__file__).parent / "data"


def apply(manifest: Any, *operations: str) -> Any:
    """The manifest with these ops files. Raises KeyError where bosh would refuse a path that is not there."""
    for name in operations:
        for step in yaml.safe_load((RELEASE / "operations" / f"{name}.yml").read_text()):
            assert step["type"] == "replace"
            *folders, last = step["path"].strip("/").split("/")
            place, missing_is_fine = manifest, False
            for token in folders:
                place, missing_is_fine = _enter(place, token, missing_is_fine)
            _set(place, last, step["value"], missing_is_fine)
    return manifest


def _enter(place: Any, token: str, missing_is_fine: bool) -> tuple[Any, bool]:
    name, optional = token.removesuffix("?"), missing_is_fine or token.endswith("?")
    if "=" in name:
        key, _, value = name.partition("=")
        (found,) = (each for each in place if each[key] == value)
        return found, optional
    if optional:
        return place.setdefault(name, {}), True
    return place[name], False


def _set(place: Any, token: str, value: Any, missing_is_fine: bool) -> None:
    name, optional = token.removesuffix("?"), missing_is_fine or token.endswith("?")
    if "=" in name:
        key, _, wanted = name.partition("=")
        found = [number for number, each in enumerate(place) if each[key] == wanted]
        assert found or optional
        place[slice(found[0], found[0] + 1) if found else slice(len(place), None)] = [value]
        return
    if name == "0:before":
        place.insert(0, value)
        return
    if not optional:
        place[name]  # raises KeyError
    place[name] = value


def filled(value: Any, variables: dict[str, Any]) -> Any:
    """The value with ((variables)), those that are unknown as certificates or texts are."""
    if isinstance(value, dict):
        return {key: filled(each, variables) for key, each in value.items()}
    if isinstance(value, list):
        return [filled(each, variables) for each in value]
    if isinstance(value, str) and (found := re.fullmatch(r"\(\(([\w.-]+)\)\)", value)):
        name, _, part = found[1].partition(".")
        if name in variables:
            return variables[name][part] if part else variables[name]
        assert not name.startswith("silkbus"), f"nobody gives {name}"
        return {"private_key": KEY, "": "text"}.get(part, CERTIFICATE)
    return value


def flat(tree: dict[str, Any], names: set[str], prefix: str = "") -> dict[str, Any]:
    """The properties by their dotted names, as the job's spec names them."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in names:
            found |= flat(value, names, f"{name}.")
        else:
            found[name] = value
    return found


@pytest.fixture
def manifest(tmp_path: Path) -> Any:
    variables = nats_variables(tmp_path / "nats") | {
        "silkbus_release_version": "1",
        "silkbus_nats_instances": 1,
        "silkbus_nats_addresses": ["10.0.0.10"],
        "silkbus_nats_servers": ["nats://10.0.0.10:4222"],
    }
    original = yaml.safe_load((DATA / "cf_deployment.yml").read_text())
    return filled(
        apply(original, "nats", "centre", "take-over", "cells", "iptables-logger", "beside-the-original"), variables
    )


def test_every_job_of_the_original_is_ours_and_renders(manifest: Any) -> None:
    jobs = {job["name"]: (group, job) for group in manifest["instance_groups"] for job in group["jobs"]}
    releases = {name: job["release"] for name, (_, job) in jobs.items()}
    assert {name for name, release in releases.items() if release in ("cf-networking", "silk")} == set()

    def properties(name: str) -> dict[str, Any]:
        about = yaml.safe_load((RELEASE / "jobs" / name / "spec").read_text())["properties"]
        given = flat(jobs[name][1].get("properties", {}), set(about))
        assert set(given) <= set(about), f"{name} has no property {set(given) - set(about)}"
        return given

    links = CC | {
        "dbconn": link("policy-server", "dbconn", properties("policy-server")),
        "tag_length": link("policy-server", "tag_length", properties("policy-server")),
        "asg_syncer": link("policy-server-asg-syncer", "asg_syncer", properties("policy-server-asg-syncer")),
        "cf_network": link("silk-controller", "cf_network", properties("silk-controller")),
        "cni_config": link("silk-cni", "cni_config", properties("silk-cni")),
        "vpa": link("vxlan-policy-agent", "vpa", properties("vxlan-policy-agent")),
        "nats": link("silkbus-nats", "nats", properties("silkbus-nats")),
    }
    ours = [name for name, release in releases.items() if release == "silkbus"]
    assert set(ours) == set(JOBS) - {"silk-datastore-syncer", "bbr-cfnetworkingdb"}
    for name in ours:
        group, _ = jobs[name]
        files = render(name, properties(name), links, Instance(group["name"], deployment=manifest["name"]))
        if "config/certs/nats.key" in files:
            assert "PRIVATE KEY" in files["config/certs/nats.key"]


def test_nats_comes_first_and_cells_after_the_centre(manifest: Any) -> None:
    """BOSH updates instance groups in this order."""
    names = [group["name"] for group in manifest["instance_groups"]]
    assert names[0] == "silkbus-nats"
    assert names.index("diego-cell") > max(names.index("api"), names.index("diego-api"))


def test_the_centre_can_be_ours_before_the_cells() -> None:
    made = apply(yaml.safe_load((DATA / "cf_deployment.yml").read_text()), "nats", "centre", "take-over")
    jobs = {job["name"]: job for group in made["instance_groups"] for job in group["jobs"]}
    assert jobs["policy-server"]["properties"]["import_from_original"] is True
    assert jobs["vxlan-policy-agent"]["release"] == "silk"


def test_garden_calls_our_plugin_with_its_configuration(manifest: Any) -> None:
    (cells,) = (group for group in manifest["instance_groups"] if group["name"] == "diego-cell")
    jobs = {job["name"]: job.get("properties", {}) for job in cells["jobs"]}
    assert jobs["garden"]["garden"] == {
        "network_plugin": "/var/vcap/packages/silkbus/bin/silkbus-garden",
        "network_plugin_extra_args": ["--configFile=/var/vcap/jobs/garden-cni/config/adapter.json"],
    }
    assert jobs["garden-cni"]["cni_config_dir"] == "/var/vcap/jobs/silk-cni/config/cni"
    assert jobs["vxlan-policy-agent"]["unmarked_answers"] is True


@pytest.mark.kernel
@pytest.mark.timeout(900)
def test_packages_are_made_of_what_vendor_gathers(tmp_path: Path) -> None:
    """With this Python instead of one that is built, and without any network, as on a compilation VM."""
    source = tmp_path / "Python-3.12.99.tgz"
    source.write_text("not looked into")
    (tmp_path / "config").mkdir()
    subprocess.run([RELEASE / "vendor", source, sys.executable, tmp_path], check=True, timeout=600, capture_output=True)
    blobs = yaml.safe_load((tmp_path / "config" / "blobs.yml").read_text())
    there = {str(file.relative_to(tmp_path / "blobs")): file for file in (tmp_path / "blobs").rglob("*.*")}
    assert {name.split("/")[0] for name in blobs} == {"python", "wheels", "nats"}
    for name, file in there.items():
        assert blobs[name]["size"] == file.stat().st_size
        assert blobs[name]["sha"] == f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
    with machine(Instance(), network=True) as made:
        shutil.rmtree(made.vcap / "packages")
        for name, program in (("python-3.12", "python3"), ("silkbus", ""), ("nats-server", "")):
            (made.vcap / "packages" / name / "bin").mkdir(parents=True)
            if program:
                (made.vcap / "packages" / name / "bin" / program).symlink_to(Path(sys.executable).resolve())
        for name in ("silkbus", "nats-server"):
            compiled = f"cd {tmp_path}/blobs && BOSH_INSTALL_TARGET=/var/vcap/packages/{name} bash {RELEASE}"
            made.run("bash", "-c", f"{compiled}/packages/{name}/packaging")
        programs = "/var/vcap/packages/silkbus/bin"
        for program in ("silkbus-policy-server", "silkbus-enforcer", "silkbus-silk-worker", "silkbus-networker"):
            assert b"usage: " in made.run(f"{programs}/{program}", "--help").stdout
        plugin = made.run(f"{programs}/silkbus-garden", check=False)
        assert b"this is a plugin for Garden-runC" in plugin.stderr
        assert (made.vcap / "packages/silkbus/bin/silkbus-cni").exists()
        assert b"nats-server" in made.run("/var/vcap/packages/nats-server/bin/nats-server", "--version").stdout
