"""Groups that are no apps have their tags from the start, and keep them."""

import time
from pathlib import Path

import pytest

from bus.decode import Malformed
from services.policy.settings import PolicySettings
from tests.policy.server import PolicyServer


def tags(server: PolicyServer) -> list[dict[str, str]]:
    with server.client() as client:
        found: list[dict[str, str]] = client.get("/networking/v1/external/tags").json()["tags"]
        return found


def test_they_have_their_tags_after_a_restart_too(tmp_path: Path) -> None:
    server = PolicyServer(tmp_path, router_groups="INGRESS_ROUTER,OTHER")
    try:
        for _ in range(2):
            server.start()
            deadline = time.monotonic() + 30
            while len(found := tags(server)) < 2:
                assert time.monotonic() < deadline, server.log
                time.sleep(0.05)
            assert found == [
                {"id": "INGRESS_ROUTER", "tag": "0001", "type": "router"},
                {"id": "OTHER", "tag": "0002", "type": "router"},
            ]
            server.stop()
    finally:
        server.close()


@pytest.mark.parametrize("group", ["", " x", "a\nb", "x" * 256])
def test_a_name_that_cannot_be_is_refused(group: str) -> None:
    with pytest.raises(Malformed, match="router_groups"):
        PolicySettings(tokens=Path("tokens"), router_groups=(group,))
