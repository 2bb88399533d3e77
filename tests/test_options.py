"""One set of options says how to read, wherever something is read."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from typing import TYPE_CHECKING, Any

import pytest
import torch

from asyncloader import (
    CheckpointReader,
    Loader,
    LoadTimeoutError,
    ReadOptions,
    aload_tensors,
    load_tensors,
)
from asyncloader.options import ReadKeywords
from tests.oracle import write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"parallel": 0}, ValueError, "parallel must be positive"),
    ({"parallel": 1.5}, TypeError, "parallel must be an int"),
    ({"chunk_bytes": -1}, ValueError, "chunk_bytes must be positive"),
    ({"max_inflight_bytes": True}, TypeError, "max_inflight_bytes must be an int"),
    ({"verify": "always"}, ValueError, "verify is one of 'auto', 'require', 'off'"),
    ({"timeout": 0}, ValueError, "timeout must be positive"),
    ({"stall_timeout": "1"}, TypeError, "stall_timeout is a number"),
    ({"direct_io": "no"}, TypeError, "direct_io is True or False, or 'auto'"),
    ({"follow_symlinks": 1}, TypeError, "follow_symlinks is True or False"),
    ({"max_loop_lag": -1.0}, ValueError, "max_loop_lag must be positive"),
    ({"pressure": 0.5}, TypeError, "pressure must be callable"),
    ({"paralel": 4}, TypeError, "unexpected keyword argument 'paralel'; did you mean 'parallel'"),
    ({"options": {"parallel": 4}}, TypeError, "options must be ReadOptions or None"),
]
USERS: dict[str, Callable[..., object]] = {
    "Loader": Loader,
    "CheckpointReader": CheckpointReader,
    "load_tensors": load_tensors,
}


@pytest.mark.parametrize("user", USERS.values(), ids=USERS)
@pytest.mark.parametrize(("keywords", "kind", "message"), WRONG)
def test_what_makes_no_sense_is_refused_at_once(
    user: Callable[..., object], keywords: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        user("nowhere", **keywords)


def test_a_keyword_goes_before_options() -> None:
    options = ReadOptions(parallel=3, chunk_bytes=1000)

    loader = Loader("anywhere", options=options, chunk_bytes=50)

    assert (loader.options.parallel, loader.options.chunk_bytes) == (3, 50)
    assert Loader("anywhere", {}, {}, 7, options=options).options.parallel == 7
    assert Loader("anywhere").options == ReadOptions()
    assert options == ReadOptions(parallel=3, chunk_bytes=1000)


def test_options_do_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        ReadOptions().parallel = 1  # type: ignore[misc]


def test_every_option_is_a_keyword_too() -> None:
    known = ReadKeywords.__required_keys__ | ReadKeywords.__optional_keys__
    assert known == {field.name for field in fields(ReadOptions)}


def test_what_an_event_loop_was_promised_makes_reads_short() -> None:
    assert ReadOptions().read_bytes == 16 << 20
    assert ReadOptions(max_loop_lag=0.01).read_bytes == 4 << 20
    assert ReadOptions(max_inflight_bytes=1000).read_bytes == 1000


async def test_each_call_of_a_reader_has_its_time(tmp_path: Path) -> None:
    """Also where `async with` holds files and threads for longer than that."""
    write_checkpoint(tmp_path, {}, {"w": torch.arange(3.0)})
    late = CheckpointReader(tmp_path, timeout=1e-9)
    with pytest.raises(LoadTimeoutError):
        await late.aread_tensor("w")
    async with late:
        for _ in range(2):
            with pytest.raises(LoadTimeoutError):
                await late.aread_tensor("w")
    with pytest.raises(LoadTimeoutError):
        await aload_tensors(tmp_path, timeout=1e-9)
    async with CheckpointReader(tmp_path, timeout=60) as reader:
        assert (await reader.aread_tensor("w")).tolist() == [0, 1, 2]
