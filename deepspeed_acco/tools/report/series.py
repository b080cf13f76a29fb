# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Prepares the values that both pages draw, and words about them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from ..compare.results import Point

LONG_UNITS = {"s": "seconds", "ms": "milliseconds"}  # for the axis of a picture
_MOST_POINTS = 400


def points(
    curve: Sequence[Point], x: Callable[[Point], float | None], y: Callable[[Point], float | None], factor: float
) -> tuple[list[float], list[float]]:
    """Returns (``factor`` times the values of x, values of y) where both are known."""
    pairs = [(x(point), y(point)) for point in curve]
    known = [(at * factor, value) for at, value in pairs if at is not None and value is not None]
    return [at for at, _ in known], [value for _, value in known]


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Returns at most 400 points: medians of as many neighbors as that needs."""
    size = -(-len(x) // _MOST_POINTS)
    if size <= 1:
        return list(x), list(y)
    groups = range(0, len(x), size)
    return [statistics.median(x[i : i + size]) for i in groups], [statistics.median(y[i : i + size]) for i in groups]


def thinning_words(count: int) -> str:
    """Returns the sentence that says so of so many points."""
    size = -(-count // _MOST_POINTS)
    return f" Each point is the median of {size} windows." if size > 1 else ""


def model_words(numel: int | None, weight_bytes: int | None, comm_bytes: int | None) -> str:
    """Returns the model's size in words."""
    if numel is None:
        return "not known"
    words = f"{numel:,} trainable parameters"
    words += f", weights of {weight_bytes} bytes" if weight_bytes else ""
    return words + (f", communicated in {comm_bytes} bytes" if comm_bytes else "")
