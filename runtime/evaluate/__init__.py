"""What a model can do, in numbers: perplexity and divergence on a text, multiple choice, retrieval over depth.

``chunks`` cuts a text as llama.cpp does, ``decoder`` computes its logits, ``scoring`` is the arithmetic on them and
``text`` joins the three; ``reference`` and ``logits_file`` are what a model is compared with. ``choices`` scores
answers, ``needle`` writes documents with hidden facts and ``retrieval`` asks for them. ``table`` and ``plot`` show
results.
"""
