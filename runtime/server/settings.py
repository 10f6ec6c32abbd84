"""What can be chosen of the server, as flags, in the environment and in a file."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


def _listed(value: Any) -> Any:
    """One text is a list of what stands between its commas, as the environment has it."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, tuple) else value


Names = Annotated[list[str], NoDecode, BeforeValidator(_listed)]


class ServerSettings(BaseSettings):
    """How the server listens, whom it lets in, and what it allows; times in seconds."""

    model_config = SettingsConfigDict(env_prefix="ZIGGURAT_", extra="forbid", frozen=True, allow_inf_nan=False)

    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    alias: Names = []
    api_key: Names = []
    request_timeout: float | None = Field(default=None, gt=0)
    ping: float = Field(default=15.0, gt=0)
