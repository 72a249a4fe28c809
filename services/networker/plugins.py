"""CNI plugins other than ours, run as libcni runs them: found in one folder, each told what the one before answered.

CNI spec 1.1.0, sections 2 to 5; what Garden's original adds to it (metadata and runtimeConfig for every plugin) and the
texts of errors are contract/cell.md 1.4.4 and 1.6. What libcni keeps in a cache of results, to tell plugins on DEL, is
in the container's record.
"""

import asyncio
import json
import logging
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bus.decode import Fields, Malformed
from bus.log import about
from services.networker import cni
from services.networker.errors import Failed, Unavailable
from services.networker.go_json import whole_value

log = logging.getLogger(__name__)

OURS = "silkbus-cni"
MAX_OUTPUT = 1 << 20


class PluginFailed(Failed):
    """A plugin refused. The text is libcni's."""


class PluginUnavailable(Unavailable):
    """A plugin said that trying again later may help (CNI's code 11), or did not end in time."""


@dataclass(frozen=True, slots=True)
class PluginList:
    """A network's plugins in their order. `path` is the folder they are in; `file` is where the list was read."""

    name: str
    version: str
    plugins: tuple[Mapping[str, Any], ...]
    path: str
    file: str = ""

    @property
    def is_ours_alone(self) -> bool:
        return [plugin["type"] for plugin in self.plugins] == [OURS]

    def encode(self) -> dict[str, Any]:
        return {"name": self.name, "cniVersion": self.version, "plugins": list(self.plugins), "path": self.path}

    @classmethod
    def decode(cls, value: Mapping[str, Any], where: str) -> "PluginList":
        """Raises Malformed, also for a version that we cannot speak."""
        fields = Fields(value, where)
        name = fields.text("name")
        version = fields.optional_text("cniVersion") or "0.1.0"
        if version not in cni.VERSIONS:
            raise fields.malformed(
                "cniVersion", f"{version!r} is not spoken here: use one of {', '.join(cni.VERSIONS)}"
            )
        plugins = fields.items("plugins")
        if not plugins:
            raise fields.malformed("plugins", "there must be at least one")
        for number, plugin in enumerate(plugins):
            kind = Fields(plugin, f"{where}: plugins[{number}]").text("type")
            if "/" in kind or kind in (".", ".."):
                raise Malformed(f"{where}: plugins[{number}]: type: {kind!r} is no name of a plugin")
        return cls(name, version, tuple(plugins), fields.optional_text("path") or "")


def ours(path: str) -> PluginList:
    """The list that is used where an operator has put none."""
    return PluginList("silkbus", "1.0.0", ({"type": OURS},), path)


def load(folder: Path, path: str) -> tuple[PluginList, list[Path]]:
    """The list that counts in a folder, and the files there: the first conflist, else the first conf. Blocks.

    Raises Malformed with the original's text: the folder cannot be walked, or the file is none.
    """
    try:
        found = list(_walk(folder))
    except OSError as error:
        problem = f"{'lstat' if error.filename == str(folder) else 'open'} {error.filename}: {_reason(error)}"
        raise Malformed(f"error loading config: {problem}") from None
    files = sorted(found, key=lambda file: file.suffix != ".conflist")
    if not files:
        return ours(path), []
    file = files[0]
    what = "configuration list" if file.suffix == ".conflist" else "configuration"
    try:
        value = whole_value(file.read_text(errors="replace"))
        if not isinstance(value, dict):
            raise Malformed("it is not a JSON object")
        if file.suffix == ".conf":
            value = {"name": value.get("name"), "cniVersion": value.get("cniVersion"), "plugins": [value]}
        plugins = PluginList.decode({**value, "path": path}, "list" if file.suffix == ".conflist" else "network")
    except OSError as error:
        raise Malformed(f"unable to load config from {file}: error reading {file}: {_reason(error)}") from None
    except Malformed as error:
        raise Malformed(f"unable to load config from {file}: error parsing {what}: {error}") from None
    return PluginList(plugins.name, plugins.version, plugins.plugins, path, str(file)), found


def _walk(folder: Path) -> list[Path]:
    """The configuration files in lexical order, folder within folder."""
    found = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            found += _walk(Path(entry.path))
        elif entry.name.endswith((".conflist", ".conf")):
            found.append(Path(entry.path))
    return found


@dataclass(frozen=True, slots=True)
class Call:
    """For which container plugins are called."""

    handle: str
    netns: str
    ifname: str


