"""Models by their hub id: from a small server on this machine that speaks the hub's protocol."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from click.testing import CliRunner
from gguf import GGUFReader

from helpers.hub_server import ERRORS, Hub, Repository, serve
from helpers.plain import PLAIN_FLAGS
from ziggurat.converter import hub as hub_module
from ziggurat.converter.cli import convert
from ziggurat.converter.errors import HubError

NEEDED = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def folder(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository as they are: a model card, and files beside those that a conversion needs."""
    folder = Path(shutil.copytree(checkpoint("llama_gqa"), tmp_path_factory.mktemp("hub") / "files"))
    for name in ("modeling_own.py", "pytorch_model.bin", "consolidated.safetensors", "original/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not for us")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A tower\n")
    return folder


@pytest.fixture(scope="module")
def other_revision(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = Path(shutil.copytree(folder, tmp_path_factory.mktemp("hub") / "older"))
    (copy / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A smaller tower\n")
    return copy


@pytest.fixture(scope="module")
def server(folder: Path, other_revision: Path) -> Iterator[Hub]:
    with serve() as hub:
        hub.repositories["ur/Tower-1B-Instruct"] = Repository({"main": folder, "older": other_revision})
        hub.repositories["ur/cut"] = Repository({"main": folder}, cut={"model.safetensors": 100_000})
        for error in ERRORS:
            hub.repositories[f"ur/{error}"] = Repository({"main": folder}, error=error)
        yield hub


def point_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = huggingface_hub.constants
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.split("/", 3)[3]
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{url}/{template}")


@pytest.fixture
def hub(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Point this process at the server. huggingface_hub reads its environment once, into these constants."""
    server.requests.clear()
    server.failing.clear()
    server.tokens.clear()
    point_at(server.url, monkeypatch)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # it waits between attempts
    return server


def run(hub: Hub, tmp_path: Path, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as people run it, with nothing but the environment to tell it where the hub is."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TQDM"))}
    return subprocess.run(
        [sys.executable, "-m", "ziggurat.converter", *args, *PLAIN_FLAGS],
        env={**inherited, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )


def general(path: Path) -> dict[str, object]:
    return {k: f.contents() for k, f in GGUFReader(path).fields.items() if k.startswith("general.")}


def test_a_repository(hub: Hub, tmp_path: Path, folder: Path, gguf: Callable[[Path, str], Path]) -> None:
    result = run(hub, tmp_path, "ur/Tower-1B-Instruct", "out.gguf", HF_TOKEN="hf_secret")
    assert result.returncode == 0
    assert result.stdout == ""
    # an estimate, the table, the result: no progress bar and no advice of the libraries
    lines = result.stderr.splitlines()
    assert lines[0].startswith("llama, ") and lines[1].startswith("type ")
    assert lines[-1].startswith("out.gguf: Tower 1B Instruct, q4_k_m")
    assert not any(re.search(r"it/s|hf_secret|http", line) for line in lines)
    assert hub.files == NEEDED | {"README.md"}
    assert "Bearer hf_secret" in hub.tokens
    # nothing else is told to the hub than which files are wanted
    assert all(re.match(r"/(api/models/)?ur/Tower-1B-Instruct(/|$)", path) for _, path in hub.requests)

    metadata = general(tmp_path / "out.gguf")
    assert metadata["general.name"] == "Tower 1B Instruct"
    assert metadata["general.basename"] == "Tower"
    assert metadata["general.license"] == "mit"
    local = gguf(folder, "q4_k_m")
    for mine, wanted in zip(GGUFReader(tmp_path / "out.gguf").tensors, GGUFReader(local).tensors, strict=True):
        assert mine.name == wanted.name and mine.data.tobytes() == wanted.data.tobytes()


def test_a_revision_is_fetched_once(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "ur/Tower-1B-Instruct@older"
    for out in ("first.gguf", "second.gguf"):
        hub.requests.clear()
        result = CliRunner().invoke(convert, [name, str(tmp_path / out), "--type", "bf16"])
        assert result.exit_code == 0, result.output
    assert general(tmp_path / "first.gguf")["general.license"] == "apache-2.0"
    assert hub.files == set()
    # and without the hub
    hub.requests.clear()
    point_at(f"http://127.0.0.1:{free_port()}", monkeypatch)
    assert hub_module.resolve(name).is_dir()


def test_a_commit_names_a_revision(hub: Hub) -> None:
    commit = hub.repositories["ur/Tower-1B-Instruct"].commit("older")
    assert hub_module.resolve(f"ur/Tower-1B-Instruct@{commit}").name == commit


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def refused(tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, *words: str) -> None:
    """One line, told once, on the command's own channel."""
    result = CliRunner().invoke(convert, [name, str(tmp_path / "out.gguf")])
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("convert: error: ")
    for word in (name.partition("@")[0], *words):
        assert word in line
    assert result.stdout == "" and capfd.readouterr() == ("", "")
    assert not list(tmp_path.glob("*out.gguf*"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ur/unknown", ("neither a local folder nor a model on the hub", "spelling")),
        ("nobody/nothing", ("neither a local folder nor a model on the hub",)),
        ("ur/private", ("hf auth login",)),
        ("ur/gated", ("is gated", "accept its terms", "HF_TOKEN")),
        ("ur/bad-token", ("access token", "HF_TOKEN")),
        ("ur/disabled", ("does not give",)),
        ("ur/down", ("error 500", "try again")),
        ("ur/cut", ("error 500", "try again, finished files are kept")),
        ("ur/Tower-1B-Instruct@newer", ("no revision newer",)),
        ("ur/Tower--1B", ("valid hub id",)),
    ],
)
def test_refusals(hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, words: list[str]) -> None:
    refused(tmp_path, capfd, name, *words)


def test_nobody_answers(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    point_at(f"http://127.0.0.1:{free_port()}", monkeypatch)
    refused(tmp_path, capfd, "ur/Tower-1B-Instruct", "cannot be reached")


def test_offline_mode(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(tmp_path, capfd, "ur/Tower-1B-Instruct", "HF_HUB_OFFLINE is set")
    assert hub.requests == []


def test_a_download_that_was_cut_goes_on(hub: Hub, tmp_path: Path, folder: Path) -> None:
    with pytest.raises(HubError):
        hub_module.resolve("ur/cut")
    hub.failing.clear()
    del hub.repositories["ur/cut"].cut["model.safetensors"]
    try:
        fetched = hub_module.resolve("ur/cut")
        assert (fetched / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    finally:
        hub.repositories["ur/cut"].cut["model.safetensors"] = 100_000


def test_a_repository_without_safetensors(hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = tmp_path / "files"
    files.mkdir()
    (files / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (files / "pytorch_model.bin").write_bytes(b"pickle")
    hub.repositories["ur/pickled"] = Repository({"main": files})
    refused(tmp_path, capfd, "ur/pickled", "no weights in safetensors form")


def test_a_cache_that_cannot_be_written(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "/proc/cache")
    refused(tmp_path, capfd, "ur/Tower-1B-Instruct", "cache", "HF_HOME")


@pytest.mark.parametrize("name", ["tower.hf", "./ur/tower", "/ur/tower", "a/b/c", "ur/", "ur/to wer"])
def test_what_is_no_hub_id_is_never_asked_for(
    hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    refused(tmp_path, capfd, name, "does not exist")
    assert hub.requests == []


def test_a_folder_comes_first(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ur" / "Tower-1B-Instruct").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_module.resolve("ur/Tower-1B-Instruct") == Path("ur/Tower-1B-Instruct")
    assert hub_module.called("ur/Tower-1B-Instruct@older") == "Tower-1B-Instruct"
    assert hub_module.called(".") == tmp_path.name and hub_module.called("ur/..") == tmp_path.name
    assert hub.requests == []
