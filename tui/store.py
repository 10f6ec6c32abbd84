"""Conversations on disk: SQLite with a write-ahead log, so that what was finished survives the death of the process.

Every call is short and done when it returns. Several chats may use one file at a time.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ziggurat.tui.conversation import Conversation, Message
from ziggurat.tui.migrations import TooNewError, migrate
from ziggurat.tui.records import message_of, message_row
from ziggurat.tui.session_events import RecordError

_WAIT_S = 5.0
_PRAGMAS = ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON", "secure_delete = FAST")
# for which a deleted conversation can be taken back, by this process or another
_UNDO_S = 3600.0

_COLUMNS = "id, conversation, parent, role, text, created, ending, thought, model, error, more"
_LIST = """
    SELECT c.id, c.title, c.updated, c.pinned,
           (SELECT count(*) FROM message AS m WHERE m.conversation = c.id) AS messages
    FROM conversation AS c WHERE c.deleted IS NULL {where}
    ORDER BY c.pinned DESC, c.updated DESC LIMIT ?
"""
_FOUND = """
    SELECT m.conversation, snippet(message_text, 0, '', '', '…', 12) FROM message_text
    JOIN message AS m ON m.number = message_text.rowid
    WHERE message_text MATCH ? ORDER BY rank
"""
_CONTAINING = """
    SELECT conversation, substr(text, max(1, instr(lower(text), lower(?1)) - 20), 80) FROM message
    WHERE instr(lower(text), lower(?1)) > 0 ORDER BY number DESC
