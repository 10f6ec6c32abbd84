"""Where the chat keeps its files, as the platform has it."""

from __future__ import annotations

from pathlib import Path

_NAME = "ziggurat"


def settings_file() -> Path:
    """Return the settings file, ``~/.config/ziggurat/chat.toml`` on Linux."""
    import platformdirs

    return platformdirs.user_config_path(_NAME, appauthor=False) / "chat.toml"


def chats_file() -> Path:
    """Return the database of conversations, ``~/.local/share/ziggurat/chats.db`` on Linux."""
    import platformdirs

    return platformdirs.user_data_path(_NAME, appauthor=False) / "chats.db"


def rows_folder() -> Path:
    """Return the folder in which the engine's rows of conversations are kept, beside the database."""
    return chats_file().parent / "rows"


def log_file() -> Path:
    """Return the log of the chat and of servers that it starts, ``~/.local/state/ziggurat/log/chat.log`` on Linux."""
    import platformdirs

    return platformdirs.user_log_path(_NAME, appauthor=False) / "chat.log"
