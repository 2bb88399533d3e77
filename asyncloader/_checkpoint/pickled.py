"""Reads what `torch.save` pickles, without calling anything that the pickle names.

A pickle is a program for a small machine. Python's own (`pickle.Unpickler`) imports and calls what
the program asks for; torch's `weights_only` calls a list of functions, and makes tensors. This one
makes plain values, and descriptions of tensors; the few functions that it knows are its own. Memory
and time stay in proportion to the text: no instruction copies a value, keys cannot be made to
collide, and a size that the text claims counts for nothing before its bytes have been seen.

The instructions: https://github.com/python/cpython/blob/main/Lib/pickletools.py
"""

from __future__ import annotations

import struct
from reprlib import repr as shown  # shortens, and takes lists nested a thousand deep
from typing import TYPE_CHECKING, Any, Final

from .rebuilding import Global, PickleError, Refused, Tensor, called, known, storage_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


_MOST_DIGITS = 400  # of a number in text: reading one takes the square of their count
_LARGE = 1 << 60  # as a key
_PROTOCOL = 5  # the newest


class _Mark:
    """Where the arguments of an instruction begin."""


_MARK: Final = _Mark()


def unpickled(text: bytes) -> object:
    """Return what a pickle describes.

    Dicts of all kinds are dicts; lists, tuples, numbers and texts are themselves; tensors and
    parameters are `Tensor`; names of constants are `Global`; other tensors are `Refused`. An
    object may hold itself.

    Raises:
        PickleError: If it is damaged, or asks for a function that is not known.
    """
    try:
        return _Machine(text).run()
    except (IndexError, struct.error, UnicodeDecodeError, OverflowError) as error:
        raise PickleError(f"the pickle is damaged: {error}") from error


class _Machine:
    def __init__(self, text: bytes) -> None:
        self._text = text
        self._at = 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> object:
        text, steps = self._text, _STEPS
        while self._at < len(text):
            code = text[self._at]
            self._at += 1
            if code == _STOP:
                return self._stack.pop()
            step = steps.get(code)
            if step is None:
                raise PickleError(f"byte {self._at - 1}: instruction {chr(code)!r} is not read")
            step(self)
        raise PickleError("the pickle ends early")

    # What instructions are made of.

    def _take(self, length: int) -> bytes:
        end = self._at + length
        if length < 0 or end > len(self._text):
            raise PickleError("the pickle ends early")
        taken = self._text[self._at : end]
        self._at = end
        return taken

    def _line(self) -> bytes:
        end = self._text.find(b"\n", self._at)
        if end < 0:
            raise PickleError("the pickle ends early")
        line = self._text[self._at : end]
        self._at = end + 1
        return line

    def number(self, code: str) -> Any:  # noqa: ANN401  # int or float
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _since_mark(self) -> list[Any]:
        stack = self._stack
        for at in range(len(stack) - 1, -1, -1):
            if stack[at] is _MARK:
                values = stack[at + 1 :]
                del stack[at:]
                return values
        raise PickleError("the pickle is damaged: arguments without a beginning")

    def _top(self, kind: type) -> Any:  # noqa: ANN401  # of that kind
        if type(self._stack[-1]) is not kind:
            raise PickleError(f"the pickle is damaged: no {kind.__name__} where one is filled")
        return self._stack[-1]

    def digits(self) -> int:
        line = self._line().rstrip(b"L")
        if len(line) > _MOST_DIGITS:
            raise PickleError("a number of more digits than are read")
        try:
            return int(line)
        except ValueError as error:
            raise PickleError(f"the pickle is damaged: {line!r} is no number") from error

    # Instructions.

    def push(self, value: object) -> None:
        self._stack.append(value)

    def proto(self) -> None:
        if (protocol := self._take(1)[0]) > _PROTOCOL:
            raise PickleError(f"pickle protocol {protocol} is not read")

    def frame(self) -> None:
        self._take(8)

    def pop(self) -> None:
        self._stack.pop()

    def pop_mark(self) -> None:
        self._since_mark()

    def dup(self) -> None:
        self._stack.append(self._stack[-1])

    def int_text(self) -> None:
        line = self._text[self._at : self._at + 3]
        if line in {b"00\n", b"01\n"}:
            self._at += 3
            self.push(line == b"01\n")
        else:
            self.push(self.digits())

    def float_text(self) -> None:
        line = self._line()
        try:
            self.push(float(line))
        except ValueError as error:
            raise PickleError(f"the pickle is damaged: {line!r} is no number") from error

    def long(self, code: str) -> None:
        self.push(int.from_bytes(self._take(self.number(code)), "little", signed=True))

    def unicode(self, code: str) -> None:
        self.push(self._take(self.number(code)).decode("utf-8", "surrogatepass"))

    def bytes_(self, code: str) -> None:
        self.push(self._take(self.number(code)))

    def unicode_text(self) -> None:
        self.push(self._line().decode("raw-unicode-escape"))

    def tuple_(self, count: int) -> None:
        stack = self._stack
        if len(stack) < count or _MARK in stack[len(stack) - count :]:
            raise PickleError("the pickle is damaged: too few values for a tuple")
        values = tuple(stack[len(stack) - count :])
        del stack[len(stack) - count :]
        stack.append(values)

    def tuple_since_mark(self) -> None:
        self.push(tuple(self._since_mark()))

    def list_since_mark(self) -> None:
        self.push(self._since_mark())

    def dict_since_mark(self) -> None:
        values = self._since_mark()
        self.push({})
        self._fill(values)

    def _fill(self, pairs: Sequence[Any]) -> None:
        target = self._top(dict)
        if len(pairs) % 2:
            raise PickleError("the pickle is damaged: a key without a value")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            name = key if type(key) in {str, int} else shown(key)
            if type(key) is int and abs(key) > _LARGE:  # a million could be made to have one hash
                name = shown(key)
            if name is not key and name in target:
                raise PickleError(f"a dict with two keys that are shown as {name}")
            target[name] = value

    def set_item(self) -> None:
        value = self._stack.pop()
        key = self._stack.pop()
        self._fill((key, value))

    def set_items(self) -> None:
        self._fill(self._since_mark())

    def append(self) -> None:
        value = self._stack.pop()
        self._top(list).append(value)

    def appends(self) -> None:
        values = self._since_mark()
        self._top(list).extend(values)

    def put(self, index: int) -> None:
        if index > len(self._text):  # each takes two bytes of it
            raise PickleError(f"the pickle is damaged: it keeps a value as number {index}")
        self._memo[index] = self._stack[-1]

    def memoize(self) -> None:
        self.put(len(self._memo))

    def get(self, index: int) -> None:
        if index not in self._memo:
            raise PickleError(f"the pickle is damaged: value {index} was never kept")
        self.push(self._memo[index])

    def global_text(self) -> None:
        module, name = self._line(), self._line()
        self.push(known(f"{module.decode()}.{name.decode()}"))

    def stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            raise PickleError("the pickle is damaged: a name that is no text")
        self.push(known(f"{module}.{name}"))

    def persistent(self) -> None:
        self.push(storage_of(self._stack.pop()))

    def reduce(self) -> None:
        arguments = self._stack.pop()
        function = self._stack.pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise PickleError("the pickle is damaged: it calls what is no function")
        self.push(called(function.name, arguments))

    def build(self) -> None:
        """Give an object attributes, as a state dict has `_metadata`: they are left out."""
        self._stack.pop()
        if not isinstance(self._stack[-1], dict | Tensor | Refused | Global):
            raise PickleError("the pickle is damaged: a plain value gets attributes")


