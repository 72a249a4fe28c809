"""Who may do what, through the API of a real server, with UAA and Cloud Controller beside it (contract 1.6, 1.7)."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.policy.server import DELETE, POLICIES, WRITE_TOKEN, PolicyServer, body, policy
from tests.policy.stubs import LOGIN, CloudControllerStub, Uaa, certificate

UNKNOWN = "one or more applications cannot be found or accessed"
SHORTLY = "; try again shortly, and tell the operator if it lasts"


@dataclass
class Foundation:
    """A policy server, and what it asks."""

    server: PolicyServer
    uaa: Uaa
    controller: CloudControllerStub

    def client(self, *scopes: str, **claims: Any) -> httpx.Client:
        return self.server.client(self.uaa.token(*scopes, **claims))


@contextmanager
def foundation(folder: Path, auth: str, **settings: str) -> Iterator[Foundation]:
    authority, files = certificate(folder)
    uaa = Uaa(files)
    controller = CloudControllerStub(uaa, files)
    host, _, port = uaa.url.rpartition(":")
    server = PolicyServer(
        folder,
        auth=auth,
        uaa_url=host,
        uaa_port=port,
        uaa_client=LOGIN[0],
        uaa_client_secret=LOGIN[1],
        uaa_ca=authority,
        cc_url=controller.url,
        **{"token_cache": 0, "cc_cache": 0, **settings},
    )
    try:
        uaa.start()
        controller.start()
        server.start()
        yield Foundation(server, uaa, controller)
    finally:
        server.close()
        for stub in (uaa, controller):
            stub.fault = None
            stub.stop()


@pytest.fixture(scope="module", params=["uaa-check", "uaa-keys"])
def standing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Foundation]:
    with foundation(tmp_path_factory.mktemp("foundation"), request.param, max_policies="3") as made:
        yield made


@pytest.fixture
def place(standing: Foundation) -> Iterator[Foundation]:
    """`dev-guid` develops space s1, with apps a and b; c is in s2, where another does."""
    standing.controller.apps = {"a": "s1", "b": "s1", "c": "s2"}
    standing.controller.developers = {"dev-guid": {"s1"}, "other-guid": {"s2"}, "both-guid": {"s1", "s2"}}
    with standing.client("network.admin") as admin:
        if policies := admin.get(POLICIES).json()["policies"]:
            admin.post(DELETE, json={"policies": policies}).raise_for_status()
    yield standing
    for stub in (standing.uaa, standing.controller):
        stub.fault = None


def refused(answer: httpx.Response, status: int, text: str) -> None:
    assert (answer.status_code, answer.json()) == (status, {"error": text})
    assert answer.headers["content-type"] == "application/json"


def pairs(client: httpx.Client) -> list[str]:
    answer = client.get(POLICIES)
    assert answer.status_code == 200, answer.text
    content = answer.json()
    assert content["total_policies"] == len(content["policies"])
    return [item["source"]["id"] + item["destination"]["id"] for item in content["policies"]]


def test_tokens_that_are_not_valid(place: Foundation) -> None:
    for token in (
        "nonsense",
        place.uaa.token("network.admin", exp=1),
        place.uaa.token("network.admin")[:-8] + "AAAAAAAA",
    ):
        with place.server.client(token) as client:
            answer = client.get(POLICIES)
            refused(answer, 401, "failed to verify token with uaa")
            assert answer.headers["WWW-Authenticate"] == "Bearer"
    refused(httpx.get(place.server.url + POLICIES, trust_env=False), 401, "missing authorization header")


def test_scopes_are_needed(place: Foundation) -> None:
    for scopes, said in [(("openid", "network.read"), "openid network.read"), ((), "")]:
        text = f"provided scopes [{said}] do not include allowed scopes [network.admin network.write]"
        with place.client(*scopes, aud="network") as client:
            refused(client.get(POLICIES), 403, text)
            refused(client.post(POLICIES, json=body(policy("a", "b"))), 403, text)
            refused(client.post(DELETE, json=body(policy("a", "b"))), 403, text)


def test_an_admin_needs_no_spaces(place: Foundation) -> None:
    place.controller.fault = 500
    with place.client("network.admin") as admin:
        policies = [policy("x", "y", port) for port in range(1, 6)]  # more than max_policies
        assert admin.post(POLICIES, json=body(*policies)).status_code == 200
        assert pairs(admin) == ["xy"] * 5


def test_a_developer_in_every_space_concerned(place: Foundation) -> None:
    with place.client("network.write") as dev, place.client("network.write", sub="both-guid") as both:
        for path in (POLICIES, DELETE):
            assert dev.post(path, json=body(policy("a", "b"))).content == b"{}"
            for wrong in (policy("a", "c"), policy("c", "a"), policy("c", "c")):
                refused(dev.post(path, json=body(policy("a", "b"), wrong)), 403, UNKNOWN)
            assert both.post(path, json=body(policy("a", "c"))).status_code == 200
        assert pairs(both) == []


def test_apps_that_nobody_knows_are_refused(place: Foundation) -> None:
    with place.client("network.write") as dev, place.client("network.admin") as admin:
        for wrong in ((policy("a", "x"),), (policy("x", "a"),), (policy("dead1", "dead2"),)):
            refused(dev.post(POLICIES, json=body(policy("a", "b"), *wrong)), 403, UNKNOWN)
            refused(dev.post(DELETE, json=body(*wrong)), 403, UNKNOWN)
        refused(dev.post(POLICIES, json=body(policy("a,b", "b"))), 403, UNKNOWN)
        assert pairs(admin) == []


def test_bad_requests_come_before_the_spaces(place: Foundation) -> None:
    place.controller.fault = 500
    with place.client("network.write") as dev:
        refused(dev.post(POLICIES, json=body()), 400, "mapper: validate policies: missing policies")


def test_a_clients_token_is_checked_by_its_id(place: Foundation) -> None:
    place.controller.developers["robot"] = {"s1"}
    with place.client("network.write", sub="robot", user_name=None) as robot:
        assert robot.post(POLICIES, json=body(policy("a", "b"))).status_code == 200


def test_a_list_shows_what_has_both_ends_in_ones_spaces(place: Foundation) -> None:
    with place.client("network.admin") as admin:
        both_ends = [policy(*pair) for pair in ("ab", "ac", "ca", "cc", "ax", "xy")]
        admin.post(POLICIES, json=body(*both_ends)).raise_for_status()
        assert pairs(admin) == ["ab", "ac", "ca", "cc", "ax", "xy"]
    for subject, seen in [
        ("dev-guid", ["ab"]),
        ("other-guid", ["cc"]),
        ("both-guid", ["ab", "ac", "ca", "cc"]),
        ("nobody", []),
    ]:
        with place.client("network.write", sub=subject) as client:
            assert pairs(client) == seen
            assert client.get(POLICIES, params={"id": "x"}).json() == {"total_policies": 0, "policies": []}


def test_a_role_given_or_taken_counts(place: Foundation) -> None:
    with place.client("network.write") as dev:
        refused(dev.post(POLICIES, json=body(policy("a", "c"))), 403, UNKNOWN)
        place.controller.developers["dev-guid"].add("s2")
        assert dev.post(POLICIES, json=body(policy("a", "c"))).status_code == 200
        place.controller.developers["dev-guid"].clear()
        refused(dev.post(DELETE, json=body(policy("a", "c"))), 403, UNKNOWN)


def test_the_quota(place: Foundation) -> None:
    """At most 3 here, per source; by what would be there, not by what is asked for."""
    exceeded = 403, "policy quota exceeded"
    with place.client("network.write") as dev, place.client("network.admin") as admin:
        ports = [policy("a", "b", port) for port in range(1, 6)]
        refused(dev.post(POLICIES, json=body(*ports[:4])), *exceeded)
        assert dev.post(POLICIES, json=body(ports[0], *ports[:3], ports[0])).status_code == 200
        assert dev.post(POLICIES, json=body(*ports[:3])).status_code == 200
        refused(dev.post(POLICIES, json=body(ports[3])), *exceeded)
        refused(dev.post(POLICIES, json=body(policy("b", "a"), ports[3])), *exceeded)
        assert pairs(admin) == ["ab"] * 3
        assert dev.post(POLICIES, json=body(policy("b", "a"))).status_code == 200  # of another source
        assert dev.post(DELETE, json=body(ports[0])).status_code == 200
        assert dev.post(POLICIES, json=body(ports[3])).status_code == 200
        assert admin.post(POLICIES, json=body(*ports)).status_code == 200  # admins have none
        assert dev.post(POLICIES, json=body(*ports)).status_code == 200
        assert dev.post(DELETE, json=body(*ports[:2])).status_code == 200
        refused(dev.post(POLICIES, json=body(ports[0])), *exceeded)  # what admins made counts


@pytest.mark.parametrize("fault", [500, "garbage", "hang"])
def test_uaa_away(place: Foundation, fault: str | int) -> None:
    place.uaa.fault = fault
    with place.client("network.admin", kid="new", key=place.uaa.keys["key-1"]) as client:
        deadline = time.monotonic() + 60
        # By keys, UAA is asked about one that is unknown every few seconds only; till then it is just not valid.
        while client.get(POLICIES).status_code == 401:
            assert place.server.settings["SILKBUS_AUTH"] == "uaa-keys"
            assert time.monotonic() < deadline
            time.sleep(0.1)
        unavailable(lambda: client.get(POLICIES), "failed to verify token with uaa: UAA ")


@pytest.mark.parametrize("fault", [500, "garbage", "hang", 401, 404])
def test_the_cloud_controller_away(place: Foundation, fault: str | int) -> None:
    place.controller.fault = fault
    with place.client("network.write") as dev:
        unavailable(lambda: dev.get(POLICIES), "filter policies failed: the Cloud Controller ")
        if fault == "hang":
            return  # each takes its time
        for path in (POLICIES, DELETE):
            content = body(policy("a", "b"))
            unavailable(partial(dev.post, path, json=content), "check access failed: the Cloud Controller ")


def unavailable(ask: Callable[[], httpx.Response], beginning: str) -> None:
    started = time.monotonic()
    answer = ask()
    assert time.monotonic() - started < 20
    assert answer.status_code == 503
    text = answer.json()["error"]
    assert text.startswith(beginning), text
    assert text.endswith(SHORTLY)
    assert "127.0.0.1" not in text
    assert int(answer.headers["Retry-After"]) > 0
    assert "WWW-Authenticate" not in answer.headers


def test_other_requests_go_on_while_the_cloud_controller_hangs(place: Foundation) -> None:
    async def scenario() -> None:
        headers = {"Authorization": f"bearer {place.uaa.token('network.write')}"}
        admin = {"Authorization": f"bearer {place.uaa.token('network.admin')}"}
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=place.server.url, timeout=60, limits=limits, trust_env=False) as client:
            hanging = [asyncio.create_task(client.get(POLICIES, headers=headers)) for _ in range(150)]
            while len(place.controller.asked) < 10:
                await asyncio.sleep(0.05)
            assert (await client.get(POLICIES, headers=admin)).status_code == 200
            assert not any(task.done() for task in hanging)
            assert {answer.status_code for answer in await asyncio.gather(*hanging)} == {503}

    place.controller.asked.clear()
    place.controller.fault = "hang"
    asyncio.run(scenario())


# Settings of their own.


def test_self_service_needs_no_scope_but_the_role(tmp_path: Path) -> None:
    with foundation(tmp_path, "uaa-check", enable_space_developer_self_service="true") as place:
        place.controller.apps = {"a": "s1", "b": "s1", "c": "s2"}
        place.controller.developers = {"dev-guid": {"s1"}}
        with place.client("openid") as dev:
            assert dev.post(POLICIES, json=body(policy("a", "b"))).status_code == 200
            refused(dev.post(POLICIES, json=body(policy("a", "c"))), 403, UNKNOWN)
            assert pairs(dev) == ["ab"]
        with place.server.client("nonsense") as nobody:
            refused(nobody.get(POLICIES), 401, "failed to verify token with uaa")


def test_the_quota_is_exact_when_hundreds_try_at_once(tmp_path: Path) -> None:
    limit, tries = 150, 200
    with foundation(tmp_path, "uaa-keys") as place:
        place.controller.apps = {"a": "s1", "b": "s1"}
        place.controller.developers = {"dev-guid": {"s1"}}

        async def scenario() -> list[int]:
            headers = {"Authorization": f"bearer {place.uaa.token('network.write')}"}
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(
                base_url=place.server.url, timeout=60, limits=limits, trust_env=False
            ) as client:
                requests = [
                    client.post(POLICIES, json=body(policy("a", "b", port)), headers=headers)
                    for port in range(1, tries + 1)
                ]
                return [answer.status_code for answer in await asyncio.gather(*requests)]

        answers = asyncio.run(scenario())
        assert (answers.count(200), answers.count(403)) == (limit, tries - limit)
        with place.client("network.admin") as admin:
            assert len(pairs(admin)) == limit


def test_the_directory_file_in_place_of_a_cloud_controller(tmp_path: Path) -> None:
    apps = [{"guid": guid, "name": guid, "space": space, "org": "o"} for guid, space in ("ax", "bx", "cy")]
    spaces = [{"name": "x", "org": "o", "developers": ["dev"]}, {"name": "y", "org": "o", "developers": []}]
    file = tmp_path / "directory.json"
    file.write_text(json.dumps({"apps": apps, "spaces": spaces}))
    server = PolicyServer(tmp_path, directory=file)
    try:
        server.start()
        with server.client(WRITE_TOKEN) as dev:
            assert dev.post(POLICIES, json=body(policy("a", "b"))).status_code == 200
            refused(dev.post(POLICIES, json=body(policy("a", "c"))), 403, UNKNOWN)
            refused(dev.post(POLICIES, json=body(policy("a", "z"))), 403, UNKNOWN)
            assert pairs(dev) == ["ab"]
            file.unlink()
            text = "the directory of apps and spaces cannot be read; the server's log says why"
            refused(dev.get(POLICIES), 503, f"filter policies failed: {text}{SHORTLY}")
    finally:
        server.close()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "tokens: required for auth tokens"),
        ({"auth": "ldap"}, "auth: 'ldap' is not one of tokens, uaa-check, uaa-keys"),
        ({"auth": "uaa-keys"}, "uaa_url: required for auth uaa-keys"),
        ({"auth": "uaa-check", "uaa_url": "https://x"}, "uaa_client, uaa_client_secret: required"),
        ({"auth": "uaa-keys", "uaa_url": "x:8443"}, "uaa_url: 'x:8443' is not an address such as https://uaa"),
        ({"auth": "uaa-keys", "uaa_url": "https://x:1", "uaa_port": "2"}, "uaa_url: 'https://x:1:2' is not an address"),
        ({"auth": "uaa-keys", "uaa_url": "https://"}, "uaa_url: 'https://' is not an address"),
        ({"tokens": "t", "cc_url": "https://x"}, "uaa_url: required for cc_url"),
        ({"tokens": "t", "cc_url": "https://x", "directory": "d"}, "cc_url, directory: set one of them"),
        ({"tokens": "t", "max_policies": "0"}, "max_policies: must be at least 1, not 0"),
        ({"tokens": "t", "cc_cache": "61"}, "cc_cache: must be in 0..60 seconds, not 61"),
        ({"auth": "uaa-keys", "uaa_url": "https://x", "uaa_audiences": ""}, "uaa_audiences: must not be empty"),
        (
            {"auth": "uaa-keys", "uaa_url": "https://x", "uaa_ca": "/none"},
            "CA file /none: cannot be read: No such file",
        ),
        ({"tokens": "/none"}, "token file /none: cannot be read: No such file"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, settings: dict[str, str], text: str) -> None:
    environment = {f"SILKBUS_{name.upper()}": value for name, value in settings.items()}
    done = subprocess.run(
        [sys.executable, "-m", "services.policy.server"],
        env={**environment, "PYTHONPATH": str(Path(__file__).parents[2]), "SILKBUS_LISTEN": "127.0.0.1:0"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert text in done.stderr
    assert "Traceback" not in done.stderr
