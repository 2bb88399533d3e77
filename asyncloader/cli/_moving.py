"""`asyncloader load` and `asyncloader convert`."""

from __future__ import annotations

import contextlib
import enum
import os
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import orjson
import typer

from asyncloader import tools
from asyncloader._loading.progress import Progress
from asyncloader.options import ReadOptions

from ._common import (
    CacheFolder,
    DirectFlag,
    JsonFlag,
    LinksFlag,
    PathArgument,
    examples,
    print_json,
    progress,
    trace_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from asyncloader._loading.progress import Span
    from asyncloader._loading.report import LoadReport

_DEFAULTS = ReadOptions()

LOAD_EPILOG = examples(
    ("asyncloader load runs/ctr/1200", "read it all, and say how fast"),
    ("asyncloader load runs/ctr/1200 --verify require", "compare every byte with digests"),
    ("asyncloader load runs/ctr/1200 --cast float32", "and convert all floats"),
    ("asyncloader load runs/ctr/1200 --trace load.json", "see it on ui.perfetto.dev"),
)
CONVERT_EPILOG = examples(
    ("asyncloader convert runs/ctr/1200 ctr.safetensors", "one plain file, for any program"),
    ("asyncloader convert ctr.safetensors back", "and back again"),
    ("asyncloader convert runs/ctr/1200 small --slots embedding", "without the optimizer's state"),
    ("asyncloader convert runs/ctr/1200 wide --shards 16", "as 16 ranks would have saved it"),
    codes="Exit codes: 0, done; 2, it failed: unless the message says that the file is written, "
    "nothing was, and the old files are there still.",
)


class VerifyChoice(enum.StrEnum):
    """The values of `--verify`."""

    AUTO = "auto"
    REQUIRE = "require"
    OFF = "off"


# The values of `--cast`.
FloatChoice = enum.StrEnum("FloatChoice", ["BFLOAT16", "FLOAT16", "FLOAT32", "FLOAT64"])

_Verify = Annotated[
    VerifyChoice,
    typer.Option(
        help="Compare bytes with the digests that asyncloader saved along: where there are "
        "some, always (without any it fails), or never."
    ),
]
_Trace = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Write when each step began and how long it took, for ui.perfetto.dev.",
    ),
]
_Cast = Annotated[
    FloatChoice | None,
    typer.Option(
        help="Make tables and tensors of floats of this dtype, whatever dtype they were saved "
        "in, and convert their values on the way."
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """The report of a load, and the time before it."""

    report: LoadReport
    kernels_seconds: float  # to load the kernels, or, the first time ever, to compile them
    allocation_seconds: float  # to read names and headers, and make tables and tensors


def load(
    path: PathArgument,
    *,
    parallel: Annotated[
        int, typer.Option(metavar="N", help="Reads at a time.")
    ] = _DEFAULTS.parallel,
    chunk_bytes: Annotated[
        int, typer.Option(metavar="BYTES", help="The most that one read takes.")
    ] = _DEFAULTS.chunk_bytes,
    max_inflight_bytes: Annotated[
        int,
        typer.Option(metavar="BYTES", help="Memory for reads under way, besides what is loaded."),
    ] = _DEFAULTS.max_inflight_bytes,
    verify: _Verify = VerifyChoice.AUTO,
    trace: _Trace = None,
    direct_io: DirectFlag = None,
    cache_dir: CacheFolder = None,
    follow_symlinks: LinksFlag = False,
    cast: _Cast = None,
    json: JsonFlag = False,
) -> None:
    """Load all of a checkpoint into memory, and say how long that took.

    Tables and tensors are made for all that it holds, filled, and thrown away: this shows that a
    checkpoint can be loaded, and how fast this machine does it with these settings. It takes as
    much memory as the checkpoint is large.
    """
    options = ReadOptions(
        parallel=parallel,
        chunk_bytes=chunk_bytes,
        max_inflight_bytes=max_inflight_bytes,
        verify=verify.value,
        direct_io="auto" if direct_io is None else direct_io,
        follow_symlinks=follow_symlinks,
        cache_dir=cache_dir,
    )
    from asyncloader._threads.blocking import run_blocking

    with _tracing(trace, path) as listener, progress("loading") as tell:
        if tell is not None:  # before torch and the kernels, which take seconds the first time
            tell(Progress(bytes_done=0, bytes_total=0, seconds=0, current="preparing"))
        run = partial(load_all, path, options, trace=listener, progress=tell, floats=cast)
        loaded = run_blocking(run)
    if json:
        print_json(loaded)
        return
    from ._result_views import load_view
    from ._terminal import show

    view = load_view(loaded.report, loaded.kernels_seconds, loaded.allocation_seconds)
    show(view, markup=True)  # the report's own


async def load_all(
    path: str,
    options: ReadOptions,
    *,
    trace: Callable[[Span], object] | None = None,
    progress: Callable[[Progress], object] | None = None,
    floats: str | None = None,
) -> Loaded:
    """Make room for a checkpoint and load it."""
    from asyncloader import Loader
    from asyncloader._tools.allocation import allocate

    begin = time.perf_counter()
    made = await allocate(path, options, floats=floats)
    prepared = time.perf_counter() - begin
    loader = Loader(
        path,
        made.tables,
        made.tensors,
        options=options,
        progress=progress,
        trace=trace,
        cast=None if floats is None else "any",
    )
    report = await loader.aload()
    left_out = (
        f"{n!r} is {dtype}, which torch lacks: left out" for n, dtype in made.lacking.items()
    )
    return Loaded(
        report=replace(report, warnings=(*report.warnings, *left_out)),
        kernels_seconds=made.kernels_seconds,
        allocation_seconds=prepared - made.kernels_seconds,
    )


@contextlib.contextmanager
def _tracing(file: str | None, path: str) -> Iterator[Callable[[Span], object] | None]:
    """Yield a listener for each step, and write all of them in the end, also of a load that fails.

    Raises:
        OSError: If the file cannot be written to; before anything is loaded.
    """
    if file is None:
        yield None
        return
    spans: list[Span] = []
    target, source = Path(file).resolve(), Path(path).resolve()
    if target == source or source in target.parents:
        raise ValueError(f"{file}: a trace cannot be written into the checkpoint itself")
    with Path(file).open("wb") as out:
        try:
            yield spans.append
        finally:
            out.write(orjson.dumps(trace_of(path, spans, process=os.getpid())))


_Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="What to convert: a folder that RecIS wrote, a .safetensors file, or a folder of "
        "these, as Hugging Face's are.",
    ),
]
_Destination = Annotated[
    str,
    typer.Argument(
        metavar="DST",
        help="What to write: one file if it ends in .safetensors, else a folder in RecIS's format.",
    ),
]
_Shards = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="R",
        help="Write a folder as R ranks would: as many as wrote the source, unless given. One "
        "rank's part has to fit into memory at a time.",
    ),
]
_Slots = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="Keep only these slots of tables, separated by commas, and the ids.",
    ),
]
_Tables = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="Of plain files: take these for tables, separated by commas, and nothing else. "
        "Without it, what looks like a table is one if it has each id once.",
    ),
]


