"""Routes of the server: the page and its static files from memory, and the JSON interface."""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import uvicorn
from markdown_it import MarkdownIt
from markupsafe import Markup
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from pylorus import __version__
from pylorus.core.errors import PylorusError
from pylorus.core.limited_process import forbid_core_dumps
from pylorus.deploy.app.inference import (
    FORM_FIELD,
    AnswerOptions,
    DecodedUpload,
    InferenceService,
    RefusedUploadError,
    UploadLimits,
    UploadProgress,
    iter_uploads,
)
from pylorus.deploy.app.security import (
    CLIENT_GONE,
    GuardedProtocol,
    RequestGuard,
    ServeOptions,
    get_client_network,
)
from pylorus.deploy.card import format_threshold_guarantee, get_fitting_images, get_measured_images
from pylorus.deploy.description import INTENDED_USE
from pylorus.deploy.model import Bundle, load_bundle
from pylorus.deploy.predict import resolve_device
from pylorus.deploy.verified_files import CARD

MAX_CARD_BYTES = 1_000_000
HEADING_OFFSET = 2
"""Levels by which its headings are lowered, since they come below the page's own."""
TABLE_MARKUP = {
    "table_open": '<div class="scroll" role="region" aria-label="Table {}" tabindex="0"><table>\n',
    "table_close": "</table></div>\n",
}
"""Markup around a table, so that a wide one scrolls by itself, by keyboard too."""


def render_card_html(content: bytes) -> Markup:
    """Render Markdown as HTML: paragraphs, headings, lists and tables, but no embedded HTML, links or images."""
    text = content[:MAX_CARD_BYTES].decode("utf-8", errors="replace")
    renderer = MarkdownIt("commonmark", {"html": False}).enable("table")
    renderer.disable(["html_block", "html_inline", "link", "image", "autolink", "reference"])
    tokens = renderer.parse(text)
    tables = 0
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1]) + HEADING_OFFSET)}"
        if token.type in TABLE_MARKUP:
            tables += token.type == "table_open"
            token.type, token.content = "html_block", TABLE_MARKUP[token.type].format(tables)
    return Markup(renderer.renderer.render(tokens, renderer.options, {}))


Result = TypeVar("Result")
Schema = dict[str, object]

TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
BOOLEAN: Schema = {"type": "boolean"}
ERRORS = {
    "400": "A parameter is neither 0 nor 1, or the form is malformed or incomplete.",
    "401": "The password is missing or wrong (HTTP Basic, any user name).",
    "403": "The request came from another site's page.",
    "408": "The files took too long to arrive.",
    "413": "Too many files, or too many bytes in total.",
    "429": "Too many wrong passwords; retry after Retry-After seconds.",
    "415": "The body is not multipart/form-data.",
    "421": "The Host header names another server.",
    "503": "Too many requests at once; retry after Retry-After seconds.",
}


