"""`silkbus diags`: one archive with what support needs to know, and no secrets.

From the API: status, history, readiness, metrics. On a cell, as root: what the doctor finds and gathers. And whatever
logs and settings are named. All of it passes cli.redaction, and before the archive is written no part of it may have a
secret that we know.
"""

import argparse
import gzip
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cli import arguments as command_line
from cli import terminal
from cli.errors import Failed
from cli.redaction import Redactor
from cli.session import Session

TIMEOUT = 600.0
MAX_PART = 8 << 20
"""Bytes of one file: of a longer one the end, which is the latest of a log."""
SECRETS = ("TOKEN", "PASSWORD", "SECRET")

API = {
    "status.json": "/status",
    "history.json": "/history?limit=200",
    "tags.json": "/tags",
}
ROOT = ("/readyz", "/metrics")


@dataclass(frozen=True, slots=True)
class Part:
    """A file of the archive; `make` gives its text, or raises what keeps it from being had."""

    name: str
    make: Callable[[], str]


def collect(argv: list[str]) -> int:
    """`silkbus diags`; the exit code."""
    parser = command_line.api_parser(
        "diags",
        "Put what support needs to know into one archive. Secrets are taken out: tokens, passwords, keys.",
        [
            ("", "silkbus-diags-HOST-TIME.tar.gz in this folder; on a cell as root, with all of the cell"),
            ("diags.tar.gz --log /var/vcap/sys/log/silkbus/enforcer.log", "and a log"),
            ("--config /etc/silkbus/enforcer.json", "and settings, which the doctor uses, too"),
        ],
    )
    parser.add_argument("file", nargs="?", metavar="FILE", help="the archive to write")
    parser.add_argument(
        "--log", action="append", default=[], metavar="FILE", help="a log to put in; as often as needed"
    )
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="settings of a service, as JSON")
    parser.add_argument("--no-api", action="store_true", help="leave out what the API knows")

    def run(arguments: argparse.Namespace) -> None:
        session, problem = _session(arguments)
        redactor = Redactor(_secrets(arguments, session))
        files: dict[str, str] = {}
        missing = [] if problem is None else [f"api: {problem}"]
        for part in _parts(arguments, session):
            try:
                files[part.name] = part.make()
            except (Failed, OSError, ValueError) as error:
                missing.append(f"{part.name}: {error}")
        files["missing.txt"] = "".join(f"{line}\n" for line in missing) or "nothing\n"
        target = Path(arguments.file or f"silkbus-diags-{platform.node()}-{time.strftime('%Y%m%dT%H%M%S')}.tar.gz")
        write(target, files, redactor)
        terminal.say(f"{target}: {len(files)} files, secrets taken out. Look through it before you give it away.")
        if missing:
            terminal.say("Not in it: " + "; ".join(redactor.text(line) for line in missing))

    return command_line.run(parser, argv, run)


def write(target: Path, files: dict[str, str], redactor: Redactor) -> None:
    """Write the archive, for its owner only. Raises Failed, and writes nothing, if a known secret is left in it."""
    content = io.BytesIO()
    with gzip.GzipFile(fileobj=content, mode="wb") as packed, tarfile.open(fileobj=packed, mode="w") as archive:
        for name, text in files.items():
            clean = _clean(name, text, redactor)
            if redactor.leaks(name + clean):
                raise Failed(f"{name}: a secret would be in it; no archive is written. Please report this.")
            data = clean.encode(errors="replace")
            entry = tarfile.TarInfo(f"silkbus-diags/{redactor.text(name)}")
            entry.size, entry.mtime, entry.mode = len(data), int(time.time()), 0o600
            archive.addfile(entry, io.BytesIO(data))
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o600)
            file.write(content.getvalue())
    except OSError as error:
        raise Failed(f"{target} cannot be written: {error.strerror}") from None


