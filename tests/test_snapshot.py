"""The order in which rows are saved, against one that is obviously right."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np

from asyncloader._table.snapshot import order_of, sort_keys

ids = st_np.arrays(
    np.int64,
    st.integers(0, 60),
    elements=st.one_of(
        st.integers(-(2**63), 2**63 - 1),
        st.integers(-10, 10),
        st.sampled_from([-(2**63), 2**63 - 1]),
    ),
)


@given(ids=ids, size=st.one_of(st.integers(1, 100), st.integers(1, 2**62), st.just(65536)))
def test_keys_sort_as_slice_position_and_id_do(ids: np.ndarray, size: int) -> None:
    found = ids[np.argsort(sort_keys(ids, size), kind="stable")].tolist()
    assert found == sorted(ids.tolist(), key=lambda id_: (id_ % 2**64 % size, id_ % 2**64))


@pytest.mark.parametrize("bits", [64, 63, 50, 40, 20])
@pytest.mark.parametrize("count", [1, 999, 1000, 1001, 50_000])
def test_the_fast_order_is_that_of_argsort(bits: int, count: int) -> None:
    rng = np.random.default_rng(bits * count)
    keys = np.unique(rng.integers(0, 2**bits, count, dtype=np.uint64, endpoint=False))
    rng.shuffle(keys)
    assert (order_of(keys) == np.argsort(keys)).all()


@pytest.mark.parametrize("step", [1, 2**10, 2**30])
def test_keys_that_differ_in_their_lowest_bits_alone_are_sorted_too(step: int) -> None:
    """What pushes out bits of the keys pushes out all that tells these apart."""
    keys = np.arange(5000, dtype=np.uint64) * np.uint64(step)
    keys[-1] = 2**64 - 1
    np.random.default_rng(0).shuffle(keys)
    assert (order_of(keys) == np.argsort(keys)).all()


@pytest.mark.parametrize("together", [2, 3, 5, 9])
def test_a_few_keys_that_are_alike_but_for_their_lowest_bits_are_put_right(together: int) -> None:
    spread = np.arange(20_000, dtype=np.uint64) << np.uint64(49)
    alike = (np.uint64(1) << np.uint64(63)) + np.arange(1, together, dtype=np.uint64)
    keys = np.unique(np.concatenate([spread, alike]))[::-1].copy()
    assert (order_of(keys) == np.argsort(keys)).all()
