# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Follows where training stands in its window, by what the engine counts and its hooks tell."""

from __future__ import annotations

from ..algorithm.window import Position
from .deepspeed_engine import Engine


class Progress:
    """Counts micro-batches as ``gradient_accumulation_steps`` does: by calls of ``engine.step()``, never by backwards.

    Where somebody else counts - boundaries set by hand, as HF Trainer and Accelerate do, ``no_sync``, accumulation that
    the engine does not manage - there is one such call for a whole window, and none in the ``train_batch`` of a
    PipelineModule. A micro-batch then ends where a training forward follows a backward.

    Attributes:
        position: where training stands.
        is_boundary_by_hand: whether anybody but this package has set the engine's boundary.
    """

    def __init__(self):
        self.position = Position()
        self.is_boundary_by_hand = False
        self._steps_seen: int | None = None  # of the engine; None: as many as there are now
        self._ends_at_forward = False  # the running micro-batch, by who counted at its backward

    def count_steps(self, engine: Engine) -> None:
        """Ends the micro-batches for which ``engine.step()`` was called since the last time."""
        steps = engine.micro_steps
        for _ in range(steps - (steps if self._steps_seen is None else self._steps_seen)):
            self.position = self.position.after_micro_batch()
        self._steps_seen = steps

    def before_training_forward(self, engine: Engine) -> None:
        """Ends the micro-batch that no step ends."""
        self.count_steps(engine)
        if self.position.has_gradients and self._ends_at_forward:
            self.position = self.position.after_micro_batch()

    def after_backward(self, engine: Engine, brought_gradients: bool) -> None:
        """Notes a backward."""
        self.count_steps(engine)
        self._ends_at_forward = (
            self.is_boundary_by_hand
            or engine.inside_no_sync_ctxt
            or engine.pipeline_parallelism
            or not _is_managed(engine)
        )
        self.position = self.position.after_backward(brought_gradients)

    def after_window(self, engine: Engine) -> None:
        """Begins the next window, inside the ``engine.step()`` that ends this one."""
        self.position = self.position.after_window()
        self._steps_seen = engine.micro_steps + 1

    def restart(self, window: int) -> None:
        """Begins that window, after a checkpoint was loaded."""
        self.position = Position(window=window)
        self._steps_seen = None


def _is_managed(engine: Engine) -> bool:
    return getattr(engine._config, "managed_gradient_accumulation", True)  # since DeepSpeed 0.19
