"""`pylorus serve`: run the web server of a bundle on this machine."""

import contextlib
import logging
import os
import socket
from pathlib import Path

import uvicorn

from pylorus.deploy.app.desk import InferenceService
from pylorus.deploy.app.options import ServeOptions
from pylorus.deploy.app.pages import create_application
from pylorus.deploy.load import load_bundle
from pylorus.deploy.predict import resolve_device
from pylorus.errors import PylorusError

PATIENCE = 10
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
    password = options.read_password()
    listener = open_listener(options)
    with listener:
        bundle = load_bundle(folder, device=resolve_device(options.device))
        desk = InferenceService(bundle)
        print(f"{bundle.description.architecture}: {', '.join(bundle.description.classes)}")
        print(f"{bundle.description.intended_use}")
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
    """Return uvicorn's configuration: no access log, no trust in proxy headers, no Server header."""
    return uvicorn.Config(
        create_application(desk, options, password),
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
