"""Cuts a Python process and all that it starts off from every network but this machine itself, and records each try.

Python loads this module by its name before anything else, where its folder is on PYTHONPATH. It hears of sockets by
audit events, which also cover what imported `socket` by another way and can't be switched off again.
"""

import _socket
import ipaddress
import os
import sys
import traceback
from pathlib import Path

RECORD = "PYLORUS_TEST_AIR_GAP"
"""The environment variable that names the folder for records: a file `watched`, and `attempts` if there was one."""

CALLS = ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.bind")
NAMES = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo")


def local(host: object) -> bool:
    """Whether a host is this machine, told without asking a name server."""
    name = host.decode() if isinstance(host, bytes) else host
    if name is None or name in ("", "localhost"):
        return True
    try:
        return ipaddress.ip_address(str(name).split("%")[0]).is_loopback
    except ValueError:
        return False


def forbidden(event: str, arguments: tuple) -> object:
    """The address that an event would reach and must not; None where it stays on this machine."""
    if event in CALLS:
        sock, address = arguments
        if not isinstance(address, tuple) or sock.family not in (_socket.AF_INET, _socket.AF_INET6):
            return None  # a Unix socket, or one that is connected already
        # A server that binds to no address in particular is open to the network.
        within = local(address[0]) and (event != "socket.bind" or address[0] not in ("", "::", "0.0.0.0"))
        return None if within else address
    host = arguments[0][0] if event == "socket.getnameinfo" else arguments[0]
    return None if local(host) else host


def write(name: str, line: str) -> None:
    """Adds a line to a record; lines of processes that write at once stay whole."""
    file = os.open(Path(os.environ[RECORD]) / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(file, f"{line}\n".encode())
    finally:
        os.close(file)


def refuse(event: str, arguments: tuple) -> None:
    """The audit hook."""
    if event not in CALLS and event not in NAMES:
        return
    address = forbidden(event, arguments)
    if address is not None:
        places = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack()[-8:-1]]
        write("attempts", f"{event} {address} in {' '.join(sys.orig_argv)[:200]!r} from {' < '.join(reversed(places))}")
        raise OSError(101, f"the air-gap test forbids {event} {address}")


if RECORD in os.environ:
    sys.addaudithook(refuse)
    write("watched", " ".join(sys.orig_argv)[:500].replace("\n", " "))
