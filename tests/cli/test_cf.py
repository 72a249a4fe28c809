"""With a login of cf: API, token and target from its file, names from the Cloud Controller, tokens renewed."""

import json
import stat
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from starlette.requests import Request

from cli import cf_login
from cli.apps import App, Place
from cli.cloud_controller import BATCH, CloudController
from cli.errors import Failed
from cli.login import FixedToken
from cli.web import Server
from tests.cli.conftest import WRONG_TOKEN, Result, Run
from tests.cli.foundation import CF, Controller, Foundation, login, old_token
from tests.cli.test_policies import failed, rows
from tests.policy.server import ADMIN_TOKEN, POLICIES
from tests.policy.stubs import LOGIN


@pytest.fixture
def silkbus(bare: Run, place: Foundation) -> Run:
    """Runs silkbus that trusts the foundation's certificates."""

    def run(*arguments: str, **more: str) -> Result:
        return bare(*arguments, **{"SSL_CERT_FILE": str(place.authority), **more})

    return run


def test_with_cfs_login_nothing_needs_to_be_said(silkbus: Run, home: Path, place: Foundation) -> None:
    file = login(home, place.controller, place.token)
    before = file.read_text()
    assert silkbus("add-network-policy", "front", "back") == Result(
        0, "Adding network policy from app front to app back in org acme / space dev as admin...\nOK\n\n", ""
    )
    assert place.asked() == ["/v3/apps?names=front&space_guids=space-1", "/v3/apps?names=back&space_guids=space-1"]
    result = silkbus("network-policies")
    assert result.out.startswith("Listing network policies in org acme / space dev as admin...\n\n")
    assert rows(result) == [("front", "back", "tcp", "8080", "dev", "acme")]
    assert place.asked() == ["/v3/apps?space_guids=space-1"]
    assert silkbus("remove-network-policy", "front", "back", "--protocol", "tcp", "--port", "8080").out == (
        "Removing network policy from app front to app back in org acme / space dev as admin...\nOK\n\n"
    )
    assert rows(silkbus("network-policies")) == []
    assert file.read_text() == before


def test_another_home_of_cf(silkbus: Run, tmp_path: Path, place: Foundation) -> None:
    (tmp_path / "elsewhere").mkdir()
    login(tmp_path / "elsewhere", place.controller, place.token)
    assert silkbus("network-policies").code == 1
    assert silkbus("network-policies", CF_HOME=str(tmp_path / "elsewhere")).code == 0


def test_another_space_and_org(silkbus: Run, home: Path, place: Foundation) -> None:
    login(home, place.controller, place.token)
    result = silkbus("add-network-policy", "front", "db", "-s", "prod", "--protocol", "udp", "--port", "7000-7010")
    assert result.out == (
        "Adding network policy from app front in org acme / space dev to app db in org acme / space prod as admin...\n"
        "OK\n\n"
    )
    assert silkbus("add-network-policy", "front", "far", "-s", "dev", "-o", "other").code == 0
    assert rows(silkbus("network-policies", "--source", "front")) == [
        ("front", "db", "udp", "7000-7010", "prod", "acme"),
        ("front", "far", "tcp", "8080", "dev", "other"),
    ]
    failed(silkbus("add-network-policy", "front", "far"), "App 'far' not found in org acme / space dev.")
    assert "Space 'nope' not found in org 'acme'" in silkbus("add-network-policy", "front", "x", "-s", "nope").err
    result = silkbus("add-network-policy", "front", "x", "-s", "dev", "-o", "nope")
    assert result.err.startswith("Organization 'nope' not found")


def test_an_app_that_may_not_be_seen_is_shown_by_its_guid(silkbus: Run, home: Path, place: Foundation) -> None:
    login(home, place.controller, place.token)
    assert silkbus("add-network-policy", "front", "back").code == 0
    del place.controller.apps["guid-back"]
    assert rows(silkbus("network-policies")) == [("front", "guid-back", "tcp", "8080", "", "")]


