"""What the server accepts: options, connections that are not too slow, hosts, origins and passwords."""

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
import json
import math
import socket
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import h11
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from pylorus.core.errors import PylorusError

MIN_PASSWORD_LENGTH, MAX_PASSWORD_LENGTH = 12, 1024
"""Minimum and maximum length of a password. One of minimum length can't be guessed through a network within years."""
MEGABYTE = 1_000_000
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Options of the server.

    Attributes:
        host: Name or address to listen on.
        port: TCP port; 0 for any free one.
        password_file: File with the password on one line; None for no password.
        without_password: Whether others in the network may use the page without a password.
        allowed_hosts: Further host names under which browsers may call the server, such as a proxy's.
        trusted_proxies: Addresses of reverse proxies whose X-Forwarded-For is believed; nobody else's is.
        max_mb: Maximum size of a file, in MB of 1,000,000 bytes.
        max_images: Maximum number of files per request.
        device: auto, cpu, cuda or mps.
        network: Class or function that builds a network of the user's own; None for a model of timm.
        trust: Files with public keys of which one must have signed the bundle; empty to accept any.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    password_file: Path | None = None
    without_password: bool = False
    allowed_hosts: tuple[str, ...] = ()
    trusted_proxies: tuple[str, ...] = ()
    max_mb: float = 20.0
    max_images: int = 32
    device: str = "auto"
    network: Callable[..., Any] | None = None
    trust: tuple[Path, ...] = ()

    @property
    def max_bytes(self) -> int:
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
        return frozenset((*LOCAL_HOSTS, *own, *(name.lower() for name in self.allowed_hosts)))

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
        for address in self.trusted_proxies:
            if not is_address(address):
                raise PylorusError(
                    f"--trust-proxy: found {address}, expected the IP address of the proxy, such as 127.0.0.1."
                )

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
                password = file.read(MAX_PASSWORD_LENGTH + 1).strip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise PylorusError(
                f"--password-file: {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}."
            ) from error
        if not MIN_PASSWORD_LENGTH <= len(password) <= MAX_PASSWORD_LENGTH or not password.isprintable():
            raise PylorusError(
                f"--password-file: {path}: found {len(password)} characters, expected one line of at least "
                f"{MIN_PASSWORD_LENGTH}. To create one: openssl rand -base64 18 > {path}"
            )
        return password


def is_address(name: str) -> bool:
    """Return whether a host name is an IP address, which DNS rebinding can't abuse."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


REQUEST_SECONDS = 10.0
"""Seconds within which the headers of a request must arrive, and in which its body may be slow."""
MIN_BODY_RATE = 32_000
"""Least rate of a body after that, in bytes per second; 20 MB then take the 300 seconds that an upload may take."""
ANSWER_SECONDS = 60.0
"""Seconds for which a client may leave an answer unread."""
MIN_ANSWER_RATE = 4_000
"""Least rate at which a client reads an answer after that, in bytes per second."""
MAX_CONNECTIONS, MAX_CONNECTIONS_PER_ADDRESS = 200, 32
"""Open connections; beyond that, the one that has waited longest for its client is closed for a new one."""
CLIENT_GONE = "client_gone"
"""Name in a request's state of the event that its client has closed the connection."""


