"""Tokens: asking UAA, and by its keys; rotation; what is no access token of ours; UAA away."""

import asyncio
import base64
import hashlib
import hmac
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from bus.decode import Malformed
from services.policy import token_keys
from services.policy.identity import Authenticator, Identity, Unavailable
from services.policy.remote import Remote, trust
from services.policy.token_keys import TokenKeys
from services.policy.uaa import CheckToken, OwnToken
from tests.policy.stubs import EC_KEY, ISSUER, LOGIN, RSA_KEYS, Uaa, certificate, own_token, published, remote

AUDIENCES = ("network", "cloud_controller")


@pytest.fixture
def uaa() -> Iterator[Uaa]:
    stub = Uaa()
    stub.start()
    yield stub
    stub.fault = None
    stub.stop()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keys(uaa: Uaa, clock: Clock) -> TokenKeys:
    return TokenKeys(remote(uaa), audiences=AUDIENCES, issuer=ISSUER, clock=clock)


@pytest.fixture
def checking(uaa: Uaa) -> CheckToken:
    return CheckToken(remote(uaa), LOGIN, remember=0)


@pytest.fixture(params=["keys", "checking"])
async def authenticator(request: pytest.FixtureRequest) -> Authenticator:
    found: Authenticator = request.getfixturevalue(request.param)
    return found


async def test_a_users_token(uaa: Uaa, authenticator: Authenticator) -> None:
    token = uaa.token("network.admin", "openid")
    assert await authenticator.verify(token) == Identity("dev-guid", "dev", ("network.admin", "openid"))


async def test_a_clients_token_has_its_id_only(uaa: Uaa, authenticator: Authenticator) -> None:
    token = uaa.token("network.write", sub="some-client", user_name=None)
    assert await authenticator.verify(token) == Identity("some-client", "some-client", ("network.write",))


@pytest.mark.parametrize("token", ["", "nonsense", "a.b.c", "ä=&token=x", "." * 5000, "[" * 50_000 + ".e30.e30"])
async def test_nonsense_is_no_token(authenticator: Authenticator, token: str) -> None:
    assert await authenticator.verify(token) is None


async def test_deep_nesting_is_no_token(authenticator: Authenticator) -> None:
    deep = base64.urlsafe_b64encode(b"[" * 40_000).decode().rstrip("=")
    assert await authenticator.verify(f"{deep}.{deep}.{deep}") is None


async def test_an_expired_token(uaa: Uaa, authenticator: Authenticator) -> None:
    assert await authenticator.verify(uaa.token("network.admin", exp=int(time.time()) - 60)) is None


# By keys.


@pytest.mark.parametrize(
    "claims",
    [
        {"exp": None},
        {"exp": "soon"},
        {"nbf": int(time.time()) + 3600},
        {"aud": None},
        {"aud": ["cf", "uaa"]},
        {"aud": "networks"},
        {"iss": "https://uaa.example.org/oauth/token"},
        {"iss": None},
        {"jti": "0a1b-r"},
        {"sub": None, "user_name": None},
        {"sub": 5, "user_name": None},
        {"scope": {"network.admin": True}},
        {"scope": [["network.admin"]]},
    ],
)
async def test_tokens_that_are_not_for_us(uaa: Uaa, keys: TokenKeys, claims: dict[str, Any]) -> None:
    assert await keys.verify(uaa.token("network.admin", **claims)) is None


async def test_a_little_leeway(uaa: Uaa, keys: TokenKeys) -> None:
    assert await keys.verify(uaa.token("network.admin", exp=int(time.time()) - 2)) is not None
    assert await keys.verify(uaa.token("network.admin", nbf=int(time.time()) + 5)) is not None


async def test_either_audience_will_do(uaa: Uaa, keys: TokenKeys) -> None:
    assert await keys.verify(uaa.token("network.write", aud="network")) is not None
    assert await keys.verify(uaa.token("openid", aud=["cf", "cloud_controller"])) is not None


async def test_elliptic_curves(uaa: Uaa, keys: TokenKeys) -> None:
    uaa.keys["ec"] = EC_KEY
    assert await keys.verify(uaa.token("network.admin", kid="ec")) is not None