def build_openapi(bundle: Bundle, options: ServeOptions) -> Schema:
    """Return the OpenAPI description of this server's interface."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Pylorus: predictions of a trained model",
            "version": __version__,
            "description": INTENDED_USE,
        },
        "paths": {
            "/api/predict": {"post": _build_predict_operation(options)},
            "/api/model": {"get": _build_get_operation("The model that this server runs", "Model")},
            "/health": {"get": {**_build_get_operation("Server status, version and bundle", "Health"), "security": []}},
        },
        "components": {
            "schemas": {
                "Row": _build_row_schema(bundle),
                "Answer": _build_answer_schema(),
                "Model": _build_model_schema(),
                "Health": _build_health_schema(),
                "Error": _build_object_schema(error=TEXT),
            },
            "securitySchemes": {"password": {"type": "http", "scheme": "basic"}},
        },
        "security": [{}] if options.password_file is None else [{"password": []}],
    }


ANSWER_PARTS = {
    "image": "With 1, each row has the preprocessed image as a JPEG (data: URL).",
    "heat_map": "With 1, each row has that image under the heat map of its predicted class, if available.",
}
"""Parameters of a request by what the answer then has."""


def _build_predict_operation(options: ServeOptions) -> Schema:
    form = {
        "type": "object",
        "required": [FORM_FIELD],
        "additionalProperties": False,
        "properties": {
            FORM_FIELD: {
                "type": "array",
                "minItems": 1,
                "maxItems": options.max_images,
                "items": {"type": "string", "contentMediaType": "application/octet-stream"},
                "description": f"JPEG, PNG, BMP, TIFF, WebP or DICOM, at most {options.max_bytes:,} bytes each.",
            }
        },
    }
    return {
        "summary": "Classify images",
        "parameters": [
            {"name": name, "in": "query", "description": text, "schema": {"type": "string", "enum": ["0", "1"]}}
            for name, text in ANSWER_PARTS.items()
        ],
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}}},
        "responses": {
            "200": _build_content("One row per file, in the order of the files", "Answer"),
            **{status: _build_content(text, "Error") for status, text in ERRORS.items()},
        },
    }


def _build_row_schema(bundle: Bundle) -> Schema:
    names, decision_class = bundle.description.short_names, bundle.description.decision.class_name
    return {
        "type": "object",
        "required": ["file", "error"],
        "description": "If error is not empty, the row holds only file and error.",
        "properties": {
            "file": TEXT,
            "error": {**TEXT, "description": "Why there is no answer for this file; empty if there is one."},
            "predicted": {"type": "string", "enum": list(names)},
            "probability": {
                "type": "object",
                "properties": dict.fromkeys(names, NUMBER),
                "description": "Calibrated probability of each class, 0 to 1.",
            },
            "decision": {"type": "string", "enum": [decision_class, f"not {decision_class}"]},
            "abstain": {**BOOLEAN, "description": "Whether the model abstains: this answer must not be used."},
            "why": {"type": "string", "enum": ["", "unsure", "unlike"]},
            "prediction_set": {
                "type": "array",
                "items": {"type": "string", "enum": list(names)},
                "description": "Short class names; only if the bundle has prediction sets.",
            },
            "unlikeness": {**NUMBER, "description": "Distance from the training images, 0 to 2."},
            "image": TEXT,
            "heat_map": TEXT,
        },
    }


def _build_answer_schema() -> Schema:
    rows = {"type": "array", "items": {"$ref": "#/components/schemas/Row"}}
    return _build_object_schema(bundle=TEXT, intended_use=TEXT, results=rows)


def _build_model_schema() -> Schema:
    names: Schema = {"type": "array", "items": TEXT}
    return _build_object_schema(
        bundle=TEXT,
        architecture=TEXT,
        classes=names,
        short_names={**names, "description": "Short class names used in answers, in the order of classes."},
        decision=_build_object_schema(**{"class": TEXT, "threshold": {"type": ["number", "null"]}}),
        prediction_sets={
            "oneOf": [{"type": "null"}, _build_object_schema(coverage=NUMBER)],
            "description": "Null if the bundle has none.",
        },
        abstention=_build_object_schema(unlike_above=NUMBER, unsure_below=NUMBER),
        limits=_build_object_schema(max_bytes=NUMBER, max_files=NUMBER),
        no_heat_maps={**TEXT, "description": "Why there are no heat maps; empty if there are."},
        intended_use=TEXT,
    )


def _build_health_schema() -> Schema:
    return _build_object_schema(status=TEXT, bundle=TEXT, version=TEXT)


def _build_object_schema(**properties: object) -> Schema:
    return {"type": "object", "required": list(properties), "properties": properties}


def _build_get_operation(summary: str, schema: str) -> Schema:
    refusals = {status: _build_content(ERRORS[status], "Error") for status in ("400", "401", "421", "429")}
    return {"summary": summary, "responses": {"200": _build_content(summary, schema), **refusals}}


def _build_content(text: str, schema: str) -> Schema:
    return {
        "description": text,
        "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}},
    }


log = logging.getLogger(__name__)

MAX_REQUESTS, MAX_REQUESTS_PER_ADDRESS = 16, 4
"""Maximum number of concurrent requests with files, in all and of one client; further ones are told to retry."""
MAX_LAG = 2.0
"""Seconds by which a client may be too slow while others wait for its place; see `UploadProgress`."""
NOT_DECODED = "not decoded, because an earlier file of this request took too much time or memory; send it separately"
UPLOAD_TIMEOUT = 300.0
"""Seconds within which all files of a request must arrive."""
ALL_ADDRESSES = ("0.0.0.0", "::")
STATIC = {
    "page.css": "text/css",
    "page.js": "text/javascript",
    "table.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}


def create_application(desk: InferenceService, options: ServeOptions, password: str | None = None) -> ASGIApp:
    """Return the complete ASGI application, behind its guard."""
    pages = RequestHandlers(desk, options)
    routes = [
        Route("/", pages.get_page),
        Route("/static/{name}", pages.get_static_file),
        Route("/health", pages.get_health),
        Route("/api", pages.get_interface),
        Route("/api/model", pages.get_model_facts),
        Route("/api/predict", pages.predict, methods=["POST"]),
    ]
    handlers = {HTTPException: _handle_http_error, Exception: _handle_server_error}
    starlette = Starlette(routes=routes, exception_handlers=handlers)  # type: ignore[arg-type]
    return RequestGuard(starlette, hosts=options.hosts, any_address=options.host in ALL_ADDRESSES, password=password)


class RequestHandlers:
    """Request handlers, one per path.

    Args:
        desk: Runs inference for the bundle.
        options: Options of the server.
    """

    def __init__(self, desk: InferenceService, options: ServeOptions):
        self._desk = desk
        self._limits = UploadLimits(options.max_bytes, options.max_images)
        self._places: list[_Place] = []
        self._health = {"status": "ok", "bundle": desk.bundle.identity, "version": __version__}
        self._model = _build_model_facts(desk, options)
        self._interface = build_openapi(desk.bundle, options)
        self._page = _render_page(desk.bundle, options)

    async def get_page(self, _: Request) -> Response:
        """Return the HTML page."""
        return Response(self._page, media_type="text/html")

    async def get_static_file(self, request: Request) -> Response:
        """Return a static file of the page, looked up by name and never by path."""
        name = request.path_params["name"]
        if name not in STATIC:
            raise HTTPException(404)
        return Response(_read_static_file(name), media_type=STATIC[name])

    async def get_health(self, _: Request) -> Response:
        """Return the server's status, even while the network is busy."""
        return JSONResponse(self._health)

    async def get_interface(self, _: Request) -> Response:
        """Return the OpenAPI description of the JSON interface."""
        return JSONResponse(self._interface)

    async def get_model_facts(self, _: Request) -> Response:
        """Return facts about the model."""
        return JSONResponse(self._model)

    async def predict(self, request: Request) -> Response:
        """Classify the uploaded files; return one row per file."""
        for name, value in request.query_params.multi_items():
            if name in ANSWER_PARTS and value not in ("0", "1"):
                return JSONResponse({"error": f"{name}: found {value[:50]}, expected 0 or 1"}, 400)
        address = get_client_network(request.client)
        refusal = self._find_place(address)
        if refusal is not None:
            return refusal
        query = request.query_params
        wanted = AnswerOptions(image=query.get("image") == "1", heat_map=query.get("heat_map") == "1")
        place = _Place(address, UploadProgress(), asyncio.timeout(UPLOAD_TIMEOUT))
        self._places.append(place)
        try:
            async with place.timeout:
                frames = await _run_while_connected(request, self._read_uploads(request, wanted, place))
            results = await _run_while_connected(request, self._desk.classify_uploads(frames, wanted))
        except RefusedUploadError as error:
            return JSONResponse({"error": str(error)}, error.status)
        except TimeoutError:
            reason = "others were waiting" if place.is_lost else f"it took more than {UPLOAD_TIMEOUT:g} s"
            return JSONResponse({"error": f"the upload was too slow: {reason}"}, 408)
        except ClientDisconnect:
            return Response(status_code=400)
        finally:
            self._places.remove(place)
        return JSONResponse({"bundle": self._health["bundle"], "intended_use": INTENDED_USE, "results": results})

    def _find_place(self, address: str) -> Response | None:
        """Return why a request has to wait; None if there is a place, or one whose client is too slow for it."""
        own = [place for place in self._places if place.address == address]
        is_greedy = bool(address) and len(own) >= MAX_REQUESTS_PER_ADDRESS
        if not is_greedy and len(self._places) < MAX_REQUESTS:
            return None
        taken = [place for place in (own if is_greedy else self._places) if not place.is_lost]
        slowest = max(taken, key=lambda place: place.progress.lag, default=None)
        if slowest is not None and slowest.progress.lag > MAX_LAG:
            slowest.lose()
            return None
        requests = f"{MAX_REQUESTS_PER_ADDRESS} requests of this address" if is_greedy else f"{MAX_REQUESTS} requests"
        return JSONResponse({"error": f"the server is busy with {requests}"}, 503, {"Retry-After": "2"})

    async def _read_uploads(self, request: Request, wanted: AnswerOptions, place: "_Place") -> list[DecodedUpload]:
        frames: list[DecodedUpload] = []
        has_ended_reader = False
        async with contextlib.aclosing(iter_uploads(request, self._limits, place.progress)) as uploads:
            async for upload in uploads:
                if has_ended_reader:
                    upload = replace(upload, content=b"", error=upload.error or NOT_DECODED)
                frames.append(await self._desk.decode_upload(upload, wanted, client=place.address))
                has_ended_reader = has_ended_reader or frames[-1].ended
        if not frames:
            raise RefusedUploadError(400, "the form contains no file")
        return frames


