"""Columns say what objects, made one by one, would say."""

from __future__ import annotations

import gc
import os
import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncloader import CheckpointError, Loader
from asyncloader._checkpoint.header import parse_header
from asyncloader._checkpoint.index import Catalog, Places
from asyncloader._checkpoint.problems import AllProblems, Problems
from asyncloader._loading.destinations import describe_tensors
from asyncloader._planning.choice import choose
from asyncloader._planning.targets import Targets, TensorTargets, default_load_info
from asyncloader._threads.jobs import undisturbed
from tests.oracle import write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from asyncloader import Span
    from asyncloader._planning.targets import LoadInfo

sizes = st.one_of(st.integers(0, 3), st.sampled_from([-1, True, 1.0, "1", None, 2**62, 2**63]))
ranges = st.one_of(
    st.tuples(st.integers(0, 64), st.integers(0, 64)).map(sorted), st.lists(sizes, max_size=3)
)
entries: st.SearchStrategy[Any] = st.one_of(
    st.fixed_dictionaries(
        {"dtype": st.just("F32"), "shape": st.just([2]), "data_offsets": st.just([0, 8])}
    ),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "U8", "BOOL", "bool", "X", 3, None]),
            "shape": st.one_of(st.lists(sizes, max_size=3), st.just({}), st.just("")),
            "data_offsets": ranges,
        }
    ),
    st.sampled_from([{}, [], "x", None, 1, {"dtype": "F32"}]),
)


OF_SEVERAL = ("overlap", "back to back", "are not there")
"""Problems of the place that an entry has among the others."""


def wrong_entries(entries: dict[str, Any]) -> list[str]:
    found, text = AllProblems("here"), orjson.dumps(entries)
    parse_header(found, "shard", text, 8 + len(text) + 64, recis=True)
    of_one = [one for one in found.found if not any(text in one.text for text in OF_SEVERAL)]
    return sorted(one.key or "" for one in of_one)


@given(st.dictionaries(st.text(max_size=3), entries, max_size=4))
def test_a_header_is_refused_as_a_whole_where_one_entry_would_be(entries: dict[str, Any]) -> None:
    entries.pop("__metadata__", None)
    text = orjson.dumps(entries) if all_fit(entries) else None
    if text is None:
        return
    wrong = wrong_entries(entries)
    assert wrong == sorted(key for key, entry in entries.items() if wrong_entries({key: entry}))
    try:
        header = parse_header(Problems("here"), "shard", text, 8 + len(text) + 64, recis=True)
    except CheckpointError as error:
        assert error.key in wrong or any(text in error.problem for text in OF_SEVERAL)  # noqa: PT017
        return
    assert not wrong
    assert list(header.blocks) == list(entries)
    for key, entry in entries.items():
        block = header.blocks[key]
        begin, end = entry["data_offsets"]
        assert (block.offset, block.nbytes) == (8 + len(text) + begin, end - begin)
        assert (list(block.shape), block.key) == (entry["shape"], key)


def all_fit(entries: object) -> bool:
    """Whether orjson can write it: it takes integers of 64 bits only."""
    try:
        orjson.dumps(entries)
    except (TypeError, orjson.JSONEncodeError):
        return False
    return True


@given(st.sets(st.sampled_from("abcdef")), st.sets(st.sampled_from("abcdef")))
def test_what_is_asked_for_by_its_own_name_needs_no_load_info(
    there: set[str], wanted: set[str]
) -> None:
    names = sorted(there)
    places = Places({name: f"{name}^ " for name in names}, dict.fromkeys(names, "shard"))
    tensors = describe_tensors({name: torch.zeros(1) for name in sorted(wanted)}).targets
    targets = Targets(tensors=tensors, tables={})

    short = choose(Catalog(places, {}), None, targets)
    long = choose(Catalog(places, {}), default_load_info(targets), targets)

    assert short == long


def test_tensors_of_every_kind_are_described_side_by_side() -> None:
    matrix = torch.zeros(4, 6)
    tensors = {
        "plain": torch.zeros(3),
        "column": matrix[:, 1],
        "turned": torch.zeros(2, dtype=torch.complex64).conj(),
        "negative": torch.zeros(2, dtype=torch.complex64).conj().imag,
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(1.0),
        "parameter": torch.nn.Parameter(torch.zeros(2, 2)),
    }
    into = describe_tensors(tensors)

    assert dict(zip(tensors, into.plain.tolist(), strict=True)) == {
        "plain": True,
        "column": False,
        "turned": False,
        "negative": False,
        "empty": True,
        "scalar": True,
        "parameter": True,
    }
    assert [into.targets[name].shape for name in tensors] == [
        tuple(tensor.shape) for tensor in tensors.values()
    ]
    for number, tensor in enumerate(tensors.values()):
        assert into.begin[number] == tensor.data_ptr()
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        length = (last + 1) * tensor.itemsize if tensor.numel() else 0
        assert into.end[number] - into.begin[number] == length
    assert into.targets.memory is None  # each has memory of its own


