"""The login of the cf CLI that runs us, asked of cf itself. See `cli.configuration.CloudFoundry`."""

from collections.abc import Iterator
from contextlib import contextmanager

from cli.errors import Failed
from cli.plugin.rpc import Cf


class PluginLogin:
    """Raises Failed, in the words of the plugin of 2017 (contract/policy.md 6.1)."""

    def __init__(self, cf: Cf) -> None:
        self._cf = cf
        with _said("getting api endpoint"):
            self.api = cf.text("ApiEndpoint").rstrip("/")
        # Where the policy server is, cf does not tell its plugins: the root's links do.
        self.policy_api = ""
        with _said("checking if ssl disabled"):
            self.skip_ssl_validation = bool(cf.call("IsSSLDisabled"))
        if not self.api:
            raise Failed("No API endpoint set. Use `cf login` or `cf api` to target an endpoint.")
        if not cf.call("IsLoggedIn"):
            raise Failed("Not logged in. Use `cf login` to log in.")
        self._token = ""

    def targeted(self, kind: str) -> tuple[str, str] | None:
        value = self._cf.call({"Organization": "GetCurrentOrg", "Space": "GetCurrentSpace"}[kind])
        fields = value.get(f"{kind}Fields", {}) if isinstance(value, dict) else {}
        guid, name = fields.get("Guid", ""), fields.get("Name", "")
        return (guid, name) if guid and name else None

    def token(self) -> str:
        if not self._token:
            with _said("getting access token"):
                # cf renews its token before it tells it.
                self._token = self._cf.text("AccessToken")
        return self._token

    def renew(self) -> bool:
        before, self._token = self._token, ""
        return self.token() != before

    def user(self) -> str | None:
        return self._cf.text("Username") or None


@contextmanager
def _said(doing: str) -> Iterator[None]:
    try:
        yield
    except Failed as error:
        raise Failed(f"{doing}: {error}") from None
