"""The runtime's exceptions: one tree, every message one line that says what, where, and the next step.

The command line prints ``ziggurat: error: <message>`` and exits with ``exit_code``; a server maps classes to statuses.
"""

from __future__ import annotations


class ZigguratError(Exception):
    """Anything the runtime reports to a person instead of a traceback.

    ``exit_code`` is the status of a command that ends with it: 1 for what went wrong, 2 for what was asked wrongly.
    """

    exit_code: int = 1


class InvalidRequestError(ZigguratError):
    """A value the caller gave is out of range or does not make sense; nothing was started."""

    exit_code = 2


class UnsupportedError(InvalidRequestError):
    """What was asked is valid but this build, library or model cannot do it."""


class LibraryError(ZigguratError):
    """The llama.cpp library is missing, cannot be loaded, or broke its own contract."""


class ModelFileError(ZigguratError):
    """A GGUF file is missing, truncated, or not one."""


class ModelLoadError(ZigguratError):
    """The library refused a model; the message carries its reason."""


class AdapterError(ZigguratError):
    """A LoRA adapter is of another model, or the library refused it; the message carries its reason."""


class StateFileError(ZigguratError):
    """A saved sequence is missing, damaged, or of a version that this build does not read."""


class StateMismatchError(StateFileError):
    """A saved sequence is of another model, or of a context with other settings."""


class MemoryShortageError(ZigguratError):
    """A model with these settings can never fit into this machine's memory; nothing was loaded."""


class ContextError(ZigguratError):
    """The library refused a context (memory, cache types), or a batch does not fit it."""


class DecodeError(ZigguratError):
    """A batch failed inside the library. ``status`` is llama_decode's return value."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class DecodeAborted(DecodeError):
    """The abort flag was set while a batch was computed. Not a fault: the caller asked for it."""


class TokenError(InvalidRequestError):
    """A token id is outside the vocabulary, or text cannot be turned into tokens."""


class PromptTooLongError(InvalidRequestError):
    """The prompt has more tokens than the context has rows. Nothing is ever cut silently."""

    def __init__(self, n_prompt: int, n_ctx: int, n_ctx_train: int = 0) -> None:
        room = f", the model was trained for {n_ctx_train}" if n_ctx_train else ""
        super().__init__(
            f"the prompt has {n_prompt} tokens and the context {n_ctx}: raise --ctx to at least {n_prompt + 1}{room}"
        )
        self.n_prompt = n_prompt
        self.n_ctx = n_ctx


class TemplateError(ZigguratError):
    """The model's chat template cannot be compiled, refuses these messages, or does not end."""


class EngineError(ZigguratError):
    """The engine failed outside any one request, or was used before ``load``."""


class EngineClosedError(EngineError):
    """The engine was closed before or while this request ran."""


class QueueFullError(EngineError):
    """As many requests wait as may. ``retry_after_s`` is about when it is worth trying again, in seconds."""

    def __init__(self, limit: int, retry_after_s: float) -> None:
        super().__init__(
            f"{limit} requests are waiting, as many as may: try again in about {max(1, round(retry_after_s))} s"
        )
        self.limit = limit
        self.retry_after_s = retry_after_s


class RequestTimeoutError(EngineError):
    """A request did not end in the time that it had."""


class ConversationError(EngineError):
    """The engine does not hold the conversation that was asked for, has no room for it, or it is busy."""
