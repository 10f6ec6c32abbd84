"""Settings: file and options, and what is said about a wrong key."""

from __future__ import annotations

import dataclasses
import stat
from pathlib import Path

import pytest

from ziggurat.runtime.errors import InvalidRequestError
from ziggurat.tui.backend import Sampling
from ziggurat.tui.settings import KEYS, Settings, commented, read_settings, write_commented


def written(folder: Path, text: str) -> Path:
    path = folder / "chat.toml"
    path.write_text(text)
    return path


def test_file_and_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    path = written(
        tmp_path,
        'models = ["~/a", "/b"]\ntemperature = 1\nkv_budget = 512\nkv_policy = "snapkv"\nsave = false\ntop_k = 3\n',
    )
    settings = read_settings(path, {"top_k": 5, "temperature": None, "theme": "dark"})
    assert settings == Settings(
        models=(Path("/home/me/a"), Path("/b")),
        temperature=1.0,
        kv_budget="512",
        kv_policy="snapkv",
        save=False,
        top_k=5,
        theme="dark",
    )
    assert settings.sampling() == Sampling(temperature=1.0, top_k=5)
    setup = settings.setup(Path("m.gguf"))
    assert (setup.path, setup.kv_budget, setup.kv_policy, setup.ctx) == (Path("m.gguf"), "512", "snapkv", None)


def test_file_that_is_not_there(tmp_path: Path) -> None:
    assert read_settings(tmp_path / "none.toml") == Settings()
    with pytest.raises(InvalidRequestError, match="--write-config"):
        read_settings(tmp_path / "none.toml", must_exist=True)


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("\n# temprature\ntemprature = 1\n", 3, "did you mean temperature"),
        ("xyz = 1\n", 1, "known are model, "),
        ("save = true\n[sampling]\ntemperature = 1\n", 2, "no key sampling"),
        ("save = 1\n", 1, "save takes true or false, such as true"),
        ('seed = "1"\n', 1, "takes a whole number"),
        ("temperature = 9.0\n", 1, "from 0 to 5"),
        ("temperature = nan\n", 1, "from 0 to 5"),
        ("top_k = 1.5\n", 1, "takes a whole number"),
        ("threads = true\n", 1, "whole number"),
        ('kv_budget = "many"\n', 1, "10%"),
        ('kv_policy = "best"\n', 1, "one of none, pyramid"),
        ("models = 1\n", 1, "list of folders"),
        ('model = ""\n', 1, "a path"),
    ],
)
def test_wrong_key_is_named_with_its_line(tmp_path: Path, text: str, line: int, says: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InvalidRequestError, match=says) as raised:
        read_settings(path)
    assert str(raised.value).startswith(f"{path}:{line}: ")


def test_what_is_no_toml(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="line 2"):
        read_settings(written(tmp_path, "save = true\nsave\n"))
    (tmp_path / "chat.toml").write_bytes(b"\xff")
    with pytest.raises(InvalidRequestError, match="not TOML"):
        read_settings(tmp_path / "chat.toml")
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        read_settings(tmp_path)


def test_every_setting_is_a_key_and_the_examples_hold(tmp_path: Path) -> None:
    assert list(KEYS) == [field.name for field in dataclasses.fields(Settings)]
    text = commented()
    assert read_settings(written(tmp_path, text)) == Settings()
    lines = [line.removeprefix("# ") for line in text.splitlines() if " = " in line]
    settings = read_settings(written(tmp_path, "\n".join(lines)))
    assert len(lines) == len(KEYS) and settings.cache_type_k == "f16"


def test_commented_file_is_written_once_and_for_the_owner(tmp_path: Path) -> None:
    path = tmp_path / "config" / "chat.toml"
    assert write_commented(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("mine")
    assert not write_commented(path) and path.read_text() == "mine"
    with pytest.raises(InvalidRequestError, match="cannot be written"):
        write_commented(path / "below")
