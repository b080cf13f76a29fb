# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Draws lines and bars with matplotlib and gives them as SVG data URIs. Knows nothing of what the figures mean.

Each picture is drawn twice: for a screen, 10 inches or 960 pixels wide, and ``narrow``, for a phone. Its letters are
some 14 pixels high in both. A dark page shows the same file in other colors.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import palette
from ..words import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, EDGE, GRID, PAPER = "#1f2328", "#8c959f", "#e2e5e9", "#ffffff"
# What a color of a light page is on a dark one.
DARK = {INK: "#e6edf3", EDGE: "#7d8590", GRID: "#30363d", PAPER: "#0d1117"}
DARK |= {palette.SERIES[key]: palette.SERIES_DARK[key] for key in palette.SERIES}
DARK |= {palette.PARTS[key]: palette.PARTS_DARK[key] for key in palette.PARTS}

FONT_PT = 10.5
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_WIDTH, _NARROW_WIDTH = 10.0, 3.75  # inches
_LETTERS, _NARROW_LETTERS = 115, 44  # that fit beside each other in a legend
_HANDLE_LETTERS = 9  # that a legend's line and its gaps take
_LONGEST_LABEL, _NARROW_LABEL = 34, 20  # letters
_FEW_POINTS = 40
_SETTINGS: Any = {
    "font.family": "sans-serif",
    "font.size": FONT_PT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": EDGE,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "text.parse_math": False,  # a "$" in a file's name is a dollar
    "svg.fonttype": "path",  # looks the same everywhere; the alt text holds the words
    "svg.hashsalt": "deepspeed_acco",
}


@dataclass(frozen=True)
class Line:
    """Holds one line: ``label`` is in the legend once, however many bear it; ``dash`` counts the patterns, from 0."""

    label: str
    color: str
    dash: int
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """Holds axes with lines. ``from_zero``: y begins at 0. ``top``: y ends there. ``level``: a horizontal line, as (y,
    what it is)."""

    x_label: str
    y_label: str
    lines: Sequence[Line]
    from_zero: bool = False
    top: float | None = None
    level: tuple[float, str] | None = None


@dataclass(frozen=True)
class Bar:
    """Holds one horizontal bar: ``parts`` side by side from 0, none negative.

    ``color`` is that of its name, ``low`` and ``high`` are a whisker around the end, ``bound`` a marker, ``dots``
    single values on the bar, and ``remark`` the words that stand beside it.
    """

    label: str
    color: str
    parts: Sequence[float]
    remark: str
    low: float | None = None
    high: float | None = None
    bound: float | None = None
    dots: Sequence[float] = ()


@dataclass(frozen=True)
class Part:
    """Describes a part that bars have: its name in the legend (empty for a part that needs none), and its color; None
    for the color of each bar's name."""

    name: str
    color: str | None


