# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Holds the colors of pictures and tables: cool ones and grays are configurations, warm ones parts of a step's time.

So no color has two meanings. Derived from Okabe and Ito's palette; any two of a table are told apart with each of the
common color blindnesses, as Machado, Oliveira and Fernandes simulate them ("A Physiologically-based Model for
Simulation of Color Vision Deficiency", 2009). ``*_DARK`` are for dark backgrounds.
"""

from __future__ import annotations

from collections.abc import Sequence

SERIES = {
    "acco": "#0072B2",
    "acco_int4": "#56B4E9",
    "acco_int8": "#6A2E86",
    "acco_adaptive": "#9164ED",
    "local": "#4800F0",
    "wp": "#009E73",
    "dpu": "#CC79A7",
    "sync": "#284B2A",
    "zero0": "#677075",
    "zero1": "#222222",
    "zero2": "#51545E",
    "zero3": "#9EBCA3",
}
SERIES_DARK = {
    "acco": "#4B82C1",
    "acco_int4": "#66CCF7",
    "acco_int8": "#A380F9",
    "acco_adaptive": "#6F4EBE",
    "local": "#A830FC",
    "wp": "#147B3D",
    "dpu": "#974985",
    "sync": "#5AAE77",
    "zero0": "#D1D8D3",
    "zero1": "#F2F2F2",
    "zero2": "#7E8281",
    "zero3": "#AEB4B5",
}
# "compute" is also a step's time that is not split; "bound" is a marker, the others are areas.
PARTS = {"compute": "#F0C466", "exposed": "#D55E00", "overhead": "#7A4A12", "bound": "#6B0F1A"}
PARTS_DARK = {"compute": "#E8C77A", "exposed": "#E0662A", "overhead": "#8A5A34", "bound": "#FFE9DC"}


def colors_of(names: Sequence[str], is_dark: bool = False) -> dict[str, str]:
    """Returns the color of each configuration in one picture, by its name.

    A name of the table has its own color in every picture. The others get those that no name of this picture has, in
    the table's order; with more names than colors they begin again.
    """
    table = SERIES_DARK if is_dark else SERIES
    free = [color for name, color in table.items() if name not in names] or list(table.values())
    others = [name for name in dict.fromkeys(names) if name not in table]
    given = {name: free[place % len(free)] for place, name in enumerate(others)}
    return {name: table.get(name) or given[name] for name in names}
