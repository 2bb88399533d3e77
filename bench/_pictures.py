"""Draws what was measured: throughput by case and loader, and time against size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench._tables import number_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from bench._measure import Times
    from bench._results import Growth, Speed

# Of Okabe and Ito's colours, which the colour-blind tell apart; ours is also the only dark one.
OURS, PEER, RAW = "#0072B2", "#B8C4CC", "#D55E00"
COLUMNS = 2
BAR = 0.27
"""Inches that one loader takes."""

HEAD = 0.75
"""Inches that a case takes beside its loaders."""


def draw(speeds: Sequence[Speed], growths: Sequence[Growth], folder: Path) -> list[Path]:
    """Draw what there is, and return the files; none without matplotlib."""
    try:
        import matplotlib as mpl  # noqa: PLC0415  # need not be installed
    except ImportError:
        return []
    for old in folder.glob("*.[ps][nv]g"):  # of other cases, perhaps
        old.unlink()
    mpl.use("agg")
    mpl.rcParams |= {"svg.fonttype": "none", "font.size": 9, "axes.titlesize": 10}
    folder.mkdir(exist_ok=True)
    drawn = []
    shown = [speed for speed in speeds if speed.nbytes is not None and speed.raw is not None]
    if shown:
        drawn += _save(_throughput(shown), folder / "throughput")
    if growths:
        drawn += _save(_size(growths), folder / "size")
    return drawn


def _save(figure: Any, path: Path) -> list[Path]:  # noqa: ANN401  # matplotlib is not typed here
    paths = [path.with_suffix(".png"), path.with_suffix(".svg")]
    for one in paths:
        figure.savefig(one, dpi=150, bbox_inches="tight", facecolor="white")
    return paths


def _throughput(speeds: Sequence[Speed]) -> Any:  # noqa: ANN401
    """Return bars of each case in a panel of its own, for their scales differ."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    columns = _columns(sorted(speeds, key=lambda speed: speed.case))
    heights = [sum(_height(speed) for speed in column) for column in columns]
    total = max(heights)
    figure = Figure(figsize=(5.6 * len(columns), total))
    for number, column in enumerate(columns):
        top = 1.0
        for speed in column:
            high = (len(_bars(speed)) + 0.4) * BAR / total
            top -= _height(speed) / total
            width = 1 / len(columns)
            panel = (number * width + 0.31 * width, top + 0.3 / total, 0.62 * width, high)
            _panel(figure.add_axes(panel), speed)
    return figure


def _columns(speeds: Sequence[Speed]) -> list[list[Speed]]:
    """Deal cases into columns of about the same height, in their order."""
    half = sum(_height(speed) for speed in speeds) / COLUMNS
    columns: list[list[Speed]] = [[] for _ in range(COLUMNS)]
    height = 0.0
    for speed in speeds:
        columns[min(int((height + _height(speed) / 2) / half), COLUMNS - 1)].append(speed)
        height += _height(speed)
    return [column for column in columns if column]


def _height(speed: Speed) -> float:
    return HEAD + (len(_bars(speed)) + 0.4) * BAR


def _bars(speed: Speed) -> list[Times]:
    """Return who has a bar, the fastest first; raw is a line."""
    bars = [one for one in speed.times if one.role != "raw"]
    return sorted(bars, key=lambda one: one.median)


def _panel(axes: Any, speed: Speed) -> None:  # noqa: ANN401
    bars = _bars(speed)
    rates = [_rate(speed, one) for one in bars]
    raw = _rate(speed, speed.raw) if speed.raw is not None else 0.0
    most = max(raw, *rates)
    places = range(len(bars))
    colours = [OURS if _is_ours(one) else PEER for one in bars]
    axes.barh(places, rates, height=0.72, color=colours)
    axes.axvline(raw, color=RAW, linewidth=1.6, linestyle=(0, (4, 2)))
    for place, one, rate in zip(places, bars, rates, strict=True):
        inside = rate > most / 5
        beside = rate if rate > raw or rate + most / 7 < raw else raw  # not on the line
        axes.annotate(
            number_text(rate),
            (min(rate, raw) if inside else beside, place),
            xytext=(-4 if inside else 4, 0),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="center_baseline",
            fontsize=8,
            color="white" if inside and _is_ours(one) else "black",
        )
    axes.set_yticks(places, [one.name for one in bars])
    for label, one in zip(axes.get_yticklabels(), bars, strict=True):
        label.set_fontweight("bold" if _is_ours(one) else "normal")
    axes.set_ylim(len(bars) - 0.5, -0.7)
    axes.set_xlim(0, most * 1.05)
    axes.set_title(f"{speed.case}  {speed.what}", loc="left", x=-0.48, pad=6)
    axes.annotate(
        f"raw {number_text(raw)} GB/s", (1, 0), xycoords="axes fraction", xytext=(0, -22),
        textcoords="offset points", ha="right", va="center", color=RAW, fontsize=8,
    )  # fmt: skip
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _is_ours(one: Times) -> bool:
    """Say whether it is our loader, in whatever variant."""
    return one.name.startswith("asyncloader")


def _rate(speed: Speed, one: Times) -> float:
    return (one.nbytes or speed.nbytes or 0) / one.median / 1e9


def _size(growths: Sequence[Growth]) -> Any:  # noqa: ANN401
    """Return a panel for each series; a line shows what strictly linear would be."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(5 * len(growths), 3.6), layout="constrained")
    for axes, growth in zip(
        figure.subplots(1, len(growths), squeeze=False)[0], growths, strict=True
    ):
        sizes, medians = list(growth.sizes), growth.medians
        # From where a unit takes least: whatever lies above the line has grown faster.
        least = min(median / size for median, size in zip(medians, sizes, strict=True))
        linear = [least * size for size in sizes]
        axes.loglog(sizes, linear, color=RAW, linestyle=(0, (4, 2)), label="linear")
        axes.fill_between(
            sizes, [min(some) for some in growth.seconds], [max(some) for some in growth.seconds],
            color=OURS, alpha=0.18, linewidth=0,
        )  # fmt: skip
        axes.loglog(sizes, medians, color=OURS, marker="o", markersize=4, label=growth.what)
        axes.set_title(f"{growth.case}  {growth.what}", loc="left")
        axes.set_xlabel(growth.unit)
        axes.set_ylabel("seconds")
        axes.set_xticks(sizes, [f"{size:,.0f}" for size in sizes], fontsize=8)
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure
