"""What every command that speaks to the API needs, made from its command line and the configuration."""

import argparse
import logging
from functools import cached_property

from cli import configuration
from cli.apps import App, Apps
from cli.client import PATH, Client
from cli.cloud_controller import CloudController
from cli.directory import Directory, NoNames
from cli.errors import Failed
from cli.web import Server


class Session:
    """`org` and `space` are the names of those targeted, if any; `user` is who asks, if the token tells."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        logging.basicConfig(format="%(message)s")
        flags = {key: getattr(arguments, key) for key in ("api", "token_file", "directory", "skip_ssl_validation")}
        self.configuration = configuration.load(flags)
        self.org, self.space = self.configuration.org, self.configuration.space
        self._directory = Directory(self.configuration.directory)
        self._server = Server(
            self.configuration.api,
            self.configuration.login,
            skip_ssl_validation=self.configuration.skip_ssl_validation,
        )

    @property
    def user(self) -> str | None:
        return self.configuration.login.user()

    @cached_property
    def client(self) -> Client:
        """The policy server: where cf found it, or the root's links say, or else below the API."""
        cf = self.configuration.cf
        found = (cf and cf.policy_api) or self._links.get("network_policy_v1")
        return Client(self._server.at(found or self.configuration.api + PATH))

    @cached_property
    def apps(self) -> Apps:
        """Names and GUIDs: of the directory, if one is given, else of the Cloud Controller, if there is one."""
        if self._directory.path is not None:
            return self._directory
        cf = self.configuration.cf
        if cf is not None or "cloud_controller_v3" in self._links:
            controller = CloudController(self._server)
            if cf is not None:
                controller.remember(cf.targeted("Organization"), cf.targeted("Space"))
            return controller
        return self._directory

    def source(self, name: str) -> App:
        return self.apps.find(name, self.org, self.space)

    def destination(self, name: str, org: str | None, space: str | None, source: App) -> App:
        """The app of this space, of this org or else the source's; by default of the space that is targeted."""
        if space is None:
            return self.apps.find(name, self.org, self.space)
        if self.apps is self._directory and self._directory.path is None:
            raise NoNames
        return self.apps.find(name, org or source.org, space)

    @cached_property
    def _links(self) -> dict[str, str]:
        """The Cloud Controller's links, by name; none if the API is the policy server itself, whose root is text."""
        if self.configuration.directory is not None:
            return {}
        answer = Server(self._server.url, skip_ssl_validation=self._server.skip_ssl_validation).send("GET", "/")
        value = answer.json()
        links = value.get("links") if answer.status == 200 and isinstance(value, dict) else None
        if links is None:
            return {}
        try:
            found = {name: link["href"] for name, link in links.items() if link is not None}
        except (AttributeError, KeyError, TypeError):
            raise Failed(f"{self._server.url} answered a root whose links cannot be understood") from None
        if "network_policy_v1" not in found and "cloud_controller_v3" in found:
            raise Failed(
                f"This command requires Network Policy API V1. {self._server.url} does not expose it: "
                "its root has no link network_policy_v1."
            )
        return found
