"""Routes of the server: the page and its static files from memory, and the JSON interface."""

import asyncio
import hashlib
import logging
from functools import cache
from importlib import resources

import jinja2
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from pylorus import __version__
from pylorus.deploy.app.card import render_card_html
from pylorus.deploy.app.desk import AnswerOptions, DecodedUpload, InferenceService
from pylorus.deploy.app.guard import RequestGuard
from pylorus.deploy.app.interface import build_openapi
from pylorus.deploy.app.options import ServeOptions
from pylorus.deploy.app.upload import RefusedUploadError, UploadLimits, iter_uploads
from pylorus.deploy.card import format_threshold_guarantee
from pylorus.deploy.files import CARD, SUMS
from pylorus.deploy.load import Bundle

log = logging.getLogger(__name__)

AT_ONCE = 16
"""Maximum number of concurrent requests with files; further ones are told to retry."""
SECONDS = 300.0
"""Seconds within which all files of a request must arrive."""
ANYWHERE = ("0.0.0.0", "::")
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
    return RequestGuard(starlette, hosts=options.hosts, any_address=options.host in ANYWHERE, password=password)


class RequestHandlers:
    """Request handlers, one per path.

    Args:
        desk: Runs inference for the bundle.
        options: Options of the server.
    """

    def __init__(self, desk: InferenceService, options: ServeOptions):
        self._desk = desk
        self._limits = UploadLimits(options.most_bytes, options.max_images)
        self._in_hand = 0
        self._health = {"status": "ok", "bundle": compute_bundle_id(desk.bundle), "version": __version__}
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
        if self._in_hand >= AT_ONCE:
            return JSONResponse({"error": f"the server is busy with {AT_ONCE} requests"}, 503, {"Retry-After": "2"})
        query = request.query_params
        wanted = AnswerOptions(image=query.get("image") == "1", heat_map=query.get("heat_map") == "1")
        self._in_hand += 1
        try:
            async with asyncio.timeout(SECONDS):
                frames = await self._read_uploads(request, wanted)
            results = await self._desk.classify_uploads(frames, wanted)
        except RefusedUploadError as error:
            return JSONResponse({"error": str(error)}, error.status)
        except TimeoutError:
            return JSONResponse({"error": f"the upload took more than {SECONDS:g} s"}, 408)
        except ClientDisconnect:
            return Response(status_code=400)
        finally:
            self._in_hand -= 1
        intended_use = self._desk.bundle.description.intended_use
        return JSONResponse({"bundle": self._health["bundle"], "intended_use": intended_use, "results": results})

    async def _read_uploads(self, request: Request, wanted: AnswerOptions) -> list[DecodedUpload]:
        frames = [
            await self._desk.decode_upload(upload, wanted) async for upload in iter_uploads(request, self._limits)
        ]
        if not frames:
            raise RefusedUploadError(400, "the form contains no file")
        return frames


def compute_bundle_id(bundle: Bundle) -> str:
    """Return the SHA-256 of a bundle's list of file hashes, which identifies the bundle."""
    return hashlib.sha256((bundle.folder / SUMS).read_bytes()).hexdigest()


def _build_model_facts(desk: InferenceService, options: ServeOptions) -> dict[str, object]:
    description = desk.bundle.description
    decision_class = description.decision.class_name
    return {
        "bundle": compute_bundle_id(desk.bundle),
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
        "limits": {"most_bytes": options.most_bytes, "most_files": options.max_images},
        "no_heat_maps": desk.why_no_heat,
        "intended_use": description.intended_use,
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
        guarantee=format_threshold_guarantee(bundle.description, bundle.description.decision.class_name),
        options=options,
        card=render_card_html(bundle.folder / CARD),
        bundle=compute_bundle_id(bundle),
        version=__version__,
    )


@cache
def _read_static_file(name: str) -> bytes:
    return (resources.files("pylorus.deploy.app") / "static" / name).read_bytes()


async def _handle_http_error(_: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _handle_server_error(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": f"internal server error: {type(error).__name__}"}, 500)
