from __future__ import annotations

import struct
import time
from pathlib import Path

import gguf
import pytest

from helpers import tiny_models
from ziggurat.runtime.errors import ModelFileError
from ziggurat.runtime.gguf_file import read_gguf


def test_fields_and_tensors_agree_with_the_gguf_package(chat_path: Path) -> None:
    ours, theirs = read_gguf(chat_path), gguf.GGUFReader(chat_path)
    assert {t.name: (t.shape, t.type, t.n_elements, t.n_bytes) for t in ours.tensors} == {
        t.name: (tuple(int(n) for n in t.shape), t.tensor_type.name, t.n_elements, t.n_bytes) for t in theirs.tensors
    }
    for name, field in theirs.fields.items():
        if not name.startswith("GGUF."):
            value = ours.scalar(name)
            assert (ours.array(name) if value is None else value) == field.contents()
    assert ours.architecture == "llama"
    assert ours.n_bytes == chat_path.stat().st_size


def test_a_large_vocabulary_is_skipped_not_decoded(tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    texts = [f"token{index}" for index in range(128_000)]
    writer.add_token_list(texts)
    writer.add_token_merges([f"a{index} b" for index in range(280_000)])
    writer.add_token_scores([0.0] * len(texts))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    started = time.perf_counter()
    file = read_gguf(path)
    seconds = time.perf_counter() - started
    assert seconds < 1.5  # measured: 0.05 s; the gguf package's own reader takes seconds
    assert file.fields["tokenizer.ggml.tokens"].length == len(texts)  # type: ignore[union-attr]
    assert file.array("tokenizer.ggml.tokens") == texts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04" + bytes(60), "is not a GGUF file"),
        (b"GG", "is not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(60), "GGUF version 1"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(60), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1), "truncated inside the metadata"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**63) + b"x", "truncated inside the metadata"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 99), "unknown metadata type 99"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 8, 2**60), "truncated inside"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 4, 2**62), "truncated inside"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<IQIQ", 1, 32, 77, 0), "unknown type 77"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<IQIQ", 1, 31, 2, 0), "no multiple of Q4_0"),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=message) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_truncation_is_noticed(spm_path: Path, tmp_path: Path) -> None:
    content = spm_path.read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [*range(1, 400, 7), len(content) // 2, len(content) - 64]:
        path.write_bytes(content[:size])
        with pytest.raises(ModelFileError):
            read_gguf(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no such file"):
        read_gguf(tmp_path / "none.gguf")
    with pytest.raises(ModelFileError, match="is a folder"):
        read_gguf(tmp_path)


def test_a_split_model_is_read_as_one(tmp_path: Path) -> None:
    tiny_models.write_split_model(tmp_path)
    whole = read_gguf(tmp_path / "m-00001-of-00002.gguf")
    assert [tensor.name for tensor in whole.tensors] == ["t1", "t2"]
    assert whole.n_params == 128
    with pytest.raises(ModelFileError, match="first part"):
        read_gguf(tmp_path / "m-00002-of-00002.gguf")
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(ModelFileError, match="no such file"):
        read_gguf(tmp_path / "m-00001-of-00002.gguf")


def test_nothing_of_a_tiny_model_is_unknown(tmp_path: Path) -> None:
    file = read_gguf(tiny_models.write_model(tmp_path / "m.gguf", tiny_models.Shape(n_layer=1)))
    assert file.weights_bytes == file.n_params * 4
    assert file.integer("llama.block_count") == 1
    assert file.text("llama.block_count") is None
    assert file.array("general.name") is None