@dataclass(eq=False)
class _Place:
    """A request with files that is being answered.

    Attributes:
        address: Whose limits it counts for.
        progress: How fast its files arrive.
        timeout: Ends it.
        is_lost: Whether it was ended for another request because its client was too slow.
    """

    address: str
    progress: UploadProgress
    timeout: asyncio.Timeout
    is_lost: bool = False

    def lose(self) -> None:
        """End the request."""
        self.is_lost = True
        self.timeout.reschedule(asyncio.get_running_loop().time())


async def _run_while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Wait for some work, and drop it when the client goes.

    Raises:
        ClientDisconnect: If the client went.
    """
    gone: asyncio.Event | None = request.scope.get("state", {}).get(CLIENT_GONE)
    if gone is None:
        return await work
    task, watch = asyncio.create_task(work), asyncio.create_task(gone.wait())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait([task])


def _build_model_facts(desk: InferenceService, options: ServeOptions) -> dict[str, object]:
    description = desk.bundle.description
    decision_class = description.decision.class_name
    return {
        "bundle": desk.bundle.identity,
        "architecture": description.architecture,
        "classes": list(description.classes),
        "short_names": list(description.short_names),
        "decision": {"class": decision_class, "threshold": description.decision.thresholds[decision_class]},
        "prediction_sets": None
        if description.prediction_sets is None
        else {"coverage": description.prediction_sets.coverage},
        "abstention": {
            "unlike_above": description.abstention.unlike_above,
            "unsure_below": description.abstention.unsure_below,
        },
        "limits": {"max_bytes": options.max_bytes, "max_files": options.max_images},
        "no_heat_maps": desk.why_no_heat,
        "intended_use": INTENDED_USE,
    }


def _render_page(bundle: Bundle, options: ServeOptions) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: _read_static_file(name).decode()),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html.j2").render(
        description=bundle.description,
        intended_use=INTENDED_USE,
        guarantee=format_threshold_guarantee(bundle.description, bundle.description.decision.class_name),
        fixed_on=get_fitting_images(bundle.description),
        measured_on=get_measured_images(bundle.description),
        options=options,
        card=render_card_html(bundle.contents[CARD]),
        bundle=bundle.identity,
        version=__version__,
    )


@cache
def _read_static_file(name: str) -> bytes:
    return (resources.files("pylorus.deploy.app") / "static" / name).read_bytes()


async def _handle_http_error(_: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _handle_server_error(_: Request, __: Exception) -> Response:
    return JSONResponse({"error": "internal server error; the console of the server says more"}, 500)


SHUTDOWN_TIMEOUT = 10
"""Seconds that running requests have to finish when the server is stopped."""


def serve(folder: Path, options: ServeOptions) -> None:
    """Serve a bundle until Ctrl-C or SIGTERM.

    Args:
        folder: Folder of the bundle.
        options: Options of the server.

    Raises:
        PylorusError: If an option or the bundle is invalid, or the port is in use.
    """
    options.check()
    forbid_core_dumps()
    password = options.read_password()
    listener = open_listener(options)
    with listener:
        bundle = load_bundle(
            folder, device=resolve_device(options.device), network=options.network, trust=options.trust
        )
        desk = InferenceService(bundle)
        print(f"{bundle.description.architecture}: {', '.join(bundle.description.classes)}")
        print(INTENDED_USE)
        if desk.why_no_heat:
            print(f"no heat maps: {desk.why_no_heat}")
        if not options.is_loopback:
            print("Others in the network can reach this page, and HTTP is not encrypted: see docs/serve.md.")
        print(f"\npage: {format_page_url(listener)}    (Ctrl-C stops the server)", flush=True)
        # Ctrl-C is the normal way to stop: uvicorn finishes running requests, then raises it again.
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(build_server_config(desk, options, password)).run(sockets=[listener])
        desk.close()
        print("\nstopped")


def build_server_config(desk: InferenceService, options: ServeOptions, password: str | None) -> uvicorn.Config:
    """Return uvicorn's configuration: no access log, no Server header, trust in the headers of named proxies only."""
    return uvicorn.Config(
        create_application(desk, options, password),
        log_level=logging.ERROR,  # a line per invalid request would let anybody fill a log
        access_log=False,
        server_header=False,
        proxy_headers=bool(options.trusted_proxies),
        forwarded_allow_ips=list(options.trusted_proxies),
        lifespan="off",
        ws="none",
        http=GuardedProtocol,
        loop="asyncio",
        timeout_graceful_shutdown=SHUTDOWN_TIMEOUT,
    )


def open_listener(options: ServeOptions) -> socket.socket:
    """Open a listening socket at the host and port of the options.

    Raises:
        PylorusError: If the address is invalid or in use.
    """
    try:
        family, _, _, _, socket_address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(socket_address[:2], family=family)
    except OSError as error:
        # Python's message would repeat the address. A host name that can't be resolved has a negative number.
        code = error.errno or 0
        reason = os.strerror(code) if code > 0 else error.strerror
        raise PylorusError(
            f"--host {options.host} --port {options.port}: {reason or error}. "
            "Try another --port, or --port 0 for any free one."
        ) from error


def format_page_url(listener: socket.socket) -> str:
    """Return the URL of the page for a browser on this machine."""
    host, port = listener.getsockname()[:2]
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{name}]:{port}/" if ":" in name else f"http://{name}:{port}/"
