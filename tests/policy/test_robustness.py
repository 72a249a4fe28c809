"""Bad input and bad clients: nothing is answered 500, what is refused changes nothing, nobody holds the server."""

import asyncio
import json
import resource
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from bus import listener
from bus.listener import BoundedProtocol
from bus.local import serving
from tests.databases import EmptyDatabase
from tests.nats_server import free_port
from tests.policy.server import ADMIN_TOKEN, DELETE, POLICIES, PolicyServer, body, policy

EXTERNAL = "/networking/v1/external"
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

texts = st.one_of(
    st.text(max_size=20),
    st.text(st.characters(), max_size=6),  # lone surrogates, too
    st.sampled_from(["", "a", "b", "tcp", "udp", "\0", "\ud800", "a" * 255, "ä" * 256, " a", "\U0001f600", "%00", "'"]),
)
integers = st.one_of(
    st.integers(), st.sampled_from([0, 1, 65535, 65536, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**400])
)
scalars = st.one_of(st.none(), st.booleans(), integers, st.floats(), texts)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=8
)


def mostly(good: st.SearchStrategy[Any], bad: st.SearchStrategy[Any] = anything) -> st.SearchStrategy[Any]:
    return st.integers(0, 9).flatmap(lambda number: bad if number == 0 else good)


def an_object(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return mostly(st.fixed_dictionaries({}, optional={**fields, "extra": anything}) | st.fixed_dictionaries(fields))


ends = mostly(st.sampled_from(["a", "b", "ü"]), texts)
ports = mostly(st.integers(1, 65535) | st.integers(-1, 65536), integers)
destination = an_object(
    id=ends,
    protocol=mostly(st.sampled_from(["tcp", "udp"]), texts),
    ports=an_object(start=ports, end=ports),
    port=ports,
)
documents = an_object(
    policies=mostly(st.lists(an_object(source=an_object(id=ends), destination=destination), max_size=4))
)
bodies = st.one_of(
    documents.map(lambda value: json.dumps(value).encode()),
    documents.map(lambda value: json.dumps(value).encode()[:-1]),
    st.binary(max_size=40),
    st.sampled_from(
        [b"[" * 100_000, b'{"policies":' * 50_000, b'{"policies":[{"source":{"id":"\xff\xfe"}}]}', b"1" * 50_000]
    ),
)
paths = st.sampled_from(
    [f"/networking/{version}/external/policies{rest}" for version in ("v0", "v1") for rest in ("", "/delete")]
)
names = st.sampled_from(
    ["id", "source_id", "dest_id", "at", "limit", "before", "after", "app_id", "user", "since", "until"]
)
percent = st.one_of(texts.map(lambda text: quote(text, errors="replace")), st.binary(max_size=10).map(quote))
queries = st.lists(st.tuples(names, st.one_of(percent, integers.map(str))), max_size=4).map(
    lambda pairs: "&".join(f"{name}={value}" for name, value in pairs)
)
segments = st.lists(
    st.one_of(percent, st.sampled_from(["", ".", "..", "networking", "v1", "external", "policies", "tags"])), max_size=6
)


@pytest.fixture
def fuzzed(database: EmptyDatabase, tmp_path: Path) -> Iterator[httpx.Client]:
    """An admin's client of a server on each kind of database."""
    server = PolicyServer(tmp_path, database=database.url)
    server.start()
    try:
        with server.client() as client:
            yield client
        assert '"traceback"' not in server.log
    finally:
        server.close()


def answered(answer: httpx.Response) -> None:
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400 and answer.headers["content-type"] == "application/json":
        assert list(answer.json()) == ["error"]


def test_no_body_is_answered_500_nor_changes_anything_when_refused(fuzzed: httpx.Client) -> None:
    fuzzed.post(POLICIES, json=body(policy("a", "b"), policy("b", "a", 1, 9, "udp"))).raise_for_status()
    before = [fuzzed.get(POLICIES).content]

    @FUZZ
    @given(paths, bodies)
    def check(path: str, content: bytes) -> None:
        answer = fuzzed.post(path, content=content)
        answered(answer)
        after = fuzzed.get(POLICIES).content
        if answer.status_code != 200:
            assert after == before[0]
        before[0] = after

    check()


def test_no_query_is_answered_500(fuzzed: httpx.Client) -> None:
    fuzzed.post(POLICIES, json=body(policy("a", "b"))).raise_for_status()

    @FUZZ
    @given(st.sampled_from(["policies", "history", "tags", "whoami"]), queries)
    def check(path: str, query: str) -> None:
        answered(fuzzed.get(f"{EXTERNAL}/{path}?{query}"))

    check()


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_no_path_nor_header_is_answered_500(fuzzed: httpx.Client) -> None:
    values = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=30)
    headers = st.sampled_from(
        ["Authorization", "Origin", "X-Vcap-Request-Id", "If-None-Match", "Content-Type", "Accept"]
    )

    @FUZZ
    @given(segments, headers, values.map(str.strip), st.sampled_from(["GET", "POST", "PUT", "OPTIONS", "HEAD", "BREW"]))
    def check(path: list[str], header: str, value: str, method: str) -> None:
        for target in ("/".join(["", *path]), POLICIES):
            answered(fuzzed.request(method, target, headers={header.encode(): value.encode("latin-1")}))

    check()


