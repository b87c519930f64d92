"""Options of `pylorus serve` and their checks: who can reach the page, and how much may be uploaded."""

import ipaddress
import math
import socket
from dataclasses import dataclass
from pathlib import Path

from pylorus.errors import PylorusError

SHORTEST, LONGEST = 12, 1024
"""Minimum and maximum length of a password. One of minimum length can't be guessed through a network within years."""
MEGABYTE = 1_000_000
LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Options of the server.

    Attributes:
        host: Name or address to listen on.
        port: TCP port; 0 for any free one.
        password_file: File with the password on one line; None for no password.
        without_password: Whether others in the network may use the page without a password.
        allowed_hosts: Further host names under which browsers may call the server, such as a proxy's.
        max_mb: Maximum size of a file, in MB of 1,000,000 bytes.
        max_images: Maximum number of files per request.
        device: auto, cpu, cuda or mps.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    password_file: Path | None = None
    without_password: bool = False
    allowed_hosts: tuple[str, ...] = ()
    max_mb: float = 20.0
    max_images: int = 32
    device: str = "auto"

    @property
    def most_bytes(self) -> int:
        """Maximum size of a file, in bytes."""
        return int(self.max_mb * MEGABYTE)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def hosts(self) -> frozenset[str]:
        """Host names under which a browser may call the server; any other may point here by DNS rebinding."""
        own = (self.host.lower(),) if self.is_loopback else (self.host.lower(), socket.gethostname().lower())
        return frozenset((*LOCAL, *own, *(name.lower() for name in self.allowed_hosts)))

    def check(self) -> None:
        """Check the options; refuse a page that everybody in the network could use by accident.

        Raises:
            PylorusError: Names the option, the value found and how to fix it.
        """
        if not 0 <= self.port <= 65535:
            raise PylorusError(f"--port: found {self.port}, expected 0 to 65535.")
        if not (math.isfinite(self.max_mb) and 0 < self.max_mb <= 500):
            raise PylorusError(f"--max-mb: found {self.max_mb:g}, expected more than 0 and at most 500.")
        if not 1 <= self.max_images <= 1000:
            raise PylorusError(f"--max-images: found {self.max_images}, expected 1 to 1000.")
        if not self.is_loopback and self.password_file is None and not self.without_password:
            raise PylorusError(
                f"--host {self.host}: others in the network could use the page. Add --password-file FILE, or "
                "--without-password if everybody may use it."
            )
        if self.password_file is not None and self.without_password:
            raise PylorusError("--password-file and --without-password can't be combined; remove one of them.")

    def read_password(self) -> str | None:
        """Return the password in the password file; None if there is no file.

        Raises:
            PylorusError: If the file can't be read, or its password is too short, too long or not one printable line.
        """
        path = self.password_file
        if path is None:
            return None
        try:
            with path.open(encoding="utf-8") as file:
                password = file.read(LONGEST + 1).strip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise PylorusError(
                f"--password-file: {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}."
            ) from error
        if not SHORTEST <= len(password) <= LONGEST or not password.isprintable():
            raise PylorusError(
                f"--password-file: {path}: found {len(password)} characters, expected one line of at least {SHORTEST}. "
                f"To create one: openssl rand -base64 18 > {path}"
            )
        return password


def is_address(name: str) -> bool:
    """Return whether a host name is an IP address, which DNS rebinding can't abuse."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
