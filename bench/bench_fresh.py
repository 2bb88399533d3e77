"""How fast tensors come into memory of their own, and are then read once by who asked for them.

Who maps files has nothing to do until somebody looks, so everybody looks: at every byte.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch

from asyncloader import load_tensors
from asyncloader._memory.allocation import zeros
from bench import _dense
from bench._measure import Contender, interleave
from bench._peers import PEERS
from bench._raw import THREADS, carry_out, tensor_reads, threads_text
from bench._results import Goal, Results, Speed, against_peers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from bench._cases import DenseCase
    from bench._measure import Role
    from bench._peers import Read
    from bench._scale import Scale

pytestmark = pytest.mark.filterwarnings("ignore")  # what peers warn of is theirs to mend


def look_at(tensors: Mapping[str, Tensor]) -> None:
    """Read every byte."""
    for tensor in tensors.values():
        tensor.view(-1).view(torch.int64).sum()


def kept(read: Read, files: Sequence[Path]) -> dict[str, Tensor]:
    return dict(read(files, True))


def contenders(case: DenseCase) -> Iterator[Contender]:
    def contender(
        name: str, role: Role, load: Callable[[], Mapping[str, Tensor]], fresh: int = case.nbytes
    ) -> Contender:
        def run(_: None) -> Mapping[str, Tensor]:
            tensors = load()
            look_at(tensors)
            return tensors

        return Contender(name=name, role=role, run=run, check=case.check, fresh=fresh)

    def plainly(threads: int) -> dict[str, Tensor]:
        tensors = {name: zeros(tensor.shape, tensor.dtype) for name, tensor in case.truth.items()}
        carry_out(tensor_reads(case.files(), tensors), threads=threads)
        return tensors

    for threads in THREADS:
        yield contender(f"raw, {threads_text(threads)}", "raw", partial(plainly, threads))
    yield contender("asyncloader", "ours", partial(load_tensors, case.path))
    for peer in PEERS:
        if peer.installed and peer.read is not None:
            files = case.files(peer.suffix)
            fresh = case.nbytes if peer.takes else 0  # who maps files takes none
            yield contender(peer.name, "peer", partial(kept, peer.read, files), fresh)


def test_d4_load_tensors_and_look_at_every_byte(
    dense: DenseCase, results: Results, scale: Scale
) -> None:
    several = list(contenders(dense))
    _dense.warm_all(dense, [peer.name for peer in PEERS if peer.read is not None])

    speed = Speed(
        case="D4",
        what=f"{len(dense.truth):,} tensors into fresh memory, every byte read, warm",
        nbytes=dense.nbytes,
        times=interleave(several, rounds=scale.rounds(4)),
        skipped=[peer.name for peer in PEERS if peer.read is not None and not peer.installed],
    )

    results.speeds.append(speed)
    against_peers(results, speed, Goal("≥", 1))
