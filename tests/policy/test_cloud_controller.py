"""Where apps lie and who develops there: by the Cloud Controller, and by a directory file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bus.decode import Malformed
from bus.messages import AppId
from services.policy import cloud_controller
from services.policy.access import Space
from services.policy.cloud_controller import CloudController
from services.policy.directory import Directory
from services.policy.identity import Unavailable
from tests.policy.stubs import CloudControllerStub, Uaa, app, own_token, remote, role


@pytest.fixture
def uaa() -> Iterator[Uaa]:
    stub = Uaa()
    stub.start()
    yield stub
    stub.stop()


@pytest.fixture
def stub(uaa: Uaa) -> Iterator[CloudControllerStub]:
    stub = CloudControllerStub(uaa)
    stub.start()
    yield stub
    stub.fault = None
    stub.stop()


@pytest.fixture
def controller(stub: CloudControllerStub, uaa: Uaa) -> CloudController:
    return CloudController(remote(stub, "the Cloud Controller"), own_token(uaa), remember=0)


@pytest.fixture
def remembering(stub: CloudControllerStub, uaa: Uaa) -> CloudController:
    return CloudController(remote(stub, "the Cloud Controller"), own_token(uaa), remember=60)


def spaces(*texts: str) -> frozenset[Space]:
    return frozenset(Space(text) for text in texts)


def ids(*texts: str) -> list[AppId]:
    return [AppId(text) for text in texts]


async def test_the_spaces_of_apps(stub: CloudControllerStub, controller: CloudController) -> None:
    stub.apps = {"a": "s1", "b": "s2", "c": "s1"}
    assert await controller.of_apps(ids("a", "b", "x")) == {"a": "s1", "b": "s2"}
    (request,) = stub.asked
    assert request.url.path == "/v3/apps"
    assert request.query_params["guids"] == "a,b,x"
    assert await controller.of_apps([]) == {}
    assert len(stub.asked) == 1


async def test_many_apps_are_asked_for_a_hundred_at_a_time(
    stub: CloudControllerStub, controller: CloudController
) -> None:
    stub.apps = {f"app-{i}": f"space-{i % 7}" for i in range(250)}
    stub.per_page = 30
    assert await controller.of_apps(ids(*stub.apps, "unknown")) == stub.apps
    asked = [request.query_params["guids"].split(",") for request in stub.asked]
    assert {len(guids) for guids in asked} == {100, 51}
    assert len(stub.asked) == 4 + 4 + 2  # pages of 30


@pytest.mark.parametrize("odd", ["a,b", "a b", "ä", "x" * 65, "a&guids=b", "a\n"])
async def test_what_cannot_be_a_guid_is_unknown_without_asking(
    stub: CloudControllerStub, controller: CloudController, odd: str
) -> None:
    stub.apps, stub.developers = {"a": "s", "b": "s"}, {"a": {"s"}, "b": {"s"}}
    assert await controller.of_apps(ids(odd)) == {}
    for subject in (odd, ""):
        assert await controller.developed(subject, spaces("s")) == set()
        assert await controller.apps_of(subject, ids("a")) == set()
    assert stub.asked == []


async def test_in_which_spaces_a_user_is_a_developer(stub: CloudControllerStub, controller: CloudController) -> None:
    own = [f"s{i}" for i in range(220)]
    stub.developers = {"dev": {*own, "more"}, "other": {"x"}}
    stub.per_page = 30
    assert await controller.developed("dev", spaces(*own, "x", "y")) == set(own)
    asked = [request.query_params["space_guids"].split(",") for request in stub.asked]
    assert {len(guids) for guids in asked} == {100, 22}
    assert await controller.developed("nobody", spaces("s1")) == set()
    assert await controller.developed("dev", spaces()) == set()


@pytest.mark.parametrize("many", [0, 1000])
async def test_the_apps_of_a_developer(
    stub: CloudControllerStub, controller: CloudController, monkeypatch: pytest.MonkeyPatch, many: int
) -> None:
    """Whichever way is cheaper: by the apps asked for, or by the user's spaces."""
    monkeypatch.setattr(cloud_controller, "MANY", many)
    stub.apps = {f"a{i}": f"s{i % 200}" for i in range(400)} | {"x": "other"}
    stub.developers = {"dev": {f"s{i}" for i in range(150)}}
    stub.per_page = 60
    some = ids(*(f"a{i}" for i in range(250)), "x", "unknown")
    expected = {f"a{i}" for i in range(250) if i % 200 < 150}
    assert await controller.apps_of("dev", some) == expected
    assert await controller.apps_of("nobody", some) == set()
    ways = {frozenset(request.query_params) & {"guids", "space_guids"} for request in stub.asked_for("/v3/apps")}
    assert ways == {frozenset({"guids" if many else "space_guids"})}


