"""The arguments of a loader that have to be named."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asyncloader.options import LoadKeywords

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncloader._planning.plan import LoadPlan
    from asyncloader._planning.targets import Casting
    from asyncloader.options import ReadOptions

    from .progress import Progress, Span
    from .runtime import Runtime


class LoaderKeywords(LoadKeywords, total=False):
    """The arguments of `Loader` that have to be named, but `filter_func`."""

    strict: bool
    cast: Casting | None
    progress: Callable[[Progress], object] | bool | None
    on_plan: Callable[[LoadPlan], object] | None
    trace: Callable[[Span], object] | None
    runtime: Runtime | None
    options: ReadOptions | None