async def test_forged_tokens(uaa: Uaa, keys: TokenKeys) -> None:
    good = uaa.token("network.admin")
    assert await keys.verify(good) is not None
    claims: dict[str, Any] = jwt.decode(good, options={"verify_signature": False})
    assert await keys.verify(uaa.token("network.admin", key=RSA_KEYS[1])) is None
    unsigned = jwt.encode(claims, None, algorithm="none", headers={"kid": "key-1"})
    assert await keys.verify(unsigned) is None
    assert await keys.verify(unsigned + good.rpartition(".")[2]) is None
    # The public key, which everybody has, taken as the secret of a symmetric signature (RFC 8725, 2.1).
    secret = RSA_KEYS[0].public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for public in (secret, secret.strip(), json.dumps(published("key-1", RSA_KEYS[0])).encode()):
        assert await keys.verify(_signed_with_secret(claims, public)) is None
    # Another algorithm than the key's, by the same family.
    assert await keys.verify(jwt.encode(claims, RSA_KEYS[0], algorithm="RS512", headers={"kid": "key-1"})) is None
    # No key id, and one that is no text.
    assert await keys.verify(jwt.encode(claims, RSA_KEYS[0], algorithm="RS256")) is None
    # Claims of another token.
    head, _, signature = good.split(".")
    body = base64.urlsafe_b64encode(json.dumps({**claims, "sub": "other"}).encode()).decode().rstrip("=")
    assert await keys.verify(f"{head}.{body}.{signature}") is None


def _signed_with_secret(claims: dict[str, Any], secret: bytes) -> str:

    def part(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).decode().rstrip("=")

    signed = ".".join(part(json.dumps(item).encode()) for item in ({"alg": "HS256", "kid": "key-1"}, claims))
    return f"{signed}.{part(hmac.new(secret, signed.encode(), hashlib.sha256).digest())}"


async def test_only_public_keys_for_signatures_count(uaa: Uaa, keys: TokenKeys) -> None:
    good = published("x", RSA_KEYS[1])
    secret = base64.urlsafe_b64encode(b"s" * 32).decode().rstrip("=")
    uaa.extra_keys = [
        5,
        {},
        {**good, "kid": None},
        {**good, "kid": "enc", "use": "enc"},
        {**good, "kid": "hs", "alg": "HS256"},
        {**good, "kid": "none", "alg": "none"},
        {**good, "kid": "broken", "n": "!"},
        {"kty": "oct", "kid": "oct", "k": secret, "alg": "HS256"},
        {**good, "kid": "plain", "alg": None},
    ]
    del uaa.extra_keys[-1]["alg"]
    assert await keys.verify(uaa.token("network.admin")) is not None
    assert await keys.verify(uaa.token("network.admin", kid="plain", key=RSA_KEYS[1])) is not None
    for kid in ("enc", "hs", "none", "broken"):
        assert await keys.verify(uaa.token("network.admin", kid=kid, key=RSA_KEYS[1])) is None
    claims = {"sub": "x", "scope": ["network.admin"], "aud": "network", "iss": ISSUER, "exp": int(time.time()) + 60}
    symmetric = jwt.encode(claims, b"s" * 32, algorithm="HS256", headers={"kid": "oct"})
    assert await keys.verify(symmetric) is None


async def test_a_new_key_works_at_once_and_an_old_one_until_the_next_fetch(
    uaa: Uaa, keys: TokenKeys, clock: Clock
) -> None:
    old = uaa.token("network.admin")
    assert await keys.verify(old) is not None
    clock.now += token_keys.GAP_SECONDS
    uaa.keys = {"key-2": RSA_KEYS[1]}
    assert await keys.verify(uaa.token("network.admin", kid="key-2")) is not None
    assert await keys.verify(old) is None


async def test_keys_are_fetched_regularly(uaa: Uaa) -> None:
    keys = TokenKeys(remote(uaa), audiences=AUDIENCES, refresh=0.05)
    old = uaa.token("network.admin")
    task = asyncio.create_task(keys.run())
    try:
        assert await keys.verify(old) is not None
        uaa.keys = {"key-2": RSA_KEYS[1]}
        async with asyncio.timeout(20):
            while await keys.verify(old) is not None:
                await asyncio.sleep(0.02)
    finally:
        task.cancel()


