# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Draws lines and bars with matplotlib and gives them as SVG data URIs. Knows nothing of what the figures mean.

Every picture is 10 inches wide, which a browser shows as 960 pixels.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

# Okabe and Ito's palette, whose colours are told apart with every common colour blindness; grey replaces its yellow,
# which cannot be read on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222", "#8C8C8C")
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_WIDTH = 10.0
_LONGEST_LABEL = 34
_LEGEND_LETTERS, _HANDLE_LETTERS = 115, 9  # that fit beside each other, and that a line and its gaps take
_FEW_POINTS = 40
_SETTINGS = {
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": "#333333",
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "text.color": "#222222",
    "text.parse_math": False,  # a "$" in a file's name is a dollar
    "svg.fonttype": "path",  # looks the same everywhere; the alt text holds the words
}


def colour(index: int) -> str:
    """The colour of configuration ``index`` in every picture and table."""
    return COLOURS[index % len(COLOURS)]


def _dash(index: int):
    """Neighbours differ, and so do configurations that share a colour: coinciding lines stay visible."""
    return _DASHES[(index + index // len(COLOURS)) % len(_DASHES)]


@dataclass(frozen=True)
class Line:
    """One line: ``label`` in the legend (once, however many lines bear it), ``index`` gives colour and dashes."""

    label: str
    index: int
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """Axes with lines. ``from_zero``: y begins at 0. ``top``: y ends there. ``level``: a horizontal line, as (y, what
    it is)."""

    x_label: str
    y_label: str
    lines: Sequence[Line]
    from_zero: bool = False
    top: float | None = None
    level: tuple[float, str] | None = None


@dataclass(frozen=True)
class Bar:
    """One horizontal bar: ``parts`` side by side from 0, none negative.

    ``low`` and ``high`` are a whisker around the end, ``bound`` a marker, ``dots`` single values on the bar, and
    ``remark`` the words right of it.
    """

    label: str
    index: int
    parts: Sequence[float]
    remark: str
    low: float | None = None
    high: float | None = None
    bound: float | None = None
    dots: Sequence[float] = ()


def require_matplotlib() -> None:
    """Raises:
    ModuleNotFoundError: there is no matplotlib; says how to install it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(
            'The report is drawn with matplotlib, which is not installed: pip install "deepspeed_acco[report]"'
        ) from error


def draw_lines(panels: Sequence[Panel], stacked: bool = False, height: float = 4.2, legend: bool = True):
    """A matplotlib Figure with the panels side by side, sharing y, or ``stacked``, sharing x; one legend below, of the
    lines and the levels.

    Args:
        height: in inches, of the whole picture without the legend.
        legend: False leaves it out, as one line does.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    with matplotlib.rc_context(_SETTINGS):
        labels: list[tuple[str, int]] = list(
            dict.fromkeys((line.label, line.index) for panel in panels for line in panel.lines)
        )
        labels += dict.fromkeys((panel.level[1], -1) for panel in panels if panel.level)
        longest = max(len(_visible(label)) for label, _ in labels)
        columns = min(len(labels), 4, int(_LEGEND_LETTERS / (longest + _HANDLE_LETTERS)))
        legend_rows = -(-len(labels) // columns) if legend else 0
        figure = Figure(figsize=(_WIDTH, height + 0.26 * legend_rows), layout="constrained")
        shape = {"nrows": len(panels), "sharex": True} if stacked else {"ncols": len(panels), "sharey": True}
        grid = figure.subplots(squeeze=False, **shape).flatten()
        handles = {}
        for axes, panel in zip(grid, panels):
            for line in panel.lines:
                marker = {"marker": "o", "markersize": 3} if len(line.x) <= _FEW_POINTS else {}
                look = {"color": colour(line.index), "linestyle": _dash(line.index), "linewidth": 1.7}
                (handles[line.label, line.index],) = axes.plot(line.x, line.y, **look, **marker)
            if panel.level:
                look = {"color": "#555555", "linewidth": 1.2, "linestyle": ":"}
                handles[panel.level[1], -1] = axes.axhline(panel.level[0], **look)
            if panel.from_zero:
                axes.set_ylim(bottom=0)
            if panel.top is not None:
                lowest = min(min(line.y) for line in panel.lines)
                if lowest < panel.top:
                    axes.set_ylim(lowest - 0.05 * (panel.top - lowest), panel.top)
            axes.set_ylabel(panel.y_label)
            axes.grid(color="#e4e4e4", linewidth=0.8)
            axes.set_axisbelow(True)
            if max((abs(x) for line in panel.lines for x in line.x), default=0) >= 1000:
                axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k; of small values it would make 500m
            axes.set_xlabel(panel.x_label)
            if stacked:
                axes.label_outer()
        if not stacked:
            for axes in grid[1:]:
                axes.set_ylabel("")
        if not legend or len(labels) == 1:
            return figure
        figure.legend(
            [handles[label] for label in labels],
            [_visible(label) for label, _ in labels],
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            handlelength=3.2,
        )
        return figure


def draw_bars(
    bars: Sequence[Bar],
    part_names: Sequence[str],
    part_colours: Sequence[str | None],
    x_label: str,
    interval_name: str = "",
    bound_name: str = "",
    dots_name: str = "",
):
    """A matplotlib Figure with one horizontal bar below the other, the first on top, and their remarks at the right.

    Args:
        part_names: the legend's words for the parts; none for a part that is 0 in every bar.
        part_colours: of the parts; None for the colour of the bar's configuration.
        interval_name, bound_name, dots_name: the legend's words for the whisker, the marker and the dots.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(_WIDTH, 1.35 + 0.46 * len(bars)), layout="constrained")
        axes = figure.subplots()
        begins = [0.0] * len(bars)
        handles = []
        for place, (name, part_colour) in enumerate(zip(part_names, part_colours)):
            widths = [bar.parts[place] for bar in bars]
            colours = [part_colour or colour(bar.index) for bar in bars]
            axes.barh(range(len(bars)), widths, left=begins, height=0.58, color=colours)
            begins = [begin + width for begin, width in zip(begins, widths)]
            if name and any(widths):
                handles.append(Patch(color=part_colour or "#777777", label=name))
        for row, bar in enumerate(bars):
            if bar.low is not None and bar.high is not None:
                axes.plot([bar.low, bar.high], [row, row], color="#222222", linewidth=1.2, marker="|", markersize=7)
            if bar.bound is not None:
                axes.plot([bar.bound] * 2, [row - 0.4, row + 0.4], color="#000000", linewidth=2.4)
            dots = {"color": "white", "markeredgecolor": "#222222", "markersize": 5}
            axes.plot(bar.dots, [row] * len(bar.dots), "o", **dots)
            axes.text(1.015, row, bar.remark, transform=axes.get_yaxis_transform(), va="center")
            if len({bar.index for bar in bars}) > 1:
                chip = {"color": colour(bar.index), "markersize": 8, "clip_on": False}
                axes.plot([-0.013], [row], "s", transform=axes.get_yaxis_transform(), **chip)
        if interval_name and any(bar.low is not None for bar in bars):
            handles.append(Line2D([], [], color="#222222", linewidth=1.2, marker="|", label=interval_name))
        if bound_name and any(bar.bound is not None for bar in bars):
            upright = {"marker": "|", "markersize": 12, "markeredgewidth": 2.4, "linestyle": "none"}
            handles.append(Line2D([], [], color="#000000", label=bound_name, **upright))
        if dots_name and any(bar.dots for bar in bars):
            handles.append(Line2D([], [], linestyle="none", marker="o", label=dots_name, **dots))
        axes.set_yticks(range(len(bars)), [_visible(bar.label) for bar in bars])
        axes.tick_params(axis="y", length=0, pad=14)
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.set_xlabel(x_label)
        axes.grid(axis="x", color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        if handles:
            place = {"loc": "outside lower center", "ncols": len(handles), "frameon": False}
            figure.legend(handles=handles, columnspacing=1.6, **place)
        return figure


def _visible(label: str) -> str:
    """Short enough for a picture; matplotlib before 3.10 leaves a label that begins with "_" out of a legend."""
    half = _LONGEST_LABEL // 2
    short = label if len(label) <= _LONGEST_LABEL else f"{label[: half - 1]}…{label[-half:]}"
    return "\u200b" + short if short.startswith("_") else short


def data_uri(figure) -> str:
    """The figure as ``data:image/svg+xml;base64,...``, the same bytes every time."""
    import matplotlib

    file = io.BytesIO()
    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": "deepspeed_acco"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = file.getvalue()
    return "data:image/svg+xml;base64," + base64.b64encode(svg[svg.index(b"<svg") :]).decode()
