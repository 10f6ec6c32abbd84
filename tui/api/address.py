"""Where a server is, from what people write."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ziggurat.tui.backend import BackendError

_UNIX = "http+unix://"
_REMEDY = "give one such as http://127.0.0.1:8080/v1"


@dataclass(frozen=True)
class Address:
    """``api`` is what OpenAI's paths follow (``…/v1``), ``root`` what a server's own follow; both without a slash.

    ``unix_socket`` is where to connect instead of the host that they name.
    """

    api: str
    root: str
    unix_socket: Path | None = None

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read an address: the scheme and ``/v1`` may be left out. Raises BackendError for what is none."""
        text = text.strip()
        if text.startswith(_UNIX):
            path = Path(text.removeprefix(_UNIX).rstrip("/").removesuffix("/v1"))
            return cls("http://localhost/v1", "http://localhost", path)
        if "://" not in text:
            text = f"http://{text}"
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        named = bool(re.fullmatch(r"[\w.:%-]+", parts.hostname or ""))
        if parts.scheme not in ("http", "https") or not named or port == 0:
            raise BackendError(f"{text}: is no address of a server", _REMEDY, kind="refused")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise BackendError(f"{parts.hostname}: an address has no user, query or fragment", _REMEDY, kind="refused")
        base = f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")
        api = base if parts.path.strip("/") else f"{base}/v1"
        return cls(api, api.removesuffix("/v1"))

    @property
    def local(self) -> bool:
        """Whether the server is on this machine, as far as its name tells."""
        return self.unix_socket is not None or urlsplit(self.root).hostname in ("localhost", "127.0.0.1", "::1")

    def __str__(self) -> str:
        return f"{_UNIX}{self.unix_socket}" if self.unix_socket is not None else self.api
