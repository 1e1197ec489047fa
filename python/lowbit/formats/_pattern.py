"""Regular expressions that come from a file: matched in time that is bounded by pattern x text.

Python's `re` tries alternatives one after the other, and a short pattern can keep it busy for ever. Here a pattern becomes a
little machine that is in all its states at once. The syntax is the part of Python's that names of layers need: literals,
`.`, classes, \\d \\w \\s, groups, |, * + ? {m,n}, ^ $ \\b, and lookahead. Anything else is refused by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Final

__all__ = ["Pattern", "PatternError"]

_MAX_PATTERN: Final = 2000
_MAX_STATES: Final = 2000
_MAX_DEPTH: Final = 40
_MAX_REPEAT: Final = 1000
_SPECIAL: Final = frozenset("()[]{}*+?|^$.\\")
_ESCAPES: Final = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v"}

#: Whether a character goes on to the next state; None for states that take none.
_Test = Callable[[str], bool]


class PatternError(ValueError):
    """A pattern that is not a regular expression, or one of a kind that is not supported."""


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"


_CLASSES: Final[dict[str, _Test]] = {
    "d": lambda c: c.isdecimal(),
    "D": lambda c: not c.isdecimal(),
    "w": _is_word,
    "W": lambda c: not _is_word(c),
    "s": lambda c: c.isspace(),
    "S": lambda c: not c.isspace(),
}


@dataclasses.dataclass
class _State:
    """`test` takes a character and goes to `next`; without one all of `next` are entered for free, if `allowed` agrees."""

    next: list[int]
    test: _Test | None = None
    allowed: Callable[[str, int], bool] | None = None


# A parsed piece: given the state that follows, adds its states and returns the one to enter.
_Node = Callable[[list[_State], int], int]


def _add(states: list[_State], state: _State) -> int:
    if len(states) >= _MAX_STATES:
        raise PatternError("the pattern is too large")
    states.append(state)
    return len(states) - 1


def _one(test: _Test) -> _Node:
    return lambda states, after: _add(states, _State([after], test))


def _assertion(allowed: Callable[[str, int], bool]) -> _Node:
    return lambda states, after: _add(states, _State([after], None, allowed))


def _sequence(nodes: list[_Node]) -> _Node:
    def build(states: list[_State], after: int) -> int:
        for node in reversed(nodes):
            after = node(states, after)
        return after

    return build


def _alternatives(nodes: list[_Node]) -> _Node:
    if len(nodes) == 1:
        return nodes[0]
    return lambda states, after: _add(states, _State([node(states, after) for node in nodes]))


def _repeat(node: _Node, low: int, high: int | None) -> _Node:
    def build(states: list[_State], after: int) -> int:
        if high is None:
            loop = _add(states, _State([after]))
            states[loop].next.append(node(states, loop))
            after = loop
        else:
            for _ in range(high - low):
                after = _add(states, _State([after, node(states, after)]))
        for _ in range(low):
            after = _add(states, _State([node(states, after)]))  # a state each time, so that empty groups count as well
        return after

    return build


class Pattern:
    """A regular expression, compiled.

    Raises:
        PatternError: it is not one, or uses what is not supported (back references, lookbehind, flags).

    Example:
        >>> Pattern(r"model\\.layers\\.\\d+\\..*").match("model.layers.12.mlp.up_proj")
        True
    """

    def __init__(self, text: str) -> None:
        if len(text) > _MAX_PATTERN:
            raise PatternError(f"a pattern of {len(text)} characters is too long")
        self.text = text
        parser = _Parser(text)
        node = parser.alternatives(0)
        if parser.at < len(text):
            raise PatternError(f"unbalanced ')' at {parser.at}")
        self._states: list[_State] = [_State([])]
        self._start = node(self._states, 0)

    def match(self, name: str) -> bool:
        """Whether the pattern fits the beginning of `name`, as `re.match`."""
        return _run(self._states, self._start, name, 0)


def _run(states: list[_State], start: int, text: str, begin: int) -> bool:
    """Whether the machine reaches state 0, its end, from `begin` on."""
    current = _closure(states, [start], text, begin)
    at = begin
    while current:
        if 0 in current:
            return True
        if at == len(text):
            return False
        char = text[at]
        at += 1
        reached = []
        for index in current:
            test = states[index].test
            if test is not None and test(char):
                reached.append(states[index].next[0])
        current = _closure(states, reached, text, at)
    return False


def _closure(states: list[_State], entered: list[int], text: str, at: int) -> set[int]:
    """Every state reached without taking a character."""
    found: set[int] = set()
    while entered:
        index = entered.pop()
        if index in found:
            continue
        found.add(index)
        state = states[index]
        if state.test is None and (state.allowed is None or state.allowed(text, at)):
            entered.extend(state.next)
    return found


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.ahead = False  # inside a lookahead

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def take(self, expected: str) -> bool:
        if not self.text.startswith(expected, self.at):
            return False
        self.at += len(expected)
        return True

    def alternatives(self, depth: int) -> _Node:
        if depth > _MAX_DEPTH:
            raise PatternError("groups are nested too deeply")
        nodes = [self.sequence(depth)]
        while self.take("|"):
            nodes.append(self.sequence(depth))
        return _alternatives(nodes)

    def sequence(self, depth: int) -> _Node:
        nodes = []
        while self.peek() not in ("", "|", ")"):
            nodes.append(self.repeated(depth))
        return _sequence(nodes)

    def repeated(self, depth: int) -> _Node:
        begin = self.at
        node = self.atom(depth)
        bounds = self.bounds()
        if bounds is None:
            return node
        if self.text[begin] in "^$" or self.text.startswith(("(?=", "(?!", "\\b", "\\B"), begin):
            raise PatternError(f"nothing to repeat at {begin}")
        self.take("?")  # lazy or not, the same texts match
        if self.peek() in ("*", "+", "{") and self.peek():
            raise PatternError(f"multiple repeat at {self.at}")
        return _repeat(node, *bounds)

    def bounds(self) -> tuple[int, int | None] | None:
        for char, found in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self.take(char):
                return found
        if self.peek() != "{":
            return None
        end = self.text.find("}", self.at)
        low, comma, high = self.text[self.at + 1 : end].partition(",")
        digits = all(part == "" or (part.isascii() and part.isdigit() and len(part) < 6) for part in (low, high))
        if end < 0 or not digits or (low == "" and (high == "" or not comma)):
            raise PatternError(f"a '{{' that is no repetition at {self.at}; write '\\{{'")
        bounds = int(low or 0), (int(low) if not comma else int(high) if high else None)
        if max(bounds[0], bounds[1] or 0) > _MAX_REPEAT or (bounds[1] is not None and bounds[1] < bounds[0]):
            raise PatternError(f"repetition {self.text[self.at : end + 1]}")
        self.at = end + 1
        return bounds

    def atom(self, depth: int) -> _Node:
        char = self.peek()
        self.at += 1
        if char == "(":
            return self.group(depth)
        if char == "[":
            return _one(self.char_class())
        if char == "\\":
            return self.escape()
        if char == ".":
            return _one(lambda c: c != "\n")
        if char == "^":
            return _assertion(lambda text, at: at == 0)
        if char == "$":
            return _assertion(lambda text, at: at == len(text) or (at == len(text) - 1 and text[at] == "\n"))
        if char in "*+?{":
            raise PatternError(f"nothing to repeat at {self.at - 1}")
        return _one(lambda c: c == char)

    def group(self, depth: int) -> _Node:
        negative = self.text.startswith("?!", self.at)
        ahead = self.take("?=") or self.take("?!")
        if not ahead and not self.take("?:") and self.peek() == "?":
            raise PatternError(f"a group of a kind that is not supported at {self.at - 1}")
        if ahead and self.ahead:
            # Each level would cost another factor of the length.
            raise PatternError("a lookahead inside another is not supported")
        self.ahead = self.ahead or ahead
        node = self.alternatives(depth + 1)
        self.ahead = self.ahead and not ahead
        if not self.take(")"):
            raise PatternError("a '(' is not closed")
        return self.lookahead(node, negative) if ahead else node

    def lookahead(self, node: _Node, negative: bool) -> _Node:
        states: list[_State] = [_State([])]
        start = node(states, 0)
        return _assertion(lambda text, at: _run(states, start, text, at) != negative)

    def escape(self) -> _Node:
        char = self.peek()
        if char in _CLASSES:
            self.at += 1
            return _one(_CLASSES[char])
        if char in ("b", "B"):
            self.at += 1
            return _assertion(lambda text, at: _at_boundary(text, at) == (char == "b"))
        if char in ("A", "Z"):
            self.at += 1
            return _assertion(lambda text, at: at == (0 if char == "A" else len(text)))
        literal = self.literal_escape()
        return _one(lambda c: c == literal)

    def literal_escape(self) -> str:
        char = self.peek()
        self.at += 1
        if char in _ESCAPES:
            return _ESCAPES[char]
        if char == "" or char.isalnum():
            raise PatternError(f"the escape '\\{char}' is not supported")
        return char

    def char_class(self) -> _Test:
        negative = self.take("^")
        tests: list[_Test] = []
        first = True
        while first or self.peek() != "]":
            if self.peek() == "":
                raise PatternError("a '[' is not closed")
            first = False
            tests.append(self.class_item())
        self.at += 1
        return lambda c: any(test(c) for test in tests) != negative

    def class_item(self) -> _Test:
        if self.peek() == "\\" and self.text[self.at + 1 : self.at + 2] in _CLASSES:
            self.at += 2
            return _CLASSES[self.text[self.at - 1]]
        low = self.class_char()
        if self.peek() == "-" and self.text[self.at + 1 : self.at + 2] not in ("]", ""):
            self.at += 1
            high = self.class_char()
            if high < low:
                raise PatternError(f"the range {low}-{high} is empty")
            return lambda c: low <= c <= high
        return lambda c: c == low

    def class_char(self) -> str:
        char = self.peek()
        self.at += 1
        if char == "\\":
            return self.literal_escape()
        return char


def _at_boundary(text: str, at: int) -> bool:
    before = at > 0 and _is_word(text[at - 1])
    after = at < len(text) and _is_word(text[at])
    return before != after
