"""The traffic log's parts by themselves: what is lost is counted, what is bounded is, what is wrong is named."""

import asyncio
import json
import logging
import select
import socket
import struct
from contextlib import suppress
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.decode import Malformed
from bus.messages import AppId, Container, Handle, Stage
from services.enforcer.logged import Verdict, Why, understand
from services.enforcer.model import Model
from services.enforcer.nflog import Logged, NflogSocket, _attributes, _logged
from services.enforcer.settings import EnforcerSettings
from services.enforcer.traffic import Names
from services.enforcer.traffic_file import LOST, MAX_QUEUED, TrafficFile
from tests.enforcer.world import Namespace, inside

FLOOD = 100_000
"""More packets than the buffer holds."""


def lost(where: str) -> float:
    return float(LOST.labels(where)._value.get())


@pytest.mark.kernel
def test_what_the_kernel_could_not_hand_over_is_counted_exactly() -> None:
    namespace = Namespace("log")
    try:
        namespace.exec("iptables-nft -A OUTPUT -p udp --dport 9 -j NFLOG --nflog-group 7 --nflog-prefix sb:x:y")

        def flood() -> NflogSocket:
            reader = NflogSocket(7)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                for _ in range(FLOOD):
                    with suppress(OSError):
                        sender.sendto(b"x", ("127.0.0.1", 9))
            return reader

        reader = inside(namespace.name, flood)
        kept = 0
        while packets := read(reader, 0.5):
            kept += len(packets)
        assert 64 < kept < FLOOD
        # The number of the next packet says how many there were before.
        inside(namespace.name, lambda: send("127.0.0.1", 9))
        (last,) = read(reader, 10)
        assert (last.prefix, last.port, last.destination) == ("sb:x:y", 9, IPv4Address("127.0.0.1"))
        assert kept + reader.lost == FLOOD
        reader.close()
    finally:
        namespace.close()


def read(reader: NflogSocket, seconds: float) -> list[Logged]:
    """What comes next, if it comes in so many seconds."""
    select.select([reader], [], [], seconds)
    return reader.read(64)


def send(address: str, port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"x", (address, port))


def attribute(kind: int, payload: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(payload), kind) + payload + b"\0" * (-len(payload) % 4)


def packet(protocol: int, rest: bytes, *, fragment: int = 0, options: bytes = b"") -> Logged | None:
    head = bytes([0x45 + len(options) // 4, 0, 0, 60, 0, 0]) + struct.pack("!H", fragment) + bytes([64, protocol, 0, 0])
    addresses = IPv4Address("10.255.1.2").packed + IPv4Address("8.8.8.8").packed
    data = attribute(10, b"sb:denied:nothing\0") + attribute(9, head + addresses + options + rest)
    return _logged(_attributes(data, 0, len(data)))


def test_ports_types_and_fragments() -> None:
    ports = struct.pack("!HH", 40000, 53)
    udp = packet(17, ports)
    assert udp is not None
    assert (udp.source_port, udp.port, udp.icmp_type) == (40000, 53, 0)
    with_options = packet(6, ports, options=b"\1" * 8)
    assert with_options is not None
    assert with_options.port == 53
    later = packet(17, ports, fragment=100)
    assert later is not None
    assert (later.source_port, later.port) == (0, 0)
    ping = packet(1, b"\x08\x01\0\0")
    assert ping is not None
    assert (ping.icmp_type, ping.icmp_code, ping.port) == (8, 1, 0)
    short = packet(6, b"\0")
    assert short is not None
    assert short.port == 0


@given(st.binary(max_size=200))
def test_whatever_comes_is_a_packet_or_none(data: bytes) -> None:
    found = _logged(_attributes(data, 0, len(data)))
    assert found is None or isinstance(found, Logged)


@pytest.mark.parametrize("text", ["", "sb", "sb:denied", "sb:denied:else", "other:denied:nothing", "sb:x:nothing"])
def test_prefixes_of_others_are_not_ours(text: str) -> None:
    assert understand(text) is None


def test_a_line_of_an_unknown_end_has_empty_texts_as_the_original() -> None:
    model = Model()
    address = IPv4Address("10.255.1.2")
    model.admit(Container(Handle("h"), "/n", Stage.READY, AppId("group"), address, metadata={"app_id": 7}))
    names = Names(model, "cell-1")
    known = json.loads(names.line(Logged("", 0, address, IPv4Address("8.8.8.8"), 1), Verdict.DENIED, Why.NOTHING))
    assert known["data"]["source"] == {
        "container_id": "h",
        "app_guid": "group",
        "space_guid": "",
        "organization_guid": "",
        "host_ip": "",
        "host_guid": "cell-1",
    }
    assert (known["data"]["packet"]["mark"], known["data"]["packet"]["protocol"]) == ("", "ICMP")
    stranger = Logged("", 0, IPv4Address("9.9.9.9"), IPv4Address("8.8.8.8"), 132)
    unknown = json.loads(names.line(stranger, Verdict.DENIED, Why.NOTHING))
    assert unknown["data"]["source"] == {**dict.fromkeys(known["data"]["source"], ""), "host_guid": "cell-1"}
    assert unknown["data"]["packet"]["protocol"] == "132"


async def test_a_full_disk_costs_lines_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    file = TrafficFile(Path("/dev/full"))
    task = asyncio.create_task(file.run())
    before = lost("file")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            file.put(b"line\n")
            await asyncio.sleep(0.3)
    assert not task.done()
    assert lost("file") == before + 3
    (said,) = [record for record in caplog.records if "traffic log not written" in record.message]
    assert "free some space" in said.message
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_lines_that_are_not_written_are_bounded_and_the_last_ones_come_with_the_end(tmp_path: Path) -> None:
    file = TrafficFile(tmp_path / "log")
    before = lost("file")
    for number in range(MAX_QUEUED + 5):
        file.put(f"{number}\n".encode())
    assert file.full
    assert lost("file") == before + 5
    task = asyncio.create_task(file.run())
    await asyncio.sleep(0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    lines = (tmp_path / "log").read_text().split()
    assert lines == [str(number) for number in range(MAX_QUEUED)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("denied_logs_per_sec", 0),
        ("accepted_udp_logs_per_sec", 10_001),
        ("denied_events_per_sec", -1),
        ("nflog_group", 0),
        ("nflog_group", 65536),
        ("force_policy_poll_cycle_port", 65536),
    ],
)
def test_settings_that_cannot_be_are_named(name: str, value: int) -> None:
    with pytest.raises(Malformed, match=f"^{name}: must be in"):
        EnforcerSettings(cell="c", **{name: value})
