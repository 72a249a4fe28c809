"""The internal API as foreign agents use it: real servers on one database, mutual TLS, contract/policy.md 2."""

import gzip
import json
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from services.policy.legacy_config import CannotUse, read_internal
from tests.databases import Server
from tests.policy.internal import INTERNAL, InternalServer
from tests.policy.server import DELETE, POLICIES, PolicyServer, body, policy

LIST = f"{INTERNAL}/policies"
LAST_UPDATED = f"{INTERNAL}/policies_last_updated"
GROUPS = f"{INTERNAL}/security_groups"
TAGS = f"{INTERNAL}/tags"


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[PolicyServer, InternalServer]]:
    folder = tmp_path_factory.mktemp("internal")
    external = PolicyServer(folder)
    external.start()
    internal = InternalServer(folder, external.database)
    internal.start()
    yield external, internal
    internal.close()
    external.close()


@pytest.fixture
def api(servers: tuple[PolicyServer, InternalServer]) -> Iterator[httpx.Client]:
    with servers[0].client() as client:
        if found := client.get(POLICIES).json()["policies"]:
            client.post(DELETE, json={"policies": found}).raise_for_status()
        yield client


@pytest.fixture
def agent(servers: tuple[PolicyServer, InternalServer]) -> Iterator[httpx.Client]:
    with servers[1].client() as client:
        yield client


