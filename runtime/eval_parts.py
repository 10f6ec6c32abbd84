"""What ``ziggurat eval`` measures, from its options to figures. Heavy imports wait until a part is asked for."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ziggurat.runtime.errors import InvalidRequestError, UnsupportedError
from ziggurat.runtime.eval_options import DEFAULT_CTX, parse_depths
from ziggurat.runtime.options import parse_counts

if TYPE_CHECKING:
    from ziggurat.runtime.bindings import Model
    from ziggurat.runtime.evaluate.choices_file import Question
    from ziggurat.runtime.evaluate.decoder import DecodeSettings
    from ziggurat.runtime.evaluate.monitor import Monitor
    from ziggurat.runtime.evaluate.needle import Needle, Writer
    from ziggurat.runtime.gguf_file import GGUFFile

Options = dict[str, Any]
Figures = dict[str, Any]
Note = Callable[[str], None]

_LENGTHS = (512, 1024, 2048, 4096)


def settings(options: Options) -> DecodeSettings:
    """Return how to compute."""
    from ziggurat.runtime.evaluate.decoder import DecodeSettings

    return DecodeSettings(
        n_batch=options["batch"],
        n_ubatch=options["ubatch"],
        type_k=options["cache_type_k"],
        type_v=options["cache_type_v"],
        threads=options["threads"],
        kv=options["kv"],
    )


def _check_budget(model: Model, options: Options, note: Note) -> None:
    """Take the KV budget out of the options, and say why, if the model cannot have one."""
    from ziggurat.runtime.bindings import kv

    if options["kv"] is not None:
        _without_budget(kv.unsupported(model), options, note)


def _without_budget(reason: str | None, options: Options, note: Note) -> None:
    from ziggurat.runtime.kv_policy import not_used

    if reason is not None:
        options["kv"] = None
        note(not_used(reason))


def checked(path: Path, options: Options) -> GGUFFile:
    """Read a model file's metadata and check the cache types against it."""
    from ziggurat.runtime import plan
    from ziggurat.runtime.gguf_file import read_gguf

    file = read_gguf(path)
    try:
        shape = plan.kv_shape(file)
    except UnsupportedError:
        return file  # no attention, so no rows whose type could be wrong
    try:
        plan.check_cache_types(shape, options["cache_type_k"], options["cache_type_v"])
    except UnsupportedError as error:  # it may be the reference's shape that they do not fit
        raise UnsupportedError(f"{path}: {error}") from None
    return file


@contextlib.contextmanager
def _loaded(path: Path, options: Options, monitor: Monitor) -> Iterator[Model]:
    from ziggurat.runtime.bindings import Model

    file = checked(path, options)
    with Model(path, gpu_layers=options["gpu_layers"], progress=monitor.loading) as model:
        if not model.generates_text:
            raise UnsupportedError(f"{path}: a {file.architecture} model does not predict text token by token")
        yield model


def measure_text(
    path: Path, text: str, against: Path | None, options: Options, monitor: Monitor, note: Note
) -> Figures:
    """Return perplexity on ``text``, the content of ``--text``, and divergence from a GGUF or logits file."""
    from ziggurat.runtime.evaluate.chunks import cut
    from ziggurat.runtime.evaluate.decoder import ChunkDecoder
    from ziggurat.runtime.evaluate.logits_file import LogitsWriter
    from ziggurat.runtime.evaluate.reference import fingerprint, is_logits_file, open_reference
    from ziggurat.runtime.evaluate.text import evaluate_text

    if against is not None and not is_logits_file(against):
        checked(against, options)
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(_loaded(path, options, monitor))
        _check_budget(model, options, note)
        how = settings(options)
        chunks = cut(model.vocab, text, options["ctx"] or DEFAULT_CTX, options["chunks"], source=str(options["text"]))
        if chunks.n_ctx > model.n_ctx_train > 0:
            note(f"chunks of {chunks.n_ctx} tokens exceed the {model.n_ctx_train} that the model was trained for")
        reference = writer = None
        if against is not None:
            # it keeps every row, and has to take the same steps
            plain = replace(how, kv=None, n_batch=max(how.n_batch, chunks.n_ctx)) if how.kv is not None else how
            opened = open_reference(against, model.vocab, chunks, plain, monitor, gpu_layers=options["gpu_layers"])
            reference = stack.enter_context(opened)
        decoder = stack.enter_context(ChunkDecoder(model, chunks, how, monitor))
        if (target := options["save_logits"]) is not None:
            vocab = model.vocab
            writer = stack.enter_context(LogitsWriter(target, chunks, path.name, fingerprint(vocab), vocab.n_tokens))
        result = evaluate_text(decoder, chunks, monitor, reference=reference, writer=writer, threads=how.n_threads)
        kept = decoder.kept
    return result.as_json() | ({"kv_rows_per_layer": list(kept)} if kept is not None else {})


def questions(options: Options) -> list[Question]:
    """Read ``--choices`` and check the form they are asked in. Raises InvalidRequestError."""
    from ziggurat.runtime.evaluate.choices_file import DEFAULT_PROMPT, read_questions

    if "{question}" not in (options["choices_prompt"] or DEFAULT_PROMPT):
        raise InvalidRequestError("--choices-prompt has no {question} in it")
    return read_questions(options["choices"], options["limit"])