async def test_what_was_not_asked_for_does_not_count(
    stub: CloudControllerStub, controller: CloudController, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that does not know a filter ignores it, and answers with everything."""

    async def everything(request: Any) -> Any:
        found = (
            [app("a", "s1"), app("other", "s2")]
            if request.url.path == "/v3/apps"
            else [role("dev", "s1"), role("boss", "s2"), role("dev", "s3", "space_manager")]
        )
        return stub._page(request, found)

    stub.answer = everything  # type: ignore[method-assign]
    assert await controller.of_apps(ids("a")) == {"a": "s1"}
    assert await controller.developed("dev", spaces("s1", "s2", "s3")) == {"s1"}
    assert await controller.apps_of("dev", ids("a", "other")) == {"a"}
    monkeypatch.setattr(cloud_controller, "MANY", 0)
    assert await controller.apps_of("dev", ids("a", "other")) == {"a"}


async def test_answers_are_remembered_unless_they_would_harm(
    stub: CloudControllerStub, remembering: CloudController
) -> None:
    stub.apps, stub.developers = {"a": "s1"}, {"dev": {"s1"}}
    for _ in range(3):
        assert await remembering.of_apps(ids("a")) == {"a": "s1"}
        assert await remembering.developed("dev", spaces("s1")) == {"s1"}
        assert await remembering.apps_of("dev", ids("a")) == {"a"}
    assert len(stub.asked) == 3
    stub.apps["b"] = "s2"
    assert await remembering.of_apps(ids("a", "b")) == {"a": "s1", "b": "s2"}
    stub.developers["dev"].add("s2")
    assert await remembering.developed("dev", spaces("s1", "s2")) == {"s1", "s2"}
    assert len(stub.asked) == 5
    assert [request.query_params.get("space_guids") for request in stub.asked_for("/v3/roles")] == ["s1", None, "s2"]


async def test_a_token_that_is_refused_is_replaced_once(
    stub: CloudControllerStub, uaa: Uaa, controller: CloudController
) -> None:
    stub.apps = {"a": "s"}
    await controller.of_apps(ids("a"))
    uaa.own_tokens.clear()
    assert await controller.of_apps(ids("a")) == {"a": "s"}
    stub.fault = 401
    asked = len(stub.asked)
    with pytest.raises(Unavailable, match=r"does not accept this server's token; the client uaa_client needs"):
        await controller.of_apps(ids("a"))
    assert len(stub.asked) == asked + 2


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (500, "answered with status 500"),
        (429, "answered with status 429"),
        (400, "answered with status 400"),
        (403, "does not accept this server's token"),
        (404, "has no /v3/apps: cc_url must lead to one with API 3.77 or later"),
        ("garbage", "gave an answer that is no JSON object"),
        ("hang", "did not answer within"),
    ],
)
async def test_faults(stub: CloudControllerStub, controller: CloudController, fault: str | int, text: str) -> None:
    stub.fault = fault
    with pytest.raises(Unavailable, match=f"^the Cloud Controller {text}"):
        await controller.of_apps(ids("a"))
    stub.fault = None


async def test_no_connection(stub: CloudControllerStub, controller: CloudController) -> None:
    stub.stop()
    with pytest.raises(Unavailable, match=r"^the Cloud Controller cannot be reached$"):
        await controller.developed("dev", spaces("s"))


@pytest.mark.parametrize(
    "item",
    [
        5,
        {},
        {"guid": "a"},
        {"guid": 5, "relationships": {"space": {"data": {"guid": "s"}}}},
        {"guid": "a", "relationships": {"space": {"data": None}}},
        {"guid": "a", "relationships": {}},
        {"guid": "a", "links": {"space": {}}},
    ],
)
async def test_malformed_answers(stub: CloudControllerStub, controller: CloudController, item: Any) -> None:
    async def malformed(request: Any) -> Any:
        return stub._page(request, [item])

    stub.answer = malformed  # type: ignore[method-assign]
    with pytest.raises(Unavailable, match=r"^the Cloud Controller gave an answer that cannot be understood$"):
        await controller.of_apps(ids("a"))


async def test_uaa_away_is_told_apart(stub: CloudControllerStub, uaa: Uaa, controller: CloudController) -> None:
    uaa.stop()
    with pytest.raises(Unavailable, match=r"^UAA cannot be reached$"):
        await controller.of_apps(ids("a"))
    assert stub.asked == []


# The directory file.

CONTENT = {
    "apps": [
        {"guid": "a", "name": "web", "space": "dev", "org": "one"},
        {"guid": "b", "name": "db", "space": "dev", "org": "two"},
        {"guid": "c", "name": "old", "space": "nobody's", "org": "two"},
    ],
    "spaces": [
        {"guid": "s1", "name": "dev", "org": "one", "developers": ["ann", "bob"]},
        {"name": "dev", "org": "two", "developers": ["ann"]},
        {"name": "empty", "org": "two", "developers": []},
    ],
}


def write(path: Path, content: Any) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(content))
    temporary.rename(path)


async def test_the_directory_tells_spaces_of_different_orgs_apart(tmp_path: Path) -> None:
    write(tmp_path / "d", CONTENT)
    directory = Directory(tmp_path / "d")
    places = await directory.of_apps(ids("a", "b", "c", "x"))
    assert places.keys() == {"a", "b", "c"}
    assert len(set(places.values())) == 3
    everywhere = set(places.values())
    assert await directory.developed("ann", everywhere) == {places[AppId("a")], places[AppId("b")]}
    assert await directory.developed("bob", everywhere) == {places[AppId("a")]}
    assert await directory.developed("eve", everywhere) == set()
    assert await directory.apps_of("ann", ids("a", "c", "x")) == {"a"}
    assert await directory.apps_of("eve", ids("a", "c", "x")) == set()


async def test_a_changed_directory_counts_at_once_and_a_broken_one_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "d"
    write(file, CONTENT)
    directory = Directory(file)
    write(file, {"apps": CONTENT["apps"]})
    assert await directory.apps_of("ann", ids("a")) == set()
    file.write_text("{")
    for _ in range(2):
        with pytest.raises(Unavailable, match=r"^the directory of apps and spaces cannot be read"):
            await directory.of_apps(ids("a"))
    write(file, CONTENT)
    assert await directory.of_apps(ids("a"))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([], "must be a mapping, not list"),
        ({}, "apps: missing"),
        ({"apps": [{"guid": "a", "name": "n", "org": "o"}]}, "apps[0]: space: missing"),
        ({"apps": [CONTENT["apps"][0]] * 2}, "apps[1]: guid: 'a' is there twice"),
        ({"apps": [], "spaces": [{"name": "s", "org": "o"}]}, "spaces[0]: developers: missing"),
        (
            {"apps": [], "spaces": [{"name": "s", "org": "o", "developers": [""]}]},
            "spaces[0]: developers: must be a list of texts that are not empty",
        ),
    ],
)
def test_a_wrong_directory_is_reported_with_its_place(tmp_path: Path, content: Any, text: str) -> None:
    write(tmp_path / "d", content)
    with pytest.raises(Malformed) as error:
        Directory(tmp_path / "d")
    assert str(error.value).startswith(f"directory {tmp_path / 'd'}: {text}")
