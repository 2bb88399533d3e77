"""One memory under several names: what a checkpoint has for one of them is there under all."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

import pytest
import torch
from safetensors.torch import save_model
from torch import nn

from asyncloader import Live, Loader, PlanError, Saver, targets
from tests.oracle import write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Tied(nn.Module):
    """An embedding that is the head too."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.emb.weight


@pytest.mark.parametrize("strict", [False, True])
async def test_a_name_whose_memory_was_filled_under_another_is_not_missing(
    tmp_path: Path, *, strict: bool
) -> None:
    trained, fresh = Tied(), Tied()
    save_model(trained, str(tmp_path / "model.safetensors"))

    report = await Loader(tmp_path, *targets(fresh), strict=strict).aload()

    assert torch.equal(fresh.head.weight, trained.head.weight)
    assert report.missing == ()
    assert set(report.tensors.values()) == {"loaded", "shared with 'emb.weight'"}


async def test_a_service_takes_what_was_saved_of_a_tied_model(tmp_path: Path) -> None:
    trained = Tied()
    save_model(trained, str(tmp_path / "model.safetensors"))
    async with Live(tmp_path, Tied) as live:
        with live.use() as model:
            assert torch.equal(model.tensors["head.weight"], trained.head.weight)


async def test_tied_names_that_a_filter_asks_for_are_not_missing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, {"old": torch.ones(3)})
    w = torch.zeros(3)
    loader = Loader(
        tmp_path,
        tensors={"a": w, "b": w.view(3), "c": torch.zeros(3)},
        filter_func=lambda _: {"a": {"old": []}, "b": {"gone": []}, "c": {"gone": []}},
    )

    report = await loader.aload()

    assert report.tensors == {"a": "loaded", "b": "shared with 'a'", "c": "missing"}
    assert report.missing == ("gone",)


async def test_if_neither_name_is_there_both_are_missing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, {"other": torch.ones(3)})
    w = torch.zeros(3)
    with pytest.raises(PlanError, match="'b' is asked for"):
        await Loader(tmp_path, tensors={"a": w, "b": w}, strict=True).aload()
    report = await Loader(tmp_path, tensors={"a": w, "b": w}).aload()
    assert report.missing == ("a", "b")


@pytest.mark.parametrize("digests", [False, True])
@pytest.mark.parametrize("turned", [False, True])
async def test_two_values_for_one_memory_are_a_warning_that_names_both(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, *, digests: bool, turned: bool
) -> None:
    """Only the last value of a long tensor differs, far behind the first chunk that is read."""
    one = torch.arange(6000.0).view(2000, 3)
    other = one.clone()
    other[-1, -1] = -1
    stored = {"a": one, "b": other, "c": one, "d": one.clone()}
    if digests:
        await Saver(path=tmp_path / "saved", tensors=stored).asave()
    else:
        write_checkpoint(tmp_path / "saved", {}, stored)
    tied, same = torch.zeros(3, 2000).T if turned else torch.zeros(2000, 3), torch.zeros(2000, 3)

    with caplog.at_level(logging.WARNING, "asyncloader"):
        report = await Loader(
            tmp_path / "saved",
            tensors={"a": tied, "b": tied, "c": same, "d": same},
            chunk_bytes=1000,
        ).aload()

    [warning] = report.warnings
    assert "'a' and 'b' are one memory" in warning
    assert warning in caplog.text
    assert torch.equal(tied, other)
    assert torch.equal(same, one)


def half_and_brain() -> dict[str, torch.Tensor]:
    """Two blocks of the same bytes and of other values."""
    half = torch.full((8,), 1.5, dtype=torch.float16)
    return {"a": half, "b": half.view(torch.bfloat16).clone()}


def one_in_two_dtypes() -> dict[str, torch.Tensor]:
    return {"a": torch.ones(8), "b": torch.ones(8, dtype=torch.bfloat16)}


def zeros_and_sevens() -> dict[str, torch.Tensor]:
    zeros = torch.zeros(8, dtype=torch.bfloat16)
    return {"a": zeros, "b": torch.full_like(zeros, 7)}


@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize(
    ("make", "differ"), [(one_in_two_dtypes, 0), (half_and_brain, 1), (zeros_and_sevens, 1)]
)
def test_values_that_are_converted_are_compared_as_they_are_then(
    tmp_path: Path, make: Callable[[], dict[str, torch.Tensor]], *, differ: int, digests: bool
) -> None:
    if digests:
        Saver(path=tmp_path / "saved", tensors=make()).save()
    else:
        write_checkpoint(tmp_path / "saved", {}, make())
    tied = torch.zeros(8)

    report = Loader(tmp_path / "saved", tensors={"a": tied, "b": tied}, cast="widen").load()

    assert len(report.warnings) == differ
    assert torch.equal(tied, make()["b"].float())


@pytest.mark.parametrize("digests", [True, False])
def test_values_that_become_the_same_are_no_warning(tmp_path: Path, *, digests: bool) -> None:
    stored = {"a": torch.ones(8), "b": torch.full((8,), 1 + 2**-20)}
    if digests:
        Saver(path=tmp_path / "saved", tensors=stored).save()
    else:
        write_checkpoint(tmp_path / "saved", {}, stored)
    tied = torch.zeros(8, dtype=torch.bfloat16)

    report = Loader(tmp_path / "saved", tensors={"a": tied, "b": tied}, cast="any").load()

    assert report.warnings == ()


@pytest.mark.parametrize("verify", ["auto", "off"])
@pytest.mark.parametrize("values", [(1 + 2j, 1 + 2j), (1 + 2j, 1 - 2j)])
def test_views_of_one_memory_are_compared_by_what_each_would_show(
    tmp_path: Path, verify: Literal["auto", "off"], values: tuple[complex, complex]
) -> None:
    stored = {name: torch.full((3,), value) for name, value in zip("ab", values, strict=True)}
    Saver(path=tmp_path / "saved", tensors=stored).save()
    held = torch.zeros(3, dtype=torch.complex64)

    into = {"a": held, "b": held.conj()}
    report = Loader(tmp_path / "saved", tensors=into, verify=verify).load()

    assert torch.equal(held.conj().resolve_conj(), stored["b"])
    assert len(report.warnings) == (values[0] == values[1])
