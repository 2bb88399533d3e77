"""Runs a load: all or nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .comparison import compare_tied
from .stream import stream

if TYPE_CHECKING:
    from asyncloader._table.protocol import UpdateCounts

    from .load import Load
    from .session import Session


async def run(load: Load, session: Session) -> None:
    """Read everything, and make ready what `load.commit()` will show.

    Afterwards, or after a failure, call `load.commit()` or `load.abort()`: no thread writes any
    more then.

    Raises:
        CheckpointError: If bytes differ from their digests.
        CheckpointChangedError: If a shard was replaced or written to meanwhile.
        ReadError: If the storage failed.
    """
    await load.prepare()
    await stream(load)
    load.warnings = await compare_tied(load)
    await session.check_unchanged(load.plan.shards)
    await load.finish()


async def complete(load: Load, session: Session) -> dict[str, UpdateCounts]:
    """Run a load and commit it, or abort it; return what was done to each table."""
    try:
        await run(load, session)
    except BaseException:
        load.abort()
        raise
    return load.commit()
