"""The store: what is kept, found, taken back, brought to new versions, and survives the death of the process."""

from __future__ import annotations

import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ziggurat.tui import migrations
from ziggurat.tui.backend import Timings, Usage
from ziggurat.tui.conversation import Attachment, Conversation, Message
from ziggurat.tui.store import Store, StoreError


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "data" / "chats.db", now=Clock())


def message(id: str, parent: str | None, text: str, role: str = "user") -> Message:
    return Message(id, parent, role, text, 5.0)  # type: ignore[arg-type]


def kept(store: Store, id: str, *texts: str, title: str = "") -> Conversation:
    conversation = Conversation(id=id, title=title or id, created=1.0)
    store.begin(conversation)
    for place, text in enumerate(texts):
        said = message(f"{id}{place}", conversation.head, text, "assistant" if place % 2 else "user")
        conversation.add(said)
        store.add(id, said)
    return conversation


def test_conversation_comes_back_as_it_was(store: Store) -> None:
    conversation = kept(store, "c", "hello")
    answer = Message(
        "x",
        "c0",
        "assistant",
        "hi",
        6.0,
        (Attachment("a.txt", "text", 3),),
        "failed",
        "hm",
        "tiny",
        Usage(1, 2, 3),
        Timings(0.1, 2.0, 3.0, kv_bytes=7),
        "lost",
    )
    conversation.add(answer)
    conversation.system = "be brief"
    store.add("c", answer)
    store.change(conversation)
    assert store.open("c") == conversation
    assert store.path is not None
    with Store(store.path) as again:
        assert again.open("c").path() == conversation.path()


def test_branches_and_what_is_shown_come_back(store: Store) -> None:
    conversation = kept(store, "c", "a", "b")
    other = message("z", None, "other")
    conversation.add(other)
    store.add("c", other)
    assert [each.text for each in store.open("c").path()] == ["other"]
    conversation.step("z", 1)
    store.change(conversation)
    found = store.open("c")
    assert [each.text for each in found.path()] == ["a", "b"] and found.siblings("z") == ["c0", "z"]


def test_message_is_taken_anew(store: Store) -> None:
    kept(store, "c", "zebra")
    store.add("c", message("c0", None, "lion"))
    assert store.open("c").messages["c0"].text == "lion"
    assert [each.id for each in store.list("lion")] == ["c"] and store.list("zebra") == []


def test_list_has_pinned_ones_first_then_the_latest(store: Store) -> None:
    for name in "abc":
        kept(store, name, "x", "y")
    store.pin("a", True)
    assert [(each.id, each.messages, each.pinned) for each in store.list()] == [
        ("a", 2, True),
        ("c", 2, False),
        ("b", 2, False),
    ]
    store.pin("a", False)
    assert [each.id for each in store.list(limit=2)] == ["c", "b"] and store.latest() == "c"


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("pyramid", ["b"]),
        ("pyra", ["b"]),
        ("RÉSUMÉ stepped", ["b"]),
        ("resume", ["b"]),
        ("stepped nothing", []),
        ("cooking", ["a"]),
        ('"; DROP TABLE message; --', []),
        ("NEAR(", []),
        ("%", []),
        ("金字塔", ["a"]),
        ("字塔", ["a"]),
    ],
)
def test_search(store: Store, query: str, found: list[str]) -> None:
    kept(store, "a", "soup and 金字塔", title="Cooking")
    kept(store, "b", "what is it?", "a stepped pyramid in a résumé")
    assert [each.id for each in store.list(query)] == found


def test_search_shows_where(store: Store) -> None:
    kept(store, "a", "word " * 50 + "needle\n" + "word " * 50)
    snippet = store.list("needle")[0].snippet
    assert "needle" in snippet and len(snippet) < 120 and "\n" not in snippet


def test_rename(store: Store) -> None:
    kept(store, "a", "x")
    store.rename("a", "other")
    assert store.list()[0].title == "other"


def test_delete_can_be_taken_back_for_a_while(store: Store) -> None:
    kept(store, "a", "x")
    store.delete("a")
    assert store.list() == [] and store.list("x") == [] and store.latest() is None
    store.purge(100.0)
    store.undelete("a")
    assert [each.id for each in store.list()] == ["a"]
    store.delete("a")
    store.purge()
    with pytest.raises(StoreError, match="deleted"):
        store.undelete("a")
    with pytest.raises(StoreError, match="deleted"):
        store.open("a")
    assert store.list("x") == []


def test_inputs_are_told_once_and_latest_first(store: Store) -> None:
    kept(store, "a", "one", "answer", "two", "answer", "one")
    assert store.inputs() == ["one", "two"]


def test_message_whose_parent_got_lost_is_still_there(store: Store) -> None:
    store.begin(Conversation(id="c"))
    store.add("c", message("child", "gone", "x"))
    assert [each.text for each in store.open("c").path()] == ["x"]


def test_text_that_utf8_cannot_write(store: Store) -> None:
    kept(store, "a", "half \ud83d")
    assert store.open("a").path()[0].text == "half ?"


def test_only_the_owner_can_read(store: Store) -> None:
    assert store.path is not None
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(store.path.parent.stat().st_mode) == 0o700


