"""HTTP to the components that the policy server asks: UAA and the Cloud Controller.

A request of ours waits for each answer, so asking must end soon, whatever the other side does. Each try has a time-out;
there is a second try for what a second try may mend (no connection, a connection lost, an error of the server's); and
both together have a limit. A problem is logged with its address and told to clients without it.
"""

import asyncio
import json
import logging
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client import Histogram
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type

from bus.decode import Malformed
from bus.log import about
from services.policy.identity import Unavailable

log = logging.getLogger(__name__)

TRIES = 2
CONNECT_SECONDS = 2.0
TRY_SECONDS = 4.0
PAUSE = 0.2
MAX_PAUSE = 2.0
"""A server that wants to be left alone for longer, by Retry-After, is not tried again."""
MAX_ANSWER = 32 << 20

ASKED = Histogram("silkbus_remote_request_seconds", "Time UAA or the Cloud Controller took", ["component", "outcome"])


@dataclass(frozen=True, slots=True)
class Answer:
    """What was answered, with a status below 500 and not 429."""

    status: int
    body: bytes


class _Failed(Exception):
    """One try that a second one may mend, after `pause` seconds."""

    def __init__(self, problem: str, pause: float = PAUSE) -> None:
        super().__init__(problem)
        self.pause = pause


class Remote:
    """One component at `url`, which everything asked is relative to. `name` is what people call it.

    A try takes `try_seconds` at most, and both together half as much again.
    """

    def __init__(self, name: str, url: str, trust: ssl.SSLContext, *, try_seconds: float = TRY_SECONDS) -> None:
        self.name = name
        self._try_seconds = try_seconds
        self._total_seconds = 1.5 * try_seconds
        self._url = url.rstrip("/")
        # A client each, so that one component that hangs does not take the other's connections.
        self._client = httpx.AsyncClient(
            verify=trust,
            trust_env=False,
            follow_redirects=False,
            timeout=httpx.Timeout(try_seconds, connect=CONNECT_SECONDS),
            headers={"Accept": "application/json"},
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def ask(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        form: Mapping[str, str] | None = None,
        login: tuple[str, str] | None = None,
        token: str | None = None,
    ) -> Answer:
        """Ask, twice if need be: only for what may be done twice. Raises Unavailable.

        `form` is sent URL-encoded; `login` is for Basic authentication, `token` for Bearer.
        """
        request = self._client.build_request(
            method,
            self._url + path,
            params=query,
            data=form,
            headers={} if token is None else {"Authorization": f"bearer {token}"},
        )
        auth = None if login is None else httpx.BasicAuth(*login)
        try:
            async with asyncio.timeout(self._total_seconds):
                async for attempt in self._retrying(path):
                    with attempt:
                        return await self._try(request, auth)
        except _Failed as error:
            raise self.unavailable(str(error), path) from None
        except TimeoutError:
            raise self.unavailable(f"did not answer within {self._total_seconds:g} s", path) from None
        raise AssertionError("retrying ends by returning or raising")

    def read(self, answer: Answer, where: str) -> dict[str, Any]:
        """The JSON object of an answer with status 200. Raises Unavailable for everything else."""
        if answer.status != 200:
            raise self.unavailable(f"answered with status {answer.status}", where, answer.body)
        try:
            value = json.loads(answer.body)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            # Not logged as errors' bodies are: a good answer may hold a token.
            raise self.unavailable("gave an answer that is no JSON object", where)
        return value

    def malformed(self, error: Malformed, where: str) -> Unavailable:
        log.error("%s gave a malformed answer", self.name, extra=about(url=self._url, asked=where, error=str(error)))
        return Unavailable(f"{self.name} gave an answer that cannot be understood")

    def unavailable(self, problem: str, where: str, body: bytes = b"") -> Unavailable:
        """The error to raise for a problem, which is logged with what clients are not told."""
        details = {"body": body[:500].decode(errors="replace")} if body else {}
        log.error("%s %s", self.name, problem, extra=about(url=self._url, asked=where, **details))
        return Unavailable(f"{self.name} {problem}")

    async def _try(self, request: httpx.Request, auth: httpx.BasicAuth | None) -> Answer:
        loop = asyncio.get_running_loop()
        started = loop.time()
        outcome = "none"
        try:
            async with asyncio.timeout(self._try_seconds):
                response = await self._client.send(request, auth=auth, stream=True)
                try:
                    outcome = str(response.status_code)
                    return Answer(_checked(response), await _body(response))
                finally:
                    await response.aclose()
        except (TimeoutError, httpx.TimeoutException):
            raise _Failed(f"did not answer within {self._try_seconds:g} s") from None
        except httpx.HTTPError as error:
            log.warning("cannot reach %s", self.name, extra=about(url=str(request.url)[:200], error=repr(error)))
            raise _Failed("cannot be reached") from None
        finally:
            ASKED.labels(self.name, outcome).observe(loop.time() - started)

    def _retrying(self, path: str) -> AsyncRetrying:
        def failure(state: RetryCallState) -> BaseException | None:
            return state.outcome.exception() if state.outcome else None

        def pause(state: RetryCallState) -> float:
            error = failure(state)
            return error.pause if isinstance(error, _Failed) else PAUSE

        def say(state: RetryCallState) -> None:
            log.warning("%s %s, trying again", self.name, failure(state), extra=about(url=self._url, asked=path))

        return AsyncRetrying(
            retry=retry_if_exception_type(_Failed),
            stop=_is_last,
            wait=pause,
            before_sleep=say,
            reraise=True,
        )


def _is_last(state: RetryCallState) -> bool:
    """Whether to give up after this try."""
    error = state.outcome.exception() if state.outcome else None
    return state.attempt_number >= TRIES or (isinstance(error, _Failed) and error.pause > MAX_PAUSE)


def _checked(response: httpx.Response) -> int:
    if response.status_code < 500 and response.status_code != 429:
        return response.status_code
    wanted = response.headers.get("retry-after", "")
    pause = float(wanted) if wanted.isascii() and wanted.isdigit() else PAUSE
    raise _Failed(f"answered with status {response.status_code}", max(pause, PAUSE))


async def _body(response: httpx.Response) -> bytes:
    body = bytearray()
    async for part in response.aiter_bytes():
        body += part
        if len(body) > MAX_ANSWER:
            raise _Failed(f"gave an answer longer than {MAX_ANSWER >> 20} MiB", MAX_PAUSE + 1)
    return bytes(body)


def trust(authorities: Sequence[Path], *, skip_validation: bool) -> ssl.SSLContext:
    """TLS that trusts the certificates in these PEM files, or the system's if they hold none. Raises Malformed.

    All files count for all components, and a blank file is none: so the original does it (contract/policy.md 1.1).
    """
    context = ssl.create_default_context()
    if skip_validation:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context
    texts = []
    for file in authorities:
        try:
            texts.append(file.read_text(encoding="ascii", errors="replace"))
        except OSError as error:
            raise Malformed(f"CA file {file}: cannot be read: {error.strerror}") from None
    pem = "\n".join(texts)
    if not pem.strip():
        return context
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=pem)
    except (ssl.SSLError, ValueError) as error:
        files = ", ".join(str(file) for file in authorities)
        raise Malformed(f"CA file {files}: holds no certificates in PEM form: {error}") from None
    return context


def present(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    """Show this certificate to those who ask for one. Raises Malformed."""
    try:
        context.load_cert_chain(certificate, key)
    except OSError as error:  # ssl.SSLError is one, too
        raise Malformed(f"client certificate {certificate}, key {key}: cannot be used: {error}") from None
