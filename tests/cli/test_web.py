"""Servers that break off, say nonsense, or nothing: a change is sent once, and what became of it is not guessed."""

import socket
import threading
import time

import pytest

from cli.client import Client, Policy
from cli.errors import Failed, Refused
from cli.login import FixedToken, claims, expired, owner
from cli.web import Server as Web
from tests.cli.fake_cf import Server
from tests.policy.stubs import Uaa

POLICY = Policy("a", "b", "tcp", 1, 2)
DOUBT = "Whether the change was made is not known: look with `silkbus network-policies`."


class Answering(Server):
    """Reads a request, answers these bytes, and breaks off, or stays."""

    def __init__(self, answer: bytes, *, stays: float = 0) -> None:
        self.answer, self.stays = answer, stays
        self.requests = 0
        super().__init__()

    def serve(self, connection: socket.socket) -> None:
        received = b""
        while b"\r\n\r\n" not in received:
            if not (part := connection.recv(65536)):
                return
            received += part
        self.requests += 1
        connection.sendall(self.answer)
        time.sleep(self.stays)


def client(server: Server) -> Client:
    return Client(Web(f"http://127.0.0.1:{server.port}", FixedToken("x")))


@pytest.mark.parametrize(
    "answer",
    [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}", b"HTTP/1.1 2"],
    ids=["nothing", "nonsense", "cut body", "cut head"],
)
def test_a_change_without_an_answer_is_in_doubt_and_sent_once(answer: bytes) -> None:
    with Answering(answer) as server:
        with pytest.raises(Failed, match="did not answer POST /policies") as error:
            client(server).add([POLICY])
        assert str(error.value).endswith(DOUBT)
        with pytest.raises(Failed, match="did not answer GET /policies") as error:
            client(server).policies()
        assert DOUBT not in str(error.value)
        assert server.requests == 2


def test_a_server_that_stays_silent_is_not_waited_for_long() -> None:
    with Answering(b"", stays=3) as server:
        web = Web(f"http://127.0.0.1:{server.port}")
        with pytest.raises(Failed, match="did not answer GET /x: TimeoutError"), web.open("GET", "/x", timeout=0.2):
            pass


@pytest.mark.parametrize(
    ("status", "body", "text"),
    [
        (500, b"{}", "Unexpected Response\nResponse code: 500\nRequest ID:    17\nDescription:   "),
        (503, b"no healthy upstream", "Error Code: 503\nRaw Response: no healthy upstream"),
        (409, b'{"error":"no"}', "no"),
        (200, b"[]", "Error Code: 200\nRaw Response: []"),
        (200, b'{"policies":[{}]}', "answered a list of policies that cannot be understood"),
        (200, b'{"policies":7}', "answered a list of policies that cannot be understood"),
    ],
)
def test_answers_amiss_are_shown(status: int, body: bytes, text: str) -> None:
    head = f"HTTP/1.1 {status} X\r\nX-Vcap-Request-Id: 17\r\nContent-Length: {len(body)}\r\n\r\n"
    with Answering(head.encode() + body) as server:
        with pytest.raises(Failed) as error:
            client(server).policies()
        assert text in str(error.value)
        if isinstance(error.value, Refused):
            assert error.value.status == status


def test_the_revision_of_a_change() -> None:
    for header, revision in (("", None), ("X-Silkbus-Revision: 7\r\n", 7), ("X-Silkbus-Revision: x\r\n", None)):
        with Answering(f"HTTP/1.1 200 OK\r\n{header}Content-Length: 2\r\n\r\n{{}}".encode()) as server:
            assert client(server).remove([POLICY]) == revision


def test_what_a_token_tells() -> None:
    uaa = Uaa()
    token = f"bearer {uaa.token('network.admin', user_name='admin')}"
    assert (owner(token), expired(token)) == ("admin", False)
    assert expired(uaa.token(exp=int(time.time()) + 5))
    assert owner(uaa.token(user_name=None, client_id="batch")) == "batch"
    for other in ("", "opaque", "a.b.c", "a.e30.c", "a.W10.c", "a.\u00e9.c", uaa.token(exp=None)):
        assert not expired(other)
    assert claims("a.W10.c") == {}
    assert FixedToken("bearer x").token() == FixedToken("x").token() == "bearer x"


def test_a_server_that_speaks_no_tls() -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    url = f"https://127.0.0.1:{listener.getsockname()[1]}"
    with listener, pytest.raises(Failed, match=f"{url}: TLS failed: "):
        Web(url).send("GET", "/")
    thread.join(30)