def measure_choices(path: Path, questions: list[Question], options: Options, monitor: Monitor, note: Note) -> Figures:
    """Return the accuracies on the questions of ``--choices``."""
    from ziggurat.runtime.evaluate.choices import evaluate_choices
    from ziggurat.runtime.evaluate.choices_file import DEFAULT_PROMPT

    form = options["choices_prompt"] or DEFAULT_PROMPT
    with _loaded(path, options, monitor) as model:
        _check_budget(model, options, note)
        try:
            result = evaluate_choices(model, questions, settings(options), monitor, form)
        except InvalidRequestError as error:
            raise InvalidRequestError(f"{options['choices']}: {error}") from None
    return {"file": str(options["choices"]), **result.as_json(items=options["choices_items"])}


class NeedleGrid:
    """The documents of ``--needle`` and ``--generate-needle``: made from the model's vocabulary, without its weights.

    Raises InvalidRequestError for lists that make no sense and lengths beyond the context.
    """

    def __init__(self, path: Path, options: Options, note: Note) -> None:
        from ziggurat.runtime.bindings import Model

        self._path, self._options, self._note = path, options, note
        file = checked(path, options)
        trained = file.integer(f"{file.architecture}.context_length") or 0
        self.lengths = self._lengths(trained)
        self.depths = parse_depths(options["needle_depths"])
        self.facts = parse_counts(options["needle_facts"], "--needle-facts")
        if self.lengths[-1] > trained > 0:
            note(f"documents of {self.lengths[-1]} tokens exceed the {trained} that the model was trained for")
        with Model(path, vocab_only=True) as model:
            self.needles = list(self._needles(model))

    def _lengths(self, trained: int) -> list[int]:
        given, ctx = self._options["needle_lengths"], self._options["ctx"]
        limit = ctx or trained or max(_LENGTHS)
        if given is None:
            return [length for length in _LENGTHS if length <= limit] or [limit]
        lengths = parse_counts(given, "--needle-lengths")
        if lengths[-1] > limit and self._options["generate_needle"] is None:
            why = f"--ctx is {ctx}" if ctx else f"the model was trained for {trained}"
            raise InvalidRequestError(
                f"--needle-lengths {given}: {why} tokens; use at most {limit}, or allow more with --ctx {lengths[-1]}"
            )
        return lengths

    def _needles(self, model: Model) -> Iterator[Needle]:
        from ziggurat.runtime.evaluate.needle import grid

        options = self._options
        writer = self._writer(model)
        return grid(writer, self.lengths, self.depths, self.facts, options["needle_trials"], options["seed"])

    def _writer(self, model: Model) -> Writer:
        from ziggurat.runtime.evaluate import filler
        from ziggurat.runtime.evaluate.chunks import read_text
        from ziggurat.runtime.evaluate.needle import TextNeedles, TokenNeedles, Wording
        from ziggurat.runtime.evaluate.retrieval import raw_frame, template_frame

        options, vocab = self._options, model.vocab
        if options["needle_form"] == "tokens":
            return TokenNeedles(vocab)
        text = filler.TEXT if options["needle_text"] is None else read_text(options["needle_text"])
        standard = Wording()
        wording = Wording(
            options["needle_fact"] or standard.fact,
            options["needle_question"] or standard.question,
            options["needle_digits"],
        )
        frame = raw_frame(vocab) if options["raw"] else template_frame(vocab, model.chat_template)
        return TextNeedles(vocab, text, frame, wording, answer_tokens=options["answer_tokens"], raw=options["raw"])

    def describe(self) -> Figures:
        """Return the settings the documents were made with."""
        names = ("needle_trials", "needle_form", "needle_digits", "answer_tokens", "raw", "seed")
        return {name.removeprefix("needle_"): self._options[name] for name in names}

    def measure(self, monitor: Monitor) -> Figures:
        """Ask for all facts through the engine that ``run`` uses, and return accuracies and every answer."""
        from ziggurat.runtime.engine.llama_engine import EngineSettings, LlamaEngine
        from ziggurat.runtime.evaluate.retrieval import ask, results

        options = self._options
        how = EngineSettings(
            n_ctx=self.lengths[-1],
            n_batch=options["batch"],
            n_ubatch=min(options["ubatch"], options["batch"]),
            type_k=options["cache_type_k"],
            type_v=options["cache_type_v"],
            threads=options["threads"],
            gpu_layers=options["gpu_layers"],
            kv=options["kv"],
            one_shot=True,
        )
        with LlamaEngine(self._path, how) as engine:
            _without_budget(engine.load().kv_unsupported, options, self._note)
            trials = ask(engine, self.needles, len(self.needles), monitor, options["answer_tokens"])
        return {**self.describe(), **results(trials)}

    def jsonl(self) -> str:
        """Return the documents, one JSON object a line: the prompt as tokens of this vocabulary and as text."""
        from ziggurat.runtime.bindings import Model

        lines = []
        with Model(self._path, vocab_only=True) as model:
            for needle in self.needles:
                document = {
                    "form": self._options["needle_form"],
                    "length": needle.length,
                    "depth": needle.depth,
                    "actual_depth": needle.actual_depth,
                    "facts": needle.facts,
                    "key": needle.key,
                    "answer": needle.expected or list(needle.expected_tokens),
                    "prompt": model.vocab.detokenize(needle.prompt, special=True),
                    "prompt_tokens": list(needle.prompt),
                }
                lines.append(json.dumps(document, ensure_ascii=False))
        return "\n".join(lines) + "\n"