def test_in_memory() -> None:
    with Store(None) as store:
        kept(store, "a", "x")
        assert len(store.list()) == 1


def test_two_at_a_time(store: Store) -> None:
    assert store.path is not None
    with Store(store.path) as other:
        kept(store, "a", "x")
        kept(other, "b", "y")
        assert {each.id for each in store.list()} == {each.id for each in other.list()} == {"a", "b"}


def test_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "chats.db"
    path.write_bytes(b"not a database at all, but long enough to be looked at" * 20)
    with pytest.raises(StoreError, match="move it away"):
        Store(path)


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="--no-save"):
        Store(tmp_path / "file" / "chats.db")


def test_closed_store_says_so(store: Store) -> None:
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.list()


def test_newer_version_is_refused(store: Store) -> None:
    assert store.path is not None
    store.close()
    with sqlite3.connect(store.path) as database:
        database.execute(f"PRAGMA user_version = {len(migrations.MIGRATIONS) + 1}")
    database.close()
    with pytest.raises(StoreError, match="newer"):
        Store(store.path)


def test_older_version_is_brought_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(store, "a", "x")
    store.close()
    new = ("ALTER TABLE conversation ADD COLUMN color TEXT", "UPDATE conversation SET color = 'red'")
    assert store.path is not None
    database = sqlite3.connect(store.path, isolation_level=None)
    migrations.migrate(database, (*migrations.MIGRATIONS, new))
    assert migrations.version(database) == len(migrations.MIGRATIONS) + 1
    assert database.execute("SELECT id, color FROM conversation").fetchall() == [("a", "red")]
    database.close()


def test_migration_that_fails_changes_nothing(store: Store) -> None:
    store.close()
    assert store.path is not None
    database = sqlite3.connect(store.path, isolation_level=None)
    with pytest.raises(sqlite3.OperationalError):
        migrations.migrate(database, (*migrations.MIGRATIONS, ("CREATE TABLE half (x)", "nonsense")))
    assert migrations.version(database) == len(migrations.MIGRATIONS)
    assert database.execute("SELECT count(*) FROM sqlite_master WHERE name = 'half'").fetchone() == (0,)
    database.close()


BUSY = """
import pathlib, sys
from ziggurat.tui.conversation import Conversation, Message
from ziggurat.tui.store import Store

store, number = Store(pathlib.Path(sys.argv[1])), 0
while True:
    conversation = Conversation(title=f"chat {number}")
    store.begin(conversation)
    parent = None
    for turn in range(4):
        message = Message(f"m{number}-{turn}", parent, "user", f"word{number} " * 3000, 0.0)
        store.add(conversation.id, message)
        parent = message.id
        print(message.id, flush=True)
    number += 1
"""


@pytest.mark.parametrize("messages", [1, 6, 43])
def test_death_in_mid_write_loses_nothing_that_was_kept(tmp_path: Path, messages: int) -> None:
    path = tmp_path / "chats.db"
    process = subprocess.Popen([sys.executable, "-c", BUSY, str(path)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        told = [process.stdout.readline().decode().strip() for _ in range(messages)]
    finally:
        process.send_signal(signal.SIGKILL)
        told += process.communicate()[0].decode().split()[:-1]  # the last line may be half of one
    with Store(path) as store:
        found = {each.id: store.open(each.id) for each in store.list(limit=10_000)}
        there = {message for each in found.values() for message in each.messages}
        assert set(told) <= there and len(there) <= len(told) + 2
        for each in found.values():
            path_of = [message.id for message in each.path()]
            assert len(path_of) == len(each.messages), "the head is the last message that was kept"
        assert store.list("word0")
        database = sqlite3.connect(path)
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        database.execute("INSERT INTO message_text (message_text) VALUES ('integrity-check')")
        database.close()


WRITER = """
import asyncio, pathlib, sys
from helpers.fake_backend import Answer, FakeBackend
from ziggurat.tui.session import Session
from ziggurat.tui.store import Store

async def work():
    store = Store(pathlib.Path(sys.argv[1]))
    session = Session(FakeBackend(["finished answer", Answer(["half", " an"], hold=asyncio.Event())]), recorder=store)
    session.send("first question")
    await session.wait()
    seen = asyncio.Event()
    session.listen(lambda event: seen.set() if getattr(event, "text", "") == " an" else None)
    session.send("second question")
    await seen.wait()
    print("half", flush=True)
    await asyncio.sleep(60)

asyncio.run(work())
"""


def test_death_in_mid_answer_loses_only_the_unfinished_answer(tmp_path: Path) -> None:
    path = tmp_path / "chats.db"
    tests = Path(__file__).parents[1]

    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tests)!r})\n{WRITER}", str(path)],
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == b"half\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with Store(path) as store:
        found = store.open(store.list()[0].id)
        assert [each.text for each in found.path()] == ["first question", "finished answer", "second question"]
        assert store.list("finished")[0].messages == 3
        database = sqlite3.connect(path)
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        database.execute("INSERT INTO message_text (message_text) VALUES ('integrity-check')")
        database.close()
