"""What containers may try, alone or together, to reach what no policy allows, seen with real packets on two cells."""

import asyncio
import socket
import struct
from contextlib import suppress
from ipaddress import IPv4Address

import pytest

from tests.enforcer.conftest import enforcing, tags, tcp, udp
from tests.enforcer.world import Box, Cell, Echo, dial, echoes, inside, is_cut, run

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
            if word in receiver.recv(8192):
                return True
    except (TimeoutError, ConnectionRefusedError):
        return False


def try_send(sender: socket.socket, word: bytes, to: Box | IPv4Address | str, port: int) -> None:
    address = str(to.address if isinstance(to, Box) else to)
    for _ in range(2):  # a pending ICMP error is reported by the first
        try:
            sender.sendto(word, (address, port))
        except ConnectionRefusedError:
            continue
        return


def echo(kind: int, content: bytes) -> bytes:
    """An ICMP echo request (8) or reply (0), with a right checksum (RFC 792)."""
    return icmp(kind, 0, struct.pack("!HH", 0x1234, 1) + content)


def unreachable(sender: tuple[Box, int], receiver: tuple[Box, int], word: bytes) -> bytes:
    """The ICMP error (RFC 792) that a UDP datagram from one to the other met a closed port; with a word to smuggle."""
    ends = sender[0].address.packed + receiver[0].address.packed
    quoted = struct.pack("!BBHHHBBH", 0x45, 0, 28 + len(word), 1, 0, 64, socket.IPPROTO_UDP, 0) + ends
    return icmp(3, 3, b"\0" * 4 + quoted + struct.pack("!HHHH", sender[1], receiver[1], 8 + len(word), 0) + word)


def icmp(kind: int, code: int, body: bytes) -> bytes:
    body += b"\0" * (len(body) % 2)
    total = (kind << 8) + code + sum(int.from_bytes(body[n : n + 2], "big") for n in range(0, len(body), 2))
    total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!BBH", kind, code, ~(total + (total >> 16)) & 0xFFFF) + body


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


def raw_icmp(box: Box) -> socket.socket:
    return bound(box, 0, socket.SOCK_RAW, socket.IPPROTO_ICMP)


async def test_errors_are_no_way_between_ends_that_each_sent_first(two_cells: list[Cell], kind: str) -> None:
    """To each cell they belong to what its own container sent."""
    near, far = two_cells
    web, api = near.box("web"), far.box("api")
    async with enforcing(near, kind, known=KNOWN), enforcing(far, kind, known=KNOWN):
        client, server = bound(web, 5000), bound(api, 8080)
        try_send(client, b"punch", api, 8080)
        try_send(server, b"punch", web, 5000)
        listener = raw_icmp(web)
        raw_icmp(api).sendto(unreachable((web, 5000), (api, 8080), b"smuggled"), (str(web.address), 0))
        assert not heard(listener, b"smuggled")


async def test_errors_come_back_for_what_was_let_in(two_cells: list[Cell], kind: str) -> None:
    near, far = two_cells
    web, api = near.box("web"), far.box("api")
    known = {**KNOWN, ("policy", "api", "web"): (udp(8080),)}
    async with enforcing(near, kind, known=known), enforcing(far, kind, known=known):
        with web.udp(api, 8080) as client:  # nobody listens
            client.send(b"x")
            with pytest.raises(ConnectionRefusedError):
                client.recv(16)
        # And the other way: an answer that its asker does not wait for any more.
        listener, server = raw_icmp(api), bound(api, 8080)
        client = bound(web, 5000)
        client.sendto(b"asked", (str(api.address), 8080))
        assert heard(server, b"asked")
        client.close()
        server.sendto(b"late", (str(web.address), 5000))
        assert heard(listener, b"late")


