"""A stream of datagrams between two namespaces, counted at both ends."""

import socket
import threading
import time
from types import TracebackType

from services.silk.namespace import Namespace


class UdpStream:
    """Sends a numbered datagram each millisecond from one namespace to `address` in another, while inside.

    What the sender's own kernel refuses to send counts as sent, and as `refused`.
    """

    def __init__(self, source: Namespace, target: Namespace, address: str, port: int = 7000) -> None:
        self.sent = self.refused = 0
        self.received = 0
        self._receiver = target.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self._receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self._receiver.bind(("0.0.0.0", port))  # noqa: S104 (inside a namespace of the test's own)
        self._receiver.settimeout(2)
        self._sender = source.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self._sender.connect((address, port))
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._send), threading.Thread(target=self._receive)]

    def __enter__(self) -> "UdpStream":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._sender.close()
        self._receiver.close()

    def wait_for(self, count: int, seconds: float = 30) -> None:
        """Until `count` datagrams have arrived."""
        end = time.monotonic() + seconds
        while self.received < count:
            assert time.monotonic() < end, f"{self.received} datagrams of {self.sent} arrived"
            time.sleep(0.01)

    def _send(self) -> None:
        while not self._stop.is_set():
            try:
                self._sender.send(str(self.sent).encode())
            except OSError:
                self.refused += 1
            self.sent += 1
            time.sleep(0.001)

    def _receive(self) -> None:
        while True:
            try:
                self._receiver.recv(64)
            except TimeoutError:
                if self._stop.is_set():
                    return
                continue
            self.received += 1
