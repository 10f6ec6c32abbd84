from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from ziggurat.runtime import cli, command_run
from ziggurat.runtime.errors import InvalidRequestError
from ziggurat.runtime.sampling import SamplingParams
from ziggurat.runtime.sampling_options import sampling_of, sampling_options


def parse(*arguments: object) -> SamplingParams:
    found: list[SamplingParams] = []

    @click.command()
    @sampling_options
    def command(**options: Any) -> None:
        found.append(sampling_of(options))

    command.main([str(argument) for argument in arguments], standalone_mode=False)
    return found[0]


def test_without_options_they_are_the_defaults() -> None:
    assert parse() == SamplingParams()


def test_options_have_the_names_of_llama_cpp() -> None:
    found = parse(
        *("--temp", 0.5, "--top-k", 7, "--top-p", 0.9, "--min-p", 0.1, "--seed", 3, "--typical", 0.8),
        *("--repeat-penalty", 1.1, "--repeat-last-n", 32, "--presence-penalty", 0.2, "--frequency-penalty", 0.3),
        *("--dry-multiplier", 0.8, "--dry-base", 2, "--dry-allowed-length", 3, "--dry-penalty-last-n", 100),
        *("--dry-sequence-breaker", r"\n", "--dry-sequence-breaker", "x", "--top-nsigma", 1.5, "--min-keep", 2),
        *("--xtc-probability", 0.4, "--xtc-threshold", 0.2, "--dynatemp-range", 0.1, "--dynatemp-exp", 1.5),
        *("--mirostat", 2, "--mirostat-ent", 4, "--mirostat-lr", 0.2, "--ignore-eos"),
        *("-l", "15+1.5", "--logit-bias", "16-inf", "--grammar", 'root ::= "a"'),
    )
    assert found == SamplingParams(
        temperature=0.5,
        top_k=7,
        top_p=0.9,
        min_p=0.1,
        seed=3,
        typical_p=0.8,
        top_n_sigma=1.5,
        min_keep=2,
        dynatemp_range=0.1,
        dynatemp_exponent=1.5,
        repeat_penalty=1.1,
        repeat_last_n=32,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        dry_multiplier=0.8,
        dry_base=2,
        dry_allowed_length=3,
        dry_penalty_last_n=100,
        dry_sequence_breakers=("\n", "x"),
        xtc_probability=0.4,
        xtc_threshold=0.2,
        mirostat=2,
        mirostat_tau=4,
        mirostat_eta=0.2,
        logit_bias={15: 1.5, 16: -math.inf},
        ignore_eos=True,
        grammar='root ::= "a"',
    )
    assert parse("--dry-sequence-breaker", "none").dry_sequence_breakers == ()


def test_grammars_and_schemas_come_from_files(tmp_path: Path) -> None:
    file = tmp_path / "given"
    file.write_text('root ::= "é"', encoding="utf-8")
    assert parse("--grammar-file", file).grammar == 'root ::= "é"'
    file.write_text("{}")
    assert parse("--json-schema-file", file).json_schema == "{}"
    with pytest.raises(InvalidRequestError, match="give --json-schema or --json-schema-file, not both"):
        parse("--json-schema-file", file, "-j", "{}")
    file.write_bytes(b"\xff")
    with pytest.raises(InvalidRequestError, match="not UTF-8 at byte 0"):
        parse("--grammar-file", file)
    file.write_bytes(b" " * (2**20 + 1))
    with pytest.raises(InvalidRequestError, match="more than 1048576 bytes"):
        parse("--grammar-file", file)
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(InvalidRequestError, match="cannot be read"):
            parse("--grammar-file", path)


@pytest.mark.parametrize("bias", ["15", "15+", "a+1", "15+inf", "15+nan", "-1+1", "15=1"])
def test_a_logit_bias_that_is_none_is_refused(bias: str) -> None:
    with pytest.raises(InvalidRequestError, match="--logit-bias"):
        parse("--logit-bias", bias)


def test_run_keeps_to_a_grammar_and_refuses_a_wrong_one(spm_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: object) -> tuple[int, str, str]:
        command = ["run", str(spm_path), "the", "--raw", "--threads", "1", *map(str, arguments)]
        code = cli.run_command(cli.ziggurat, "ziggurat", command)
        out, err = capsys.readouterr()
        return code, out, err

    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    code, out, err = run("--json-schema", json.dumps(schema), "--seed", 1)
    assert code == 0, err
    assert json.loads(out)["a"] in ("x", "y")
    assert err.rstrip().endswith("stop]")
    code, out, err = run("--grammar", "root ::= (")
    assert (code, out) == (2, "")
    assert err.startswith("ziggurat: error: the grammar is wrong in line 1, column 11")
    code, out, err = run("--logit-bias", "999999+1")
    assert (code, out) == (2, "")
    assert "the logit bias is of token 999999" in err


def test_help_has_sections() -> None:
    text = CliRunner().invoke(command_run.run, ["--help"]).output
    places = [text.index(f"\n{title}:\n") for title in ("Options", "Context", "KV budget", "Sampling", "Repetition")]
    assert places == sorted(places)
    assert text.index("--dry-base") > places[-1] > text.index("--temp ") > places[-2]
    assert text.count("--seed") == 1