class GuardedProtocol(H11Protocol):
    """A connection of uvicorn that is closed if its client is slow or holds too many of them.

    uvicorn itself waits without limit for the headers and the body of a request, and for a client that reads.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection; if there are too many, close another one, or this one if all others are at work."""
        super().connection_made(transport)
        self._gone = asyncio.Event()
        self.app_state = {**self.app_state, CLIENT_GONE: self._gone}
        self._waits_since = self.loop.time()
        self._watched: object = None
        self._received, self._slow_seconds, self._unread_seconds, self._unread = 0, 0.0, 0.0, 0
        self._timer = self.loop.call_later(1.0, self._check_speed)
        others = [each for each in self.connections if isinstance(each, GuardedProtocol)]
        self._address = get_client_network(self.client)
        if self.client is not None and self.client[0] in self.config.forwarded_allow_ips:
            self._address = ""
        own = [each for each in others if each._address == self._address]
        if self._address and len(own) > MAX_CONNECTIONS_PER_ADDRESS:
            self._close_longest_waiting(own)
        elif len(others) > MAX_CONNECTIONS:
            self._close_longest_waiting(others)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop watching the client."""
        self._timer.cancel()
        self._gone.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what arrives; a client that sends a body fast enough is not waited for."""
        self._received += len(data)
        if self._is_sending_body:
            self._waits_since = min(self.loop.time(), self._waits_since + len(data) / MIN_BODY_RATE)
        super().data_received(data)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._waits_since = self.loop.time()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP as other requests are refused; if an answer has begun, close the connection."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE) or self._is_at_work:
            self.transport.abort()
            return
        content = json.dumps({"error": "the request is not valid HTTP"}).encode()
        fields = {
            **HEADERS,
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            "Connection": "close",
        }
        headers = [(name.lower().encode(), value.encode()) for name, value in fields.items()]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=content), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    @property
    def _is_at_work(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body

    @property
    def _is_sending_body(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete and self.cycle.more_body

    def _close_longest_waiting(self, connections: "list[GuardedProtocol]") -> None:
        waiting = [each for each in connections if not each._is_at_work and each is not self]
        min(waiting, key=lambda each: each._waits_since, default=self).transport.abort()

    def _check_speed(self) -> None:
        """Close the connection if its client is too slow; this runs once a second."""
        self._timer = self.loop.call_later(1.0, self._check_speed)
        cycle = self.cycle
        if cycle is not self._watched:
            self._watched, self._received, self._slow_seconds = cycle, 0, 0.0
        unread = self.transport.get_write_buffer_size()
        if unread:  # also after the application has finished: the rest of its answer waits here
            self._waits_since = self.loop.time()
            has_read = self._unread - unread >= MIN_ANSWER_RATE or unread > self._unread
            self._unread_seconds = 0.0 if has_read else self._unread_seconds + 1.0
            is_slow = self._unread_seconds > ANSWER_SECONDS
        elif cycle is None or cycle.response_complete:
            is_slow = self.loop.time() - self._waits_since > REQUEST_SECONDS
        elif cycle.more_body:
            if self.flow.read_paused:  # the client waits for this server
                self._waits_since = self.loop.time()
            else:
                self._slow_seconds += 1.0
            is_slow = self._received < MIN_BODY_RATE * (self._slow_seconds - REQUEST_SECONDS)
        else:
            is_slow = False
        if not unread:
            self._unread_seconds = 0.0
        self._unread = unread
        if is_slow:
            self.transport.abort()


def get_client_network(client: tuple[str, int] | None) -> str:
    """Return whom the limits of a client apply to: its IPv4 address, or the /64 network of its IPv6 address.

    It is empty for a client on this machine, which may be a reverse proxy for everybody and has no limits of its own.

    Example:
        >>> get_client_network(("192.0.2.7", 1)), get_client_network(("2001:db8::7", 1)), get_client_network(("::1", 1))
        ('192.0.2.7', '2001:db8::/64', '')
        >>> get_client_network(("::ffff:192.0.2.7", 1))
        '192.0.2.7'
    """
    try:
        address = ipaddress.ip_address("" if client is None else client[0])
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if address.is_loopback:
        return ""
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))


FREE_ATTEMPTS, MAX_DELAY = 5, 300.0
"""Wrong passwords of an address until it has to wait; seconds that it waits at most."""
MAX_ADDRESSES = 10_000


class PasswordAttempts:
    """Slows down the guessing of passwords: after some wrong ones, an address waits twice as long each time."""

    def __init__(self) -> None:
        self._failures: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def get_delay(self, address: str) -> float:
        """Return the seconds until an address may try again."""
        _, allowed_at = self._failures.get(address, (0, 0.0))
        return max(0.0, allowed_at - time.monotonic())

    def record_attempt(self, address: str, *, is_right: bool) -> None:
        """Record whether a password of an address was right."""
        count, _ = self._failures.pop(address, (0, 0.0))
        if is_right:
            return
        delay = min(MAX_DELAY, 2.0 ** (count + 1 - FREE_ATTEMPTS)) if count + 1 >= FREE_ATTEMPTS else 0.0
        self._failures[address] = count + 1, time.monotonic() + delay
        if len(self._failures) > MAX_ADDRESSES:
            self._failures.popitem(last=False)


