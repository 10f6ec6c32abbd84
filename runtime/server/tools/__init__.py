"""Tool calls: what models of a family write for them, found in their answers, forced by a grammar, told in prompts.

Everything here is plain data and functions; the routers of ``server`` put it into requests and answers.
"""
