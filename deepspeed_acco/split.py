# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Where a window is split into its phases: ``estimate_fraction``, as given or, with ``"auto"``, chosen once by what the
first windows took (DESIGN.md section 9)."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from .driver import RoundDriver
from .lanes import Instant
from .log import logger
from .settings import AUTO, Settings, phase_a_micro_batches

WINDOWS_TO_MEASURE = 10
WARM_UP_WINDOWS = 2  # of them: they load, build and fill, and are left out
_AS_FAST = 1.005


@dataclass(frozen=True)
class Figures:
    """What one rank measured, in seconds: a micro-batch without waiting, and the two rounds."""

    micro_batch_s: float
    commit_s: float
    estimate_s: float


def step_s(a: int, n: int, of: Figures) -> float:
    """The least that a window takes with ``a`` of its ``n`` micro-batches in phase A (rounds.py: COMMIT runs behind
    phase A, ESTIMATE behind phase B)."""
    return max(a * of.micro_batch_s, of.commit_s) + max((n - a) * of.micro_batch_s, of.estimate_s)


def fastest_split(n: int, of: Figures) -> int:
    """The ``a`` in 1..n-1 with the shortest window; of those within half a percent the one that leaves both rounds the
    most room, in proportion to their length."""
    fastest = min(step_s(a, n, of) for a in range(1, n))
    as_fast = [a for a in range(1, n) if step_s(a, n, of) <= _AS_FAST * fastest]
    return max(as_fast, key=lambda a: min(a / of.commit_s, (n - a) / of.estimate_s))


@dataclass
class _Measured:
    micro_batch_s: list[float] = field(default_factory=list)
    commit_s: list[float] = field(default_factory=list)
    estimate_s: list[float] = field(default_factory=list)


class Split:
    """The fraction that holds now.

    Attributes:
        fraction: part of a window's micro-batches that phase A has.
        is_chosen: whether ``auto`` has made its choice; True where a number was given.
    """

    def __init__(self, settings: Settings, driver: RoundDriver):
        self.fraction = settings.first_estimate_fraction
        self.is_chosen = settings.estimate_fraction != AUTO
        self._driver = driver
        self._first_window = settings.overlap_warmup_steps
        self._windows = 0
        self._measured = _Measured()
        self._began: Instant | None = None
        self._seen = driver.lane.times()

    def phase_a(self, n: int) -> int:
        """Micro-batches of phase A in a window of ``n``."""
        return phase_a_micro_batches(n, self.fraction)

    def to_state(self) -> float | None:
        """What a checkpoint keeps: the choice of ``auto``; None before it was made."""
        return self.fraction if self.is_chosen else None

    def from_state(self, fraction: float | None) -> None:
        """Takes over the choice that a checkpoint has; with a number in the settings that one holds."""
        if fraction is not None and not self.is_chosen:
            self.fraction, self.is_chosen = fraction, True

    def at_window_end(self, window: int, n: int, micro_batches: int, log: bool) -> None:
        """Measures the window that ends, before its COMMIT is started; after enough of them chooses, on all ranks at
        the same window and alike.

        Args:
            window: its number. n: micro-batches of the next one. micro_batches: this rank's of this one.
            log: whether this rank tells the choice.
        """
        if self.is_chosen or window < self._first_window:
            return
        self._driver.finish()
        self._measure(micro_batches)
        self._windows += 1
        if self._windows == WINDOWS_TO_MEASURE:
            self._choose(n, log)

    def _measure(self, micro_batches: int):
        now, times = Instant(self._driver.comm.device), self._driver.lane.times()
        spent, self._seen = times.since(self._seen), times
        if self._began is not None and self._windows >= WARM_UP_WINDOWS:
            now.wait()
            computed_s = now.seconds_since(self._began) - spent.exposed_s
            if micro_batches:
                self._measured.micro_batch_s.append(computed_s / micro_batches)
            for kind, values in (("COMMIT", self._measured.commit_s), ("ESTIMATE", self._measured.estimate_s)):
                if spent.rounds_of.get(kind):
                    values.append(spent.round_s_of[kind] / spent.rounds_of[kind])
        self._began = now

    def _choose(self, n: int, log: bool):
        own = [list(values) for values in vars(self._measured).values()]
        told = self._driver.comm.gather_objects([statistics.median(values) if values else None for values in own])
        self._windows, self._measured = 0, _Measured()
        if any(value is None or value <= 0 for of_rank in told for value in of_rank):
            return  # no window had two phases: measure on
        micro_batch_s, commit_s, estimate_s = zip(*told)
        # The slowest rank computes longest; a round's own duration is what the rank saw that came to it last.
        of = Figures(max(micro_batch_s), min(commit_s), min(estimate_s))
        a = fastest_split(n, of)
        self.fraction, self.is_chosen = a / n, True
        if log:
            logger().info(
                f"ACCO: estimate_fraction = {self.fraction:.4g} chosen (a={a} b={n - a}): a COMMIT takes "
                f"{of.commit_s:.3g} s, an ESTIMATE {of.estimate_s:.3g} s, a micro-batch {of.micro_batch_s:.3g} s, so "
                f"that a step can take {step_s(a, n, of):.3g} s"
            )
