"""The external API as its clients see it, over HTTP to a real server (contract/policy.md 1.2 to 1.8)."""

import json
from pathlib import Path

import httpx
import pytest

from tests.policy.server import (
    ADMIN_TOKEN,
    DELETE,
    POLICIES,
    READER_TOKEN,
    WRITE_TOKEN,
    PolicyServer,
    body,
    policy,
)

RECORDING = Path(__file__).parent / "data" / "cf-cli-7.3.jsonl"
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-XSS-Protection": "1; mode=block",
    "X-Frame-Options": "deny",
    "Content-Security-Policy": "frame-ancestors 'none'",
}


def listed(api: httpx.Client, **query: str) -> list[tuple[str, str, str, int, int]]:
    answer = api.get(POLICIES, params=query)
    assert answer.status_code == 200
    content = answer.json()
    assert content["total_policies"] == len(content["policies"])
    return [
        (p["source"]["id"], d["id"], d["protocol"], d["ports"]["start"], d["ports"]["end"])
        for p in content["policies"]
        for d in [p["destination"]]
    ]


def refused(answer: httpx.Response, status: int, text: str) -> None:
    assert (answer.status_code, answer.json()) == (status, {"error": text})
    assert answer.headers["content-type"] == "application/json"
    for name, value in HEADERS.items():
        assert answer.headers[name] == value


def test_what_is_created_is_listed_until_it_is_deleted(api: httpx.Client) -> None:
    first, second = policy("a", "b"), policy("a", "c", 7000, 7010, "udp")
    answer = api.post(POLICIES, json=body(first, second))
    assert (answer.status_code, answer.content) == (200, b"{}")
    assert answer.headers["content-type"] == "application/json"
    assert listed(api) == [("a", "b", "tcp", 8080, 8080), ("a", "c", "udp", 7000, 7010)]
    answer = api.post(DELETE, json=body(first))
    assert (answer.status_code, answer.content) == (200, b"{}")
    assert listed(api) == [("a", "c", "udp", 7000, 7010)]


def test_list_is_byte_exact(api: httpx.Client) -> None:
    assert api.get(POLICIES).content == b'{"total_policies":0,"policies":[]}'
    api.post(POLICIES, json=body(policy("a", "ü")))
    assert (
        api.get(POLICIES).text == '{"total_policies":1,"policies":[{"source":{"id":"a"},'
        '"destination":{"id":"ü","protocol":"tcp","ports":{"start":8080,"end":8080}}}]}'
    )


def test_a_request_that_changes_nothing_has_the_current_revision(api: httpx.Client) -> None:
    revisions = [
        int(api.post(path, json=body(*policies)).headers["X-Silkbus-Revision"])
        for path, policies in [
            (POLICIES, [policy("a", "b"), policy("a", "b")]),
            (POLICIES, [policy("a", "b")]),
            (DELETE, [policy("a", "b", 1)]),
            (DELETE, [policy("a", "b"), policy("a", "b")]),
            (DELETE, [policy("a", "b")]),
        ]
    ]
    first = revisions[0]
    assert revisions == [first, first, first, first + 1, first + 1]


def test_overlapping_ranges_are_separate_and_deleted_only_exactly(api: httpx.Client) -> None:
    api.post(POLICIES, json=body(policy("a", "b", 80, 90), policy("a", "b", 85, 95), policy("a", "b", 80, 90, "udp")))
    api.post(DELETE, json=body(policy("a", "b", 80, 95), policy("a", "b", 85, 95)))
    assert listed(api) == [("a", "b", "tcp", 80, 90), ("a", "b", "udp", 80, 90)]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({}, ["ab", "bc", "ca", "aa"]),
        ({"id": "a"}, ["ab", "ca", "aa"]),
        ({"id": "a,b"}, ["ab", "bc", "ca", "aa"]),
        ({"id": "nobody"}, []),
        ({"id": ""}, []),
        ({"id": "", "source_id": "a"}, []),
        ({"source_id": "a"}, ["ab", "aa"]),
        ({"dest_id": "a"}, ["ca", "aa"]),
        ({"source_id": "a,c", "dest_id": "a"}, ["ca", "aa"]),
        ({"source_id": ",".join(["a", *(f"x{i}" for i in range(3000))])}, ["ab", "aa"]),
        ({"id": ",".join(["c", *(f"x{i}" for i in range(3000))])}, ["bc", "ca"]),
    ],
)
def test_filters(api: httpx.Client, query: dict[str, str], expected: list[str]) -> None:
    api.post(POLICIES, json=body(*(policy(*pair) for pair in ("ab", "bc", "ca", "aa"))))
    assert [source + destination for source, destination, *_ in listed(api, **query)] == expected


