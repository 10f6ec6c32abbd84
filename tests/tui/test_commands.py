"""Slash commands: what a text means, and how it can go on."""

from __future__ import annotations

from pathlib import Path

import pytest

from ziggurat.tui.commands import COMMANDS, CommandError, complete, parse
from ziggurat.tui.files import LARGEST_FILE, AttachError, paths, read_attachment


@pytest.mark.parametrize(
    ("text", "name", "argument"),
    [
        ("/help", "help", ""),
        (" /NEW ", "new", ""),
        ("/sys be brief ", "system", "be brief"),
        ("/system two\nlines", "system", "two\nlines"),
        ("/budget 25% snapkv", "budget", "25% snapkv"),
        ("/temp", "temp", ""),
    ],
)
def test_parse(text: str, name: str, argument: str) -> None:
    found = parse(text)
    assert found is not None and (found[0].name, found[1]) == (name, argument)


@pytest.mark.parametrize("text", ["hello", "", "/", "/etc/hosts is a file", "/* comment */", "a /help", "//help"])
def test_what_is_said(text: str) -> None:
    assert parse(text) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("/budgt 4", "did you mean /budget"),
        ("/nonsense", "/help lists them"),
        ("/s", "could be /system or /save"),
        ("/rename", "/rename needs TITLE"),
    ],
)
def test_what_is_no_command(text: str, says: str) -> None:
    with pytest.raises(CommandError, match=says):
        parse(text)


def test_names_are_completed() -> None:
    assert [each.text for each in complete("/ex")] == ["/export "]
    assert [each.text for each in complete("/")] == [
        f"/{each.name} " if each.arguments else f"/{each.name}" for each in COMMANDS
    ]
    assert complete("hello") == [] and complete("/help\n") == []
    assert complete("/te")[0].shown == "/temp [X]" and complete("/te")[0].hint


def test_arguments_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes.md").touch()
    monkeypatch.chdir(tmp_path)
    values = {"theme": lambda: ["dark", "light"]}
    assert [each.text for each in complete("/theme l", values)] == ["/theme light"]
    assert [each.text for each in complete("/export ")] == ["/export md", "/export json"]
    assert [each.text for each in complete("/export md no")] == ["/export md notes.md"]
    assert [each.text for each in complete("/budget 25% sn")] == ["/budget 25% snapkv"]
    assert [each.text for each in complete("/file n")] == ["/file notes.md"]
    assert complete("/new x") == [] and complete("/reread on") == []


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one.txt", "two.txt", ".hidden"):
        (tmp_path / name).touch()
    (tmp_path / "only").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths(f"{tmp_path}/") == [f"{tmp_path}/{name}" for name in ("one.txt", "only/", "two.txt")]
    assert paths("~/on") == ["~/one.txt", "~/only/"]
    assert paths("~/.h") == ["~/.hidden"]
    assert paths(f"{tmp_path}/none/") == []


def test_attachment(tmp_path: Path) -> None:
    path = tmp_path / "a b.py"
    path.write_bytes("\ufeffprint('é')\n".encode())
    for typed in (str(path), f" '{path}' ", f'"{path}"'):
        found = read_attachment(typed)
        assert (found.name, found.text, found.tokens) == ("a b.py", "print('é')\n", None)


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"\xff\xfe", "UTF-8"), (b"a\0b", "not text"), (b"x" * (LARGEST_FILE + 1), "the most to attach")],
    ids=["bytes", "zero", "large"],
)
def test_what_cannot_be_attached(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(AttachError, match=says):
        read_attachment(str(path))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(AttachError, match="no such file"):
        read_attachment(str(tmp_path / "none"))
    with pytest.raises(AttachError, match="no plain file"):
        read_attachment(str(tmp_path))
