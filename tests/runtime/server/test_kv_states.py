"""Rows that are kept in the server's folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from helpers.fake_engine import FakeEngine
from ziggurat.runtime.errors import ConversationError, StateFileError, StateMismatchError
from ziggurat.runtime.files import state_file
from ziggurat.runtime.server.app import create_app
from ziggurat.runtime.server.settings import ServerSettings


class Keeping(FakeEngine):
    """Keeps the names of conversations."""

    fails: Exception | None = None

    def save(self, conversation: str, path: str | os.PathLike[str]) -> int:
        if self.fails is not None:
            raise self.fails
        Path(path).write_text(conversation)
        return 5

    def restore(self, conversation: str, path: str | os.PathLike[str]) -> int:
        if self.fails is not None:
            raise self.fails
        assert Path(path).read_text() == conversation
        return 7


def client(engine: FakeEngine, folder: Path | None) -> TestClient:
    return TestClient(create_app(engine, ServerSettings(kv_folder=folder)))


@pytest.mark.parametrize("name", ["c", "a/b", "../../etc/passwd", "x" * 200])
def test_rows_are_kept_and_taken_up(tmp_path: Path, name: str) -> None:
    from urllib.parse import quote

    asked = client(Keeping(), tmp_path)
    path = f"/v1/kv/{quote(name, safe='')}"
    answer = asked.post(f"{path}/save")
    assert (answer.status_code, answer.json()) == (200, {"object": "kv.state", "conversation": name, "n_tokens": 5})
    assert [file.name for file in tmp_path.iterdir()] == [state_file(tmp_path, name).name]
    assert asked.post(f"{path}/restore").json()["n_tokens"] == 7


def test_server_without_a_folder(tmp_path: Path) -> None:
    answer = client(Keeping(), None).post("/v1/kv/c/save")
    assert answer.status_code == 404 and "--kv-folder" in answer.json()["error"]["message"]


def test_nothing_was_kept(tmp_path: Path) -> None:
    answer = client(Keeping(), tmp_path).post("/v1/kv/c/restore")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "state_not_found")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ConversationError("gone"), 404, "conversation_not_found"),
        (StateMismatchError("another model"), 409, "state_mismatch"),
        (StateFileError("damaged"), 409, "state_damaged"),
    ],
)
def test_what_goes_wrong(tmp_path: Path, error: Exception, status: int, code: str) -> None:
    engine = Keeping()
    engine.fails = error
    state_file(tmp_path, "c").touch()
    answer = client(engine, tmp_path).post("/v1/kv/c/restore")
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