def test_without_a_target_it_is_said_how_to_set_one(silkbus: Run, home: Path, place: Foundation) -> None:
    nothing = {"GUID": "", "Name": ""}
    login(home, place.controller, place.token, OrganizationFields=nothing, SpaceFields=nothing)
    result = silkbus("add-network-policy", "front", "back")
    assert "no org and space targeted. Use `cf target -o ORG -s SPACE`, or set SILKBUS_ORG" in result.err
    result = silkbus("add-network-policy", "front", "back", SILKBUS_ORG="acme", SILKBUS_SPACE="dev")
    assert result.code == 0, result.err
    # Of an org alone: of all its apps, and of no other's.
    assert rows(silkbus("network-policies", SILKBUS_ORG="other")) == []
    result = silkbus("network-policies", SILKBUS_ORG="acme")
    assert result.out.startswith("Listing network policies in org acme as admin...\n")
    assert rows(result) == [("front", "back", "tcp", "8080", "dev", "acme")]


def test_an_expired_token_is_renewed_and_written_back(silkbus: Run, home: Path, place: Foundation) -> None:
    file = login(home, place.controller, old_token(place.uaa))
    before = json.loads(file.read_text())
    result = silkbus("network-policies")
    assert (result.code, result.err) == (0, "")
    assert place.uaa.forms == [(CF, {"grant_type": "refresh_token", "refresh_token": "refresh-0"})]
    after = json.loads(file.read_text())
    assert after["AccessToken"].startswith("bearer ey")
    assert after["AccessToken"] != before["AccessToken"]
    assert after == {**before, "AccessToken": after["AccessToken"], "RefreshToken": "refresh-1"}
    assert list(after) == list(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["config.json"]
    assert silkbus("network-policies").code == 0
    assert len(place.uaa.forms) == 1


def test_a_token_that_is_refused_is_renewed_once(silkbus: Run, home: Path, place: Foundation) -> None:
    token = place.token
    login(home, place.controller, token)
    place.uaa.revoked.add(token)
    place.uaa.made = lambda: place.uaa.token("network.admin", user_name="admin", jti="another")
    assert silkbus("network-policies").code == 0
    assert len(place.uaa.forms) == 1
    # A new one that is refused, too, is not renewed again.
    place.controller.fault = 401
    result = silkbus("network-policies")
    assert result.code == 1
    assert "Log in again: `cf login`." in result.err
    assert len(place.uaa.forms) == 2


def test_a_login_that_is_over_says_so(silkbus: Run, home: Path, place: Foundation) -> None:
    file = login(home, place.controller, old_token(place.uaa), RefreshToken="long-gone")
    before = file.read_text()
    failed(
        silkbus("network-policies"),
        f"The login of cf has expired, and the UAA at {place.uaa.url} gives no new token "
        "(401 Invalid refresh token). Log in again: `cf login`.",
    )
    assert file.read_text() == before
    login(home, place.controller, old_token(place.uaa), RefreshToken="")
    failed(
        silkbus("network-policies"),
        "The login of cf has expired and cannot be renewed. Log in again: `cf login`.",
    )
    place.uaa.fault = "garbage"
    login(home, place.controller, old_token(place.uaa))
    assert "gives no new token (200 )" in silkbus("network-policies").err


def test_a_login_of_a_client_is_renewed_with_its_secret(silkbus: Run, home: Path, place: Foundation) -> None:
    client = {"UAAGrantType": "client_credentials", "UAAOAuthClient": LOGIN[0], "UAAOAuthClientSecret": LOGIN[1]}
    login(home, place.controller, old_token(place.uaa), RefreshToken="", **client)
    place.uaa.made = lambda: place.uaa.token("network.admin", user_name=None, client_id=LOGIN[0])
    result = silkbus("network-policies")
    assert result.out.startswith(f"Listing network policies in org acme / space dev as {LOGIN[0]}...\n")
    assert place.uaa.forms[0][1] == {"grant_type": "client_credentials"}


def logged_in() -> cf_login.CfLogin:
    found = cf_login.read()
    assert found is not None
    return found


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch, home: Path, place: Foundation) -> None:
    monkeypatch.setenv("CF_HOME", str(home))
    monkeypatch.setenv("SSL_CERT_FILE", str(place.authority))


@pytest.mark.usefixtures("trusting")
def test_a_token_that_another_command_renewed_is_used(home: Path, place: Foundation) -> None:
    login(home, place.controller, old_token(place.uaa))
    slow, quick = logged_in(), logged_in()
    assert quick.token() == slow.token()
    assert len(place.uaa.forms) == 1


@pytest.mark.usefixtures("trusting")
def test_a_login_made_meanwhile_is_not_overwritten(home: Path, place: Foundation) -> None:
    login(home, place.controller, old_token(place.uaa))
    ours = logged_in()
    file = login(home, place.controller, "someone-else's", Target="https://api.elsewhere.example.com")
    before = file.read_text()
    assert ours.token().startswith("bearer ey")
    assert file.read_text() == before


