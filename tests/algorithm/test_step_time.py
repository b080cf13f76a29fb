# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Compares the law of a step's time with it written out, and the choice of a split with all splits tried."""

import itertools

import pytest

from deepspeed_acco.algorithm.schedules import SCHEDULES
from deepspeed_acco.algorithm.step_time import AS_FAST, ROOM, Figures, best_split, step_s

ACCO = SCHEDULES["acco"]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("acco", 4.5 + 1.0), ("wp", 4.5), ("dpu", 4.5), ("sync", 4.0 + 4.5)],
)
def test_the_law(schedule, expected):
    """A = 3, B = 1, a COMMIT of 4.5, an ESTIMATE of 0.5."""
    assert step_s(SCHEDULES[schedule], 3.0, 1.0, 4.5, 0.5) == expected


def test_computation_counts_where_it_is_longer():
    assert step_s(ACCO, 3.0, 1.0, 2.0, 2.0) == 5.0
    assert step_s(SCHEDULES["dpu"], 3.0, 1.0, 2.0) == 4.0


def _by_trying(n, commit, estimate):
    """The split by the rule in words: equally fast, roomy, the largest phase A; else the most room."""

    def time(a):
        return (a if a > commit else commit) + (n - a if n - a > estimate else estimate)

    def room(a):
        return min(a / commit, (n - a) / estimate)

    fast = [a for a in range(1, n) if time(a) <= AS_FAST * min(map(time, range(1, n)))]
    roomy = [a for a in fast if room(a) >= ROOM * (1 - 1e-9)]
    return max(roomy) if roomy else max(fast, key=room)


@pytest.mark.parametrize("n", [2, 3, 5, 10, 64])
def test_the_choice_is_that_of_trying_all(n):
    rounds = (0.003, 0.05, 0.83, 2.0, 3.07, 9.0, 31.7, 200.0)
    for commit, estimate in itertools.product(rounds, rounds):
        chosen = best_split(ACCO, n, Figures(0.5, 0.5 * commit, 0.5 * estimate))
        assert chosen == _by_trying(n, commit, estimate), (n, commit, estimate)


@pytest.mark.parametrize(
    ("n", "commit", "estimate", "a"),
    [
        (10, 8.0, 2.0, 8),  # the only one that hides both: R = 0.8 C
        (10, 5.0, 5.0, 5),
        (10, 4.0, 1.0, 8),  # 9 would leave the ESTIMATE no room
        (10, 1.0, 1.0, 8),
        (10, 1.0, 0.25, 9),
        (2, 100.0, 1.0, 1),
        (3, 1e-3, 5.0, 1),  # more than one micro-batch in phase A only makes phase B's round wait longer
        (4, 0.0, 0.0, 3),  # one rank communicates nothing
        (10**18, 1.0, 0.25, 10**18 - 1),  # found, not searched for
    ],
)
def test_known_splits(n, commit, estimate, a):
    assert best_split(ACCO, n, Figures(1.0, commit, estimate)) == a
