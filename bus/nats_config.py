"""`silkbus nats-config`: everything nats-server needs so that each service may do its own part and no more.

Written to a folder: one sub-folder for each server and each client, to be carried to where it is used, and one with
the authorities' keys, to be kept. Run again with another list it adds to what is there: no key is made twice, so nobody
else is touched; servers take up the new list with `nats-server --signal reload`. Who is no more in the list is let in
no more.

Servers talk among themselves under an authority of their own: with a client's certificate nobody becomes a server.
"""

import argparse
import ipaddress
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bus import permissions
from bus.certificates import Authority, CertificateError, write
from bus.decode import Malformed
from bus.messages import cell_name
from bus.permissions import Grant, User

USAGE = 2
ANSWER_SECONDS = 60
CLIENT_PORT = 4222
ROUTE_PORT = 6222
_HOST = re.compile(r"[A-Za-z0-9.-]+")


@dataclass(frozen=True, slots=True)
class Server:
    """One nats-server: `NAME=HOST[:PORT[:ROUTE_PORT]]` on the command line. HOST is a name or an IPv4 address."""

    name: str
    host: str
    port: int = CLIENT_PORT
    route_port: int = ROUTE_PORT

    @classmethod
    def parse(cls, text: str) -> "Server":
        """Raises Malformed."""
        name, _, address = text.partition("=")
        host, *ports = address.split(":")
        try:
            numbers = [int(port) for port in ports]
        except ValueError:
            numbers = [0]
        if not _HOST.fullmatch(host) or len(numbers) > 2 or not all(0 < port < 65536 for port in numbers):
            raise Malformed(f"server {text!r}: must be NAME=HOST[:PORT[:ROUTE_PORT]], HOST a name or an IPv4 address")
        return cls(cell_name(name), host, *numbers)

    @property
    def certificate_name(self) -> str:
        try:
            return f"IP:{ipaddress.IPv4Address(self.host)}"
        except ValueError:
            return f"DNS:{self.host}"


@dataclass(frozen=True, slots=True)
class Layout:
    """What is to be written, and where. `installed` is the folder that a server's files will be in on its machine."""

    out: Path
    servers: tuple[Server, ...]
    cells: tuple[str, ...]
    readers: tuple[str, ...] = ()
    installed: Path | None = None

    def users(self) -> list[User]:
        return [
            permissions.central(permissions.POLICY_SERVER),
            permissions.central(permissions.SILK_CONTROLLER),
            permissions.operator(),
            *(permissions.cell(name) for name in self.cells),
            *(permissions.reader(name) for name in self.readers),
        ]

    def server_folder(self, server: Server) -> Path:
        return self.out / "servers" / server.name

    def client_folder(self, user: User) -> Path:
        return self.out / "clients" / user.role / user.name

    def write(self) -> list[Path]:
        """Write it all, keeping what is good; the files that are new or changed. Raises CertificateError, OSError."""
        secrets = self.out / "authority"
        secrets.mkdir(parents=True, exist_ok=True)
        secrets.chmod(0o700)
        authority, routes = Authority(secrets, "ca"), Authority(secrets, "routes-ca")
        authority.ensure()
        routes.ensure()
        changed: list[Path] = []

        def put(file: Path, text: str) -> None:
            if write(file, text):
                changed.append(file)

        def issue(by: Authority, folder: Path, name: str, names: Sequence[str], usage: str) -> None:
            if by.issue(folder / f"{name}.crt", folder / f"{name}.key", names=names, usage=usage):
                changed.append(folder / f"{name}.crt")
            put(folder / f"{by.name}.crt", by.certificate.read_text())

        users = self.users()
        for server in self.servers:
            folder = self.server_folder(server)
            issue(authority, folder, "server", [server.certificate_name], "serverAuth")
            if len(self.servers) > 1:
                issue(routes, folder, "route", [server.certificate_name], "serverAuth, clientAuth")
            put(folder / "nats-server.conf", self.server_conf(server))
            put(folder / "accounts.conf", accounts_conf(users))
        for user in users:
            issue(authority, self.client_folder(user), "client", [f"DNS:{user.identity}"], "clientAuth")
        return changed

    def server_conf(self, server: Server) -> str:
        """The configuration of one server, but for who may do what."""
        at = self.installed or self.server_folder(server).resolve()
        lines = [
            f"# nats-server {server.name}; written by `silkbus nats-config`, which writes it again.",
            f'server_name: "{server.name}"',
            f'listen: "0.0.0.0:{server.port}"',
            "",
            "# Whoever hangs is forgotten in seconds, not minutes: till then it is sent its share of all questions.",
            'ping_interval: "5s"',
            "ping_max: 2",
            "",
            "# Mutual TLS: who a client is, is the DNS name in its certificate, signed by our authority.",
            "tls {",
            f'  cert_file: "{at}/server.crt"',
            f'  key_file: "{at}/server.key"',
            f'  ca_file: "{at}/ca.crt"',
            "  verify_and_map: true",
            "  timeout: 5",
            "}",
            "",
            "# The streams of events. Nothing depends on them: they are filled again from SQL.",
            "jetstream {",
            f'  store_dir: "{at}/jetstream"',
            "}",
        ]
        others = [other for other in self.servers if other != server]
        if others:
            lines += [
                "",
                "# Only servers have certificates of the authority of routes: a client's is worth nothing here.",
                "cluster {",
                '  name: "silkbus"',
                f'  listen: "0.0.0.0:{server.route_port}"',
                "  routes: [",
                *(f'    "tls://{other.host}:{other.route_port}"' for other in others),
                "  ]",
                '  ping_interval: "2s"',
                "  ping_max: 2",
                "  tls {",
                f'    cert_file: "{at}/route.crt"',
                f'    key_file: "{at}/route.key"',
                f'    ca_file: "{at}/routes-ca.crt"',
                "    verify: true",
                "    timeout: 5",
                "  }",
                "}",
            ]
        return "\n".join([*lines, "", 'include "accounts.conf"', ""])


