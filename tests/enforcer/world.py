"""Cells and containers to enforce on: namespaces with real links and a real VXLAN, and sockets inside them.

Sockets are made in a thread that enters the namespace and ends; they stay in it for ever, so the tests use them here.
"""

import asyncio
import itertools
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from ipaddress import IPv4Address, IPv4Network
from typing import TypeVar

from pyroute2 import netns

from bus.messages import AppId, Container, Handle, Stage

T = TypeVar("T")
_numbers = itertools.count()
WAIT = 10.0
"""Seconds that something may take that must happen; nothing is expected to take nearly as long."""


def run(command: str, text: str | None = None) -> str:
    done = subprocess.run(command.split(), input=text, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def inside(namespace: str, work: Callable[[], T]) -> T:
    """Do `work` in a network namespace, in a thread that ends with it."""

    def enter() -> T:
        netns.setns(namespace)
        return work()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(enter).result()


class Namespace:
    def __init__(self, what: str) -> None:
        self.name = f"sbe-{os.getpid()}-{next(_numbers)}-{what}"
        self.servers: list[Echo] = []
        run(f"ip netns add {self.name}")
        self.ip("link set lo up")

    def ip(self, *commands: str) -> None:
        run(f"ip -n {self.name} -batch -", "\n".join(commands))

    def exec(self, command: str, text: str | None = None) -> str:
        return run(f"ip netns exec {self.name} {command}", text)

    def sysctl(self, **values: int) -> None:
        for name, value in values.items():
            self.exec(f"sysctl -qw {name.replace('__', '.')}={value}")

    def close(self) -> None:
        for server in self.servers:
            server.close()
        with suppress(AssertionError):
            run(f"ip netns del {self.name}")


def dial(
    namespace: Namespace, address: IPv4Address | str, port: int, *, source: IPv4Address | None = None
) -> socket.socket:
    """Open a TCP connection from a namespace; from another source address it is not expected to succeed."""

    def connect() -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        made.settimeout(WAIT if source is None else 0.5)
        if source is not None:
            made.bind((str(source), 0))
        try:
            made.connect((str(address), port))
        except OSError:
            made.close()
            raise
        return made

    return inside(namespace.name, connect)


class Box(Namespace):
    """A container: its namespace, its link in its cell, and what it is to the enforcer."""

    def __init__(self, cell: "Cell", number: int, app: str | None) -> None:
        super().__init__(f"box{number}")
        self.sysctl(net__ipv6__conf__default__disable_ipv6=1)
        self.cell = cell
        self.address = cell.subnet[number]
        link = f"s-{int(self.address):012d}"
        cell.ip(
            f"link add {link} type veth peer name eth0 netns {self.name}",
            f"link set {link} up",
            f"addr add 169.254.0.1/32 peer {self.address} dev {link}",
        )
        self.ip(
            f"addr add {self.address}/32 dev eth0",
            "link set eth0 up",
            "route add 169.254.0.1 dev eth0 scope link",
            f"route add default via 169.254.0.1 dev eth0 src {self.address}",
        )
        self.container = Container(
            Handle(self.name),
            f"/run/netns/{self.name}",
            Stage.READY,
            None if app is None else AppId(app),
            self.address,
            link,
        )
        self.link = link

    def serve(self, port: int) -> "Echo":
        return Echo(self, port)

    def tcp(self, to: "Box", port: int, *, source: IPv4Address | None = None) -> socket.socket:
        """Open a connection. Raises ConnectionRefusedError or TimeoutError."""
        return dial(self, to.address, port, source=source)

    def udp(self, to: "Box", port: int) -> socket.socket:
        def connect() -> socket.socket:
            made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            made.settimeout(1.0)
            made.connect((str(to.address), port))
            return made

        return inside(self.name, connect)

    def reaches(self, to: "Box", port: int) -> bool:
        try:
            self.tcp(to, port).close()
        except (ConnectionRefusedError, TimeoutError):
            return False
        return True


def echoes(made: socket.socket) -> bool:
    """Whether what is sent on a connected socket comes back."""
    made.settimeout(1.0)
    try:
        made.send(b"x")
        return made.recv(16) != b""
    except OSError:
        return False


def is_cut(made: socket.socket) -> bool:
    """Whether a flow that was open is dead: some time passes until the far end's reset is here."""
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        if not echoes(made):
            return True
        time.sleep(0.02)
    return False


class Echo:
    """Answers what it gets, on TCP and UDP, in a container or a cell, for as long as that stands.

    Where there are several addresses, datagrams are answered from the one they came to only if it is given.
    """

    def __init__(self, namespace: Namespace, port: int, address: str = "0.0.0.0") -> None:  # noqa: S104
        def listen() -> tuple[socket.socket, socket.socket]:
            stream = socket.create_server((address, port))
            datagram = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            datagram.bind((address, port))
            return stream, datagram

        self.stream, self.datagram = inside(namespace.name, listen)
        self.connections: list[socket.socket] = []
        namespace.servers.append(self)
        threading.Thread(target=self._accept, daemon=True).start()
        threading.Thread(target=self._answer, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self.stream.accept()
                self.connections.append(connection)
                threading.Thread(target=self._repeat, args=(connection,), daemon=True).start()

    def _repeat(self, connection: socket.socket) -> None:
        with suppress(OSError), connection:
            while data := connection.recv(1024):
                connection.send(data)

    def _answer(self) -> None:
        while True:
            try:
                data, peer = self.datagram.recvfrom(1024)
            except OSError:
                if self.datagram.fileno() < 0:
                    return
                continue
            if peer is None:  # closed
                return
            with suppress(OSError):
                self.datagram.sendto(data, peer)

    def close(self) -> None:
        for sock in (self.stream, self.datagram, *self.connections):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


class Cell(Namespace):
    """A cell: its own namespace, its subnet of the overlay, its VTEP."""

    def __init__(self, number: int, network: "Network") -> None:
        super().__init__(f"cell{number}")
        self.number = number
        self.network = network
        self.subnet = IPv4Network(f"10.255.{number}.0/24")
        self.underlay = IPv4Address(f"10.77.0.{number}")
        self.boxes: list[Box] = []
        self._box_numbers = itertools.count(2)
        # Without IPv6 on the links nobody sends unasked, and counters stand still.
        self.sysctl(net__ipv4__ip_forward=1, net__ipv6__conf__default__disable_ipv6=1)
        run(f"ip -n {network.name} link add u{number} type veth peer name under netns {self.name}")
        run(f"ip -n {network.name} link set u{number} up master br0")
        self.ip(
            f"addr add {self.underlay}/24 dev under",
            "link set under up",
            f"link add silk-vtep type vxlan id 1 local {self.underlay} dstport 4789 nolearning gbp dev under",
            f"link set silk-vtep address {self.mac} up",
            f"addr add {self.subnet[0]}/32 dev silk-vtep",
        )

    @property
    def mac(self) -> str:
        return "ee:ee:" + self.subnet[0].packed.hex(":")

    def knows(self, other: "Cell") -> None:
        self.ip(
            f"route add {other.subnet} via {other.subnet[0]} dev silk-vtep onlink src {self.subnet[0]}",
            f"neigh replace {other.subnet[0]} lladdr {other.mac} dev silk-vtep nud permanent",
        )
        run(f"bridge -n {self.name} fdb replace {other.mac} dev silk-vtep dst {other.underlay}")

    def box(self, app: str | None) -> Box:
        made = Box(self, next(self._box_numbers), app)
        self.boxes.append(made)
        return made

    def saved(self, kind: str, *, counters: bool = False) -> str:
        """All rules, without the lines that hold the time."""
        text = ""
        for program in (f"iptables-{kind}-save", f"ip6tables-{kind}-save"):
            for table in ("raw", "mangle", "filter"):
                text += self.exec(f"{program} {'-c' if counters else ''} -t {table}")
        lines = (line for line in text.splitlines() if not line.startswith("#"))
        return "\n".join(line if counters or line[:1] != ":" else line.split(" [")[0] for line in lines)

    def close(self) -> None:
        for box in self.boxes:
            box.close()
        super().close()


class Network(Namespace):
    """The underlay: a bridge in a namespace of its own."""

    def __init__(self) -> None:
        super().__init__("under")
        self.ip("link add br0 type bridge", "link set br0 up")


@contextmanager
def cells(count: int) -> Iterator[list[Cell]]:
    """So many cells that know one another."""
    network = Network()
    made: list[Cell] = []
    try:
        made.extend(Cell(number, network) for number in range(1, count + 1))
        for one in made:
            for other in made:
                if one is not other:
                    one.knows(other)
        yield made
    finally:
        for cell in made:
            cell.close()
        network.close()


async def until(happened: Callable[[], bool]) -> None:
    """Wait for something that must happen."""
    async with asyncio.timeout(WAIT):
        while not happened():
            await asyncio.sleep(0.05)
