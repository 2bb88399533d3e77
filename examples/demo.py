"""Saves a checkpoint of some 300 MB, looks into it, loads it on a serving event loop, checks it.

make demo
python -m examples.demo --keep FOLDER     # leaves the checkpoint there
"""

from __future__ import annotations

import contextlib
import gc
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch
import uvloop
from rich.console import Console
from rich.table import Table

from asyncloader import HashTable, Loader, Saver, gen_slice
from asyncloader.cli import run
from examples.lag import idle_lag, measuring_lag, percentile
from examples.made_up import (
    empty_table,
    empty_tensors,
    filled_table,
    holds_exactly,
    random_table,
    random_tensor,
    same_bits,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from asyncloader import LoadReport, SaveReport
    from tests.oracle import TableData

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


def save(
    path: Path, tables: Mapping[str, TableData], tensors: Mapping[str, torch.Tensor]
) -> Iterator[SaveReport]:
    """Save as several ranks do, each its slice of the ids; here one after the other, 0 last."""
    for rank in reversed(range(RANKS)):
        part = gen_slice(rank, RANKS)
        mine = {name: filled_table(name, data, part) for name, data in tables.items()}
        yield Saver(
            rank, RANKS, parallel=2, path=path, hashtables=mine, tensors=tensors, save_id="demo"
        ).save()


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


def main(arguments: list[str]) -> int:
    """Run the demo, and return the exit code."""
    console = Console(highlight=False)
    with contextlib.ExitStack() as stack:
        if arguments[:1] == ["--keep"]:
            path = Path(arguments[1])
        else:
            temporary = tempfile.TemporaryDirectory(prefix="asyncloader-demo-")
            path = Path(stack.enter_context(temporary), "checkpoint")
        return demonstrate(path, console)


def demonstrate(path: Path, console: Console) -> int:
    """Save, look, load twice, compare."""
    imports = time.time() - psutil.Process().create_time()
    rng = np.random.default_rng(SEED)
    begin = time.perf_counter()
    with console.status("Compiling the tables' kernels; the next time they are there"):
        HashTable([1])
    kernels = time.perf_counter() - begin
    written_tables = {name: random_table(rng, *size) for name, size in TABLES.items()}
    written_tensors = make_tensors(rng)
    with console.status("Saving"):
        reports = list(save(path, written_tables, written_tensors))
    megabytes = sum(report.bytes_written for report in reports) / 1e6
    seconds = sum(report.seconds for report in reports)
    console.print(
        f"Saved {megabytes:.0f} MB as {RANKS} ranks in {seconds:.1f} s: sorted, digested, synced.\n"
    )
    console.print(f"[dim]$ asyncloader inspect {path}[/]", soft_wrap=True)
    run(["inspect", str(path)])

    console.print("\nLoading it on an event loop that goes on serving meanwhile:\n")
    loads = []
    for _ in range(2):
        tables = {name: empty_table(name, data) for name, data in written_tables.items()}
        tensors = empty_tensors(written_tensors)
        loads.append(uvloop.run(load(Loader(path, tables, tensors))))
        with console.status("Comparing every bit"):
            wrong = differences(tables, tensors, written_tables, written_tensors)
        if wrong:
            console.print(f"[bold red]✗[/] Not what was saved: {', '.join(wrong)}")
            return 1
    console.print(loads[0][0])
    console.print()
    console.print(comparison(loads))
    console.print(
        f"\nBefore that, the process took {imports:.1f} s to import torch and numba, and "
        f"{kernels:.1f} s to make the first table (its kernels are compiled once on a machine)."
    )
    console.print("[bold green]✓[/] Every row and every tensor is what was saved, bit for bit")
    return 0


def comparison(loads: list[tuple[LoadReport, list[float], list[float]]]) -> Table:
    """Return the figures of both loads, side by side."""
    table = Table("", "first load", "second load", box=None, padding=(0, 3, 0, 0))
    reports = [report for report, _, _ in loads]
    table.add_row("time", *(f"{report.seconds:.3f} s" for report in reports))
    table.add_row("rate", *(f"{report.gigabytes_per_second:.2f} GB/s" for report in reports))
    for what, share in (("median", 50.0), ("worst", 100.0)):
        late = [f"{percentile(lags, share) * 1e3:.1f} ms" for _, lags, _ in loads]
        table.add_row(f"lag of the loop, {what}", *late)
    table.add_row(
        "lag of the idle loop, worst", *(f"{max(idle) * 1e3:.1f} ms" for _, _, idle in loads)
    )
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
