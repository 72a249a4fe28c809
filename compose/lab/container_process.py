"""What runs inside a container of the lab: an app that listens, and the probes that try to reach others.

    container_process.py serve HANDLE PORT…          listen on TCP and UDP; greet with HANDLE, then echo
    container_process.py connect TIMEOUT TARGET…     try every target once, all at the same time
    container_process.py watch INTERVAL TIMEOUT TARGET…   try every target again and again until stdin ends

A target is `tcp:ADDRESS:PORT` or `udp:ADDRESS:PORT` (watch: TCP only); times are in seconds. Answers are JSON lines on
stdout, times in them are of CLOCK_MONOTONIC, which all namespaces share. Standard library only and in one file, so that
it starts in some 30 ms under `python -IS`; one thread, so that a probe never waits for the interpreter lock.

An outcome is "accepted" (and by whom: the greeting), "refused" (a reset or an ICMP error, named) or "timed out".
"""

import contextlib
import errno
import json
import os
import resource
import select
import selectors
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

ACCEPTED, REFUSED, TIMED_OUT = "accepted", "refused", "timed out"

# Closing with a reset leaves no socket in TIME_WAIT, so a source port is free again when the counter comes round.
LINGER_RESET = struct.pack("ii", 1, 0)
SOURCE_PORTS = range(20_000, 61_000)


class Target(NamedTuple):
    protocol: str
    address: str
    port: int


def parse_target(text: str) -> Target:
    protocol, address, port = text.split(":")
    if protocol not in ("tcp", "udp"):
        raise ValueError(f"target {text!r}: must begin with tcp: or udp:")
    return Target(protocol, address, int(port))


def say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


# serve


def serve(handle: str, ports: list[int]) -> None:
    greeting = f"{handle}\n".encode()
    selector = selectors.DefaultSelector()
    for port in ports:
        listener = socket.create_server(("0.0.0.0", port), backlog=1024)  # noqa: S104 (the container's own namespace)
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ, "listener")
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        datagrams.bind(("0.0.0.0", port))  # noqa: S104
        datagrams.setblocking(False)
        selector.register(datagrams, selectors.EVENT_READ, "datagrams")
    say(ready=True)
    while True:
        for key, _ in selector.select():
            sock: Any = key.fileobj
            try:
                if key.data == "listener":
                    connection, _ = sock.accept()
                    connection.setblocking(False)
                    selector.register(connection, selectors.EVENT_READ, "connection")
                    connection.send(greeting)
                elif key.data == "datagrams":
                    data, sender = sock.recvfrom(65536)
                    sock.sendto(greeting + data, sender)
                elif data := sock.recv(65536):
                    sock.send(data)
                else:
                    selector.unregister(sock)
                    sock.close()
            except BlockingIOError:
                continue
            except OSError:
                if key.data == "connection":
                    selector.unregister(sock)
                    sock.close()


# connect


def connect(timeout: float, targets: list[Target]) -> None:
    """One line: a list with an object for each target: outcome, by (greeting), error, milliseconds."""
    selector = selectors.DefaultSelector()
    results: list[dict[str, Any]] = [{"outcome": TIMED_OUT} for _ in targets]
    begun = time.monotonic()
    sock: Any
    for number, target in enumerate(targets):
        kind = socket.SOCK_STREAM if target.protocol == "tcp" else socket.SOCK_DGRAM
        sock = socket.socket(socket.AF_INET, kind)
        sock.setblocking(False)
        error = sock.connect_ex((target.address, target.port))
        if error not in (0, errno.EINPROGRESS):
            results[number] = {"outcome": REFUSED, "error": errno.errorcode.get(error, str(error)), "milliseconds": 0}
            sock.close()
            continue
        if target.protocol == "udp":
            sock.send(b"probe")
        selector.register(sock, selectors.EVENT_READ, number)
    while selector.get_map() and (left := begun + timeout - time.monotonic()) > 0:
        for key, _ in selector.select(left):
            sock = key.fileobj
            result: dict[str, Any]
            try:
                # Accepted is who sends its greeting: that proves that the right container answered, and both ways.
                greeting = sock.recv(4096).decode(errors="replace").partition("\n")[0]
                result = {"outcome": ACCEPTED, "by": greeting}
            except BlockingIOError:
                continue  # woken for nothing: neither a greeting nor an error yet
            except OSError as error:
                result = {"outcome": REFUSED, "error": errno.errorcode.get(error.errno or 0, str(error))}
            results[key.data] = {**result, "milliseconds": round((time.monotonic() - begun) * 1000, 3)}
            selector.unregister(sock)
            sock.close()
    print(json.dumps(results), flush=True)


# watch


