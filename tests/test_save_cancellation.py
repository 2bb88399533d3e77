"""A save that is cancelled, wherever it stands, leaves nothing behind."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from asyncloader import Saver
from tests.steps import Steps
from tests.support import debug_off, nothing_left_behind
from tests.test_save_faults import check_all_or_nothing, check_next_save_heals, model, save_old

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.both_loops


@pytest.mark.slow
@pytest.mark.parametrize("overwriting", [False, True])
@pytest.mark.parametrize("again", [False, True], ids=["once", "again and again"])
async def test_a_save_cancelled_at_any_await_leaves_the_old_checkpoint_or_the_new(
    tmp_path: Path, again: bool, overwriting: bool
) -> None:
    """The folder is never without a checkpoint: a commit that has begun is carried through."""
    tables, tensors = model(2)
    outcomes = []
    with debug_off():
        for at in range(1000):
            path = tmp_path / str(at)
            old = save_old(path) if overwriting else {}
            steps = Steps(cancel_at=range(at, 10_000 if again else at + 1))
            saver = Saver(path=path, hashtables=tables, tensors=tensors, parallel=3)
            with nothing_left_behind(tables["t"]):
                cancelled = await steps.run(saver.asave)
            path.mkdir(exist_ok=True)
            outcome = check_all_or_nothing(path, old)
            assert outcome == "new" if not cancelled else outcome != "none" or not overwriting
            assert not list(path.glob(".saving*")), "staged files were left"
            outcomes.append(outcome)
            if not cancelled:
                break
            check_next_save_heals(path)
            shutil.rmtree(path)
    assert len(outcomes) > 20
    assert set(outcomes) == {"old" if overwriting else "none", "new"}
