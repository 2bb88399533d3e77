"""Writes a checkpoint of some 300 MB, loads it while the event loop goes on serving, and checks it.

make demo
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import uvloop
from rich.console import Console

from asyncloader import Loader
from examples.lag import idle_lag, measuring_lag, percentile
from examples.made_up import (
    empty_table,
    empty_tensors,
    holds_exactly,
    random_table,
    random_tensor,
    same_bits,
)
from tests.oracle import TableData, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping

    from asyncloader import HashTable, LoadReport

SEED = 7
RANKS = 4

TABLES = {"item_emb": (150_000, 64), "user_emb": (280_000, 32), "ad_emb": (60_000, 16)}
"""Name → ids, and floats an embedding. AdamW keeps two more rows of that size for each id."""

LAYERS = 40
"""Of five tensors each."""


def make_tensors(rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Return the dense part of the model: layers of different sizes and dtypes."""
    tensors = {}
    for layer in range(LAYERS):
        width = 128 * (1 + layer % 5)
        for name, shape, dtype in (
            ("weight", (width, 512), torch.float32),
            ("bias", (width,), torch.float32),
            ("half.weight", (width, 384), torch.bfloat16),
            ("mask", (width, 3, 7), torch.bool),
            ("steps", (), torch.int64),
        ):
            tensors[f"layers.{layer}.{name}"] = random_tensor(rng, shape, dtype)
    return tensors


async def load(loader: Loader) -> tuple[LoadReport, list[float], list[float]]:
    """Load, and measure the lag of the loop that the load runs on, and of the same loop idle."""
    # What servers do once they are up: a full collection would stop the loop for 90 ms, because
    # of all that torch and numba have brought along.
    gc.collect()
    gc.freeze()
    idle = await idle_lag(seconds=0.2)
    lags: list[float] = []
    report = await measuring_lag(loader.aload(), lags)
    return report, lags, idle


def differences(
    tables: Mapping[str, HashTable],
    tensors: Mapping[str, torch.Tensor],
    written_tables: Mapping[str, TableData],
    written_tensors: Mapping[str, torch.Tensor],
) -> list[str]:
    """Name what was loaded but is not what was written, down to the last bit."""
    wrong = [name for name, data in written_tables.items() if not holds_exactly(tables[name], data)]
    wrong += [name for name, data in written_tensors.items() if not same_bits(tensors[name], data)]
    return wrong


def main() -> int:
    """Run the demo, and return the exit code."""
    console = Console(highlight=False)
    rng = np.random.default_rng(SEED)
    with tempfile.TemporaryDirectory(prefix="asyncloader-demo-") as folder:
        path = Path(folder)
        with console.status(f"Writing a checkpoint to {path}"):
            start = time.perf_counter()
            written_tables = {name: random_table(rng, *size) for name, size in TABLES.items()}
            written_tensors = make_tensors(rng)
            write_checkpoint(path, written_tables, written_tensors, ranks=RANKS, shuffle_seed=SEED)
            seconds = time.perf_counter() - start
        size = sum(file.stat().st_size for file in path.iterdir())
        console.print(
            f"Wrote {size / 1e6:.0f} MB in {seconds:.1f} s: {len(written_tables)} tables with "
            f"AdamW's slots, by {RANKS} ranks, and {len(written_tensors)} tensors."
        )

        with console.status("Compiling the tables' kernels; the next time they are there"):
            tables = {name: empty_table(name, data) for name, data in written_tables.items()}
        tensors = empty_tensors(written_tensors)
        report, lags, idle = uvloop.run(load(Loader(path, tables, tensors)))
        console.print("Loaded it on an event loop that goes on serving meanwhile:\n")
        console.print(report)

        with console.status("Comparing every bit"):
            wrong = differences(tables, tensors, written_tables, written_tensors)
    console.print(
        f"\nHow late a timer of 1 ms was on that loop: median {percentile(lags, 50) * 1e3:.1f} ms, "
        f"worst {max(lags) * 1e3:.1f} ms (idle: worst {max(idle) * 1e3:.1f} ms)"
    )
    if wrong:
        console.print(f"[bold red]✗[/] Not what was written: {', '.join(wrong)}")
        return 1
    console.print("[bold green]✓[/] Every row and every tensor is what was written, bit for bit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
