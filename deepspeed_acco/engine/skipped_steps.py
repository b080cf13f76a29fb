# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Tells and counts the steps that were skipped for a gradient that is not finite, be it one step later."""

from __future__ import annotations

from ..runtime.outcomes import OutcomeLog
from .deepspeed_engine import Engine
from .log import logger


class SkippedSteps:
    """Keeps the engine's books of skipped steps as ZeRO-1 would: a line in the log, ``skipped_steps``, and a scheduler
    that does not move. Where a round overlaps the scheduler has moved already: it then waits at the next step.

    Attributes:
        scheduler_ahead: so many steps the scheduler is ahead of where it should be.
    """

    def __init__(self, outcomes: OutcomeLog):
        self.scheduler_ahead = 0
        self._outcomes = outcomes
        self._reader = outcomes.reader()

    def wait(self, engine: Engine) -> None:
        """Enters all that has finished, waiting for the device."""
        self._reader.wait()
        self._enter_late(engine, self._reader.take_skipped(), engine.global_steps)

    def at_step(self, engine: Engine, is_known: bool) -> bool:
        """Enters what is newly known, and makes the scheduler wait where it is ahead.

        Args:
            is_known: the step's own COMMIT has finished.

        Returns:
            Whether it was skipped: the engine then counts it, and leaves the scheduler where it is.
        """
        last = self._outcomes.last_commit
        is_skipped = False
        if is_known and last is not None:
            self._reader.wait()
            is_skipped = not last.is_finite.value()
        self._enter_late(engine, self._reader.take_skipped() - is_skipped, engine.global_steps)
        if is_skipped:
            self._tell(engine, 1, engine.global_steps + 1)
        elif self.scheduler_ahead and engine.lr_scheduler is not None:
            engine.lr_scheduler = None  # until the engine's own step is over (fixed_windows.py)
            self.scheduler_ahead -= 1
        return is_skipped

    def _enter_late(self, engine: Engine, count: int, last_step: int) -> None:
        engine.skipped_steps += count
        self.scheduler_ahead += count
        self._tell(engine, count, last_step)

    def _tell(self, engine: Engine, count: int, last_step: int) -> None:
        if count and engine.global_rank == 0:
            steps = f"step {last_step} was" if count == 1 else f"{count} steps, the last of them {last_step}, were"
            logger().warning(
                f"ACCO: {steps} skipped: the gradient was not finite. Weights and AdamW's state are as before; skipped "
                f"so far: {engine.skipped_steps + (last_step > engine.global_steps)}"
            )
