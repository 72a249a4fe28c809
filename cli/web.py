"""HTTP as the commands need it, with the standard library only: JSON, TLS, proxies, tokens.

A request is sent once, since nobody knows what became of one that got no answer; only connecting is tried a second
time. A 401 is followed by a second try if the login has a new token: the first was refused, so nothing was done.
"""

import base64
import http.client
import json
import logging
import os
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_fixed

from cli import trace
from cli.errors import Failed
from cli.login import Login

TIMEOUT = 10.0
"""Seconds that connecting, and each wait for more of the answer, may take."""
REFUSED_PAUSE = 0.5
_HERE = ("localhost", "127.0.0.1", "::1")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Message
    body: bytes

    def header(self, name: str) -> str:
        """The first of this name, whatever its case; empty if there is none."""
        return str(self.headers.get(name, ""))

    def json(self) -> Any:
        """The JSON in it, None if it is none."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None


class Server:
    """What is at `url` and below. Every method raises Failed."""

    def __init__(self, url: str, login: Login | None = None, *, skip_ssl_validation: bool = False) -> None:
        self.url = url.rstrip("/")
        self.login = login
        self.skip_ssl_validation = skip_ssl_validation

    def at(self, url: str) -> "Server":
        """Another server, asked by the same login in the same way."""
        return Server(url, self.login, skip_ssl_validation=self.skip_ssl_validation)

    def send(
        self, method: str, path: str, body: object = None, *, form: str | None = None, headers: Mapping[str, str] = {}
    ) -> Answer:
        """The answer to one request, whose body is `body` as JSON, or a form."""
        with self.open(method, path, body, form=form, headers=headers) as response:
            try:
                content = response.read()
            except (OSError, http.client.HTTPException) as error:
                raise self._silent(method, path, body, error) from None
            status = f"{response.status} {response.reason}"
            trace.write("RESPONSE", status, response.headers.items(), content)
            return Answer(response.status, response.headers, content)

    @contextmanager
    def open(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        form: str | None = None,
        headers: Mapping[str, str] = {},
        timeout: float = TIMEOUT,
    ) -> Iterator[http.client.HTTPResponse]:
        """The response as it comes, to be read within the context: for answers that go on."""
        data, sent = None, {"Accept": "application/json", "User-Agent": "silkbus", **headers}
        if body is not None:
            data = json.dumps(body, separators=(",", ":")).encode()
            sent["Content-Type"] = "application/json"
        elif form is not None:
            data = form.encode()
            sent["Content-Type"] = "application/x-www-form-urlencoded"
        for again in (False, True):
            if self.login is not None:
                sent["Authorization"] = self.login.token()
            connection = self._connect(timeout)
            try:
                response = self._exchange(connection, method, path, data, sent)
                if response.status == 401 and not again and self.login is not None and self.login.renew():
                    continue
                yield response
                return
            finally:
                connection.close()

    def _exchange(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        data: bytes | None,
        headers: Mapping[str, str],
    ) -> http.client.HTTPResponse:
        url = urlsplit(self.url + path)
        target = (url.path or "/") + (f"?{url.query}" if url.query else "")
        if url.scheme == "http" and _proxy(url) is not None:
            target = f"http://{url.netloc}{target}"
        trace.write("REQUEST", f"{method} {self.url}{path}", headers.items(), data)
        try:
            connection.request(method, target, data, headers)
            return connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise self._silent(method, path, data, error) from None

    def _silent(self, method: str, path: str, data: object, error: Exception) -> Failed:
        doubt = " Whether the change was made is not known: look with `silkbus network-policies`." if data else ""
        return Failed(f"{self.url} did not answer {method} {path.partition('?')[0] or '/'}: {error!r}.{doubt}")

    def _connect(self, timeout: float) -> http.client.HTTPConnection:
        url = urlsplit(self.url)
        proxy = _proxy(url)
        where = f"{url.scheme}://{url.netloc}"
        try:
            connection = self._connection(url, proxy, _dial_timeout())
            # Once more for a server that is just being restarted. Nothing was sent yet, so nothing is done twice.
            again = Retrying(
                retry=retry_if_exception_type(ConnectionRefusedError),
                stop=stop_after_attempt(2),
                wait=wait_fixed(REFUSED_PAUSE),
                before_sleep=lambda _: log.warning("%s refused the connection, trying once more", where),
                reraise=True,
            )
            again(connection.connect)
            connection.sock.settimeout(timeout)
        except ssl.SSLCertVerificationError as error:
            raise Failed(
                f"{where}: its certificate is not trusted: {error.verify_message}. Name its authority's certificate"
                " by SSL_CERT_FILE=FILE, or, where nobody can listen or meddle, use --skip-ssl-validation."
            ) from None
        except ssl.SSLError as error:
            plain = " It does not seem to speak TLS: is it http://?" if error.reason == "WRONG_VERSION_NUMBER" else ""
            raise Failed(f"{where}: TLS failed: {error}.{plain}") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            via = f" by the proxy {proxy.netloc.rpartition('@')[2]}" if proxy else ""
            raise Failed(f"{where} cannot be reached{via}: {error}. Is it up, and the URL right?") from None
        return connection

    def _connection(self, url: SplitResult, proxy: SplitResult | None, timeout: float) -> http.client.HTTPConnection:
        to = url if proxy is None else proxy
        host, port = to.hostname or "", to.port
        if url.scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=timeout)
        context = ssl.create_default_context()
        if self.skip_ssl_validation:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        connection = http.client.HTTPSConnection(host, port, timeout=timeout, context=context)
        if proxy is not None:
            user = f"{unquote(proxy.username or '')}:{unquote(proxy.password or '')}"
            login = {"Proxy-Authorization": "Basic " + base64.b64encode(user.encode()).decode()}
            connection.set_tunnel(url.hostname or "", url.port or 443, login if proxy.username else {})
        return connection


def _dial_timeout() -> float:
    """Seconds for connecting: as cf has it from the environment, or ours."""
    given = os.environ.get("CF_DIAL_TIMEOUT", "")
    return float(given) if given.isascii() and given.isdigit() and int(given) else TIMEOUT


def _proxy(url: SplitResult) -> SplitResult | None:
    """The proxy that the environment names (http_proxy, https_proxy, no_proxy); never for this machine, as in Go."""
    given = getproxies().get(url.scheme)
    if not given or url.hostname in _HERE or proxy_bypass(url.hostname or ""):
        return None
    return urlsplit(given if "://" in given else f"http://{given}")