def accounts_conf(users: Iterable[User]) -> str:
    """Accounts, users and their permissions, each with its reason; the same for all servers."""
    readers = [user for user in users if user.role == permissions.READER]
    services = [service for user in readers for service in permissions.reader_services(user.name)]
    lines = [
        "# Who may do what; written by `silkbus nats-config`, which writes it again.",
        "# What a list does not have is not allowed.",
        "accounts {",
        "  SILKBUS {",
        "    jetstream: enabled",
        "    users: [",
        *(line for user in users if user.role != permissions.READER for line in _user(user)),
        "    ]",
    ]
    if readers:
        lines += [
            "    # What readers may ask from their own account, where the answers go and can go no further.",
            "    exports: [",
            *(
                f'      {{ service: "{subject}", accounts: [READERS], response_type: {_answer(several)} }}'
                for _, subject, several in services
            ),
            "    ]",
            "  }",
            "  READERS {",
            "    users: [",
            *(line for user in readers for line in _user(user)),
            "    ]",
            "    imports: [",
            *(f'      {{ service: {{ account: SILKBUS, subject: "{subject}" }} }}' for _, subject, _ in services),
            "    ]",
        ]
    return "\n".join([*lines, "  }", "}", ""])


def _answer(several: bool) -> str:
    return "stream" if several else "single"


def _user(user: User) -> list[str]:
    lines = [
        "      {",
        f'        user: "{user.identity}"',
        "        permissions: {",
        *_grants("publish", user.publish),
        *_grants("subscribe", user.subscribe),
    ]
    if user.answers:
        lines += [
            f"          # it may answer what it is asked, in many parts, for {ANSWER_SECONDS} s",
            f'          allow_responses: {{ max: -1, expires: "{ANSWER_SECONDS}s" }}',
        ]
    return [*lines, "        }", "      }"]


def _grants(verb: str, grants: Sequence[Grant]) -> list[str]:
    lines = [f"          {verb}: ["]
    for grant in grants:
        lines.append(f"            # {grant.why}")
        lines += [f'            "{subject}"' for subject in grant.subjects]
    return [*lines, "          ]"]


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(cell_name(part.strip()) for part in text.split(",") if part.strip()))


def main(argv: list[str]) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(
        "silkbus nats-config",
        description="Write nats-server's configuration with least permissions, and certificates for mutual TLS.",
        epilog="Run it again to add or leave out a cell: keys that exist are kept, and nobody else is touched.",
    )
    parser.add_argument("--cells", required=True, metavar="NAME,…", help="all cells")
    parser.add_argument("--readers", default="", metavar="NAME,…", help="all other components that read events")
    parser.add_argument(
        "--servers",
        default="nats=127.0.0.1",
        metavar="NAME=HOST[:PORT[:ROUTE_PORT]],…",
        help=f"all NATS servers, several make a cluster [nats=127.0.0.1:{CLIENT_PORT}:{ROUTE_PORT}]",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--installed", type=Path, metavar="DIR", help="where a server's files will be on its machine [where written]"
    )
    arguments = parser.parse_args(argv)
    try:
        servers = tuple(Server.parse(text.strip()) for text in arguments.servers.split(",") if text.strip())
        layout = Layout(arguments.out, servers, _names(arguments.cells), _names(arguments.readers), arguments.installed)
        if not servers or len({server.name for server in servers}) != len(servers):
            raise Malformed("--servers: at least one server, each with a name of its own")
        changed = layout.write()
    except Malformed as error:
        sys.stderr.write(f"silkbus nats-config: {error}\n")
        return USAGE
    except (CertificateError, OSError) as error:
        sys.stderr.write(f"silkbus nats-config: {error}\n")
        return 1
    for file in changed:
        sys.stdout.write(f"{file}\n")
    sys.stdout.write(f"{len(changed)} files written; each server and client needs only its own folder\n")
    return 0
