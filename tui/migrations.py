"""The versions of the chats' database, and how one becomes the next."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

# What stands here never changes once it is released; a new version is a further entry.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE conversation (
            id TEXT PRIMARY KEY,
            title TEXT NOT NULL,
            system TEXT NOT NULL,
            created REAL NOT NULL,
            updated REAL NOT NULL,
            head TEXT,
            pinned INTEGER NOT NULL DEFAULT 0,
            deleted REAL
        )""",
        # a primary key of whole numbers, which VACUUM does not change: the index of the texts refers to it
        """CREATE TABLE message (
            number INTEGER PRIMARY KEY,
            id TEXT NOT NULL UNIQUE,
            conversation TEXT NOT NULL REFERENCES conversation (id) ON DELETE CASCADE,
            parent TEXT,
            role TEXT NOT NULL,
            text TEXT NOT NULL,
            created REAL NOT NULL,
            ending TEXT NOT NULL,
            thought TEXT NOT NULL,
            model TEXT NOT NULL,
            error TEXT,
            more TEXT NOT NULL
        )""",
        "CREATE INDEX message_conversation ON message (conversation, number)",
        """CREATE VIRTUAL TABLE message_text USING fts5 (
            text, content = 'message', content_rowid = 'number', tokenize = 'unicode61 remove_diacritics 2'
        )""",
        """CREATE TRIGGER message_added AFTER INSERT ON message BEGIN
            INSERT INTO message_text (rowid, text) VALUES (new.number, new.text);
        END""",
        """CREATE TRIGGER message_removed AFTER DELETE ON message BEGIN
            INSERT INTO message_text (message_text, rowid, text) VALUES ('delete', old.number, old.text);
        END""",
        """CREATE TRIGGER message_changed AFTER UPDATE OF text ON message BEGIN
            INSERT INTO message_text (message_text, rowid, text) VALUES ('delete', old.number, old.text);
            INSERT INTO message_text (rowid, text) VALUES (new.number, new.text);
        END""",
    ),
)


class TooNewError(Exception):
    """The database is of a version that is not known here."""


def version(database: sqlite3.Connection) -> int:
    """Return the version of a database, 0 for an empty one."""
    found: int = database.execute("PRAGMA user_version").fetchone()[0]
    return found


def migrate(database: sqlite3.Connection, migrations: Sequence[Sequence[str]] = MIGRATIONS) -> None:
    """Bring a database to the newest version, each step whole or not at all. Raises TooNewError and sqlite3.Error.

    The connection must not begin transactions by itself (``isolation_level`` None).
    """
    while (before := version(database)) != len(migrations):
        if before > len(migrations):
            raise TooNewError
        database.execute("BEGIN IMMEDIATE")
        try:
            if version(database) == before:  # else another process was faster
                for statement in migrations[before]:
                    database.execute(statement)
                database.execute(f"PRAGMA user_version = {before + 1}")
            database.execute("COMMIT")
        except BaseException:
            database.execute("ROLLBACK")
            raise
