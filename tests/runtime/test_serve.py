"""The command: its settings, and what it says. What it serves is tested in ``server/``."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from helpers.command import Ziggurat
from ziggurat.runtime import command_serve
from ziggurat.runtime.engine.settings import EngineSettings
from ziggurat.runtime.server import lifecycle
from ziggurat.runtime.server.phase import Phase
from ziggurat.runtime.server.settings import ServerSettings


class Served:
    """Stands for serving: takes what would be served."""

    app: Any = None
    settings: ServerSettings
    engine: EngineSettings

    def serve(self, load: Any, listen: Any, **_options: Any) -> int:
        self.app = load(Phase(), "http://host:1")
        self.settings = self.app.state.server.settings
        # while the engine is open
        headers = [("Authorization", f"Bearer {key}") for key in self.settings.api_key]
        self.models = [
            model["id"] for model in TestClient(self.app, headers=dict(headers)).get("/v1/models").json()["data"]
        ]
        return 0


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    served = Served()
    monkeypatch.setattr(lifecycle, "serve", served.serve)
    settings = command_serve.serving_settings

    def kept(options: Any) -> EngineSettings:
        served.engine = settings(options)
        return served.engine

    monkeypatch.setattr(command_serve, "serving_settings", kept)
    return served


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ziggurat.runtime.server.logs.log_to_stderr", lambda level: None)


def test_defaults(ziggurat: Ziggurat, served: Served, chat_path: Path) -> None:
    code, out, err = ziggurat("serve", chat_path)
    assert (code, out) == (0, "")
    assert (served.settings.host, served.settings.port) == ("127.0.0.1", 8080)
    assert (served.engine.parallel, served.engine.cached, served.engine.queue_limit) == (4, 0, 64)
    assert served.models == [chat_path.stem]
    planned, told = err.splitlines()
    assert planned.startswith("ziggurat: planned memory ") and "for 4 sequences of 1,024 tokens" in planned
    assert told.endswith("4 requests at a time of 1,024 tokens, at http://host:1/v1")


@pytest.mark.usefixtures("budgets")
def test_with_a_budget_a_sequence_is_kept_beside(ziggurat: Ziggurat, served: Served, chat_path: Path) -> None:
    _, _, err = ziggurat("serve", chat_path, "--kv-budget", "25%", "--parallel", "2")
    assert (served.engine.parallel, served.engine.cached) == (2, 1)
    assert "for 3 sequences" in err
    ziggurat("serve", chat_path, "--kv-budget", "25%", "--cached", "0")
    assert served.engine.cached == 0


def test_options_count_before_the_environment_and_that_before_the_file(
    ziggurat: Ziggurat, served: Served, chat_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(
        f'model = "{chat_path}"\nport = 1\nctx = 64\nubatch = 32\nparallel = 3\nalias = ["a", "b"]\n'
        'api_key = "one"\nrequest_timeout = 1.5\nprompt_lookup = true\nthreads = 1\n'
    )
    monkeypatch.setenv("ZIGGURAT_PORT", "2")
    monkeypatch.setenv("ZIGGURAT_UBATCH", "16")
    monkeypatch.setenv("ZIGGURAT_PARALLEL", "2")
    monkeypatch.setenv("ZIGGURAT_API_KEY", "two, three")
    monkeypatch.setenv("ZIGGURAT_CTX", "")  # empty is not set
    assert ziggurat("serve", "--config", file, "--parallel", 1)[0] == 0
    assert (served.settings.port, served.settings.request_timeout) == (2, 1.5)
    assert served.settings.api_key == ["two", "three"]
    assert served.models == ["a", "b"]
    assert (served.engine.n_ctx, served.engine.n_ubatch, served.engine.parallel) == (64, 16, 1)
    assert served.engine.prompt_lookup


def test_the_file_can_be_named_in_the_environment(
    ziggurat: Ziggurat, served: Served, chat_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "serve.toml"
    file.write_text("parallel = 2\n")
    monkeypatch.setenv("ZIGGURAT_CONFIG", str(file))
    ziggurat("serve", chat_path)
    assert served.engine.parallel == 2


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("prot = 1", "there is no setting prot; did you mean port?"),
        ("config = 'x'", "there is no setting config"),
        ("port = 'x'", "port 'x': "),
        ("port = 70000", "port 70000: "),
        ("ctx = 1.5", "ctx 1.5: "),
        ("parallel = 0", "parallel 0: 0 is not in the range"),
        ("kv_policy = 'best'", "kv_policy 'best': "),
        ("kv_window = 5", "--kv-window: says how to keep a budget"),
        ("alias = [1]", "alias"),
        ("port =", "cannot be read"),
    ],
)
def test_what_is_wrong_in_the_file(
    ziggurat: Ziggurat, served: Served, chat_path: Path, tmp_path: Path, line: str, told: str
) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(line + "\n")
    message = ziggurat.fails("serve", chat_path, "--config", file, code=2)
    assert told in message
    assert served.app is None


def test_what_is_wrong_elsewhere(
    ziggurat: Ziggurat, served: Served, chat_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "MODEL.gguf" in ziggurat.fails("serve", code=2)
    assert "cannot be read" in ziggurat.fails("serve", chat_path, "--config", tmp_path / "none.toml", code=2)
    assert "--grace -1.0: " in ziggurat.fails("serve", chat_path, "--grace", -1, code=2)
    monkeypatch.setenv("ZIGGURAT_KV_SINKS", "many")
    assert "ZIGGURAT_KV_SINKS in the environment" in ziggurat.fails("serve", chat_path, code=2)


def test_keys_are_not_told(ziggurat: Ziggurat, served: Served, chat_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text("api_key = ['hunter', 2]\n")
    message = ziggurat.fails("serve", chat_path, "--config", file)
    assert "api_key" in message and "hunter" not in message


def test_a_model_that_is_missing(ziggurat: Ziggurat, tmp_path: Path) -> None:
    assert "no such file" in ziggurat.fails("serve", tmp_path / "none.gguf", "--port", 0)


def test_a_port_that_is_in_use(ziggurat: Ziggurat, chat_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        message = ziggurat.fails("serve", chat_path, "--port", port)
    assert str(port) in message and "in use" in message


def test_a_draft_model_and_embeddings_are_planned_too(ziggurat: Ziggurat, served: Served, chat_path: Path) -> None:
    def planned(*options: object) -> str:
        return ziggurat("serve", chat_path, "--ctx", 64, *options)[2].splitlines()[0].split(" for ")[0]

    alone = planned()
    assert alone != planned("--draft-model", chat_path)
    assert alone != planned("--pooling", "mean")
    assert served.app.state.server.info.embedding_size