async def test_an_address_given_again_sends_no_errors_about_flows_of_its_last_container(
    two_cells: list[Cell], kind: str
) -> None:
    near, far = two_cells
    web, api = near.box("web"), far.box("api")
    known = {**KNOWN, ("policy", "api", "web"): (udp(8080),)}
    async with enforcing(near, kind, known=known) as enforcer, enforcing(far, kind, known=known):
        server = bound(api, 8080)
        try_send(bound(web, 5000), b"asked", api, 8080)
        assert heard(server, b"asked")
        await enforcer.reconciler.forget(web.container.handle)
        run(f"ip -n {near.name} link del {web.link}")
        near._box_numbers = iter([2])
        other = near.box("db")
        await enforcer.reconciler.admit(other.container)
        # A flow of its own by the same ports, so that its own cell sees no harm in an error about the answer.
        try_send(bound(other, 5000), b"mine", api, 8080)
        listener = raw_icmp(api)
        raw_icmp(other).sendto(unreachable((api, 8080), (other, 5000), b"smuggled"), (str(api.address), 0))
        assert not heard(listener, b"smuggled")


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


async def test_no_host_is_reached_whatever_its_address(two_cells: list[Cell], kind: str) -> None:
    near, far = two_cells
    web = near.box("web")
    hosts = ["169.254.0.1", near.underlay, far.underlay, near.subnet[0], far.subnet[0]]
    async with enforcing(near, kind, known=KNOWN), enforcing(far, kind, known=KNOWN):
        near.network.ip("addr add 10.77.0.99/24 dev br0")
        for cell in two_cells:
            Echo(cell, 22)
            # The way back from the underlay, so that only rules can be what is in the way.
            cell.network.ip(f"route add {cell.subnet} via {cell.underlay}")
        far.ip(f"route add {web.address} via {near.underlay}")
        for host in hosts:
            with pytest.raises((ConnectionRefusedError, TimeoutError)):
                dial(web, host, 22, source=web.address)
            made = bound(web, 0)
            try_send(made, b"asked", host, 22)
            assert not heard(made, b"asked"), host
        with pytest.raises((ConnectionRefusedError, TimeoutError)):
            dial(far.network, web.address, 22, source=IPv4Address("10.77.0.99"))


async def test_other_protocols_fragments_and_own_address(cell: Cell, kind: str) -> None:
    """A policy is for one protocol and port; nothing else of the two containers meets."""
    web, api = cell.box("web"), cell.box("api")
    known = {**KNOWN, ("policy", "api", "web"): (udp(8080),)}
    async with enforcing(cell, kind, known=known):
        for protocol in (1, 4, 47, 132, 255):
            ends = {
                box: inside(box.name, lambda p=protocol: socket.socket(socket.AF_INET, socket.SOCK_RAW, p))
                for box in (web, api)
            }
            ends[api].settimeout(0.3)
            with suppress(OSError):
                ends[web].sendto(b"\x08\0\0\0smuggled", (str(api.address), 0))
            assert not heard(ends[api], b"smuggled"), protocol
        listener, closed, sender = bound(api, 8080), bound(api, 9090), bound(web, 5000)
        for size in (100, 4000):
            try_send(sender, b"x" * size, api, 8080)
            assert heard(listener, b"x" * size)
            try_send(sender, b"y" * size, api, 9090)
            assert not heard(closed, b"y" * size)


async def test_a_half_open_and_a_silent_flow_are_cut(two_cells: list[Cell], kind: str) -> None:
    near, far = two_cells
    web, api = near.box("web"), far.box("api")
    server = api.serve(8080)
    known = {**KNOWN, ("policy", "api", "web"): (tcp(8080), tcp(8081), udp(8080))}
    async with enforcing(near, kind, known=known), enforcing(far, kind, known=known) as enforcer:
        silent, stream = bound(web, 5000), web.tcp(api, 8080)
        silent.connect((str(api.address), 8080))
        assert echoes(silent)
        assert echoes(stream)
        # The SYN is let in, and lost in the container: the handshake goes on after the policy is gone.
        api.exec("iptables-nft -I INPUT -p tcp --dport 8081 -j DROP")
        half = bound(web, 5001, socket.SOCK_STREAM)
        api.serve(8081)
        half.setblocking(False)
        half.connect_ex((str(api.address), 8081))
        await asyncio.sleep(0.3)
        await enforcer.allow("web", "api")
        api.exec("iptables-nft -F INPUT")
        await asyncio.sleep(2.5)
        with pytest.raises(OSError, match="not connected"):
            half.getpeername()
        server.datagram.sendto(b"unasked", (str(web.address), 5000))
        assert not heard(silent, b"unasked")
        assert is_cut(silent)
        assert is_cut(stream)


