"""Write quant_types.json: what llama.cpp's own quantizer gives each tensor, for the tests of the type query.

    python tests/patches/make_quant_types.py path/to/llama-quantize

The binary must be of the pinned release and unpatched. The models are headers with random tensors: the quantizer looks
at names, shapes and metadata alone. Needs numpy, and the patched llama_cpp for its gguf writer.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from llama_cpp import _gguf as gguf

BF16 = gguf.GGMLQuantizationType.BF16
LINE = re.compile(r"\] +(\S+) +- \[[^\]]*\], type = +\S+, size = .*->.*\((\S+)\)")

FTYPES = {
    "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14,
    "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "Q2_K_S": 21, "IQ3_XS": 22,
    "IQ3_XXS": 23, "IQ4_NL": 25, "IQ3_S": 26, "IQ3_M": 27, "IQ2_S": 28, "IQ2_M": 29, "IQ4_XS": 30, "BF16": 32, "F16": 1,
    "F32": 0,
}  # fmt: skip
FEW = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q4_K_S")  # where the rule for 70B models shows

# n_layer, columns, feed-forward width, heads, KV heads, experts, tied, fused q/k/v
MODELS = {
    "llama": dict(arch="llama", n_layer=9, heads=8, kv=2),
    "llama tied": dict(arch="llama", n_layer=17, heads=8, kv=8, tied=True),
    "llama, 288 columns": dict(arch="llama", n_layer=4, h=288, ff=768, heads=6, kv=6),
    "llama, 80 columns": dict(arch="llama", n_layer=2, h=80, ff=100, heads=5, kv=1, tied=True),
    "8 experts": dict(arch="llama", n_layer=8, heads=8, kv=2, experts=8),
    "16 experts": dict(arch="qwen2moe", n_layer=8, heads=8, kv=8, experts=16),
    "gemma3 tied": dict(arch="gemma3", n_layer=8, heads=4, kv=1, tied=True),
    "fused": dict(arch="phi3", n_layer=12, heads=8, kv=8, fused=True),
    "falcon": dict(arch="falcon", n_layer=17, heads=8, kv=1, fused=True),
    "llama 70B": dict(arch="llama", n_layer=80, heads=8, kv=1),
    "llama 65B": dict(arch="llama", n_layer=80, heads=8, kv=8),
    "qwen2 70B": dict(arch="qwen2", n_layer=80, heads=8, kv=8),
    "olmo 70B": dict(arch="olmo", n_layer=80, heads=8, kv=8),
    "deci 70B": dict(arch="deci", n_layer=80, heads=8, kv=8),
    "jais2 70B": dict(arch="jais2", n_layer=68, heads=8, kv=8),
}


def tensors(n_layer, heads, kv, h=256, ff=256, experts=0, tied=False, fused=False, arch=""):
    """Shapes by pattern, in ggml's order (columns first); `*` stands for each layer."""
    d = h // heads
    result = {"token_embd.weight": [h, 32], "output_norm.weight": [h]}
    if not tied:
        result["output.weight"] = [h, 32]
    layer = {"attn_norm": [h], "attn_output": [h, h], "ffn_norm": [h]}
    if fused:
        layer["attn_qkv"] = [h, h + 2 * d * kv]
    else:
        layer |= {"attn_q": [h, h], "attn_k": [h, d * kv], "attn_v": [h, d * kv]}
    if experts:
        layer |= {"ffn_gate_inp": [h, experts], "ffn_down_exps": [ff, h, experts]}
        layer |= {"ffn_up_exps": [h, ff, experts], "ffn_gate_exps": [h, ff, experts]}
    else:
        layer |= {"ffn_up": [h, ff], "ffn_gate": [h, ff], "ffn_down": [ff, h]}
    return result | {f"blk.*.{name}.weight": shape for name, shape in layer.items()}


def expand(patterns, n_layer):
    return {
        pattern.replace("*", str(i)): value
        for pattern, value in patterns.items()
        for i in range(n_layer if "*" in pattern else 1)
    }


