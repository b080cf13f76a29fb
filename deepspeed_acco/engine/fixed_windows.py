# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Says how long windows are where every one has ``gradient_accumulation_steps`` micro-batches on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..algorithm.schedules import Phase, Schedule
from ..algorithm.window import Limits, Position
from ..runtime.round_inputs import Contribution
from .auto_fraction import AutoFraction
from .deepspeed_engine import Engine


class FixedWindows:
    """Leaves counting to the engine. What it answers is what :class:`~.adaptive_windows.AdaptiveWindows` overrides."""

    def __init__(self, fraction: AutoFraction):
        self._fraction = fraction

    def limits(self, schedule: Schedule, position: Position, n: int) -> Limits:
        """Returns how many micro-batches the phase has that training is in; ``schedule`` has two."""
        in_a = self._fraction.phase_a(n)
        wanted = in_a if position.phase is Phase.A else n - in_a
        return Limits(wanted, wanted)

    def renormalize(self, micro_batches: int, n: int) -> float:
        """Returns by what phase A's sum of so many micro-batches is multiplied to stand for the window's."""
        return n / micro_batches

    def contribution(self, micro_batches: int, n: int) -> Contribution | None:
        """Returns what this rank reports in a round: nothing, since all ranks send as many micro-batches."""
        return None

    def require_plain_loop(self, engine: Engine) -> None:
        """Allows every loop."""

    def refuse_boundary(self, is_boundary: bool) -> None:
        """Allows boundaries set by hand."""

    def require_droppable(self, phase: Phase) -> None:
        """Allows ``zero_grad()`` at every moment."""

    def require_known_sum(self) -> None:
        """Allows ``safe_get_full_grad`` and ``safe_set_full_grad``."""

    def after_backward(self, engine: Engine, schedule: Schedule, position: Position) -> None:
        """Leaves the window's end to the engine's own count."""

    @contextmanager
    def own_bookkeeping(self, engine: Engine) -> Iterator[None]:
        """Returns a context around the engine's step, which counts as it always does; a scheduler that was taken away
        inside (skipped_steps.py) comes back."""
        scheduler = engine.lr_scheduler
        try:
            yield
        finally:
            engine.lr_scheduler = scheduler

    def count(self, engine: Engine) -> None:
        """Enters nothing: the engine has counted."""

    def step_scheduler(self, engine: Engine, lr_kwargs) -> None:
        """Does nothing: the engine has moved the scheduler."""

    def take_ends(self, engine: Engine, ended: int | None = None) -> dict[int, int]:
        """Returns for the windows that are newly counted, by their numbers, the samples at their ends.

        Args:
            ended: number of the window that the engine has just counted; None: of none.
        """
        return {} if ended is None else {ended: engine.global_samples}

    def micro_batches_to_tell(self, own: int) -> int | None:
        """Returns the micro-batches of the window that ended, for the monitor."""
        return own

    def to_state(self) -> dict[str, int]:
        """Returns what a checkpoint keeps of the counts: nothing."""
        return {}

    def from_state(self, state) -> None:
        """Takes nothing out of a checkpoint."""
