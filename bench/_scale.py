"""How large everything is: as the goals have it, or tiny, to see that it works."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How large the checkpoints are, and how long they are measured."""

    name: str
    most_rounds: int

    tensors: int
    side: int
    """Each tensor is `[side, side]` float32."""

    small_tensors: int
    """Of 4 KiB."""

    ids: int
    width: int

    many_ids: int
    many_width: int
    """Rows so short that the id index dominates."""

    blocks: tuple[int, ...]
    """Numbers of blocks that are planned."""

    loads: tuple[int, ...]
    """Numbers of tensors, as large as the others, that are loaded."""

    rows_on_disk: int
    """Of 256 bytes."""

    served_ids: int
    """Of each of the two tables that are served."""

    served_seconds: float
    """That a service is asked for."""

    def rounds(self, wanted: int) -> int:
        """Return how many rounds to measure where `wanted` would be right; 0 is to try once."""
        return min(wanted, self.most_rounds)


FULL = Scale(
    name="full",
    most_rounds=100,
    tensors=128,
    side=2048,
    small_tensors=100_000,
    ids=4_000_000,
    width=32,
    many_ids=32_000_000,
    many_width=8,
    blocks=(1_000, 4_000, 16_000, 64_000, 256_000, 1_024_000),
    loads=(4, 8, 16, 32, 64, 128, 256),
    rows_on_disk=47_000_000,
    served_ids=3_900_000,
    served_seconds=30,
)
TINY = Scale(
    name="tiny",
    most_rounds=0,
    tensors=32,
    side=64,
    small_tensors=200,
    ids=20_000,
    width=32,
    many_ids=100_000,
    many_width=8,
    blocks=(100, 200),
    loads=(8, 16),
    rows_on_disk=200_000,
    served_ids=20_000,
    served_seconds=1,
)
SCALES = {scale.name: scale for scale in (FULL, TINY)}
