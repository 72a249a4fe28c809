"""Calls to the cf CLI that runs us as its plugin: Go's net/rpc on a port of 127.0.0.1 (contract/policy.md 7).

As Go's plugin library does, each call has a connection of its own, save the three that make up one command of cf.
"""

import contextlib
import logging
import socket
from collections.abc import Iterator
from typing import Any

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_fixed

from cli.errors import Failed
from cli.plugin import gob

TIMEOUT = 60.0
"""Seconds that cf may take for an answer: it may have to ask the UAA, or a person's network."""
ATTEMPTS = 5
PAUSE = 0.2

STRINGS = gob.Slice("", gob.STRING)
REQUEST = gob.Struct("Request", (("ServiceMethod", gob.STRING), ("Seq", gob.UINT)))

VERSION = gob.Struct("VersionType", (("Major", gob.INT), ("Minor", gob.INT), ("Build", gob.INT)))
USAGE = gob.Struct("Usage", (("Usage", gob.STRING), ("Options", gob.Map("map[string]string", gob.STRING, gob.STRING))))
COMMAND = gob.Struct(
    "Command", (("Name", gob.STRING), ("Alias", gob.STRING), ("HelpText", gob.STRING), ("UsageDetails", USAGE))
)
METADATA = gob.Struct(
    "PluginMetadata",
    (
        ("Name", gob.STRING),
        ("Version", VERSION),
        ("LibraryVersion", VERSION),
        ("MinCliVersion", VERSION),
        ("Commands", gob.Slice("[]plugin.Command", COMMAND)),
    ),
)

log = logging.getLogger(__name__)


class CfError(Failed):
    """cf answered a call with an error: its text."""


class _Stream:
    """One connection: calls, one after the other."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._encoder = gob.Encoder()
        self._decoder = gob.Decoder(self._take)
        self._calls = 0

    def call(self, method: str, kind: gob.Type, argument: object) -> Any:
        request = {"ServiceMethod": f"CliRpcCmd.{method}", "Seq": self._calls}
        self._calls += 1
        try:
            self._connection.sendall(self._encoder.encode(REQUEST, request) + self._encoder.encode(kind, argument))
            answer, value = self._decoder.decode(), self._decoder.decode()
        except (OSError, gob.BadGob) as error:
            raise Failed(f"cf does not answer its plugin's call {method}: {error!r}") from None
        if not isinstance(answer, dict) or answer.get("Seq", 0) != request["Seq"]:
            raise Failed(f"cf answered another call than {method}: {answer!r}")
        if answer.get("Error"):
            raise CfError(str(answer["Error"]))
        return value

    def _take(self, count: int) -> bytes:
        content = b""
        while len(content) < count:
            if not (part := self._connection.recv(count - len(content))):
                raise ConnectionResetError("the connection was closed")
            content += part
        return content


class Cf:
    """The cf CLI that listens at `port`. Every method raises Failed, CfError if it is cf that says so."""

    def __init__(self, port: int) -> None:
        self.port = port

    def call(self, method: str, kind: gob.Type = gob.STRING, argument: object = "") -> Any:
        with self._stream() as stream:
            return stream.call(method, kind, argument)

    def text(self, method: str) -> str:
        return str(self.call(method))

    def command(self, *arguments: str) -> list[str]:
        """The lines that a command of cf printed, of its older ones only; nothing goes to the terminal."""
        with self._stream() as stream:
            stream.call("DisableTerminalOutput", gob.BOOL, True)
            known = stream.call("CallCoreCommand", STRINGS, list(arguments))
            lines = stream.call("GetOutputAndReset", gob.BOOL, True)
            if not known or not isinstance(lines, list):
                raise CfError(f"cf has no command {arguments[0]}")
            return [str(line) for line in lines]

    @contextlib.contextmanager
    def _stream(self) -> Iterator[_Stream]:
        again = Retrying(
            retry=retry_if_exception_type(ConnectionRefusedError),
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_fixed(PAUSE),
            before_sleep=lambda _: log.warning("cf does not listen at port %d yet, trying again", self.port),
            reraise=True,
        )
        try:
            connection = again(socket.create_connection, ("127.0.0.1", self.port), TIMEOUT)
        except OSError as error:
            raise Failed(f"cf does not listen to its plugin at 127.0.0.1:{self.port}: {error}") from None
        with connection:
            yield _Stream(connection)
