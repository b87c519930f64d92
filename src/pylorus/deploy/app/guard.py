"""What every request passes first: its Host, its password and its Origin; and what every answer carries."""

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
"""The one path that needs no password."""
READING = ("GET", "HEAD")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The browser loads nothing from elsewhere, whatever a page says; `data:` are the pictures in an answer."""
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Lets through what may pass.

    Args:
        app: What lies behind it.
        hosts: Names that it may be called by.
        any_address: Whether addresses of any kind will do: it listens on all of this machine's.
        password: None: there is none. The user's name does not matter.
    """

    def __init__(self, app: ASGIApp, *, hosts: frozenset[str], any_address: bool, password: str | None):
        self._app = app
        self._hosts = hosts
        self._any_address = any_address
        self._wanted = None if password is None else _digest(password)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hands a request on, or refuses it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        if scope["type"] != "http":
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refusal = self._refusal(scope["method"], scope["path"], Headers(scope=scope))
        await (refusal or self._app)(scope, receive, send_guarded)

    def _refusal(self, method: str, path: str, headers: Headers) -> JSONResponse | None:
        called = headers.getlist("host")
        if len(called) != 1 or not self._is_own(_name(called[0])):
            text = f"this server is not {called[0][:100] if called else 'without a name'}; see --allow-host"
            return JSONResponse({"error": text}, 421)
        if self._wanted is not None and path != OPEN and not self._has_password(headers.get("authorization", "")):
            asks = {"WWW-Authenticate": 'Basic realm="Pylorus", charset="UTF-8"'}
            return JSONResponse({"error": "the password is missing or wrong"}, 401, asks)
        if method not in READING and not _own_page(headers, called[0]):
            return JSONResponse({"error": "asked by a page from elsewhere"}, 403)
        return None

    def _is_own(self, name: str) -> bool:
        return name in self._hosts or (self._any_address and is_address(name))

    def _has_password(self, authorization: str) -> bool:
        scheme, _, encoded = authorization.partition(" ")
        try:
            given = base64.b64decode(encoded.strip(), validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            given = ""
        # Digests have one length, so that the time taken tells nothing, not even how long the password is.
        same = hmac.compare_digest(_digest(given), self._wanted or b"")
        return same and scheme.lower() == "basic"


def _own_page(headers: Headers, called: str) -> bool:
    """Whether a request comes from this server's own page or from no page at all (a program)."""
    origin = headers.get("origin")
    if origin is None:
        return headers.get("sec-fetch-site", "none") in ("none", "same-origin")
    return urlsplit(origin).netloc.lower() == called.lower()


def _name(host: str) -> str:
    """A Host header without its port: behind a tunnel it is another one."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().removesuffix(".")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