def convert(
    source: _Source,
    destination: _Destination,
    *,
    shards: _Shards = None,
    slots: _Slots = None,
    tables: _Tables = None,
    parallel: Annotated[
        int,
        typer.Option(min=1, metavar="P", help="Shard files of each rank, and writes at a time."),
    ] = 8,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what is there, once all is written.")
    ] = False,
    follow_symlinks: LinksFlag = False,
    json: JsonFlag = False,
) -> None:
    """Turn a checkpoint into another form of itself.

    Into one plain .safetensors file: the ids of table T stand there as T.id and its slots as
    T.embedding and so on, row by row. Out of such a file, or others in which there are X.id, each
    id once, and X.embedding: into a folder in RecIS's format. From folder to folder: with other
    ranks, or fewer slots. Nothing gets lost on the way there and back.

    A plain file is written piece by piece, in little memory, whatever the size.
    """
    with progress("converting") as listener:
        done = tools.convert(
            source,
            destination,
            shards=shards,
            slots=_names(slots),
            tables=_names(tables),
            parallel=parallel,
            overwrite=overwrite,
            progress=listener,
            options=ReadOptions(follow_symlinks=follow_symlinks),
        )
    if json:
        print_json(done)
        return
    from ._result_views import conversion_view
    from ._terminal import show

    show(conversion_view(done))


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(filter(None, text.split(",")))
