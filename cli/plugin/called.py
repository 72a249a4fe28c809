"""The plugin, called by cf to be installed, to run a command, or to be uninstalled (contract/policy.md 7.1)."""

import os

from cli import access, arguments, configuration, terminal
from cli.errors import Failed
from cli.main import find, prepare_output, run
from cli.plugin import commands
from cli.plugin.gob import STRING
from cli.plugin.login import PluginLogin
from cli.plugin.rpc import METADATA, Cf, CfError

INSTALL = "SendMetadata"
UNINSTALL = "CLI-MESSAGE-UNINSTALL"


def called(port: int, name: str, words: list[str]) -> int:
    """Do what cf, which listens at `port`, calls for; the exit code."""
    prepare_output()
    arguments.typed = commands.typed
    try:
        return _called(Cf(port), name, words)
    except Failed as error:
        terminal.say(f"{terminal.coloured('FAILED', terminal.RED)}\n{error}")
        return 1


def _called(cf: Cf, name: str, words: list[str]) -> int:
    if name == INSTALL:
        return 0 if cf.call("SetPluginMetadata", METADATA, commands.metadata()) is True else 1
    least = ".".join(map(str, commands.LEAST_CF))
    if cf.call("IsMinCliVersion", STRING, least) is not True:
        terminal.say(f"Minimum CLI version {least} is required to run this plugin command\n")
        return 0
    if name == UNINSTALL:
        terminal.ok()
        return 0
    function = find(commands.names().get(name, ""))
    if function is None:
        raise Failed(f"The plugin {commands.NAME} has no command {name}. `cf plugins` lists those it has.")
    # Who calls cf means what cf is logged in to, whatever silkbus by itself would speak to.
    for key in configuration.KEYS:
        os.environ.pop(f"SILKBUS_{key.upper()}", None)
    configuration.find_cloud_foundry = lambda: PluginLogin(cf)
    access.help_of = lambda _: _help(cf, name)
    return run(function, words)


def _help(cf: Cf, name: str) -> str:
    """How cf explains a command of ours."""
    try:
        return "\n".join(cf.command("help", name))
    except CfError as error:
        return f"cf cli error: {error}"
