"""Limits of bandwidth: their forms, what is refused, and real traffic held back by them."""

import json
import socket
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.decode import Malformed
from bus.messages import Handle
from services.silk.bandwidth import MAX_RATE, Bandwidth, Limit, ifb_name
from services.silk.namespace import opened
from tests.silk.conftest import TestCell, sh

MEGABIT = Limit(1_000_000, 400_000)


def test_the_forms_of_the_settings_and_of_cni() -> None:
    assert Bandwidth.both_ways(0, 0) == Bandwidth()
    assert Bandwidth.both_ways(100, 20) == Bandwidth(Limit(102400, 20480), Limit(102400, 20480))
    form = {"ingressRate": 8000, "ingressBurst": 9000, "egressRate": 0}
    assert Bandwidth.decode(form) == Bandwidth(ingress=Limit(8000, 9000))


limits = st.one_of(st.none(), st.builds(Limit, st.integers(8, MAX_RATE), st.integers(1, MAX_RATE)))


@given(st.builds(Bandwidth, limits, limits))
def test_what_is_written_is_read(bandwidth: Bandwidth) -> None:
    assert Bandwidth.decode(json.loads(json.dumps(bandwidth.encode()))) == bandwidth


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ({"ingressRate": 8000}, "ingress: if rate is set, burst must also be set"),
        ({"egressBurst": 8000}, "egress: if burst is set, rate must also be set"),
        ({"egressRate": MAX_RATE + 1, "egressBurst": 8}, "must be at most"),
        ({"egressRate": -1, "egressBurst": 8}, "egressRate: must be in 0"),
        ({"egressRate": "fast", "egressBurst": 8}, "egressRate: must be an integer"),
        ({"egressRate": 7, "egressBurst": 8}, "at least 8 bits"),
    ],
)
def test_what_cannot_be_is_refused(form: dict[str, Any], text: str) -> None:
    with pytest.raises(Malformed, match=text):
        Bandwidth.decode(form)


def ifbs(cell: TestCell) -> list[str]:
    return [each["ifname"] for each in json.loads(cell.sh("ip", "-j", "link", "show", "type", "ifb"))]


def seconds_to_send(source: str, target: str, address: str, size: int) -> float:
    """How long `size` bytes take by TCP from one namespace to `address` in the other."""
    with opened(source) as here, opened(target) as there:
        listener = there.run(lambda: socket.create_server(("0.0.0.0", 7001)))  # noqa: S104 (in a namespace)
        sender = here.run(lambda: socket.create_connection((address, 7001), 10))
    receiver, _ = listener.accept()
    begun = time.monotonic()
    with listener, sender, receiver:
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        sender.sendall(bytes(size))
        sender.shutdown(socket.SHUT_WR)
        while receiver.recv(1 << 16):
            pass
    return time.monotonic() - begun


@pytest.mark.kernel
def test_traffic_is_held_to_the_limit_in_each_direction(cell: TestCell) -> None:
    names = ("plain", "receives", "sends")
    netns = {name: cell.container() for name in names}
    address = {
        "plain": cell.attach("plain", netns["plain"]),
        "receives": cell.attach("receives", netns["receives"], bandwidth=Bandwidth(ingress=MEGABIT)),
        "sends": cell.attach("sends", netns["sends"], bandwidth=Bandwidth(egress=MEGABIT)),
    }

    def seconds(source: str, target: str) -> float:
        return seconds_to_send(netns[source], netns[target], str(address[target].address), 300_000)

    # 300 000 bytes are 2.4 Mbit, of which 0.4 go at once: two seconds.
    for source, target in (("plain", "receives"), ("sends", "plain")):
        assert seconds(source, target) > 1.2, f"{source} to {target} is not held back"
    for source, target in (("receives", "plain"), ("plain", "sends")):
        # Once is enough: what is held back is so each time, what is not may be slow on a busy machine.
        assert any(seconds(source, target) < 1.2 for _ in range(10)), f"{source} to {target} is held back"


@pytest.mark.kernel
def test_devices_are_as_the_cni_plugin_makes_them_and_go_with_the_container(cell: TestCell) -> None:
    both = Bandwidth(Limit(102400, 204800), Limit(102400, 204800))
    netns = cell.container()
    interface = cell.attach("web-1", netns, bandwidth=both).encode()["interface"]
    name = ifb_name(Handle("web-1"))
    assert ifbs(cell) == [name]
    assert len(name) == 15
    for device in (interface, name):
        root = cell.sh("tc", "qdisc", "show", "dev", device, "root")
        assert root.startswith("qdisc tbf 1: root")
        assert "rate 102400bit burst 25600b lat 25ms" in root.replace("25Kb", "25600b").replace("25.0", "25")
    assert "ingress ffff:" in cell.sh("tc", "qdisc", "show", "dev", interface)
    redirect = cell.sh("tc", "filter", "show", "dev", interface, "parent", "ffff:")
    assert f"Egress Redirect to device {name}" in redirect
    assert json.loads(cell.sh("ip", "-j", "link", "show", name))[0]["mtu"] == 1450
    cell.restart()
    assert ifbs(cell) == [name]
    cell.detach("web-1")
    assert ifbs(cell) == []
    # A namespace that ends takes the link with it, not the ifb; and other people's stay.
    cell.sh("ip", "link", "add", "bwp0123456789ab", "type", "ifb")
    cell.attach("web-2", netns, bandwidth=both)
    sh("ip", "netns", "del", netns.rpartition("/")[2])
    assert len(ifbs(cell)) == 2
    cell.restart()
    deadline = time.monotonic() + 20
    while ifbs(cell) != ["bwp0123456789ab"]:
        assert time.monotonic() < deadline
        cell.restart()


@pytest.mark.kernel
def test_a_burst_of_less_than_a_packet_is_refused(cell: TestCell) -> None:
    with pytest.raises(Malformed, match="burst of egress, 8000 bits, is less than one packet of 1450 bytes"):
        cell.attach("web-1", cell.container(), bandwidth=Bandwidth(egress=Limit(10**6, 8000)))
    assert cell.network.containers() == 0
