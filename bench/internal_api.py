"""What one internal API's server answers in a second: `python -m bench.internal_api [--seconds N] [--policies N]`.

The real server process over SQLite, 10 000 policies of 2 000 apps, asked over mutual TLS on kept connections by two
client processes on this same machine: the clients' TLS and reading are part of the cost, so what is measured is less
than what the server could do alone. The clients read answers with as little as Python allows: blocking sockets, lengths
from the header, bodies thrown away.
"""

import argparse
import multiprocessing
import random
import ssl
import tempfile
import time
import uuid
from pathlib import Path

from tests.policy.internal import INTERNAL, InternalServer
from tests.policy.server import POLICIES, PolicyServer, body, policy

CLIENTS = 2
APPS = 2_000
IDS = 100
CELLS = 50
"""How many different lists of ids are asked for."""


def ask(
    port: int,
    folder: Path,
    authority: Path,
    requests: list[bytes],
    seconds: float,
    counts: "multiprocessing.Queue[int]",
) -> None:
    context = ssl.create_default_context(cafile=str(authority))
    context.load_cert_chain(folder / "agent.crt", folder / "agent.key")
    import socket

    done = 0
    with context.wrap_socket(socket.create_connection(("127.0.0.1", port)), server_hostname="127.0.0.1") as connection:
        stream = connection.makefile("rb", buffering=1 << 18)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            connection.sendall(requests[done % len(requests)])
            status = stream.readline()
            if not status.startswith((b"HTTP/1.1 200", b"HTTP/1.1 304")):
                raise AssertionError(status)
            length = 0
            while (line := stream.readline()) != b"\r\n":
                if line[:15].lower() == b"content-length:":
                    length = int(line[15:])
            if length:
                stream.read(length)
            done += 1
    counts.put(done)


def measure(server: InternalServer, name: str, requests: list[bytes], seconds: float) -> None:
    counts: multiprocessing.Queue[int] = multiprocessing.Queue()
    arguments = (server.port, server.folder, server.authority.certificate, requests, seconds, counts)
    clients = [multiprocessing.Process(target=ask, args=arguments) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    total = sum(counts.get(timeout=seconds + 60) for _ in clients)
    for client in clients:
        client.join()
    print(f"{name:28} {total / seconds:8.0f} /s")


def request(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET {INTERNAL}/{path} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--policies", type=int, default=10_000)
    arguments = parser.parse_args()
    chance = random.Random(1)  # noqa: S311 (the same each time)
    apps = [str(uuid.UUID(int=chance.getrandbits(128), version=4)) for _ in range(APPS)]
    pairs: set[tuple[str, str]] = set()
    while len(pairs) < arguments.policies:
        pairs.add((chance.choice(apps), chance.choice(apps)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        external = PolicyServer(folder)
        internal = InternalServer(folder, external.database)
        try:
            external.start()
            wanted = sorted(pairs)
            with external.client() as api:
                for start in range(0, len(wanted), 2_000):
                    some = [policy(*pair) for pair in wanted[start : start + 2_000]]
                    api.post(POLICIES, json=body(*some)).raise_for_status()
            external.stop()
            internal.start()
            with internal.client() as agent:
                whole = agent.get(f"{INTERNAL}/policies", headers={"Accept-Encoding": "identity"})
                if whole.json()["total_policies"] != arguments.policies:
                    raise SystemExit("the internal API does not list what was put in")
                etag = whole.headers["etag"]
                packed = agent.get(f"{INTERNAL}/policies")
                size = f"{len(whole.content)} bytes, packed {packed.headers['content-length']}"
            questions = [request(f"policies?id={','.join(chance.sample(apps, IDS))}") for _ in range(CELLS)]
            print(f"{arguments.policies} policies: {size}; {CLIENTS} clients on this machine")
            gzip = "Accept-Encoding: gzip"
            measure(internal, "full, gzip", [request("policies", gzip)], arguments.seconds)
            measure(internal, "full, identity", [request("policies")], arguments.seconds)
            measure(
                internal,
                f"{IDS} ids, gzip",
                [q[:-2] + f"{gzip}\r\n\r\n".encode() for q in questions],
                arguments.seconds,
            )
            measure(internal, f"{IDS} ids, identity", questions, arguments.seconds)
            measure(internal, "304", [request("policies", f"If-None-Match: {etag}")], arguments.seconds)
            measure(internal, "policies_last_updated", [request("policies_last_updated")], arguments.seconds)
        finally:
            external.close()
            internal.close()


if __name__ == "__main__":
    main()
