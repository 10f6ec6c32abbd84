"""Checkpoints and their conversions, each made once per session."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from helpers import families
from helpers.plain import fitted_quickly, plain
from ziggurat.converter.pipeline import convert

MakeCheckpoint = Callable[..., Path]
MakeGguf = Callable[[Path, str], Path]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Give the folder of a random checkpoint: a family's name, and options of `families.build`."""
    made: dict[tuple[object, ...], Path] = {}

    def make(name: str, **options: Any) -> Path:
        key = (name, *sorted(options.items()))
        if key not in made:
            made[key] = families.build(name, tmp_path_factory.mktemp(name) / "model", **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> MakeGguf:
    """Give the GGUF of a checkpoint in one type."""
    made: dict[tuple[Path, str], Path] = {}

    def make(folder: Path, type_name: str) -> Path:
        if (folder, type_name) not in made:
            out = tmp_path_factory.mktemp("gguf") / f"{type_name}.gguf"
            with warnings.catch_warnings():
                # upstream's T5 class leaves closing its vocabulary to the garbage collector
                warnings.simplefilter("ignore", ResourceWarning)
                convert(folder, out, plain(type=type_name))
            made[folder, type_name] = out
        return made[folder, type_name]

    return make


@pytest.fixture(scope="module")
def quick_fit() -> Iterator[None]:
    """For tests of whole conversions that do not look at how good the fit is."""
    with fitted_quickly():
        yield


@pytest.fixture
def quiet() -> Iterator[None]:
    """llama.cpp's own quantizer prints pages: nobody listens."""
    callback = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    yield
    llama_cpp.llama_log_set(llama_cpp._logger.llama_log_callback, ctypes.c_void_p(0))