_STOP = ord(".")
_STEPS: dict[int, Callable[[_Machine], None]] = {
    ord(code): step
    for code, step in {
        "\x80": _Machine.proto,
        "\x95": _Machine.frame,
        "0": _Machine.pop,
        "1": _Machine.pop_mark,
        "2": _Machine.dup,
        "(": lambda machine: machine.push(_MARK),
        "N": lambda machine: machine.push(None),
        "\x88": lambda machine: machine.push(value=True),
        "\x89": lambda machine: machine.push(value=False),
        "I": _Machine.int_text,
        "L": lambda machine: machine.push(machine.digits()),
        "J": lambda machine: machine.push(machine.number("<i")),
        "K": lambda machine: machine.push(machine.number("<B")),
        "M": lambda machine: machine.push(machine.number("<H")),
        "\x8a": lambda machine: machine.long("<B"),
        "\x8b": lambda machine: machine.long("<i"),
        "F": _Machine.float_text,
        "G": lambda machine: machine.push(machine.number(">d")),
        "V": _Machine.unicode_text,
        "X": lambda machine: machine.unicode("<I"),
        "\x8c": lambda machine: machine.unicode("<B"),
        "\x8d": lambda machine: machine.unicode("<Q"),
        "B": lambda machine: machine.bytes_("<I"),
        "C": lambda machine: machine.bytes_("<B"),
        "\x8e": lambda machine: machine.bytes_("<Q"),
        ")": lambda machine: machine.push(()),
        "\x85": lambda machine: machine.tuple_(1),
        "\x86": lambda machine: machine.tuple_(2),
        "\x87": lambda machine: machine.tuple_(3),
        "t": _Machine.tuple_since_mark,
        "]": lambda machine: machine.push([]),
        "l": _Machine.list_since_mark,
        "a": _Machine.append,
        "e": _Machine.appends,
        "}": lambda machine: machine.push({}),
        "d": _Machine.dict_since_mark,
        "s": _Machine.set_item,
        "u": _Machine.set_items,
        "p": lambda machine: machine.put(machine.digits()),
        "q": lambda machine: machine.put(machine.number("<B")),
        "r": lambda machine: machine.put(machine.number("<I")),
        "\x94": _Machine.memoize,
        "g": lambda machine: machine.get(machine.digits()),
        "h": lambda machine: machine.get(machine.number("<B")),
        "j": lambda machine: machine.get(machine.number("<I")),
        "c": _Machine.global_text,
        "\x93": _Machine.stack_global,
        "Q": _Machine.persistent,
        "R": _Machine.reduce,
        "b": _Machine.build,
    }.items()
}
