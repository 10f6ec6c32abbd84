"""Gets a checkpoint from the Hugging Face hub, with errors a person can act on."""

from __future__ import annotations

import re
from pathlib import Path

from ziggurat.converter.errors import CheckpointError, HubError

# Everything a conversion reads; nothing that can run code (no *.py, no pickles).
PATTERNS = ["*.json", "*.jinja", "*.safetensors", "*.model", "*.txt", "README.md", "LICENSE*"]

# owner/name as the hub allows it, optionally with a revision behind "@".
HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")


def resolve(model: str | Path) -> Path:
    """The local folder of `model`: itself if it exists, else a snapshot of the hub's `owner/name[@revision]`.

    Raises:
        CheckpointError: neither a path nor a hub id.
        HubError: the hub does not have it, does not give it to you, or cannot be reached.
    """
    path = Path(model)
    if path.exists():
        return path
    match = HUB_ID.fullmatch(str(model))
    if match is None:
        raise CheckpointError(f"{model} does not exist: give a folder in Hugging Face format or a hub id (owner/name)")
    return _download(match["repo"], match["revision"])


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=PATTERNS))
    except hub.GatedRepoError as e:
        raise HubError(f"{repo} is gated: accept its terms on the hub, then `hf auth login` or set HF_TOKEN") from e
    except hub.RevisionNotFoundError as e:
        raise HubError(f"{repo} has no revision {revision}: check the part behind the @") from e
    except hub.RepositoryNotFoundError as e:
        raise HubError(
            f"{repo} is neither a local folder nor a model on the hub that you may read: check the spelling, "
            "or `hf auth login` if it is private"
        ) from e
    except hub.LocalEntryNotFoundError as e:
        raise HubError(
            f"{repo} is not a local folder, and the hub cannot be reached: check the path or the network"
        ) from e
    except (hub.HfHubHTTPError, OSError) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise HubError(
            f"{repo} could not be fetched from the hub ({reason}): try again, finished files are kept"
        ) from e
