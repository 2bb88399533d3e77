"""How fast files of RecIS's trainer load: the dense parameters in `model.pt`, and whole runs."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from asyncloader import Live, Saver
from bench._cache import warm
from bench._cases import TABLE, DenseCase, dense_shapes, poison, tensor_loader
from bench._measure import Contender, interleave
from bench._raw import STEP, THREADS, Read, carry_out, size_of, threads_text
from bench._results import Goal, Results, Speed, against_peers, against_raw
from bench._truth import table_rows, windows
from bench.bench_memory import peak
from examples.made_up import empty_table

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from asyncloader._serving.model import Built
    from bench._measure import Role
    from bench._scale import Scale


def saved(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> DenseCase:
    """Return a file of `torch.save`, and what it holds; write it unless it is there."""
    path, truth = folder / "model.pt", windows(dict(shapes))
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({name: tensor.clone() for name, tensor in truth.items()}, path)
        os.sync()
    warm([path])
    return DenseCase(path, truth)


def mapped(case: DenseCase, tensors: Mapping[str, Tensor]) -> None:
    """Load as a program does that wants to touch each byte once."""
    with torch.no_grad():
        for name, tensor in torch.load(case.path, mmap=True, weights_only=True).items():
            tensors[name].copy_(tensor)


def raw(case: DenseCase, tensors: Mapping[str, Tensor]) -> Iterator[Contender]:
    """Yield plain threads that read as many bytes of the file into the tensors."""
    reads, offset = [], 0
    for tensor in tensors.values():
        view = tensor.view(-1).view(torch.uint8).numpy().data
        for low in range(0, len(view), STEP):
            piece = view[low : low + STEP]
            reads.append(Read(case.path, offset + low, [piece], len(piece)))
        offset += len(view)
    for threads in THREADS:
        yield Contender(
            name=threads_text(threads), role="raw", run=partial(_carry_out, reads, threads)
        )


def _carry_out(reads: Sequence[Read], threads: int, _: object) -> None:
    carry_out(reads, threads=threads)


def measure(case: DenseCase, runner: asyncio.Runner, name: str, what: str, rounds: int) -> Speed:
    """Measure our loader beside `torch.load` with a mapping."""
    tensors = case.destination()
    contenders = [
        *raw(case, tensors),
        Contender(
            name="asyncloader",
            role="ours",
            run=lambda _: runner.run(tensor_loader(case.path, tensors).aload()),
            poison=lambda _: poison(tensors),
            check=lambda _: case.check(tensors),
        ),
        Contender(
            name="torch.load(mmap=True), copy_",
            role="peer",
            run=lambda _: mapped(case, tensors),
            poison=lambda _: poison(tensors),
            check=lambda _: case.check(tensors),
        ),
    ]
    times = interleave(contenders, rounds=rounds)
    return Speed(case=name, what=what, nbytes=case.nbytes, times=times, skipped=[])


def test_p1_large_tensors_of_torch_save(
    folder: Path, runner: asyncio.Runner, results: Results, scale: Scale
) -> None:
    case = saved(folder / "model-pt", dense_shapes(scale))
    what = f"{len(case.truth)} tensors of {case.nbytes // len(case.truth) // 1024:,} KiB"
    speed = measure(case, runner, "P1", f"{what} in model.pt, warm", scale.rounds(7))

    results.speeds.append(speed)
    against_raw(results, speed, Goal("≥", 0.8))
    against_peers(results, speed, Goal("≥", 1))


def test_p2_small_tensors_of_torch_save(
    folder: Path, runner: asyncio.Runner, results: Results, scale: Scale
) -> None:
    count = scale.small_tensors // 5
    case = saved(folder / "small-pt", {f"tensor.{number}": (16,) for number in range(count)})
    speed = measure(case, runner, "P2", f"{count:,} of 64 bytes in model.pt", scale.rounds(7))

    results.speeds.append(speed)
    against_peers(results, speed, Goal("≥", 1))


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark"
)
def test_m1_a_file_of_torch_save(folder: Path, results: Results, scale: Scale) -> None:
    saved(folder / "model-pt", dense_shapes(scale))
    memory = peak(results, folder, "P1", "while P1 loads")

    assert memory.above <= memory.allowed


def run_of(folder: Path, scale: Scale) -> tuple[Path, Path, Callable[[], Built], int]:
    """Return a checkpoint of a run and the same in safetensors alone, and what takes it."""
    data = table_rows(scale.ids // 3, scale.width)
    dense = windows(dict(list(dense_shapes(scale).items())[: scale.tensors // 4]))
    run, plain = folder / "run-pt" / "ckpt_1", folder / "run-plain" / "ckpt_1"
    if not (plain / "index").exists():
        table = empty_table(TABLE, data, None)
        table.insert(data.ids, data.slots["embedding"])
        for path, options in (
            (run, {"layout": "run", "extra": {"global_step": torch.tensor(1)}}),
            (plain, {}),
        ):
            Saver(path=path, hashtables={TABLE: table}, tensors=dense, **options).save()  # type: ignore[arg-type]
    files = [[one for one in path.iterdir() if one.is_file()] for path in (run, plain)]
    for found in files:
        warm(found)

    def build() -> Built:
        tensors = {name: torch.empty(tensor.shape) for name, tensor in dense.items()}
        return {TABLE: empty_table(TABLE, data, None)}, tensors

    return run, plain, build, size_of(files[1])


def test_r1_a_run_in_live(
    folder: Path, runner: asyncio.Runner, results: Results, scale: Scale
) -> None:
    run, plain, build, nbytes = run_of(folder, scale)

    async def served(path: Path) -> None:
        async with Live(path.parent, build):
            pass

    def contender(name: str, path: Path, role: Role) -> Contender:
        return Contender(name=name, role=role, run=lambda _: runner.run(served(path)), fresh=nbytes)

    times = interleave(
        [
            contender("a run, with model.pt", run, "ours"),
            contender("safetensors alone", plain, "variant"),
        ],
        rounds=scale.rounds(7),
    )
    what = f"{nbytes >> 20:,} MiB of a table and tensors, from files to serving in Live"
    results.speeds.append(Speed(case="R1", what=what, nbytes=nbytes, times=times, skipped=[]))
    ratio = times[0].median / times[1].median
    results.figure(
        "R1", "beside the same bytes in safetensors alone", ratio, "of its time", Goal("≤", 1.15)
    )
