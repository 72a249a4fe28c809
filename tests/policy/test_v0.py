"""Version v0, which shares its store with v1 (contract/policy.md 1.4, 1.5), and what both versions have alike."""

from typing import Any

import httpx
import pytest

from services.policy.gateway import go_duration
from tests.policy.server import POLICIES, WRITE_TOKEN, PolicyServer, body, policy

V0 = "/networking/v0/external/policies"
DELETE_V0 = f"{V0}/delete"
SECOND = 1_000_000_000


def policy_v0(source: str, destination: str, port: object = 8080, protocol: str = "tcp") -> Any:
    return {"source": {"id": source}, "destination": {"id": destination, "protocol": protocol, "port": port}}


def test_both_versions_see_what_the_other_made(api: httpx.Client) -> None:
    assert api.post(V0, json=body(policy_v0("a", "b"))).content == b"{}"
    assert api.get(POLICIES).json()["policies"] == [policy("a", "b")]
    api.post(POLICIES, json=body(policy("c", "d", 7, 7, "udp")))
    assert api.get(V0).text == (
        '{"total_policies":2,"policies":['
        '{"source":{"id":"a"},"destination":{"id":"b","protocol":"tcp","port":8080}},'
        '{"source":{"id":"c"},"destination":{"id":"d","protocol":"udp","port":7}}]}'
    )
    assert api.post(DELETE_V0, json=body(policy_v0("c", "d", 7, "udp"))).status_code == 200
    assert api.get(POLICIES).json() == {"total_policies": 1, "policies": [policy("a", "b")]}


def test_ranges_are_neither_listed_nor_counted(api: httpx.Client) -> None:
    api.post(POLICIES, json=body(policy("a", "b", 80, 90), policy("a", "c")))
    assert api.get(V0).json() == {"total_policies": 1, "policies": [policy_v0("a", "c")]}
    assert api.get(V0, params={"dest_id": "b"}).content == b'{"total_policies":0,"policies":[]}'


@pytest.mark.parametrize("path", [V0, DELETE_V0])
@pytest.mark.parametrize(
    ("item", "text"),
    [
        (policy_v0("", "b"), "missing source id"),
        (policy_v0("a", ""), "missing destination id"),
        (policy_v0("a", "b", 0, "icmp"), "invalid destination protocol, specify either udp or tcp"),
        (policy_v0("a", "b", -1), "invalid port -1, must be in range 1-65535"),
        (policy_v0("a", "b", 0), "missing port"),
        (policy_v0("a", "b", None), "missing port"),
        (policy("a", "b"), "missing port"),
        (policy_v0("a", "b", 65536), "invalid port 65536, must be in range 1-65535"),
        ({**policy_v0("a", "b"), "source": {"id": "a", "tag": "01"}}, "tags may not be specified"),
    ],
)
def test_invalid_policies_are_refused(api: httpx.Client, path: str, item: object, text: str) -> None:
    answer = api.post(path, json={"policies": [item]})
    assert (answer.status_code, answer.json()) == (400, {"error": f"mapper: validate policies: {text}"})
    assert api.get(POLICIES).json()["policies"] == []


def test_a_port_that_is_no_number_cannot_be_read(api: httpx.Client) -> None:
    answer = api.post(V0, json=body(policy_v0("a", "b", "8080")))
    text = "mapper: unmarshal json: policies[0].destination.port must be an integer, not a string"
    assert (answer.status_code, answer.json()) == (400, {"error": text})


@pytest.mark.parametrize("version", ["v0", "v1"])
def test_tags_are_listed_by_number(api: httpx.Client, version: str) -> None:
    path = f"/networking/{version}/external/tags"
    assert api.get(path).content == b'{"tags":[]}'
    api.post(POLICIES, json=body(policy("b", "a"), policy("c", "a")))
    tags = api.get(path).json()["tags"]
    assert {(tag["id"], tag["type"]) for tag in tags} == {("a", "app"), ("b", "app"), ("c", "app")}
    numbers = [tag["tag"] for tag in tags]
    assert numbers == sorted(numbers)
    assert all(len(number) == 4 and 1 <= int(number, 16) <= 65535 and number.upper() == number for number in numbers)


@pytest.mark.parametrize("version", ["v0", "v1"])
def test_whoami(api: httpx.Client, standing_server: PolicyServer, version: str) -> None:
    assert api.get(f"/networking/{version}/external/whoami").content == b'{"subject":"admin"}'
    with standing_server.client(WRITE_TOKEN) as developer:
        for path in ("whoami", "tags"):
            answer = developer.get(f"/networking/{version}/external/{path}")
            text = "provided scopes [network.write openid] do not include allowed scopes [network.admin]"
            assert (answer.status_code, answer.json()) == (403, {"error": text})


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "0s"),
        (1, "1ns"),
        (1_500, "1.5µs"),
        (250_000_000, "250ms"),
        (34_391_474_099, "34.391474099s"),
        (60 * SECOND, "1m0s"),
        (3600 * SECOND + SECOND // 2, "1h0m0.5s"),
        ((49 * 3600 + 61) * SECOND, "49h1m1s"),
        (20 * SECOND, "20s"),
    ],
)
def test_durations_are_written_as_go_writes_them(nanoseconds: int, text: str) -> None:
    assert go_duration(nanoseconds) == text