def test_a_slice_of_the_span_is_the_tensor_and_keeps_it() -> None:
    tensors = {
        name: torch.full((8,), number, dtype=torch.uint8) for number, name in enumerate("ab")
    }
    into = describe_tensors(tensors)
    span, base = into.span()
    begin = int(into.begin[1]) - base
    view = span[begin : begin + 8]
    del tensors, into, span
    gc.collect()

    assert bytes(view) == bytes([1] * 8)


def test_a_tensor_that_gets_other_memory_meanwhile_does_not_lose_what_is_written_to(
    tmp_path: Path,
) -> None:
    """What is read goes where the tensor lay when the load began."""
    write_checkpoint(tmp_path / "saved", {}, {"w": torch.ones(1 << 20)})
    tensor = torch.zeros(1 << 20)
    first = tensor.detach()

    def exchange(span: Span) -> None:
        if span.step == "read":
            tensor.data = torch.zeros(1 << 20)

    Loader(tmp_path / "saved", tensors={"w": tensor}, trace=exchange).load()

    assert bool((first == 1).all())
    assert bool((tensor == 0).all())


def other_data(tensor: torch.Tensor) -> None:
    tensor.data = torch.zeros(1000)


def less_data(tensor: torch.Tensor) -> None:
    tensor.data = torch.zeros(10)


def no_data(tensor: torch.Tensor) -> None:
    tensor.untyped_storage().resize_(0)


@pytest.mark.parametrize("exchange", [other_data, less_data, no_data])
def test_a_tensor_that_lies_elsewhere_than_when_it_was_described_is_not_written_to(
    tmp_path: Path, exchange: Callable[[torch.Tensor], None]
) -> None:
    write_checkpoint(tmp_path, {}, {"v": torch.ones(8), "w": torch.ones(1000)})
    tensors = {"v": torch.zeros(8), "w": torch.zeros(1000)}

    def filter_func(info: LoadInfo) -> LoadInfo:
        exchange(tensors["w"])
        return info

    with pytest.raises(RuntimeError, match="tensors\\['w'\\] got other memory"):
        Loader(tmp_path, tensors=tensors, filter_func=filter_func).load()

    assert bool((tensors["v"] == 0).all())


def test_a_tensor_without_memory_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, {"v": torch.ones(8), "w": torch.ones(1000)})
    tensors = {"v": torch.zeros(8), "w": torch.zeros(1000)}
    tensors["w"].untyped_storage().resize_(0)

    with pytest.raises(RuntimeError, match="tensors\\['w'\\] has none"):
        Loader(tmp_path, tensors=tensors).load()

    assert bool((tensors["v"] == 0).all())


def test_as_large_a_chunk_as_there_is_number_for_joins_all_reads(tmp_path: Path) -> None:
    stored = {f"t{number}": torch.full((4,), float(number)) for number in range(100)}
    write_checkpoint(tmp_path, {}, stored, writers=1)
    for limit in (sys.maxsize, 2**64):
        tensors = {name: torch.zeros(4) for name in stored}
        report = Loader(
            tmp_path, tensors=tensors, chunk_bytes=limit, max_inflight_bytes=limit
        ).load()
        assert report.reads == 1
        assert all(torch.equal(tensors[name], stored[name]) for name in stored)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_forked_meanwhile_has_its_collector() -> None:
    def fork() -> int:
        child = os.fork()
        if not child:
            healthy = gc.isenabled()
            undisturbed(lambda: None)()
            os._exit(0 if healthy and gc.isenabled() else 1)
        return os.waitpid(child, 0)[1]

    assert undisturbed(fork)() == 0


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_it_was_after_jobs_side_by_side(enabled: bool) -> None:
    both = threading.Barrier(2)
    seen = []

    def job() -> None:
        both.wait()
        seen.append(gc.isenabled())
        both.wait()
        raise KeyError

    def run() -> None:
        with pytest.raises(KeyError):
            undisturbed(job)()

    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
    assert seen == [False, False]


def test_no_names_are_no_columns() -> None:
    targets = TensorTargets(())
    assert (len(targets), list(targets), "a" in targets) == (0, [], False)
    assert np.array_equal(targets.kinds, np.zeros(0, np.int64))
