"""How fast dense tensors load, into memory that is there already."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bench._cases import tensor_loader, touched
from bench._measure import alternate
from bench._raw import STEP, read_raw, shards, steps
from bench._results import Results, Speed

if TYPE_CHECKING:
    import asyncio

    from pytest_benchmark.fixture import BenchmarkFixture

    from bench._cases import DenseCase


def measure(
    benchmark: BenchmarkFixture,
    case: DenseCase,
    runner: asyncio.Runner,
    *,
    name: str,
    goal: float | None,
) -> Speed:
    files = shards(case.path)
    buffer = torch.ones(steps(files) * STEP // 4).numpy().data.cast("B")
    tensors = touched({name: tuple(tensor.shape) for name, tensor in case.truth.items()})

    def prepare() -> dict[str, torch.Tensor]:
        for tensor in tensors.values():
            tensor.zero_()
        return tensors

    loads, raws = alternate(
        benchmark,
        rounds=9,
        fresh=0,
        raw=lambda: read_raw(files, buffer),
        prepare=prepare,
        load=lambda tensors: runner.run(tensor_loader(case.path, tensors).aload()),
        check=case.check,
    )
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    what = f"{len(tensors):,} tensors of {next(iter(tensors.values())).nbytes // 1024:,} KiB"
    return Speed(
        case=name, what=what, nbytes=nbytes, load_seconds=loads, raw_seconds=raws, goal=goal
    )


def test_d1_large_tensors(
    benchmark: BenchmarkFixture, dense: DenseCase, runner: asyncio.Runner, results: Results
) -> None:
    results.speeds.append(measure(benchmark, dense, runner, name="D1", goal=0.7))


def test_d3_small_tensors(
    benchmark: BenchmarkFixture, small: DenseCase, runner: asyncio.Runner, results: Results
) -> None:
    results.speeds.append(measure(benchmark, small, runner, name="D3", goal=None))
