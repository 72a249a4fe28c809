"""The choice of addresses, and the forms derived from them."""

import tempfile
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.messages import Container, Handle, Stage
from bus.records import Records
from services.silk.addresses import AddressPool, Exhausted, RecordedAddresses, usable
from services.silk.links import container_mac, host_interface, host_mac, interface_address
from services.silk.netlink import attribute, attributes

SUBNET = IPv4Network("10.255.30.0/28")


def test_names_and_macs_follow_from_the_address() -> None:
    address = IPv4Address("10.255.30.2")
    assert host_interface(address) == "s-010255030002"
    assert host_mac(address) == "aa:aa:0a:ff:1e:02"
    assert container_mac(address) == "ee:ee:0a:ff:1e:02"


@given(st.ip_addresses(v=4))
def test_a_name_leads_back_to_its_address(address: IPv4Address) -> None:
    assert interface_address(host_interface(address)) == address


@pytest.mark.parametrize("name", ["eth0", "s-1", "s-010255030300", "s-0102550300020", "c-010255030002"])
def test_other_names_have_no_address(name: str) -> None:
    assert interface_address(name) is None


def test_a_24_has_253_addresses() -> None:
    addresses = list(usable(IPv4Network("10.255.30.0/24")))
    assert len(addresses) == 253
    assert (str(addresses[0]), str(addresses[-1])) == ("10.255.30.2", "10.255.30.254")


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20)), max_size=60))
@settings(deadline=None)
def test_never_one_in_use_and_the_longest_released_last(steps: list[tuple[bool, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "silk" / "released.json"
        in_use: list[IPv4Address] = []
        released: list[IPv4Address] = []
        for attach, pick in steps:
            pool = AddressPool(SUBNET, file)  # as after a restart
            if not attach:
                if in_use:
                    address = in_use.pop(pick % len(in_use))
                    pool.release(address)
                    released = [each for each in released if each != address] + [address]
                continue
            free = [each for each in usable(SUBNET) if each not in in_use]
            if not free:
                with pytest.raises(Exhausted):
                    pool.choose(in_use)
                continue
            address = pool.choose(in_use)
            assert address in free
            fresh = [each for each in free if each not in released]
            assert address == (fresh[0] if fresh else min(free, key=released.index))
            in_use.append(address)


def test_a_damaged_file_loses_only_the_order(tmp_path: Path) -> None:
    file = tmp_path / "released.json"
    file.write_text('{"released": ["10.255.30.2", 7, "x"]}')
    assert AddressPool(SUBNET, file).choose([]) == IPv4Address("10.255.30.2")


def test_records_are_followed_as_they_change(tmp_path: Path) -> None:
    records = Records(tmp_path / "containers")
    recorded = RecordedAddresses(records)
    assert recorded.by_handle() == {}
    one, two = IPv4Address("10.255.30.2"), IPv4Address("10.255.30.3")
    handle = Handle("a/b c")
    records.put(Container(handle, "/x", Stage.ATTACHING))
    assert recorded.by_handle() == {}
    records.put(Container(handle, "/x", Stage.READY, address=one))
    assert recorded.by_handle() == {handle: one}
    records.put(Container(handle, "/x", Stage.READY, address=two))
    (records.folder / "broken.json").write_text("{")
    (records.folder / "folder.json").mkdir()
    assert recorded.by_handle() == {handle: two}
    records.delete(handle)
    assert recorded.by_handle() == {}


@given(st.dictionaries(st.integers(1, 0x3FFF), st.binary(max_size=100), max_size=10))
def test_attributes_are_read_as_they_were_packed(values: dict[int, bytes]) -> None:
    assert attributes(b"".join(attribute(kind, value) for kind, value in values.items())) == values


@given(st.binary(max_size=200))
def test_any_bytes_are_read_without_end(data: bytes) -> None:
    attributes(data)
