"""Stands in for the cf CLI before its plugins: net/rpc on a port, in the plugin's words and bytes."""

import json
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Any

from cli.plugin import gob
from tests.cli.test_gob import RECORDING, RESPONSE, SPACE

ORG = gob.Struct(
    "Organization",
    (
        (
            "OrganizationFields",
            gob.Struct(
                "OrganizationFields",
                (
                    ("Guid", gob.STRING),
                    ("Name", gob.STRING),
                    ("QuotaDefinition", gob.Struct("QuotaFields", (("Guid", gob.STRING), ("MemoryLimit", gob.INT)))),
                ),
            ),
        ),
    ),
)
KINDS: dict[str, gob.Type] = {
    "GetCurrentOrg": ORG,
    "GetCurrentSpace": SPACE,
    "GetOutputAndReset": gob.Slice("", gob.STRING),
}


class Server(ABC):
    """Each connection has a thread."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.problems: list[BaseException] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        assert self.problems == []

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._run, args=(connection,), daemon=True).start()

    def _run(self, connection: socket.socket) -> None:
        with connection:
            try:
                self.serve(connection)
            except EOFError:
                pass
            except (AssertionError, KeyError, OSError, gob.BadGob) as error:
                self.problems.append(error)

    @abstractmethod
    def serve(self, connection: socket.socket) -> None:
        """Speak with one client, until it ends (EOFError)."""


def reader(connection: socket.socket) -> Callable[[int], bytes]:
    def take(count: int) -> bytes:
        content = b""
        while len(content) < count:
            if not (part := connection.recv(count - len(content))):
                raise EOFError
            content += part
        return content

    return take


class FakeCf(Server):
    """Answers as `answers` says, by method: a value, or an exception whose text is the error. `calls` is what came."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers = {"IsMinCliVersion": True, "SetPluginMetadata": True, **answers}
        self.calls: list[tuple[str, Any]] = []
        super().__init__()

    def argument(self, method: str) -> Any:
        return next(argument for name, argument in self.calls if name == method)

    def serve(self, connection: socket.socket) -> None:
        decoder, encoder = gob.Decoder(reader(connection)), gob.Encoder()
        while True:
            request, argument = decoder.decode(), decoder.decode()
            method = request["ServiceMethod"].removeprefix("CliRpcCmd.")
            self.calls.append((method, argument))
            answer = {"ServiceMethod": request["ServiceMethod"], "Seq": request.get("Seq", 0)}
            value = self.answers[method]
            if isinstance(value, Exception):
                answer["Error"] = str(value)
                body = encoder.encode(gob.Struct("", ()), {})
                connection.sendall(encoder.encode(RESPONSE, answer) + body)
                continue
            default: gob.Type = gob.BOOL if isinstance(value, bool) else gob.STRING
            head = encoder.encode(RESPONSE, answer)
            connection.sendall(head + encoder.encode(KINDS.get(method, default), value))


class RecordedCf(Server):
    """Plays the recorded answer of cf to whoever sends, byte for byte, what a plugin sent before it."""

    def __init__(self) -> None:
        self.dialogues: list[list[tuple[bytes, bytes]]] = []
        run, last = 0, None
        for line in RECORDING.read_text().splitlines():
            record = json.loads(line)
            run += record["ev"] == "exec"
            if record["ev"] != "data":
                continue
            if (run, record["conn"]) != last and record["dir"] == "plugin->cf":
                self.dialogues.append([])
                last = run, record["conn"]
            if record["dir"] == "plugin->cf":
                asked = bytes.fromhex(record["hex"])
            else:
                self.dialogues[-1].append((asked, bytes.fromhex(record["hex"])))
        super().__init__()

    def serve(self, connection: socket.socket) -> None:
        possible, step, received = self.dialogues, 0, b""
        while part := connection.recv(65536):
            received += part
            possible = [one for one in possible if len(one) > step and one[step][0].startswith(received)]
            if not possible:
                raise AssertionError(f"no plugin sent {received.hex()}")
            if possible[0][step][0] == received:
                connection.sendall(possible[0][step][1])
                step, received = step + 1, b""
