"""`pylorus serve`: a bundle's page on a socket of this machine."""

import contextlib
import logging
import os
import socket
from pathlib import Path

import uvicorn

from pylorus.deploy.app.desk import Desk
from pylorus.deploy.app.options import ServeOptions
from pylorus.deploy.app.pages import application
from pylorus.deploy.load import load_bundle
from pylorus.deploy.predict import settled_device
from pylorus.errors import PylorusError

PATIENCE = 10
"""Seconds that requests in hand get to end when the server is asked to."""


def serve(folder: Path, options: ServeOptions) -> None:
    """Serves a bundle until Ctrl-C or SIGTERM.

    Args:
        folder: The bundle's.
        options: See there.

    Raises:
        PylorusError: If an option or the bundle is not what it should be, or the port is taken.
    """
    options.check()
    password = options.password()
    listening = listen(options)
    with listening:
        bundle = load_bundle(folder, device=settled_device(options.device))
        desk = Desk(bundle)
        print(f"{bundle.description.architecture}: {', '.join(bundle.description.classes)}")
        print(f"{bundle.description.intended_use}")
        if desk.why_no_heat:
            print(f"no heat maps: {desk.why_no_heat}")
        if not options.loopback:
            print("Others in the network can reach it, and HTTP is not encrypted: see docs/serve.md.")
        print(f"\npage: {address(listening)}    Ctrl-C ends it", flush=True)
        # Ctrl-C is how a server ends: requests in hand are answered, then uvicorn raises it again.
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(settings(desk, options, password)).run(sockets=[listening])
        desk.close()
        print("\nended")


def settings(desk: Desk, options: ServeOptions, password: str | None) -> uvicorn.Config:
    """How the server runs: no list of who asked for what, no headers taken on trust, no word about itself."""
    return uvicorn.Config(
        application(desk, options, password),
        log_level=logging.WARNING,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        ws="none",
        http="h11",
        loop="asyncio",
        timeout_graceful_shutdown=PATIENCE,
    )


def listen(options: ServeOptions) -> socket.socket:
    """A socket at the host and port of the options.

    Raises:
        PylorusError: If it can't be had.
    """
    try:
        family, _, _, _, place = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(place[:2], family=family)
    except OSError as error:
        # Python's own words repeat the address; a name that leads nowhere has a number of its own.
        number = error.errno or 0
        reason = os.strerror(number) if number > 0 else error.strerror
        raise PylorusError(
            f"--host {options.host} --port {options.port}: {reason or error}. "
            "Another --port, or 0 for any free one, may do."
        ) from error


def address(listening: socket.socket) -> str:
    """Where a browser on this machine finds the page."""
    host, port = listening.getsockname()[:2]
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{name}]:{port}/" if ":" in name else f"http://{name}:{port}/"
