"""The policy server's external API, version v1, with nothing but the standard library (contract/policy.md 1.4, 6.2)."""

import http.client
import json
import logging
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_fixed

from cli.errors import Failed

TIMEOUT = 10.0
REFUSED_PAUSE = 0.5
BATCH = 200
"""GUIDs in one request's query, so that the request line stays short."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, order=True)
class Policy:
    """A policy between two GUIDs."""

    source: str
    destination: str
    protocol: str
    start: int
    end: int

    def encode(self) -> dict[str, Any]:
        ports = {"start": self.start, "end": self.end}
        destination = {"id": self.destination, "protocol": self.protocol, "ports": ports}
        return {"source": {"id": self.source}, "destination": destination}

    @classmethod
    def decode(cls, value: Any) -> "Policy":
        destination = value["destination"]
        ports = destination["ports"]
        return cls(value["source"]["id"], destination["id"], destination["protocol"], ports["start"], ports["end"])


class Client:
    """Calls to the API at `api`, a URL. Every method raises Failed."""

    def __init__(self, api: str, token: str) -> None:
        self.api = api
        # A token copied from `cf oauth-token` brings the word along.
        self._authorization = token if token.lower().startswith("bearer ") else f"bearer {token}"

    def add(self, policies: Iterable[Policy]) -> None:
        self._call("POST", "/policies", {"policies": [policy.encode() for policy in policies]})

    def remove(self, policies: Iterable[Policy]) -> None:
        self._call("POST", "/policies/delete", {"policies": [policy.encode() for policy in policies]})

    def policies(self, *, sources: Iterable[str] | None = None) -> list[Policy]:
        """All policies, or those of these sources, in the server's order."""
        if sources is None:
            return self._list("")
        guids = list(dict.fromkeys(sources))
        batches = (guids[start : start + BATCH] for start in range(0, len(guids), BATCH))
        return [policy for batch in batches for policy in self._list(f"?source_id={quote(','.join(batch), safe='')}")]

    def _list(self, query: str) -> list[Policy]:
        answer = self._call("GET", f"/policies{query}")
        try:
            return [Policy.decode(item) for item in answer["policies"]]
        except (KeyError, TypeError) as error:
            raise Failed(f"{self.api} answered a list of policies that cannot be understood: {error!r}") from None

    def _call(self, method: str, path: str, body: object = None) -> Any:
        """The JSON answered. A request is sent once: only connecting is tried a second time."""
        url = urlsplit(f"{self.api}/networking/v1/external{path}")
        target = url.path + (f"?{url.query}" if url.query else "")
        headers = {"Accept": "application/json", "Authorization": self._authorization, "User-Agent": "silkbus"}
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        connection = self._connect(url.scheme, url.netloc)
        try:
            connection.request(method, target, data, headers)
            response = connection.getresponse()
            return _answer(response.status, response.read(), response.headers.get("X-Vcap-Request-Id", ""))
        except (OSError, http.client.HTTPException) as error:
            doubt = " Whether the change was made is not known: look with network-policies." if body else ""
            raise Failed(f"{self.api} did not answer {method} {path.partition('?')[0]}: {error!r}.{doubt}") from None
        finally:
            connection.close()

    def _connect(self, scheme: str, netloc: str) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
        try:
            connection = kind(netloc, timeout=TIMEOUT)
            # Once more for a server that is just being restarted. Nothing was sent yet, so nothing is done twice.
            again = Retrying(
                retry=retry_if_exception_type(ConnectionRefusedError),
                stop=stop_after_attempt(2),
                wait=wait_fixed(REFUSED_PAUSE),
                before_sleep=lambda _: log.warning("%s refused the connection, trying once more", self.api),
                reraise=True,
            )
            again(connection.connect)
        except ssl.SSLError as error:
            raise Failed(f"{self.api}: TLS failed: {error}") from None
        except (OSError, http.client.HTTPException) as error:
            raise Failed(
                f"{self.api} cannot be reached: {error}. Is the policy server up, and the URL right?"
            ) from None
        return connection


def _answer(status: int, body: bytes, request_id: str) -> Any:
    try:
        answer = json.loads(body)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise Failed(f"Error Code: {status}\nRaw Response: {body.decode(errors='replace')}")
    if status == 200:
        return answer
    text = str(answer.get("error", ""))
    if status in (400, 401, 403, 406, 409):
        raise Failed(text)
    raise Failed(f"Unexpected Response\nResponse code: {status}\nRequest ID:    {request_id}\nDescription:   {text}")