class Attempt:
    """One try to connect, and when the one before it was begun. `outcome` is None while it is open."""

    __slots__ = ("begun", "ended", "error", "outcome", "previous", "sock")

    def __init__(self, sock: socket.socket, begun: float, previous: float) -> None:
        self.sock = sock
        self.begun = begun
        self.previous = previous
        self.ended = 0.0
        self.outcome: str | None = None
        self.error = 0

    def end(self, outcome: str, now: float, error: int = 0) -> None:
        self.outcome, self.ended, self.error = outcome, now, error
        if outcome == ACCEPTED:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
        self.sock.close()


class Watch:
    """Tries each target every `interval` seconds, from a new source port each time, whether or not the last is done.

    Verdicts are taken in the order in which the attempts were begun. A line is written when a target's verdict
    changes, with the gap since the attempt before (what happened within a gap was not seen), and one at the end, with
    counts.
    """

    def __init__(self, interval: float, timeout: float, targets: list[Target]) -> None:
        self.interval, self.timeout, self.targets = interval, timeout, targets
        self.selector = selectors.EpollSelector()
        self.open: list[deque[Attempt]] = [deque() for _ in targets]
        self.verdicts: list[str | None] = [None for _ in targets]
        self.counts: list[dict[str, int]] = [{} for _ in targets]
        self.last: list[float] = [0.0 for _ in targets]
        self.ready = False
        self.source_ports = self._cycle()

    @staticmethod
    def _cycle() -> Iterator[int]:
        while True:
            yield from SOURCE_PORTS

    def run(self) -> None:
        self.selector.register(sys.stdin, selectors.EVENT_READ)
        due = time.monotonic()
        stopping = False
        while not stopping or any(self.open):
            now = time.monotonic()
            if not stopping and now >= due:
                for number in range(len(self.targets)):
                    self.begin(number)
                due = max(due + self.interval, now)
            # epoll itself waits in whole milliseconds; select(2) on it waits as short as is due.
            select.select([self.selector.fileno()], [], [], 0.05 if stopping else max(due - time.monotonic(), 0))
            for key, _ in self.selector.select(0):
                if key.fileobj is sys.stdin:
                    stopping = True
                    self.selector.unregister(sys.stdin)
                else:
                    self.decide(key.data)
            self.report()
        say(counts=self.counts)

    def begin(self, number: int) -> None:
        target = self.targets[number]
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        while True:
            try:
                sock.bind(("", next(self.source_ports)))
                break
            except OSError as problem:
                if problem.errno != errno.EADDRINUSE:
                    raise
        now = time.monotonic()
        attempt = Attempt(sock, now, self.last[number] or now)
        self.last[number] = now
        self.open[number].append(attempt)
        error = sock.connect_ex((target.address, target.port))
        if error == errno.EINPROGRESS:
            self.selector.register(sock, selectors.EVENT_WRITE, attempt)
        else:
            attempt.end(REFUSED if error else ACCEPTED, time.monotonic(), error)

    def decide(self, attempt: Attempt) -> None:
        now = time.monotonic()
        error = attempt.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        self.selector.unregister(attempt.sock)
        attempt.end(REFUSED if error else ACCEPTED, now, error)

    def report(self) -> None:
        now = time.monotonic()
        for number, attempts in enumerate(self.open):
            while attempts:
                attempt = attempts[0]
                if attempt.outcome is None:
                    if now - attempt.begun < self.timeout:
                        break
                    self.selector.unregister(attempt.sock)
                    attempt.end(TIMED_OUT, now)
                attempts.popleft()
                self.count(number, attempt)
        if not self.ready and None not in self.verdicts:
            self.ready = True
            say(ready=True)

    def count(self, number: int, attempt: Attempt) -> None:
        outcome = attempt.outcome
        assert outcome is not None  # noqa: S101 (the caller ended it)
        self.counts[number][outcome] = self.counts[number].get(outcome, 0) + 1
        if outcome != self.verdicts[number]:
            self.verdicts[number] = outcome
            error = errno.errorcode.get(attempt.error, "") if attempt.error else ""
            gap = attempt.begun - attempt.previous
            say(target=number, outcome=outcome, begun=attempt.begun, ended=attempt.ended, gap=gap, error=error)


def main(arguments: list[str]) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    match arguments:
        case ["serve", handle, *ports] if ports:
            serve(handle, [int(port) for port in ports])
        case ["connect", timeout, *targets]:
            connect(float(timeout), [parse_target(text) for text in targets])
        case ["watch", interval, timeout, *targets] if targets:
            with contextlib.suppress(PermissionError):
                # It measures times, so it must not wait for the processor behind what it measures.
                os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
            Watch(float(interval), float(timeout), [parse_target(text) for text in targets]).run()
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
