"""Completion, as bash does it, and what every shell's script must have."""

import subprocess
from pathlib import Path

import pytest

from cli.completion import Option, options
from cli.main import COMMANDS
from tests.cli.conftest import PROGRAM, Run

ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_silkbus
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "bash"
    done = subprocess.run([PROGRAM, "completion", "bash"], capture_output=True, text=True, check=True, timeout=60)
    path.write_text(done.stdout)
    return path


def completed(script: Path, *words: str, folder: Path | None = None) -> list[str]:
    """What bash makes of these words, the last of which is being typed."""
    line = ["bash", "-c", ASK, "bash", str(script), "silkbus", *words]
    return subprocess.run(line, capture_output=True, text=True, check=True, timeout=60, cwd=folder).stdout.split()


def test_commands_options_values_and_files(script: Path, tmp_path: Path) -> None:
    assert completed(script, "ad") == ["add-network-policy"]
    assert {"apply", "explain", "doctor", "lab"} <= set(completed(script, ""))
    assert completed(script, "apply", "--pr") == ["--prune"]
    assert set(completed(script, "apply", "--")) >= {"--file", "--prune", "--dry-run", "--wait", "--timeout", "--api"}
    assert "--prune" not in completed(script, "diff", "--")
    assert completed(script, "status", "-o", "") == ["table", "json", "yaml"]
    assert completed(script, "add-network-policy", "-o", "") == []  # an org
    assert completed(script, "add-network-policy", "--protocol", "u") == ["udp"]
    (tmp_path / "policies.yml").touch()
    assert completed(script, "apply", "-f", "pol", folder=tmp_path) == ["policies.yml"]
    assert completed(script, "nothing", "-") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_gets_every_command(bare: Run, shell: str) -> None:
    result = bare("completion", shell)
    assert (result.code, result.err) == (0, "")
    for name in COMMANDS:
        assert name in result.out
    assert result.out.count("prune") >= 1
    assert result.out.count("'") % 2 == 0
    help_text = bare("completion", "--help").out
    assert f"silkbus completion {shell}" in help_text
    assert bare("completion", "csh").code == 2


def test_options_are_read_from_a_help_text() -> None:
    text = (
        "usage: x [-h] [--port N]\n\n  -h, --help            show this\n  -o ORG                the org\n"
        "  -f FILE, --file FILE  the file\n  --wait                wait - or not\n"
        "  --port N|N-M\n                        more\n"
    )
    assert list(options(text)) == [
        Option(("-h", "--help"), takes_value=False, text="show this"),
        Option(("-o",), takes_value=True, text="the org"),
        Option(("-f", "--file"), takes_value=True, text="the file"),
        Option(("--wait",), takes_value=False, text="wait - or not"),
        Option(("--port",), takes_value=True, text=""),
    ]