@pytest.mark.usefixtures("trusting")
def test_a_file_that_cannot_be_written_is_no_failure(
    home: Path, place: Foundation, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = login(home, place.controller, old_token(place.uaa))

    def refused(*_: Any, **__: Any) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refused)
    before = file.read_text()
    assert logged_in().token().startswith("bearer ey")
    assert file.read_text() == before
    assert "the new token could not be written: [Errno 30] Read-only file system" in caplog.text


def test_cfs_token_goes_to_cfs_api_only(silkbus: Run, home: Path, place: Foundation, standing_server: Any) -> None:
    login(home, place.controller, place.token)
    result = silkbus("network-policies", "--api", standing_server.url)
    assert result.err.startswith("Not logged in. ")
    assert silkbus("network-policies", "--api", place.controller.url + "/").code == 0
    assert silkbus("network-policies", SILKBUS_API=standing_server.url, SILKBUS_TOKEN=ADMIN_TOKEN).code == 0


def test_the_environment_beats_cf_which_beats_our_file(silkbus: Run, home: Path, place: Foundation) -> None:
    ours = home / ".config" / "silkbus" / "config.json"
    ours.parent.mkdir(parents=True)
    ours.write_text(json.dumps({"api": "http://127.0.0.1:9", "token": "x"}))
    login(home, place.controller, place.token)
    assert silkbus("network-policies").code == 0
    result = silkbus("network-policies", **WRONG_TOKEN)
    assert result.code == 1
    assert "CF-InvalidAuthToken: Invalid Auth Token" in result.err


def test_the_cloud_controller_can_be_named_without_cf(silkbus: Run, place: Foundation) -> None:
    named = {"SILKBUS_API": place.controller.url, "SILKBUS_TOKEN": place.token}
    named |= {"SILKBUS_ORG": "acme", "SILKBUS_SPACE": "dev"}
    assert silkbus("add-network-policy", "front", "back", **named).code == 0
    assert rows(silkbus("network-policies", **named)) == [("front", "back", "tcp", "8080", "dev", "acme")]
    # The root is asked without the token.
    assert [path for path in place.asked() if path == "/"] == ["/"] * 2


def test_an_older_cf_did_not_look_for_the_policy_server(silkbus: Run, home: Path, place: Foundation) -> None:
    login(home, place.controller, place.token, NetworkPolicyV1Endpoint=None)
    assert silkbus("network-policies").code == 0
    link = place.controller.links.pop("network_policy_v1")
    result = silkbus("network-policies")
    place.controller.links["network_policy_v1"] = link
    assert result.err.startswith("This command requires Network Policy API V1. ")


def test_certificates_are_checked_unless_cf_was_told_not_to(bare: Run, home: Path, place: Foundation) -> None:
    login(home, place.controller, place.token)
    result = bare("network-policies")
    assert result.code == 1
    assert f"{place.controller.url}: its certificate is not trusted" in result.err
    assert "--skip-ssl-validation" in result.err
    assert bare("network-policies", "--skip-ssl-validation").code == 0
    assert bare("network-policies", SILKBUS_SKIP_SSL_VALIDATION="true").code == 0
    login(home, place.controller, old_token(place.uaa), SSLDisabled=True)
    assert bare("network-policies").code == 0


def test_a_broken_file_of_cf_is_named(bare: Run, home: Path, place: Foundation) -> None:
    file = login(home, place.controller, place.token)
    file.write_text("{")
    assert f"The configuration of cf, {file}, cannot be read" in bare("network-policies").err
    file.write_text("[]")
    assert bare("network-policies").err.startswith("No API endpoint set. Log in with `cf login`")


def test_what_is_sent_can_be_seen_without_secrets(silkbus: Run, home: Path, place: Foundation) -> None:
    token = old_token(place.uaa)
    file = login(home, place.controller, token)
    result = silkbus("add-network-policy", "front", "back", CF_TRACE="true", CF_DIAL_TIMEOUT="5")
    assert result.code == 0
    assert result.out.endswith("\nOK\n\n")
    assert result.err.count("\nREQUEST: [") == result.err.count("\nRESPONSE: [") == 4
    assert f"\nGET {place.controller.url}/v3/apps?names=front&space_guids=space-1\n" in result.err
    assert '{"policies":[{"source":{"id":"guid-front"}' in result.err
    assert "Authorization: [PRIVATE DATA HIDDEN]\n" in result.err
    assert "grant_type=refresh_token&refresh_token=[PRIVATE DATA HIDDEN]\n" in result.err
    now = json.loads(file.read_text())
    for secret in (token, now["AccessToken"].removeprefix("bearer "), "refresh-0", now["RefreshToken"]):
        assert secret not in result.err
    assert silkbus("network-policies", CF_TRACE="1").err == ""


