"""The `ziggurat` command as tests give it."""

from __future__ import annotations

import pytest

from ziggurat.runtime import cli


class Ziggurat:
    """Runs the command in this process, on one thread, and keeps what it wrote."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        if arguments[0] == "run" and "--threads" not in arguments:
            arguments = (*arguments, "--threads", 1)
        code = cli.run_command(cli.ziggurat, "ziggurat", [str(argument) for argument in arguments])
        out, err = self._capsys.readouterr()
        return code, out, err

    def fails(self, *arguments: object, code: int | None = None) -> str:
        """Run a command that must fail, check the form of its error, and return the message."""
        got, out, err = self(*arguments)
        assert got != 0 if code is None else got == code, err
        lines = err.strip().splitlines()
        assert out == ""
        assert len(lines) == 1
        assert lines[0].startswith("ziggurat: error: ")
        return lines[0]
