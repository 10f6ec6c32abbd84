"""Finds tool calls in an answer while it is written.

The text is read character by character, so it makes no difference where the pieces that arrive are cut. What only
might be a call is held back; when it is none, every character of it comes out as text.
"""

from __future__ import annotations

import string
from collections import deque
from collections.abc import Callable, Collection, Generator

from ziggurat.runtime.server.tools.call import CallReader, NamedReader, NoCallError
from ziggurat.runtime.server.tools.deltas import ArgumentsDelta, CallDelta, Delta, TextDelta, new_id
from ziggurat.runtime.server.tools.forms import Form

_BLANKS = " \t\n\r"
_FENCE = "```"
_THOUGHT = "</think>"  # an answer begins after it
_NAME_CHARACTERS = frozenset(string.ascii_letters + string.digits + "_-.")
_MAX_NAME = 64

_Steps = Generator[None, None, None]


class ToolCallParser:
    """One answer's text in, deltas out. ``names`` are those of the functions; what calls none of them is text.

    ``eager``: arguments are passed on as they come. What turns out to be broken after that cannot be taken back, and
    the call keeps what it has; else calls come when they are whole. ``single``: after one whole call nothing more
    comes, whatever is fed, and ``finished`` says so. ``n_calls`` have come.
    """

    def __init__(
        self,
        form: Form,
        names: Collection[str],
        *,
        eager: bool = False,
        single: bool = False,
        make_id: Callable[[], str] | None = None,
    ) -> None:
        self.n_calls = 0
        self.finished = False
        self._form, self._names, self._eager, self._single = form, frozenset(names), eager, single
        self._make_id = make_id or (lambda: new_id(form))
        self._markers = [marker for marker in (form.marker, _THOUGHT if form.at_start else "") if marker]
        self._out: list[Delta] = []
        self._input: deque[str] = deque()
        self._ended = False
        self._character = ""
        self._held: list[str] = []  # of what may be a call: all that was taken and not given out
        self._first = {marker[0] for marker in self._markers}
        self._plain = self._said = False  # text, of which none is held; and some came since the last call
        self._steps = self._run()
        next(self._steps)

    def feed(self, text: str) -> list[Delta]:
        """Add more of the text and return what became certain."""
        if not text:
            return []
        if self._plain and text[-1] not in _BLANKS and self._first.isdisjoint(text):  # as nearly all of it is
            return [TextDelta(text)]
        self._input.extend(text)
        next(self._steps)
        return self._take_out()

    def finish(self) -> list[Delta]:
        """Return what was held back, when no more text comes."""
        if not self._ended:
            self._ended = True
            next(self._steps, None)
        return self._take_out()

    def _take_out(self) -> list[Delta]:
        out, self._out = self._out, []
        return out

    # What follows runs as a coroutine: it stops wherever it needs a character that has not come yet.

    def _next(self) -> _Steps:
        """Take a character into ``_character``; an empty one at the end of the text."""
        while not self._input and not self._ended:
            yield
        self._character = self._input.popleft() if self._input else ""

    def _hold(self) -> _Steps:
        yield from self._next()
        if self._character:
            self._held.append(self._character)

    def _skip(self, characters: str) -> _Steps:
        """Hold characters up to the first that is none of these."""
        yield from self._hold()
        while self._character and self._character in characters:
            yield from self._hold()

    def _put_back(self, characters: list[str]) -> None:
        self._input.extendleft(reversed(characters))
        self._held.clear()

    def _run(self) -> _Steps:
        marker = _THOUGHT if self._form.at_start else ""
        while True:
            if marker:
                yield from self._block("" if marker == _THOUGHT else marker)
            if self.finished:
                while not self._ended:
                    self._input.clear()
                    yield
            marker = yield from self._text()
            if not marker:
                return

    def _text(self) -> Generator[None, None, str]:
        """Pass text on up to a marker, and return this with the blanks before it; at the end of the text nothing.

        Blanks are held until something follows: those between a text and a call are of neither.
        """
        held = ""
        self._said = not self.n_calls
        while True:
            self._plain = self._said and not held
            yield from self._next()
            character = self._character
            if not character:
                self._say(held if held.strip(_BLANKS) or self._said else "")
                return ""
            held += character
            for marker in self._markers:
                if held.endswith(marker):
                    if marker == _THOUGHT:
                        self._say(held)
                        return marker
                    n_before = len(held[: -len(marker)].rstrip(_BLANKS))
                    self._say(held[:n_before])
                    return held[n_before:]
            keep = len(held) - _beginning_of_marker(held, self._markers)
            keep = len(held[:keep].rstrip(_BLANKS))
            self._say(held[:keep])
            self._said = self._said or keep > 0
            held = held[keep:]

    def _say(self, text: str) -> None:
        if not text:
            return
        last = self._out[-1] if self._out else None
        if isinstance(last, TextDelta):
            self._out[-1] = TextDelta(last.text + text)
        else:
            self._out.append(TextDelta(text))

    def _block(self, marker: str) -> _Steps:
        """Read the calls after a marker (with the blanks before it), or where an answer begins."""
        self._plain = False
        self._held = list(marker)
        try:
            yield from self._open()
            more = True
            while more:
                yield from self._call()
                more = not self.finished and (yield from self._more())
        except NoCallError:
            if not self._character:  # the end: no part of it can be a call either
                self._say("".join(self._held))
                self._held.clear()
                return
            # the marker is text, and what came after it may hold others
            n_marker = len(marker) if self._held[: len(marker)] == list(marker) else 0
            self._say("".join(self._held[:n_marker]))
            self._put_back(self._held[n_marker:])

    def _open(self) -> _Steps:
        """Read up to the first character of a call."""
        yield from self._skip(_BLANKS)
        if self._character == "`" and self._form.at_start:
            yield from self._expect(_FENCE)
            yield from self._skip("json" + _BLANKS)
        for token in self._form.opening:
            yield from self._expect(token)
            yield from self._skip(_BLANKS)

    def _expect(self, token: str) -> _Steps:
        """Hold the rest of a token, whose first character is held; ends at its last one."""
        for place, expected in enumerate(token):
            if place:
                yield from self._hold()
            if self._character != expected:
                raise NoCallError

    def _call(self) -> _Steps:
        """Read a call, whose first character is held, and give it out."""
        reader: CallReader | NamedReader = CallReader(self._names)
        if self._form.named:
            reader = NamedReader((yield from self._name()))
        index, begun = self.n_calls, False
        while True:
            try:
                if not self._character:
                    raise NoCallError
                given = reader.feed(self._character)
            except NoCallError:
                if begun:  # and given out
                    self._held = [self._character] if self._character else []
                raise
            if given and self._eager:
                if not begun:
                    begun = True
                    self._begin(reader.name or "")
                self._argue(index, given)
            if reader.done:
                break
            yield from self._hold()
        name, arguments = reader.finished()
        if not begun:
            self._begin(name)
            self._argue(index, arguments)
        self._held.clear()
        self.finished = self._single

    def _begin(self, name: str) -> None:
        self._out.append(CallDelta(self.n_calls, self._make_id(), name))
        self.n_calls += 1

    def _argue(self, index: int, text: str) -> None:
        last = self._out[-1] if self._out else None
        if isinstance(last, ArgumentsDelta):
            self._out[-1] = ArgumentsDelta(index, last.text + text)
        else:
            self._out.append(ArgumentsDelta(index, text))

    def _name(self) -> Generator[None, None, str]:
        """Read a name and what stands between it and the arguments."""
        name = ""
        while self._character and self._character in _NAME_CHARACTERS and len(name) <= _MAX_NAME:
            name += self._character
            yield from self._hold()
        if name not in self._names:
            raise NoCallError
        while self._character == "[":
            tag = ""
            while not tag.endswith("]"):
                tag += self._character
                if not self._character or not any(known.startswith(tag) for known in ("[CALL_ID]", "[ARGS]")):
                    raise NoCallError
                yield from self._hold()
            if tag == "[CALL_ID]":
                while self._character and self._character in _NAME_CHARACTERS:
                    yield from self._hold()
        if self._character and self._character in _BLANKS:
            yield from self._skip(_BLANKS)
        return name

    def _more(self) -> Generator[None, None, bool]:
        """Read what follows a call; True when it is another, whose first character is held."""
        closers = self._form.closers
        between = _BLANKS + self._form.separators
        while True:
            yield from self._skip(between)
            if self._character == "{" and not self._form.named and closers == self._form.closers:
                return True
            closer = next((closer for closer in closers if closer[0] == self._character), None)
            if closer is None:
                break
            closers, between = closers[closers.index(closer) + 1 :], _BLANKS
            try:
                yield from self._expect(closer)
            except NoCallError:
                break
            self._held.clear()
        if self._character:
            self._put_back(self._held)
        self._held.clear()  # the end: blanks, and closers that were cut off
        return False


def _beginning_of_marker(text: str, markers: list[str]) -> int:
    """Length of the longest end of a text that begins a marker and is no whole one."""
    longest = min(len(text), max(map(len, markers), default=1) - 1)
    lengths = range(longest, 0, -1)
    return next((n for n in lengths if any(marker.startswith(text[-n:]) for marker in markers)), 0)
