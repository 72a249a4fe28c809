"""What the wheel contains and which commands it installs: pinned, since nothing else notices a file left out."""

import configparser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("bus", "services", "cli", "compose")

pytestmark = pytest.mark.packaging


def listed_by_git(*folders: str) -> list[str]:
    """The files of the project there, also those not yet committed."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    listed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.split()
    return [name for name in listed if (ROOT / name).exists()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    # From a copy: setuptools would take up what earlier builds left in the folder `build`, and leave one itself.
    source = tmp_path_factory.mktemp("source")
    for name in [*listed_by_git(*PACKAGES), "pyproject.toml", "README.md"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, check=True, timeout=300)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_contents(wheel: zipfile.ZipFile) -> None:
    listed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    # The BOSH release is made from the project, not installed with it.
    assert listed == {name for name in listed_by_git(*PACKAGES) if not name.startswith("compose/bosh/")}


def test_entry_points(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    parser = configparser.ConfigParser()
    parser.read_string(wheel.read(name).decode())
    assert set(parser["console_scripts"]) == {
        "silkbus",
        "silkbus-enforcer",
        "silkbus-networker",
        "silkbus-policy-server",
        "silkbus-policy-server-internal",
        "silkbus-silk-controller",
        "silkbus-silk-worker",
    }
    assert set(parser["silkbus.commands"]) == {
        "demo",
        "doctor",
        "install-cni",
        "install-garden",
        "install-systemd",
        "lab",
        "nats-config",
        "policy",
        "silk",
    }
    for section in parser.sections():
        for target in parser[section].values():
            module, _, function = target.partition(":")
            path = module.replace(".", "/") + ".py"
            assert f"def {function}(" in wheel.read(path).decode(), f"{target}: no such function in the wheel"


def test_every_service_says_its_settings() -> None:
    for program in (
        "enforcer",
        "networker",
        "policy-server",
        "policy-server-internal",
        "silk-controller",
        "silk-worker",
    ):
        command = [str(Path(sys.executable).with_name(f"silkbus-{program}")), "--help"]
        help_text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
        assert "settings (key in FILE, or SILKBUS_KEY in the environment)" in help_text
        assert "log_level" in help_text
