from __future__ import annotations

import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from helpers import hollow_models, tiny_models
from helpers.command import Ziggurat
from helpers.hollow_models import Dims
from ziggurat.runtime import bindings, hardware
from ziggurat.runtime.bench import bandwidth, side
from ziggurat.runtime.bench.bandwidth import Bandwidth, measure_bandwidth
from ziggurat.runtime.bindings import Context, kv
from ziggurat.runtime.hardware import Gpu
from ziggurat.runtime.sizes import human_bytes

README = Path(__file__).parents[3] / "README.md"
SMALL = ("-p", 8, "-n", 4, "-r", 3, "--threads", 1, "--ubatch", 64)
GIB = 2**30


@pytest.fixture(autouse=True)
def memory_of_known_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "measure_bandwidth", lambda threads: Bandwidth(2e9, threads, 1000))


def measured(ziggurat: Ziggurat, tmp_path: Path, *arguments: object) -> dict[str, Any]:
    report = tmp_path / "report.json"
    code, _, err = ziggurat("bench", *arguments, "--json", report)
    assert code == 0, err
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def pick(report: dict[str, Any], **wanted: object) -> list[dict[str, Any]]:
    return [row for row in report["results"] if all(row[key] == value for key, value in wanted.items())]


@pytest.mark.usefixtures("budgets")
def test_every_combination_is_measured(ziggurat: Ziggurat, chat_path: Path, tmp_path: Path) -> None:
    axes = ("--depth", "0,600", "--streams", "1,2", "--kv-budget", "none,48,10%", "--cache-type-k", "f16,q8_0")
    report = measured(ziggurat, tmp_path, chat_path, *SMALL, *axes)
    assert len(report["results"]) == 2 * 2 * 3 * 2 * 2  # tests, depths, streams, budgets, types
    for row in report["results"]:
        assert row["tokens_per_second"] == statistics.median(row["samples"])
        assert len(row["samples"]) == 3
        assert row["tokens_per_second_q1"] <= row["tokens_per_second"] <= row["tokens_per_second_q3"]
        assert row["tokens"] == {"pp": 8, "tg": 4}[row["test"]]
        assert row["peak_bytes"] > 0
    for depth, streams, test in ((0, 1, "tg"), (600, 2, "pp"), (600, 2, "tg")):
        first, *others = pick(report, depth=depth, streams=streams, test=test)
        assert (first["kv_budget"], first["cache_type_k"], first["ratio"]) == ("none", "f16", None)
        for other in others:
            ratios = [rate / base for rate, base in zip(other["samples"], first["samples"], strict=True)]
            assert other["ratio"] == statistics.median(ratios)
    full, kept = (
        pick(report, depth=600, streams=2, test="tg", kv_budget=budget, cache_type_k="f16")[0]
        for budget in ("none", "48")
    )
    assert full["kv_rows"] is None
    assert full["kv_bytes"] == 2 * 2 * 768 * (32 + 32) * 2  # sequences, layers, rows, K and V, f16
    assert full["depth_filled"] == "multiplied"
    assert sum(kept["kv_rows"]) == 2 * 48
    assert kept["depth_filled"] == "rows"
    assert 0 < kept["kv_bytes"] < kept["kv_bytes_reading"]
    assert kept["kv_bytes"] < full["kv_bytes"]
    (part,) = pick(report, depth=600, streams=1, test="tg", kv_budget="10%", cache_type_k="q8_0")
    assert sum(part["kv_rows"]) == 2 * 60