def eventually(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def total(agent: httpx.Client, ids: str | None = None) -> int:
    answer = agent.get(LIST, params=None if ids is None else {"id": ids}).raise_for_status().json()
    assert answer["total_policies"] == len(answer["policies"])
    return int(answer["total_policies"])


def test_policies_carry_the_tags_that_the_external_api_names(api: httpx.Client, agent: httpx.Client) -> None:
    api.post(POLICIES, json=body(policy("a", "b", 8080, 8090), policy("b", 'q"\\é', 53, protocol="udp")))
    eventually(lambda: total(agent) == 2)
    tags = {item["id"]: item["tag"] for item in api.get("/networking/v1/external/tags").json()["tags"]}
    answer = agent.get(LIST)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["strict-transport-security"] == "max-age=31536000"
    assert len(answer.headers["x-vcap-request-id"]) == 36
    first = {
        "source": {"id": "a", "tag": tags["a"]},
        "destination": {"id": "b", "tag": tags["b"], "protocol": "tcp", "ports": {"start": 8080, "end": 8090}},
    }
    assert first in answer.json()["policies"]
    one = agent.get(LIST, params={"id": "a"})
    assert one.text == json.dumps({"total_policies": 1, "policies": [first]}, separators=(",", ":"))


def test_the_filter_is_either_end_and_the_first_id_alone_counts(api: httpx.Client, agent: httpx.Client) -> None:
    api.post(POLICIES, json=body(policy("a", "b"), policy("b", "c"), policy("c", "d", 1), policy("c", "d", 2)))
    eventually(lambda: total(agent) == 4)
    for query, expected in (("a", 1), ("b", 2), ("c", 3), ("a,d", 3), ("a,b,c,d", 4), ("", 0), ("x", 0), ("a,a", 1)):
        assert total(agent, query) == expected, query
    assert agent.get(f"{LIST}?id=a&id=b,c").json()["total_policies"] == 1
    assert agent.get(f"{LIST}?other=a").json()["total_policies"] == 4
    for version in ("v0", "v1", "banana"):
        assert agent.get(f"/networking/{version}/internal/policies?id=a").json()["total_policies"] == 1
    api.post(DELETE, json=body(policy("c", "d", 1)))
    eventually(lambda: total(agent, "d") == 1)


def test_answers_are_compressed_for_those_who_ask_and_not_sent_again(api: httpx.Client, agent: httpx.Client) -> None:
    many = [policy(f"app-{number}", "b") for number in range(200)]
    api.post(POLICIES, json=body(*many, policy("x", "y"))).raise_for_status()
    eventually(lambda: total(agent) == 201)
    with agent.stream("GET", LIST, headers={"Accept-Encoding": "gzip"}) as packed:
        assert packed.headers["content-encoding"] == "gzip"
        plain = gzip.decompress(b"".join(packed.iter_raw()))
    whole = agent.get(LIST, headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in whole.headers
    assert whole.content == plain
    tag = whole.headers["etag"]
    for wanted in (tag, f'"other", {tag}', "*"):
        unchanged = agent.get(LIST, headers={"If-None-Match": wanted})
        assert (unchanged.status_code, unchanged.content, unchanged.headers["etag"]) == (304, b"", tag)
    of_x = agent.get(f"{LIST}?id=x").headers["etag"]
    api.post(DELETE, json=body(many[0]))
    eventually(lambda: total(agent) == 200)
    assert agent.get(LIST, headers={"If-None-Match": tag}).status_code == 200
    # What a cell asked for has not changed, though something else has.
    assert agent.get(f"{LIST}?id=x", headers={"If-None-Match": of_x}).status_code == 304


def test_last_updated_grows_with_each_change_and_once_more_when_all_servers_know_it(
    api: httpx.Client, agent: httpx.Client
) -> None:
    def last() -> int:
        answer = agent.get(LAST_UPDATED).raise_for_status()
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        return int(answer.text)

    before = last()
    seen = before
    for number in range(1, 6):
        api.post(POLICIES, json=body(policy("a", f"to-{number}")))
        eventually(lambda number=number: total(agent, "a") == number)  # type: ignore[misc]
        assert last() > seen
        seen = last()
    assert abs(seen - time.time_ns()) < 60e9
    api.post(POLICIES, json=body(policy("a", "to-1")))
    eventually(lambda: last() == seen + 1)


def test_last_updated_is_the_same_after_a_restart(tmp_path: Path) -> None:
    external = PolicyServer(tmp_path)
    external.start()
    internal = InternalServer(tmp_path, external.database)
    try:
        with external.client() as api:
            api.post(POLICIES, json=body(policy("a", "b"))).raise_for_status()
        seen = []
        for _ in range(2):
            internal.start()
            with internal.client() as agent:
                seen.append(int(agent.get(LAST_UPDATED).text))
            assert internal.stop() == 0
        # Whether ten seconds have passed since the start is another matter.
        assert seen[0] // 2 == seen[1] // 2
    finally:
        internal.close()
        external.close()


def test_a_database_restored_while_the_server_runs_is_read_again_and_last_updated_does_not_fall(
    tmp_path: Path,
) -> None:
    external = PolicyServer(tmp_path)
    external.start()
    internal = InternalServer(tmp_path, external.database)
    dump = tmp_path / "dump.db"
    try:
        internal.start()
        with external.client() as api, internal.client() as agent:
            api.post(POLICIES, json=body(policy("a", "b"))).raise_for_status()
            with sqlite3.connect(tmp_path / "policy.db") as live, sqlite3.connect(dump) as copy:
                live.backup(copy)
            api.post(POLICIES, json=body(policy("a", "c"), policy("a", "d"))).raise_for_status()
            eventually(lambda: total(agent) == 3)
            eventually(lambda: int(agent.get(LAST_UPDATED).text) % 2 == 1)
            seen = int(agent.get(LAST_UPDATED).text)
            external.stop()
            with sqlite3.connect(tmp_path / "policy.db") as live, sqlite3.connect(dump) as copy:
                copy.backup(live)
            eventually(lambda: total(agent) == 1)
            assert int(agent.get(LAST_UPDATED).text) > seen
    finally:
        internal.close()
        external.close()


def test_the_routers_tag(api: httpx.Client, agent: httpx.Client) -> None:
    wanted = {"ID": "INGRESS_ROUTER", "Type": "router"}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: agent.put(TAGS, json=wanted), range(16)))
    assert {answer.status_code for answer in answers} == {200}
    (text,) = {answer.text for answer in answers}
    tag = json.loads(text)["tag"]
    assert text == f'{{"id":"INGRESS_ROUTER","tag":"{tag}","type":"router"}}'
    named = {"id": "INGRESS_ROUTER", "tag": tag, "type": "router"}
    assert named in api.get("/networking/v1/external/tags").json()["tags"]
    other = agent.put(TAGS, json={"id": "INGRESS_ROUTER", "type": "app"})
    assert other.status_code == 500
    assert other.json()["error"].startswith("database create failed")
    # A policy of the router's comes and goes; its tag stays.
    api.post(POLICIES, json=body(policy("INGRESS_ROUTER", "web")))
    eventually(lambda: total(agent, "INGRESS_ROUTER") == 1)
    assert agent.get(f"{LIST}?id=web").json()["policies"][0]["source"]["tag"] == tag
    api.post(DELETE, json=body(policy("INGRESS_ROUTER", "web")))
    assert agent.put(TAGS, json=wanted).json()["tag"] == tag


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"id":1,"type":"router"}', b'{"id":" ","type":"x"}'])
def test_bodies_that_cannot_be_read_get_no_tag(agent: httpx.Client, content: bytes) -> None:
    answer = agent.put(TAGS, content=content)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("failed parsing request body")


def test_a_body_that_is_too_long_is_refused(agent: httpx.Client) -> None:
    answer = agent.put(TAGS, content=b" " * (1 << 20))
    assert (answer.status_code, answer.json()) == (400, {"error": "failed reading request body"})


@pytest.mark.parametrize("parameter", ["limit", "from"])
@pytest.mark.parametrize("value", ["x", "", "1.5", "9" * 30])
def test_numbers_that_are_none(agent: httpx.Client, parameter: str, value: str) -> None:
    answer = agent.get(GROUPS, params={parameter: value})
    assert answer.status_code == 500
    assert answer.json() == {"error": f"invalid value for '{parameter}' parameter"}