"""


class StoreError(RecordError):
    """The database cannot be read or written."""


@dataclass(frozen=True)
class Summary:
    """A conversation in a list. ``updated`` seconds since the epoch; ``snippet`` is what of it a search has found."""

    id: str
    title: str
    updated: float
    messages: int
    pinned: bool
    snippet: str = ""


class Store:
    """Conversations in one file; None for one that is gone when the process ends. Satisfies ``Recorder``.

    ``now`` tells seconds since the epoch. All methods raise StoreError.
    """

    def __init__(self, path: Path | None, *, now: Callable[[], float] = time.time) -> None:
        self.path = path
        self._now = now
        with self._told():
            if path is not None:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # nobody else's business
            self._database = sqlite3.connect(path or ":memory:", timeout=_WAIT_S, isolation_level=None)
        try:
            with self._told():
                for pragma in _PRAGMAS:
                    self._database.execute(f"PRAGMA {pragma}")
                migrate(self._database)
            self.purge(_UNDO_S)
        except BaseException:
            self._database.close()
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._database.close()

    def begin(self, conversation: Conversation) -> None:
        """Keep a conversation, without its messages."""
        with self._changing() as run:
            run(
                "INSERT INTO conversation (id, title, system, created, updated, head) VALUES (?, ?, ?, ?, ?, NULL)"
                " ON CONFLICT (id) DO NOTHING",
                (conversation.id, conversation.title, conversation.system, conversation.created, self._now()),
            )

    def add(self, conversation_id: str, message: Message) -> None:
        """Keep a message, or a newer version of it, as the conversation's head."""
        with self._changing() as run:
            run(
                f"INSERT INTO message ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
                " ON CONFLICT (id) DO UPDATE SET text = excluded.text, ending = excluded.ending,"
                " thought = excluded.thought, error = excluded.error, more = excluded.more",
                message_row(conversation_id, message),
            )
            run(
                "UPDATE conversation SET head = ?, updated = ? WHERE id = ?",
                (message.id, self._now(), conversation_id),
            )

    def change(self, conversation: Conversation) -> None:
        """Keep the title, the system prompt and the head."""
        with self._changing() as run:
            run(
                "UPDATE conversation SET title = ?, system = ?, head = ? WHERE id = ?",
                (conversation.title, conversation.system, conversation.head, conversation.id),
            )

    def list(self, query: str = "", limit: int = 500) -> list[Summary]:
        """Return conversations, pinned ones first, then the latest; with a query those that have all of its words.

        The last word may be the beginning of one. Where no word begins so, texts that contain the query are found, as
        it is needed for languages without spaces.
        """
        query = query.strip()
        with self._told():
            if not query:
                return [_summary(row) for row in self._database.execute(_LIST.format(where=""), (limit,))]
            snippets = self._snippets(query)
            rows = self._database.execute(_LIST.format(where=""), (-1,))
            found = [
                _summary(row, snippets.get(row[0], ""))
                for row in rows
                if row[0] in snippets or query.casefold() in row[1].casefold()
            ]
        return found[:limit]

    def open(self, conversation_id: str) -> Conversation:
        """Return a conversation with all of its branches."""
        with self._told():
            row = self._database.execute(
                "SELECT head, id, title, system, created FROM conversation WHERE id = ?", (conversation_id,)
            ).fetchone()
            if row is None:
                raise StoreError(f"there is no conversation {conversation_id}: it was deleted")
            rows = self._database.execute(
                f"SELECT {_COLUMNS} FROM message WHERE conversation = ? ORDER BY number", (conversation_id,)
            ).fetchall()
        known: set[str] = set()
        messages = [message_of(each, known) for each in rows]
        head, found, title, system, created = row
        return Conversation.of(messages, head=head, id=found, title=title, system=system, created=created)

    def names(self) -> set[str]:
        """Return the names of all conversations, also of deleted ones that can be taken back."""
        with self._told():
            return {row[0] for row in self._database.execute("SELECT id FROM conversation")}

    def latest(self) -> str | None:
        """Return the name of the conversation that something was said in last."""
        with self._told():
            row = self._database.execute(
                "SELECT id FROM conversation WHERE deleted IS NULL ORDER BY updated DESC LIMIT 1"
            ).fetchone()
        return None if row is None else str(row[0])

    def inputs(self, limit: int = 200) -> Sequence[str]:
        """Return what the person said last, the latest first, each text once."""
        with self._told():
            rows = self._database.execute(
                "SELECT text FROM message WHERE role = 'user' AND text != '' GROUP BY text"
                " ORDER BY max(number) DESC LIMIT ?",
                (limit,),
            ).fetchall()
        return [row[0] for row in rows]

    def rename(self, conversation_id: str, title: str) -> None:
        """Give a conversation a title."""
        self._set(conversation_id, "title", title)

    def pin(self, conversation_id: str, pinned: bool) -> None:
        """Have a conversation stand before others, or not."""
        self._set(conversation_id, "pinned", int(pinned))

    def delete(self, conversation_id: str) -> None:
        """Take a conversation out of the list; ``undelete`` brings it back until ``purge``."""
        self._set(conversation_id, "deleted", self._now())

    def undelete(self, conversation_id: str) -> None:
        """Take back a deletion. Raises StoreError when it is too late."""
        self._set(conversation_id, "deleted", None)

    def purge(self, older_than_s: float = 0.0) -> None:
        """Remove for good what was deleted before so many seconds."""
        with self._changing() as run:
            run("DELETE FROM conversation WHERE deleted <= ?", (self._now() - older_than_s,))

    def _set(self, conversation_id: str, column: str, value: Any) -> None:
        with self._changing() as run:
            if not run(f"UPDATE conversation SET {column} = ? WHERE id = ?", (value, conversation_id)).rowcount:
                raise StoreError(f"there is no conversation {conversation_id}: it was deleted")

    def _snippets(self, query: str) -> dict[str, str]:
        """Return what of which conversations a query finds, the best of each."""
        found: dict[str, str] = {}
        words = re.findall(r"\w+", query)
        if words:
            match = " ".join(f'"{word}"' for word in words) + "*"
            for conversation, snippet in self._database.execute(_FOUND, (match,)):
                found.setdefault(conversation, snippet)
        if not found:
            for conversation, snippet in self._database.execute(_CONTAINING, (query,)):
                found.setdefault(conversation, snippet)
        return {conversation: " ".join(snippet.split()) for conversation, snippet in found.items()}

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Callable[[str, tuple[Any, ...]], sqlite3.Cursor]]:
        """Run statements in one transaction."""
        with self._told():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database.execute
                self._database.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._database.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turn what goes wrong into one line with the remedy."""
        where = self.path or "chats in memory"
        try:
            yield
        except TooNewError:
            raise StoreError(f"{where}: was written by a newer version of this program: update it") from None
        except sqlite3.ProgrammingError:
            raise StoreError(f"{where}: is closed") from None
        except sqlite3.Error as error:
            raise StoreError(f"{where}: {_why(error)}") from None
        except OSError as error:
            reason = error.strerror or error
            raise StoreError(f"{where}: cannot be used ({reason}); chat with --no-save, or free it") from None


def _why(error: sqlite3.Error) -> str:
    text = str(error)
    if "no such module" in text:
        return "this Python's SQLite has no full-text search (FTS5): use another build of Python, or --no-save"
    if "not a database" in text or "malformed" in text:
        return "is damaged, or no database: move it away, or chat with --no-save"
    if "locked" in text:
        return "another program keeps it locked: try again, or chat with --no-save"
    if "full" in text:
        return "the disk is full: make room"
    return f"cannot be used ({text}); chat with --no-save, or move it away"


def _summary(row: tuple[Any, ...], snippet: str = "") -> Summary:
    conversation_id, title, updated, pinned, messages = row
    return Summary(conversation_id, title, updated, messages, bool(pinned), snippet)