def test_a_refused_change_costs_no_revision_and_no_tag(api: httpx.Client) -> None:
    api.post(POLICIES, json=body(policy("a", "b")))
    revision = api.post(POLICIES, json=body(policy("a", "b"))).headers["X-Silkbus-Revision"]
    tags = api.get(f"{EXTERNAL}/tags").json()
    for path in (POLICIES, DELETE):
        assert api.post(path, json=body(policy("a", "b"), policy("new", "b", 0))).status_code == 400
    assert api.post(POLICIES, json=body(policy("a", "b"))).headers["X-Silkbus-Revision"] == revision
    assert api.get(f"{EXTERNAL}/tags").json() == tags


# Clients that take their time.


def connect(server: PolicyServer) -> socket.socket:
    return socket.create_connection(server.listener.getsockname(), timeout=60)


def head(length: int, token: str = ADMIN_TOKEN) -> bytes:
    lines = [f"POST {POLICIES} HTTP/1.1", "Host: x", f"Authorization: {token}", f"Content-Length: {length}", "", ""]
    return "\r\n".join(lines).encode()


def test_a_thousand_connections_that_do_nothing(standing_server: PolicyServer, api: httpx.Client) -> None:
    """Half of them have begun a request."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip(f"this process may open only {hard} files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    with ExitStack() as stack:
        for number in range(1000):
            connection = stack.enter_context(connect(standing_server))
            if number % 2:
                connection.sendall(head(10_000)[: 20 + number])
        for number in range(20):
            assert api.post(POLICIES, json=body(policy("a", f"b{number}"))).status_code == 200
        assert api.get(POLICIES).json()["total_policies"] == 20


def test_refused_long_bodies_in_parallel(standing_server: PolicyServer, api: httpx.Client) -> None:
    """Without a token nothing is read into memory, and the answer comes before the body has ended."""
    with ExitStack() as stack:
        connections = [stack.enter_context(connect(standing_server)) for _ in range(50)]
        for connection in connections:
            connection.sendall(head(1 << 40, "wrong") + b"x" * 1000)
        for connection in connections:
            assert connection.recv(1000).startswith(b"HTTP/1.1 401 ")
        assert api.get(POLICIES).status_code == 200


@asynccontextmanager
async def bounded(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> AsyncIterator[tuple[str, int]]:
    """A server with the policy server's protocol and these limits; it answers with as many bytes as it is asked for."""
    for name, value in {"IDLE": 30.0, "HEAD": 30.0, "BODY": 31.0, "ANSWER": 30.0, **seconds}.items():
        monkeypatch.setattr(listener, f"{name}_SECONDS", value)

    async def answer(request: Request) -> Response:
        if request.method == "POST":
            await request.body()
        return PlainTextResponse(b"x" * int(request.query_params.get("size", "2")))

    app = Starlette(routes=[Route("/", answer, methods=["GET", "POST"])])
    with listener.listening("127.0.0.1:0") as bound:
        async with serving(app, bound, protocol=BoundedProtocol):
            yield bound.getsockname()