PUBLIC_PATH = "/health"
"""The only path that needs no password."""
READ_METHODS = ("GET", "HEAD")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content security policy: the browser loads nothing from other hosts; `data:` allows the images in an answer."""
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class RequestGuard:
    """ASGI middleware that passes on permitted requests and refuses all others.

    Args:
        app: The application behind it.
        hosts: Host names under which the server may be called.
        any_address: Whether to accept any IP address as host, for a server that listens on all interfaces.
        password: The password, with any user name; None for no password.
    """

    def __init__(self, app: ASGIApp, *, hosts: frozenset[str], any_address: bool, password: str | None):
        self._app = app
        self._hosts = hosts
        self._any_address = any_address
        self._wanted = None if password is None else _hash_text(password)
        self._attempts = PasswordAttempts()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        if scope["type"] != "http":
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refusal = self._check_request(scope["method"], scope["path"], Headers(scope=scope), scope.get("client"))
        await (refusal or self._app)(scope, receive, send_guarded)

    def _check_request(
        self, method: str, path: str, headers: Headers, client: tuple[str, int] | None
    ) -> JSONResponse | None:
        if "transfer-encoding" in headers and "content-length" in headers:  # a proxy might see another request
            text = "found both Content-Length and Transfer-Encoding, expected one of them"
            return JSONResponse({"error": text}, 400, {"Connection": "close"})
        host_headers = headers.getlist("host")
        if len(host_headers) != 1 or not self._is_own_host(_parse_host_name(host_headers[0])):
            host_name = host_headers[0][:100] if host_headers else '""'
            text = f"this server does not answer to the host name {host_name}; allow it with --allow-host"
            return JSONResponse({"error": text}, 421)
        if self._wanted is not None and path != PUBLIC_PATH:
            refusal = self._check_password(headers.get("authorization"), client)
            if refusal is not None:
                return refusal
        if method not in READ_METHODS and not _is_own_page(headers, host_headers[0]):
            return JSONResponse({"error": "the request came from another site's page"}, 403)
        return None

    def _check_password(self, authorization: str | None, client: tuple[str, int] | None) -> JSONResponse | None:
        """Check the password; an address that sent several wrong ones has to wait, unless it may be a proxy's."""
        address = get_client_network(client)
        delay = self._attempts.get_delay(address) if address else 0.0
        if delay:
            wait = {"Retry-After": str(math.ceil(delay))}
            return JSONResponse({"error": f"too many wrong passwords; wait {math.ceil(delay)} s"}, 429, wait)
        is_right = self._has_password(authorization or "")
        if address and authorization is not None:
            self._attempts.record_attempt(address, is_right=is_right)
        if is_right:
            return None
        challenge = {"WWW-Authenticate": 'Basic realm="Pylorus", charset="UTF-8"'}
        return JSONResponse({"error": "the password is missing or wrong"}, 401, challenge)

    def _is_own_host(self, name: str) -> bool:
        return name in self._hosts or (self._any_address and is_address(name))

    def _has_password(self, authorization: str) -> bool:
        scheme, _, encoded = authorization.partition(" ")
        try:
            password = base64.b64decode(encoded.strip(), validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            password = ""
        # Digests have a fixed length, so the comparison time reveals nothing, not even the password's length.
        matches = hmac.compare_digest(_hash_text(password), self._wanted or b"")
        return matches and scheme.lower() == "basic"


def _is_own_page(headers: Headers, host_header: str) -> bool:
    """Return whether a request comes from this server's own page or from a program instead of a browser."""
    origin = headers.get("origin")
    if origin is None:
        return headers.get("sec-fetch-site", "none") in ("none", "same-origin")
    return urlsplit(origin).netloc.lower() == host_header.lower()


def _parse_host_name(host: str) -> str:
    """Return a Host header without its port, which differs behind a tunnel."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().removesuffix(".")


def _hash_text(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
