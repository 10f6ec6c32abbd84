"""A chat template arrives byte for byte, wherever the checkpoint keeps it, and renders as transformers renders it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jinja2
import jinja2.sandbox
import pytest
from gguf import GGUFReader
from transformers import AutoTokenizer

from helpers.vocabularies import KINDS

BODIES = {"llama3": "llama_gqa", "qwen2": "qwen2", "mistral": "mistral", "phi3": "phi3", "gemma": "gemma2"}
IN_A_FILE = {"gemma3": "gemma3"}  # chat_template.jinja instead of an entry of tokenizer_config.json
MESSAGES = [
    {"role": "user", "content": "  How high is it?\n\n"},
    {"role": "assistant", "content": "It's “seven” storeys — 塔 🧱 {{ high }}."},
    {"role": "user", "content": "Thanks!"},
]


def _metadata(path: Path) -> dict[str, object]:
    reader = GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items() if "tokens" not in name}


@pytest.mark.parametrize(("kind", "body"), {**BODIES, **IN_A_FILE}.items())
def test_template(kind: str, body: str, checkpoint: Callable[..., Path], gguf: Callable[[Path, str], Path]) -> None:
    folder = checkpoint(body, tokenizer=kind)
    assert (folder / "chat_template.jinja").exists() == (kind in IN_A_FILE)
    metadata = _metadata(gguf(folder, "f32"))
    template = metadata["tokenizer.chat_template"]
    assert template == KINDS[kind].template

    tokenizer = AutoTokenizer.from_pretrained(folder)
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    rendered = environment.from_string(str(template)).render(
        messages=MESSAGES,
        add_generation_prompt=True,
        bos_token=tokenizer.bos_token or "",
        eos_token=tokenizer.eos_token or "",
    )
    assert rendered == tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("kind", ["llama3", "qwen2", "mistral", "phi3", "gemma"])
def test_tokens_that_frame_a_text(
    kind: str, checkpoint: Callable[..., Path], gguf: Callable[[Path, str], Path]
) -> None:
    folder = checkpoint(BODIES[kind], tokenizer=kind)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    metadata = _metadata(gguf(folder, "f32"))
    assert metadata["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    if tokenizer.bos_token_id is not None:
        assert metadata["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    assert bool(metadata.get("tokenizer.ggml.add_bos_token", False)) == adds_bos


def test_no_template_is_invented(checkpoint: Callable[..., Path], gguf: Callable[[Path, str], Path]) -> None:
    assert "tokenizer.chat_template" not in _metadata(gguf(checkpoint("gpt2"), "f32"))
