"""What a conversion shows on the terminal while it runs."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ziggurat.converter.mix_record import MixRecord
from ziggurat.converter.report import Estimate, Report

# Without a terminal, a line of progress this often.
LINE_SECONDS = 10.0


class Speed(ProgressColumn):
    """Megabytes of the checkpoint, or tokens, per second."""

    def render(self, task: Task) -> Text:
        """The speed that the last step gave."""
        return Text(str(task.fields.get("speed_text", "")))


class Display:
    """Shows the estimate, then a bar on a terminal or a line now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), Speed(),
            TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._source_bytes, self._bytes_per_parameter = 0, 0.0
        self._task: TaskID | None = None
        self._writing = False
        self._begin("", 0.0)

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def planned(self, estimate: Estimate) -> None:
        """Show the estimate."""
        self._console.print(
            f"{estimate.architecture}, {estimate.parameters / 1e6:.1f} M parameters: "
            f"{size_text(estimate.source_bytes)} to {size_text(estimate.output_bytes)}, "
            f"about {duration_text(estimate.seconds)}, {size_text(estimate.memory_bytes)} of memory", soft_wrap=True,
        )  # fmt: skip
        self._source_bytes = estimate.source_bytes
        self._bytes_per_parameter = estimate.source_bytes / max(estimate.parameters, 1)

    def advance(self, parameters: int, tensor: str) -> None:
        """Count what is in the file."""
        if not self._writing:
            self._begin("", float(self._source_bytes))
            self._writing = True
        self._count(parameters * self._bytes_per_parameter, tensor, "MB/s", 1e6)

    def stage(self, name: str, total: int) -> None:
        """A stage that runs the calibration text begins; steps are tokens that went through a block."""
        self._begin(name, float(total))
        if not self._console.is_terminal:
            self._console.print(f"{name} …")

    def step(self, count: int, what: str) -> None:
        """Count tokens."""
        self._count(count, f"{self._name}, {what}", "tokens/s per block", 1)

    def _begin(self, name: str, total: float) -> None:
        self._name, self._total, self._done, self._writing = name, total, 0.0, False
        self._start = self._last_line = time.monotonic()
        if self._task is not None:
            self._bar.remove_task(self._task)
        if total:
            self._bar.start()
            self._task = self._bar.add_task(name, total=total)

    def _count(self, step: float, what: str, unit: str, scale: float) -> None:
        self._done += step
        now = time.monotonic()
        rate = self._done / max(now - self._start, 1e-9)
        speed = f"{rate / scale:.0f} {unit}"
        if self._task is not None:
            self._bar.update(self._task, advance=step, description=f"{what:30.30}", speed_text=speed)
        if not self._console.is_terminal and now - self._last_line > LINE_SECONDS:
            self._last_line = now
            left = duration_text(max(self._total - self._done, 0) / max(rate, 1e-9))
            self._console.print(f"{100 * self._done / max(self._total, 1):3.0f}% {speed}, {left} left")


def size_text(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def duration_text(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {rest:02} s"


def fitted_text(report: Report) -> str:
    """One line about what the quantization was fitted on, and what came of it."""
    calibration, importance, scales = report.calibration, report.importance, report.scales
    assert calibration is not None
    text = f"calibrated on {calibration.tokens} tokens of {calibration.source} (sha256 {calibration.sha256[:12]})"
    done = []
    if importance is not None:
        done.append(f"importance matrix of {importance.tensors} tensors")
    if scales is not None:
        done.append(f"scales on {scales.kept} of {scales.searched} groups")
    if report.compensation is not None:
        done.append(f"errors compensated in {report.compensation.compensated} of {report.compensation.tensors} tensors")
    text += f": {', '.join(done)}" if done else ""
    if importance is not None and importance.unrouted:
        count = sum(len(experts) for experts in importance.unrouted.values())
        first, experts = next(iter(importance.unrouted.items()))
        named = f"{', '.join(map(str, experts[:4]))}{', …' if len(experts) > 4 else ''} of {first}"
        text += f"; {count} matrices of experts that no token came to have the others' mean ({named}, …)"
    return text


def mix_table(mix: MixRecord) -> Table:
    """Which types the tensors of each kind have, and which share of the loss is theirs."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("tensors", "types chosen", "size", "share of loss"):
        table.add_column(heading, justify="right" if heading in ("size", "share of loss") else "left")
    for name, kind in mix.kinds.items():
        types = ", ".join(f"{count} {type_name}" for type_name, count in kind.types.items())
        table.add_row(name, types, size_text(kind.bytes), f"{kind.share:.0%}")
    return table
