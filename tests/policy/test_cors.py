"""OPTIONS, CORS, and the API over TLS (contract/policy.md 1.1, 1.2)."""

import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from bus.listener import server_tls
from services.policy.cors import Origins
from tests.policy.server import ADMIN_TOKEN, DELETE, POLICIES, PolicyServer
from tests.policy.stubs import certificate

ORIGIN = "Access-Control-Allow-Origin"
STATIC = {"x-content-type-options", "x-xss-protection", "x-frame-options", "content-security-policy"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PolicyServer]:
    server = PolicyServer(tmp_path_factory.mktemp("cors"), allowed_cors_domains="https://a.example,https://b.example")
    server.start()
    yield server
    server.close()


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/", "GET,OPTIONS"),
        ("/networking", "GET,OPTIONS"),
        ("/health", "GET,OPTIONS"),
        (POLICIES, "POST,GET,OPTIONS"),
        (DELETE, "POST,OPTIONS"),
        ("/networking/v0/external/tags", "GET,OPTIONS"),
        ("/networking/v7/external/whoami", "GET,OPTIONS"),
    ],
)
def test_options_needs_no_token_and_tells_the_methods(shared: PolicyServer, path: str, methods: str) -> None:
    answer = httpx.options(shared.url + path, headers={"Origin": "https://b.example"}, trust_env=False)
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["Access-Control-Allow-Methods"] == methods
    assert answer.headers["Access-Control-Allow-Headers"] == "authorization"
    assert answer.headers[ORIGIN] == "https://b.example"
    assert set(answer.headers) >= STATIC
    assert "X-Vcap-Request-Id" not in answer.headers
    assert "Strict-Transport-Security" not in answer.headers


def test_errors_and_answers_name_the_origin_that_may_read_them(shared: PolicyServer) -> None:
    with shared.client() as client:
        for path, status in ((POLICIES, 200), ("/networking/v9/external/tags", 406)):
            answer = client.get(path, headers={"Origin": "https://a.example"})
            assert (answer.status_code, answer.headers[ORIGIN]) == (status, "https://a.example")
            for headers in ({}, {"Origin": "https://c.example"}, {"Origin": "https://a.example.evil"}):
                assert ORIGIN not in client.get(path, headers=headers).headers
    answer = httpx.get(shared.url + POLICIES, headers={"Origin": "https://a.example"}, trust_env=False)
    assert (answer.status_code, answer.headers[ORIGIN]) == (401, "https://a.example")


@pytest.mark.parametrize(
    ("allowed", "origin", "expected"),
    [
        ((), "https://a", None),
        (("*",), "https://a", "*"),
        (("https://a", "*"), "https://a", "https://a"),
        (("*", "https://a"), "https://a", "*"),
        (("https://b", "*"), "https://a", "*"),
        (("*",), None, None),
    ],
)
def test_the_first_entry_that_matches_is_named(allowed: tuple[str, ...], origin: str | None, expected: object) -> None:
    assert Origins(allowed).headers(origin).get(ORIGIN) == expected


@pytest.fixture
def tls(tmp_path: Path) -> Iterator[tuple[PolicyServer, ssl.SSLContext]]:
    authority, (cert, key) = certificate(tmp_path)
    server = PolicyServer(tmp_path, enable_tls=True, server_cert_file=cert, server_key_file=key)
    trusting = ssl.create_default_context(cafile=authority)
    server.start(ready=lambda: httpx.get(server.url.replace("http:", "https:"), verify=trusting, timeout=1))
    yield server, trusting
    server.close()


def test_tls(tls: tuple[PolicyServer, ssl.SSLContext]) -> None:
    server, trusting = tls
    url = server.url.replace("http:", "https:")
    with httpx.Client(verify=trusting, headers={"Authorization": ADMIN_TOKEN}, trust_env=False) as client:
        for path, status in ((POLICIES, 200), ("/", 200), ("/networking/v9/external/tags", 406)):
            answer = client.get(url + path)
            assert answer.status_code == status
            assert answer.headers["Strict-Transport-Security"] == "max-age=31536000"
        assert client.options(url + POLICIES).headers["Strict-Transport-Security"] == "max-age=31536000"
    plain = httpx.get(server.url, trust_env=False)
    assert (plain.status_code, plain.text) == (400, "Client sent an HTTP request to an HTTPS server.\n")


def test_nothing_older_than_tls_1_2(tmp_path: Path) -> None:
    _, files = certificate(tmp_path)
    assert server_tls(*files).minimum_version == ssl.TLSVersion.TLSv1_2


def test_a_certificate_that_cannot_be_used_is_said_at_start(tmp_path: Path) -> None:
    missing = tmp_path / "missing.pem"
    server = PolicyServer(tmp_path, enable_tls=True, server_cert_file=missing, server_key_file=missing)
    with pytest.raises(AssertionError):
        server.start()
    assert f"server_cert_file, server_key_file: {missing} and {missing} are not a readable PEM" in server.log
    server.close()
