"""API keys."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from ziggurat.runtime.server.errors import ApiError
from ziggurat.runtime.server.middleware.refuse import refuse


class AuthMiddleware:
    """Lets requests through that carry one of the keys as ``Authorization: Bearer KEY``; 401 for the others.

    ``public`` are paths that need none. Without keys everything passes. Every key is compared, always, and by its
    SHA-256: neither the time it takes nor its variation says which key came close, or how long it is.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[str], public: Iterable[str] = ("/health",)) -> None:
        self._app = app
        self._digests = [_digest(key.encode("utf-8")) for key in keys]
        self._public = frozenset(public)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it before its body is read."""
        if scope["type"] != "http" or not self._digests or scope["path"] in self._public:
            await self._app(scope, receive, send)
            return
        key = _bearer(scope)
        if key is not None and self._known(key):
            await self._app(scope, receive, send)
            return
        if key is None:
            message, challenge = "give an API key: Authorization: Bearer KEY", "Bearer"
        else:
            message, challenge = "the API key is not one of this server's", 'Bearer error="invalid_token"'
        error = ApiError(
            401,
            message,
            code="invalid_api_key",
            headers={"WWW-Authenticate": challenge},
        )
        await refuse(scope, receive, send, error)

    def _known(self, key: bytes) -> bool:
        digest = _digest(key)
        known = False
        for own in self._digests:
            known |= hmac.compare_digest(digest, own)
        return known


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _bearer(scope: Scope) -> bytes | None:
    """Return the key of a request; None without, with one of another scheme, or with several."""
    given = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(given) != 1:
        return None
    scheme, _, key = given[0].strip().partition(b" ")
    return key.strip() or None if scheme.lower() == b"bearer" else None
