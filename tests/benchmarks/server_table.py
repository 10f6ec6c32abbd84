"""The results of server_rate.py as the README's table: one line for each server, one column for each load.

A cell is the rate of generated tokens as a ratio to the first llama-server of the same rounds, and the time to the
first token, median and 95th percentile, in seconds. Of several entries of a server and a load the last one counts.

usage: python tests/benchmarks/server_table.py [server_rate.json]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def table(entries: list[dict[str, Any]]) -> str:
    """Return it in Markdown."""
    levels: dict[tuple[int, int], dict[str, Any]] = {}
    for each in (level for entry in entries for level in entry["levels"]):
        levels.setdefault((each["prompt"], each["clients"]), {}).update(each["servers"])
    loads = sorted(levels)
    names = list(dict.fromkeys(name for load in loads for name in levels[load]))
    heads = [f"{prompt} tokens, {clients} client{'s'[: clients > 1]}" for prompt, clients in loads]
    lines = [["", *heads], ["---"] * (1 + len(heads))]
    lines += [[name, *(_cell(levels[load].get(name)) for load in loads)] for name in names]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return "–"
    first = f"{figures['first_s']:.2f} / {figures['first_p95_s']:.2f} s"
    return f"{figures['ratio']:.2f}x, {first}" if "ratio" in figures else first


if __name__ == "__main__":
    given = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("server_rate.json")
    print(table(json.loads(Path(given).read_text())))
