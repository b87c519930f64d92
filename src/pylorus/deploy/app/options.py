"""Choices of `pylorus serve`, checked: who can reach the page, and how much may be sent to it."""

import ipaddress
import math
import socket
from dataclasses import dataclass
from pathlib import Path

from pylorus.errors import PylorusError

SHORTEST, LONGEST = 12, 1024
"""Characters of a password. The shortest can't be guessed through a network within years."""
MEGABYTE = 1_000_000
LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Choices of a server.

    Attributes:
        host: Name or address that it listens on.
        port: TCP port; 0: any free one.
        password_file: Holds the password on one line; None: there is none.
        without_password: Whether others may reach the page without one.
        allowed_hosts: Further names by which browsers may call it, such as that of a proxy in front.
        max_mb: Largest file, in MB of 1,000,000 bytes.
        max_images: Most files of one request.
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
        """Of one file."""
        return int(self.max_mb * MEGABYTE)

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def hosts(self) -> frozenset[str]:
        """Names that a browser may call it by; another one is a stranger's name that leads here (DNS rebinding)."""
        own = (self.host.lower(),) if self.loopback else (self.host.lower(), socket.gethostname().lower())
        return frozenset((*LOCAL, *own, *(name.lower() for name in self.allowed_hosts)))

    def check(self) -> None:
        """Refuses what can't be, and a page that anyone in the network could use unasked.

        Raises:
            PylorusError: Names the option, what was found and how to mend it.
        """
        if not 0 <= self.port <= 65535:
            raise PylorusError(f"--port: found {self.port}, expected 0 to 65535.")
        if not (math.isfinite(self.max_mb) and 0 < self.max_mb <= 500):
            raise PylorusError(f"--max-mb: found {self.max_mb:g}, expected more than 0 and 500 at most.")
        if not 1 <= self.max_images <= 1000:
            raise PylorusError(f"--max-images: found {self.max_images}, expected 1 to 1000.")
        if not self.loopback and self.password_file is None and not self.without_password:
            raise PylorusError(
                f"--host {self.host}: others in the network could use the page. Give --password-file FILE, or "
                "--without-password if all of them may."
            )
        if self.password_file is not None and self.without_password:
            raise PylorusError("--password-file and --without-password exclude each other.")

    def password(self) -> str | None:
        """The first line of the password file; None without one.

        Raises:
            PylorusError: If there is no such file, or its password is too short.
        """
        path = self.password_file
        if path is None:
            return None
        try:
            with path.open(encoding="utf-8") as file:
                found = file.read(LONGEST + 1).strip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise PylorusError(f"--password-file: {path}: {getattr(error, 'strerror', None) or 'no UTF-8'}.") from error
        if not SHORTEST <= len(found) <= LONGEST or not found.isprintable():
            raise PylorusError(
                f"--password-file: {path}: found {len(found)} characters, expected one line of at least {SHORTEST}. "
                f"To make one: openssl rand -base64 18 > {path}"
            )
        return found


def is_address(name: str) -> bool:
    """Whether a host's name is an address: no foreign name server can make one lead here."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
