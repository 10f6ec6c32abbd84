"""What can be chosen of the server; ``serve_settings`` reads it from flags, the environment and a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_settings import NoDecode

from ziggurat.runtime.server.connections import ConnectionLimits
from ziggurat.runtime.server.listen import Listen


def _listed(value: Any) -> Any:
    """One text is a list of what stands between its commas, as the environment has it."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, tuple) else value


Names = Annotated[list[str], NoDecode, BeforeValidator(_listed)]


class ServerSettings(BaseModel):
    """How the server listens, whom it lets in, and what it allows; times in seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    unix_socket: Path | None = None
    socket_mode: str = Field(default="600", pattern="^[0-7]{3}$", description="Permissions of the Unix socket.")
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    alias: Names = []
    api_key: Names = []
    kv_folder: Path | None = Field(default=None, description="Where conversations' rows are kept on request.")
    request_timeout: float | None = Field(default=None, gt=0)
    ping: float = Field(default=15.0, gt=0)
    public_metrics: bool = False
    cors_origin: Names = []
    max_body: int = Field(default=8 * 1024 * 1024, ge=1024, description="Bytes of a request's body.")
    max_requests: int = Field(default=256, ge=1, description="Requests that are answered at a time.")
    max_connections: int = Field(default=512, ge=1)
    head_timeout: float = Field(default=10.0, gt=0, description="For a request's head to arrive.")
    body_timeout: float = Field(default=30.0, gt=0, description="For a request's body to arrive.")
    stall_timeout: float = Field(default=30.0, gt=0, description="For which a client may read nothing of its answer.")
    idle_timeout: float = Field(default=30.0, ge=1, description="For which a connection stays without a request.")
    grace: float = Field(default=30.0, ge=0, description="For running requests to end when the server closes.")

    def listen(self) -> Listen:
        """Return where to listen. Raises InvalidRequestError for TLS files that do not go together."""
        return Listen(
            self.host,
            self.port,
            self.unix_socket,
            int(self.socket_mode, 8),
            self.tls_certificate,
            self.tls_key,
        )

    def connection_limits(self) -> ConnectionLimits:
        """Return what a connection may take."""
        return ConnectionLimits(self.max_connections, self.head_timeout, self.stall_timeout, self.idle_timeout)
