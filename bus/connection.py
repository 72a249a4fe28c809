"""A connection to NATS that never gives up and never hangs.

nats-py reconnects by itself, but a client may also end for good (a permission error, a protocol error, a slow consumer
cut off by the server), may wait minutes for a peer that went silent, and may lose its read loop. So here one client
lives exactly as long as one connection: when it ends, or does not answer a round trip in time, it is thrown away, and a
new one is made with back-off, and every subscription is made again. Starting with the bus down is the same case.

Publishing while disconnected drops the message and says so: everything sent here can be asked for again.
"""

import asyncio
import logging
import random
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import nats
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from prometheus_client import Counter, Gauge
from tenacity import AsyncRetrying, RetryCallState, wait_random_exponential

from bus import micro, subjects
from bus.credentials import Credentials
from bus.decode import Fields, Malformed
from bus.log import about
from bus.micro import MALFORMED, PartsAnswerer
from bus.process import cancellation_heeded
from bus.wire import decode, encode

log = logging.getLogger(__name__)

CONNECT_TIMEOUT = 2
CHECK_INTERVAL = 2.0
CHECK_TIMEOUT = 3
MAX_BACKOFF = 5.0
CLOSE_TIMEOUT = 2.0
ENDING_SECONDS = 0.05
STABLE_SECONDS = 10.0
MAX_BACKLOG_BYTES = 64 << 20

CONNECTED = Gauge("silkbus_bus_connected", "1 while connected to NATS")
DROPPED = Counter("silkbus_bus_dropped_total", "Messages not sent because the bus was away or its buffer was full")


class BusAway(Exception):
    """There is no connection to NATS now. It is being re-made; nothing was sent."""


class NoAnswer(Exception):
    """Nobody answered in time. Whether the request was carried out is not known."""


Handler = Callable[[str, bytes], None]
Answerer = Callable[[str, Fields], Awaitable[Mapping[str, Any]]]


@dataclass(eq=False)
class _Subscription:
    subject: str
    queue: str
    callback: Callable[[Msg], Awaitable[None]]