def test_the_turns_alternate(
    ziggurat: Ziggurat, chat_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[str] = []
    generate = side.Side.generate

    def noted(self: side.Side, n_tokens: int) -> float:
        if n_tokens == 4:  # not the warming up
            turns.append(self.setting.type_k)
        return generate(self, n_tokens)

    monkeypatch.setattr(side.Side, "generate", noted)
    measured(ziggurat, tmp_path, chat_path, *SMALL, "--cache-type-k", "f16,bf16,q8_0")
    order = ["f16", "bf16", "q8_0"]
    assert turns == order + order[::-1] + order


def test_depths_are_where_tokens_are_generated(
    ziggurat: Ziggurat, chat_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every turn begins behind the depth: prompts and generated tokens of those before are gone."""
    seen: dict[int, list[int]] = {}
    decode = Context.decode

    def noted(self: Context, batch: Any) -> None:
        if len(batch) == 2:  # a token of both streams
            seen.setdefault(self.settings.n_ctx, []).append(self.last_position(1))
        decode(self, batch)

    monkeypatch.setattr(Context, "decode", noted)
    measured(ziggurat, tmp_path, chat_path, *SMALL, "--depth", "0,700", "--streams", 2)
    empty, deep = seen.values()
    assert empty == [-1, 0, *[-1, 0, 1, 2] * 3]
    assert deep == [699, 700, *[699, 700, 701, 702] * 3]


def test_the_depth_can_be_read(ziggurat: Ziggurat, chat_path: Path, tmp_path: Path) -> None:
    report = measured(ziggurat, tmp_path, chat_path, *SMALL, "--depth", 600, "--read-depth")
    assert {row["depth_filled"] for row in report["results"]} == {"read"}


def test_a_depth_of_windows_is_read(ziggurat: Ziggurat, tmp_path: Path) -> None:
    """Their rows cannot be multiplied, and prompts cannot be taken out of them."""
    path = tiny_models.write_model(tmp_path / "m.gguf", tiny_models.Shape(arch="gemma2", sliding_window=64))
    report = measured(ziggurat, tmp_path, path, *SMALL, "--depth", 600)
    assert {row["depth_filled"] for row in report["results"]} == {"read"}


def test_threads_take_turns_in_one_context(ziggurat: Ziggurat, spm_path: Path, tmp_path: Path) -> None:
    report = measured(ziggurat, tmp_path, spm_path, "-p", 4, "-n", 0, "-r", 1, "--threads", "1,2")
    assert [(row["threads"], row["ratio"] is None) for row in report["results"]] == [(1, True), (2, False)]
    assert report["bandwidth"]["threads"] == 2


def test_what_is_shown_and_written(ziggurat: Ziggurat, chat_path: Path, tmp_path: Path) -> None:
    table, figures, report = tmp_path / "t.csv", tmp_path / "p.png", tmp_path / "r.json"
    files = ("--csv", table, "--plot", figures, "--json", report)
    code, out, err = ziggurat("bench", chat_path, *SMALL, "--depth", "0,300", *files)
    assert code == 0, err
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()]
    names = ["model", "size", "params", "backend", "threads", "test", "t/s", "KV", "share"]
    assert lines[0] == names
    assert [line[5] for line in lines[2:]] == ["pp8", "tg4", "pp8 @ d300", "tg4 @ d300"]
    assert all(line[6] for line in lines[2:])
    assert [line[8] != "" for line in lines[2:]] == [False, True, False, True]
    assert "one thread reads 2.0 GB/s" in err and "peak memory" in err
    found = json.loads(report.read_text())
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [float(row["tokens_per_second"]) for row in rows] == [row["tokens_per_second"] for row in found["results"]]
    assert rows[0]["kv_rows"] == "" and len(rows[0]["samples"].split()) == 3
    assert figures.read_bytes().startswith(b"\x89PNG")
    generated = found["results"][1]
    kept = 2 * (2 * 32) * 2 * 2  # layers, K and V, f16; two rows on average of a turn's four
    weights = sum(tensor.n_bytes for tensor in hollow_tensors(chat_path))
    assert generated["bytes_per_second"] == pytest.approx(generated["tokens_per_second"] * (weights + kept))
    assert generated["bandwidth_share"] == pytest.approx(generated["bytes_per_second"] / 2e9)


def hollow_tensors(path: Path) -> list[Any]:
    """The tensors that every step reads."""
    from ziggurat.runtime.gguf_file import read_gguf

    return [tensor for tensor in read_gguf(path).tensors if tensor.name != "token_embd.weight"]


@pytest.mark.usefixtures("budgets")
def test_the_roof_beside_what_was_measured(ziggurat: Ziggurat, chat_path: Path, tmp_path: Path) -> None:
    plot = tmp_path / "p.svg"
    axes = ("--depth", "0,300", "--streams", "1,2", "--kv-budget", "none,40", "--plot", plot)
    report = measured(ziggurat, tmp_path, chat_path, *SMALL, *axes, "--roofline")
    points = report["roofline"]["points"]
    assert len(points) == 8
    assert (report["roofline"]["device"]["name"], report["roofline"]["device"]["bandwidth"]) == ("measured", 2e9)
    for point in points:
        (row,) = pick(report, test="tg", **{key: point[key] for key in ("depth", "streams", "kv_budget")})
        (mark,) = point["measured"]
        assert mark["tokens_per_second"] == row["tokens_per_second"]
        assert mark["share"] == pytest.approx(row["tokens_per_second"] / point["tokens_per_second"])
        bytes_read = point["weights_bytes_per_step"] + point["kv_bytes_per_step"]
        assert point["tokens_per_second"] == pytest.approx(point["streams"] * 2e9 / bytes_read)
        assert point["tokens_per_second_at_llama_cpp_share"] == 0.73 * point["tokens_per_second"]
    assert points[-1]["kv_bytes_per_step"] == 2 * 2 * 40 * 2 * 32 * 2
    assert "<svg" in plot.read_text()


def test_a_roof_needs_no_model(ziggurat: Ziggurat, tmp_path: Path) -> None:
    report = tmp_path / "r.json"
    shape = ("--shape", "llama-3-70b", "--blocks", 70, "--bpw", 4.5, "--device", "a40")
    axes = ("--depth", "10000", "--streams", "1,40", "--kv-budget", "none,1024")
    plot = tmp_path / "p.png"
    code, out, err = ziggurat("bench", "--roofline", *shape, *axes, "--json", report, "--plot", plot)
    assert code == 0, err
    rates = [point["tokens_per_second"] for point in json.loads(report.read_text())["roofline"]["points"]]
    assert rates == pytest.approx([18.7, 187, 20.1, 605], rel=0.02)
    assert "1312.6 TFLOP, 8.77 s" in out and "696.0 GB/s, 45.00 GiB, 149.7 TFLOPS f16" in err
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_roof_of_a_file_for_another_device(
    ziggurat: Ziggurat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file without weights: nothing of it is loaded."""
    path = hollow_models.write_model(tmp_path / "m.gguf", Dims())
    monkeypatch.setattr(hardware, "nvidia_gpus", lambda: [Gpu("NVIDIA H200", "9.0", GIB, GIB)])
    code, out, err = ziggurat("bench", path, "--roofline", "--device", "h200")
    assert code == 0, err
    assert "measured" not in out  # the library cannot use it
    monkeypatch.setattr(bindings, "supports_gpu_offload", lambda: True)
    assert "measured" not in ziggurat("bench", path, "--roofline", "--device", "4090")[1]
    code, out, err = ziggurat("bench", path, "--roofline", "--device", "h200", *SMALL)
    assert code == 0, err
    assert "measured t/s" in out and "share" not in out.splitlines()[0]  # of a memory that is not the model's
    assert "whose memory is not measured here" in ziggurat.fails("bench", path, "--roofline")


def test_a_stock_library_measures_all_but_budgets(
    ziggurat: Ziggurat, chat_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv._functions.cache_clear()
    monkeypatch.setattr(kv, "_has_budgets", lambda _lib: False)
    monkeypatch.setattr(side, "can_measure", lambda: False)
    try:
        report = measured(ziggurat, tmp_path, chat_path, *SMALL, "--depth", 600)
        assert report["results"][1]["kv_bytes"] == 2 * 768 * (32 + 32) * 2
        message = ziggurat.fails("bench", chat_path, "--kv-budget", "none,64")
        assert "keeps every KV row" in message and "pip install" in message
    finally:
        kv._functions.cache_clear()


def test_what_does_not_fit_is_refused_with_numbers(
    ziggurat: Ziggurat, chat_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "memory", lambda: (64 * GIB, GIB))
    axes = ("--depth", "0,4000k", "--streams", "1,2", "--cache-type-k", "f16,q8_0")
    message = ziggurat.fails("bench", chat_path, *SMALL, *axes, code=1)
    assert "2 contexts side by side with 1 x 4096000 tokens need " in message
    assert "GiB beside the weights" in message and "1.00 GiB are free: lower --depth" in message


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give a MODEL.gguf, or a --shape"),
        (("{model}", "--roofline", "--shape", "llama-3-8b"), "not both"),
        (("{model}", "--device", "a40"), "--device belongs to --roofline"),
        (("{model}", "--roofline", "--bpw", 4), "--bpw is for shapes"),
        (("{folder}",), "is a checkpoint; only a GGUF file"),
        (("config.json",), "is a checkpoint; only a GGUF file"),
        (("pyproject.toml",), "pyproject.toml"),
        (("{folder}", "--roofline", "--device", "a40"), "no such file"),
        (("missing.gguf",), "missing.gguf"),
        (("--roofline", "--shape", "x", "--device", "a40"), "no shape 'x'"),
        (("--roofline", "--shape", "llama-3-8b", "--type", "q9", "--device", "a40"), "q9"),
        (("--roofline", "--shape", "llama-3-8b", "--type", "q8_0", "--bpw", 4), "give one of them"),
        (("--roofline", "--shape", "llama-3-8b", "--device", "tpu"), "tpu"),
        (("{model}", "--plot", "p.pdf"), "ends in .png or .svg"),
        (("{model}", "--json", "{folder}"), "is a folder"),
        (("{model}", "--json", "{folder}/x", "--csv", "{folder}/x"), "read or written already"),
        (("{model}", "--csv", "{model}"), "read or written already"),
        (("{model}", "--depth", "much"), "--depth much"),
        (("{model}", "-r", 0), "-r"),
        (("{model}", "--cache-type-k", "q8_0"), "needs heads of a multiple of 32"),
        (("{model}", "--streams", "256", "--depth", "999999999"), "is beyond"),
    ],
)
def test_wrong_input_is_one_line(
    ziggurat: Ziggurat, spm_path: Path, tmp_path: Path, arguments: tuple[object, ...], said: str
) -> None:
    given = [str(argument).format(model=spm_path, folder=tmp_path) for argument in arguments]
    assert said in ziggurat.fails("bench", *given)


def test_models_without_text_or_budget(ziggurat: Ziggurat, tmp_path: Path) -> None:
    path = tiny_models.write_model(tmp_path / "m.gguf", tiny_models.Shape(arch="gemma3", n_layer=3, sliding_window=64))
    if kv.available():
        assert "cannot have a KV budget" in ziggurat.fails("bench", path, *SMALL, "--kv-budget", 64)


def test_without_matplotlib_plots_are_refused_at_once(
    ziggurat: Ziggurat, spm_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = ziggurat.fails("bench", spm_path, "--plot", tmp_path / "p.png")
    assert "pip install 'ziggurat[plot]'" in message


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(spm_path: Path, tmp_path: Path, number: signal.Signals) -> None:
    report = tmp_path / "r.json"
    arguments = [spm_path, "--depth", "0,1k", "-r", 100000, "--threads", 1, "--json", report, "--verbose"]
    command = [sys.executable, "-m", "ziggurat.runtime", "bench", *map(str, arguments)]
    log = tmp_path / "log"
    with log.open("w") as said:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True)
        deadline = time.monotonic() + 60
        while "llama_context" not in log.read_text():  # it is measuring, or about to
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(child.pid, number)
        out, _ = child.communicate(timeout=60)
    assert (child.returncode, out) == (130, "")
    assert "Traceback" not in log.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_the_readme_s_example_is_what_was_measured() -> None:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in README.read_text().splitlines()]
    shown = [line for line in lines if len(line) == 11 and line[6].startswith("tg32")]
    results = json.loads((README.parent / "tests/benchmarks/bench_example.json").read_text())["results"]
    assert len(shown) == len(results) == 6
    for line, row in zip(shown, results, strict=True):
        depth = f" @ d{row['depth']}" if row["depth"] else ""
        budget = "none" if row["kv_policy"] is None else f"{row['kv_budget']} {row['kv_policy']}"
        assert (line[5], line[6]) == (budget, f"tg32{depth}")
        assert line[7] == spread(row, "tokens_per_second")
        assert line[8] == ("1" if row["ratio"] is None else spread(row, "ratio"))
        assert line[9] == human_bytes(row["kv_bytes"])
        assert line[10] == f"{row['bandwidth_share']:.0%}"


def spread(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.2f} ({row[f'{name}_q1']:.2f}–{row[f'{name}_q3']:.2f})"


def test_memory_is_read_by_all_threads() -> None:
    found = measure_bandwidth(2, 2**22, 0.01)
    assert found.bytes_per_second > 0
    assert (found.threads, found.buffer_bytes) == (2, 2**22)