def write_model(path, arch, n_layer, heads, kv, h=256, ff=256, experts=0, **rest):
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(128)
    writer.add_embedding_length(h)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length(ff)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_rope_dimension_count(h // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_sliding_window(64)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
    shapes = expand(tensors(n_layer, heads, kv, h, ff, experts, **rest), n_layer)
    for name, shape in shapes.items():
        data = np.ones(shape[::-1], np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, gguf.quants.quantize(data, BF16), raw_dtype=BF16)
    finish(writer)


def write_imatrix(path, shapes):
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["none"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, shape in shapes.items():
        if len(shape) > 1:
            n_matrices = shape[2] if len(shape) > 2 else 1
            writer.add_tensor(f"{name}.in_sum2", np.ones((n_matrices, shape[0]), np.float32))
            writer.add_tensor(f"{name}.counts", np.ones((n_matrices, 1), np.float32))
    finish(writer)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ask(binary, model, ftype, imatrix):
    """The types by tensor that the quantizer states, and whether it says that it needs an importance matrix."""
    options = ["--imatrix", str(imatrix)] if imatrix else []
    command = [binary, "--dry-run", *options, str(model), "/dev/null", ftype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = done.stdout + done.stderr
    return dict(LINE.findall(said)), "will require an imatrix" in said


def packed(types, patterns, n_layer):
    """Types along the layers in runs, then the patterns that have them: {"q6_K*1 q4_K*8": ["blk.*.attn_v.weight"]}.

    Patterns whose tensors all keep their type are left out.
    """
    result = {}
    for pattern, shape in patterns.items():
        own = "f32" if len(shape) == 1 else "bf16"
        names = expand({pattern: None}, n_layer)
        if any(types.get(name, own) != own for name in names):
            runs = itertools.groupby(types.get(name, own) for name in names)
            result.setdefault(" ".join(f"{kind}*{len(list(run))}" for kind, run in runs), []).append(pattern)
    return result


def main():
    binary = sys.argv[1]
    table = {}
    with tempfile.TemporaryDirectory() as folder:
        model, imatrix = Path(folder, "model.gguf"), Path(folder, "imatrix.gguf")
        for name, spec in MODELS.items():
            n_layer, patterns = spec["n_layer"], tensors(**spec)
            write_model(model, **spec)
            write_imatrix(imatrix, expand(patterns, n_layer))
            table[name] = entry = {"model": spec, "tensors": patterns, "plain": {}, "imatrix": {}, "needs imatrix": []}
            for ftype in FTYPES if n_layer < 60 else FEW:
                plain, needed = ask(binary, model, ftype, None)
                informed, _ = ask(binary, model, ftype, imatrix)
                entry["plain"][ftype] = packed(plain, patterns, n_layer)
                if informed != plain:
                    entry["imatrix"][ftype] = packed(informed, patterns, n_layer)
                if needed:
                    entry["needs imatrix"].append(ftype)
    path = Path(__file__).with_name("quant_types.json")
    path.write_text(one_line_a_case({"ftypes": FTYPES, "models": table}), encoding="utf-8")


def one_line_a_case(table):
    """JSON that a diff shows well: one line for each model's header and for each file type."""
    lines = ["{", f'"ftypes": {json.dumps(table["ftypes"])},', '"models": {']
    for name, entry in table["models"].items():
        lines.append(f"{json.dumps(name)}: {{")
        for key, value in entry.items():
            if key in ("plain", "imatrix"):
                cases = ",\n".join(f"  {json.dumps(ftype)}: {json.dumps(case)}" for ftype, case in value.items())
                lines.append(f"{json.dumps(key)}: {{\n{cases}\n}},")
            else:
                lines.append(f"{json.dumps(key)}: {json.dumps(value)},")
        lines[-1] = lines[-1].rstrip(",")
        lines.append("},")
    lines[-1] = "}"
    return "\n".join([*lines, "}", "}", ""])


if __name__ == "__main__":
    main()