@dataclass(eq=False)
class Connection:
    """One service's connection. Made by `connect`; all methods are for the event loop's thread."""

    servers: list[str]
    name: str
    inbox_prefix: str
    credentials: Credentials | None
    options: Mapping[str, Any]
    _client: Client | None = None
    _subscriptions: list[_Subscription] = field(default_factory=list)
    _watchers: list[Callable[[], None]] = field(default_factory=list)
    _service: micro.Service | None = None
    _untried: list[str] = field(default_factory=list)
    _closing: set[asyncio.Task[None]] = field(default_factory=set)
    _connected: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def connected(self) -> bool:
        return self._client is not None and self._client.is_connected

    @property
    def max_payload(self) -> int:
        """The largest message the server takes, in bytes; NATS's default while that is not known."""
        return int(self._client.max_payload) if self._client is not None else 1 << 20

    @property
    def backlog(self) -> int:
        """Bytes that wait to be sent. When there are too many, messages are dropped."""
        return int(self._client.pending_data_size) if self._client is not None else 0

    async def round_trip(self, timeout: float) -> float:
        """Seconds that the server takes to answer a ping. Raises BusAway, also if it takes longer than `timeout`."""
        client = self._client
        if client is None or not client.is_connected:
            raise BusAway(f"no connection to NATS at {', '.join(self.servers)}")
        began = time.monotonic()
        try:
            with cancellation_heeded():
                async with asyncio.timeout(timeout):
                    await client.flush(timeout=int(timeout) + 1)
        except (nats.errors.Error, OSError, TimeoutError) as error:
            raise BusAway(f"NATS does not answer a ping within {timeout:g} s: {error!r}") from None
        return time.monotonic() - began

    def on_connect(self, watcher: Callable[[], None]) -> None:
        """Call `watcher` after each connection made from now on."""
        self._watchers.append(watcher)

    async def wait_connected(self, timeout: float) -> bool:
        """Whether there is a connection within `timeout` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while not self.connected:
                    # A client that ended counts as the connection until its keeper hears of it. Waiting for an event
                    # that is set does not let the keeper run.
                    await (asyncio.sleep(ENDING_SECONDS) if self._connected.is_set() else self._connected.wait())
        return self.connected

    def jetstream(self, timeout: float) -> JetStreamContext:
        """JetStream's calls over the client of now, `timeout` seconds each. Raises BusAway."""
        client = self._client
        if client is None or not client.is_connected:
            raise BusAway(f"no connection to NATS at {', '.join(self.servers)}")
        return client.jetstream(timeout=timeout)

    async def publish(self, subject: str, message: Mapping[str, Any], *, reply: str = "") -> bool:
        """Send a message if there is a connection; whether it was handed to one is the answer."""
        return await self.publish_bytes(subject, encode(message), reply=reply)

    async def publish_bytes(self, subject: str, data: bytes, *, reply: str = "") -> bool:
        return await self._send(subject, data, None, reply)

    async def _send(self, subject: str, data: bytes, headers: Mapping[str, str] | None, reply: str = "") -> bool:
        client = self._client
        if client is None or not client.is_connected or client.pending_data_size > MAX_BACKLOG_BYTES:
            DROPPED.inc()
            return False
        try:
            await client.publish(subject, data, reply=reply, headers=dict(headers) if headers else None)
        except (nats.errors.Error, OSError) as error:
            DROPPED.inc()
            log.warning("message not sent", extra=about(subject=subject, bytes=len(data), error=repr(error)))
            return False
        return True

    async def listen(self, subject: str, handler: Handler) -> None:
        """Call `handler(subject, data)` for each message, in order, on this connection and all that follow it."""

        async def callback(message: Msg) -> None:
            try:
                handler(message.subject, message.data)
            except Malformed as error:
                MALFORMED.inc()
                log.warning("message refused", extra=about(subject=message.subject, error=str(error)))

        await self._add(_Subscription(subject, "", callback))

    async def serve(self, subject: str, answerer: Answerer, *, queue: str) -> None:
        """Answer requests to `subject`, sharing them with the others of `queue`, many at a time.

        The answer to what cannot be understood, or fails, is `{"error": text}`.
        """

        async def one(subject: str, request: Fields) -> Sequence[Mapping[str, Any]]:
            return [await answerer(subject, request)]

        await self.serve_parts(subject, one, queue=queue)

    async def serve_parts(self, subject: str, answerer: PartsAnswerer, *, queue: str) -> None:
        """As `serve`, for answers of several messages, or of none, when another of the queue may know better."""
        if self._service is None:
            service = self._service = micro.Service(*self.name.split("/"))

            async def describe(message: Msg) -> None:
                if subjects.is_inbox(message.reply):
                    await self.publish_bytes(message.reply, service.describe(message.subject))

            for control in service.control_subjects():
                await self._add(_Subscription(control, "", describe))
        endpoint = micro.Endpoint(subject, queue, answerer, self._send)
        self._service.endpoints.append(endpoint)
        await self._add(_Subscription(subject, queue, endpoint.take))

    async def request(self, subject: str, message: Mapping[str, Any], *, timeout: float) -> Fields:
        """Ask and give back the answer. Raises BusAway, NoAnswer, or Malformed for an answer not understood."""
        client = self._client
        if client is None or not client.is_connected:
            raise BusAway(f"no connection to NATS at {', '.join(self.servers)}")
        try:
            with cancellation_heeded():
                answer = await client.request(subject, encode(message), timeout=timeout)
        except nats.errors.NoRespondersError:
            raise NoAnswer(f"nobody serves {subject}") from None
        except (nats.errors.TimeoutError, TimeoutError):
            raise NoAnswer(f"no answer to {subject} within {timeout:g} s") from None
        except (nats.errors.Error, OSError) as error:
            raise BusAway(f"asking {subject}: {error!r}") from None
        return decode(answer.data, f"answer to {subject}")

    async def collect(self, subject: str, message: Mapping[str, Any], *, timeout: float) -> AsyncIterator[Fields]:
        """Ask a question that is answered in several messages; `timeout` is for each. The caller knows the last.

        Raises as `request`.
        """
        client = self._client
        if client is None or not client.is_connected:
            raise BusAway(f"no connection to NATS at {', '.join(self.servers)}")
        try:
            inbox = client.new_inbox()
            with cancellation_heeded():
                subscription = await client.subscribe(inbox)
            try:
                await client.publish(subject, encode(message), reply=inbox)
                while True:
                    with cancellation_heeded():
                        part: Msg = await subscription.next_msg(timeout=timeout)
                    if part.headers and part.headers.get("Status") == "503":
                        raise NoAnswer(f"nobody serves {subject}")
                    yield decode(part.data, f"answer to {subject}")
            finally:
                with suppress(nats.errors.Error, OSError):
                    await subscription.unsubscribe()
        except (nats.errors.TimeoutError, TimeoutError):
            raise NoAnswer(f"no answer to {subject} within {timeout:g} s") from None
        except (nats.errors.Error, OSError) as error:
            raise BusAway(f"asking {subject}: {error!r}") from None

    async def _add(self, subscription: _Subscription) -> None:
        self._subscriptions.append(subscription)
        if self._client is not None:
            with suppress(nats.errors.Error, OSError):  # then the client is ending, and the next one takes it up
                await self._subscribe(self._client, subscription)

    async def _subscribe(self, client: Client, subscription: _Subscription) -> None:
        await client.subscribe(subscription.subject, queue=subscription.queue, cb=subscription.callback)

    async def _keep(self) -> None:
        """Have a client, for ever."""
        short_lives = 0
        while True:
            client, ended = await self._open()
            begun = time.monotonic()
            try:
                await self._watch(client, ended)
            except Exception:  # whatever nats-py raises, the answer is another client
                log.exception("NATS client failed", extra=about(servers=self.servers))
            finally:
                self._client = None
                self._connected.clear()
                CONNECTED.set(0)
                # A client whose server hangs takes its time to close, and the next one need not wait for that.
                closing = asyncio.create_task(_close(client))
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)
            log.warning("connection to NATS lost", extra=about(servers=self.servers))
            # A server that lets us in only to throw us out must not be asked again in a hot loop.
            short_lives = short_lives + 1 if time.monotonic() - begun < STABLE_SECONDS else 0
            if short_lives > 1:
                await asyncio.sleep(random.uniform(0, min(MAX_BACKOFF, 0.1 * 2**short_lives)))  # noqa: S311 (no secret)

    async def _open(self) -> tuple[Client, asyncio.Event]:
        """A connected client with all subscriptions, however long it takes."""

        def say(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            fields = about(servers=self.servers, attempt=state.attempt_number, error=explain(error, self.credentials))
            log.warning("cannot connect to NATS, trying again", extra=fields)

        async for attempt in AsyncRetrying(wait=wait_random_exponential(0.1, max=MAX_BACKOFF), before_sleep=say):
            with attempt:
                return await self._open_once()
        raise AssertionError("retrying without a limit does not end")

    async def _open_once(self) -> tuple[Client, asyncio.Event]:
        ended = asyncio.Event()
        client = Client()
        options = dict(self.options)

        async def on_end() -> None:
            ended.set()

        async def on_error(error: Exception) -> None:
            if "permissions violation" in str(error).lower():
                # Its text has the subject. The client goes on: what is permitted still works.
                log.error("NATS does not permit this to this service", extra=about(error=str(error)))
                return
            if self._client is client:  # while connecting, the attempt's own failure says it
                log.warning("NATS client reports an error", extra=about(error=repr(error)))

        try:
            with cancellation_heeded():
                async with asyncio.timeout(CONNECT_TIMEOUT * 3):
                    if self.credentials is not None:
                        options["tls"] = await asyncio.to_thread(self.credentials.context)
                    # One address per client: which one is tried when is decided here, not in the client.
                    await client.connect(
                        servers=[self._next_server()],
                        name=self.name,
                        allow_reconnect=False,
                        connect_timeout=CONNECT_TIMEOUT,
                        disconnected_cb=on_end,
                        closed_cb=on_end,
                        error_cb=on_error,
                        inbox_prefix=self.inbox_prefix,
                        **options,
                    )
                    if self.credentials is not None and not client._server_info.get("tls_required"):
                        # The client believes the server's first, open words; whoever is in between could say no TLS.
                        raise nats.errors.SecureConnRequiredError
                    made = 0
                    while True:
                        for subscription in self._subscriptions[made:]:
                            await self._subscribe(client, subscription)
                            made += 1
                        await client.flush(timeout=CHECK_TIMEOUT)
                        if made == len(self._subscriptions):  # others may be added while the server confirms these
                            break
        except BaseException:
            await _close(client)
            raise
        self._client = client
        self._connected.set()
        CONNECTED.set(1)
        log.info("connected to NATS", extra=about(server=str(client.connected_url and client.connected_url.netloc)))
        for watcher in self._watchers:
            watcher()
        return client, ended

    def _next_server(self) -> str:
        """Each server once, in random order, before any is tried again: a dead one costs one attempt."""
        if not self._untried:
            self._untried = random.sample(self.servers, len(self.servers))
        return self._untried.pop()

    async def _watch(self, client: Client, ended: asyncio.Event) -> None:
        """Return when the client has ended, or a round trip to the server fails."""
        while client.is_connected:
            with suppress(TimeoutError):
                async with asyncio.timeout(CHECK_INTERVAL):
                    await ended.wait()
                return
            try:
                with cancellation_heeded():
                    async with asyncio.timeout(CHECK_TIMEOUT + 1):
                        await client.flush(timeout=CHECK_TIMEOUT)
            except (nats.errors.Error, OSError, TimeoutError) as error:
                log.warning("NATS does not answer", extra=about(error=repr(error)))
                return


def explain(error: BaseException | None, credentials: Credentials | None) -> str:
    """Why there is no connection, and what to do where that can be said."""
    text = str(error) or repr(error)
    lower = text.lower()
    who = f"the certificate {credentials.cert}" if credentials else "a client without a certificate"
    if "authorization violation" in lower:
        return f"{text}: NATS has no user for {who}: add it with `silkbus nats-config`, and reload the servers"
    refused = f"NATS refuses {who}: it must be signed by the servers' authority, for clients, and be valid now"
    if "alert" in lower or isinstance(error, ssl.SSLEOFError):
        return f"{text}: {refused}"
    if credentials and isinstance(error, BrokenPipeError | ConnectionResetError):
        # In TLS 1.3 the client has begun to send when it is refused, and may learn of the end before the reason.
        return f"{text}: the server hung up; if it does so each time, {refused}"
    if isinstance(error, ssl.SSLCertVerificationError):
        if credentials is None:
            return f"{text}: NATS wants TLS: set nats_ca, nats_cert and nats_key to what `silkbus nats-config` wrote"
        return f"{text}: the server's certificate is not of {credentials.ca}, or is for another address"
    if isinstance(error, nats.errors.SecureConnRequiredError):
        return "the server at this address does not ask for TLS, and nats_ca is set: is it ours?"
    return text


async def _close(client: Client) -> None:
    # A client that is wedged must not hold up the next one; a failure to close says nothing we could act on.
    with suppress(Exception):
        async with asyncio.timeout(CLOSE_TIMEOUT):
            await client.close()


@asynccontextmanager
async def connect(
    servers: str, *, role: str, name: str, credentials: Credentials | None = None, **options: Any
) -> AsyncIterator[Connection]:
    """A connection for one service, kept while inside.

    `servers` is a comma-separated list of NATS URLs. `role` (policy-server, silk-controller, cell, reader) and `name`
    make up the client's name and its inbox prefix. With `credentials`, mutual TLS is used and nothing less accepted.
    `options` go to nats-py.
    """
    connection = Connection(
        servers=[server.strip() for server in servers.split(",") if server.strip()],
        name=f"{role}/{name}",
        inbox_prefix=subjects.inbox(role, name),
        credentials=credentials,
        options=options,
    )
    keeper = asyncio.create_task(connection._keep())
    try:
        yield connection
    finally:
        keeper.cancel()
        with suppress(asyncio.CancelledError):
            await keeper
        await asyncio.gather(*connection._closing)
