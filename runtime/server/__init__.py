"""The OpenAI-style server: HTTP requests in, requests to an ``Engine`` out, its events back as JSON or a stream.

``app`` puts it together. ``chat``, ``completions`` and ``models`` are the rooms of the API, each a router over the
models in ``schemas``; ``parameters`` turns what they hold into requests to the engine, ``generation`` runs those,
``streaming`` and ``chunks`` write what comes of them while it comes, ``results`` when it is whole. ``errors`` is the
one place that decides how what went wrong is told, ``state`` what all handlers share, ``settings`` what can be chosen.
"""
