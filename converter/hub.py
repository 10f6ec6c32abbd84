"""Gets a checkpoint from the Hugging Face hub, with errors a person can act on."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from ziggurat.converter.errors import CheckpointError, HubError, LibraryError

logger = logging.getLogger(__name__)

# Everything a conversion reads; nothing that can run code (no *.py, no pickles). The weights only under the name that
# transformers gives them: many repositories hold a second copy in their vendor's format (consolidated*, original/*).
WEIGHTS = "model*.safetensors"
PATTERNS = ["*.json", "*.jinja", WEIGHTS, "*.model", "*.txt", "README.md", "LICENSE*"]

# owner/name as the hub allows it, optionally with a revision behind "@".
HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/(?P<name>[A-Za-z0-9][\w.-]*))(@(?P<revision>[\w./-]+))?")


def resolve(model: str | Path) -> Path:
    """The local folder of `model`: itself if it exists, else a snapshot of the hub's `owner/name[@revision]`.

    Raises:
        CheckpointError: neither a path nor a hub id.
        HubError: the hub does not have it, does not give it to you, or cannot be reached.
        LibraryError: huggingface_hub is not installed.
    """
    path = Path(model)
    try:
        if path.exists():
            return path
    except OSError as e:  # a name that is too long, a folder that is closed
        raise CheckpointError(f"{model} cannot be opened ({e.strerror}): check the path") from e
    match = HUB_ID.fullmatch(str(model))
    if match is None:
        raise CheckpointError(f"{model} does not exist: give a folder in Hugging Face format or a hub id (owner/name)")
    return _download(match["repo"], match["revision"])


def called(model: str | Path) -> str:
    """What people call the model: the folder's name or the repository's, whose snapshots are named by commit."""
    match = HUB_ID.fullmatch(str(model))
    name = match["name"] if match is not None and not Path(model).exists() else Path(os.path.abspath(model)).name
    return name.encode(errors="replace").decode()  # a folder's name may be no text, the one in a GGUF has to be


def _download(repo: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils.tqdm import tqdm
    except ImportError as e:
        raise LibraryError(f"{e.name} is not installed: `pip install 'ziggurat[convert]'`") from e

    class Bar(tqdm):
        """The hub's progress bar, on a terminal only."""

        def __init__(self, *args: object, **kwargs: object) -> None:
            kwargs.setdefault("disable", None)
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]

    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=PATTERNS, tqdm_class=Bar))
    except Exception as e:  # its HTTP library, and so what it raises, differs between versions of huggingface_hub
        logger.debug("the download failed", exc_info=True)
        raise _explained(e, repo, revision) from e
    if not any(folder.glob(WEIGHTS)):
        raise HubError(f"{repo} has no weights in safetensors form ({WEIGHTS}): choose another repository or revision")
    return folder


def _explained(error: Exception, repo: str, revision: str | None) -> HubError:
    """Our error for what `snapshot_download` raised: what happened, and what to do."""
    from huggingface_hub import errors as hub

    # It answers most failures by looking into its cache, and tells that this failed; the reason is what led there.
    cause = error.__cause__ if isinstance(error, hub.LocalEntryNotFoundError) and error.__cause__ else error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(cause, hub.HFValidationError):
        return HubError(f"{repo} is neither a local folder nor a valid hub id (owner/name): check the spelling")
    if isinstance(cause, hub.GatedRepoError):
        return HubError(f"{repo} is gated: accept its terms on the hub, then `hf auth login` or set HF_TOKEN")
    if isinstance(cause, hub.RevisionNotFoundError):
        return HubError(f"{repo} has no revision {revision}: check the part behind the @")
    if isinstance(cause, hub.RepositoryNotFoundError):
        return HubError(
            f"{repo} is neither a local folder nor a model on the hub that you may read: check the spelling, "
            "or `hf auth login` if it is private"
        )
    if status == 401:
        return HubError(f"the hub does not accept your access token for {repo}: `hf auth login`, or mend HF_TOKEN")
    if isinstance(cause, hub.DisabledRepoError) or status == 403:
        return HubError(f"the hub does not give {repo} to you: look at its page there for the reason")
    if isinstance(cause, hub.OfflineModeIsEnabled):
        return HubError(f"{repo} is not a local folder nor complete in the hub's cache, and HF_HUB_OFFLINE is set")
    if isinstance(cause, OSError) and status is None and cause.errno is not None and cause.strerror:
        return HubError(f"{repo} cannot be stored in the hub's cache ({cause.strerror}): HF_HOME names another place")
    if error is not cause and status is None:
        return HubError(f"{repo} is not a local folder, and the hub cannot be reached: check the path or the network")
    reason = f"it answers with error {status}" if status else _first_line(cause)
    return HubError(f"{repo} could not be fetched from the hub ({reason}): try again, finished files are kept")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