def _clean(name: str, text: str, redactor: Redactor) -> str:
    """The text without secrets; JSON by its keys, also a line at a time, as our logs are."""
    if name.endswith(".json"):
        try:
            return json.dumps(redactor.value(json.loads(text)), indent=1, ensure_ascii=False) + "\n"
        except (ValueError, RecursionError):
            pass
    # As a whole before it is taken apart: a private key has many lines.
    return "".join(_clean_line(line, redactor) for line in redactor.text(text).splitlines(keepends=True))


def _clean_line(line: str, redactor: Redactor) -> str:
    if line.startswith("{"):
        try:
            return json.dumps(redactor.value(json.loads(line)), ensure_ascii=False) + "\n"
        except (ValueError, RecursionError):
            pass
    return line


def _session(arguments: argparse.Namespace) -> tuple[Session | None, str | None]:
    """The session, or why there is none: a cell has no login, and is worth an archive all the same."""
    if arguments.no_api:
        return None, None
    try:
        return Session(arguments), None
    except Failed as error:
        return None, str(error)


def _secrets(arguments: argparse.Namespace, session: Session | None) -> Iterator[str]:
    """All secrets that we could come by."""
    for name, value in os.environ.items():
        if any(word in name.upper() for word in SECRETS) and not name.upper().endswith("_FILE"):
            yield value
    for file in (arguments.token_file, os.environ.get("SILKBUS_TOKEN_FILE")):
        if file:
            try:
                yield Path(file).read_text()
            except (OSError, UnicodeDecodeError):
                continue
    if session is not None:
        try:
            yield session.configuration.login.token()
        except Failed:
            return


def _parts(arguments: argparse.Namespace, session: Session | None) -> Iterator[Part]:
    yield Part("about.txt", _about)
    yield Part("environment.json", _environment)
    if session is not None:
        for name, path in API.items():
            yield Part(f"api/{name}", partial(_of_api, session, path))
        for path in ROOT:
            yield Part(f"api{path}.txt", partial(_of_root, session, path))
    if os.geteuid() == 0:
        yield from _of_cell(arguments.config[:1])
    for file in arguments.config:
        yield Part(f"settings/{Path(file).name}", partial(_tail, Path(file)))
    for number, file in enumerate(arguments.log):
        yield Part(f"logs/{number}-{Path(file).name}", partial(_tail, Path(file)))


def _of_cell(config: Sequence[str]) -> Iterator[Part]:
    """What the doctor finds and gathers, if this machine has one: he knows of cells, we do not."""
    extra = [word for file in config for word in ("--config", file)]
    command = [sys.executable, "-m", "cli.main", "doctor", "--output", "json", "--evidence", *extra]
    said = f"did not end within {TIMEOUT:g} s"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)  # noqa: S603 (ourselves)
        said = done.stderr
        report = json.loads(done.stdout)
        evidence = report.pop("evidence")
    except (subprocess.TimeoutExpired, ValueError, KeyError):
        yield Part("cell/doctor-failed.txt", partial(str, said))
        return
    yield Part("cell/doctor.json", partial(json.dumps, report))
    for name, text in evidence.items():
        yield Part(f"cell/{name}", partial(str, text))


def _about() -> str:
    try:
        ours = version("silkbus")
    except PackageNotFoundError:
        ours = "unknown"
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return f"silkbus {ours}\npython {sys.version}\n{platform.platform()}\nhost {platform.node()}\n{now}\n"


def _environment() -> str:
    return json.dumps({name: value for name, value in sorted(os.environ.items()) if name.startswith("SILKBUS_")})


def _of_api(session: Session, path: str) -> str:
    return json.dumps(session.client.get(path))


def _of_root(session: Session, path: str) -> str:
    """What the server of the API answers at its root; a Cloud Controller in between does not have it."""
    server = session.client.server
    answer = server.at(server.url.partition("/networking/")[0]).send("GET", path)
    return f"{answer.status}\n{answer.body.decode(errors='replace')}"


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - MAX_PART))
        return file.read(MAX_PART).decode(errors="replace")
