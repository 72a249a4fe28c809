"""The certificate with which a service shows NATS who it is, and the authority by which it knows NATS.

Mutual TLS rather than NKeys: it also keeps others from reading and changing what is said, it proves the server to us as
well as us to the server, and BOSH and CredHub already make, keep and renew such certificates. The files are read anew
for each connection: a renewed certificate is taken up without a restart, one that is not there yet is waited for.
"""

import ssl
from dataclasses import dataclass
from pathlib import Path


class CredentialsError(Exception):
    """A certificate or key cannot be used. The text names the file and says what to do."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """PEM files: the certificates of the authority, our certificate, and its private key."""

    ca: Path
    cert: Path
    key: Path

    def context(self) -> ssl.SSLContext:
        """TLS that trusts this authority alone and checks the server's name. Reads disk; raises CredentialsError."""
        for file in (self.ca, self.cert, self.key):
            try:
                file.read_bytes()
            except OSError as error:
                raise CredentialsError(
                    f"{file}: cannot be read: {error.strerror}; `silkbus nats-config` writes it for each client"
                ) from None
        try:
            context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=str(self.ca))
        except ssl.SSLError as error:
            raise CredentialsError(f"{self.ca}: holds no certificate in PEM form: {error}") from None
        try:
            # A key that is protected by a password would make OpenSSL ask the terminal, and wait.
            context.load_cert_chain(self.cert, self.key, password=lambda: "")
        except ssl.SSLError as error:
            raise CredentialsError(f"{self.cert} and {self.key}: not a certificate and its own key: {error}") from None
        return context
