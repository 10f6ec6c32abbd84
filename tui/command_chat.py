"""``ziggurat chat``: talk to a model in the terminal."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ziggurat.runtime.errors import InvalidRequestError
from ziggurat.runtime.options import CACHE_TYPES, KV_POLICIES, SectionedCommand, option_group

if TYPE_CHECKING:
    from ziggurat.tui.backend import ModelSetup
    from ziggurat.tui.conversation import Conversation
    from ziggurat.tui.parts import ChatParts
    from ziggurat.tui.settings import Settings
    from ziggurat.tui.store import Store

_KEY = "ZIGGURAT_API_KEY"
_MAX_LOG = 4 * 1024 * 1024

# those of serve, without its defaults: what is not given here may stand in the settings file
_model_options = option_group(
    click.option(
        "--kv-budget",
        metavar="ROWS|N%",
        help="Mean KV rows per layer to keep after a prompt, or a part of it.",
    ),
    click.option("--kv-policy", type=click.Choice(KV_POLICIES), help="Which rows; default with a budget: pyramid."),
    click.option("--ctx", type=click.IntRange(1), metavar="N", help="Tokens of a conversation."),
    click.option("--cache-type-k", type=click.Choice(CACHE_TYPES), help="Type of K rows."),
    click.option("--cache-type-v", type=click.Choice(CACHE_TYPES), help="Type of V rows."),
    click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="CPU threads."),
    click.option("--gpu-layers", type=click.IntRange(0), metavar="N", help="Layers on the GPU."),
    title="Model of this machine (as for serve)",
)

_answer_options = option_group(
    click.option("--system", metavar="TEXT", help="System prompt of new chats."),
    click.option("--temp", "temperature", type=click.FloatRange(0, 5), metavar="X", help="0 takes the likeliest."),
    click.option("--top-k", type=click.IntRange(0), metavar="N"),
    click.option("--top-p", type=click.FloatRange(0, 1), metavar="X"),
    click.option("--min-p", type=click.FloatRange(0, 1), metavar="X"),
    click.option("--seed", type=int, metavar="N"),
    click.option("--max-tokens", "-n", type=click.IntRange(1), metavar="N", help="Of an answer."),
    click.option("--reread", is_flag=True, default=None, help="Read the whole chat at each turn."),
    title="Answers",
)


@click.command(cls=SectionedCommand)
@click.argument("model", type=click.Path(path_type=Path), metavar="[MODEL.gguf]", required=False)
@click.option("--connect", metavar="URL", help=f"Talk to a server instead; its key, if it has one, in {_KEY}.")
@click.option("--model-name", metavar="NAME", help="Which of the server's models; default: its first.")
@click.option("--continue", "latest", is_flag=True, help="Go on with the latest chat.")
@click.option("--theme", metavar="NAME", help="Colours.")
@click.option("--no-save", is_flag=True, help="Keep nothing of what is said.")
@_answer_options
@_model_options
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE.toml", help="Settings file.")
@click.option("--write-config", is_flag=True, help="Write a commented settings file, if there is none, and leave.")
def chat(model: Path | None, connect: str | None, **options: Any) -> int:
    """Talk to the model in MODEL.gguf, in a process of its own, or to any OpenAI-style server.

    Without either, models are chosen in the chat.
    """
    from ziggurat.tui import places
    from ziggurat.tui.settings import read_settings, write_commented

    config = options.pop("config")
    path = config or places.settings_file()
    if options.pop("write_config"):
        made = write_commented(path)
        click.echo(f"{path}: {'written' if made else 'is there already, and was left as it is'}")
        return 0
    if model is not None and connect is not None:
        raise InvalidRequestError("give a model or --connect, not both")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise InvalidRequestError("the chat needs a terminal; ziggurat run answers one prompt without")
    latest, no_save, name = (options.pop(key) for key in ("latest", "no_save", "model_name"))
    given: Mapping[str, Any] = {**options, "model": model, "connect": connect, "save": False if no_save else None}
    settings = read_settings(path, given, must_exist=config is not None)
    parts = make_parts(settings, prefer_model=model is not None, latest=latest, name=name)
    parts.settings_file = path
    return _run(parts)


def make_parts(
    settings: Settings, *, prefer_model: bool = False, latest: bool = False, name: str | None = None
) -> ChatParts:
    """Put together what the app needs; nothing is started yet.

    With both a model and a server in the settings the server is taken, unless the model is preferred. Raises
    ZigguratError for a file or an address that cannot be.
    """
    from ziggurat.tui import places
    from ziggurat.tui.api import Address, HttpBackend
    from ziggurat.tui.backend import BackendError
    from ziggurat.tui.kept_files import KeptFiles
    from ziggurat.tui.local import LocalHost
    from ziggurat.tui.parts import ChatParts
    from ziggurat.tui.session import Session

    log = places.log_file()
    backend: HttpBackend | None = None
    setup: ModelSetup | None = None
    if settings.connect is not None and not prefer_model:
        key = os.environ.get(_KEY) or settings.api_key
        try:
            backend = HttpBackend(Address.parse(settings.connect), api_key=key, model=name)
        except BackendError as error:
            raise InvalidRequestError(f"--connect {error}") from None
    elif settings.model is not None:
        setup = settings.setup(settings.model)
    folders = list(settings.models)
    if settings.model is not None and settings.model.absolute().parent not in folders:
        folders.append(settings.model.absolute().parent)
    store = _store(settings)
    session = Session(
        backend,
        conversation=_conversation(settings, store, latest=latest),
        recorder=store,
        sampling=settings.sampling(),
        reread=settings.reread,
    )
    kept: KeptFiles | None = None
    if store is not None:
        kept = KeptFiles(places.rows_folder())
        kept.keep_only(store.names())
    host = None if backend is not None else LocalHost(folders, log, kept=kept)
    return ChatParts(session, backend, host, store, settings, log, setup)


def _store(settings: Settings) -> Store | None:
    from ziggurat.tui import places
    from ziggurat.tui.store import Store, StoreError

    if not settings.save:
        return None
    try:
        return Store(places.chats_file())
    except StoreError as error:
        raise InvalidRequestError(str(error)) from None


def _conversation(settings: Settings, store: Store | None, *, latest: bool) -> Conversation:
    from ziggurat.tui.conversation import Conversation

    found = store.latest() if latest and store is not None else None
    return Conversation(system=settings.system) if store is None or found is None else store.open(found)


def _run(parts: ChatParts) -> int:
    from ziggurat.tui.app import ChatApp
    from ziggurat.tui.collector import spare_the_screen

    assert parts.log_file is not None
    _log_to(parts.log_file)
    try:
        app = ChatApp(parts)
        spare_the_screen()
        app.run()
        return app.return_code or 0
    finally:
        if parts.store is not None:
            parts.store.close()


def _log_to(path: Path) -> None:
    """Write warnings of this process beside what servers say: the screen has no place for them."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > _MAX_LOG:
            path.replace(path.with_suffix(".old"))
        handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    except OSError:
        return
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
