"""Takes secrets out of texts that leave the house.

Known ones, such as the token in use, go wherever they are, however they are escaped in JSON or a URL. What looks like
one goes, too: bearer tokens, JSON web tokens, private keys, the user's part of URLs, and the values of keys with names
that mean a secret. Rather too much than too little.
"""

import json
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

REMOVED = "[removed]"
SHORTEST = 4
"""A known secret shorter than this would be found in every text; it is none that protects anything."""

_NAME = (
    r"(?:(?<![\w.-])[\w.-]{0,200}?(?:token|passw(?:or)?d|passphrase|secret|credential|authorization|cookie"
    r"|(?:private|api|access|client|encryption)[_-]?key)s?[\w.-]{0,200})"
)
_PATTERNS = [
    # A block that is cut off at the end of a log goes to the end.
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), REMOVED),
    (re.compile(r"\beyJ[\w-]{5,}\.[\w-]+(?:\.[\w-]*)*"), REMOVED),
    (re.compile(r"(?i)\b(bearer|basic|digest|token)(\s+|%20|\+)[^\s\"',;]{6,}"), rf"\1\2{REMOVED}"),
    (re.compile(r"((?<![\w+.-])[a-zA-Z][\w+.-]{0,30}://)[^/\s@\"'<>]+@"), rf"\1{REMOVED}@"),
    # NATS's own: seeds of NKeys, and what stands in a credentials file.
    (re.compile(r"\bS[UANCOX][A-Z2-7]{40,}\b"), REMOVED),
    (
        re.compile(rf"(?i)(\\?[\"']?{_NAME}\\?[\"']?\s*[:=]\s*)(\\?\"(?:[^\"\\]|\\.)*\"|'[^']*'|[^\s,;&}}\]]+)"),
        rf"\1{REMOVED}",
    ),
]
_SECRET_NAME = re.compile(_NAME, re.IGNORECASE)


class Redactor:
    """Knows some secrets; what it gives back has none of them."""

    def __init__(self, known: Iterable[str] = ()) -> None:
        found = {secret.strip() for secret in known}
        found |= {secret.split(maxsplit=1)[1] for secret in found if secret.lower().startswith("bearer ")}
        spellings = {
            spelling
            for secret in found
            if len(secret) >= SHORTEST
            for spelling in (
                secret,
                json.dumps(secret)[1:-1],
                json.dumps(secret, ensure_ascii=False)[1:-1],
                quote(secret, safe=""),
            )
        }
        # The longest first: one may be part of another.
        self._known = sorted(spellings, key=len, reverse=True)

    def text(self, text: str) -> str:
        """The text without secrets."""
        for secret in self._known:
            text = text.replace(secret, REMOVED)
        for pattern, instead in _PATTERNS:
            text = pattern.sub(instead, text)
        return text

    def value(self, value: Any) -> Any:
        """A JSON value without secrets: the values of keys that mean one go whole, whatever they are."""
        if isinstance(value, dict):
            return {
                self.text(str(key)): REMOVED
                if _SECRET_NAME.fullmatch(str(key)) and item is not None
                else self.value(item)
                for key, item in value.items()
            }
        if isinstance(value, list):
            return [self.value(item) for item in value]
        return self.text(value) if isinstance(value, str) else value

    def leaks(self, text: str) -> bool:
        """Whether a known secret is in the text."""
        return any(secret in text for secret in self._known)
