"""A small certificate authority: keys and certificates for NATS, made by the `openssl` program.

What exists is kept: a key is made once, and a certificate again only when it is about to run out, or its names or
its authority changed. Private keys are files of mode 0600. Elliptic curve P-256, which everything understands.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

AUTHORITY_DAYS = 3650
DAYS = 1095
RENEW_DAYS = 60
"""A certificate that runs out within as many days is made anew."""
TIMEOUT = 60


class CertificateError(Exception):
    """A certificate could not be made. The text says which, and what openssl said."""


@dataclass(frozen=True, slots=True)
class Authority:
    """A key and certificate that sign others: `FOLDER/NAME.key`, which never leaves it, and `FOLDER/NAME.crt`."""

    folder: Path
    name: str

    @property
    def key(self) -> Path:
        return self.folder / f"{self.name}.key"

    @property
    def certificate(self) -> Path:
        return self.folder / f"{self.name}.crt"

    def ensure(self) -> None:
        """Make it if it is not there. An authority is never replaced: everything it signed would be worth nothing."""
        _key(self.key)
        if self.certificate.exists():
            return
        extensions = ["basicConstraints = critical, CA:TRUE, pathlen:0", "keyUsage = critical, keyCertSign, cRLSign"]
        _sign(
            self.certificate,
            f"silkbus {self.name}",
            extensions,
            AUTHORITY_DAYS,
            ["-key", str(self.key)],
        )

    def issue(self, certificate: Path, key: Path, *, names: Sequence[str], usage: str) -> bool:
        """A certificate for `names` (`DNS:…` or `IP:…`) and `usage` (clientAuth, serverAuth); whether it is new.

        Raises CertificateError.
        """
        _key(key)
        wanted = f"subjectAltName = {', '.join(names)}"
        extensions = [
            "basicConstraints = critical, CA:FALSE",
            "keyUsage = critical, digitalSignature",
            f"extendedKeyUsage = {usage}",
            wanted,
        ]
        if self._good(certificate, key, names):
            return False
        signing = ["-key", str(key), "-CA", str(self.certificate), "-CAkey", str(self.key)]
        # The subject is for people; its common name may have 64 characters.
        _sign(certificate, names[0].partition(":")[2][:64], extensions, DAYS, signing)
        return True

    def _good(self, certificate: Path, key: Path, names: Sequence[str]) -> bool:
        if not certificate.exists():
            return False
        # Each run of openssl takes some 15 ms, and there may be a thousand cells: so as few as can be.
        look = ["openssl", "x509", "-in", str(certificate), "-noout", "-ext", "subjectAltName", "-pubkey"]
        looked = _run([*look, "-checkend", str(RENEW_DAYS * 86400)])
        there = {
            name.replace("IP Address:", "IP:") for name in re.findall(r"(?:DNS|IP Address):[^,\s]+", looked.stdout)
        }
        if looked.returncode or there != set(names):
            return False
        own = _run(["openssl", "pkey", "-in", str(key), "-pubout"]).stdout
        signed = _run(["openssl", "verify", "-CAfile", str(self.certificate), str(certificate)])
        return bool(own) and own in looked.stdout and not signed.returncode


def _key(file: Path) -> None:
    if file.exists():
        return
    made = _run(["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"])
    if made.returncode:
        raise CertificateError(f"{file}: openssl makes no key: {made.stderr.strip()}")
    write(file, made.stdout, private=True)


def _sign(file: Path, subject: str, extensions: Sequence[str], days: int, arguments: Sequence[str]) -> None:
    head = ["[req]", "distinguished_name = name", "prompt = no", "x509_extensions = extensions"]
    section = "\n".join([*head, "[name]", f"CN = {subject}", "[extensions]", *extensions, ""])
    with tempfile.NamedTemporaryFile("w", suffix=".cnf") as config:
        config.write(section)
        config.flush()
        command = ["openssl", "req", "-new", "-x509", "-sha256", "-days", str(days), "-config", config.name, *arguments]
        made = _run(command)
    if made.returncode:
        raise CertificateError(f"{file}: openssl makes no certificate: {made.stderr.strip()}")
    write(file, made.stdout)


def write(file: Path, text: str, *, private: bool = False) -> bool:
    """Replace a file as a whole, never readable by others for a moment when private; whether it changed."""
    mode = 0o600 if private else 0o644
    if file.exists() and file.read_text() == text:
        return False
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f".{file.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(file)
    return True


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)  # noqa: S603
    except FileNotFoundError:
        raise CertificateError("the program openssl is needed: apt-get install openssl") from None
    except subprocess.TimeoutExpired:
        raise CertificateError(f"openssl did not end within {TIMEOUT} s: {' '.join(command)}") from None
