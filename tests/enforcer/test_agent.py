"""What the enforcer takes from the cell's records at its start."""

from ipaddress import IPv4Address
from pathlib import Path

from bus.messages import Container, Handle, Stage
from bus.records import Records
from services.enforcer.agent import recorded


def test_only_ready_containers_are_enforced_for(tmp_path: Path) -> None:
    """One being removed was forgotten already; its address would keep its rules for whoever comes next."""
    records = Records(tmp_path)
    for number, stage in enumerate(Stage, 2):
        records.put(Container(Handle(stage), "/n", stage, None, IPv4Address(f"10.255.1.{number}")))
    records.put(Container(Handle("loop"), "/n", Stage.READY, None, IPv4Address("127.0.0.1")))
    assert [container.handle for container in recorded(records)] == ["ready"]