async def trickle(writer: asyncio.StreamWriter, part: bytes) -> None:
    while True:
        writer.write(part)
        await writer.drain()
        await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("limit", "begin", "part", "expected"),
    [
        ("HEAD", b"GET / HTTP/1.1\r\n", b"A: b\r\n", b"HTTP/1.1 408 "),
        ("HEAD", b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\n", b"A: b\r\n", b"HTTP/1.1 200 "),
        ("BODY", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n", b"x", b""),
        ("BODY", b"POST /none HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n", b"x", b"HTTP/1.1 404 "),
        ("IDLE", b"", b"", b""),
        ("IDLE", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"", b"HTTP/1.1 200 "),
    ],
)
async def test_who_trickles_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, limit: str, begin: bytes, part: bytes, expected: bytes
) -> None:
    async with asyncio.timeout(20), bounded(monkeypatch, **{limit: 0.5}) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(begin)
        task = asyncio.create_task(trickle(writer, part))
        received = b""
        try:
            while data := await reader.read(65536):
                received += data
        except ConnectionError:
            pass
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            writer.close()
        assert received.startswith(expected)
        assert bool(received) == bool(expected)


async def test_who_does_not_read_the_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    async with asyncio.timeout(20), bounded(monkeypatch, ANSWER=0.5) as address:
        reader, writer = await asyncio.open_connection(*address, limit=1024)
        writer.write(b"GET /?size=50000000 HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.sleep(1)
        received = 0
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                received += len(data)
        assert received < 50_000_000
        writer.close()


async def test_a_client_in_time_is_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests on one connection, each slow, for longer than any one of them may take."""
    async with asyncio.timeout(20), bounded(monkeypatch, HEAD=2.0, BODY=2.1, IDLE=2.2) as address:
        reader, writer = await asyncio.open_connection(*address)
        for _ in range(4):
            for part in (b"POST / HTTP/1.1\r\n", b"Host: x\r\nContent-Length: 4\r\n\r\n", b"ab", b"cd"):
                writer.write(part)
                await asyncio.sleep(0.3)
            assert (await reader.readuntil(b"\r\n\r\nxx")).startswith(b"HTTP/1.1 200 ")
        writer.close()


@pytest.mark.parametrize("size", [100, 5_000_000])
def test_what_was_accepted_is_answered_when_the_server_is_asked_to_end(tmp_path: Path, size: int) -> None:
    port = free_port()
    server = PolicyServer(tmp_path, listen=f"127.0.0.1:{port}")
    url = f"http://127.0.0.1:{port}"
    server.start(ready=lambda: httpx.get(url, timeout=5, trust_env=False))
    assert server.process is not None
    content = json.dumps(body(policy("a", "b"))).encode().ljust(size)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(head(len(content)) + content[: size // 2])
        time.sleep(0.5)
        server.process.terminate()
        wait_for(lambda: refuses(port))
        connection.sendall(content[size // 2 :])
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert server.process.wait(60) == 0
    server.start(ready=lambda: httpx.get(url, timeout=5, trust_env=False))
    headers = {"Authorization": ADMIN_TOKEN}
    assert httpx.get(url + POLICIES, headers=headers, trust_env=False).json()["policies"] == [policy("a", "b")]
    server.close()


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return True
    return False


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_server_answers_while_it_reads_and_writes_long_bodies(
    api: httpx.Client, standing_server: PolicyServer
) -> None:
    """The event loop is never held for long: others are answered meanwhile."""
    many = body(*(policy(f"app-{number % 200}", f"other-{number % 150}", 1 + number) for number in range(20_000)))
    content = json.dumps(many).encode()
    done = threading.Event()
    slowest = 0.0

    def watch() -> None:
        nonlocal slowest
        with standing_server.client() as other:
            while not done.is_set():
                started = time.monotonic()
                assert other.get("/").status_code == 200
                slowest = max(slowest, time.monotonic() - started)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert api.post(POLICIES, content=content).status_code == 200
        assert api.get(POLICIES).json()["total_policies"] == 20_000
        assert api.post(DELETE, content=content).status_code == 200
    finally:
        done.set()
        watcher.join()
    assert slowest < 5, "seconds without an answer"
