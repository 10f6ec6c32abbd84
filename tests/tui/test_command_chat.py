"""The command: what it refuses, and what it puts together."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.command import Ziggurat
from ziggurat.runtime.errors import InvalidRequestError
from ziggurat.tui import places
from ziggurat.tui.api import HttpBackend
from ziggurat.tui.command_chat import make_parts
from ziggurat.tui.conversation import Conversation, Message
from ziggurat.tui.local import LocalHost
from ziggurat.tui.settings import Settings
from ziggurat.tui.store import Store


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("settings_file", "chats_file", "log_file"):
        monkeypatch.setattr(places, name, lambda name=name: tmp_path / "places" / name)


@pytest.fixture
def ziggurat(capsys: pytest.CaptureFixture[str]) -> Ziggurat:
    return Ziggurat(capsys)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["m.gguf", "--connect", "http://x"], "not both"),
        ([], "needs a terminal"),
        (["--temp", "9"], "--temp"),
        (["--kv-policy", "best"], "--kv-policy"),
    ],
)
def test_refusals(ziggurat: Ziggurat, arguments: list[str], says: str) -> None:
    assert says in ziggurat.fails("chat", *arguments, code=2)


def test_settings_file_is_written_on_request(ziggurat: Ziggurat, tmp_path: Path) -> None:
    path = places.settings_file()
    assert ziggurat("chat", "--write-config") == (0, f"{path}: written\n", "")
    assert "# temperature = " in path.read_text()
    assert "left as it is" in ziggurat("chat", "--write-config")[1]


def test_nothing_named() -> None:
    parts = make_parts(Settings(models=(Path("/models"),)))
    assert parts.backend is None and parts.setup is None
    assert isinstance(parts.host, LocalHost) and parts.host.folders == (Path("/models"),)
    assert parts.store is not None and parts.store.path == places.chats_file()
    parts.store.close()


def test_model_brings_its_folder_and_settings() -> None:
    parts = make_parts(Settings(model=Path("/m/x.gguf"), kv_budget="10%", temperature=0.0, system="hi", save=False))
    assert parts.setup is not None and (parts.setup.path, parts.setup.kv_budget) == (Path("/m/x.gguf"), "10%")
    assert isinstance(parts.host, LocalHost) and parts.host.folders == (Path("/m"),)
    assert parts.session.sampling.temperature == 0.0 and parts.session.conversation.system == "hi"
    assert parts.store is None


def test_server_of_the_settings_gives_way_to_a_model_that_is_named() -> None:
    settings = Settings(model=Path("m.gguf"), connect="localhost:1", save=False)
    parts = make_parts(settings)
    assert isinstance(parts.backend, HttpBackend) and parts.host is None and parts.session.backend is parts.backend
    assert make_parts(settings, prefer_model=True).backend is None


def test_address_that_is_none() -> None:
    with pytest.raises(InvalidRequestError, match="--connect"):
        make_parts(Settings(connect="ftp://x", save=False))


def test_latest_chat_is_gone_on_with() -> None:
    with Store(places.chats_file()) as store:
        store.begin(Conversation(id="c", title="old"))
        store.add("c", Message("1", None, "user", "hello", 0.0))
    parts = make_parts(Settings(), latest=True)
    assert parts.session.conversation.id == "c"
    assert parts.store is not None
    parts.store.close()


def test_store_that_cannot_be_used() -> None:
    places.chats_file().mkdir(parents=True)
    with pytest.raises(InvalidRequestError, match="--no-save"):
        make_parts(Settings())
