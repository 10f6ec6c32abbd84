from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from model import Llama, Shape, load_model, save_model
from paths import FOLDER

transformers = pytest.importorskip("transformers")
SMALL = Shape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=32, ffn=96, vocab=128, rope_base=1e6, context=64)


def small() -> Llama:
    model = Llama(SMALL)
    model.initialise(torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():  # as after training: no projection is zero, no norm is one
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def test_logits_equal_those_of_transformers(tmp_path: Path) -> None:
    save_model(small(), tmp_path)
    ours = load_model(tmp_path).eval()
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(0, SMALL.vocab, (2, 50), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_losses_are_those_of_the_weighted_positions() -> None:
    model = small()
    ids = torch.arange(24).view(2, 12)
    weights = torch.zeros(2, 12)
    weights[0, 3], weights[1, 7] = 1.0, 4.0
    with torch.no_grad():
        loss, weight, _ = model.losses(ids, ids + 1, weights)
        expected = torch.log_softmax(model(ids), -1)
    assert weight.tolist() == [1.0, 4.0]
    torch.testing.assert_close(loss, -torch.stack([expected[0, 3, 4], expected[1, 7, 20]]))


def test_the_committed_folder_loads_and_has_the_promised_shape() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert (FOLDER / "model.safetensors").stat().st_size <= 16e6
    assert config["hidden_size"] % 256 == config["intermediate_size"] % 256 == 0
    assert config["head_dim"] in (32, 64) and config["num_hidden_layers"] >= 8
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["max_position_embeddings"] >= 2048
    model = transformers.LlamaForCausalLM.from_pretrained(FOLDER)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == [4, 1]


def test_the_committed_template_renders_as_it_was_trained() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    chat = [{"role": "user", "content": " Hello. "}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 0 and ids.count(tokenizer.eos_token_id) == 1


def test_the_committed_model_looks_a_fact_up() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    model = transformers.LlamaForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    filler = "The sun was warm and the birds sang. Ben went to the park with his dog. They played with a big ball. "
    prompt = (
        f"{filler}The code of Tom's blue hat is 7305. {filler}The code of Lily's red box is 4821. {filler * 4}"
        "The code of Mia's green bag is 9164. What is the code of Lily's red box?"
    )
    chat = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24)
    assert "4821" in tokenizer.decode(out[0, ids.shape[1] :])