def test_only_the_first_of_a_repeated_parameter_counts(api: httpx.Client) -> None:
    api.post(POLICIES, json=body(policy("a", "b"), policy("c", "d")))
    assert len(api.get(f"{POLICIES}?id=a&id=c").json()["policies"]) == 1


def test_input_is_read_as_go_reads_it(api: httpx.Client) -> None:
    text = (
        '{"unknown": [1.5], "POLICIES": [{"Source": {"ID": "x", "Id": "a", "tag": null},'
        ' "destination": {"id": "\\ud800b", "protocol": "udp", "Ports": {"START": 5, "end": 6}, "ips": 7}}]}\n'
    )
    assert api.post(POLICIES, content=text, headers={"Content-Type": "text/nonsense"}).status_code == 200
    assert listed(api) == [("a", "\ufffdb", "udp", 5, 6)]


@pytest.mark.parametrize("path", [POLICIES, DELETE])
@pytest.mark.parametrize(
    ("policies", "text"),
    [
        (None, "missing policies"),
        ([], "missing policies"),
        ([None], "missing source id"),
        ([policy("", "b")], "missing source id"),
        ([policy("a", "")], "missing destination id"),
        ([policy("", "")], "missing source id"),
        ([policy("a", "b", protocol="TCP")], "invalid destination protocol, specify either udp or tcp"),
        ([policy("a", "b", 5, 0)], "invalid port range 5-0, start must be less than or equal to end"),
        ([policy("a", "b", -1, 4)], "invalid start port -1, must be in range 1-65535"),
        ([policy("a", "b", 0, 0)], "missing start port"),
        ([policy("a", "b", 0, 70000)], "missing start port"),
        ([policy("a", "b", 1, 65536)], "invalid end port 65536, must be in range 1-65535"),
        ([policy("a", "b"), policy("c", "d", 70001)], "invalid end port 70001, must be in range 1-65535"),
        ([{**policy("a", "b"), "source": {"id": "a", "tag": "0001"}}], "tags may not be specified"),
        ([policy("a" * 256, "b")], "invalid source id, must have at most 255 characters, not 256"),
        ([policy("a", "b\n")], r"invalid destination id 'b\n', must be printable and not begin or end with a blank"),
    ],
)
def test_invalid_policies_are_refused_with_the_contracts_texts(
    api: httpx.Client, path: str, policies: object, text: str
) -> None:
    refused(api.post(path, json={"policies": policies}), 400, f"mapper: validate policies: {text}")
    assert listed(api) == []


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "{} x",
        "[]",
        "5",
        '{"a" "b"}',
        '{"policies": "x"}',
        '{"policies": {}}',
        '{"policies": [5]}',
        '{"policies": [{"source": {"id": 5}}]}',
        '{"policies": [{"destination": {"ports": {"start": 8080.0}}}]}',
        '{"policies": [{"destination": {"ports": {"start": "8080"}}}]}',
        '{"policies": [{"destination": {"ports": {"start": true}}}]}',
        '{"policies": [{"destination": {"ports": {"start": 1e3}}}]}',
        '{"policies": [{"destination": {"ports": {"start": 9223372036854775808}}}]}',
        '{"policies": ' + "[" * 100_000,
        '{"policies": NaN}',
        '{"a": ' + "9" * 5000 + "}",
    ],
)
def test_what_is_not_the_right_json_is_refused(api: httpx.Client, content: str) -> None:
    answer = api.post(POLICIES, content=content)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("mapper: unmarshal json: ")


def test_an_empty_body_is_refused_as_go_says_it(api: httpx.Client) -> None:
    refused(api.post(POLICIES), 400, "mapper: unmarshal json: unexpected end of JSON input")


