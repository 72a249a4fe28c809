"""How the policy server's two processes start: their settings, or the original's configuration file, and what they say.

Who gave the original's file is told of fatal errors as the original tells them (contract/policy.md 1.13).
"""

import os
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from bus.decode import Malformed
from bus.legacy_config import CannotUse, LegacyConfig
from bus.listener import CannotListen
from bus.log import setup
from bus.opening import CannotOpen
from bus.process import run
from bus.settings import ServiceSettings, SettingsError, command_line, load, refuse

S = TypeVar("S", bound=ServiceSettings)


def start(
    kind: type[S],
    program: str,
    description: str,
    read: Callable[[Path], LegacyConfig],
    serve: Callable[[S], Coroutine[Any, Any, None]],
) -> None:
    """Run `serve` with the settings of the command line and the environment; ends the process when it cannot."""
    parser = command_line(kind, program, description)
    parser.add_argument(
        "-config-file",
        "--config-file",
        type=Path,
        metavar="PATH",
        help="configuration of Cloud Foundry's own server; has precedence over FILE, the environment over both",
    )
    arguments = parser.parse_args()
    try:
        legacy = None if arguments.config_file is None else read(arguments.config_file)
        environment = {**(legacy.environment if legacy else {}), **os.environ}
        settings = load(kind, arguments.config, environment)
    except CannotUse as error:
        sys.exit(str(error))
    except SettingsError as error:
        refuse(program, error)
    setup(program.removeprefix("silkbus-"), settings.log_level)
    try:
        run(lambda: serve(settings))
    except CannotOpen as error:
        sys.exit(legacy.fatal(f"db connect: unable to ping: {error}") if legacy else f"{program}: {error}")
    except (CannotListen, Malformed) as error:
        sys.exit(legacy.fatal(str(error)) if legacy else f"{program}: {error}")
