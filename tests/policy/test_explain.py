"""Explaining why a flow is allowed or not, over the API; who may ask; and what a restored database keeps."""

from typing import Any

import httpx
import pytest

from tests.policy.server import DELETE, POLICIES, READER_TOKEN, WRITE_TOKEN, PolicyServer, body, policy
from tests.policy.test_access import UNKNOWN, Foundation, place, standing

__all__ = ["place", "standing"]

EXPLAIN = "/networking/v1/external/explain"
PAIR = {"source": "a", "destination": "b", "protocol": "tcp", "port": "8080"}


def explain(api: httpx.Client, source: str, destination: str, protocol: str = "tcp", port: int = 8080) -> Any:
    params: dict[str, str | int] = {"source": source, "destination": destination, "protocol": protocol, "port": port}
    answer = api.get(EXPLAIN, params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()


def add(api: httpx.Client, *policies: Any) -> int:
    return int(api.post(POLICIES, json=body(*policies)).raise_for_status().headers["X-Silkbus-Revision"])


def remove(api: httpx.Client, *policies: Any) -> int:
    return int(api.post(DELETE, json=body(*policies)).raise_for_status().headers["X-Silkbus-Revision"])


def test_what_allows_a_flow_since_when_and_by_whom(api: httpx.Client) -> None:
    since = add(api, policy("web", "db", 8000, 9000))
    add(api, policy("web", "db", 1, 2, "udp"), policy("other", "db"))
    said = explain(api, "web", "db")
    assert said["allowed"] is True
    (one,) = said["policies"]
    assert one["policy"] == policy("web", "db", 8000, 9000)
    assert (one["since"]["revision"], one["since"]["user"]) == (since, "admin")
    assert one["since"]["time"].endswith("Z")
    assert [item["policy"] for item in said["others"]] == [policy("web", "db", 1, 2, "udp")]
    assert said["removed"] == []
    tags = {item["id"]: item["tag"] for item in api.get("/networking/v1/external/tags").json()["tags"]}
    for end in ("source", "destination"):
        assert said[end]["tag"] == tags[said[end]["id"]]
        assert said[end]["instances"] is None  # not known


@pytest.mark.parametrize(("protocol", "port", "allowed"), [("tcp", 10, True), ("tcp", 20, True), ("tcp", 9, False)])
def test_the_whole_range_and_nothing_else(api: httpx.Client, protocol: str, port: int, *, allowed: bool) -> None:
    add(api, policy("range-a", "range-b", 10, 20))
    assert explain(api, "range-a", "range-b", protocol, port)["allowed"] is allowed
    assert explain(api, "range-a", "range-b", "udp", port)["allowed"] is False
    assert explain(api, "range-b", "range-a", protocol, port)["allowed"] is False


def test_a_removed_policy_is_a_near_miss_with_who_removed_it(api: httpx.Client) -> None:
    add(api, policy("gone-a", "gone-b"), policy("gone-a", "gone-b", 5), policy("gone-b", "gone-a"))
    first = remove(api, policy("gone-a", "gone-b"))
    remove(api, policy("gone-a", "gone-b", 5), policy("gone-b", "gone-a"))
    said = explain(api, "gone-a", "gone-b")
    assert (said["allowed"], said["policies"], said["others"]) == (False, [], [])
    (removed,) = said["removed"]
    assert removed["policy"] == policy("gone-a", "gone-b")
    assert (removed["at"]["revision"], removed["at"]["user"]) == (first, "admin")
    assert said["source"]["tag"] is None
    again = add(api, policy("gone-a", "gone-b"))
    said = explain(api, "gone-a", "gone-b")
    assert (said["policies"][0]["since"]["revision"], said["removed"]) == (again, [])


def test_apps_that_nobody_knows(api: httpx.Client) -> None:
    said = explain(api, "no-such-app", "no-such-app")
    assert (said["allowed"], said["policies"], said["others"], said["removed"]) == (False, [], [], [])


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("", "source"),
        ("source=a&destination=b&port=1", "protocol"),
        ("source=a&destination=b&protocol=icmp&port=1", "protocol"),
        ("source=a&destination=b&protocol=tcp&port=0", "port"),
        ("source=a&destination=b&protocol=tcp&port=65536", "port"),
        ("source=&destination=b&protocol=tcp&port=1", "source"),
        ("source=a&source=b&destination=b&protocol=tcp&port=1", "source"),
        ("source=a&destination=b&protocol=tcp&port=1&x=1", "x"),
        ("source=a&destination=b&protocol=tcp&port=1&probe=yes", "probe"),
        ("source=a&destination=b&protocol=tcp&port=1&probe=true&probe=true", "probe"),
    ],
)
def test_a_bad_question_is_named(api: httpx.Client, query: str, named: str) -> None:
    answer = api.get(f"{EXPLAIN}?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(f"{named}: ")


def test_who_may_not_ask(standing_server: PolicyServer) -> None:
    asked = f"{EXPLAIN}?source=a&destination=b&protocol=tcp&port=1"
    for token, status in ((READER_TOKEN, 403), ("wrong", 401), (WRITE_TOKEN, 403)):
        with standing_server.client(token) as client:
            assert client.get(asked).status_code == status


def test_a_developer_of_both_ends_may_ask(place: Foundation) -> None:
    with place.client("network.admin") as admin:
        add(admin, policy("a", "b"), policy("a", "c"))
    with place.client("network.write") as developer:
        assert explain(developer, "a", "b")["allowed"] is True
        probed = developer.get(EXPLAIN, params={**PAIR, "probe": "true"})
        assert probed.status_code == 403
        assert probed.json()["error"].startswith("probe: connections are tried for those with network.admin only")
        assert developer.get(EXPLAIN, params={**PAIR, "probe": "false"}).status_code == 200
        for pair in (("a", "c"), ("c", "a"), ("a", "nowhere")):
            params = {"source": pair[0], "destination": pair[1], "protocol": "tcp", "port": "8080"}
            answer = developer.get(EXPLAIN, params=params)
            assert (answer.status_code, answer.json()) == (403, {"error": UNKNOWN})
