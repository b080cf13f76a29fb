# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Declares what a round takes along when it is launched."""

from __future__ import annotations

from dataclasses import dataclass

from ..optim.adamw import AdamWHyper


@dataclass(frozen=True)
class Contribution:
    """Holds what one rank reports to the others in a round of an adaptive window."""

    micro_batches: int  # whose gradients it sends
    nominal: int  # micro-batches of all ranks for which ``grad_scale`` makes the mean
    is_data_over: bool  # it has no micro-batch after these


@dataclass(frozen=True)
class RoundInputs:
    """Holds what a round takes along when it is launched; later changes (LR scheduler, loss scale) do not reach it."""

    hyper: tuple[AdamWHyper, ...]  # one per parameter group
    pre_scale: float  # multiplies the gradients before they are summed over the ranks
    grad_scale: float  # multiplies the sum: together they make the mean gradient without loss scale
    clip_grad: float  # largest global norm; 0: no clipping
    window: int  # number of the window whose gradients it takes
    contribution: Contribution | None = None  # None: every rank sends as many micro-batches as every other
