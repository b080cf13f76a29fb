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
    """Says where training stands: in which window, and in which of its micro-batches, however many forwards and
    backwards these have. Whoever counts them calls :meth:`after_micro_batch`."""

    window: int = 0
    phase: Phase = Phase.A
    micro_batches: int = 0  # of this window, ended ones
    micro_batches_in_a: int = 0  # of this window, fixed when phase B begins
    is_graph_outstanding: bool = False  # a training forward was seen and no backward since
    has_gradients: bool = False  # the running micro-batch has had a backward

    @property
    def is_between_windows(self) -> bool:
        """Tells whether nothing of the window was computed or sent yet."""
        return self.phase is Phase.A and not self.started_micro_batches

    @property
    def started_micro_batches(self) -> int:
        """Returns the window's micro-batches with the running one, once it has had a backward."""
        return self.micro_batches + self.has_gradients

    @property
    def started_in_phase(self) -> int:
        """Returns those of them that belong to the running phase."""
        return self.started_micro_batches - self.micro_batches_in_a

    def after_forward(self) -> Position:
        """Returns where training stands after a training forward."""
        return replace(self, is_graph_outstanding=True)

    def after_backward(self, brought_gradients: bool = False) -> Position:
        """Returns where training stands after a backward. One of no training forward that was seen counts where it
        brought gradients of parameters."""
        has_gradients = self.has_gradients or self.is_graph_outstanding or brought_gradients
        return replace(self, has_gradients=has_gradients, is_graph_outstanding=False)

    def after_micro_batch(self) -> Position:
        """Returns the start of the next micro-batch in the same phase."""
        return replace(self, micro_batches=self.micro_batches + 1, has_gradients=False, is_graph_outstanding=False)

    def is_phase_a_over(self, schedule: Schedule, limits: Limits, is_round_finished: bool = False) -> bool:
        """Tells whether the next forward begins phase B: only there, between two micro-batches, may weights change in
        mid-window."""
        return (
            schedule.has_two_phases
            and self.phase is Phase.A
            and limits.allow_end(self.micro_batches, is_round_finished)
            and not (self.is_graph_outstanding or self.has_gradients)
        )

    def is_window_over(self, schedule: Schedule, limits: Limits, is_round_finished: bool) -> bool:
        """Tells after a backward whether the window ends with its micro-batch, where nobody else decides it; ``limits``
        are the last phase's."""
        is_last_phase = not schedule.has_two_phases or self.phase is Phase.B
        return is_last_phase and limits.allow_end(self.started_in_phase, is_round_finished)

    def after_phase_a(self) -> Position:
        """Returns the start of phase B in the same window."""
        return replace(self, phase=Phase.B, micro_batches_in_a=self.micro_batches)

    def after_window(self) -> Position:
        """Returns the start of the next window."""
        return Position(window=self.window + 1)

    def after_dropped_gradients(self) -> Position:
        """Returns the start of the same window, whose gradients the user threw away; the installed weights stay."""
        return Position(window=self.window)
