"""What the server answers: the page and its files from memory, and JSON."""

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
from pylorus.deploy.app.card import card_as_html
from pylorus.deploy.app.desk import Desk, Frame, Wanted
from pylorus.deploy.app.guard import Guard
from pylorus.deploy.app.interface import interface
from pylorus.deploy.app.options import ServeOptions
from pylorus.deploy.app.upload import Limits, RefusedUploadError, uploads
from pylorus.deploy.card import threshold_sentence
from pylorus.deploy.files import CARD, SUMS
from pylorus.deploy.load import Bundle

log = logging.getLogger(__name__)

AT_ONCE = 16
"""Requests with files that are in hand at once; more are asked to come again."""
SECONDS = 300.0
"""Within which all files of a request must have arrived."""
ANYWHERE = ("0.0.0.0", "::")
STATIC = {
    "page.css": "text/css",
    "page.js": "text/javascript",
    "table.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}


def application(desk: Desk, options: ServeOptions, password: str | None = None) -> ASGIApp:
    """The whole server, behind its guard."""
    pages = Pages(desk, options)
    routes = [
        Route("/", pages.page),
        Route("/static/{name}", pages.static),
        Route("/health", pages.health),
        Route("/api", pages.interface),
        Route("/api/model", pages.model),
        Route("/api/predict", pages.predict, methods=["POST"]),
    ]
    handlers = {HTTPException: _refused, Exception: _failed}
    inner = Starlette(routes=routes, exception_handlers=handlers)  # type: ignore[arg-type]
    return Guard(inner, hosts=options.hosts, any_address=options.host in ANYWHERE, password=password)


class Pages:
    """The answer to each path.

    Args:
        desk: Answers for the bundle.
        options: Of the server.
    """

    def __init__(self, desk: Desk, options: ServeOptions):
        self._desk = desk
        self._limits = Limits(options.most_bytes, options.max_images)
        self._in_hand = 0
        self._health = {"status": "ok", "bundle": name_of(desk.bundle), "version": __version__}
        self._model = _model(desk, options)
        self._interface = interface(desk.bundle, options)
        self._page = _page(desk.bundle, options)

    async def page(self, _: Request) -> Response:
        """The page itself."""
        return Response(self._page, media_type="text/html")

    async def static(self, request: Request) -> Response:
        """A file of the page's; by its name, never by a path."""
        name = request.path_params["name"]
        if name not in STATIC:
            raise HTTPException(404)
        return Response(_file(name), media_type=STATIC[name])

    async def health(self, _: Request) -> Response:
        """That it runs; also while the network is busy."""
        return JSONResponse(self._health)

    async def interface(self, _: Request) -> Response:
        """The description of the JSON interface."""
        return JSONResponse(self._interface)

    async def model(self, _: Request) -> Response:
        """What the model is."""
        return JSONResponse(self._model)

    async def predict(self, request: Request) -> Response:
        """A row a file."""
        if self._in_hand >= AT_ONCE:
            return JSONResponse({"error": f"{AT_ONCE} requests are in hand"}, 503, {"Retry-After": "2"})
        words = request.query_params
        wanted = Wanted(image=words.get("image") == "1", heat_map=words.get("heat_map") == "1")
        self._in_hand += 1
        try:
            async with asyncio.timeout(SECONDS):
                frames = await self._frames(request, wanted)
            results = await self._desk.answers(frames, wanted)
        except RefusedUploadError as error:
            return JSONResponse({"error": str(error)}, error.status)
        except TimeoutError:
            return JSONResponse({"error": f"the files took more than {SECONDS:g} s to arrive"}, 408)
        except ClientDisconnect:
            return Response(status_code=400)
        finally:
            self._in_hand -= 1
        use = self._desk.bundle.description.intended_use
        return JSONResponse({"bundle": self._health["bundle"], "intended_use": use, "results": results})

    async def _frames(self, request: Request, wanted: Wanted) -> list[Frame]:
        frames = [await self._desk.read(upload, wanted) async for upload in uploads(request, self._limits)]
        if not frames:
            raise RefusedUploadError(400, "the form holds no file")
        return frames


def name_of(bundle: Bundle) -> str:
    """The SHA-256 of the list of a bundle's hashes: another bundle has another."""
    return hashlib.sha256((bundle.folder / SUMS).read_bytes()).hexdigest()


def _model(desk: Desk, options: ServeOptions) -> dict[str, object]:
    said = desk.bundle.description
    deciding = said.decision.class_name
    return {
        "bundle": name_of(desk.bundle),
        "architecture": said.architecture,
        "classes": list(said.classes),
        "short_names": list(said.short_names),
        "decision": {"class": deciding, "threshold": said.decision.thresholds[deciding]},
        "prediction_sets": None if said.prediction_sets is None else {"coverage": said.prediction_sets.coverage},
        "abstention": {
            "unlike_above": said.abstention.unlike_above,
            "unsure_below": said.abstention.unsure_below,
        },
        "limits": {"most_bytes": options.most_bytes, "most_files": options.max_images},
        "no_heat_maps": desk.why_no_heat,
        "intended_use": said.intended_use,
    }


def _page(bundle: Bundle, options: ServeOptions) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: _file(name).decode()),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html.j2").render(
        said=bundle.description,
        guarantee=threshold_sentence(bundle.description, bundle.description.decision.class_name),
        options=options,
        card=card_as_html(bundle.folder / CARD),
        bundle=name_of(bundle),
        version=__version__,
    )


@cache
def _file(name: str) -> bytes:
    return (resources.files("pylorus.deploy.app") / "static" / name).read_bytes()


async def _refused(_: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _failed(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": f"the server failed: {type(error).__name__}"}, 500)
