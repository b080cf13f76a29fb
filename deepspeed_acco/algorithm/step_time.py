# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""THE LAW of a step's time, and THE CHOICE of a window's split by it (ACCO, arXiv 2406.02613, section 3).

Each round runs beside the computation that it hides behind (schedules.py), so the longer of the two counts. Plan, the
key ``"estimate_fraction": "auto"``, comparisons and benchmarks all ask here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .schedules import Schedule

WARM_UP_STEPS = 2  # a run's first steps load, build and fill: no figure counts them
AS_FAST = 1.005  # splits within half a percent are equally fast
ROOM = 1.1  # a round may take so many times longer beside computation than alone


def step_s(
    schedule: Schedule, phase_a_s: float, phase_b_s: float, end_round_s: float, phase_b_round_s: float = 0.0
) -> float:
    """Returns the least time of a step, in seconds.

    Args:
        phase_a_s, phase_b_s: computation of the phases; a schedule with one phase sees their sum.
        end_round_s: the round that starts at the window's end, with nothing beside it.
        phase_b_round_s: likewise the round that starts with phase B, where there is one.
    """
    if schedule.blocks:
        return phase_a_s + phase_b_s + end_round_s
    if not schedule.has_two_phases:
        return max(phase_a_s + phase_b_s, end_round_s)
    return max(phase_a_s, end_round_s) + max(phase_b_s, phase_b_round_s)


@dataclass(frozen=True)
class Figures:
    """What a window of two phases is made of, in seconds: a micro-batch without waiting, and its two rounds alone."""

    micro_batch_s: float
    commit_s: float
    estimate_s: float

    def step_s(self, schedule: Schedule, n: int, a: int) -> float:
        """Returns the least time of a window with ``a`` of its ``n`` micro-batches in phase A."""
        return step_s(schedule, a * self.micro_batch_s, (n - a) * self.micro_batch_s, self.commit_s, self.estimate_s)


def best_split(schedule: Schedule, n: int, figures: Figures) -> int:
    """Chooses the micro-batches of phase A, in 1..n-1, for a schedule of two phases.

    Of the equally fast splits it takes the one with the largest phase A, since the estimate is the better the more of
    the batch it has seen, that leaves both rounds room to take :data:`ROOM` times as long; where none does, the one
    that leaves them the most, in proportion to their length. The time is convex in the split, so that a few
    evaluations find it, however large n is.
    """

    def time(a: int) -> float:
        return figures.step_s(schedule, n, a)

    def within(a: float) -> int:
        return int(min(max(a, 1), n - 1))

    def room(a: int) -> float:
        return min(_ratio(a, figures.commit_s), _ratio(n - a, figures.estimate_s))

    hides_commit = figures.commit_s / figures.micro_batch_s  # micro-batches that last as long
    hides_estimate = figures.estimate_s / figures.micro_batch_s
    corners = [1, n - 1, *(within(turn(at)) for at in (hides_commit, n - hides_estimate) for turn in _BOTH_WAYS)]
    fastest = min(corners, key=time)
    limit_s = AS_FAST * time(fastest)
    first = _last_true(lambda steps: time(fastest - steps) <= limit_s, fastest - 1)
    last = _last_true(lambda steps: time(fastest + steps) <= limit_s, n - 1 - fastest)
    first, last = fastest - first, fastest + last
    roomiest = min(last, max(1, n - math.ceil(ROOM * hides_estimate)))
    if roomiest >= first and room(roomiest) * figures.micro_batch_s >= ROOM * (1 - 1e-9):
        return roomiest
    balanced = n * hides_commit / (hides_commit + hides_estimate)
    return max((min(max(within(turn(balanced)), first), last) for turn in _BOTH_WAYS), key=room)


_BOTH_WAYS = (math.floor, math.ceil)


def _ratio(above: float, below: float) -> float:
    return above / below if below > 0 else math.inf


def _last_true(holds, most: int) -> int:
    """Returns the largest number in 0..most for which ``holds``, true at 0 and never true again once false."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