@pytest.mark.parametrize(
    ("path", "text"), [(POLICIES, "failed reading request body"), (DELETE, "invalid request body")]
)
def test_a_body_that_is_too_long_gets_an_answer(api: httpx.Client, path: str, text: str) -> None:
    refused(api.post(path, content=b" " * (11 << 20)), 400, text)


def test_a_body_of_ten_mebibytes_is_accepted(api: httpx.Client) -> None:
    content = json.dumps(body(policy("a", "b"))).encode()
    assert api.post(POLICIES, content=content + b" " * ((10 << 20) - len(content))).status_code == 200


def test_order_of_the_checks(standing_server: PolicyServer) -> None:
    with httpx.Client(base_url=standing_server.url, trust_env=False) as anonymous:
        refused(anonymous.get("/networking/v2/external/policies"), 406, "api version 'v2' not supported")
        refused(anonymous.get("/networking//external/policies"), 406, "api version '' not supported")
        refused(anonymous.get('/networking/"x/external/policies'), 406, "api version '\"x' not supported")
        answer = anonymous.post(POLICIES, content="nonsense")
        refused(answer, 401, "missing authorization header")
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        answer = anonymous.post(POLICIES, content="nonsense", headers={"Authorization": "bearer wrong"})
        refused(answer, 401, "failed to verify token with uaa")
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    with standing_server.client(READER_TOKEN) as reader:
        text = "provided scopes [a b] do not include allowed scopes [network.admin network.write]"
        refused(reader.post(POLICIES, content="nonsense"), 403, text)


def test_a_developer_is_refused_while_nobody_knows_the_spaces(standing_server: PolicyServer) -> None:
    with standing_server.client(WRITE_TOKEN) as developer:
        content = body(policy("a", "b"))
        for answer in (
            developer.get(POLICIES),
            developer.post(POLICIES, json=content),
            developer.post(DELETE, json=content),
        ):
            refused(answer, 403, "one or more applications cannot be found or accessed")


@pytest.mark.parametrize("prefix", ["", "bearer ", "Bearer ", "Bearer bearer "])
def test_ways_to_write_the_token(api: httpx.Client, prefix: str) -> None:
    assert api.get(POLICIES, headers={"Authorization": prefix + ADMIN_TOKEN}).status_code == 200


def test_headers_of_every_route(api: httpx.Client) -> None:
    for path in ("/", "/networking", "/health", POLICIES):
        answer = api.get(path)
        assert answer.status_code == 200
        for name, value in HEADERS.items():
            assert answer.headers[name] == value
    own = api.get("/").headers["X-Vcap-Request-Id"]
    assert len(own) == 36
    chained = api.get("/", headers={"X-VCAP-Request-ID": "from-the-router"}).headers["X-Vcap-Request-Id"]
    assert chained.startswith("from-the-router::")


def test_unknown_paths_and_methods(api: httpx.Client) -> None:
    for path in ("/nothing", POLICIES + "/", "/networking/v1/external/tags/x"):
        answer = api.get(path)
        assert (answer.status_code, answer.text) == (404, "404 page not found\n")
    answer = api.put(POLICIES)
    assert (answer.status_code, answer.text) == (405, "Method Not Allowed\n")
    assert set(answer.headers["Allow"].split(", ")) == {"GET", "POST", "OPTIONS"}
    assert api.head("/").status_code == 405


def test_the_server_is_ready_while_the_bus_is_away(api: httpx.Client) -> None:
    assert api.get("/").text.startswith("Network policy server, up for ")
    assert (api.get("/health").status_code, api.get("/health").content) == (200, b"")
    assert api.get("/livez").status_code == 200
    answer = api.get("/readyz")
    assert answer.status_code == 200
    assert "database: ok" in answer.text
    assert "bus: away" in answer.text
    assert "silkbus_api_request_seconds" in api.get("/metrics").text


def test_replay_of_the_cf_cli(api: httpx.Client) -> None:
    for line in RECORDING.read_text().splitlines():
        exchange = json.loads(line)
        answer = api.request(
            exchange["method"], exchange["path"], headers=exchange["headers"], content=exchange["body"]
        )
        assert (answer.status_code, answer.json()) == (exchange["status"], exchange["response"]), exchange["command"]
