"""Checks what the sidecar says against what the other files say."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from asyncloader._checkpoint.blocks import Blocks
from asyncloader._checkpoint.files import INDEX, SIDECAR, TENSORKEY
from asyncloader._checkpoint.sidecar import chunk_count, digest_of, parse_sidecar
from asyncloader.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from asyncloader._checkpoint.blocks import Block
    from asyncloader._checkpoint.sidecar import PartRows, Sidecar
    from asyncloader._checkpoint.slices import Slice

    from .findings import Findings
    from .shards import Shard
    from .structure import TableIds


def sift_sidecar(
    location: str, texts: Mapping[str, bytearray], findings: Findings
) -> Sidecar | None:
    """Read the sidecar, and compare the digests of the files with names.

    Returns:
        What it says; `None` if there is none, or it cannot be used.
    """
    if SIDECAR not in texts:
        return None
    try:
        sidecar = parse_sidecar(location, texts[SIDECAR], parts=True)
    except CheckpointError as error:
        findings.error(error)
        return None
    if sidecar is None:
        findings.note("is of a format that is not known here", file=SIDECAR)
        return None
    if INDEX not in texts or not _belongs(sidecar, texts[INDEX], findings):
        return None
    for name in {TENSORKEY, *sidecar.files} - {INDEX}:
        wanted = sidecar.files.get(name)
        if name in texts and digest_of(texts[name]) != wanted:
            text = f"is not what was written: its digest is not {wanted}, which {SIDECAR} has"
            findings.problem(f"{text}; copy it again", file=name)
    return sidecar


def _belongs(sidecar: Sidecar, index: bytearray, findings: Findings) -> bool:
    if sidecar.files.get(INDEX) == digest_of(index):
        return True
    if index.endswith(b"\n"):  # as those have that were written with a sidecar
        findings.problem(
            f"is not what was written with {SIDECAR}: its digest is not "
            f"{sidecar.files.get(INDEX)}, so no byte can be verified; copy both files again",
            file=INDEX,
        )
    else:
        findings.note(
            f"belongs to another save than {INDEX}, so no byte can be verified; either another "
            f"program has saved into this folder since, or {INDEX} was cut or edited",
            file=SIDECAR,
        )
    return False


def with_digests(
    sidecar: Sidecar, shards: Mapping[str, Shard], named: Sequence[str], findings: Findings
) -> dict[str, Shard]:
    """Check the digests of headers, and give every block its own.

    Args:
        sidecar: What it says.
        shards: Those that could be read, by file.
        named: All that `index` names.
        findings: Receives what is wrong.
    """
    for file in sorted(sidecar.shards.keys() - set(named)):
        findings.problem(f"has digests of {file!r}, which {INDEX} does not name", file=SIDECAR)
    for file in sorted(set(named) - sidecar.shards.keys()):
        findings.problem(f"has no digests of {file!r}, which {INDEX} names", file=SIDECAR)
    return {file: _with_digests(sidecar, shard, findings) for file, shard in shards.items()}


def _with_digests(sidecar: Sidecar, shard: Shard, findings: Findings) -> Shard:
    file = shard.header.shard
    digests = sidecar.shards.get(file)
    if digests is None:
        return shard
    if shard.digest != digests.header:
        findings.problem(
            f"bytes [0, {shard.start}), its header, are not those that were written: {SIDECAR} "
            f"has the digest {digests.header}, they have {shard.digest}; copy the file again",
            file=file,
        )
    for key in digests.blocks.keys() - shard.header.blocks.keys() - shard.refused:
        text = f"has digests of this block, which {file!r} does not have"
        findings.problem(text, file=SIDECAR, name=key)
    blocks = [
        _block_with_digests(block, digests.blocks.get(key), findings)
        for key, block in shard.header.blocks.items()
    ]
    return replace(shard, header=replace(shard.header, blocks=Blocks.of(file, blocks)))


def _block_with_digests(block: Block, known: tuple[str, ...] | None, findings: Findings) -> Block:
    if known is None:
        findings.problem(f"{SIDECAR} has no digests of it", file=block.shard, name=block.key)
        return block
    if len(known) != chunk_count(block.nbytes):
        text = f"{SIDECAR} has {len(known)} digests for its {block.nbytes} bytes"
        findings.problem(text, file=block.shard, name=block.key)
        return block
    return replace(block, digests=known)


def check_parts(
    sidecar: Sidecar, tables: Iterable[TableIds], findings: Findings
) -> dict[str, dict[Slice, PartRows]]:
    """Compare the parts of tables with those on disk.

    Returns:
        Table → slice → where rows of sub-slices begin, of those parts that agree.
    """
    agreed: dict[str, dict[Slice, PartRows]] = {}
    for ids in tables:
        told = {part.slice: part for part in sidecar.parts.get(ids.table, ())}
        for where in told.keys() - ids.claims:
            text = f"tells of a part {where} of this table, which {INDEX} does not name"
            findings.problem(text, file=SIDECAR, name=ids.table)
        for where in ids.claims - told.keys():
            text = f"does not tell of its part {where}"
            findings.problem(text, file=SIDECAR, name=ids.table)
        agreed[ids.table] = {
            where: told[where]
            for where, block in ids.parts.items()
            if where in told and _agrees(ids.table, told[where], block, findings)
        }
    for table in sidecar.parts.keys() - agreed.keys():
        text = f"tells of this table, which {INDEX} does not name"
        findings.problem(text, file=SIDECAR, name=table)
    return agreed


def _agrees(table: str, part: PartRows, block: Block, findings: Findings) -> bool:
    if part.rows != block.rows:
        text = f"says that part {part.slice} has {part.rows} rows, there are {block.rows} ids"
        findings.problem(text, file=SIDECAR, name=table)
    return part.rows == block.rows