async def add(plugin: Mapping[str, Any], of: PluginList, call: Call, extra: Mapping[str, Any]) -> Mapping[str, Any]:
    """Run one plugin's ADD, `extra` (metadata, runtimeConfig, prevResult) in its configuration; its result.

    Raises PluginFailed or PluginUnavailable.
    """
    where = f"{_described(plugin, of)} failed (add)"
    output = await _run("ADD", plugin, of, call, extra, where)
    try:
        result = whole_value(output)
    except Malformed as error:
        raise PluginFailed(f"{where}: its answer is not JSON: {error}") from None
    if not isinstance(result, dict):
        raise PluginFailed(f"{where}: its answer is not a JSON object")
    return result


async def delete(plugin: Mapping[str, Any], of: PluginList, call: Call, extra: Mapping[str, Any]) -> None:
    """Run one plugin's DEL. Raises PluginFailed or PluginUnavailable."""
    await _run("DEL", plugin, of, call, extra, f"{_described(plugin, of)} failed (delete)")


def check(of: PluginList) -> None:
    """Make sure that all of them are there, before any is run. Blocks. Raises PluginFailed."""
    for plugin in of.plugins:
        if plugin["type"] != OURS:
            _program(plugin, of, f"{_described(plugin, of)} failed (add)")


def _program(plugin: Mapping[str, Any], of: PluginList, where: str) -> Path:
    program = Path(of.path) / str(plugin["type"])
    if not (program.is_file() and os.access(program, os.X_OK)):
        raise PluginFailed(f'{where}: failed to find plugin "{plugin["type"]}" in path [{of.path}]')
    return program


def _described(plugin: Mapping[str, Any], of: PluginList) -> str:
    kind, name = (json.dumps(text) for text in (plugin["type"], plugin.get("name") or of.name))
    return f"plugin type={kind} name={name}"


async def _run(
    command: str, plugin: Mapping[str, Any], of: PluginList, call: Call, extra: Mapping[str, Any], where: str
) -> str:
    config = {**plugin, **extra, "name": of.name, "cniVersion": of.version}
    environment = {
        **os.environ,
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": call.handle,
        "CNI_NETNS": call.netns,
        "CNI_IFNAME": call.ifname,
        "CNI_ARGS": "",
        "CNI_PATH": of.path,
    }
    program = _program(plugin, of, where)
    pipe = asyncio.subprocess.PIPE
    try:
        process = await asyncio.create_subprocess_exec(
            program, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, start_new_session=True, limit=MAX_OUTPUT
        )
    except OSError as error:
        raise PluginFailed(f"{where}: fork/exec {program}: {_reason(error)}") from None
    try:
        stdout, stderr = await process.communicate(json.dumps(config).encode())
    finally:
        if process.returncode is None:  # our caller's time is over
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if stderr:
        text = stderr.decode(errors="replace").strip()[:2000]
        log.info("a plugin said", extra=about(plugin=plugin["type"], handle=call.handle, text=text))
    if process.returncode != 0:
        raise _failure(where, process.returncode, stdout, stderr)
    return stdout.decode(errors="replace")


def _failure(where: str, code: int | None, stdout: bytes, stderr: bytes) -> Exception:
    """What a plugin that failed says of it."""
    text = stdout.decode(errors="replace").strip()
    if not text:
        said = stderr.decode(errors="replace").strip()
        status = f"exit status {code}" if code is not None and code >= 0 else f"signal {-(code or 0)}"
        return PluginFailed(
            f"{where}: netplugin failed: {json.dumps(said)}"
            if said
            else f"{where}: netplugin failed with no error message: {status}"
        )
    try:
        error = json.loads(text)
        details = f": {error['details']}" if error.get("details") else ""
        kind = PluginUnavailable if error.get("code") == cni.TRY_AGAIN_LATER else PluginFailed
        return kind(f"{where}: {error['msg']}{details}")
    except (ValueError, AttributeError, KeyError, TypeError):
        return PluginFailed(f"{where}: netplugin failed but its message is not JSON: {json.dumps(text[:500])}")


def runtime_config(forwards: Sequence[Mapping[str, Any]] | None, rules: Sequence[Any] | None) -> dict[str, Any]:
    """`runtimeConfig` as the original gives it to every plugin: lists that are not there are null."""
    return {"portMappings": list(forwards) if forwards else None, "netOutRules": list(rules) if rules else None}


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