async def test_who_is_cut_off_hears_of_it_across_cells(two_cells: list[Cell], kind: str) -> None:
    """The reset is the far cell's own word, and must not be dropped as an answer that nobody let in."""
    near, far = two_cells
    web, api = near.box("web"), far.box("api")
    api.serve(8080)
    known = {**KNOWN, ("policy", "api", "web"): (tcp(8080), udp(8080))}
    async with enforcing(near, kind, known=known), enforcing(far, kind, known=known) as enforcer:
        stream, datagrams = web.tcp(api, 8080), web.udp(api, 8080)
        assert echoes(stream)
        assert echoes(datagrams)
        await enforcer.allow("web", "api")
        for flow, error in ((stream, ConnectionResetError), (datagrams, ConnectionRefusedError)):
            flow.settimeout(5)
            with pytest.raises(error):  # noqa: PT012 (told at once, or with what is sent next)
                flow.send(b"x")
                flow.recv(16)
        with pytest.raises(ConnectionRefusedError):
            web.tcp(api, 8080)


async def test_ipv6_reaches_nothing(cell: Cell, kind: str) -> None:
    """A container may give itself addresses; its cell's end may have got one too."""
    web, api = cell.box("web"), cell.box("api")
    for number, box in enumerate((web, api), 1):
        box.sysctl(net__ipv6__conf__eth0__disable_ipv6=0, net__ipv6__conf__eth0__accept_dad=0)
        cell.sysctl(**{f"net__ipv6__conf__{box.link}__disable_ipv6": 0})
        box.ip(
            f"addr add fd00:{number}::2/64 dev eth0 nodad", f"route add default via fd00:{number}::1 dev eth0 onlink"
        )
        cell.ip(f"addr add fd00:{number}::1/64 dev {box.link} nodad")
    cell.sysctl(net__ipv6__conf__all__forwarding=1)

    def listening(where: str) -> socket.socket:
        def make() -> socket.socket:
            made = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
            made.bind(("::", 8080))
            made.settimeout(0.5)
            return made

        return inside(where, make)

    ends = {"fd00:2::2": listening(api.name), "fd00:1::1": listening(cell.name)}
    sender = inside(web.name, lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
    for address, listener in ends.items():
        # Not at once: the neighbours must find each other first.
        for _ in range(10):
            sender.sendto(b"before", (address, 8080))
            if heard(listener, b"before"):
                break
        else:
            pytest.fail("it must be the rules that keep it out")
    async with enforcing(cell, kind, known=KNOWN):
        for address, listener in ends.items():
            with suppress(OSError):
                sender.sendto(b"smuggled", (address, 8080))
            assert not heard(listener, b"smuggled")


@pytest.mark.parametrize("allowed", [False, True])
async def test_what_slipped_in_while_rules_were_gone_is_judged_like_the_rest(
    cell: Cell, kind: str, allowed: bool
) -> None:
    web, api = cell.box("web"), cell.box("api")
    server = api.serve(8080)
    async with enforcing(cell, kind, known=KNOWN) as enforcer:
        cell.exec(f"iptables-{kind} -w -F FORWARD")
        stream, datagrams = web.tcp(api, 8080), bound(web, 5000)
        datagrams.connect((str(api.address), 8080))
        assert echoes(stream)
        assert echoes(datagrams)
        if allowed:
            await enforcer.allow("web", "api", tcp(8080), udp(8080))
        await enforcer.reconciler.sync()
        if allowed:
            assert echoes(stream)
            assert echoes(datagrams)
            await enforcer.allow("web", "api")
        server.datagram.sendto(b"pushed", (str(web.address), 5000))
        assert not heard(datagrams, b"pushed")
        assert is_cut(stream)
        assert not echoes(datagrams)
