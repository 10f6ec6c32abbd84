"""llama.cpp's own way from a checkpoint to a quantized file, with its own tools."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from commands import run


@dataclass(frozen=True)
class Chain:
    """The commands of the chain; all but `convert` are programs in the folder `tools`."""

    tools: Path
    threads: int

    def convert(self, tree: Path, model: Path, out: Path, outtype: str = "bf16") -> list[str]:
        """convert_hf_to_gguf.py of the source tree."""
        script = tree / "convert_hf_to_gguf.py"
        return [sys.executable, str(script), str(model), "--outtype", outtype, "--outfile", str(out)]

    def imatrix(self, model: Path, text: Path, out: Path, length: int = 512, chunks: int | None = None) -> list[str]:
        """llama-imatrix over a text, in which special tokens are read as such."""
        some = [] if chunks is None else ["--chunks", str(chunks)]
        return [
            str(self.tools / "llama-imatrix"), "-m", str(model), "-f", str(text), "-o", str(out), "-c", str(length),
            "--parse-special", "-t", str(self.threads), "--no-ppl", *some,
        ]  # fmt: skip

    def quantize(self, model: Path, out: Path, type_name: str, imatrix: Path | None) -> list[str]:
        """llama-quantize; also back to F32, which shows what the weights are without rounded activations."""
        matrix = [] if imatrix is None else ["--imatrix", str(imatrix)]
        tool = str(self.tools / "llama-quantize")
        return [tool, "--allow-requantize", *matrix, str(model), str(out), type_name, str(self.threads)]


def dequantize(chain: Chain, model: Path, out: Path) -> None:
    """Write the weights of a quantized file as F32."""
    run(*chain.quantize(model, out, "F32", None))
