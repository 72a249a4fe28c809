"""The policy server's external API, version v1 (contract/policy.md 1.4, 6.2)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from cli.errors import Failed, Refused
from cli.web import Answer, Server

BATCH = 200
"""GUIDs in one request's query, as the cf CLI does, so that the request line stays short."""
PATH = "/networking/v1/external"


@dataclass(frozen=True, slots=True, order=True)
class Policy:
    """A policy between two GUIDs."""

    source: str
    destination: str
    protocol: str
    start: int
    end: int

    @property
    def ports(self) -> str:
        """`8080`, or `8080-8090`."""
        return str(self.start) if self.start == self.end else f"{self.start}-{self.end}"

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
    """Calls to the API below `server`, which is at `…/networking/v1/external`. Every method raises Failed."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def add(self, policies: Iterable[Policy]) -> int | None:
        """Add the policies, all or none; the revision from which on they hold, None if the server does not tell."""
        return self._change("/policies", policies)

    def remove(self, policies: Iterable[Policy]) -> int | None:
        """Remove those of the policies that there are; the revision, as with `add`."""
        return self._change("/policies/delete", policies)

    def policies(self, *, sources: Iterable[str] | None = None) -> list[Policy]:
        """All policies, or those of these sources, in the server's order."""
        if sources is None:
            return self._list("")
        guids = list(dict.fromkeys(sources))
        wanted = frozenset(guids)
        return [policy for policy in self.concerning(guids) if policy.source in wanted]

    def concerning(self, guids: Sequence[str]) -> list[Policy]:
        """The policies that have one of these for source or destination, the one filter that cf uses."""
        batches = (guids[start : start + BATCH] for start in range(0, len(guids), BATCH))
        found = (policy for batch in batches for policy in self._list(f"?id={quote(','.join(batch), safe='')}"))
        # Two batches may bring the same policy.
        return list(dict.fromkeys(found))

    def get(self, path: str) -> Any:
        """The JSON object at a path below the API's, with its query."""
        return checked(self.server.send("GET", path))

    def _change(self, path: str, policies: Iterable[Policy]) -> int | None:
        answer = self.server.send("POST", path, {"policies": [policy.encode() for policy in policies]})
        checked(answer)
        revision = answer.header("X-Silkbus-Revision")
        return int(revision) if revision.isdigit() else None

    def _list(self, query: str) -> list[Policy]:
        answer = self.get(f"/policies{query}")
        try:
            return [Policy.decode(item) for item in answer["policies"]]
        except (KeyError, TypeError) as error:
            raise Failed(
                f"{self.server.url} answered a list of policies that cannot be understood: {error!r}"
            ) from None


def checked(answer: Answer) -> Any:
    """The JSON object answered; errors as the cf CLI shows them (contract/policy.md 6.2)."""
    value = answer.json()
    if not isinstance(value, dict):
        raise Failed(f"Error Code: {answer.status}\nRaw Response: {answer.body.decode(errors='replace')}")
    if answer.status == 200:
        return value
    text = str(value.get("error", ""))
    if answer.status in (400, 401, 403, 406, 409):
        raise Refused(text + _advice(answer.status, text), answer.status, text)
    raise Refused(
        f"Unexpected Response\nResponse code: {answer.status}\n"
        f"Request ID:    {answer.header('X-Vcap-Request-Id')}\nDescription:   {text}",
        answer.status,
        text,
    )


def _advice(status: int, text: str) -> str:
    match status:
        case 401:
            return "\nTIP: the token is not valid, or has expired: log in again (`cf login`), or give another token."
        case 403 if "do not include allowed scopes" in text:
            return "\nTIP: ask an administrator for the scope network.write or network.admin."
    return ""
