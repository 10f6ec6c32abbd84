"""What a grammar must not be: endless, left-recursive, or so ambiguous that choosing a token takes forever.

The library follows every reading of the text at once and keeps a stack for each. It finds left recursion where it is
plain, and neither hidden one, which ends in an endless loop or an abort, nor readings that double with every character.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ziggurat.runtime.errors import InvalidRequestError

#: Steps that the library's own search for left recursion may take, and how deep it may call itself.
_MAX_STEPS, _MAX_CHAIN = 5_000_000, 2500
#: The probe for ambiguity: random texts and their length, the length of runs of one character, the readings that these
#: and the stacks that all may have, and the steps for one text and for all runs.
_WALKS, _WALK, _RUN, _MAX_READINGS, _MAX_STACKS = 16, 100, 32, 1_000_000, 1000
_READ_STEPS, _PROBE_STEPS = 50_000, 100_000
_LONG_TOKENS = " \t\n-=_*#."  # what vocabularies have long tokens of
_MAX_CHARACTERS = 40


@dataclass(frozen=True)
class Chars:
    """One character out of ranges (both ends included), or one that is in none of them."""

    ranges: tuple[tuple[int, int], ...]
    negated: bool = False

    def matches(self, code: int) -> bool:
        """Whether a character is one of these."""
        return any(low <= code <= high for low, high in self.ranges) != self.negated


@dataclass(frozen=True)
class TokenItem:
    """One token of the vocabulary, or any other."""

    negated: bool = False

    def matches(self, _code: int) -> bool:
        """Whether it can be a token of this character: which one it is, is not known here."""
        return True


@dataclass(frozen=True)
class Ref:
    """Another rule."""

    number: int

    def matches(self, _code: int) -> bool:
        """Never: it stands for what it refers to."""
        return False


Element = Chars | TokenItem | Ref
Alternatives = list[list[Element]]


@dataclass(frozen=True)
class Rules:
    """Rules by number, each the sequences it may be, and their names; an underscore and what follows is ours."""

    rules: list[Alternatives]
    names: list[str]

    def name(self, number: int) -> str:
        """Return the name as it stands in the text."""
        return self.names[number].partition("_")[0]


def check(rules: Rules, root: str) -> None:
    """Raise InvalidRequestError when the grammar cannot be used safely, naming a rule and the reason."""
    _check_ends(rules, rules.names.index(root))
    edges = _left_edges(rules)
    order = _ascending(rules, edges)
    steps, chain = [0] * len(order), [0] * len(order)
    for number in order:
        steps[number] = 1 + sum(steps[edge] for edge in edges[number])
        chain[number] = 1 + max((chain[edge] for edge in edges[number]), default=0)
    if sum(steps) > _MAX_STEPS or max(chain) > _MAX_CHAIN:
        worst = rules.name(max(range(len(order)), key=steps.__getitem__))
        raise InvalidRequestError(f"the rule {worst} of the grammar can begin in too many ways; simplify it")
    _Probe(rules).run(rules.names.index(root))


def _check_ends(rules: Rules, root: int) -> None:
    ending = _derives(rules.rules, lambda alternative: True)
    reached, todo = {root}, [root]
    while todo:
        number = todo.pop()
        if not ending[number]:
            raise InvalidRequestError(f"the rule {rules.name(number)} of the grammar needs itself and never ends")
        for alternative in rules.rules[number]:
            new = {element.number for element in alternative if isinstance(element, Ref)} - reached
            reached |= new
            todo += new


def _derives(rules: list[Alternatives], counts: Callable[[list[Element]], bool]) -> list[bool]:
    """Return which rules have an alternative that counts, and whose references all derive too."""
    derives = [False] * len(rules)
    users: list[list[tuple[int, int]]] = [[] for _ in rules]
    waiting: list[list[int]] = []
    todo = []
    for number, alternatives in enumerate(rules):
        needs = [sum(isinstance(element, Ref) for element in sequence) for sequence in alternatives]
        for index, sequence in enumerate(alternatives):
            if not counts(sequence):
                needs[index] = -1
                continue
            for element in sequence:
                if isinstance(element, Ref):
                    users[element.number].append((number, index))
        waiting.append(needs)
        if 0 in needs:
            derives[number] = True
            todo.append(number)
    while todo:
        for user, index in users[todo.pop()]:
            waiting[user][index] -= 1
            if waiting[user][index] == 0 and not derives[user]:
                derives[user] = True
                todo.append(user)
    return derives


def _left_edges(rules: Rules) -> list[list[int]]:
    """Return, for each rule, the rules that its text can begin with, once for each way."""
    nullable = _derives(rules.rules, lambda sequence: all(isinstance(element, Ref) for element in sequence))
    edges: list[list[int]] = []
    for alternatives in rules.rules:
        found = []
        for sequence in alternatives:
            for element in sequence:
                if not isinstance(element, Ref):
                    break
                found.append(element.number)
                if not nullable[element.number]:
                    break
        edges.append(found)
    return edges


def _ascending(rules: Rules, edges: list[list[int]]) -> list[int]:
    """Return the rules such that each comes after those it can begin with. Refuses left recursion."""
    order: list[int] = []
    state = [0] * len(edges)  # 1: on the path, 2: done
    for start in range(len(edges)):
        path = [] if state[start] else [(start, iter(edges[start]))]
        state[start] = state[start] or 1
        while path:
            number, rest = path[-1]
            following = next(rest, None)
            if following is None:
                state[number] = 2
                order.append(number)
                path.pop()
            elif state[following] == 1:
                name = rules.name(following)
                raise InvalidRequestError(f"the rule {name} of the grammar can begin with itself (left recursion)")
            elif state[following] == 0:
                state[following] = 1
                path.append((following, iter(edges[following])))
    return order


_Place = tuple[int, int, int]  # rule, alternative, element
_EMPTY = 0


class _Probe:
    """Reads texts and counts the ways to: random ones, and runs of one character, as long tokens are.

    A limited search, not a proof: it finds the usual accidents (``x ::= "a" x "b" | "a" x "c"``, ``(a|a)*``). A stack
    is a number; it stands for the place at its top and the stack below.
    """

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._stacks: list[tuple[_Place, int]] = [((0, 0, 0), _EMPTY)]
        self._numbers: dict[tuple[_Place, int], int] = {}
        self._tops: dict[int, tuple[int, ...]] = {}
        self._steps = self._limit = 0

    def run(self, root: int) -> None:
        """Raise InvalidRequestError when there are too many."""
        characters = self._characters()
        randomly = random.Random(0)
        for _ in range(_WALKS):
            if self._steps < _PROBE_STEPS:
                self._read(root, lambda stacks: self._any(stacks, characters, randomly), _WALK)
        self._steps = 0
        for number in [root, *range(len(self._rules.rules))]:
            for code in characters:
                if self._steps < _PROBE_STEPS:
                    self._read(number, lambda _stacks, code=code: code, _RUN)  # type: ignore[misc]

    def _characters(self) -> list[int]:
        """Return one character of every set, and those that make long tokens."""
        elements = {element for rule in self._rules.rules for sequence in rule for element in sequence}
        chars = [element for element in elements if isinstance(element, Chars)]
        samples = sorted({element.ranges[0][0] for element in chars if not element.negated})
        codes = dict.fromkeys([*map(ord, _LONG_TOKENS + "a0"), *samples])
        return [code for code in codes if any(element.matches(code) for element in elements)][:_MAX_CHARACTERS]

    def _any(self, stacks: Iterable[int], characters: list[int], randomly: random.Random) -> int | None:
        tops = {self._element(stack) for stack in stacks if stack}
        fitting = [code for code in characters if any(top.matches(code) for top in tops)]
        return randomly.choice(fitting) if fitting else None

    def _read(self, number: int, choose: Callable[[Iterable[int]], int | None], length: int) -> None:
        self._limit = self._steps + _READ_STEPS
        stacks: dict[int, int] = {}
        for alternative in range(len(self._rules.rules[number])):
            stacks.update(dict.fromkeys(self._expand(self._pushed(_EMPTY, (number, alternative, 0))), 1))
        for _ in range(length):
            code = choose(stacks)
            if code is None:
                return
            following: dict[int, int] = {}
            for stack, readings in stacks.items():
                if stack and self._element(stack).matches(code):
                    for after in self._expand(self._passed(stack)):
                        following[after] = following.get(after, 0) + readings
            stacks = following
            if not stacks:
                return
            self._count(len(stacks))
            if len(stacks) > _MAX_STACKS or (length == _RUN and sum(stacks.values()) > _MAX_READINGS):
                raise _ambiguous(f", such as a run of {chr(code)!r} in the rule {self._rules.name(number)}")

    def _count(self, steps: int) -> None:
        self._steps += steps
        if self._steps > self._limit:
            raise _ambiguous("")

    def _element(self, stack: int) -> Element:
        number, alternative, index = self._stacks[stack][0]
        return self._rules.rules[number][alternative][index]

    def _pushed(self, stack: int, place: _Place) -> int:
        """Return the stack with a place on top, or itself when nothing is at that place any more."""
        number, alternative, index = place
        if index == len(self._rules.rules[number][alternative]):
            return stack
        known = self._numbers.get((place, stack))
        if known is None:
            known = self._numbers[place, stack] = len(self._stacks)
            self._stacks.append((place, stack))
        return known

    def _passed(self, stack: int) -> int:
        (number, alternative, index), below = self._stacks[stack]
        return self._pushed(below, (number, alternative, index + 1))

    def _expand(self, stack: int) -> tuple[int, ...]:
        """Return the stacks that begin with a character or token, or are empty, which one stands for."""
        if stack in self._tops:
            return self._tops[stack]
        found: dict[int, None] = {}
        seen, todo = {stack}, [stack]
        while todo:
            current = todo.pop()
            element = self._element(current) if current else None
            if not isinstance(element, Ref):
                found[current] = None
                continue
            rest = self._passed(current)
            for alternative in range(len(self._rules.rules[element.number])):
                new = self._pushed(rest, (element.number, alternative, 0))
                if new not in seen:
                    seen.add(new)
                    todo.append(new)
            self._count(1)
        return self._tops.setdefault(stack, tuple(found))


def _ambiguous(example: str) -> InvalidRequestError:
    return InvalidRequestError(f"the grammar is too ambiguous: there are too many ways to read the same text{example}")
