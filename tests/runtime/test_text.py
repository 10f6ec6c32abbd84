from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ziggurat.runtime.text import TextAssembler


def assemble(pieces: list[bytes], stop: tuple[str, ...] = ()) -> tuple[str, bool]:
    assembler, shown = TextAssembler(stop), ""
    for piece in pieces:
        shown += assembler.feed(piece)
        if assembler.stopped:
            break
    return shown + assembler.finish(), assembler.stopped


@given(st.text(), st.data())
def test_any_split_of_the_bytes_gives_the_text(text: str, data: st.DataObject) -> None:
    whole = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assembler = TextAssembler()
    shown = [assembler.feed(piece) for piece in pieces]
    assert all("\ufffd" not in piece for piece in shown) or "\ufffd" in text
    assert "".join(shown) + assembler.finish() == text


@given(st.text("abc", max_size=12), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_at_the_earliest_wherever_the_tokens_end(text: str, stops: list[str]) -> None:
    shown, stopped = assemble([character.encode() for character in text], tuple(stops))
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert (shown, stopped) == (text, False)
        return
    seen = text[: min(ends)]  # token by token, the stop string that is complete first decides
    assert stopped
    assert shown == seen[: min(seen.find(stop) for stop in stops if stop in seen)]


def test_a_possible_stop_string_is_held_back() -> None:
    assembler = TextAssembler(("<|end|>",))
    assert assembler.feed(b"yes <|e") == "yes "
    assert assembler.feed(b"x") == "<|ex"
    assert assembler.feed(b"<|end") == ""
    assert assembler.feed(b"|> more") == ""
    assert assembler.stopped
    assert assembler.feed(b"more") == ""
    assert assembler.finish() == ""


@pytest.mark.parametrize("data", [b"\xff", b"\xf0\x9f", b"a\xc3"])
def test_bytes_that_are_no_text_become_a_mark(data: bytes) -> None:
    shown, _ = assemble([data])
    assert shown.endswith("\ufffd")
