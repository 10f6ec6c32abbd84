"""How fast a model reads and generates: behind long contexts, for several streams, with KV budgets and row types.

``axes`` is what is compared, ``filling`` makes long caches without reading long texts, ``side`` and ``runner`` measure,
``memory`` refuses beforehand what does not fit, ``bandwidth`` measures what a figure is to be compared with,
``roof`` what physics allows, ``report`` and ``plot`` say it.
"""
