"""The engine: one thread owns the llama context and serves many conversations at once.

``protocol`` is what front ends talk to and all that is imported with this package; ``llama_engine`` is the real one.
Behind it ``scheduler`` decides what the context computes next, ``admission`` who gets in, ``slots`` and ``reuse`` in
which sequence and on which of its rows, ``reading`` (with ``prefill``) reads prompts, ``decoding`` takes the steps,
``generation`` is the state of one answer, and
``speculation`` proposes its tokens. ``loader`` and ``contexts`` make the context, ``prompts`` turns requests into
tokens, ``text`` tokens into text, and ``stream`` carries them to whoever asked.
"""

from ziggurat.runtime.engine.protocol import (
    Embeddings,
    Engine,
    EngineStats,
    Event,
    FinishEvent,
    FinishReason,
    GenerationRequest,
    GenerationStats,
    KeptRows,
    Message,
    ModelInfo,
    SlotStats,
    TokenEvent,
)

__all__ = [
    "Embeddings",
    "Engine",
    "EngineStats",
    "Event",
    "FinishEvent",
    "FinishReason",
    "GenerationRequest",
    "GenerationStats",
    "KeptRows",
    "Message",
    "ModelInfo",
    "SlotStats",
    "TokenEvent",
]
