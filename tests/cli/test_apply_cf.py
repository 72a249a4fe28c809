"""Files of policies with a login of cf: names from the Cloud Controller, in few requests."""

from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.cli.foundation import Foundation, login
from tests.cli.test_apply import present

TEXT = """\
policies:
- source: front
  destination: prod/db
  tcp: 5432
- source: [back, other/dev/far]
  destination: front
  tcp: 80-90
"""


@pytest.fixture
def silkbus(bare: Run, place: Foundation, home: Path) -> Run:
    login(home, place.controller, place.token)
    return lambda *arguments, **more: bare(*arguments, **{"SSL_CERT_FILE": str(place.authority), **more})


def test_a_file_is_applied_exported_and_applied_again_after_a_blue_green_push(
    silkbus: Run, place: Foundation, tmp_path: Path
) -> None:
    file = tmp_path / "policies.yml"
    file.write_text(TEXT)
    applied = silkbus("apply", "-f", str(file))
    assert (applied.code, applied.err) == (0, "")
    wanted = {
        ("guid-front", "guid-db", "tcp", 5432, 5432),
        ("guid-back", "guid-front", "tcp", 80, 90),
        ("guid-far", "guid-front", "tcp", 80, 90),
    }
    assert present(place.server, place.token) == wanted
    assert len(place.asked()) < 12
    exported = tmp_path / "exported.yml"
    exported.write_text(silkbus("export", "--all").out)
    assert "other/dev/far" in exported.read_text()
    assert silkbus("diff", "-f", str(exported)).code == 0
    # The old app is deleted, and the Cloud Controller knows it no more.
    place.controller.apps["guid-green"] = place.controller.apps.pop("guid-front")
    assert silkbus("diff", "-f", str(file)).code == 1
    assert silkbus("apply", "-f", str(file), "--prune").code == 0
    green = {tuple("guid-green" if end == "guid-front" else end for end in item) for item in wanted}
    assert present(place.server, place.token) == green
    # Or it is kept for a while under another name.
    place.controller.apps["guid-front"] = ("front-venerable", "space-1")
    assert silkbus("apply", "-f", str(file), "--prune", "--dry-run").code == 0


def test_all_unknown_apps_spaces_and_orgs_are_named_at_once(silkbus: Run, place: Foundation, tmp_path: Path) -> None:
    file = tmp_path / "policies.yml"
    file.write_text(
        "policies:\n- {source: [front, nobody], destination: prod/nothing, tcp: 1}\n"
        "- {source: nowhere/x, destination: noorg/dev/y, tcp: 1}\n"
    )
    result = silkbus("apply", "-f", str(file))
    assert result.code == 2
    first, second, third, fourth = sorted(result.err.splitlines())
    assert first == f"{file}:2: App 'nobody' not found in org acme / space dev."
    assert second == f"{file}:2: App 'nothing' not found in org acme / space prod."
    assert third.startswith(f"{file}:3: Organization 'noorg' not found")
    assert fourth.startswith(f"{file}:3: Space 'nowhere' not found in org 'acme'")
    assert present(place.server, place.token) == set()
