"""The rules alone, against what they say in one sentence each, over random apps, spaces and roles."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.messages import AppId, Policy, Ports, Protocol
from services.policy.access import Access, Forbidden
from services.policy.directory import Directory
from services.policy.identity import ADMIN, WRITE, Identity

APPS = [AppId(name) for name in "abcdef"]
SPACES = ["s", "t", "u"]
USERS = ["ann", "bob"]
PORTS = Ports(Protocol.TCP, 8080, 8080)

policies = st.lists(
    st.builds(Policy, st.sampled_from(APPS), st.sampled_from(APPS), st.just(PORTS)), min_size=1, max_size=8
)
placed = st.dictionaries(st.sampled_from(APPS), st.sampled_from(SPACES))
roles = st.dictionaries(st.sampled_from(SPACES), st.sets(st.sampled_from(USERS)))


def directory(folder: str, places: dict[AppId, str], developers: dict[str, set[str]]) -> Directory:
    file = Path(folder) / "directory"
    apps = [{"guid": app, "name": app, "space": space, "org": "o"} for app, space in places.items()]
    spaces = [{"name": name, "org": "o", "developers": sorted(users)} for name, users in developers.items()]
    file.write_text(json.dumps({"apps": apps, "spaces": spaces}))
    return Directory(file)


@settings(max_examples=200, deadline=None)
@given(placed, roles, policies, st.sampled_from(USERS), st.booleans())
async def test_changes_and_lists(
    places: dict[AppId, str], developers: dict[str, set[str]], asked: list[Policy], user: str, admin: bool
) -> None:
    def mine(app: AppId) -> bool:
        return app in places and user in developers.get(places[app], ())

    def may(policy: Policy) -> bool:
        return admin or (mine(policy.source) and mine(policy.destination))

    identity = Identity(user, f"name of {user}", (ADMIN,) if admin else (WRITE,))
    with tempfile.TemporaryDirectory() as folder:
        access = Access(directory(folder, places, developers))
        assert await access.visible(identity, asked) == [policy for policy in asked if may(policy)]
        if all(map(may, asked)):
            await access.check_change(identity, asked)
        else:
            with pytest.raises(Forbidden, match=r"^one or more applications cannot be found or accessed$"):
                await access.check_change(identity, asked)


@pytest.mark.parametrize("self_service", [False, True])
@given(st.lists(st.sampled_from([ADMIN, WRITE, "openid"]), unique=True), st.sampled_from([(ADMIN,), (ADMIN, WRITE)]))
def test_scopes(self_service: bool, given_scopes: list[str], allowed: tuple[str, ...]) -> None:
    access = Access(None, self_service=self_service)
    identity = Identity("x", "x", tuple(given_scopes))
    if set(given_scopes) & set(allowed) or (self_service and WRITE in allowed):
        access.check_scopes(identity, allowed)
    else:
        with pytest.raises(Forbidden, match=rf"^provided scopes \[{' '.join(given_scopes)}\] do not include allowed"):
            access.check_scopes(identity, allowed)
