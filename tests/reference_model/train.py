"""Train the reference model from nothing but the texts; see README.md for how and why.

usage: train.py RUN --texts DIR [--plan plan.json] [--minutes M] [--device cpu|cuda] [--seed N] [--threads N]

RUN receives the model folder (RUN/model), the checkpoint (RUN/checkpoint.pt) and a log (RUN/log.jsonl). If there is a
checkpoint, training goes on from it exactly as if it had not been interrupted; the plan may be changed in between.
SIGTERM and the end of --minutes leave a checkpoint at the next report.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import heads
import torch
from data import STORIES, Batch, Corpus, Mixture, Rows, read_text, tokenizer_texts
from model import Llama, Shape, save_model
from muon import Muon
from notebooks import COLOURS, DIGIT_WEIGHT, NAMES, THINGS
from trials import draw_trials, held_out_loss, probe
from vocabulary import load_tokenizer, save_tokenizer, train_tokenizer

log = logging.getLogger("train")

MUON_RATE, ADAM_RATE = 0.02, 3e-3
# The constructed heads are right from the start; the language around them has to be found first.
CONSTRUCTED_BLOCKS, CONSTRUCTED_SCALE = 4, 0.3
PROBES = 24  # trials per length while training: they only steer
CPU_TOKENS = 8192  # tokens per forward pass on the CPU; larger ones leave the caches


@dataclass(frozen=True)
class Stage:
    """A stretch of training.

    Every step reads `step_tokens` tokens in two parts: notebooks, all of one length drawn by `lengths` (length to
    share), and other rows of `text_length`. Only notebooks have to be long, and short rows are cheaper.
    """

    tokens: int
    notebooks: float  # share of the tokens
    lengths: dict[str, float]
    text_length: int
    text: float  # shares among the other rows
    chat: float
    copy: float
    rate: tuple[float, float]  # factors on the learning rates at the beginning and the end, linear in between
    step_tokens: int = 8192
    dropout: float = 0.0  # the texts are small: from the fourth time round they are learnt by heart without it
    decay: float = 0.005  # of the matrices, per unit of learning rate


DEFAULT_PLAN = Path(__file__).with_name("plan.json")


def read_plan(path: Path) -> list[Stage]:
    """The stages of a plan file.

    Raises:
        SystemExit: the file has other keys than `Stage`.
    """
    try:
        return [Stage(**{**stage, "rate": tuple(stage["rate"])}) for stage in json.loads(path.read_text())]
    except (OSError, TypeError, KeyError, ValueError) as error:
        raise SystemExit(f"{path}: not a plan: {error}") from error


class Trainer:
    """Model, optimizers, data and position; all of its state goes into a checkpoint and comes back."""

    def __init__(self, rows: Rows, shape: Shape, seed: int, device: str = "cpu", constructed: bool = True) -> None:
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # dropout
        self.rows, self.device = rows, device
        self.model = Llama(shape)
        self.model.initialise(generator)
        if constructed:
            keys = [rows.encoder(f" {word}")[0] for word in (*NAMES, *COLOURS, *THINGS)]
            sample = rows.batch(8, 256, Mixture(0.0, 0.0, 0.0))[0]
            heads.install(self.model, sample, keys + rows.encoder("0123456789"), generator)
        self.model.to(device)
        self.optimizers = self._optimizers(constructed)
        self.step, self.stage, self.stage_tokens, self.tokens, self.seconds = 0, 0, 0, 0, 0.0

    def _optimizers(self, constructed: bool) -> tuple[Muon, torch.optim.AdamW]:
        matrices: dict[bool, list[torch.nn.Parameter]] = {False: [], True: []}
        rest = []
        for name, parameter in self.model.named_parameters():
            if parameter.ndim == 2 and ".layers." in name:
                block = int(name.split(".layers.")[1].split(".")[0])
                matrices[constructed and block < CONSTRUCTED_BLOCKS and "self_attn" in name].append(parameter)
            else:
                rest.append(parameter)
        groups: list[dict[str, Any]] = [
            {"params": matrices[False]},
            {"params": matrices[True], "scale": CONSTRUCTED_SCALE},
        ]
        muon = Muon([group for group in groups if group["params"]], lr=MUON_RATE)
        return muon, torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0)

    def train_step(self, stage: Stage) -> dict[str, float]:
        """One optimizer step; the mean losses by kind."""
        begun = time.monotonic()
        low, high = stage.rate
        rate = low + (high - low) * min(1.0, self.stage_tokens / stage.tokens)
        for optimizer, base in zip(self.optimizers, (MUON_RATE, ADAM_RATE), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * rate
        for group in self.optimizers[0].param_groups:
            group["decay"] = stage.decay
        self.model.dropout = stage.dropout
        self.model.train()
        length = int(self.rows.rng.choices(list(stage.lengths), list(stage.lengths.values()))[0])
        notebooks = max(1, round(stage.notebooks * stage.step_tokens / length)) if stage.notebooks else 0
        others = max(1, round((stage.step_tokens - notebooks * length) / stage.text_length))
        batches = [self.rows.batch(others, stage.text_length, Mixture(stage.text, stage.chat, stage.copy))]
        if notebooks:
            batches.append(self.rows.batch(notebooks, length, Mixture(0.0, 0.0, 0.0)))
        total = sum(float(weights.sum()) for _, _, weights in batches)
        losses, kinds = [], []
        for ids, targets, weights in self._parts(batches):
            with torch.autocast(self.device, torch.bfloat16):
                loss, weight, _ = self.model.losses(ids, targets, weights)
            ((loss * weight).sum() / total).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            kinds.append(weight)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        tokens = sum(ids.numel() for ids, _, _ in batches)
        self.tokens += tokens
        self.stage_tokens += tokens
        self.seconds += time.monotonic() - begun
        loss, kind = torch.cat(losses), torch.cat(kinds)
        names = {"digits": DIGIT_WEIGHT, "text": 1.0}
        return {n: float(loss[kind == k].mean()) for n, k in names.items() if bool((kind == k).any())} | {
            "length": float(length),
            "rate": rate,
        }

    def _parts(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        """The batches on the device, in pieces that fit the caches where that is the CPU."""
        for ids, targets, weights in batches:
            count = max(1, CPU_TOKENS // ids.shape[1]) if self.device == "cpu" else len(ids)
            for at in range(0, len(ids), count):
                part = slice(at, at + count)
                yield ids[part].to(self.device), targets[part].to(self.device), weights[part].to(self.device)

    def run(self, plan: list[Stage], steps: int) -> dict[str, float] | None:
        """Take `steps` steps of the plan; running means of what they report, or None if the plan is at its end."""
        means: dict[str, list[float]] = {}
        for _ in range(steps):
            while self.stage < len(plan) and self.stage_tokens >= plan[self.stage].tokens:
                self.stage, self.stage_tokens = self.stage + 1, 0
            if self.stage >= len(plan):
                return None
            for name, value in self.train_step(plan[self.stage]).items():
                means.setdefault(name, []).append(value)
        return {name: round(sum(values) / len(values), 4) for name, values in means.items()}

    def save(self, path: Path) -> None:
        """Write a checkpoint; the file under this name is always complete."""
        state = {
            "shape": asdict(self.model.shape),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rows_rng": self.rows.rng.getstate(),
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.device == "cuda" else [],
            "position": [self.step, self.stage, self.stage_tokens, self.tokens, self.seconds],
        }
        draft = path.with_suffix(".tmp")
        torch.save(state, draft)
        os.replace(draft, path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            SystemExit: it is of a model of another shape.
        """
        state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
        if state["shape"] != asdict(self.model.shape):
            raise SystemExit(f"{path}: made for {state['shape']}, not for {asdict(self.model.shape)}")
        self.model.load_state_dict(state["model"])
        for optimizer, value in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(value)
        self.rows.rng.setstate(state["rows_rng"])
        torch.set_rng_state(state["torch_rng"].cpu())
        if self.device == "cuda" and state.get("cuda_rng"):
            torch.cuda.set_rng_state_all([value.cpu() for value in state["cuda_rng"]])
        self.step, self.stage, self.stage_tokens, self.tokens, self.seconds = state["position"]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path, help="folder of the run; resumed if it has a checkpoint")
    parser.add_argument("--texts", type=Path, required=True, help="folder of the training texts")
    parser.add_argument("--plan", type=Path, default=DEFAULT_PLAN, help="JSON list of stages")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long, with a checkpoint")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's choice)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--random-heads", action="store_true", help="do not start from constructed copying heads")
    parser.add_argument("--save-every", type=float, default=5.0, metavar="MINUTES")
    return parser.parse_args()