async def test_invented_key_ids_do_not_make_us_ask_all_the_time(uaa: Uaa, keys: TokenKeys, clock: Clock) -> None:
    tokens = [uaa.token("network.admin", kid=f"x{i}", key=RSA_KEYS[1]) for i in range(50)]
    assert await asyncio.gather(*map(keys.verify, tokens)) == [None] * 50
    assert len(uaa.asked) == 1
    clock.now += token_keys.GAP_SECONDS
    assert await asyncio.gather(*map(keys.verify, tokens)) == [None] * 50
    assert len(uaa.asked) == 2


async def test_with_uaa_away_known_keys_go_on_for_a_while(uaa: Uaa, keys: TokenKeys, clock: Clock) -> None:
    token, new = uaa.token("network.admin"), uaa.token("network.admin", kid="new", key=RSA_KEYS[1])
    assert await keys.verify(token) is not None
    uaa.stop()
    clock.now += token_keys.TRUST_SECONDS - 1
    assert await keys.verify(token) is not None
    for _ in range(2):  # the second is refused at once: it is not asked so often
        with pytest.raises(Unavailable, match=r"^UAA cannot be reached$"):
            await keys.verify(new)
    clock.now += 1
    with pytest.raises(Unavailable, match=r"^UAA cannot be reached$"):
        await keys.verify(token)
    uaa.start()
    clock.now += token_keys.GAP_SECONDS
    assert await keys.verify(token) is not None


async def test_an_answer_without_keys_does_not_replace_them(uaa: Uaa, keys: TokenKeys, clock: Clock) -> None:
    token = uaa.token("network.admin")
    assert await keys.verify(token) is not None
    uaa.keys = {}
    clock.now += token_keys.GAP_SECONDS
    with pytest.raises(Unavailable, match="publishes no public RSA or EC key"):
        await keys.verify(_unknown(RSA_KEYS[1]))
    assert await keys.verify(token) is not None


def _unknown(key: Any) -> str:
    return jwt.encode({"sub": "x"}, key, algorithm="RS256", headers={"kid": "unknown"})


# By asking.


async def test_uaa_decides(uaa: Uaa, checking: CheckToken) -> None:
    token = uaa.token("network.admin")
    assert await checking.verify(token) is not None
    uaa.revoked.add(token)
    assert await checking.verify(token) is None
    assert len(uaa.asked) == 2


async def test_a_token_is_sent_as_it_is(uaa: Uaa, checking: CheckToken) -> None:
    odd = "a+b/c==&scope=network.admin&x=%41"
    uaa.opaque[odd] = {"scope": ["network.write"], "user_name": "dev"}
    assert await checking.verify(odd) == Identity("", "dev", ("network.write",))


async def test_a_valid_token_is_remembered_for_seconds(uaa: Uaa) -> None:
    checking = CheckToken(remote(uaa), LOGIN, remember=60)
    token, ended = uaa.token("network.admin"), uaa.token("network.admin", jti="b")
    uaa.opaque[ended] = {"sub": "x", "exp": int(time.time()) - 1}
    for _ in range(3):
        assert await checking.verify(token) is not None
        assert await checking.verify(ended) is not None
        assert await checking.verify(token + "x") is None
    assert len(uaa.asked) == 1 + 3 + 3


@pytest.mark.parametrize("claims", [{}, {"sub": 5}, {"user_name": "x", "scope": "a b"}, {"sub": "x", "exp": "soon"}])
async def test_malformed_claims_are_uaas_fault(uaa: Uaa, checking: CheckToken, claims: dict[str, Any]) -> None:
    uaa.opaque["t"] = claims
    with pytest.raises(Unavailable, match=r"^UAA gave an answer that cannot be understood$"):
        await checking.verify("t")


async def test_our_own_credentials_being_wrong_is_not_the_callers_fault(uaa: Uaa) -> None:
    checking = CheckToken(remote(uaa), ("policy-server", "wrong"), remember=0)
    with pytest.raises(Unavailable, match="UAA does not accept this server as a client; uaa_client, uaa_client_secret"):
        await checking.verify(uaa.token("network.admin"))


# Our own token.


