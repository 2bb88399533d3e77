"""Loads one case in a process of its own, and prints the most memory that took, as JSON.

    python -m bench._peak CASE SCALE FOLDER

The kernel's high-water mark (`VmHWM`) is set back just before the load. `ru_maxrss` would not do:
it cannot be set back, and a process inherits that of the one it was started from.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
import uvloop

from asyncloader import HashTable, Loader
from bench._cases import QUARTER, TABLE, dense_shapes, table_case
from bench._index import index_bytes
from bench._scale import SCALES
from bench._truth import table_rows
from examples.made_up import empty_table

INFLIGHT = 128 << 20
DENSE = ("D1", "P1")
FOLDERS = {"D1": "dense", "P1": "model-pt/model.pt", "T1": "table-1", "T4": "table-1"}


def resident(mark: str) -> int:
    """Return `VmRSS`, bytes held now, or `VmHWM`, the most since the mark was set back."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{mark}:"):
            return int(line.split()[1]) << 10
    raise LookupError(mark)


def warm_up(width: int) -> None:
    """Load a small table, so that what is imported, compiled or started once is there."""
    data = table_rows(1000, width)
    with tempfile.TemporaryDirectory() as folder:
        case = table_case(Path(folder) / "small", data, ranks=1)
        uvloop.run(Loader(case.path, {TABLE: case.table()}).aload())


def main(case: str, scale_name: str, folder: str) -> None:
    """Load, and print what it took."""
    scale = SCALES[scale_name]
    warm_up(scale.width)
    path = Path(folder) / FOLDERS[case]
    shapes = dense_shapes(scale) if case in DENSE else {}
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    tables: dict[str, HashTable] = {}
    if case not in DENSE:
        like = table_rows(1, scale.width)
        tables[TABLE] = empty_table(TABLE, like, QUARTER if case == "T4" else None)
    loader = Loader(path, tables, tensors, strict=True, max_inflight_bytes=INFLIGHT)

    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = resident("VmRSS")
    report = uvloop.run(loader.aload())
    peak = resident("VmHWM")

    stays = index = 0
    for table in tables.values():
        row = 8 + sum(slot.row_bytes for slot in table.slots().values())
        stays += len(table) * row
        index += index_bytes(table)
    facts = {
        "rows": sum(counts.rows for counts in report.tables.values()),
        "destination": stays or sum(tensor.nbytes for tensor in tensors.values()),
        "index": index,
        "above": peak - before - stays,  # tensors were there before
        "allowed": INFLIGHT + index + (64 << 20),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
