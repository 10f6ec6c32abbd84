"""Listens and serves until it is told to end."""

from __future__ import annotations

import errno
import socket

import uvicorn
from fastapi import FastAPI

from ziggurat.runtime.errors import InvalidRequestError, ZigguratError
from ziggurat.runtime.server.settings import ServerSettings


def listen(settings: ServerSettings) -> socket.socket:
    """Take the address that the server listens at. Raises ZigguratError when that cannot be had."""
    where = f"{settings.host}:{settings.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InvalidRequestError(f"--host {settings.host}: is no address of this machine ({error.strerror})") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ZigguratError(f"{where} is in use: choose another --port, or 0 for any that is free") from None
        raise ZigguratError(f"{where} cannot be listened at: {error.strerror or error}") from None
    return listener


def address_of(listener: socket.socket) -> str:
    """Return the URL that clients on this machine can use."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def run(app: FastAPI, listener: socket.socket) -> None:
    """Serve until a signal ends it."""
    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="on", timeout_graceful_shutdown=30)
    uvicorn.Server(config).run(sockets=[listener])