class Proxy(BaseHTTPRequestHandler):
    """Answers every URL itself, as a policy server without policies."""

    asked: ClassVar[list[tuple[str, str]]] = []

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers.get("Host", "")))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"total_policies":0,"policies":[]}')


def test_through_a_proxy(silkbus: Run, home: Path, place: Foundation) -> None:
    login(home, place.controller, place.token)
    # Not for this machine itself, as in Go.
    assert silkbus("network-policies", https_proxy="http://127.0.0.1:9").code == 0
    given = {"SILKBUS_API": "http://api.example.com", "SILKBUS_TOKEN": "x"}
    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        result = silkbus("network-policies", **given, http_proxy=f"127.0.0.1:{proxy.server_port}")
        proxy.shutdown()
    assert result.code == 0, result.err
    urls = ("http://api.example.com/", f"http://api.example.com{POLICIES}")
    assert Proxy.asked == [(url, "api.example.com") for url in urls]
    result = silkbus("network-policies", **given, http_proxy="http://user:secret@127.0.0.1:9")
    assert "cannot be reached by the proxy 127.0.0.1:9: " in result.err
    assert "secret" not in result.err


@pytest.mark.usefixtures("trusting")
def test_many_apps_take_few_requests(place: Foundation) -> None:
    count = 2 * BATCH + 20
    place.controller.apps = {f"guid-{number}": (f"app-{number}", "space-2") for number in range(count)}
    server = Server(place.controller.url, FixedToken(place.token))
    apps = CloudController(server)
    assert len(apps.within("acme", "prod")) == count
    pages = place.asked()
    assert len(pages) == 4  # org, space, a page of 50, a page of all
    assert "per_page=5000" in pages[-1]
    assert set(apps.known(place.controller.apps)) == set(place.controller.apps)
    assert place.asked() == []
    again = CloudController(server)
    assert again.known(["guid-3", "guid-x"]) == {
        "guid-3": App("guid-3", "app-3", "prod", "acme"),
        "guid-x": App("guid-x", "guid-x"),
    }
    place.asked()
    wanted = [Place("acme", "prod", f"app-{number}") for number in range(count + 1)]
    assert len(again.find_all(wanted)) == count
    assert max(len(path) for path in place.asked()) < 8000
    assert len(again.within("acme", None)) == count
    assert len(again.within(None, None)) == count
    assert (len(again.within(None, "prod")), again.within(None, "dev")) == (count, [])


@pytest.mark.usefixtures("trusting")
def test_a_cloud_controller_that_ignores_case(place: Foundation, monkeypatch: pytest.MonkeyPatch) -> None:
    def matches(_: object, request: Request, *row: str) -> bool:
        _, name, space = row
        asked = request.query_params
        return space == asked.get("space_guids", space) and name.lower() in asked.get("names", name).lower().split(",")

    monkeypatch.setattr(Controller, "_wanted", matches)
    apps = CloudController(Server(place.controller.url, FixedToken(place.token)))
    apps.remember(("org-1", "acme"), ("space-1", "dev"))
    assert apps.find("Front", "acme", "dev") == App("guid-front", "front", "dev", "acme")
    place.controller.apps["guid-other"] = ("FRONT", "space-1")
    assert apps.find("FRONT", "acme", "dev").guid == "guid-other"
    assert apps.find("front", "acme", "dev").guid == "guid-front"


@pytest.mark.usefixtures("trusting")
def test_what_the_cloud_controller_answers_amiss_is_said(place: Foundation) -> None:
    apps = CloudController(Server(place.controller.url, FixedToken(place.token)))
    for fault, text in [
        (500, "status 500, and nothing that can be understood"),
        ("garbage", "status 200, and nothing"),
    ]:
        place.controller.fault = fault
        with pytest.raises(Failed, match=f"GET /v3/organizations: {text}"):
            apps.within("acme", "dev")
