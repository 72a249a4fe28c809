"""The cf CLI's login, from its own file: $CF_HOME/.cf/config.json, or ~/.cf/config.json (contract/policy.md 6.2).

An expired token is renewed at the UAA as cf does it, and written back, so that cf, too, has the new one: the UAA may
take back a refresh token once it was used. The file is replaced as a whole, as cf does; what we do not know stays.
"""

import base64
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from cli.errors import Failed
from cli.login import expired, owner
from cli.web import Server

log = logging.getLogger(__name__)


class CfLogin:
    """A login made with `cf login`. See `cli.login.Login`."""

    def __init__(self, file: Path, content: dict[str, Any]) -> None:
        self.file = file
        self._content = content

    @property
    def api(self) -> str:
        return _text(self._content, "Target").rstrip("/")

    @property
    def policy_api(self) -> str:
        """Where `cf api` found the policy server; empty if an older cf did not look."""
        return _text(self._content, "NetworkPolicyV1Endpoint").rstrip("/")

    @property
    def skip_ssl_validation(self) -> bool:
        return self._content.get("SSLDisabled") is True

    def targeted(self, kind: str) -> tuple[str, str] | None:
        """GUID and name of the targeted Organization or Space."""
        fields = self._content.get(f"{kind}Fields")
        if not isinstance(fields, dict):
            return None
        guid, name = _text(fields, "GUID"), _text(fields, "Name")
        return (guid, name) if guid and name else None

    def token(self) -> str:
        if expired(_text(self._content, "AccessToken")):
            self.renew()
        return _text(self._content, "AccessToken")

    def renew(self) -> bool:
        before = _text(self._content, "AccessToken")
        if not self._renewed_by_another(before):
            uaa = Server(self._uaa(), skip_ssl_validation=self.skip_ssl_validation)
            client = f"{quote(_text(self._content, 'UAAOAuthClient') or 'cf', safe='')}:" + quote(
                _text(self._content, "UAAOAuthClientSecret"), safe=""
            )
            headers = {"Authorization": "Basic " + base64.b64encode(client.encode()).decode()}
            answer = uaa.send("POST", "/oauth/token", form=urlencode(self._grant()), headers=headers)
            value = answer.json()
            if answer.status != 200 or not isinstance(value, dict) or not _text(value, "access_token"):
                # Another command may have been quicker with the same refresh token.
                if self._renewed_by_another(before):
                    return True
                raise Failed(
                    f"The login of cf has expired, and the UAA at {uaa.url} gives no new token "
                    f"({answer.status} {_reason(value)}). Log in again: `cf login`."
                )
            self._write(
                {
                    "AccessToken": f"{_text(value, 'token_type') or 'bearer'} {_text(value, 'access_token')}",
                    **({"RefreshToken": token} if (token := _text(value, "refresh_token")) else {}),
                }
            )
        return _text(self._content, "AccessToken") != before

    def user(self) -> str | None:
        return owner(self.token())

    def _grant(self) -> dict[str, str]:
        if _text(self._content, "UAAGrantType") == "client_credentials":
            return {"grant_type": "client_credentials"}
        if not (token := _text(self._content, "RefreshToken")):
            raise Failed("The login of cf has expired and cannot be renewed. Log in again: `cf login`.")
        return {"grant_type": "refresh_token", "refresh_token": token}

    def _uaa(self) -> str:
        url = _text(self._content, "UaaEndpoint") or _text(self._content, "AuthorizationEndpoint")
        if not url:
            raise Failed(f"{self.file} does not say where the UAA is (UaaEndpoint). Log in again: `cf login`.")
        return url

    def _renewed_by_another(self, before: str) -> bool:
        """Whether the file has another token of the same target by now, which is then ours."""
        content = _read(self.file) or {}
        token = _text(content, "AccessToken")
        if token in ("", before) or expired(token) or content.get("Target") != self._content.get("Target"):
            return False
        self._content = content
        return True

    def _write(self, tokens: dict[str, str]) -> None:
        used = self._content
        self._content = {**used, **tokens}
        current = _read(self.file) or {}
        if any(current.get(key) != used.get(key) for key in ("Target", "AccessToken", "RefreshToken")):
            return  # logged in anew, or out, meanwhile
        file = self.file.resolve()
        try:
            with tempfile.NamedTemporaryFile(
                "w", encoding="utf-8", dir=file.parent, prefix="temp-config", delete=False
            ) as temporary:
                try:
                    # Made readable for its owner only; cf's indentation.
                    temporary.write(json.dumps({**current, **tokens}, indent=2, ensure_ascii=False))
                    temporary.flush()
                    os.fsync(temporary.fileno())
                    Path(temporary.name).replace(file)
                except BaseException:
                    Path(temporary.name).unlink(missing_ok=True)
                    raise
        except OSError as error:
            log.warning("%s: the new token could not be written: %s; cf may have to log in again", file, error)


def read() -> CfLogin | None:
    """The login of cf, None if there is none. Raises Failed."""
    file = Path(os.environ.get("CF_HOME") or "~").expanduser() / ".cf" / "config.json"
    content = _read(file)
    if content is None or not _text(content, "Target") or not _text(content, "AccessToken"):
        return None
    return CfLogin(file, content)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise Failed(f"The configuration of cf, {file}, cannot be read: {error}. Log in again: `cf login`.") from None
    return content if isinstance(content, dict) else None


def _text(fields: dict[str, Any], key: str) -> str:
    value = fields.get(key)
    return value if isinstance(value, str) else ""


def _reason(value: Any) -> str:
    return str(value.get("error_description") or value.get("error") or "") if isinstance(value, dict) else ""
