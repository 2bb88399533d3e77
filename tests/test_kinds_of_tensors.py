"""Tensors without plain memory are named when they are passed, with what to do about them."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Self

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from asyncloader import Loader, Saver, targets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor


class Wrapper(torch.Tensor):
    """A tensor that stands for another one and has no memory of its own, as torchao's have."""

    @staticmethod
    def __new__(cls: type[Self], inner: Tensor) -> Self:
        """Make one like `inner`."""
        made: Self = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: object, *_: object, **__: object
    ) -> object:
        """Do nothing that a plain tensor does."""
        raise NotImplementedError(func)


class Spread(Wrapper):
    """One of which this process has a part, as of a DTensor."""

    def to_local(self) -> Tensor:
        """Return that part."""
        return torch.zeros(3)


class Plain(torch.Tensor):
    """A tensor with memory and a name of its own."""


def fake() -> Tensor:
    """Make a tensor without values."""
    with FakeTensorMode():
        return torch.zeros(3)


def transformed() -> Tensor:
    """Return what a function sees that `torch.func` transforms."""
    seen: list[Tensor] = []

    def look(row: Tensor) -> Tensor:
        seen.append(row)
        return row

    torch.func.vmap(look)(torch.zeros(2, 3))
    return seen[0]


def quantized() -> Tensor:
    """Make a tensor of small integers that stand for other numbers."""
    with warnings.catch_warnings(action="ignore"):
        return torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8)


def nested() -> Tensor:
    """Make a tensor of rows of several lengths."""
    with warnings.catch_warnings(action="ignore"):
        return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])


MAKE: dict[str, tuple[Callable[[], Tensor], str]] = {
    "meta": (lambda: torch.zeros(3, device="meta"), "to_empty"),
    "lazy parameter": (lambda: nn.LazyLinear(3).weight, "run its module once"),
    "lazy buffer": (nn.UninitializedBuffer, "run its module once"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "to_dense"),
    "mkldnn": (lambda: torch.zeros(3).to_mkldnn(), "to_dense"),
    "quantized": (quantized, "quantize"),
    "nested": (nested, "values"),
    "fake": (fake, "outside of FakeTensorMode"),
    "functional": (lambda: torch._to_functional_tensor(torch.zeros(3)), "pass the plain tensors"),
    "transformed": (transformed, "pass the plain tensors"),
    "wrapper": (lambda: Wrapper(torch.zeros(3)), "pass the plain tensors"),
    "spread": (lambda: Spread(torch.zeros(3)), r"pass its `.to_local\(\)`"),
}


@pytest.mark.parametrize(("make", "says"), MAKE.values(), ids=MAKE)
def test_a_tensor_without_plain_memory_is_refused_with_what_to_do(
    make: Callable[[], Tensor], says: str
) -> None:
    odd = {"sound": torch.zeros(3), "the name": make()}
    with pytest.raises(ValueError, match=f"'the name'.*{says}.*can be filled"):
        Loader("anywhere", tensors=odd)
    with pytest.raises(ValueError, match=f"'the name'.*{says}.*can be saved"):
        Saver(path="anywhere", tensors=odd)


@pytest.fixture
def process_group() -> Iterator[None]:
    """Be a job of one process."""
    distributed = torch.distributed
    store = distributed.HashStore()  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_a_real_dtensor_is_refused_and_its_local_part_is_not(tmp_path: Path) -> None:
    tensor = pytest.importorskip("torch.distributed.tensor")
    if not hasattr(tensor, "DTensor"):
        pytest.skip("this torch keeps it elsewhere")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))

    def spread(local: Tensor) -> Tensor:
        made: Tensor = tensor.DTensor.from_local(local, mesh, [tensor.Replicate()])
        return made

    whole, into = spread(torch.ones(3)), spread(torch.zeros(3))
    takers: list[Callable[[], object]] = [
        lambda: Loader("x", tensors={"w": whole}),
        lambda: Saver(path="x", tensors={"w": whole}),
    ]
    for take in takers:
        with pytest.raises(ValueError, match=r"DTensor.*to_local"):
            take()

    parts = [one.to_local() for one in (whole, into)]  # type: ignore[attr-defined]
    Saver(path=tmp_path / "c", tensors={"w": parts[0]}).save()
    Loader(tmp_path / "c", tensors={"w": parts[1]}).load()
    assert into.to_local().tolist() == [1, 1, 1]  # type: ignore[attr-defined]


def test_a_lazy_module_says_so_through_its_targets() -> None:
    with pytest.raises(ValueError, match=r"'weight'.*run its module once"):
        Loader("anywhere", *targets(nn.LazyLinear(3)))


def test_a_kind_of_tensor_that_has_memory_is_taken(tmp_path: Path) -> None:
    made, empty = torch.ones(3).as_subclass(Plain), torch.zeros(0)
    Saver(path=tmp_path / "c", tensors={"w": made, "e": empty}).save()
    into = torch.zeros(3).as_subclass(Plain)
    Loader(tmp_path / "c", tensors={"w": into, "e": empty.clone()}, strict=True).load()
    assert into.tolist() == [1, 1, 1]
