"""Which pages of other origins may read the API's answers: CORS as the contract has it (contract/policy.md 1.2).

The answer names the matching entry of the list, so `*` is given back literally; the API takes no cookies, so that is
safe. There is no `Vary`, as the original sends none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Origins:
    """The origins that are let in, in order; `*` is every one."""

    allowed: Sequence[str] = ()

    def headers(self, origin: str | None) -> dict[str, str]:
        """What to add to the answer to a request from `origin`."""
        if origin is None:
            return {}
        return next(({"Access-Control-Allow-Origin": entry} for entry in self.allowed if entry in (origin, "*")), {})


def preflight(methods: Sequence[str]) -> Mapping[str, str]:
    """The headers of the answer to OPTIONS on a path that has these methods."""
    return {
        "Access-Control-Allow-Methods": ",".join([*methods, "OPTIONS"]),
        "Access-Control-Allow-Headers": "authorization",
    }
