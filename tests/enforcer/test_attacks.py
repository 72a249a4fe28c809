"""What containers may try, alone or together, to reach what no policy allows, seen with real packets on two cells."""

import asyncio
import socket
import struct

import pytest

from tests.enforcer.conftest import enforcing, tags, tcp, udp
from tests.enforcer.world import Box, Cell, echoes, inside, run

pytestmark = pytest.mark.kernel
KNOWN = tags(web=1, api=0x1234, db=3)


def bound(box: Box, port: int, kind: socket.SocketKind = socket.SOCK_DGRAM, protocol: int = 0) -> socket.socket:
    def make() -> socket.socket:
        made = socket.socket(socket.AF_INET, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((str(box.address), port))
        made.settimeout(0.5)
        return made

    return inside(box.name, make)


def heard(receiver: socket.socket, word: bytes) -> bool:
    """Whether a datagram with `word` in it comes."""
    try:
        while True:
            if word in receiver.recv(2048):
                return True
    except (TimeoutError, ConnectionRefusedError):
        return False


def try_send(sender: socket.socket, word: bytes, box: Box, port: int) -> None:
    for _ in range(2):  # a pending ICMP error is reported by the first
        try:
            sender.sendto(word, (str(box.address), port))
        except ConnectionRefusedError:
            continue
        return


def echo(kind: int, content: bytes) -> bytes:
    """An ICMP echo request (8) or reply (0), with a right checksum (RFC 792)."""
    content += b"\0" * (len(content) % 2)
    body = struct.pack("!HH", 0x1234, 1) + content
    total = (kind << 8) + sum(int.from_bytes(body[n : n + 2], "big") for n in range(0, len(body), 2))
    total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!BBH", kind, 0, ~(total + (total >> 16)) & 0xFFFF) + body


async def test_two_ends_cannot_open_a_datagram_flow_by_each_sending_first(two_cells: list[Cell], kind: str) -> None:
    """Each cell would take what comes for the answer to what its own container sent."""
    near, far = two_cells
    web, api = near.box("web"), far.box("api")
    async with enforcing(near, kind, known=KNOWN), enforcing(far, kind, known=KNOWN):
        client, server = bound(web, 5000), bound(api, 8080)
        for _ in range(2):
            try_send(server, b"punch", web, 5000)
            try_send(client, b"punch", api, 8080)
        assert not heard(client, b"punch")
        assert not heard(server, b"punch")


async def test_two_ends_cannot_open_a_stream_at_once(two_cells: list[Cell], kind: str) -> None:
    near, far = two_cells
    web, api = near.box("web"), far.box("api")
    for box in (web, api):
        # A refusal by ICMP would end the attempt; a hostile container does not listen to it.
        box.exec("iptables-nft -I INPUT -p icmp -j DROP")
    async with enforcing(near, kind, known=KNOWN), enforcing(far, kind, known=KNOWN):
        client, server = bound(web, 5000, socket.SOCK_STREAM), bound(api, 8080, socket.SOCK_STREAM)
        for each, peer, port in ((client, api, 8080), (server, web, 5000)):
            each.setblocking(False)
            each.connect_ex((str(peer.address), port))
        await asyncio.sleep(3)  # each repeats its SYN after 1 s
        for each in (client, server):
            with pytest.raises(OSError, match="not connected"):
                each.getpeername()


async def test_an_echo_reply_answers_only_what_was_let_in(two_cells: list[Cell], kind: str) -> None:
    near, far = two_cells
    web, api = near.box("web"), far.box("api")
    async with enforcing(near, kind, known=KNOWN), enforcing(far, kind, known=KNOWN):
        ends = {box: bound(box, 0, socket.SOCK_RAW, socket.IPPROTO_ICMP) for box in (web, api)}
        ends[api].sendto(echo(8, b"asked"), (str(web.address), 0))
        ends[web].sendto(echo(0, b"smuggled"), (str(api.address), 0))
        assert not heard(ends[web], b"asked")
        assert not heard(ends[api], b"smuggled")


async def test_an_address_given_again_inherits_no_flow_of_another_cell(two_cells: list[Cell], kind: str) -> None:
    """The far cell is not told that the address has another container: it must see it by the tag."""
    near, far = two_cells
    web, api = near.box("web"), far.box("api")
    api.serve(8080)
    known = {**KNOWN, ("policy", "api", "web"): (udp(8080), tcp(8080))}
    async with enforcing(near, kind, known=known) as enforcer, enforcing(far, kind, known=known):
        client = bound(web, 5000)
        client.connect((str(api.address), 8080))
        assert echoes(client)
        await enforcer.reconciler.forget(web.container.handle)
        run(f"ip -n {near.name} link del {web.link}")
        near._box_numbers = iter([2])
        other = near.box("db")
        assert other.address == web.address
        await enforcer.reconciler.admit(other.container)
        heir = bound(other, 5000)
        heir.connect((str(api.address), 8080))
        assert not echoes(heir)


async def test_an_address_given_again_answers_nobody_for_its_last_container(two_cells: list[Cell], kind: str) -> None:
    near, far = two_cells
    web, api = near.box("web"), far.box("api")
    api.serve(8080)
    known = {**KNOWN, ("policy", "api", "web"): (udp(8080),)}
    async with enforcing(near, kind, known=known), enforcing(far, kind, known=known) as enforcer:
        client = bound(web, 5000)
        try_send(client, b"hello", api, 8080)
        assert heard(client, b"hello")
        await enforcer.reconciler.forget(api.container.handle)
        run(f"ip -n {far.name} link del {api.link}")
        far._box_numbers = iter([2])
        other = far.box("db")
        await enforcer.reconciler.admit(other.container)
        try_send(bound(other, 8080), b"smuggled", web, 5000)
        assert not heard(client, b"smuggled")


async def test_nobody_of_the_underlay_sends_into_the_overlay(two_cells: list[Cell], kind: str) -> None:
    near, far = two_cells
    web, api = near.box("web"), far.box("api")
    api.serve(8080)
    known = {**KNOWN, ("policy", "api", "web"): (udp(8080),)}
    async with enforcing(near, kind, known=known), enforcing(far, kind, known=known):
        client = bound(web, 5000)
        client.connect((str(api.address), 8080))
        assert echoes(client)
        listener = inside(api.name, lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP))
        listener.settimeout(0.5)
        # A host of the underlay that routes the overlay to a cell, with a container's address.
        near.network.ip(
            "addr add 10.77.0.99/24 dev br0",
            f"route add {api.address} via {near.underlay}",
            f"addr add {web.address}/32 dev lo",
        )
        for cell in (near, far):
            cell.sysctl(net__ipv4__conf__all__rp_filter=0, net__ipv4__conf__under__rp_filter=0)
        intruder = inside(near.network.name, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        intruder.bind((str(web.address), 5000))
        intruder.sendto(b"smuggled", (str(api.address), 8080))
        assert not heard(listener, b"smuggled")
