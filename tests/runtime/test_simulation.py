from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers import hollow_models, tiny_models
from helpers.hollow_models import Dims
from ziggurat.runtime import bindings
from ziggurat.runtime.bindings import Context, ContextSettings, Model, Simulation, library, measure
from ziggurat.runtime.errors import ContextError, LibraryError, ModelLoadError


def test_the_other_process_says_what_this_one_would(spm_path: Path) -> None:
    settings = [ContextSettings(n_ctx=512), ContextSettings(n_ctx=3000, n_seq_max=3, type_k="bf16")]
    with Simulation(spm_path) as simulation:
        answers = [simulation.breakdown(each) for each in settings]
    for each, answer in zip(settings, answers, strict=True):
        with Model(spm_path, simulated=True) as model, Context(model, each) as context:
            assert measure(context) == answer
    assert {buffer.device for buffer in answers[0]} == {"CPU"}


def test_a_refused_context_leaves_the_simulation_usable(spm_path: Path) -> None:
    with Simulation(spm_path) as simulation:
        with pytest.raises(ContextError, match="n_seq_max must be <= 256"):
            simulation.breakdown(ContextSettings(n_ctx=256, n_seq_max=257))
        assert simulation.breakdown(ContextSettings(n_ctx=256))
    simulation.close()


def test_an_abort_of_the_library_is_an_error_with_its_words(tmp_path: Path) -> None:
    # llama.cpp checks that KV heads divide the query heads only by an assertion
    path = hollow_models.write_model(tmp_path / "m.gguf", Dims(n_head=8, n_head_kv=3))
    with Simulation(path) as simulation:
        with pytest.raises(ModelLoadError, match=r"m\.gguf: .*GGML_ASSERT.*failed"):
            simulation.breakdown(ContextSettings(n_ctx=256))
        with pytest.raises(ModelLoadError, match="GGML_ASSERT"):  # it stays ended
            simulation.breakdown(ContextSettings(n_ctx=256))


@pytest.mark.parametrize("content", [b"", b"no model at all", b"GGUF\x03\0\0\0"])
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"m\.gguf") as caught:
        Simulation(path)
    assert "\n" not in str(caught.value)


def test_weights_missing_from_the_file_are_noticed(tmp_path: Path) -> None:
    path = tiny_models.write_model(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelLoadError, match="corrupted or incomplete"):
        Simulation(path)


def test_a_simulated_context_does_not_compute(spm_path: Path) -> None:
    with Model(spm_path, simulated=True) as model, Context(model, ContextSettings(n_ctx=256)) as context:
        batch = context.new_batch()
        batch.add([1], 0, 0, output_last=True)
        with pytest.raises(ContextError, match="to be measured"):
            context.decode(batch)


def test_a_stock_library_cannot_be_asked(spm_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Model(spm_path) as model, Context(model, ContextSettings(n_ctx=256)) as context:
        monkeypatch.setattr(library, "api", lambda: SimpleNamespace(_lib=object()))
        assert not bindings.can_measure()
        with pytest.raises(LibraryError, match="patched library"):
            measure(context)

    def missing() -> None:
        raise LibraryError("not installed")

    monkeypatch.setattr(library, "api", missing)
    assert not bindings.can_measure()
