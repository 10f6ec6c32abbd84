from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ziggurat.runtime.engine.text import TextAssembler


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


@pytest.mark.parametrize(
    ("pieces", "stop", "shown", "stopped"),
    [
        ([b"a\xf0", b"\x9f\x98", b"\x80b"], (), "a😀b", False),  # a character over three tokens
        ([b"a\xe6", b"\x97", b"\xa5b"], ("日",), "a", True),  # and a stop string that it is
        ([b"x\xe6\x97", b"\xa5\xe6", b"\x9c\xac."], ("日本",), "x", True),
        ([b"aab", b"aabc"], ("aabc",), "aab", True),  # begins again within what is held back
        ([b"<", b"<<e", b"nd>"], ("<end>",), "<<", True),
        ([b"abc", b"d"], ("abcde", "cd"), "ab", True),  # ends within what another one holds back
        ([b"abc", b"x"], ("abcde", "cd"), "abcx", False),
        ([b"abcde"], ("cd", "bcde"), "a", True),  # both in one token: the one that begins first
        ([b"ab", b"ab", b"ab!"], ("abab!",), "ab", True),
        (["e\u0301".encode()[:2], "e\u0301".encode()[2:], b"z"], ("\u0301",), "e", True),  # within a grapheme
        (["👩\u200d".encode(), "👧".encode()], ("\u200d👧",), "👩", True),
        ([b"a\xe2", b"\x82", b"b"], ("b",), "a\ufffd", True),  # a broken character before the stop
        ([b"a\xed\xa0", b"\x80b"], (), "a\ufffd\ufffd\ufffdb", False),  # half of a surrogate pair
        ([b"stop"], ("stop",), "", True),
        ([b"sto"], ("stop",), "sto", False),
    ],
)
def test_hard_cases(pieces: list[bytes], stop: tuple[str, ...], shown: str, stopped: bool) -> None:
    assert assemble(pieces, stop) == (shown, stopped)


@given(st.text("aé日😀", max_size=10), st.lists(st.text("aé日😀", min_size=1, max_size=3), max_size=3), st.data())
def test_nothing_that_was_shown_belongs_to_a_stop_string(text: str, stops: list[str], data: st.DataObject) -> None:
    whole = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    shown, stopped = assemble(pieces, tuple(stops))
    assert stopped == any(stop in text for stop in stops)
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    assert shown == text or any(text.startswith(stop, len(shown)) for stop in stops)
