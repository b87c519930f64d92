"""Check the Host, password and Origin of every request, and add security headers to every response."""

import base64
import binascii
import hashlib
import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pylorus.deploy.app.options import is_address

OPEN = "/health"
"""The only path that needs no password."""
READING = ("GET", "HEAD")
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

        refusal = self._check_request(scope["method"], scope["path"], Headers(scope=scope))
        await (refusal or self._app)(scope, receive, send_guarded)

    def _check_request(self, method: str, path: str, headers: Headers) -> JSONResponse | None:
        host_headers = headers.getlist("host")
        if len(host_headers) != 1 or not self._is_own_host(_parse_host_name(host_headers[0])):
            host_name = host_headers[0][:100] if host_headers else '""'
            text = f"this server does not answer to the host name {host_name}; allow it with --allow-host"
            return JSONResponse({"error": text}, 421)
        if self._wanted is not None and path != OPEN and not self._has_password(headers.get("authorization", "")):
            challenge = {"WWW-Authenticate": 'Basic realm="Pylorus", charset="UTF-8"'}
            return JSONResponse({"error": "the password is missing or wrong"}, 401, challenge)
        if method not in READING and not _is_own_page(headers, host_headers[0]):
            return JSONResponse({"error": "the request came from another site's page"}, 403)
        return None

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
