"""What goes wrong between the chat and a server, as one line with what to do about it."""

from __future__ import annotations

import http
import json
from collections.abc import Mapping
from typing import Any

import httpx

from ziggurat.tui.api.address import Address
from ziggurat.tui.backend import BackendError, ErrorKind

_MAX_MESSAGE = 300
_SHORTEN = "or begin another chat (/new), or serve with a larger --ctx"
_KEY = "put the server's key into ZIGGURAT_API_KEY or the settings file"


def connection_error(error: Exception, address: Address, *, log: str = "") -> BackendError:
    """Return what it means that a request got no answer, or broke off. ``log`` names a file that tells more."""
    see = f", or see {log}" if log else ""
    if isinstance(error, httpx.ConnectTimeout | httpx.PoolTimeout):
        text, remedy = f"{address} does not answer", "is it the right address, and the network there?"
    elif isinstance(error, httpx.ConnectError):
        text, remedy = f"nobody answers at {address}", f"start the server there{see}"
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return BackendError(
                f"the certificate of {address} is not trusted", "set SSL_CERT_FILE to the CA's", kind="refused"
            )
    elif isinstance(error, httpx.TimeoutException):
        text, remedy = f"{address} is silent for too long", f"try again{see}"
    elif isinstance(error, httpx.UnsupportedProtocol | httpx.InvalidURL):
        return BackendError(f"{address}: is no address of a server", "begin with http://", kind="refused")
    else:
        text, remedy = f"the connection to {address} broke off", f"try again{see}"
    return BackendError(text, remedy, kind="lost", retryable=True)


def answer_error(status: int, body: bytes, headers: Mapping[str, str], address: Address) -> BackendError:
    """Return what an answer means that is not a success."""
    found = _error_object(body)
    error = _of(status, found, address, _number(headers.get("retry-after")))
    error.load_progress = _number(headers.get("x-load-progress"))
    return error


def event_error(data: Any, address: Address) -> BackendError:
    """Return what an error means that came in the middle of a stream."""
    found = data.get("error") if isinstance(data, dict) else None
    told = found if isinstance(found, dict) else {"message": str(found)}
    status = told.get("code")
    return _of(status if isinstance(status, int) else 500, told, address, None)


def not_a_chat(address: Address, what: str) -> BackendError:
    """Return the error for an answer that is no chat's."""
    return BackendError(
        f"what {address} answers is not OpenAI's API ({what})", "is it the right address?", kind="nonsense"
    )


def _of(status: int, told: Mapping[str, Any], address: Address, retry_after: float | None) -> BackendError:
    message = _one_line(told.get("message")) or f"{status} {_phrase(status)}"
    code, kind = told.get("code"), told.get("type")

    def made(remedy: str, of: ErrorKind, *, retryable: bool = False) -> BackendError:
        return BackendError(message, remedy, kind=of, retryable=retryable, retry_after_s=retry_after)

    if _too_long(message, code, kind):
        return made(_SHORTEN, "too_long")
    if "no chat template" in message:
        message = "the model has no chat template, so that it can only go on with a text (ziggurat run --raw)"
        return made("choose another with /model", "refused")
    if code in ("model_loading", "server_loading") or (status == 503 and "loading" in message.lower()):
        return made("wait a moment", "loading", retryable=True)
    if status in (401, 403):
        return made(_KEY, "key")
    if status == 404 and code == "unknown_url" or status == 405 or (status == 404 and not told):
        return BackendError(
            f"{address} has no chat completions ({status})", "does the address end as the server says?", kind="nonsense"
        )
    if status == 404:
        return made("choose another with /model", "refused")
    if status == 429:
        return made("try again later", "busy", retryable=True)
    if status in (408, 502, 503, 504) or code == "server_closing":
        return made("try again", "lost", retryable=True)
    if status >= 500:
        return made("try again; the server's log says why", "failed")
    return made("", "refused")


def _too_long(message: str, code: Any, kind: Any) -> bool:
    if code == "context_length_exceeded" or kind == "exceed_context_size_error":
        return True
    low = message.lower()
    return "context length" in low and any(word in low for word in ("maximum", "exceed", "longer"))


def _error_object(body: bytes) -> Mapping[str, Any]:
    """Return the error of a body: OpenAI's form, and what others write instead."""
    try:
        data = json.loads(body)
    except ValueError:
        return {}
    found = data.get("error", data) if isinstance(data, dict) else {}
    if isinstance(found, str):
        return {"message": found}
    if not isinstance(found, dict):
        return {}
    if "message" not in found and isinstance(found.get("detail"), str):
        return {"message": found["detail"]}
    return found


def _one_line(text: Any) -> str:
    if not isinstance(text, str):
        return ""
    line = " ".join("".join(each if each.isprintable() else " " for each in text).split()).rstrip(".")
    return line if len(line) <= _MAX_MESSAGE else f"{line[:_MAX_MESSAGE]}…"


def _phrase(status: int) -> str:
    try:
        return http.HTTPStatus(status).phrase
    except ValueError:
        return "unknown status"


def _number(text: str | None) -> float | None:
    try:
        return max(0.0, float(text)) if text is not None else None
    except ValueError:
        return None
