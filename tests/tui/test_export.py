"""Conversations as files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ziggurat.tui.backend import Usage
from ziggurat.tui.conversation import Attachment, Conversation, Message, title_of
from ziggurat.tui.export import ExportError, as_json, as_markdown, export


@pytest.fixture
def conversation() -> Conversation:
    made = Conversation(id="c", title="Stepped: what/is it?", system="be brief", created=0.0)
    made.add(Message("1", None, "user", "old", 0.0))
    made.add(Message("2", None, "user", "what is it?", 1.0, (Attachment("a.md", "```\nx\n```", 3),)))
    made.add(
        Message(
            "3", "2", "assistant", "a *pyramid*\n", 2.0, thought="hm", model="tiny", usage=Usage(1, 2), ending="length"
        )
    )
    return made


def test_markdown(conversation: Conversation) -> None:
    assert as_markdown(conversation) == (
        "# Stepped: what/is it?\n\n**System:**\n\nbe brief\n\n"
        "## You\n\nAttached: a.md\n\n````\n```\nx\n```\n````\n\nwhat is it?\n\n"
        "## Model (tiny)\n\n<details><summary>Thoughts</summary>\n\nhm\n\n</details>\n\na *pyramid*\n\n"
        "*The answer reached its limit.*\n"
    )


def test_json_has_all_branches(conversation: Conversation) -> None:
    data = json.loads(as_json(conversation))
    assert data["shown"] == ["2", "3"] and [each["id"] for each in data["messages"]] == ["1", "2", "3"]
    assert data["messages"][1]["attachments"] == [{"name": "a.md", "text": "```\nx\n```", "tokens": 3}]
    assert data["messages"][2]["usage"]["generated_tokens"] == 2
    assert data["created"] == "1970-01-01T00:00:00+00:00"


def test_files_get_names_that_are_free(conversation: Conversation, tmp_path: Path) -> None:
    assert export(conversation, "md", folder=tmp_path).name == "stepped-what-is-it.md"
    assert export(conversation, "md", folder=tmp_path).name == "stepped-what-is-it-2.md"
    assert export(Conversation(), "json", folder=tmp_path).name == "chat.json"
    assert len(list(tmp_path.iterdir())) == 3


def test_path_that_was_given(conversation: Conversation, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    assert export(conversation, "md", "out.md", tmp_path) == tmp_path / "out.md"
    assert export(conversation, "md", "'notes'", tmp_path) == tmp_path / "notes" / "stepped-what-is-it.md"
    assert (tmp_path / "out.md").read_text() == as_markdown(conversation)


def test_what_cannot_be_written(conversation: Conversation, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="md or json"):
        export(conversation, "pdf", folder=tmp_path)
    with pytest.raises(ExportError, match="none/out.md: cannot be written"):
        export(conversation, "md", "none/out.md", tmp_path)


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("", ""),
        ("\n\n# Hello  there\nmore", "Hello there"),
        ("word " * 20, "word word word word word word word word word…"),
        ("x" * 60, "x" * 47 + "…"),
    ],
)
def test_titles(text: str, title: str) -> None:
    assert title_of(text) == title
