# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Says where training stands in a window, and when a phase or the window is over."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .schedules import Phase, Schedule, names_of


def require_room(schedule: Schedule, window_micro_batches: int) -> None:
    """Checks that a window of n micro-batches has room for the schedule's phases.

    Raises:
        ValueError: for n < 2 with a schedule of two phases.
    """
    n = window_micro_batches
    if n < schedule.least_micro_batches:
        raise ValueError(
            f"ACCO: gradient_accumulation_steps = {n} is not allowed with optimizer.params.schedule = "
            f'"{schedule.name}"; allowed: >= {schedule.least_micro_batches}, since a window has two phases. Set '
            "gradient_accumulation_steps to 2 and halve train_micro_batch_size_per_gpu, or use the schedule "
            f"{names_of(lambda row: not row.has_two_phases)}"
        )


def phase_a_micro_batches(window_micro_batches: int, estimate_fraction: float) -> int:
    """Returns the micro-batches of phase A in a window of n >= 2: round(n * fraction), at least 1, at most n - 1."""
    n = window_micro_batches
    assert n >= 2, "a window with two phases has a micro-batch for each"
    return min(max(round(n * estimate_fraction), 1), n - 1)


@dataclass(frozen=True)
class Limits:
    """Holds how many micro-batches a phase has at least and at most; fixed accumulation leaves no choice."""

    least: int
    most: int

    def allow_end(self, micro_batches: int, is_round_finished: bool) -> bool:
        """Tells whether a phase with so many micro-batches may end, while the round behind it is finished or not."""
        return micro_batches >= self.most or (micro_batches >= self.least and is_round_finished)


@dataclass(frozen=True)
class Position:
    """Says where training stands. A micro-batch is everything from the first forward that builds a graph after a
    backward to the last backward before the next such forward; it counts once."""

    window: int = 0
    phase: Phase = Phase.A
    micro_batches: int = 0  # of this window
    micro_batches_in_a: int = 0  # of this window, fixed when phase B begins
    is_graph_outstanding: bool = False  # a training forward was seen and no backward since
    is_eval_graph_outstanding: bool = False  # the same of an eval-mode forward, which may never get a backward

    @property
    def is_between_windows(self) -> bool:
        """Tells whether nothing of the window was computed or sent yet."""
        return self.phase is Phase.A and not self.micro_batches

    def after_forward(self) -> Position:
        """Returns where training stands after a training forward."""
        return replace(self, is_graph_outstanding=True)

    def after_eval_forward(self) -> Position:
        """Returns where training stands after an eval-mode forward that builds a graph."""
        return replace(self, is_eval_graph_outstanding=True)

    def after_backward(self) -> Position:
        """Returns where training stands after a backward, which counts where a graph was outstanding."""
        counted = self.micro_batches + (self.is_graph_outstanding or self.is_eval_graph_outstanding)
        return replace(self, micro_batches=counted, is_graph_outstanding=False, is_eval_graph_outstanding=False)

    def is_phase_a_over(self, schedule: Schedule, limits: Limits, is_round_finished: bool = False) -> bool:
        """Tells whether the next forward begins phase B: only there, with no graph outstanding, may weights change in
        mid-window."""
        return (
            schedule.has_two_phases
            and self.phase is Phase.A
            and limits.allow_end(self.micro_batches, is_round_finished)
            and not self.is_graph_outstanding
        )

    def is_window_over(self, schedule: Schedule, limits: Limits, is_round_finished: bool) -> bool:
        """Tells after a backward whether the window ends, where nobody else decides it; ``limits`` are the last
        phase's."""
        is_last_phase = not schedule.has_two_phases or self.phase is Phase.B
        return is_last_phase and limits.allow_end(self.micro_batches - self.micro_batches_in_a, is_round_finished)

    def after_phase_a(self) -> Position:
        """Returns the start of phase B in the same window."""
        return replace(self, phase=Phase.B, micro_batches_in_a=self.micro_batches)

    def after_window(self) -> Position:
        """Returns the start of the next window."""
        return Position(window=self.window + 1)

    def after_dropped_gradients(self) -> Position:
        """Returns the start of the same window, whose gradients the user threw away; the installed weights stay."""
        return Position(window=self.window)
