"""Settings of what one policy server does for all: security groups, clean-up. Keys of the original's are named so."""

from dataclasses import dataclass
from pathlib import Path

from bus.decode import Malformed
from bus.settings import setting
from services.policy.authority import AuthoritySettings, usable


@dataclass(frozen=True, slots=True, kw_only=True)
class UpkeepSettings(AuthoritySettings):
    """How the Cloud Controller's security groups are followed, and policies of deleted apps removed. Needs cc_url."""

    asg_poll_interval_seconds: int = setting("seconds between looks at the security groups; 0 for none", 10)
    cc_internal_url: str = setting("the Cloud Controller's internal API, which tells when they were changed", "")
    cc_internal_ca_cert: Path | None = setting("certificates of the authority of cc_internal_url, as uaa_ca", None)
    cc_internal_client_cert: Path | None = setting("this server's certificate for cc_internal_url", None)
    cc_internal_client_key: Path | None = setting("private key of cc_internal_client_cert", None)
    cleanup_interval: int = setting("seconds between clean-ups of the policies of deleted apps; 0 for none", 3600)
    cleanup_max_percent: int = setting("clean-ups of more of all policies than this are refused, unless forced", 25)

    def __post_init__(self) -> None:
        AuthoritySettings.__post_init__(self)
        for name in ("asg_poll_interval_seconds", "cleanup_interval"):
            if getattr(self, name) < 0:
                raise Malformed(f"{name}: must not be negative, as {getattr(self, name)} is")
        if not 0 <= self.cleanup_max_percent <= 100:
            raise Malformed(f"cleanup_max_percent: must be in 0..100, not {self.cleanup_max_percent}")
        if self.cc_internal_url and not self.cc_url:
            raise Malformed("cc_internal_url: needs cc_url, where the security groups are")
        if self.cc_internal_url and not usable(self.cc_internal_url):
            raise Malformed(
                f"cc_internal_url: {self.cc_internal_url!r} is not an address such as https://api.service.cf.internal:9023"
            )
        if (self.cc_internal_client_cert is None) != (self.cc_internal_client_key is None):
            raise Malformed("cc_internal_client_cert, cc_internal_client_key: set both or none")
