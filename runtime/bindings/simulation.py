"""Asks llama.cpp what a model and its contexts would allocate, without allocating it.

The library builds everything but the buffers (``no_alloc``). That runs in a process of its own: on some damaged files
llama.cpp does not return an error but aborts, and a GPU build takes device memory just for being initialized.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from ziggurat.runtime.bindings.context import Context
from ziggurat.runtime.bindings.context_settings import ContextSettings
from ziggurat.runtime.bindings.kv_settings import KVSettings
from ziggurat.runtime.bindings.memory import BufferMemory, measure
from ziggurat.runtime.bindings.model import Model
from ziggurat.runtime.errors import ContextError, ModelLoadError, ZigguratError


class Simulation:
    """A model opened for questions about its memory. Use it as a context manager.

    ``gpu_layers``: as for Model. Raises ModelLoadError with the library's reason when it does not take the file, even
    when it aborts on it; LibraryError when there is no library, or a stock one.
    """

    def __init__(self, path: str | os.PathLike[str], *, gpu_layers: int | None = None) -> None:
        self._path = Path(path)
        # a file and not a pipe, so that a talkative backend never blocks
        self._errors = tempfile.TemporaryFile()
        # without the current folder, where Python would look for modules first
        code = f"import sys; sys.path = [p for p in sys.path if p]; from {__name__} import child; child()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        try:
            self._ask({"path": str(self._path), "gpu_layers": gpu_layers})
        except BaseException:
            self.close()
            raise

    def breakdown(self, settings: ContextSettings) -> tuple[BufferMemory, ...]:
        """Return what the model and a context of these settings would take; see ``measure``.

        Raises ContextError with the library's reason when it makes no such context.
        """
        return tuple(BufferMemory(**row) for row in self._ask(dataclasses.asdict(settings)))

    def _ask(self, question: dict[str, Any]) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps(question).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            pass  # it ended before it read the question; what it said is below
        answer = stdout.readline()
        if not answer:
            raise ModelLoadError(f"{self._path}: {self._last_words()}")
        found = json.loads(answer)
        if "error" in found:
            raise _ERRORS.get(found["kind"], ZigguratError)(found["error"])
        return found["rows"]

    def _last_words(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        lines = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        said = lines[-1].strip() if lines else f"status {self._process.returncode}"
        return f"llama.cpp ended the process that looked at it: {said}"

    def close(self) -> None:
        """End the process. Idempotent."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                pass
        self._process.terminate()
        self._process.wait()
        self._errors.close()

    def __enter__(self) -> Simulation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _tree(root: type[ZigguratError]) -> dict[str, type[ZigguratError]]:
    found = {root.__name__: root}
    for branch in root.__subclasses__():
        found |= _tree(branch)
    return found


# those that take more than a message cannot come from here
_ERRORS = {name: kind for name, kind in _tree(ZigguratError).items() if kind.__init__ is ZigguratError.__init__}


def _settings(question: dict[str, Any]) -> ContextSettings:
    kv = question.pop("kv")
    return ContextSettings(**question, kv=None if kv is None else KVSettings(**kv))


def child() -> None:
    """What runs in the other process: one question per line of stdin, one answer per line of stdout."""
    # the library must not write into the answers
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    model: Model | None = None
    for line in sys.stdin:
        question = json.loads(line)
        answer: dict[str, Any]
        try:
            if model is None:
                model = Model(question["path"], gpu_layers=question["gpu_layers"], simulated=True)
                answer = {"rows": []}
            else:
                with Context(model, _settings(question)) as context:
                    answer = {"rows": [dataclasses.asdict(row) for row in measure(context)]}
        except ZigguratError as error:
            answer = {"error": str(error), "kind": type(error).__name__}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}", "kind": ContextError.__name__}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
