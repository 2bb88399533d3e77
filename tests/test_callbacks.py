"""Functions that users give are called as they are meant to be, or refused at once."""

from __future__ import annotations

import unittest.mock
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

from asyncloader import HashTable, Live, Loader, LoadPlan, Runtime, Saver
from tests.oracle import write_checkpoint

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path


async def coroutine(*_: object) -> None:
    """Do nothing, once it is awaited."""


def generator(*_: object) -> Iterator[None]:
    """Do nothing, once it is iterated over."""
    yield


async def async_generator(*_: object) -> AsyncIterator[None]:
    """Likewise."""
    yield


class Awaited:
    """An object whose calls have to be awaited."""

    async def __call__(self, *_: object) -> None:
        """Do nothing, once it is awaited."""

    async def method(self, *_: object) -> None:
        """Likewise."""


COROUTINES: dict[str, object] = {
    "function": coroutine,
    "partial": partial(partial(coroutine, 1), 2),
    "object": Awaited(),
    "partial of an object": partial(Awaited()),
    "method": Awaited().method,
    "mock": unittest.mock.AsyncMock(),
}
GENERATORS: dict[str, object] = {"generator": generator, "async generator": async_generator}
TAKERS: dict[str, Callable[[Any], object]] = {
    "Loader.progress": lambda f: Loader("x", progress=f),
    "Loader.trace": lambda f: Loader("x", trace=f),
    "Loader.pressure": lambda f: Loader("x", pressure=f),
    "Loader.filter_func": lambda f: Loader("x", filter_func=f),
    "Saver.progress": lambda f: Saver(path="x", progress=f),
    "Saver.filter_func": lambda f: Saver(path="x", filter_func=f),
    "Runtime.pressure": lambda f: Runtime(pressure=f),
    "Runtime.wrap_storage": lambda f: Runtime(wrap_storage=f),
    "Live.on_event": lambda f: Live("x", lambda: ({}, {}), on_event=f),
    "HashTable.initializer": lambda f: HashTable([1], name="t", initializer=f),
}


@pytest.mark.parametrize("function", COROUTINES.values(), ids=COROUTINES)
@pytest.mark.parametrize("take", TAKERS.values(), ids=TAKERS)
def test_a_coroutine_function_that_would_never_run_is_refused(
    take: Callable[[Any], object], function: object
) -> None:
    with pytest.raises(TypeError, match="called, not awaited"):
        take(function)


@pytest.mark.parametrize("function", GENERATORS.values(), ids=GENERATORS)
@pytest.mark.parametrize("take", TAKERS.values(), ids=TAKERS)
def test_a_generator_function_that_would_never_run_is_refused(
    take: Callable[[Any], object], function: object
) -> None:
    with pytest.raises(TypeError, match="generator function"):
        take(function)
    with pytest.raises(TypeError, match="generator function"):
        Loader("x", on_plan=function)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["function", "partial", "object"])
async def test_on_plan_is_awaited_and_may_refuse(tmp_path: Path, kind: str) -> None:
    write_checkpoint(tmp_path, {}, {"w": torch.ones(3)})
    plans: list[LoadPlan] = []

    class Refuse:
        async def __call__(self, plan: LoadPlan) -> None:
            plans.append(plan)
            raise PermissionError

    kinds: dict[str, Callable[[LoadPlan], object]] = {
        "object": Refuse(),
        "function": Refuse().__call__,
        "partial": partial(Refuse()),
    }
    w = torch.zeros(3)

    with pytest.raises(PermissionError):
        await Loader(tmp_path, tensors={"w": w}, on_plan=kinds[kind]).aload()

    assert not w.any()
    assert plans[0].nbytes == 12
