"""Real databases for tests: SQLite, and PostgreSQL and MariaDB servers from Debian's packages.

The servers listen on free ports of loopback and have data folders of their own; each is started once per run and ended
by pid. `.ci/setup-tests` installs the packages. As root the servers run as the packages' users, since both refuse
root. The fixture `database` runs a test once on each kind, each time with a new, empty database.
"""

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from tests.nats_server import free_port

START_SECONDS = 60
KINDS = ("sqlite", "postgresql", "mysql")
_numbers = itertools.count(1)


class Server(ABC):
    """One database server. Started again after `kill`, it has what was committed."""

    user: ClassVar[str]
    """Whom it runs as, when the tests run as root."""
    end: ClassVar[signal.Signals]
    """The signal that ends it at once, with all its processes and without tidying up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        if os.geteuid() == 0:
            shutil.chown(folder, self.user)
        self._create()

    @abstractmethod
    def url(self, database: str, port: int | None = None) -> str: ...

    @abstractmethod
    def sql(self, *statements: str, database: str = "") -> None:
        """Run SQL as the administrator, from outside."""

    @abstractmethod
    def _create(self) -> None:
        """Make the data folder."""

    @abstractmethod
    def _command(self) -> Sequence[str]:
        """What runs the server in the foreground."""

    @abstractmethod
    def _ready(self) -> Sequence[str]:
        """A command that succeeds when the server takes connections."""

    def start(self) -> None:
        self.launch()
        self.wait_ready()

    def launch(self) -> None:
        """Start it, in the main thread: it ends with the thread that started it."""
        with (self.folder / "log").open("ab") as output:
            self._process = subprocess.Popen(self._as_user(self._command()), stdout=output, stderr=output)

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while subprocess.run(self._ready(), capture_output=True, timeout=START_SECONDS).returncode != 0:
            if self._process is None or self._process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"no server: {(self.folder / 'log').read_text(errors='replace')}")
            time.sleep(0.05)

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(self.end)
            self._process.wait(START_SECONDS)
            self._process = None

    def _as_user(self, command: Sequence[str]) -> list[str]:
        end_with_us = ["setpriv", "--pdeathsig=KILL"]
        if os.geteuid() == 0:
            account = pwd.getpwnam(self.user)
            end_with_us += [f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--init-groups"]
        return [*end_with_us, "--", *command]

    def _run(self, *command: str) -> None:
        done = subprocess.run(self._as_user(command), capture_output=True, text=True, timeout=120, cwd=self.folder)
        assert done.returncode == 0, f"{command}: {done.stderr or done.stdout}"


class PostgreSQL(Server):
    user = "postgres"
    end = signal.SIGQUIT

    def url(self, database: str, port: int | None = None) -> str:
        return f"postgresql://silkbus@127.0.0.1:{port or self.port}/{database}"

    def sql(self, *statements: str, database: str = "postgres") -> None:
        for statement in statements:
            self._run(
                f"{self._programs}/psql", "-X", "-v", "ON_ERROR_STOP=1", "-d", self.url(database), "-c", statement
            )

    def _create(self) -> None:
        self._run(f"{self._programs}/initdb", "-D", str(self.data), "-U", "silkbus", "-A", "trust", "-E", "UTF8", "-N")

    def _command(self) -> Sequence[str]:
        server = [f"{self._programs}/postgres", "-D", str(self.data), "-p", str(self.port)]
        return [*server, "-c", "listen_addresses=127.0.0.1", "-k", str(self.folder)]

    def _ready(self) -> Sequence[str]:
        return [f"{self._programs}/pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]

    @property
    def _programs(self) -> Path:
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
        assert found, "no PostgreSQL server: run .ci/setup-tests"
        return found[-1]


class MariaDB(Server):
    user = "mysql"
    end = signal.SIGKILL

    def url(self, database: str, port: int | None = None) -> str:
        return f"mysql://silkbus@127.0.0.1:{port or self.port}/{database}"

    def sql(self, *statements: str, database: str = "mysql") -> None:
        self._run("mariadb", *self._client(), f"--database={database}", f"--execute={';'.join(statements)}")

    def _create(self) -> None:
        assert shutil.which("mariadb-install-db"), "no MariaDB server: run .ci/setup-tests"
        options = ["--auth-root-authentication-method=normal", "--skip-test-db"]
        self._run("mariadb-install-db", "--no-defaults", f"--datadir={self.data}", *options)
        create = "CREATE USER IF NOT EXISTS silkbus@'127.0.0.1'"
        (self.folder / "init.sql").write_text(f"{create};\nGRANT ALL ON *.* TO silkbus@'127.0.0.1';\n")

    def _command(self) -> Sequence[str]:
        server = ["mariadbd", "--no-defaults", f"--datadir={self.data}", f"--port={self.port}", "--skip-name-resolve"]
        files = [f"--{name}={self.folder}/{name}" for name in ("socket", "pid-file")]
        return [*server, *files, f"--init-file={self.folder}/init.sql", "--bind-address=127.0.0.1"]

    def _ready(self) -> Sequence[str]:
        return ["mariadb-admin", *self._client(), "--connect-timeout=5", "ping"]

    def _client(self) -> list[str]:
        return ["--no-defaults", "--protocol=tcp", "--host=127.0.0.1", f"--port={self.port}", "--user=silkbus"]


@dataclass(frozen=True)
class EmptyDatabase:
    """A new database: its kind (the URL's dialect), and the server with the name there, if it has one."""

    kind: str
    url: str
    server: Server | None = None
    name: str = ""

    def url_through(self, port: int) -> str:
        """The same database, by way of another port of loopback."""
        assert self.server is not None
        return self.server.url(self.name, port)


@contextmanager
def running(kind: type[Server]) -> Iterator[Server]:
    folder = Path(tempfile.mkdtemp(prefix="silkbus-test-"))  # not pytest's folder, which only its own user may enter
    try:
        server = kind(folder)
        server.start()
        try:
            yield server
        finally:
            server.kill()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Server]:
    with running(PostgreSQL) as server:
        yield server


@pytest.fixture(scope="session")
def mariadb() -> Iterator[Server]:
    with running(MariaDB) as server:
        yield server


@pytest.fixture(params=KINDS)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EmptyDatabase]:
    """Restrict it with `@pytest.mark.parametrize("database", ["mysql"…], indirect=True)`."""
    if request.param == "sqlite":
        yield EmptyDatabase("sqlite", f"sqlite:///{tmp_path}/silkbus.db")
        return
    server: Server = request.getfixturevalue("postgresql" if request.param == "postgresql" else "mariadb")
    name = f"test{next(_numbers)}"
    server.sql(f"CREATE DATABASE {name}")
    yield EmptyDatabase(request.param, server.url(name), server, name)
    server.sql(f"DROP DATABASE {name}" + (" WITH (FORCE)" if request.param == "postgresql" else ""))
