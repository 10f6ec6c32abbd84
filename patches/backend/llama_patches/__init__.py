"""Build backend (PEP 517) of the patched llama-cpp-python: fetch, verify, patch, and let upstream's build go on.

Every hook that fails over something a person can mend prints one line and ends with code 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from . import build
from .errors import BuildError
from .settings import ConfigSettings

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_wheel",
]


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except BuildError as error:
        raise SystemExit(f"error: {error}") from None


def get_requires_for_build_wheel(config_settings: ConfigSettings | None = None) -> list[str]:
    """Ask for cmake and ninja, where the machine has none."""
    with _one_line():
        return build.requirements(config_settings)


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: ConfigSettings | None = None) -> str:
    """Write the metadata; nothing is compiled."""
    with _one_line():
        return build.metadata(metadata_directory, config_settings)


def build_wheel(
    wheel_directory: str, config_settings: ConfigSettings | None = None, metadata_directory: str | None = None
) -> str:
    """Build the wheel or take a kept one."""
    with _one_line():
        return build.wheel(wheel_directory, config_settings)


def get_requires_for_build_sdist(config_settings: ConfigSettings | None = None) -> list[str]:
    """Nothing: packing needs the standard library alone."""
    return []


def build_sdist(sdist_directory: str, config_settings: ConfigSettings | None = None) -> str:
    """Pack the patches folder."""
    with _one_line():
        return build.sdist(sdist_directory)


def get_requires_for_build_editable(config_settings: ConfigSettings | None = None) -> list[str]:
    """Refuse before anything is installed for it."""
    raise SystemExit("error: an editable install is not supported: run 'pip install ./patches' without -e")


def build_editable(
    wheel_directory: str, config_settings: ConfigSettings | None = None, metadata_directory: str | None = None
) -> str:
    """Refuse: what is built is upstream's tree, which is gone after the build."""
    raise SystemExit("error: an editable install is not supported: run 'pip install ./patches' without -e")