def require_matplotlib() -> None:
    """Raises ModuleNotFoundError where there is no matplotlib, and says how to install it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(
            'The report is drawn with matplotlib, which is not installed: pip install "deepspeed_acco[report]"'
        ) from error


def draw_lines(
    panels: Sequence[Panel], narrow: bool, stacked: bool = False, height: float = 4.2, legend: bool = True
) -> Figure:
    """Returns a picture of the panels side by side, sharing y, or ``stacked``, sharing x, with one legend below, of the
    lines and the levels. Narrow ones always stand below each other.

    Args:
        height: in inches, of the whole wide picture without the legend.
        legend: False leaves it out, as one line does.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        names = list(dict.fromkeys(line.label for panel in panels for line in panel.lines))
        names += dict.fromkeys(panel.level[1] for panel in panels if panel.level)
        columns = _legend_columns(names, narrow)
        has_legend = legend and len(names) > 1
        height = 2.5 * len(panels) if narrow else height
        size = (_NARROW_WIDTH if narrow else _WIDTH, height + 0.26 * has_legend * -(-len(names) // columns))
        figure = Figure(figsize=size, layout="constrained")
        rows = len(panels) if stacked or narrow else 1
        grid = figure.subplots(
            nrows=rows,
            ncols=len(panels) // rows,
            sharex=stacked,
            sharey=not stacked and not narrow,
            squeeze=False,
        ).flatten()
        handles: dict[str, Any] = {}
        for axes, panel in zip(grid, panels):
            _draw_panel(axes, panel, handles)
            if stacked:
                axes.label_outer()
        if rows == 1:
            for axes in grid[1:]:
                axes.set_ylabel("")
        if has_legend:
            shown = [handles[name] for name in names]
            _add_legend(figure, shown, [_visible(name) for name in names], columns, handlelength=3.2)
        return figure


def _draw_panel(axes: Axes, panel: Panel, handles: dict[str, Any]) -> None:
    """Draws the panel and adds a handle for the legend by each name."""
    from matplotlib.ticker import EngFormatter

    for line in panel.lines:
        marker: dict[str, Any] = {"marker": "o", "markersize": 3} if len(line.x) <= _FEW_POINTS else {}
        dash = _DASHES[line.dash % len(_DASHES)]
        (handles[line.label],) = axes.plot(line.x, line.y, color=line.color, linestyle=dash, linewidth=1.7, **marker)
    if panel.level:
        handles[panel.level[1]] = axes.axhline(panel.level[0], color=EDGE, linewidth=1.2, linestyle=":")
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    if panel.top is not None:
        lowest = min(min(line.y) for line in panel.lines)
        if lowest < panel.top:
            axes.set_ylim(lowest - 0.05 * (panel.top - lowest), panel.top)
    axes.set_ylabel(panel.y_label)
    axes.set_xlabel(panel.x_label)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    if max((abs(x) for line in panel.lines for x in line.x), default=0) >= 1000:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k; of small values it would make 500m


def draw_bars(
    bars: Sequence[Bar],
    parts: Sequence[Part],
    x_label: str,
    narrow: bool,
    interval_name: str = "",
    bound_name: str = "",
    dots_name: str = "",
) -> Figure:
    """Returns a picture with one horizontal bar below the other, the first on top. Label and remark stand left and
    right of a bar, narrow above it.

    Args:
        interval_name, bound_name, dots_name: the legend's words for the whisker, the marker and the dots.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    with matplotlib.rc_context(_SETTINGS):
        handles = _part_handles(bars, parts)
        if interval_name and any(bar.low is not None for bar in bars):
            handles.append(Line2D([], [], color=INK, linewidth=1.2, marker="|", label=interval_name))
        if bound_name and any(bar.bound is not None for bar in bars):
            handles.append(Line2D([], [], color=palette.PARTS["bound"], label=bound_name, **_BOUND_MARK))
        if dots_name and any(bar.dots for bar in bars):
            handles.append(Line2D([], [], label=dots_name, **_DOTS))
        columns = _legend_columns([handle.get_label() for handle in handles], narrow)
        legend_rows = -(-len(handles) // columns) if handles else 0
        width, row = (_NARROW_WIDTH, 0.66) if narrow else (_WIDTH, 0.46)
        figure = Figure(figsize=(width, 1.05 + row * len(bars) + 0.26 * legend_rows), layout="constrained")
        axes = figure.subplots()
        thickness = 0.42 if narrow else 0.58
        begins = [0.0] * len(bars)
        for place, part in enumerate(parts):
            widths = [bar.parts[place] for bar in bars]
            colors = [part.color or bar.color for bar in bars]
            axes.barh(range(len(bars)), widths, left=begins, height=thickness, color=colors)
            begins = [begin + width for begin, width in zip(begins, widths)]
        for row_number, bar in enumerate(bars):
            _mark_bar(axes, row_number, bar, reach=0.27 if narrow else 0.4)
            _name_bar(axes, row_number, bar, narrow, has_chip=len({bar.color for bar in bars}) > 1)
        axes.set_yticks([] if narrow else range(len(bars)), [] if narrow else [_visible(bar.label) for bar in bars])
        axes.tick_params(axis="y", length=0, pad=14)
        axes.set_ylim(len(bars) - (0.7 if narrow else 0.5), -0.8 if narrow else -0.5)
        axes.set_xlim(left=0)
        axes.set_xlabel(x_label)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        if handles:
            _add_legend(figure, handles, [handle.get_label() for handle in handles], columns, columnspacing=1.6)
        return figure


_DOTS: dict[str, Any] = {
    "linestyle": "none",
    "marker": "o",
    "color": PAPER,
    "markeredgecolor": INK,
    "markersize": 5,
}
_BOUND_MARK: dict[str, Any] = {"marker": "|", "markersize": 12, "markeredgewidth": 2.4, "linestyle": "none"}


def _part_handles(bars: Sequence[Bar], parts: Sequence[Part]) -> list[Any]:
    """Returns the legend's handles of the parts that have a name and that some bar has."""
    from matplotlib.patches import Patch

    used = [part for place, part in enumerate(parts) if part.name and any(bar.parts[place] for bar in bars)]
    return [Patch(color=part.color or EDGE, label=part.name) for part in used]


def _mark_bar(axes: Axes, row: int, bar: Bar, reach: float) -> None:
    if bar.low is not None and bar.high is not None:
        axes.plot([bar.low, bar.high], [row, row], color=INK, linewidth=1.2, marker="|", markersize=7)
    if bar.bound is not None:
        axes.plot([bar.bound] * 2, [row - reach, row + reach], color=palette.PARTS["bound"], linewidth=2.4)
    axes.plot(bar.dots, [row] * len(bar.dots), **_DOTS)


def _name_bar(axes: Axes, row: int, bar: Bar, narrow: bool, has_chip: bool) -> None:
    """Writes the bar's remark, and narrow its label; a chip has the color of the name."""
    across = axes.get_yaxis_transform()  # x in parts of the axes, y in rows
    chip: dict[str, Any] = {"color": bar.color, "markersize": 8, "clip_on": False, "transform": across}
    if not narrow:
        axes.text(1.015, row, bar.remark, transform=across, va="center")
        if has_chip:
            axes.plot([-0.013], [row], "s", **chip)
        return
    above = row - 0.45
    look: dict[str, Any] = {"transform": across, "va": "center"}
    look["bbox"] = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.5}  # no line of the grid runs through the words
    axes.text(0.05 if has_chip else 0.012, above, _visible(bar.label, _NARROW_LABEL), **look)
    axes.text(1.0, above, bar.remark, ha="right", **look)
    if has_chip:
        axes.plot([0.02], [above], "s", **chip)


def _legend_columns(names: Sequence[str], narrow: bool) -> int:
    longest = max((len(_visible(name)) for name in names), default=0)
    fit = int((_NARROW_LETTERS if narrow else _LETTERS) / (longest + _HANDLE_LETTERS))
    return max(1, min(len(names), 5, fit))


def _add_legend(figure: Figure, handles: Sequence[Any], names: Sequence[str], columns: int, **look: Any) -> None:
    place: Any = "outside lower center"
    figure.legend(handles, names, loc=place, ncols=columns, frameon=False, **look)


def _visible(label: str, longest: int = _LONGEST_LABEL) -> str:
    """Returns the label in one line, short enough for a picture, without what XML cannot hold; matplotlib before 3.10
    leaves a label that begins with "_" out of a legend."""
    half = longest // 2
    label = " ".join(printable(label).split())
    short = label if len(label) <= longest else f"{label[: half - 1]}…{label[-half:]}"
    return "\u200b" + short if short.startswith("_") else short


def data_uri(figure: Figure) -> str:
    """Returns the figure as ``data:image/svg+xml;base64,...``, the same bytes every time."""
    import matplotlib

    file = io.BytesIO()
    about: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context(_SETTINGS):
        figure.savefig(file, format="svg", metadata=about, transparent=True)
    svg = file.getvalue().decode()
    svg = _for_both_themes(svg[svg.index("<svg") :])
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _for_both_themes(svg: str) -> str:
    """Gives each color its counterpart on a dark page."""
    light, dark = "", ""
    for color, counterpart in DARK.items():
        if color.lower() in svg:
            name = f"--c{color[1:].lower()}"
            svg = svg.replace(color.lower(), f"var({name})")
            light += f"{name}:{color.lower()};"
            dark += f"{name}:{counterpart.lower()};"
    style = f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    return svg.replace("</style>", f"{style}</style>", 1)