def main() -> None:
    """Train until the plan or the time is at its end."""
    options = arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if options.threads:
        torch.set_num_threads(options.threads)
    shape, plan, folder = Shape(), read_plan(options.plan), options.run / "model"
    if not (folder / "tokenizer.json").exists():
        save_tokenizer(train_tokenizer(tokenizer_texts(options.texts), shape.vocab), folder, shape.context)
    tokenizer = load_tokenizer(folder)
    rows = Rows.from_texts(tokenizer, options.texts, options.seed)
    held_out = Corpus.encode(tokenizer, "\n\n".join(read_text(options.texts, name, held_out=True) for name in STORIES))
    trials = {n: draw_trials(rows.encoder, held_out, n, PROBES, seed=1) for n in (256, 512, 1024, 2048)}
    trainer = Trainer(rows, shape, options.seed, options.device, constructed=not options.random_heads)
    checkpoint = options.run / "checkpoint.pt"
    if checkpoint.exists():
        trainer.load(checkpoint)
        log.info("resumed at step %d, %.2f million tokens", trainer.step, trainer.tokens / 1e6)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    begun = saved = time.monotonic()
    while (report := trainer.run(plan, 20)) is not None:
        now = time.monotonic()
        done = stop.is_set() or now - begun > options.minutes * 60
        entry: dict[str, Any] = {"step": trainer.step, "stage": trainer.stage, "tokens": trainer.tokens, **report}
        entry["tokens_per_second"] = round(trainer.tokens / trainer.seconds)
        if done or now - saved > options.save_every * 60:
            trainer.save(checkpoint)
            save_model(trainer.model, folder)
            # Falling training loss with rising loss here means learning by heart: more dropout, or stop.
            entry["held_out"] = round(held_out_loss(trainer.model, held_out, options.device), 4)
            entry["retrieval"] = {n: probe(trainer.model, some, options.device) for n, some in trials.items()}
            saved = time.monotonic()
        with (options.run / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
        log.info("%s", json.dumps(entry))
        if done:
            return
    trainer.save(checkpoint)
    save_model(trainer.model, folder)
    final = {n: probe(trainer.model, some, options.device) for n, some in trials.items()}
    log.info("plan done: %s", json.dumps({"step": trainer.step, "tokens": trainer.tokens, "retrieval": final}))


if __name__ == "__main__":
    main()
