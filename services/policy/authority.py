"""Settings of authentication and authorisation, and the parts that they choose.

Keys that the original's configuration has, too, are named as there (contract/policy.md 1.13).
"""

import dataclasses
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from bus.decode import Malformed
from bus.settings import CentralSettings, setting
from services.policy.access import Access, Spaces
from services.policy.cloud_controller import CloudController
from services.policy.directory import Directory
from services.policy.identity import Authenticator
from services.policy.remote import Remote, trust
from services.policy.token_keys import REFRESH_SECONDS, TokenKeys
from services.policy.tokens import TokenFile
from services.policy.uaa import CheckToken, OwnToken

WAYS = ("tokens", "uaa-check", "uaa-keys")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AuthoritySettings(CentralSettings):
    """Who may call, and who may do what."""

    auth: str = setting(
        "how tokens are checked: tokens (those of a file), uaa-check (UAA is asked) or uaa-keys (by UAA's keys)",
        "tokens",
    )
    tokens: Path | None = setting("file of the tokens that may call the API; for auth tokens", None)
    uaa_url: str = setting("UAA's address, with or without port", "")
    uaa_port: int | None = setting("UAA's port, if it is not in uaa_url", None)
    uaa_client: str = setting("our client at UAA; for auth uaa-check and for the Cloud Controller", "")
    uaa_client_secret: str = setting("its secret", "")
    uaa_ca: Path | None = setting("certificates of the authority of UAA, if it is not one that the system trusts", None)
    uaa_audiences: tuple[str, ...] = setting(
        "tokens must be for one of these; for auth uaa-keys", ("network", "cloud_controller")
    )
    uaa_issuer: str = setting("tokens must be from this issuer; for auth uaa-keys; empty for any", "")
    uaa_keys_refresh: float = setting("seconds after which UAA's keys are fetched again", REFRESH_SECONDS)
    token_cache: float = setting("seconds for which a token is valid that UAA said is valid; 0 to ask each time", 5.0)
    cc_url: str = setting("the Cloud Controller's address; without it and a directory only admins have access", "")
    cc_ca_cert: Path | None = setting("certificates of the authority of the Cloud Controller, as uaa_ca", None)
    cc_cache: float = setting("seconds for which the Cloud Controller's answers are used again", 5.0)
    skip_ssl_validation: bool = setting("do not check the certificates of UAA and the Cloud Controller", False)
    directory: Path | None = setting("file of apps, spaces and developers, where there is no Cloud Controller", None)
    enable_space_developer_self_service: bool = setting("space developers need no scope network.write", False)
    max_policies: int = setting("policies that developers may make for one source app", 150)

    def __post_init__(self) -> None:
        CentralSettings.__post_init__(self)
        if self.auth not in WAYS:
            raise Malformed(f"auth: {self.auth!r} is not one of {', '.join(WAYS)}")
        if self.auth == "tokens" and self.tokens is None:
            raise Malformed("tokens: required for auth tokens: the file of the tokens that may call the API")
        if self.cc_url and self.directory is not None:
            raise Malformed("cc_url, directory: set one of them; both say where apps lie")
        if (self.auth != "tokens" or self.cc_url) and not self.uaa_url:
            raise Malformed(f"uaa_url: required for {'cc_url' if self.cc_url else f'auth {self.auth}'}")
        if (self.auth == "uaa-check" or self.cc_url) and not (self.uaa_client and self.uaa_client_secret):
            raise Malformed("uaa_client, uaa_client_secret: required for auth uaa-check and for cc_url")
        if self.auth == "uaa-keys" and not self.uaa_audiences:
            raise Malformed("uaa_audiences: must not be empty, or tokens meant for others would do")
        for name, url in (("uaa_url", self.uaa_address), ("cc_url", self.cc_url)):
            if url and not usable(url):
                raise Malformed(f"{name}: {url!r} is not an address such as https://uaa.service.cf.internal:8443")
        for name in ("token_cache", "cc_cache"):
            if not 0 <= getattr(self, name) <= 60:
                raise Malformed(f"{name}: must be in 0..60 seconds, not {getattr(self, name):g}")
        if self.uaa_keys_refresh < 1:
            raise Malformed(f"uaa_keys_refresh: must be at least 1 second, not {self.uaa_keys_refresh:g}")
        if self.max_policies < 1:
            raise Malformed(f"max_policies: must be at least 1, not {self.max_policies}")

    @property
    def uaa_address(self) -> str:
        if not self.uaa_url or self.uaa_port is None:
            return self.uaa_url
        return f"{self.uaa_url.rstrip('/')}:{self.uaa_port}"

    @property
    def uaa_login(self) -> tuple[str, str]:
        return self.uaa_client, self.uaa_client_secret

    @property
    def authorities(self) -> list[Path]:
        """The files of the authorities that UAA and the Cloud Controller are trusted by."""
        return [file for file in (self.uaa_ca, self.cc_ca_cert) if file is not None]


@dataclasses.dataclass(frozen=True, slots=True)
class Authority:
    """What the settings choose. `run`, if there is one, must run all the while, in a task."""

    authenticator: Authenticator
    access: Access
    run: Callable[[], Coroutine[Any, Any, None]] | None = None


@asynccontextmanager
async def open_authority(settings: AuthoritySettings) -> AsyncIterator[Authority]:
    """Who checks tokens and access while inside. Raises Malformed for files that cannot be used."""
    async with AsyncExitStack() as stack:
        trusted = trust(settings.authorities, skip_validation=settings.skip_ssl_validation)

        def remote(name: str, url: str) -> Remote:
            made = Remote(name, url, trusted)
            stack.push_async_callback(made.close)
            return made

        login = settings.uaa_login
        uaa = remote("UAA", settings.uaa_address)
        spaces: Spaces | None = None
        if settings.cc_url:
            controller = remote("the Cloud Controller", settings.cc_url)
            spaces = CloudController(controller, OwnToken(uaa, login), remember=settings.cc_cache)
        elif settings.directory is not None:
            spaces = Directory(settings.directory)
        access = Access(spaces, self_service=settings.enable_space_developer_self_service)
        if settings.auth == "uaa-keys":
            keys = TokenKeys(
                uaa,
                audiences=settings.uaa_audiences,
                issuer=settings.uaa_issuer,
                refresh=settings.uaa_keys_refresh,
            )
            yield Authority(keys, access, keys.run)
        elif settings.auth == "uaa-check":
            yield Authority(CheckToken(uaa, login, remember=settings.token_cache), access)
        elif settings.tokens is not None:
            yield Authority(TokenFile(settings.tokens), access)
        else:
            raise AssertionError("AuthoritySettings sees to it that there is a token file")


def usable(address: str) -> bool:
    """Whether it can be asked by HTTP."""
    try:
        url = httpx.URL(address)
    except httpx.InvalidURL:
        return False
    plain = not (url.userinfo or url.query or url.fragment)
    return url.scheme in ("http", "https") and bool(url.host) and plain