async def test_our_own_token_is_got_once_and_again_when_refused(uaa: Uaa) -> None:
    own = own_token(uaa)
    assert set(await asyncio.gather(*(own.get() for _ in range(10)))) == {"own-0"}
    own.refused("another")
    assert await own.get() == "own-0"
    own.refused("own-0")
    assert await own.get() == "own-1"


async def test_our_own_token_is_renewed_before_its_end(uaa: Uaa) -> None:
    uaa.lasts = 1
    own = own_token(uaa)
    first = await own.get()
    assert first == await own.get()
    await asyncio.sleep(0.6)
    assert await own.get() == "own-1"


async def test_our_own_token_with_wrong_credentials(uaa: Uaa) -> None:
    with pytest.raises(Unavailable, match="uaa_client_secret"):
        await OwnToken(remote(uaa), ("x", "y")).get()


# UAA away or ill.


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (500, "UAA answered with status 500"),
        (503, "UAA answered with status 503"),
        (429, "UAA answered with status 429"),
        (404, "UAA answered with status 404"),
        (302, "UAA answered with status 302"),
        ("garbage", "UAA gave an answer that is no JSON object"),
        ("list", "UAA gave an answer that is no JSON object"),
        ("hang", "UAA did not answer within"),
    ],
)
async def test_a_fault_is_said_soon(uaa: Uaa, authenticator: Authenticator, fault: str | int, text: str) -> None:
    uaa.fault = fault
    started = time.monotonic()
    with pytest.raises(Unavailable, match=f"^{text}"):
        await authenticator.verify(uaa.token("network.admin"))
    assert time.monotonic() - started < 12
    uaa.fault = None


async def test_no_connection_is_said_soon(uaa: Uaa, authenticator: Authenticator) -> None:
    uaa.stop()
    with pytest.raises(Unavailable, match=r"^UAA cannot be reached$"):
        await authenticator.verify(uaa.token("network.admin"))


async def test_a_peer_that_accepts_and_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        silent = Remote("UAA", f"http://127.0.0.1:{listener.getsockname()[1]}", trust([], skip_validation=False))
        started = time.monotonic()
        with pytest.raises(Unavailable, match=r"^UAA did not answer within"):
            await CheckToken(silent, LOGIN, remember=0).verify("t")
        assert time.monotonic() - started < 12


@pytest.mark.parametrize(("after", "asked"), [("0", 2), ("1", 2), ("3600", 1), ("Mon, 23 Nov 2026 19:00:00 GMT", 2)])
async def test_retry_after_is_minded(uaa: Uaa, checking: CheckToken, after: str, asked: int) -> None:
    uaa.fault, uaa.fault_headers = 503, {"Retry-After": after}
    started = time.monotonic()
    with pytest.raises(Unavailable):
        await checking.verify("t")
    assert len(uaa.asked) == asked
    assert time.monotonic() - started >= (1 if after == "1" else 0)


async def test_a_fault_that_passes_is_not_noticed(uaa: Uaa, checking: CheckToken) -> None:
    token = uaa.token("network.admin")
    uaa.fault = 502

    async def mend() -> None:
        while not uaa.asked:
            await asyncio.sleep(0.01)
        uaa.fault = None

    _, identity = await asyncio.gather(mend(), checking.verify(token))
    assert identity is not None


# TLS.


async def test_certificates_are_checked(tmp_path: Path) -> None:
    authority, files = certificate(tmp_path)
    uaa = Uaa(tls=files)
    uaa.start()
    try:
        blank = tmp_path / "blank"
        blank.write_text(" \n")
        for trusted, reached in [
            (trust([blank, authority], skip_validation=False), True),
            (trust([], skip_validation=True), True),
            (trust([blank], skip_validation=False), False),
        ]:
            checking = CheckToken(Remote("UAA", uaa.url, trusted), LOGIN, remember=0)
            if reached:
                assert await checking.verify(uaa.token("network.admin")) is not None
            else:
                with pytest.raises(Unavailable, match=r"^UAA cannot be reached$"):
                    await checking.verify("t")
    finally:
        uaa.stop()


def test_ca_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(Malformed, match=f"CA file {tmp_path}/none: cannot be read: No such file"):
        trust([tmp_path / "none"], skip_validation=False)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(Malformed, match=f"CA file {tmp_path}/text: holds no certificates in PEM form"):
        trust([tmp_path / "text"], skip_validation=False)
