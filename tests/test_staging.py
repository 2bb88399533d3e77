from __future__ import annotations

import torch

from asyncloader._loading.buffers import Arena, StagingPool

SIZE = 4 << 20


def test_buffers_of_the_usual_size_are_used_again() -> None:
    pool = StagingPool(SIZE)
    first = pool.take(SIZE)
    pool.give(first)
    assert pool.take(SIZE - 100) is first
    assert "0 buffers" in repr(pool)


def test_other_buffers_are_as_large_as_asked_for_and_let_go() -> None:
    pool = StagingPool(SIZE)
    pool.give(pool.take(SIZE))
    for nbytes in (10, SIZE // 2, 3 * SIZE):
        buffer = pool.take(nbytes)
        assert buffer.numel() == nbytes
        pool.give(buffer)
    assert "0 buffers" in repr(pool)  # nor is what was kept, beside a large one


def test_pieces_of_a_read_lie_apart_in_one_buffer_aligned_for_every_dtype() -> None:
    pool = StagingPool(SIZE)
    arena = Arena(pool, SIZE - 1000, 20)
    pieces = [arena.take(nbytes) for nbytes in (3, 8, 1, 16, 1 << 20)]
    ends = [piece.data_ptr() + piece.numel() for piece in pieces]
    assert all(end <= other.data_ptr() for end, other in zip(ends, pieces[1:], strict=False))
    assert all(piece.data_ptr() % 16 == 0 for piece in pieces)
    assert len({piece.untyped_storage().data_ptr() for piece in pieces}) == 1
    arena.close()
    assert "1 buffers" in repr(pool)


def test_a_read_without_staged_pieces_takes_nothing() -> None:
    pool = StagingPool(SIZE)
    Arena(pool, SIZE, 1).close()
    assert "0 buffers" in repr(pool)
    assert pool.take(0).dtype == torch.uint8
