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
# One instruction in so many bytes may make a value. Of a state dict it is one in ten, and a value
# takes a hundred times the room of its instruction.
_RARE = 4


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
    except PickleError:
        raise
    except KeyError as error:
        raise PickleError(f"the pickle is damaged: value {error} was never kept") from error
    except (IndexError, struct.error, ValueError, OverflowError) as error:
        raise PickleError(f"the pickle is damaged, or ends early: {error}") from error


class _Machine:
    def __init__(self, text: bytes) -> None:
        self._text = text
        self._at = 0
        self.stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> object:  # noqa: C901  # a branch for each
        """Carry out all instructions. Those that most of a state dict is made of are done here."""
        text, stack, memo, steps = self._text, self.stack, self._memo, _STEPS
        at, left = self._at, len(text) // _RARE + 1000
        while True:
            code, at = text[at], at + 1
            if code == _LONG_BINPUT:
                memo[_UINT.unpack_from(text, at)[0]] = stack[-1]
                at += 4
            elif code == _BINPUT:
                memo[text[at]] = stack[-1]
                at += 1
            elif code == _BINGET:
                stack.append(memo[text[at]])
                at += 1
            elif code == _BININT1:
                stack.append(text[at])
                at += 1
            elif code == _MARK_CODE:
                stack.append(_MARK)
            elif code == _BINUNICODE:
                end = at + 4 + _UINT.unpack_from(text, at)[0]
                if end > len(text):
                    raise PickleError("the pickle ends early")
                stack.append(str(text[at + 4 : end], "utf-8", "surrogatepass"))
                at = end
            elif code == _STOP:
                return stack.pop()
            elif (step := steps.get(code)) is not None:
                if (left := left - 1) < 0:
                    raise PickleError("it makes more values than a file of tensors has use for")
                self._at = at
                step(self)
                at = self._at
            else:
                raise PickleError(f"byte {at - 1}: instruction {chr(code)!r} is not read")

    # What instructions are made of.

    def take(self, length: int) -> bytes:
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
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def since_mark(self) -> list[Any]:
        stack = self.stack
        for at in range(len(stack) - 1, -1, -1):
            if stack[at] is _MARK:
                values = stack[at + 1 :]
                del stack[at:]
                return values
        raise PickleError("the pickle is damaged: arguments without a beginning")

    def _top(self, kind: type) -> Any:  # noqa: ANN401  # of that kind
        if type(self.stack[-1]) is not kind:
            raise PickleError(f"the pickle is damaged: no {kind.__name__} where one is filled")
        return self.stack[-1]

    def digits(self) -> int:
        line = self._line().rstrip(b"L")
        if len(line) > _MOST_DIGITS:
            raise PickleError("a number of more digits than are read")
        return int(line)

    # Instructions.

    def push(self, value: object) -> None:
        self.stack.append(value)

    def proto(self) -> None:
        if (protocol := self.take(1)[0]) > _PROTOCOL:
            raise PickleError(f"pickle protocol {protocol} is not read")

    def int_text(self) -> None:
        line = self._text[self._at : self._at + 3]
        if line in {b"00\n", b"01\n"}:
            self._at += 3
            self.push(line == b"01\n")
        else:
            self.push(self.digits())

    def float_text(self) -> None:
        self.push(float(self._line()))

    def long(self, code: str) -> None:
        self.push(int.from_bytes(self.take(self.number(code)), "little", signed=True))

    def unicode(self, code: str) -> None:
        self.push(self.take(self.number(code)).decode("utf-8", "surrogatepass"))

    def unicode_text(self) -> None:
        self.push(self._line().decode("raw-unicode-escape"))

    def tuple_(self, count: int) -> None:
        stack = self.stack
        if len(stack) < count or _MARK in stack[len(stack) - count :]:
            raise PickleError("the pickle is damaged: too few values for a tuple")
        values = tuple(stack[len(stack) - count :])
        del stack[len(stack) - count :]
        stack.append(values)

    def dict_since_mark(self) -> None:
        values = self.since_mark()
        self.push({})
        self.fill(values)

    def fill(self, pairs: Sequence[Any]) -> None:
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
        value = self.stack.pop()
        key = self.stack.pop()
        self.fill((key, value))

    def append(self) -> None:
        value = self.stack.pop()
        self._top(list).append(value)

    def appends(self) -> None:
        values = self.since_mark()
        self._top(list).extend(values)

    def put(self, index: int) -> None:
        if index > len(self._text):  # each takes two bytes of it
            raise PickleError(f"the pickle is damaged: it keeps a value as number {index}")
        self._memo[index] = self.stack[-1]

    def memoize(self) -> None:
        self.put(len(self._memo))

    def get(self, index: int) -> None:
        self.push(self._memo[index])

    def global_text(self) -> None:
        module, name = self._line(), self._line()
        self.push(known(f"{module.decode()}.{name.decode()}"))

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise PickleError("the pickle is damaged: a name that is no text")
        self.push(known(f"{module}.{name}"))

    def persistent(self) -> None:
        self.push(storage_of(self.stack.pop()))

    def reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack.pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise PickleError("the pickle is damaged: it calls what is no function")
        self.push(called(function.name, arguments))

    def build(self) -> None:
        """Give an object attributes, as a state dict has `_metadata`: they are left out."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict | Tensor | Refused | Global):
            raise PickleError("the pickle is damaged: a plain value gets attributes")


_UINT = struct.Struct("<I")
_STOP, _MARK_CODE, _BINUNICODE, _BININT1 = b".(XK"
_BINGET, _BINPUT, _LONG_BINPUT = b"hqr"
_STEPS: dict[int, Callable[[_Machine], object]] = {
    ord(code): step
    for code, step in {
        "\x80": _Machine.proto,
        "\x95": lambda machine: machine.take(8),
        "0": lambda machine: machine.stack.pop(),
        "1": lambda machine: machine.since_mark(),
        "2": lambda machine: machine.push(machine.stack[-1]),
        "N": lambda machine: machine.push(None),
        "\x88": lambda machine: machine.push(value=True),
        "\x89": lambda machine: machine.push(value=False),
        "I": _Machine.int_text,
        "L": lambda machine: machine.push(machine.digits()),
        "J": lambda machine: machine.push(machine.number("<i")),
        "M": lambda machine: machine.push(machine.number("<H")),
        "\x8a": lambda machine: machine.long("<B"),
        "\x8b": lambda machine: machine.long("<i"),
        "F": _Machine.float_text,
        "G": lambda machine: machine.push(machine.number(">d")),
        "V": _Machine.unicode_text,
        "\x8c": lambda machine: machine.unicode("<B"),
        "\x8d": lambda machine: machine.unicode("<Q"),
        "B": lambda machine: machine.push(machine.take(machine.number("<I"))),
        "C": lambda machine: machine.push(machine.take(machine.number("<B"))),
        "\x8e": lambda machine: machine.push(machine.take(machine.number("<Q"))),
        ")": lambda machine: machine.push(()),
        "\x85": lambda machine: machine.tuple_(1),
        "\x86": lambda machine: machine.tuple_(2),
        "\x87": lambda machine: machine.tuple_(3),
        "t": lambda machine: machine.push(tuple(machine.since_mark())),
        "]": lambda machine: machine.push([]),
        "l": lambda machine: machine.push(machine.since_mark()),
        "a": _Machine.append,
        "e": _Machine.appends,
        "}": lambda machine: machine.push({}),
        "d": _Machine.dict_since_mark,
        "s": _Machine.set_item,
        "u": lambda machine: machine.fill(machine.since_mark()),
        "p": lambda machine: machine.put(machine.digits()),
        "\x94": _Machine.memoize,
        "g": lambda machine: machine.get(machine.digits()),
        "j": lambda machine: machine.get(machine.number("<I")),
        "c": _Machine.global_text,
        "\x93": _Machine.stack_global,
        "Q": _Machine.persistent,
        "R": _Machine.reduce,
        "b": _Machine.build,
    }.items()
}
