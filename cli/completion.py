"""`silkbus completion SHELL`: the script that completes commands and options in bash, zsh or fish.

Commands and options are taken from the commands' own help, so that none can be forgotten, and written into the script,
so that completing costs no start of Python.
"""

import argparse
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass

from cli import arguments as command_line
from cli import terminal
from cli.main import COMMANDS, find, others

FILES = ("-f", "--file", "--token-file", "--directory", "--config")
VALUES = {
    "--output": ("table", "json", "yaml"),
    "--protocol": ("tcp", "udp"),
}
"""Options whose value is one of these; -o is --output where it is."""
_OPTION = re.compile(r"^ {2,8}(-[^ ].*?)(?: {2,}(.*))?$")
_NAMES = re.compile(r"(?<![\w-])(--[a-z][a-z-]*|-[a-zA-Z])(?![\w])")

INSTALL = """\
  source <(silkbus completion bash)                                     in ~/.bashrc
  source <(silkbus completion zsh)                                      in ~/.zshrc, after compinit
  silkbus completion fish > ~/.config/fish/completions/silkbus.fish     once"""


@dataclass(frozen=True, slots=True)
class Option:
    """`names` are its spellings, as `-o` and `--output`."""

    names: tuple[str, ...]
    takes_value: bool
    text: str


@dataclass(frozen=True, slots=True)
class Command:
    name: str
    text: str
    options: tuple[Option, ...]

    @property
    def words(self) -> str:
        """All options."""
        return " ".join(name for option in self.options for name in option.names)


def show(argv: list[str]) -> int:
    """`silkbus completion`; the exit code."""
    parser = command_line.Parser("completion", f"Print a script that completes commands and options.\n\n{INSTALL}")
    parser.add_argument("shell", choices=tuple(SHELLS), metavar="SHELL", help=", ".join(SHELLS))

    def run(arguments: argparse.Namespace) -> None:
        terminal.say("\n".join(SHELLS[arguments.shell](list(commands()))))

    return command_line.run(parser, argv, run)


def commands() -> Iterator[Command]:
    """All commands, with the options that their help has."""
    texts = {name: text for name, (_, text) in COMMANDS.items()}
    for name in [*texts, *(other for other in others() if other not in texts)]:
        yield Command(name, texts.get(name, ""), tuple(options(_help_of(name))))


def options(text: str) -> Iterator[Option]:
    """The options in a help text of argparse's."""
    for line in text.splitlines():
        if found := _OPTION.match(line):
            spelled, names = found[1], tuple(_NAMES.findall(found[1]))
            takes_value = any(re.search(rf"{re.escape(name)} [^,\s]", spelled) for name in names)
            if names:
                yield Option(names, takes_value, (found[2] or "").strip())


def _help_of(name: str) -> str:
    command = find(name)
    output = io.StringIO()
    with redirect_stdout(output):
        try:
            if command is not None:
                command(["--help"])
        except SystemExit:
            pass  # so does argparse end
    return output.getvalue()


def _values(option: Option) -> Sequence[str]:
    return next((VALUES[name] for name in option.names if name in VALUES), ())


def _is_file(option: Option) -> bool:
    return any(name in FILES for name in option.names) and option.takes_value


def bash(found: Sequence[Command]) -> Iterator[str]:
    yield "_silkbus() {"
    yield '  local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} words=""'
    yield "  COMPREPLY=()"
    yield "  if [ $COMP_CWORD -eq 1 ]; then"
    yield f'    words="{" ".join(command.name for command in found)} --help"'
    yield "  else"
    yield '    case "${COMP_WORDS[1]} $before" in'
    for command in found:
        for option in command.options:
            patterns = "|".join(f'"{command.name} {name}"' for name in option.names)
            if _is_file(option):
                files = 'compopt -o filenames 2>/dev/null; COMPREPLY=($(compgen -f -- "$word"))'
                yield f"      {patterns}) {files}; return ;;"
            elif option.takes_value:
                yield f'      {patterns}) COMPREPLY=($(compgen -W "{" ".join(_values(option))}" -- "$word")); return ;;'
    yield "    esac"
    yield '    case "${COMP_WORDS[1]}" in'
    for command in found:
        yield f'      {command.name}) words="{command.words}" ;;'
    yield "    esac"
    yield "  fi"
    yield '  COMPREPLY=($(compgen -W "$words" -- "$word"))'
    yield "}"
    yield "complete -F _silkbus silkbus"


def zsh(found: Sequence[Command]) -> Iterator[str]:
    yield "#compdef silkbus"
    yield "_silkbus() {"
    yield "  if (( CURRENT == 2 )); then"
    yield "    local -a commands=("
    for command in found:
        yield f"      {_quoted(f'{command.name}:{command.text}')}"
    yield "    )"
    yield "    _describe command commands"
    yield "    return"
    yield "  fi"
    yield '  case "$words[2] $words[CURRENT-1]" in'
    for command in found:
        for option in command.options:
            patterns = "|".join(_quoted(f"{command.name} {name}") for name in option.names)
            if _is_file(option):
                yield f"    ({patterns}) _files; return ;;"
            elif option.takes_value:
                words = " ".join(_values(option))
                yield f"    ({patterns}) {f'compadd -- {words}' if words else ':'}; return ;;"
    yield "  esac"
    yield '  case "$words[2]" in'
    for command in found:
        yield f"    ({command.name}) compadd -- {command.words} ;;"
    yield "  esac"
    yield "}"
    yield 'if [ "$funcstack[1]" = "_silkbus" ]; then _silkbus "$@"; else compdef _silkbus silkbus; fi'


def fish(found: Sequence[Command]) -> Iterator[str]:
    yield "complete -c silkbus -f"
    for command in found:
        text = f" -d {_quoted(command.text)}" if command.text else ""
        yield f"complete -c silkbus -n __fish_use_subcommand -a {command.name}{text}"
        for option in command.options:
            words = [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names]
            if _is_file(option):
                words.append("-r -F")
            elif option.takes_value:
                words.append(f"-x -a {_quoted(' '.join(_values(option)))}" if _values(option) else "-x")
            if option.text:
                words.append(f"-d {_quoted(option.text)}")
            yield f"complete -c silkbus -n '__fish_seen_subcommand_from {command.name}' {' '.join(words)}"


def _quoted(text: str) -> str:
    """In single quotes, as zsh and fish both read them: without any inside, and without backslashes."""
    return "'" + text.replace("\\", "").replace("'", "’") + "'"  # noqa: RUF001 (the apostrophe that needs no escape)


SHELLS: Mapping[str, Callable[[Sequence[Command]], Iterator[str]]] = {"bash": bash, "zsh": zsh, "fish": fish}
