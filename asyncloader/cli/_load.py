"""`asyncloader load`."""

from __future__ import annotations

import contextlib
import enum
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from asyncloader._loading.progress import Progress
from asyncloader.options import ReadOptions

from ._options import DirectFlag, JsonFlag, LinksFlag, PathArgument, examples
from ._output import print_json, progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from asyncloader._loading.progress import Span
    from asyncloader._loading.report import LoadReport

_DEFAULTS = ReadOptions()

EPILOG = examples(
    ("asyncloader load runs/ctr/1200", "read it all, and say how fast"),
    ("asyncloader load runs/ctr/1200 --verify require", "compare every byte with digests"),
    ("asyncloader load runs/ctr/1200 --cast float32", "and convert all floats"),
    ("asyncloader load runs/ctr/1200 --trace load.json", "see it on ui.perfetto.dev"),
)


class VerifyChoice(enum.StrEnum):
    """What `--verify` takes."""

    AUTO = "auto"
    REQUIRE = "require"
    OFF = "off"


class FloatChoice(enum.StrEnum):
    """What `--cast` takes."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"
    FLOAT64 = "float64"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What a load did, and what had to be done before."""

    report: LoadReport

    kernels_seconds: float
    """To load the kernels that tables need, or, the first time ever, to compile them."""

    allocation_seconds: float
    """To read names and headers, and make tables and tensors."""


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
    verify: Annotated[
        VerifyChoice,
        typer.Option(
            help="Compare bytes with the digests that asyncloader saved along: where there are "
            "some, always (without any it fails), or never."
        ),
    ] = VerifyChoice.AUTO,
    trace: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Write when each step began and how long it took, for ui.perfetto.dev.",
            show_default=False,
        ),
    ] = None,
    direct_io: DirectFlag = False,
    follow_symlinks: LinksFlag = False,
    cast: Annotated[
        FloatChoice | None,
        typer.Option(
            help="Make tables and tensors of floats of this dtype, whatever dtype they were saved "
            "in, and convert their values on the way.",
            show_default=False,
        ),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Load all of a checkpoint into memory, and say what that took.

    Tables and tensors are made for whatever it holds, filled, and thrown away: this shows that a
    checkpoint can be loaded, and how fast this machine does it with these settings. It takes as
    much memory as the checkpoint is large.
    """
    options = ReadOptions(
        parallel=parallel,
        chunk_bytes=chunk_bytes,
        max_inflight_bytes=max_inflight_bytes,
        verify=verify.value,
        direct_io=direct_io,
        follow_symlinks=follow_symlinks,
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
    made = await allocate(path, options=options, floats=floats)
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
    from ._trace_file import write_trace

    with Path(file).open("wb") as out:
        try:
            yield spans.append
        finally:
            write_trace(out, path, spans)
