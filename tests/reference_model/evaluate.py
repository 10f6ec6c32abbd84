"""Measure a model folder: retrieval at several lengths, and perplexity on the held-out part of the texts.

usage: evaluate.py --texts DIR [--model FOLDER] [--lengths 256,512,...] [--trials N] [--json FILE]

Uses transformers, so that it measures what others will load. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from data import DIALOGUES, OTHERS, STORIES, Corpus, parse_dialogues, read_text
from notebooks import Encoder
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM
from trials import draw_trials
from vocabulary import BOS, load_tokenizer

ANSWER_TOKENS = 24
WINDOW = 1024  # tokens per window of the perplexity, without overlap


def load(folder: Path, device: str, dtype: str) -> Any:
    """The model of a folder, in float32 (exact, slower) or bfloat16 (as stored)."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()


@torch.no_grad()
def answers(model: Any, prompts: Sequence[Sequence[int]], tokenizer: Tokenizer, batch_tokens: int) -> list[str]:
    """What the model answers greedily. Prompts of one length share a batch, so that none is padded."""
    said = [""] * len(prompts)
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    for length, indices in by_length.items():
        size = max(1, batch_tokens // length)
        for at in range(0, len(indices), size):
            some = indices[at : at + size]
            ids = torch.tensor([list(prompts[i]) for i in some], device=model.device)
            every = torch.ones_like(ids)
            out = model.generate(ids, attention_mask=every, max_new_tokens=ANSWER_TOKENS, do_sample=False)
            for index, row in zip(some, out[:, length:].tolist(), strict=True):
                said[index] = tokenizer.decode(row, skip_special_tokens=True)
    return said


def retrieval(
    model: Any, tokenizer: Tokenizer, held_out: Corpus, length: int, options: argparse.Namespace
) -> dict[str, float]:
    """Share of the answers whose first number is exactly the code asked for, and facts per text."""
    count = options.trials
    trials = draw_trials(Encoder(tokenizer), held_out, length, count, options.seed, options.facts, options.alike)
    said = answers(model, [trial.prompt for trial in trials], tokenizer, batch_tokens=16384)
    right = 0
    for trial, answer in zip(trials, said, strict=True):
        number = re.search(r"\d+", answer)
        right += number is not None and number.group() == trial.fact.code
    stated = tokenizer.decode(trials[0].prompt).count("The code of")
    return {"accuracy": right / count, "trials": count, "facts": stated}


@torch.no_grad()
def perplexity(model: Any, tokenizer: Tokenizer, text: str) -> dict[str, float]:
    """Perplexity per token and bits per byte of a text, in windows of WINDOW tokens that each start with BOS."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    bos, total, count = tokenizer.token_to_id(BOS), 0.0, 0
    for at in range(0, len(ids), WINDOW):
        window = torch.tensor([[bos, *ids[at : at + WINDOW]]], device=model.device)
        logits = model(window[:, :-1]).logits.float()
        total += float(F.cross_entropy(logits[0], window[0, 1:], reduction="sum"))
        count += window.shape[1] - 1
    bits = total / math.log(2) / len(text.encode())
    return {"perplexity": round(math.exp(total / count), 3), "bits_per_byte": round(bits, 4), "tokens": count}


def held_out_texts(folder: Path) -> dict[str, str]:
    """The last 5 % of every text; of the dialogues only what is said."""
    texts = {name: read_text(folder, name, held_out=True) for name in (*STORIES, *OTHERS)}
    chats = parse_dialogues(read_text(folder, DIALOGUES, held_out=True))
    texts[DIALOGUES] = "\n".join(said for chat in chats for _, said in chat)
    return texts


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--texts", type=Path, required=True, help="folder of the texts")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent, help="model folder (default: this one)")
    parser.add_argument("--lengths", default="256,512,1024,2048,4096", help="tokens of the whole chat")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--facts", type=int, help="facts per text (default: 6 to 12, growing with the length)")
    parser.add_argument("--alike", type=float, default=0.0, help="share of facts that differ in one word from another")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the result here")
    return parser.parse_args()


def main() -> None:
    """Measure, show each figure as it comes, and end with one line of JSON."""
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer(options.model)
    model = load(options.model, options.device, options.dtype)
    texts = held_out_texts(options.texts)
    result: dict[str, Any] = {
        "dtype": options.dtype,
        "seed": options.seed,
        "alike": options.alike,
        "retrieval": {},
        "held_out": {},
    }
    for name, text in texts.items():
        result["held_out"][name] = perplexity(model, tokenizer, text)
        print(f"{name}: {result['held_out'][name]}", flush=True)
    held_out = Corpus.encode(tokenizer, "\n\n".join(texts[name] for name in STORIES))
    for length in map(int, options.lengths.split(",")):
        begun = time.monotonic()
        figures = retrieval(model, tokenizer, held_out, length, options)
        result["retrieval"][str(length)] = figures
        print(f"retrieval at {length}: {figures} in {time.monotonic() - begun:.0f} s", flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
