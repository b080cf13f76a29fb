# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Holds ``estimate_fraction``, as given or, with ``"auto"``, chosen once by what the first windows took."""

from __future__ import annotations

import statistics

from ..algorithm.schedules import SCHEDULES
from ..algorithm.step_time import WARM_UP_STEPS, Figures, best_split
from ..algorithm.window import phase_a_micro_batches
from ..runtime.clock import Instant, LaneTimes
from ..runtime.communicator import Communicator
from ..runtime.driver import RoundDriver
from ..runtime.lanes import InlineLane
from ..settings import FIRST_OF_AUTO, Settings
from .log import logger

WINDOWS_TO_MEASURE = 10


class _Measuring:
    """Collects the figures of some windows."""

    def __init__(self):
        self.windows = 0
        self.began: Instant | None = None
        self.seen: LaneTimes | None = None
        self.micro_batch_s: list[float] = []
        self.round_s: dict[str, list[float]] = {"COMMIT": [], "ESTIMATE": []}

    def enter(self, device, lane: InlineLane, micro_batches: int) -> None:
        """Enters the window that ends. Waits for the device, so that its times are known."""
        now = Instant(device)
        now.wait()
        times = lane.times()
        if self.began is not None and self.seen is not None and self.windows >= WARM_UP_STEPS:
            spent = times.since(self.seen)
            if micro_batches:
                self.micro_batch_s.append((now.seconds_since(self.began) - spent.exposed_s) / micro_batches)
            for kind, values in self.round_s.items():
                if spent.rounds_of.get(kind):
                    values.append(spent.round_s_of[kind] / spent.rounds_of[kind])
        self.began, self.seen = now, times
        self.windows += 1

    def medians(self) -> list[float | None]:
        """Returns them in the order of :class:`Figures`; None for what no window had."""
        lists = (self.micro_batch_s, self.round_s["COMMIT"], self.round_s["ESTIMATE"])
        return [statistics.median(values) if values else None for values in lists]


class AutoFraction:
    """Holds the fraction that is in force now. While ``auto`` measures, every window's end waits for its round and on
    CUDA for the device.

    Attributes:
        fraction: part of a window's micro-batches that phase A has.
    """

    def __init__(self, settings: Settings, driver: RoundDriver, comm: Communicator, lane: InlineLane):
        self.fraction = settings.first_estimate_fraction
        self._driver = driver
        self._comm = comm
        self._lane = lane
        self._schedule = SCHEDULES[settings.schedule]
        self._is_auto = isinstance(settings.estimate_fraction, str)
        self._first_window = settings.overlap_warmup_steps
        self._measuring = _Measuring() if self._is_auto else None  # None: the fraction is settled
        self._has_warned = False

    def phase_a(self, n: int) -> int:
        """Returns the micro-batches of phase A in a window of ``n``."""
        return phase_a_micro_batches(n, self.fraction)

    def to_state(self) -> float | None:
        """Returns the choice of ``auto``, for a checkpoint; None before it was made, and where a number was given."""
        return self.fraction if self._is_auto and self._measuring is None else None

    def from_state(self, fraction: float | None) -> None:
        """Makes ``auto`` go on as the run that saved the checkpoint: with its choice, or measuring where it had none. A
        number in the settings holds, whatever the file says."""
        if not self._is_auto:
            return
        self.fraction = FIRST_OF_AUTO if fraction is None else fraction
        self._measuring = _Measuring() if fraction is None else None

    def at_window_end(self, window: int, n: int, micro_batches: int, *, logs: bool) -> None:
        """Measures the window that ends, before its COMMIT is started; after enough of them chooses, on all ranks at
        the same window and alike.

        Args:
            window: its number. n: micro-batches of the next one. micro_batches: this rank's of this one.
            logs: whether this rank tells the choice.
        """
        if self._measuring is None or window < self._first_window:
            return
        self._driver.finish()
        self._measuring.enter(self._comm.device, self._lane, micro_batches)
        if self._measuring.windows < WINDOWS_TO_MEASURE:
            return
        reported = self._comm.gather_from_all(self._measuring.medians())
        self._measuring = _Measuring()
        if any(value is None or value <= 0 for of_rank in reported for value in of_rank):
            if logs and not self._has_warned:
                self._has_warned = True
                logger().warning(
                    f"ACCO: estimate_fraction stays {self.fraction:g}: in {WINDOWS_TO_MEASURE} windows some rank had "
                    "none with two phases. It is measured on. This is said once"
                )
            return
        micro_batch_s, commit_s, estimate_s = zip(*reported)
        # The slowest rank computes longest; a round's own duration is what the rank saw that came to it last.
        of = Figures(max(micro_batch_s), min(commit_s), min(estimate_s))
        a = best_split(self._schedule, n, of)
        self.fraction, self._measuring = a / n, None
        if logs:
            logger().info(
                f"ACCO: estimate_fraction = {self.fraction:.4g} chosen (a={a} b={n - a}): a COMMIT takes "
                f"{of.commit_s:.3g} s, an ESTIMATE {of.estimate_s:.3g} s, a micro-batch {of.micro_batch_s:.3g} s, so "
                f"that a step can take {of.step_s(self._schedule, n, a):.3g} s"
            )
