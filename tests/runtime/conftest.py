from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import tiny_models
from helpers.command import Ziggurat
from helpers.kv_library import BudgetModel
from helpers.kv_models import Models
from ziggurat.runtime.bindings import Model, kv
from ziggurat.runtime.engine.llama_engine import EngineSettings, LlamaEngine


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def budgets() -> None:
    """For tests of what the library does with KV budgets."""
    if not kv.available():
        pytest.skip("this llama.cpp has no KV budgets")


@pytest.fixture(scope="session")
def spm_path(models: Path) -> Path:
    """A Llama-like model with a SentencePiece vocabulary and no chat template."""
    return tiny_models.write_model(models / "spm.gguf")


@pytest.fixture(scope="session")
def chat_path(models: Path) -> Path:
    """A Llama-like model with byte-level BPE and a ChatML template; its heads of 32 can be quantized."""
    shape = tiny_models.Shape(head_dim=32, n_head=2, n_head_kv=1)
    tokens = tiny_models.bpe_tokens()
    return tiny_models.write_model(models / "chat.gguf", shape, tokens, chat_template=tiny_models.CHATML)


@pytest.fixture(scope="session")
def spm_model(spm_path: Path) -> Iterator[Model]:
    with Model(spm_path) as model:
        yield model


@pytest.fixture(scope="session")
def bpe_model(chat_path: Path) -> Iterator[Model]:
    with Model(chat_path) as model:
        yield model


@pytest.fixture
def engine(spm_path: Path) -> Iterator[LlamaEngine]:
    """A loaded engine over the SentencePiece model, 512 rows, one thread."""
    with LlamaEngine(spm_path, EngineSettings(n_ctx=512, threads=1)) as engine:
        engine.load()
        yield engine


@pytest.fixture
def ziggurat(capsys: pytest.CaptureFixture[str]) -> Ziggurat:
    """The command, in this process."""
    return Ziggurat(capsys)


@pytest.fixture(scope="session")
def kv_files(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """F32 models with heads of every kind, by name, for the KV budgets."""
    return Models(tmp_path_factory.mktemp("kv"))


@pytest.fixture(scope="session")
def kv_model(kv_files: Models) -> Iterator[BudgetModel]:
    """The one with two query heads for each KV head, and three layers."""
    with BudgetModel(kv_files["gqa"]) as model:
        yield model
