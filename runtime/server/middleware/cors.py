"""Which other sites' pages may use the server from a browser: none, unless they are named."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp


def cors(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Return the application with CORS for these origins (``*``: all); itself for none.

    Cookies are never asked for: keys come in a header, which a page must know. What a page may read of an answer
    includes the request's id and when to try again.
    """
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=list(origins),
        allow_methods=["GET", "POST"],
        # openai's client in a browser sends headers that describe itself (x-stainless-...)
        allow_headers=["*"],
        expose_headers=["X-Request-Id", "Retry-After"],
        max_age=3600,
    )
