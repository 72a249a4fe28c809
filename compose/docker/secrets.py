"""What `docker-compose up` runs first: makes every service's certificates, passwords and tokens, once.

Each service has a volume of its own, which is mounted at the place of its folder below and nowhere else, so nobody sees
another's. What is there and good is kept, so running it at every start changes nothing; a cell that is added to
SILKBUS_CELLS gets its folder, and only then do others' files change: `accounts.conf`, the list of who is let in.
"""

import json
import os
import secrets
import sys
import uuid
from pathlib import Path

from bus import permissions
from bus.certificates import Authority, CertificateError, write
from bus.decode import Malformed
from bus.messages import cell_name
from bus.nats_config import Layout, Server

SERVICE_UID = 10001
"""The user of all services but the cells', as in the Dockerfile."""
INSTALLED = Path("/secrets")
DATABASES = {permissions.POLICY_SERVER: "policy", permissions.SILK_CONTROLLER: "silk"}
APPS = ("frontend", "backend", "cache", "db")


def app_guid(app: str) -> str:
    """An app's GUID: the same name has the same one in every cell, and at every start."""
    return str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{app}.demo.silkbus"))


def make(out: Path, cells: tuple[str, ...]) -> None:
    """Write all of it below `out`. Raises CertificateError, OSError."""
    server = Server("nats", "nats")
    layout = Layout(out, (server,), cells, installed=INSTALLED)
    layout.write()
    # Its own health check, for those in its container only.
    write(layout.server_folder(server) / "container.conf", 'http: "127.0.0.1:8222"\ninclude "nats-server.conf"\n')
    _database(out)
    _tokens(out)
    _own(out)


def _database(out: Path) -> None:
    """A server's certificate for PostgreSQL; for each service that has a database a password and the settings."""
    folder = out / "postgres"
    authority = Authority(out / "authority", "ca")
    authority.issue(folder / "server.crt", folder / "server.key", names=["DNS:postgres"], usage="serverAuth")
    for service, name in DATABASES.items():
        password = _kept(folder / f"{name}.password")
        settings = {"database": f"postgresql://{name}:{password}@postgres/{name}"}
        write(out / "clients" / service / "settings.json", json.dumps(settings) + "\n", private=True)


def _tokens(out: Path) -> None:
    """An admin's token, for the command line; the list of tokens, for the policy servers; the apps' names, for both."""
    token = _kept(out / "admin" / "token")
    policy_server = out / "clients" / permissions.POLICY_SERVER
    admin = {"token": token, "user": "admin", "scopes": ["network.admin"]}
    write(policy_server / "tokens.json", json.dumps({"tokens": [admin]}) + "\n", private=True)
    apps = [{"guid": app_guid(app), "name": app, "space": "demo", "org": "demo"} for app in APPS]
    for folder in (out / "admin", policy_server):
        write(folder / "directory.json", json.dumps({"apps": apps}, indent=1) + "\n")


def _kept(file: Path) -> str:
    """The secret in `file`, made if there is none."""
    if not file.exists():
        write(file, secrets.token_hex(24) + "\n", private=True)
    return file.read_text().strip()


def _own(out: Path) -> None:
    """Give each folder to the user that reads it. The authorities' keys and the cells' folders stay root's."""
    folders = [
        out / "servers" / "nats",
        out / "postgres",
        out / "admin",
        *(out / "clients" / name for name in DATABASES),
    ]
    for folder in folders:
        for path in (folder, *folder.iterdir()):
            if path.stat().st_uid != SERVICE_UID:
                os.chown(path, SERVICE_UID, SERVICE_UID)
        folder.chmod(0o700)


def main() -> int:
    """The program; its exit code."""
    try:
        cells = tuple(cell_name(name.strip()) for name in os.environ["SILKBUS_CELLS"].split(","))
        make(INSTALLED, cells)
    except KeyError:
        sys.stderr.write("secrets: set SILKBUS_CELLS to the names of all cells, comma-separated\n")
        return 2
    except (Malformed, CertificateError, OSError) as error:
        sys.stderr.write(f"secrets: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