def test_paths_and_methods_that_are_none(agent: httpx.Client) -> None:
    for path in ("/", "/health", f"{LIST}/", f"{INTERNAL}/healthcheck", "/networking/v1/external/policies"):
        answer = agent.get(path)
        assert (answer.status_code, answer.text) == (404, "404 page not found\n"), path
    assert agent.put("/networking/v0/internal/tags", json={}).status_code == 404
    for method, path, allowed in (("POST", LIST, "GET"), ("GET", TAGS, "PUT"), ("HEAD", LIST, "GET")):
        answer = agent.request(method, path)
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    request_id = agent.get(LIST, headers={"X-Vcap-Request-Id": "mine"}).headers["x-vcap-request-id"]
    assert request_id.startswith("mine::")


def test_who_has_no_certificate_is_not_heard(servers: tuple[PolicyServer, InternalServer], tmp_path: Path) -> None:
    internal = servers[1]
    with internal.client(certificate=False) as stranger, pytest.raises(httpx.TransportError):
        stranger.get(LIST)
    other = InternalServer(tmp_path, "sqlite:///unused.db")
    context = internal.tls(certificate=False)
    context.load_cert_chain(other.folder / "agent.crt", other.folder / "agent.key")
    with httpx.Client(base_url=internal.url, verify=context) as thief, pytest.raises(httpx.TransportError):
        thief.get(LIST)


def test_plain_http_is_answered_on_the_tls_port(servers: tuple[PolicyServer, InternalServer]) -> None:
    answer = httpx.get(f"http://127.0.0.1:{servers[1].port}{LIST}")
    assert (answer.status_code, answer.text) == (400, "Client sent an HTTP request to an HTTPS server.\n")


def test_callers_who_say_nothing_or_nonsense_hold_up_nobody(
    servers: tuple[PolicyServer, InternalServer], agent: httpx.Client
) -> None:
    silent = [socket.create_connection(("127.0.0.1", servers[1].port)) for _ in range(50)]
    for connection in silent[:20]:
        connection.sendall(b"\x16\x03\x01 and then nothing that is TLS")
    assert agent.get(LAST_UPDATED).status_code == 200
    for connection in silent:
        connection.close()


def test_health(servers: tuple[PolicyServer, InternalServer]) -> None:
    url = f"http://127.0.0.1:{servers[1].health_port}"
    assert httpx.get(f"{url}/").text.startswith("Network policy server, up for ")
    answer = httpx.get(f"{url}/health")
    assert (answer.status_code, answer.text) == (200, "")
    assert "silkbus_api_request_seconds" in httpx.get(f"{url}/metrics").text


def test_it_stops_when_told_though_clients_stay_connected(tmp_path: Path) -> None:
    internal = InternalServer(tmp_path, f"sqlite:///{tmp_path / 'policy.db'}")
    internal.start()
    try:
        with internal.client() as agent, socket.create_connection(("127.0.0.1", internal.port)):
            assert total(agent) == 0
            assert internal.stop() == 0, internal.log
    finally:
        internal.close()


def test_it_starts_with_the_original_file(tmp_path: Path, postgresql: Server) -> None:
    postgresql.sql("CREATE DATABASE internal")
    internal = InternalServer(tmp_path, "")
    path = tmp_path / "policy-server-internal.json"
    database: dict[str, object] = {
        "type": "postgres",
        "user": "silkbus",
        "password": "",
        "host": "127.0.0.1",
        "port": postgresql.port,
        "timeout": 60,
        "database_name": "internal",
    }
    path.write_text(json.dumps(internal.rendered(database)))
    try:
        internal.start("-config-file", str(path))
        with internal.client() as agent:
            body = {"id": "INGRESS_ROUTER", "type": "router"}
            assert agent.put(TAGS, json=body).json() == {**body, "tag": "000001"}
    finally:
        internal.close()
        postgresql.sql("DROP DATABASE internal WITH (FORCE)")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"ca_cert_file": ""}, "could not read config file: invalid config: CACertFile: zero value"),
        ({"internal_listen_port": 0}, "could not read config file: invalid config: InternalListenPort: zero value"),
        ({"log_level": "loud"}, "unknown log level: loud"),
    ],
)
def test_a_wrong_original_file_is_refused_in_its_words(tmp_path: Path, change: dict[str, object], text: str) -> None:
    internal = InternalServer(tmp_path, "")
    path = tmp_path / "policy-server-internal.json"
    database: dict[str, object] = {"type": "mysql", "user": "u", "host": "h", "port": 3306, "timeout": 1}
    path.write_text(json.dumps(internal.rendered(database) | change))
    with pytest.raises(CannotUse, match=f"cfnetworking.policy-server-internal: {text}"):
        read_internal(path)
