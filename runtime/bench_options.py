"""The command line options of ``ziggurat bench``."""

from __future__ import annotations

from pathlib import Path

import click

from ziggurat.runtime.options import option_group
from ziggurat.runtime.plan.roofline import DEVICES

FILE = click.Path(path_type=Path)
#: The device that is this machine's memory, measured.
MEASURED = "measured"

work_options = option_group(
    click.option(
        "-p", "n_prompt", type=click.IntRange(0), default=512, show_default=True, metavar="N",
        help="Prompt tokens; 0: no prompts.",
    ),
    click.option(
        "-n", "n_gen", type=click.IntRange(0), default=128, show_default=True, metavar="N",
        help="Tokens to generate; 0: none.",
    ),
    click.option(
        "-r", "repetitions", type=click.IntRange(1), default=5, show_default=True, metavar="N",
        help="Turns of every setting.",
    ),
    title="What is measured",
)  # fmt: skip

axis_options = option_group(
    click.option("--depth", default="0", show_default=True, metavar="LIST", help="Tokens before, as 0,4096 or 0,4k."),
    click.option("--streams", default="1", show_default=True, metavar="LIST", help="Sequences at once, as 1,4,8."),
    click.option("--kv-budget", metavar="LIST", help="KV rows per layer, as none,1024,12%; default: none."),
    click.option("--kv-policy", metavar="LIST", help="Presets for the budgets, as pyramid,snapkv; default: pyramid."),
    click.option("--cache-type-k", default="f16", show_default=True, metavar="LIST", help="Types of K, as f16,q8_0."),
    click.option("--cache-type-v", default="f16", show_default=True, metavar="LIST", help="Types of V."),
    click.option("--threads", metavar="LIST", help="CPU threads, as 1,2; default: the physical cores."),
    title="Axes (every combination is measured)",
)

context_options = option_group(
    click.option("--kv-prefill", type=click.Choice(["exact", "bounded", "chunked"]), help="How prompts are read."),
    click.option(
        "--batch", type=click.IntRange(1), default=2048, show_default=True, metavar="N", help="Largest batch."
    ),
    click.option(
        "--ubatch", type=click.IntRange(1), default=512, show_default=True, metavar="N", help="Tokens computed at once."
    ),
    click.option("--gpu-layers", type=click.IntRange(0), metavar="N", help="Layers on the GPU; default: all."),
    click.option(
        "--read-depth", is_flag=True, help="Read every token of a depth, instead of multiplying the rows of some."
    ),
    title="Context",
)

roof_options = option_group(
    click.option("--roofline", is_flag=True, help="Show what physics allows, and how much of it was reached."),
    click.option(
        "--device",
        type=click.Choice([*DEVICES, MEASURED]),
        help="Whose roof; default: measured, this machine's memory.",
    ),
    click.option("--shape", metavar="NAME", help="Instead of a model: llama-3-8b, llama-3-70b or llama-3.1-405b."),
    click.option("--blocks", type=click.IntRange(1), metavar="N", help="Blocks that are left of a shape or a config."),
    click.option("--bpw", type=click.FloatRange(0.5, 32), metavar="X", help="Bits of every weight of it."),
    click.option("--type", "type_name", metavar="TYPE", help="Or the file type it would get; default: q4_k_m."),
    title="Roofline",
)

output_options = option_group(
    click.option("--json", "json_file", type=FILE, metavar="FILE", help="Write all figures there as JSON."),
    click.option("--csv", "csv_file", type=FILE, metavar="FILE", help="Write a line for each test there."),
    click.option("--plot", type=FILE, metavar="FILE.png|svg", help="Draw the decode rates."),
    click.option("--verbose", "-v", is_flag=True, help="Show what the library logs."),
    title="Output",
)
