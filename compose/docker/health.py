"""A container's health check: asks the services at these places, and says what is missing; exit code 0 or 1.

    python health.py PLACE…      unix:SOCKET, asked for /readyz; or http:HOST:PORT/PATH

Standard library only, run by its file: Docker starts it every few seconds in each container.
"""

import http.client
import socket
import sys

TIMEOUT = 5.0


class _Unix(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT)
        self.sock.connect(self.host)


def connection(place: str) -> http.client.HTTPConnection:
    """To `unix:SOCKET` or `http:HOST:PORT`. Raises ValueError."""
    kind, _, where = place.partition(":")
    if kind == "unix":
        unix = _Unix("localhost", timeout=TIMEOUT)
        unix.host = where
        return unix
    host, _, port = where.rpartition(":")
    if kind == "http" and host:
        return http.client.HTTPConnection(host, int(port), timeout=TIMEOUT)
    raise ValueError(f"{place!r}: must be unix:SOCKET or http:HOST:PORT/PATH")


def get(place: str, path: str) -> tuple[int, bytes]:
    """GET `path` there: status and body. Raises OSError or HTTPException when there is no answer, ValueError."""
    asked = connection(place)
    try:
        asked.request("GET", path, headers={"Host": "localhost"})
        answer = asked.getresponse()
        return answer.status, answer.read()
    finally:
        asked.close()


def problem(place: str) -> str | None:
    """What is missing there, or None."""
    try:
        path = "/readyz"
        if place.startswith("http:"):
            place, slash, rest = place.partition("/")
            path = slash + rest or path
        status, body = get(place, path)
        return None if status == 200 else body.decode(errors="replace").strip()
    except (OSError, ValueError, http.client.HTTPException) as error:
        return str(error) or repr(error)


def main(places: list[str]) -> int:
    """The program; its exit code."""
    if not places:
        sys.stderr.write("usage: health.py PLACE…\n")
        return 2
    missing = [f"{place}: {text}" for place in places if (text := problem(place)) is not None]
    for line in missing:
        print(line)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
