"""Describes dense tensors: their types, where their memory lies, and which of them share it.

Each question is asked of all tensors, then the next: of 100,000 tensors that takes a few dozen
milliseconds. One tensor after the other would take half a second.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

import numpy as np
import torch

from asyncloader._checkpoint.dtypes import TensorType
from asyncloader._memory.pages import is_read_only
from asyncloader._planning.targets import TensorTargets
from asyncloader._threads.call import lost_memory

from .checks import check_tensors, stored_dtype

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Destinations:
    """Dense tensors as they were when they were described. Holds on to their memory."""

    tensors: Mapping[str, torch.Tensor]
    held: Sequence[torch.Tensor]  # detached: the same memory, whatever becomes of the tensor
    targets: TensorTargets
    plain: NDArray[np.bool_]  # whether a file's bytes can go there as they lie
    begin: NDArray[np.int64]  # address of the first byte
    end: NDArray[np.int64]  # one past the last

    def name(self, number: int) -> str:
        return list(self.tensors)[number]

    def filled(self, names: Collection[str]) -> NDArray[np.int64]:
        """Return the numbers of the tensors that have bytes, as they lie in memory, int64 `[n]`."""
        chosen = np.array(self.targets.numbers(names), np.int64)
        chosen = chosen[self.end[chosen] > self.begin[chosen]]
        return chosen[np.argsort(self.begin[chosen])]

    def overlaps(self, names: Collection[str]) -> list[str]:
        """Return a sentence for each pair of tensors that share some of their memory, but not all.

        Views that interleave, as the columns of one matrix do, are apart.
        """
        order = self.filled(names)
        if not (self.begin[order[1:]] < self.end[order[:-1]]).any():
            return []  # nearly always; on several devices addresses may be alike by chance
        known, begin, end = list(self.tensors), self.begin, self.end
        problems = []
        open_: list[int] = []
        for at in sorted(order.tolist(), key=lambda at: (begin[at], end[at], known[at])):
            open_ = [other for other in open_ if end[other] > begin[at]]
            problems += [
                f"tensors {known[other]!r} and {known[at]!r} overlap in memory in part: what is "
                "loaded last would overwrite the other; give one of them memory of its own"
                for other in open_
                if self.held[other].device == self.held[at].device
                and share(self.held[other], self.held[at])
            ]
            open_.append(at)
        return problems

    def unsafe(self, names: Collection[str]) -> list[str]:
        """Return a sentence for each tensor to which a thread that was given up may still write."""
        lost = lost_memory()
        if not lost:
            return []
        chosen = self.targets.numbers(names)
        return [
            f"tensors[{name!r}] may still be written to by a read that was given up (a "
            "ReadStalledError): load into a new tensor"
            for name, at in zip(names, chosen, strict=True)
            if any(self.begin[at] < end and begin < self.end[at] for begin, end in lost)
        ]

    def check_memory(self, chosen: NDArray[np.int64], staged: NDArray[np.int64]) -> None:
        """Refuse tensors, by number, that lie elsewhere than when they were described, or nowhere.

        Values are copied to the `staged` ones among them: where such memory is read-only, a copy
        would end the process, so that is refused, too. Into the others the kernel writes, which
        returns an error.
        """
        given, names = list(self.tensors.values()), list(self.tensors)
        now = np.array([given[number].data_ptr() for number in chosen.tolist()], np.int64)
        filled = self.end > self.begin
        moved = (now != self.begin[chosen]) | (now == 0)
        for odd in chosen[filled[chosen] & moved][:1].tolist():
            what = "got other memory while it was being loaded" if self.begin[odd] else "has none"
            raise RuntimeError(
                f"tensors[{names[odd]!r}] {what}: its storage may not be exchanged, resized or "
                "empty during a load"
            )
        for number in staged[filled[staged]].tolist():
            if self.held[number].is_cpu and is_read_only(int(self.begin[number])):
                raise ValueError(
                    f"tensors[{names[number]!r}] cannot be written to, as a file that is mapped "
                    "read-only: load into a copy (`tensor.clone()`)"
                )

    def span(self) -> tuple[memoryview, int]:
        """Return one view that spans the memory of all plain tensors, and where it begins.

        Anything, or nothing, may lie between them: use only slices of the view, and only where a
        tensor lies. A slice takes a tenth of the time that a view of each tensor would take, and
        keeps all of them alive.

        Not by way of `numpy()`: then a tensor's storage can never be resized again. A program that
        resizes it during a load takes the memory away: `Loader` says so.
        """
        used = self.plain & (self.end > self.begin) & (self.begin > 0)
        if not used.any():
            return memoryview(b""), 0
        base = int(self.begin[used].min())
        memory = (ctypes.c_ubyte * (int(self.end[used].max()) - base)).from_address(base)
        memory._tensors = self.held  # type: ignore[attr-defined]  # as long as any slice  # noqa: SLF001
        return memoryview(memory).cast("B"), base


def describe_tensors(tensors: Mapping[str, torch.Tensor]) -> Destinations:
    """Describe tensors, and hold on to their memory.

    Raises:
        TypeError: If one is no tensor.
        ValueError: If one cannot be written to element by element.
    """
    check_tensors(tensors, able="filled")
    given = list(tensors.values())
    dtypes = list(map(attrgetter("dtype"), given))
    stored = {one: found for one in set(dtypes) if (found := stored_dtype(one)) is not None}
    if len(stored) < len(set(dtypes)):
        for name, dtype in zip(tensors, dtypes, strict=True):
            if dtype not in stored:
                raise ValueError(f"tensors[{name!r}] is {dtype}, which no checkpoint can hold")
    held = list(map(torch.Tensor.detach, given))
    types: dict[tuple[torch.dtype, tuple[int, ...]], int] = {}
    shapes = map(attrgetter("shape"), held)
    kinds = np.array(
        [types.setdefault(one, len(types)) for one in zip(dtypes, shapes, strict=True)], np.int64
    )
    sizes = np.array([dtype.itemsize * math.prod(shape) for dtype, shape in types], np.int64)
    contiguous = _flags(map(torch.Tensor.is_contiguous, held))
    begin = np.array(list(map(torch.Tensor.data_ptr, held)), np.int64)
    end = begin + (sizes[kinds] if len(kinds) else kinds)
    for number in np.flatnonzero(~contiguous & (end > begin)).tolist():
        if _overlaps_itself(held[number]):
            raise ValueError(
                f"tensors[{list(tensors)[number]!r}] is expanded, or overlaps itself: several of "
                "its elements are one place in memory; pass a clone() of it"
            )
        end[number] = begin[number] + _extent(held[number])
    turned = _flags(map(torch.Tensor.is_neg, held))
    if any(dtype.is_complex for dtype, _ in types):
        turned |= _flags(map(torch.Tensor.is_conj, held))
    known = [TensorType(stored[dtype], tuple(shape)) for dtype, shape in types]
    memory = _memory(list(tensors), held, dtypes, begin[end > begin])
    return Destinations(
        tensors=tensors,
        held=held,
        targets=TensorTargets(list(tensors), known, kinds, memory=memory),
        plain=contiguous & ~turned & _flags(map(attrgetter("is_cpu"), held)),
        begin=begin,
        end=end,
    )


def _flags(answers: Iterable[bool]) -> NDArray[np.bool_]:
    return np.array(list(answers), np.bool_)


def _memory(
    names: Sequence[str],
    tensors: Sequence[torch.Tensor],
    dtypes: Sequence[torch.dtype],
    addresses: NDArray[np.int64],
) -> list[int] | None:
    """Return a number for each tensor, equal for equal memory; `None` if all are different."""
    ordered = np.sort(addresses)  # `np.unique` imports `numpy.ma`, which takes 50 ms or more
    if not (ordered[1:] == ordered[:-1]).any():
        return None
    groups: dict[object, int] = {}
    numbers = []
    for name, tensor, dtype in zip(names, tensors, dtypes, strict=True):
        shape = tuple(tensor.shape)
        steps = tuple(step for step, size in zip(tensor.stride(), shape, strict=True) if size > 1)
        same = (tensor.device, tensor.data_ptr(), dtype, shape, steps) if tensor.numel() else name
        numbers.append(groups.setdefault(same, len(groups)))
    return numbers


# How long numpy may think about whether two strided views have an element in common.
_MAX_WORK = 1_000_000


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    """Say whether elements share a place; exact for what slices, transposes and views make."""
    last = 0  # where the last element of the dimensions so far lies
    steps = zip(tensor.stride(), tensor.shape, strict=True)
    for step, size in sorted(pair for pair in steps if pair[1] > 1):
        if step <= last:
            return True
        last += step * (size - 1)
    return False


def _extent(tensor: torch.Tensor) -> int:
    """Return the bytes from the first element to the end of the last."""
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.itemsize


class _Address:
    """Shows numpy where a tensor lies, on any device. Nothing is read from there."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (tensor.data_ptr(), False),
            "shape": tuple(tensor.shape),
            "strides": tuple(step * tensor.itemsize for step in tensor.stride()),
            "typestr": f"|V{tensor.itemsize}",
        }


def share(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Say whether two tensors of one device have bytes in common; where it is hard to say, yes."""
    try:
        return np.shares_memory(
            np.asarray(_Address(one)),
            np.asarray(_Address(other)),
            max_work=_MAX_WORK,  # type: ignore[arg-type]  # any int: the stub is wrong
        )
    except np.exceptions.TooHardError:
        return True
