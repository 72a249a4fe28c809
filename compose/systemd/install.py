"""`silkbus install-systemd`: write the units of the services, for cells and central machines that have no BOSH.

The units are files of this package; what differs from machine to machine is the folder of the programs, which is the
one this command runs from. Settings are not written: they are the operator's (docs/operators.md).
"""

import argparse
import sys
from importlib.resources import files
from pathlib import Path

PARTS = {
    "cell": ("silkbus-cell.target", "silkbus-silk-worker", "silkbus-enforcer", "silkbus-networker"),
    "centre": (
        "silkbus-centre.target",
        "silkbus-policy-server",
        "silkbus-policy-server-internal",
        "silkbus-silk-controller",
    ),
}
OPTIONAL = ("silkbus-policy-server-internal",)
"""Only who has foreign agents runs it."""


def unit_files(part: str, programs: Path) -> dict[str, str]:
    """Path below the root of the file system -> text, of all that `part` ("cell" or "centre") needs."""
    units = files("compose.systemd") / "units"
    names = [name if name.endswith(".target") else f"{name}.service" for name in PARTS[part]]
    texts = {f"etc/systemd/system/{name}": (units / name).read_text() for name in names}
    if part == "cell":
        texts["etc/modules-load.d/silkbus.conf"] = (units / "silkbus.modules-load").read_text()
    else:
        texts["etc/sysusers.d/silkbus.conf"] = (units / "silkbus.sysusers").read_text()
    return {path: text.replace("@BIN@", str(programs)) for path, text in texts.items()}


def next_steps(part: str) -> str:
    """What is left to do, as commands."""
    target, *services = PARTS[part]
    enabled = " ".join([*(name for name in services if name not in OPTIONAL), target])
    before = "systemctl restart systemd-modules-load" if part == "cell" else "systemd-sysusers"
    settings = "cell.env" if part == "cell" else "policy-server.env and silk-controller.env"
    return (
        f"Then write /etc/silkbus/{settings} (docs/operators.md), and:\n"
        f"  {before} && systemctl daemon-reload && systemctl enable --now {enabled}\n"
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("silkbus install-systemd", description="Write the units of Silkbus's services.")
    parser.add_argument("part", choices=sorted(PARTS), help="what this machine is")
    parser.add_argument("--root", type=Path, default=Path("/"), metavar="FOLDER", help="write below FOLDER [/]")
    options = parser.parse_args(arguments)
    # Not resolved: a virtual environment's Python is a link to the system's.
    programs = Path(sys.executable).absolute().parent
    for path, text in unit_files(options.part, programs).items():
        target = options.root / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
        except OSError as error:
            sys.stderr.write(f"silkbus install-systemd: {target}: {error.strerror}; run it as root\n")
            return 1
        sys.stdout.write(f"{target}\n")
    sys.stdout.write(next_steps(options.part))
    return 0
